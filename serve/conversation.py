"""A question or a chat with pictures, checked and turned into the token ids that the model reads."""

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from tokenizers import Tokenizer

from switchkd.export.bundle import Bundle, BundleError
from switchkd.export.prompt import PromptError, expand_image_token, render_chat

Message = Mapping[str, Any]


class ConversationError(ValueError):
    """A question, a message or a number of pictures that cannot be asked."""


def to_messages(question: str | Sequence[Message], pictures: int) -> list[Message]:
    """Return chat messages that place every picture; a plain question is asked about all of them at once.

    Raises ConversationError where nothing is asked, or where messages and pictures do not match.
    """
    if isinstance(question, str):
        if not question.strip():
            raise ConversationError("the question is empty; ask something")
        parts = [*({"type": "image"} for _ in range(pictures)), {"type": "text", "text": question.strip()}]
        return [{"role": "user", "content": parts}]
    messages = list(question)
    if not messages:
        raise ConversationError("there are no messages; ask something")
    places = sum(_check_message(message, f"message {number}") for number, message in enumerate(messages, 1))
    if places != pictures:
        raise ConversationError(
            f"the messages have {places} image parts and {pictures} pictures were given; "
            'give one picture for every part {"type": "image"}'
        )
    return messages


def _check_message(message: Message, where: str) -> int:
    """Return how many pictures a message places."""
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise ConversationError(f"{where}: expected an object with role and content")
    content = message.get("content")
    if isinstance(content, str):
        return 0
    if not isinstance(content, Sequence):
        raise ConversationError(f"{where}: content is {type(content).__name__}, expected text or a list of parts")
    pictures = 0
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "image":
            pictures += 1
        elif kind != "text" or not isinstance(part.get("text"), str):
            raise ConversationError(
                f'{where}: a part is {part!r}, expected {{"type": "image"}} or {{"type": "text", "text": ...}}'
            )
    return pictures


@lru_cache(maxsize=16)
def _loses_strings(template: str, special_tokens: tuple[tuple[str, str], ...]) -> bool:
    """Whether a template leaves out content that is a plain string, and takes the same as parts.

    LLaVA-1.5's own does: it goes through the content's parts, and finds none among a string's characters.
    """
    words = {"user": "one two three", "assistant": "four five six"}

    def renders(content: Callable[[str], Any]) -> bool:
        messages = [{"role": role, "content": content(text)} for role, text in words.items()]
        try:
            text = render_chat(template, messages, add_generation_prompt=True, special_tokens=dict(special_tokens))
        except PromptError:
            return False
        return all(each in text for each in words.values())

    return not renders(str) and renders(_as_parts)


def _as_parts(content: Any) -> Any:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


class PromptTokens:
    """Renders messages with the bundle's chat template and tokenizer."""

    def __init__(self, bundle: Bundle, tokenizer: Tokenizer) -> None:
        self._bundle = bundle
        self._tokenizer = tokenizer
        image = bundle.model.image_token
        if tokenizer.token_to_id(image) != bundle.model.image_token_id:
            raise BundleError(
                f"{bundle.tokenizer_path}: {image} has the id {tokenizer.token_to_id(image)}, the manifest says "
                f"{bundle.model.image_token_id}; export again"
            )

    def encode(self, messages: Sequence[Message], pictures: int) -> list[int]:
        """Return the prompt's token ids, in which the image token stands once for every visual token.

        Raises ConversationError where a text itself holds the image token.
        """
        model, template, special_tokens = self._bundle.model, self._bundle.chat_template, self._bundle.special_tokens
        if _loses_strings(template, tuple(special_tokens.items())):
            messages = [{**message, "content": _as_parts(message["content"])} for message in messages]
        text = render_chat(template, messages, add_generation_prompt=True, special_tokens=special_tokens)
        if text.count(model.image_token) != pictures:
            raise ConversationError(
                f"the prompt holds {model.image_token} {text.count(model.image_token)} times for {pictures} pictures; "
                f"leave {model.image_token} out of the text, pictures are placed by themselves"
            )
        text = expand_image_token(text, model.image_token, model.tokens_per_picture)
        # As transformers does it: a template that writes the BOS token itself must not get a second one.
        bos = self._bundle.special_tokens.get("bos_token")
        add_special_tokens = bos is None or not text.startswith(bos)
        return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)
