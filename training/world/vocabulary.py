"""The world's tokenizer: byte-level BPE as Qwen2 has it, with ChatML tokens, trained on the world's own text."""

from __future__ import annotations

import random
from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from .questions import KINDS, caption, text_only
from .scenes import random_scene

IMAGE_TOKEN = "<image>"
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", IMAGE_TOKEN)
# Qwen2's own split: contractions, letters with one leading mark, single digits, punctuation, spaces.
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>\n' }}{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def train_tokenizer(texts: Iterable[str], vocabulary_size: int = 1024) -> PreTrainedTokenizerFast:
    """Train the tokenizer on texts; the special tokens come first, then 256 bytes, then merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>", IMAGE_TOKEN],
        chat_template=CHAT_TEMPLATE,
        model_max_length=1024,
        model_input_names=["input_ids", "attention_mask"],
    )


def world_texts(rng: random.Random, scenes: int) -> list[str]:
    """The world's own text: captions, every kind of question about random scenes, and ChatML's role names."""
    texts = []
    for _ in range(scenes):
        scene = random_scene(rng, "train")
        texts += [*caption(scene, rng), *text_only(rng).turns[-1]]
        for kind in KINDS.values():
            texts += [text for question in list(kind(scene))[:3] for turn in question.turns for text in turn]
    return texts + ["system\nuser\nassistant\n"] * scenes
