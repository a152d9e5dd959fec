"""A question or a chat with pictures, checked and turned into the token ids that the model reads."""

from collections.abc import Mapping, Sequence

from tokenizers import Tokenizer

from switchkd.export.contract.bundle import Bundle, BundleError
from switchkd.export.contract.prompt import Message, PromptEncoder


class ConversationError(ValueError):
    """A question, a message or a number of pictures that cannot be asked."""


def to_messages(question: str | Sequence[Message], pictures: int) -> list[Message]:
    """Return chat messages that place every picture; a plain question is asked about all of them at once.

    Raises ConversationError where nothing is asked, or where messages and pictures do not match.
    """
    if isinstance(question, str):
        if not question.strip():
            raise ConversationError("the question is empty; ask something")
        _check_characters(question, "the question")
        parts = [*({"type": "image"} for _ in range(pictures)), {"type": "text", "text": question}]
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
        _check_characters(content, where)
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
        else:
            _check_characters(part["text"], where)
    return pictures


def _check_characters(text: str, where: str) -> None:
    """Raise ConversationError for a lone surrogate: Python's sign for a byte that it could not read as a character."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConversationError(
            f"{where}: character {error.start + 1} is none (U+{ord(text[error.start]):04X}): the text came in another "
            "encoding than this system's, or was cut within a character; write it in UTF-8"
        ) from None


class PromptTokens:
    """Turns messages into the ids that the model reads, by the bundle's chat template and tokenizer."""

    def __init__(self, bundle: Bundle, tokenizer: Tokenizer) -> None:
        image = bundle.model.image_token
        if tokenizer.token_to_id(image) != bundle.model.image_token_id:
            raise BundleError(
                f"{bundle.tokenizer_path}: {image} has the id {tokenizer.token_to_id(image)}, the manifest says "
                f"{bundle.model.image_token_id}; export again"
            )
        self._encoder = PromptEncoder.of(bundle, tokenizer)

    def encode(self, messages: Sequence[Message], pictures: int) -> list[int]:
        """Return the prompt's token ids, in which the image token stands once for every visual token.

        Raises ConversationError where a text itself holds the image token, and PromptError.
        """
        image, text = self._encoder.image_token, self._encoder.render(messages)
        if text.count(image) != pictures:
            raise ConversationError(
                f"the prompt holds {image} {text.count(image)} times for {pictures} pictures; "
                f"leave {image} out of the text, pictures are placed by themselves"
            )
        return self._encoder.ids(text)
