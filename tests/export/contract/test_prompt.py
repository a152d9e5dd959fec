"""Chat templates render as in transformers, and cannot do harm."""

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from switchkd.export.contract.prompt import PromptError, TokenizerError, expand_image_token, read_tokenizer, render_chat

CONVERSATIONS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Hello <b>&</b> 'you'"}],
    [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?\nWhere? ä 猫"}]}],
    [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "Which?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "The first."}]},
        {"role": "user", "content": "Why?"},
    ],
]
# Every liberty that transformers gives a template: trimmed blocks, loop controls, tojson, namespaces, generation.
LIBERTIES = """\
{%- set ns = namespace(count=0) -%}
{{ eos_token }}
  {% for message in messages %}
    {% if loop.index > 3 %}{% break %}{% endif %}
    {% set ns.count = ns.count + 1 %}
{{ message['role'] }}: {{ message['content'] | tojson }}
    {% generation %}{{ ns.count }}{% endgeneration %}

  {% endfor %}
{% if tools is none and not add_generation_prompt %}done{% endif %}
"""


@pytest.mark.parametrize("template", [None, LIBERTIES], ids=["chatml", "liberties"])
@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize("messages", CONVERSATIONS, ids=["text", "picture", "turns"])
def test_equal_to_transformers(
    tiny_checkpoint: Path, messages: list[dict[str, Any]], add_generation_prompt: bool, template: str | None
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    template = template or (tiny_checkpoint / "chat_template.jinja").read_text()
    expected = tokenizer.apply_chat_template(
        messages, chat_template=template, tokenize=False, add_generation_prompt=add_generation_prompt
    )
    got = render_chat(
        template,
        messages,
        add_generation_prompt=add_generation_prompt,
        special_tokens=tokenizer.special_tokens_map,
    )
    assert got == expected
    assert got


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('only one turn') }}",
        "{% for message in messages %}",
        "{{ messages[0].__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ nothing.at.all }}",
        "{{ 1 + 'a' }}",
    ],
)
def test_refused_with_one_line(template: str) -> None:
    with pytest.raises(PromptError, match="the chat template refused") as caught:
        render_chat(template, [{"role": "user", "content": "x"}], add_generation_prompt=True, special_tokens={})
    assert "\n" not in str(caught.value)


def test_templates_see_plain_data_only() -> None:
    message = {"role": "user", "content": [{"type": "image", "image": Path("secret")}]}
    text = render_chat("{{ messages }}", [message], add_generation_prompt=True, special_tokens={})
    assert "secret" not in text


def test_image_token_is_repeated() -> None:
    assert expand_image_token("a<image>\nb<image>", "<image>", 3) == "a<image><image><image>\nb<image><image><image>"


def test_padding_and_truncation_saved_in_a_tokenizer_are_not_obeyed(tiny_checkpoint: Path, tmp_path: Path) -> None:
    text = "How many red circles are in the picture?"
    tokenizer = Tokenizer.from_file(str(tiny_checkpoint / "tokenizer.json"))
    whole = tokenizer.encode(text).ids
    for name, change in (("cuts", {"max_length": 8}), ("pads", {"length": 99})):
        tokenizer.no_padding()
        tokenizer.no_truncation()
        (tokenizer.enable_truncation if name == "cuts" else tokenizer.enable_padding)(**change)
        tokenizer.save(str(tmp_path / name))
        assert len(Tokenizer.from_file(str(tmp_path / name)).encode(text).ids) == next(iter(change.values()))
        assert read_tokenizer(tmp_path / name).encode(text).ids == whole


def test_one_place_reads_tokenizers() -> None:
    """What reads a tokenizer.json otherwise would pad and cut as the file says."""
    root = Path(__file__).parents[3]
    rooms = ("cli", "demo", "export", "serve", "training")
    files = [file for room in rooms for file in (root / room).rglob("*.py") if ".from_file(str(" in file.read_text()]
    assert files == [root / "export/contract/prompt.py"]


def test_no_tokenizer_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: no tokenizer"):
        read_tokenizer(tmp_path / "tokenizer.json")
