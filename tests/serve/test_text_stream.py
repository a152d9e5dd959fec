"""Streamed text never holds half a character, and nothing of the answer is lost."""

import random

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from switchkd.serve.text_stream import TextStream

WORDS = "Grüße aus 東京 😀 👩‍👩‍👧 naïve"


@pytest.fixture(scope="module")
def byte_tokenizer() -> Tokenizer:
    """Byte-level BPE without merges worth naming: nearly every token is a single byte."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(initial_alphabet=alphabet, special_tokens=["<|im_end|>"], show_progress=False)
    tokenizer.train_from_iterator([], trainer)
    return tokenizer


def pieces(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    stream = TextStream(tokenizer)
    result = [stream.push(token) for token in ids]
    result.append(stream.finish())
    assert "".join(result) == stream.text
    return result


def test_characters_of_many_bytes_come_whole(byte_tokenizer: Tokenizer) -> None:
    ids = byte_tokenizer.encode(WORDS).ids
    assert len(ids) == len(WORDS.encode())
    result = pieces(byte_tokenizer, ids)
    assert "".join(result) == WORDS
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(result)
    assert result.count("😀") == 1


@pytest.mark.parametrize("missing", [1, 2, 3])
def test_a_character_cut_off_at_the_end_is_left_out(byte_tokenizer: Tokenizer, missing: int) -> None:
    assert "".join(pieces(byte_tokenizer, byte_tokenizer.encode("ok 😀").ids[:-missing])) == "ok "


def test_special_tokens_give_no_text(byte_tokenizer: Tokenizer) -> None:
    [end] = byte_tokenizer.encode("<|im_end|>").ids
    assert "".join(pieces(byte_tokenizer, [end, *byte_tokenizer.encode("a").ids, end])) == "a"


def test_any_bytes_give_the_text_of_the_whole(byte_tokenizer: Tokenizer) -> None:
    source = random.Random(0)
    for _ in range(300):
        ids = [source.randrange(1, byte_tokenizer.get_vocab_size()) for _ in range(source.randrange(40))]
        whole = byte_tokenizer.decode(ids)
        assert "".join(pieces(byte_tokenizer, ids)) == whole.rstrip("\N{REPLACEMENT CHARACTER}")
