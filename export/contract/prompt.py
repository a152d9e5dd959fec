"""Chat messages to the model's prompt: one sandboxed rendering and one encoding for training, export and serving."""

import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Self

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
from tokenizers import Tokenizer

from .control_tokens import ControlTokens

if TYPE_CHECKING:
    from .bundle import Bundle

Message = Mapping[str, Any]
_PROBE = "seven small boats"
# Where transformers 5 keeps, in tokenizer_config.json, the padding and truncation that tokenizer.json came with.
SAVED_CUTS = ("max_length", "pad_to_multiple_of", "stride", "truncation_strategy")


class PromptError(ValueError):
    """A chat template that cannot be used, or messages that it refuses."""


class TokenizerError(PromptError):
    """A tokenizer.json that cannot be read."""


class _Generation(jinja2.ext.Extension):
    """Accepts `{% generation %}`, by which training templates mark the assistant's words; it renders its body."""

    tags = {"generation"}  # noqa: RUF012  # jinja2 declares it on the instance

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own tojson escapes HTML characters, which a language model should not see.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def default_template(given: Any) -> str | None:
    """The chat template of what a file has under `chat_template`: a text, or the "default" of several with names.

    None where there is no text. Raises PromptError where several have names, and none is the default.
    """
    if isinstance(given, Sequence) and not isinstance(given, str):
        given = {each.get("name"): each.get("template") for each in given if isinstance(each, Mapping)}
    if isinstance(given, Mapping) and given:
        if "default" not in given:
            names = ", ".join(sorted(map(repr, given)))
            raise PromptError(f"of its chat templates ({names}) none is named 'default'; name the one to take so")
        given = given["default"]
    return given if isinstance(given, str) and given else None


@lru_cache(maxsize=16)
def _compile(template: str) -> jinja2.Template:
    # The flags, filters and globals of transformers' chat templates, so that the same template gives the same text.
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment.from_string(template)


def render_chat(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool,
    special_tokens: Mapping[str, str],
) -> str:
    """Render chat messages as transformers' `apply_chat_template(tokenize=False)` does.

    A message's content is a string, or parts `{"type": "image"}` and `{"type": "text", "text": ...}`. Pictures
    themselves are left out: the template sees plain data only. Unlike there, what a user says loses the white space
    around it, so that a question is spelled alike in training and everywhere it is asked. Raises PromptError with the
    template's own complaint.
    """
    try:
        return _compile(template).render(
            messages=[_trimmed(_plain(message)) for message in messages],
            tools=None,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **special_tokens,
        )
    except (jinja2.TemplateError, TypeError) as error:
        raise PromptError(f"the chat template refused the messages: {' '.join(str(error).split())}") from error


def _trimmed(message: Any) -> Any:
    """A message, a user's without white space before its first text and behind its last."""
    if not isinstance(message, dict) or message.get("role") != "user":
        return message
    content = message.get("content")
    if isinstance(content, str):
        return {**message, "content": content.strip()}
    if not isinstance(content, list):
        return message
    parts = [dict(part) if isinstance(part, dict) else part for part in content]
    texts = [part for part in parts if isinstance(part, dict) and isinstance(part.get("text"), str)]
    for part in texts[:1]:
        part["text"] = part["text"].lstrip()
    for part in texts[-1:]:
        part["text"] = part["text"].rstrip()
    return {**message, "content": parts}


def _plain(value: Any) -> Any:
    """Templates come with models from elsewhere: they get JSON types only, never objects with methods."""
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, (bytes, bytearray)):
        return [_plain(part) for part in value]
    return f"<{type(value).__name__}>"


def expand_image_token(text: str, image_token: str, tokens_per_picture: int) -> str:
    """Repeat every image token in a rendered prompt once per visual token; callers compare the count with pictures."""
    return text.replace(image_token, image_token * tokens_per_picture)


# --- what a template and a tokenizer know of each other ---


def special_tokens(tokenizer_config: Mapping[str, Any]) -> dict[str, str]:
    """The special tokens of a tokenizer_config.json, by the names that chat templates know, like `bos_token`."""
    tokens = {}
    for key, value in tokenizer_config.items():
        value = value.get("content") if isinstance(value, dict) else value
        if key.endswith("_token") and isinstance(value, str):
            tokens[key] = value
    return tokens


def end_of_turn(template: str, special_tokens: Mapping[str, str], candidates: Iterable[str]) -> str | None:
    """Return which of the candidates the template puts first behind an assistant's text, or None.

    It ends an answer, whatever the tokenizer calls its end of sequence: `<|im_end|>` in ChatML.
    """
    messages = [{"role": role, "content": _as_parts(text)} for role, text in (("user", "?"), ("assistant", _PROBE))]
    try:
        text = render_chat(template, messages, add_generation_prompt=False, special_tokens=special_tokens)
    except PromptError:
        return None
    behind = text.split(_PROBE)[-1]
    found = [token for token in candidates if token in behind]
    return min(found, key=behind.index, default=None)


def adds_special_tokens(text: str, bos: str | None) -> bool:
    """Whether the tokenizer's post-processor puts its special tokens around a rendered prompt, as transformers has it.

    Llama's puts BOS in front; a template that writes BOS itself must not get a second one.
    """
    return bos is None or not text.startswith(bos)


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


# --- ids ---


def read_tokenizer(file: Path) -> Tokenizer:
    """Read a tokenizer.json that encodes a prompt whole, whatever padding or truncation was saved in it.

    The tokenizers library writes both into the file and obeys them. Raises TokenizerError.
    """
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises bare Exception for every bad file
        raise TokenizerError(f"{file}: no tokenizer ({error})") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def write_tokenizer(source: Path, target: Path) -> None:
    """Copy a folder's tokenizer.json and tokenizer_config.json without padding and truncation.

    Whoever else reads the copies would obey them: the tokenizers library, and transformers 5 in its configuration.
    """
    for name, cuts, filler in (
        ("tokenizer.json", ("padding", "truncation"), {"padding": None, "truncation": None}),
        ("tokenizer_config.json", SAVED_CUTS, {}),
    ):
        content = json.loads((source / name).read_text(encoding="utf-8"))
        if all(content.get(key) is None for key in cuts):
            shutil.copyfile(source / name, target / name)
            continue
        content = {key: value for key, value in content.items() if key not in cuts} | filler
        (target / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@lru_cache(maxsize=4)
def _control_tokens(tokenizer: Tokenizer, image_token: str) -> ControlTokens:
    return ControlTokens(tokenizer, image_token)


@dataclass(frozen=True)
class PromptEncoder:
    """The one place that makes a prompt's ids: for what is served, verified, calibrated on and printed on cards."""

    control: ControlTokens
    template: str
    special_tokens: Mapping[str, str]  # by the names that chat templates know, like `bos_token`
    image_token: str
    tokens_per_picture: int

    @classmethod
    def of(cls, bundle: "Bundle", tokenizer: Tokenizer) -> Self:
        """The encoder of a bundle, whose tokenizer was read by `read_tokenizer`."""
        model = bundle.model
        control = _control_tokens(tokenizer, model.image_token)
        return cls(control, bundle.chat_template, bundle.special_tokens, model.image_token, model.tokens_per_picture)

    def render(self, messages: Sequence[Message]) -> str:
        """Return the prompt's text, one image token for every picture; raises PromptError.

        Content that is a string becomes a part where the template would lose it. Other control tokens in a text are
        stand-ins, which `ids` spells as text.
        """
        if _loses_strings(self.template, tuple(self.special_tokens.items())):
            messages = [{**message, "content": _as_parts(message["content"])} for message in messages]
        if token := self.control.spelled_together(messages):
            raise PromptError(f"parts of a message spell {token} only together; put the text into one part")
        messages = self.control.shield(messages)
        return render_chat(self.template, messages, add_generation_prompt=True, special_tokens=self.special_tokens)

    def ids(self, text: str) -> list[int]:
        """Return the token ids of a rendered prompt, in which the image token stands once for every visual token."""
        text = expand_image_token(text, self.image_token, self.tokens_per_picture)
        return list(self.control.encode(text, add_special_tokens=self.adds_special_tokens(text)).ids)

    def adds_special_tokens(self, text: str) -> bool:
        """Whether encoding this rendered prompt adds the tokenizer's special tokens, see the function of the name."""
        return adds_special_tokens(text, self.special_tokens.get("bos_token"))
