"""Pictures and messages in, a stream of text out: the whole of answering from a bundle, without torch.

Shapes in names: T prompt tokens, N visual tokens, D hidden width, V vocabulary.
"""

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Literal, Self, TypeVar

from tokenizers import Tokenizer

from switchkd.export.contract.bundle import Bundle, BundleError
from switchkd.export.contract.generation_settings import GenerationError, GenerationSettings
from switchkd.export.contract.json_fields import parse_object
from switchkd.export.contract.prompt import Message, TokenizerError, read_tokenizer

from .conversation import ConversationError, PromptTokens, to_messages
from .decoder import Decoder, Floats
from .picture_encoder import OpenPicture, Picture, PictureEncoder
from .prefix_cache import PREFIX_MEMORY, PrefixCache
from .prefix_folder import PrefixFolder, fingerprint
from .prompt_reader import PromptReader
from .sampling import Sampler, Sampling, SamplingError, TokenLogprob, token_logprob
from .text_stream import TextStream
from .token_rules import TokenRules

MAX_NEW_TOKENS = 256
T = TypeVar("T")
MOST_LOGPROBS = 20  # likeliest tokens that are told for each written one
MOST_THREADS = 1024  # of a graph; onnxruntime would start as many as it is told


@dataclass(frozen=True)
class Seconds:
    """Where an answer's time went: its pictures opened and encoded, the prompt read, the later tokens written."""

    preprocess: float = 0.0
    encode: float = 0.0
    prefill: float = 0.0
    decode: float = 0.0

    @property
    def pictures(self) -> float:
        """Seconds that the pictures took, opened and encoded."""
        return self.preprocess + self.encode

    @property
    def first_token(self) -> float:
        """Seconds until the first token."""
        return self.pictures + self.prefill


@dataclass(frozen=True)
class Answer:
    """What was answered: text, token ids (the end token is not among them), why it ended, and how long it took."""

    text: str
    tokens: tuple[int, ...]
    prompt_tokens: int
    finish_reason: Literal["stop", "length"] | None  # None: not finished
    seconds: Seconds
    logprobs: tuple[TokenLogprob, ...] | None = None  # of `tokens`, where they were asked for

    @property
    def tokens_per_second(self) -> float | None:
        """Speed of writing after the first token, or None where there was no second one."""
        return (len(self.tokens) - 1) / self.seconds.decode if self.seconds.decode and len(self.tokens) > 1 else None


@dataclass(frozen=True)
class _Request:
    """One checked request: token ids of the prompt, its pictures in order, seconds to open them."""

    prompt: Sequence[int]
    pictures: Sequence[OpenPicture]
    opening: float
    max_tokens: int
    sampling: Sampling
    logprobs: int | None = None


class AnswerStream(Iterator[str]):
    """The pieces of one answer as they come; `answer` holds what has been answered so far."""

    def __init__(self, engine: "Engine", request: _Request) -> None:
        self._engine = engine
        self._request = request
        self._sampler = Sampler(request.sampling, engine.settings)
        model = engine.bundle.model
        self._rules = TokenRules(engine.settings, request.prompt, model.eos_token_ids, model.vocab_size)
        self._text = TextStream(engine.tokenizer)
        self._tokens: list[int] = []
        self._logprobs: list[TokenLogprob] = []
        self._seconds = {"preprocess": request.opening, "encode": 0.0, "prefill": 0.0, "decode": 0.0}
        self._finish_reason: Literal["stop", "length"] | None = None
        self._pieces = self._write()

    def __next__(self) -> str:
        while not (piece := self.step()):
            pass
        return piece

    def step(self) -> str:
        """Do the next bit of work, of a picture, of some positions of the prompt or of a token, and return its text.

        That is "" for most of them. Raises StopIteration behind the last. So answers can take turns.
        """
        return next(self._pieces)

    def settled_logprobs(self, start: int) -> Sequence[TokenLogprob]:
        """Return the log-probabilities from the token `start` on of those whose text has been given in full."""
        return self._logprobs[start : self._text.settled]

    @property
    def answer(self) -> Answer:
        """What has been answered so far; whole once the stream has ended."""
        return Answer(
            text=self._text.text,
            tokens=tuple(self._tokens),
            prompt_tokens=len(self._request.prompt),
            finish_reason=self._finish_reason,
            seconds=Seconds(**self._seconds),
            logprobs=None if self._request.logprobs is None else tuple(self._logprobs[: len(self._tokens)]),
        )

    def _write(self) -> Generator[str, None, None]:
        reader, decoder = self._engine.reader, self._engine.decoder
        prompt, room = self._request.prompt, len(self._request.prompt) + self._request.max_tokens
        reading = yield from self._timed("encode", reader.look(prompt, self._request.pictures, room))
        logits_V = yield from self._timed("prefill", reader.read(reading))
        token = self._choose(logits_V)
        while token not in self._engine.bundle.model.eos_token_ids:
            self._tokens.append(token)
            yield self._text.push(token)
            if len(self._tokens) == self._request.max_tokens:
                self._finish_reason = "length"
                break
            start = perf_counter()
            token = self._choose(decoder.read(decoder.embed([token]), reading.cache))
            self._spend("decode", start)
        else:
            self._finish_reason = "stop"
        yield self._text.finish()

    def _timed(self, part: str, work: Generator[None, None, T]) -> Generator[str, None, T]:
        """Do one part's work bit by bit; what others do in between does not count."""
        while True:
            start = perf_counter()
            try:
                next(work)
            except StopIteration as done:
                self._spend(part, start)
                return done.value  # type: ignore[no-any-return]
            self._spend(part, start)
            yield ""

    def _choose(self, logits_V: Floats) -> int:
        token = self._sampler.choose(self._rules.apply(logits_V, self._tokens))
        if self._request.logprobs is not None:
            self._logprobs.append(token_logprob(logits_V, token, self._request.logprobs))
        return token

    def _spend(self, part: str, start: float) -> None:
        self._seconds[part] += perf_counter() - start


class Engine:
    """A bundle that answers; threads may share it, every answer has its own memory."""

    def __init__(
        self,
        bundle: Bundle,
        threads: int | None = None,
        *,
        prefill: bool = True,
        prefix_memory: int = PREFIX_MEMORY,
        prefix_folder: str | Path | None = None,
    ) -> None:
        if threads is not None and not 1 <= threads <= MOST_THREADS:
            raise ConversationError(f"threads is {threads}, expected 1 to {MOST_THREADS}; one a core is usual")
        self.bundle = bundle
        self.tokenizer = _read_tokenizer(bundle)
        self.settings = _read_settings(bundle)
        reader = bundle.prefill() if prefill else None
        self.encoder = PictureEncoder(reader or bundle, threads)
        self.decoder = Decoder(bundle, threads, reader)
        if prefix_memory < 0:
            raise ConversationError(f"prefix_memory is {prefix_memory} MiB, expected 0 (keep nothing) or more")
        folder = None
        if prefix_folder is not None:
            model = fingerprint(bundle, self.decoder.form, reader or bundle)
            folder = PrefixFolder(Path(prefix_folder), model, bundle.model.cache.past_names())
        kept = PrefixCache(prefix_memory * 2**20, folder)
        self.reader = PromptReader(bundle.model, self.encoder, self.decoder, kept)
        self.prompt = PromptTokens(bundle, self.tokenizer)

    @classmethod
    def open(
        cls,
        path: str | Path,
        precision: str | None = None,
        threads: int | None = None,
        *,
        prefill: bool = True,
        prefix_memory: int = PREFIX_MEMORY,
        prefix_folder: str | Path | None = None,
    ) -> Self:
        """Open a bundle folder with `threads` for each graph (None: one a core).

        `precision=None` takes the bundle's first: whoever exported it measured them and put the recommended one in
        front. `prefill=False` does without the other precision that reads pictures and prompts where the bundle names
        one: less memory. `prefix_memory` MiB hold what was made of pictures, so that the next question about one begins
        at once; with 0 a prompt is read in one piece, a little faster. `prefix_folder` keeps it in files too, for later
        processes. Raises BundleError, PrefixFolderError.
        """
        bundle = Bundle.open(path, precision)
        return cls(bundle, threads, prefill=prefill, prefix_memory=prefix_memory, prefix_folder=prefix_folder)

    def stream(
        self,
        question: str | Sequence[Message],
        pictures: Sequence[Picture] = (),
        *,
        max_new_tokens: int | None = None,
        sampling: Sampling | None = None,
        logprobs: int | None = None,
    ) -> AnswerStream:
        """Check a question (or chat messages whose image parts are `pictures`, in order) and answer it piece by piece.

        The bundle's generation_config.json is obeyed where `sampling` and `max_new_tokens` do not say otherwise; where
        it says nothing the answer is greedy, of MAX_NEW_TOKENS at most. It ends earlier at an end token, or where the
        model's context is full. With `logprobs` the answer tells how likely every written token was, and so many others
        in its place. Raises PictureError, PromptError, ConversationError or SamplingError before the first piece.
        """
        if max_new_tokens is None:
            max_new_tokens = self.settings.max_new_tokens or MAX_NEW_TOKENS
        if max_new_tokens < 1:
            raise ConversationError(f"max_new_tokens is {max_new_tokens}, expected 1 or more")
        if logprobs is not None and not 0 <= logprobs <= MOST_LOGPROBS:
            raise SamplingError(f"logprobs is {logprobs}, expected 0 (of the written tokens alone) to {MOST_LOGPROBS}")
        messages = to_messages(question, len(pictures))
        prompt = self.prompt.encode(messages, len(pictures))
        room = self.bundle.model.max_positions - len(prompt)
        if room < 1:
            raise ConversationError(
                f"the prompt has {len(prompt)} tokens ({len(pictures)} pictures of "
                f"{self.bundle.model.tokens_per_picture} each among them), the model reads at most "
                f"{self.bundle.model.max_positions - 1} and an answer; ask with less text or fewer pictures"
            )
        start = perf_counter()
        opened = [self.encoder.open(picture) for picture in pictures]
        opening = perf_counter() - start
        max_tokens = min(max_new_tokens, room)
        return AnswerStream(self, _Request(prompt, opened, opening, max_tokens, sampling or Sampling(), logprobs))

    def answer(
        self,
        question: str | Sequence[Message],
        pictures: Sequence[Picture] = (),
        *,
        max_new_tokens: int | None = None,
        sampling: Sampling | None = None,
        logprobs: int | None = None,
    ) -> Answer:
        """Answer at once: the arguments and errors of `stream`."""
        stream = self.stream(question, pictures, max_new_tokens=max_new_tokens, sampling=sampling, logprobs=logprobs)
        for _ in stream:
            pass
        return stream.answer


def _read_tokenizer(bundle: Bundle) -> Tokenizer:
    try:
        return read_tokenizer(bundle.tokenizer_path)
    except TokenizerError as error:
        raise BundleError(f"{error}; copy the bundle again") from error


def _read_settings(bundle: Bundle) -> GenerationSettings:
    file = bundle.path / "generation_config.json"
    try:
        return GenerationSettings.from_config(parse_object(file.read_text(encoding="utf-8"), str(file)))
    except (OSError, UnicodeDecodeError, GenerationError) as error:
        raise BundleError(f"{file}: {error}, or export again") from error
