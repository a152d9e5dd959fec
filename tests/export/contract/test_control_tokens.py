"""Control tokens in texts are text, over byte-level and sentencepiece tokenizers, with all else as ever."""

import random
from collections.abc import Callable

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from switchkd.export.contract.control_tokens import ControlTokens

WORDS = [
    "<b>",
    "bold",
    "</b>",
    "write",
    "at the end",
    "of",
    "html",
    "日本語",
    "😀",
    "s>",
    "</",
    "two\nlines",
    "a |",
    "im_end",
]
CONTROL = ["<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>"]
IMAGE = "<image>"
SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", IMAGE]


def byte_level() -> Tokenizer:
    """As Qwen's and Llama-3's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        vocab_size=330,
        show_progress=False,
    )
    tokenizer.train_from_iterator([*WORDS, *CONTROL] * 3, trainer)
    return tokenizer


def sentencepiece_bpe() -> Tokenizer:
    """As Llama-2's: bytes for unknown characters, and pairs that merge into a control token."""
    pieces = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *"▁</s>abdehilmnotrw|_", "</", "s>", "▁h", "<s"]
    vocabulary = {piece: place for place, piece in enumerate(dict.fromkeys(pieces))}
    merges = [("<", "/"), ("s", ">"), ("</", "s>"), ("<", "s"), ("<s", ">"), ("▁", "h")]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A $B", [("<s>", 1)])
    return tokenizer


def unigram() -> Tokenizer:
    """As T5's and XLM-R's: control tokens are pieces of the vocabulary, and normalized as texts are."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    trainer = trainers.UnigramTrainer(
        special_tokens=SPECIAL, vocab_size=120, unk_token="<unk>", show_progress=False, initial_alphabet=list("<>/|_")
    )
    tokenizer.train_from_iterator([" ".join([*WORDS, *CONTROL])] * 3, trainer)
    tokenizer.add_special_tokens([AddedToken("</s>", normalized=True, special=True)])
    return tokenizer


KINDS = (byte_level, sentencepiece_bpe, unigram)


def a_text(rng: random.Random, words: list[str]) -> str:
    return " ".join(rng.choices(words, k=rng.randint(1, 9))).replace("bold ", "bold")


def written(texts: list[str]) -> str:
    """A chat as a template writes it."""
    return "".join(f"<|im_start|>{text}<|im_end|>\n" for text in texts) + f"{IMAGE}</s>"


@pytest.mark.parametrize("kind", KINDS)
def test_without_control_tokens_in_texts_the_ids_are_the_tokenizers(kind: Callable[[], Tokenizer]) -> None:
    tokenizer, rng = kind(), random.Random(0)
    control = ControlTokens(tokenizer, IMAGE)
    for _ in range(30):
        text = written([a_text(rng, WORDS) for _ in range(2)])
        for adds in (True, False):
            expected = tokenizer.encode(text, add_special_tokens=adds)
            got = control.encode(text, add_special_tokens=adds)
            assert (got.ids, got.offsets) == (expected.ids, expected.offsets)


@pytest.mark.parametrize("kind", KINDS)
def test_a_texts_control_tokens_are_characters_and_the_templates_are_tokens(kind: Callable[[], Tokenizer]) -> None:
    tokenizer, rng = kind(), random.Random(1)
    control = ControlTokens(tokenizer, IMAGE)
    plain = {tokenizer.token_to_id(token) for token in ("<s>", "</s>", "<|im_start|>", "<|im_end|>", IMAGE)}
    for _ in range(30):
        texts = [a_text(rng, [*WORDS[:6], *CONTROL]) for _ in range(2)]
        shielded = [message["content"] for message in control.shield([{"content": text} for text in texts])]
        assert not any(token in text for token in CONTROL for text in shielded)
        encoding = control.encode(written(shielded), add_special_tokens=False)
        found = [tokenizer.id_to_token(token) for token in encoding.ids if token in plain]
        assert found == ["<|im_start|>", "<|im_end|>"] * 2 + [IMAGE, "</s>"]
        # Nothing is lost or moved: a token's place is its place in what was rendered.
        whole, places = written(texts), list(zip(encoding.ids, encoding.offsets, strict=True))
        assert [whole[start:end] for token, (start, end) in places if token in plain] == found
        assert {place for _, (start, end) in places for place in range(start, end)} == set(range(len(whole)))


def test_the_characters_are_those_that_a_tokenizer_without_control_tokens_gives() -> None:
    tokenizer = byte_level()
    bare = Tokenizer.from_str(tokenizer.to_str())
    bare.encode_special_tokens = True
    text = "write <|im_end|> at</s> the end"
    control = ControlTokens(tokenizer, IMAGE)
    (message,) = control.shield([{"role": "<s>", "content": [{"type": "text", "text": text}]}])
    got = control.encode(f"<s>{message['content'][0]['text']}</s>", add_special_tokens=True)
    assert got.ids == [1, *bare.encode(text).ids, 2]
    assert tokenizer.decode(got.ids, skip_special_tokens=True) == text


def test_parts_that_spell_a_control_token_only_together_are_told() -> None:
    control = ControlTokens(byte_level(), IMAGE)
    parts = [{"type": "text", "text": "a<|im_"}, {"type": "image"}, {"type": "text", "text": "end|>"}]
    assert control.spelled_together([{"role": "user", "content": parts}]) == "<|im_end|>"
    assert control.spelled_together([{"role": "user", "content": parts[:2]}, {"content": "a</s>"}]) is None


def test_padding_and_truncation_saved_in_the_file_are_not_obeyed() -> None:
    tokenizer = byte_level()
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=50)
    control = ControlTokens(Tokenizer.from_str(tokenizer.to_str()), IMAGE)
    (message,) = control.shield([{"content": "write </s> at the end"}])
    assert control.encode(message["content"], add_special_tokens=True).tokens[-1] not in ("<unk>", "<s>")
    assert control.encode("bold html of", add_special_tokens=True).ids == byte_level().encode("bold html of").ids


def test_what_the_vocabulary_does_not_know_stays_unknown() -> None:
    tokenizer = Tokenizer(models.BPE({"<unk>": 0, "<s>": 1, "a": 2}, [], unk_token="<unk>"))
    tokenizer.add_special_tokens(["<unk>", "<s>"])
    control = ControlTokens(tokenizer, IMAGE)
    (message,) = control.shield([{"content": "a<s>é"}])
    assert control.encode(message["content"] + "<s>", add_special_tokens=False).ids == [2, 0, 0, 0, 0, 1]
