"""Chat templates that come with models: told apart by how they read a message, and made to read LLaVA's parts."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from switchkd.export.contract.prompt import PromptError, render_chat

PROBE = "seven small boats"
SHOWN = 40  # characters around the place where two prompts part
# In front of a template that reads text alone: parts become text, a picture the image token on a line of its own.
_PARTS_TO_TEXT = (
    "{%- set said = namespace(messages=[], text='') %}"
    "{%- for message in messages %}"
    "{%- if message['content'] is string %}{%- set said.text = message['content'] %}{%- else %}"
    "{%- set said.text = '' %}"
    "{%- for part in message['content'] %}"
    "{%- if part['type'] == 'image' %}{%- set said.text = said.text + 'IMAGE_TOKEN\n' %}"
    "{%- elif part['type'] == 'text' %}{%- set said.text = said.text + part['text'] %}{%- endif %}"
    "{%- endfor %}{%- endif %}"
    "{%- set said.messages = said.messages + [{'role': message['role'], 'content': said.text}] %}"
    "{%- endfor %}"
    "{%- set messages = said.messages %}"
)


def reading_parts(template: str, special_tokens: Mapping[str, str], image_token: str) -> str:
    """Return the template if it reads content parts, as LLaVA's do, else the same behind lines that make text of them.

    A language model's own template (Qwen2.5's is one) knows text alone and has no place for a picture.
    """
    if _reads_parts(template, special_tokens):
        return template
    led = _PARTS_TO_TEXT.replace("IMAGE_TOKEN", image_token) + template
    return led if _reads_parts(led, special_tokens) else template


def difference(ours: str, theirs: str, special_tokens: Mapping[str, str]) -> tuple[str, str] | None:
    """Where two templates first write a conversation of two questions otherwise: a piece of each text; None if nowhere.

    A template that refuses it writes nothing.
    """
    said = [{"type": "text", "text": PROBE}]
    messages: list[dict[str, Any]] = [{"role": role, "content": said} for role in ("user", "assistant", "user")]
    messages[0]["content"] = [{"type": "image"}, *said]
    texts = ["", ""]
    for i, template in enumerate((ours, theirs)):
        with suppress(PromptError):
            texts[i] = render_chat(template, messages, add_generation_prompt=True, special_tokens=special_tokens)
    if texts[0] == texts[1]:
        return None
    start = next((at for at, (a, b) in enumerate(zip(*texts, strict=False)) if a != b), min(map(len, texts)))
    one, other = (text[max(0, start - SHOWN // 2) :][:SHOWN] for text in texts)
    return one, other


def _reads_parts(template: str, special_tokens: Mapping[str, str]) -> bool:
    message = {"role": "user", "content": [{"type": "text", "text": PROBE}]}
    try:
        text = render_chat(template, [message], add_generation_prompt=False, special_tokens=special_tokens)
    except PromptError:
        return False
    return PROBE in text and "'text'" not in text  # a list printed as it stands holds its keys too
