"""Labels of Qwen2.5's own chat template, counted a second time by other means: by walking along the token ids."""

import random
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from switchkd.training.data.conversations import to_messages
from switchkd.training.data.label_mask import ConversationEncoder
from switchkd.training.models.alignment import IGNORED
from switchkd.training.models.chat_templates import reading_parts

DEFAULT = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
# As in Qwen2.5's tokenizer_config.json, its part for tools included.
TEMPLATE = (
    "{%- if tools %}\n    {{- '<|im_start|>system\\n' }}\n    {%- if messages[0]['role'] == 'system' %}\n"
    "        {{- messages[0]['content'] }}\n    {%- else %}\n        {{- 'DEFAULT' }}\n    {%- endif %}\n"
    "    {{- '\\n\\n# Tools\\n\\n' }}\n    {%- for tool in tools %}\n        {{- '\\n' }}\n"
    "        {{- tool | tojson }}\n    {%- endfor %}\n    {{- '<|im_end|>\\n' }}\n{%- else %}\n"
    "    {%- if messages[0]['role'] == 'system' %}\n"
    "        {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}\n    {%- else %}\n"
    "        {{- '<|im_start|>system\\nDEFAULT<|im_end|>\\n' }}\n    {%- endif %}\n{%- endif %}\n"
    "{%- for message in messages %}\n"
    '    {%- if (message.role == "user") or (message.role == "system" and not loop.first) or '
    '(message.role == "assistant" and not message.tool_calls) %}\n'
    "        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}\n"
    "    {%- elif message.role == \"assistant\" %}\n        {{- '<|im_start|>' + message.role }}\n    {%- endif %}\n"
    "{%- endfor %}\n{%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\\n' }}\n{%- endif %}\n"
).replace("DEFAULT", DEFAULT)
# How Qwen2 cuts text before its byte pairs are merged: a line break may join what stands before and after it.
CUTS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
ANSWERS = [
    "Red.",
    "12",
    "Two\nlines, and\n\na third.",
    "  led by spaces",
    "\nled by a line",
    "日本語 😀",
    "It's - ok!\n",
    "a",
]
QUESTIONS = [
    "What colour is it?",
    "How many?\nAnswer the question using a single word or phrase.",
    "なに?",
    "assistant\n",
]
TOKENS = 5


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """A small byte-level tokenizer that cuts text as Qwen2's does, with Qwen2.5's chat template."""
    bare = Tokenizer(models.BPE())
    cuts = pre_tokenizers.Split(Regex(CUTS), "isolated")
    bare.pre_tokenizer = pre_tokenizers.Sequence([cuts, pre_tokenizers.ByteLevel(False, use_regex=False)])
    bare.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    bare.train_from_iterator([*ANSWERS, *QUESTIONS, DEFAULT, "user\n", "assistant\n\n", "system\n"] * 3, trainer)
    whole = PreTrainedTokenizerFast(tokenizer_object=bare, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    whole.chat_template = reading_parts(TEMPLATE, whole.special_tokens_map, "<image>")
    return whole


def conversation(rng: random.Random) -> dict[str, Any]:
    turns = []
    image = rng.random() < 0.7
    if rng.random() < 0.3:
        turns.append({"from": "system", "value": "Be brief."})
    for number in range(rng.randint(1, 6)):
        question = ("<image>\n" if image and number == 0 else "") + rng.choice(QUESTIONS)
        turns += [{"from": "human", "value": question}, {"from": "gpt", "value": rng.choice(ANSWERS)}]
    return {"id": "r", "conversations": turns} | ({"image": "a.jpg"} if image else {})


def count_by_walking(ids: list[int], tokenizer: PreTrainedTokenizerFast) -> list[bool]:
    """For each token whether it is part of an answer: from behind the assistant's header to its end of turn.

    A token that holds the header's line break and the beginning of the answer belongs to the header.
    """
    start, end = (tokenizer.get_vocab()[token] for token in ("<|im_start|>", "<|im_end|>"))
    answers, state, header = [], "outside", ""
    for token in ids:
        answers.append(state == "answer")
        if token == start:
            state, header = "header", ""
        elif token == end:
            state = "outside"
        elif state == "header":
            header += str(tokenizer.decode([token]))
            if "\n" in header:
                state = "answer" if header.startswith("assistant\n") else "outside"
    return answers


@pytest.mark.parametrize("seed", range(10))
def test_supervised_tokens_are_those_of_a_walk_along_the_ids(tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
    record = conversation(random.Random(seed))
    messages = to_messages(record)
    ids, labels = ConversationEncoder(tokenizer, "<image>", TOKENS).encode(messages)
    expected = count_by_walking(ids, tokenizer)
    assert [label != IGNORED for label in labels] == expected
    assert sum(label == tokenizer.eos_token_id for label in labels) == len(record["conversations"]) // 2
    text = str(tokenizer.decode(ids))
    asked_for = record["conversations"][0]["from"] == "system"
    assert text.startswith(f"<|im_start|>system\n{'Be brief.' if asked_for else DEFAULT}<|im_end|>\n<|im_start|>user\n")
    assert text.count("<|im_start|>system") == 1
    for cut in random.Random(seed).choices(range(expected.index(True) + 1, len(ids)), k=5):
        shorter = ConversationEncoder(tokenizer, "<image>", TOKENS, max_length=cut)
        assert shorter.measure(messages) == (len(ids), sum(expected[:cut]))
        assert shorter.encode(messages) == (ids[:cut], labels[:cut])
