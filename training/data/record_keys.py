"""Which keys of a record carry content: what a loader of one of the field's formats hands to the model.

Read for it: the loaders of LLaVA, LLaVA-NeXT, ShareGPT4V, InternVL, Qwen-VL, ms-swift, LLaMA-Factory, TRL and OpenAI.
All other keys (id, source, width, model ...) are metadata, whatever is in them, and so is a content key that is empty
or holds a number (`"turns": 2`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sized
from typing import Any

SYSTEM_KEYS = ("system", "system_prompt")  # read: they become a system turn
_MEDIA = (
    *("images", "image_path", "image_paths", "image_file", "image_files", "image_url", "image_urls", "image_base64"),
    *("img", "imgs", "img_path", "picture", "pictures"),
    *("video", "videos", "video_path", "video_paths", "video_file", "video_url", "video_urls", "frames"),
    *("audio", "audios", "audio_path", "audio_url", "audio_urls", "speech"),
)
_TOOLS = ("tools", "tool_calls", "functions", "function_call")
_CONTENT = frozenset(
    (
        *_MEDIA,
        *_TOOLS,
        "objects",  # ms-swift's boxes, for places in the text
        *("messages", "conversation", "dialog", "dialogue", "turns", "chat", "history"),
        *("query", "response", "instruction", "input", "output", "prompt", "completion"),
        *("chosen", "rejected", "rejected_response", "rejected_messages", "rejected_images"),
        *("positive_messages", "negative_messages"),
    )
)
# Content where there is no conversation; beside one they are what it was made from, and no loader reads them.
_ALONE = frozenset(("text", "texts", "question", "answer", "answers", "caption", "role", "content", "from", "value"))
_OF_TURN = frozenset(
    (*_MEDIA, *_TOOLS, "image", "role", "content", "tool_call_id", "reasoning", "reasoning_content", "thinking")
)
_SHARES = ("weight", "loss")  # OpenAI's and ms-swift's: whether a turn is learned from


def unread_keys(record: Mapping[Any, Any]) -> list[str]:
    """Keys of a record that carry content and are not read."""
    content = _CONTENT if record.get("conversations") else _CONTENT | _ALONE
    return [str(key) for key, value in record.items() if carries(value) and str(key).lower() in content]


def unread_turn_keys(turn: Mapping[Any, Any], *, learned: bool) -> list[str]:
    """The same of a turn; a weight that says what is done with such a turn anyway is no reason to leave it out."""
    keys = [str(key) for key, value in turn.items() if carries(value) and str(key).lower() in _OF_TURN]
    return keys + [key for key in _SHARES if turn.get(key) is not None and turn[key] != int(learned)]


def carries(value: Any) -> bool:
    """Whether a value may be content: neither empty nor a number."""
    return isinstance(value, Sized) and len(value) > 0
