"""Serving: a bundle folder, pictures and messages in, streamed answers out; never imports torch."""

from switchkd.export.contract.bundle import BundleError
from switchkd.export.contract.pixels import Picture, PictureError
from switchkd.export.contract.prompt import Message, PromptError
from switchkd.export.process.memory import return_freed_blocks

from .engine.conversation import ConversationError
from .engine.engine import MAX_NEW_TOKENS, Answer, AnswerStream, Engine, Seconds
from .engine.prefix_folder import PrefixFolderError
from .engine.sampling import Sampling, SamplingError, TokenLogprob

__all__ = [
    "MAX_NEW_TOKENS",
    "Answer",
    "AnswerStream",
    "BundleError",
    "ConversationError",
    "Engine",
    "Message",
    "Picture",
    "PictureError",
    "PrefixFolderError",
    "PromptError",
    "Sampling",
    "SamplingError",
    "Seconds",
    "TokenLogprob",
    "return_freed_blocks",
]
