"""Earlier turns reach the model whatever a template wants content to be: text, or parts."""

from pathlib import Path
from typing import Any

import pytest

from switchkd.export.contract.prompt import PromptError, render_chat
from switchkd.serve import Engine, Message
from switchkd.serve.engine.conversation import PromptTokens, to_messages
from switchkd.training.data.conversations import to_messages as training_messages
from switchkd.training.data.label_mask import model_inputs
from switchkd.training.models.vlm import load_vlm

# As LLaVA-1.5's processors on the hub have it: parts alone, pictures first; a string's characters have no type.
LLAVA_1_5 = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}"
    "{% endfor %}{% else %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
TEXT_ALONE = "{% for message in messages %}{{ message.role + ': ' + message.content + '\n' }}{% endfor %}"
FIRST_PART = "{% for message in messages %}{{ message['content'][0]['text'] + '|' }}{% endfor %}"

CHAT: list[Message] = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Is it red?"}]},
    {"role": "assistant", "content": "Yes, there is."},
    {"role": "user", "content": "And the digits?"},
]
WORDS: list[Message] = [{"role": message["role"], "content": "a b"} for message in CHAT]


@pytest.fixture(scope="module")
def engine(tiny_bundle: Path) -> Engine:
    return Engine.open(tiny_bundle, "fp32", threads=1)


def prompt(engine: Engine, template: str, messages: list[Message], pictures: int) -> str:
    """What the model reads, its visual tokens as one."""
    bundle: Any = engine.bundle
    own = bundle.chat_template
    object.__setattr__(bundle, "chat_template", template)
    try:
        ids = PromptTokens(bundle, engine.tokenizer).encode(messages, pictures)
    finally:
        object.__setattr__(bundle, "chat_template", own)
    text: str = engine.tokenizer.decode(ids, skip_special_tokens=False)
    return text.replace("<image>" * bundle.model.tokens_per_picture, "<image>")


def test_a_template_that_wants_parts_gets_them(engine: Engine) -> None:
    expected = "Be short. USER: <image>\nIs it red? ASSISTANT: Yes, there is. USER: And the digits? ASSISTANT:"
    assert prompt(engine, LLAVA_1_5, CHAT, 1) == expected
    assert prompt(engine, FIRST_PART, WORDS, 0) == "a b|" * 4  # a string would be refused here


def test_strings_stay_where_a_template_takes_them(engine: Engine) -> None:
    own = engine.bundle.chat_template
    for template, messages, pictures in ((own, CHAT, 1), (TEXT_ALONE, WORDS, 0)):
        plain = render_chat(template, messages, add_generation_prompt=True, special_tokens=engine.bundle.special_tokens)
        assert prompt(engine, template, messages, pictures) == plain


@pytest.mark.parametrize("token", ["<|im_end|>", "<|im_start|>assistant\n", "<|endoftext|>"])
def test_control_tokens_in_a_question_are_text_as_they_were_in_training(
    engine: Engine, tiny_checkpoint: Path, token: str
) -> None:
    words: list[Message] = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": f"Is {token} it?"}]}
    ]
    ids = PromptTokens(engine.bundle, engine.tokenizer).encode(words, 1)
    assert ids == model_inputs(load_vlm(tiny_checkpoint))[0].encode_prompt([dict(message) for message in words])
    assert f"Is {token} it?<|im_end|>" in engine.tokenizer.decode(ids, skip_special_tokens=False)
    tokens = [engine.tokenizer.id_to_token(number) for number in ids]
    assert (tokens.count("<|im_start|>"), tokens.count("<|im_end|>")) == (2, 1)
    half: list[Message] = [{"role": "user", "content": [{"type": "text", "text": part} for part in ("<|im_", "end|>")]}]
    with pytest.raises(PromptError, match=r"spell <\|im_end\|> only together"):
        PromptTokens(engine.bundle, engine.tokenizer).encode(half, 0)


@pytest.mark.parametrize("around", [("", "\n"), ("  \n", "\t "), ("", "")])
@pytest.mark.parametrize("picture", [False, True])
def test_white_space_around_a_question_is_spelled_nowhere(
    engine: Engine, tiny_checkpoint: Path, around: tuple[str, str], picture: bool
) -> None:
    """In training, asked as text and asked as messages, in the first turn and in a later one."""
    first, second = (around[0] + text + around[1] for text in ("What?", "And now,\n what?"))
    turns = [{"from": "human", "value": f"<image>\n{first}" if picture else first}]
    turns += [{"from": "gpt", "value": " A circle\n"}, {"from": "human", "value": second}]
    record = {
        "conversations": [*turns, {"from": "gpt", "value": "A square"}],
        **({"image": "p.png"} if picture else {}),
    }
    encoder = model_inputs(load_vlm(tiny_checkpoint))[0]
    trained = encoder.encode_prompt(training_messages(record)[:-1])
    tokens = PromptTokens(engine.bundle, engine.tokenizer)
    image = [{"type": "image"}] if picture else []
    asked: list[Message] = [
        {"role": "user", "content": [*image, {"type": "text", "text": first}]},
        {"role": "assistant", "content": " A circle\n"},
        {"role": "user", "content": second},
    ]
    assert tokens.encode(asked, len(image)) == trained
    alone = tokens.encode(to_messages(first, len(image)), len(image))
    assert alone == encoder.encode_prompt(training_messages(record)[:1])
    assert alone == tokens.encode(to_messages("What?", len(image)), len(image))
    text = engine.tokenizer.decode(trained, skip_special_tokens=False)
    assert "And now,\n what?" in text  # inside, white space is the text's own
