"""Chat messages to the model's prompt text: one sandboxed rendering for training, export and serving."""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox


class PromptError(ValueError):
    """A chat template that cannot be used, or messages that it refuses."""


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
    themselves are left out: the template sees plain data only. Raises PromptError with the template's own complaint.
    """
    try:
        return _compile(template).render(
            messages=_plain(messages),
            tools=None,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **special_tokens,
        )
    except (jinja2.TemplateError, TypeError) as error:
        raise PromptError(f"the chat template refused the messages: {' '.join(str(error).split())}") from error


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
