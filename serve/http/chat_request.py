"""A chat completion's request: what of OpenAI's parameters is understood. All others are refused by name."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

MOST_STOPS = 4
MOST_CHARACTERS = 1_000_000  # of all texts: a second or two to be made into tokens, in which others wait


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class TextPart(_Strict):
    """Some text of a message."""

    type: Literal["text"]
    text: str


class ImageUrl(_Strict):
    """Where a picture is: a data: URI, or an address where remote pictures are allowed."""

    url: str
    detail: Literal["auto"] | None = None


class ImagePart(_Strict):
    """A picture of a message."""

    type: Literal["image_url"]
    image_url: ImageUrl


def _kind(key: str, *kinds: str) -> Discriminator:
    """Tell kinds of objects apart by a key, so that a mistake is reported once and of the right kind."""

    def of(value: Any) -> str | None:
        found = value.get(key) if isinstance(value, dict) else getattr(value, key, None)
        return f"({found})" if found in kinds else None

    return Discriminator(
        of,
        custom_error_type="unknown_kind",
        custom_error_message=f"expected an object with {key} {' or '.join(kinds)}",
    )


def _form(value: Any) -> str:
    return "(list)" if isinstance(value, list | tuple) else "(text)"


Part = Annotated[
    Annotated[TextPart, Tag("(text)")] | Annotated[ImagePart, Tag("(image_url)")], _kind("type", "text", "image_url")
]
Parts = Annotated[list[Part], Field(min_length=1)]
TextParts = Annotated[list[TextPart], Field(min_length=1)]
Words = Annotated[Annotated[str, Tag("(text)")] | Annotated[TextParts, Tag("(list)")], Discriminator(_form)]
Content = Annotated[Annotated[str, Tag("(text)")] | Annotated[Parts, Tag("(list)")], Discriminator(_form)]


class SystemMessage(_Strict):
    """What the model is to heed throughout."""

    role: Literal["system"]
    content: Words


class UserMessage(_Strict):
    """What is asked."""

    role: Literal["user"]
    content: Content


class AssistantMessage(_Strict):
    """What the model said before; the fields that an answer of ours holds may come back with it."""

    role: Literal["assistant"]
    content: Words
    refusal: None = None


AnyMessage = Annotated[
    Annotated[SystemMessage, Tag("(system)")]
    | Annotated[UserMessage, Tag("(user)")]
    | Annotated[AssistantMessage, Tag("(assistant)")],
    _kind("role", "system", "user", "assistant"),
]
StopText = Annotated[str, Field(min_length=1)]
StopTexts = Annotated[
    Annotated[StopText, Tag("(text)")] | Annotated[list[StopText], Field(max_length=MOST_STOPS), Tag("(list)")],
    Discriminator(_form),
]


class StreamOptions(_Strict):
    """What a stream holds besides the answer."""

    include_usage: bool | None = None


class ChatRequest(_Strict):
    """The parameters of /v1/chat/completions.

    A parameter that changes the answer and is not followed is refused; one may be sent with the value that asks for
    nothing. `user` and `metadata` change no answer.
    """

    model: str
    messages: Annotated[list[AnyMessage], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    # The engine checks these; programs that read /openapi.json learn the ranges.
    temperature: Annotated[float | None, Field(json_schema_extra={"minimum": 0, "maximum": 100})] = None
    top_p: Annotated[float | None, Field(json_schema_extra={"exclusiveMinimum": 0, "maximum": 1})] = None
    top_k: Annotated[int | None, Field(json_schema_extra={"minimum": 0})] = None  # not among OpenAI's
    seed: Annotated[int | None, Field(json_schema_extra={"minimum": 0})] = None
    stop: StopTexts | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Literal[1] | None = None
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        characters = sum(map(_characters, self.messages))
        if characters > MOST_CHARACTERS:
            raise ValueError(f"the messages have {characters:,} characters, expected {MOST_CHARACTERS:,} at most")
        both = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(both) > 1:
            raise ValueError("max_tokens and max_completion_tokens are different; give one of them")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs goes with logprobs; set logprobs to true, or leave it out")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is for streams; set stream to true, or leave it out")
        return self

    @property
    def limit(self) -> int | None:
        """The most tokens of the answer."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def most_logprobs(self) -> int | None:
        """How many likely tokens to tell beside each written one; None: tell nothing of them."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def stops(self) -> tuple[str, ...]:
        """The texts that end the answer."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with the number of tokens."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def picture_urls(self) -> list[tuple[str, str]]:
        """Where each picture is named in the request, and its URL, in order."""
        return [
            (f"messages[{number}].content[{place}].image_url.url", part.image_url.url)
            for number, message in enumerate(self.messages)
            for place, part in enumerate(_parts(message.content))
            if isinstance(part, ImagePart)
        ]

    def engine_messages(self) -> list[dict[str, Any]]:
        """The messages as the engine takes them, the pictures left out."""
        return [
            {
                "role": message.role,
                "content": message.content
                if isinstance(message.content, str)
                else [
                    {"type": "text", "text": part.text} if isinstance(part, TextPart) else {"type": "image"}
                    for part in message.content
                ],
            }
            for message in self.messages
        ]


def _characters(message: SystemMessage | UserMessage | AssistantMessage) -> int:
    if isinstance(message.content, str):
        return len(message.content)
    return sum(len(part.text) for part in message.content if isinstance(part, TextPart))


def _parts(content: str | Sequence[TextPart | ImagePart]) -> Sequence[TextPart | ImagePart]:
    return () if isinstance(content, str) else content
