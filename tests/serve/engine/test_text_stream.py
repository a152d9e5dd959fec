"""Streamed text never holds half a character, and nothing of the answer is lost."""

import random
from collections.abc import Callable

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from switchkd.serve.engine.text_stream import TextStream

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
    result = []
    for token in ids:
        result.append(stream.push(token))
        # What counts as settled has been given to its end, whatever may come.
        assert stream.text.startswith(tokenizer.decode(ids[: stream.settled]))
    result.append(stream.finish())
    assert "".join(result) == stream.text
    assert stream.settled == len(ids)
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


# --- any tokens of any kind of tokenizer ---

TOKENS = ["▁", "▁▁", "▁red", "blue", "s", "▁.", "\n", "\N{REPLACEMENT CHARACTER}", "猫", "'s", "##ing", "##", "."]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def byte_level() -> Tokenizer:
    """Qwen's and Llama-3's kind: every token is a string of bytes."""
    alphabet = {token: number for number, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(alphabet, []))
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def byte_fallback() -> Tokenizer:
    """Llama-2's kind: sentencepiece, whose decoder turns a run of byte tokens into characters as a whole."""
    tokens = {token: number for number, token in enumerate(["<unk>", *BYTES, *TOKENS])}
    tokenizer = Tokenizer(models.BPE(tokens, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def unigram() -> Tokenizer:
    """T5's kind, with byte fallback behind."""
    tokens = [(token, -1.0) for token in ["<unk>", *BYTES, *TOKENS]]
    tokenizer = Tokenizer(models.Unigram(tokens, unk_id=0, byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return tokenizer


def word_piece() -> Tokenizer:
    """BERT's kind: spaces go between tokens, and some are taken back."""
    tokens = {token: number for number, token in enumerate(["[UNK]", *TOKENS])}
    tokenizer = Tokenizer(models.WordPiece(tokens, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece(cleanup=True)
    return tokenizer


def word_ends() -> Tokenizer:
    """CLIP's kind: a word's last token carries the space."""
    tokens = {token: number for number, token in enumerate([*TOKENS, "red</w>", "s</w>", "</w>"])}
    tokenizer = Tokenizer(models.BPE(tokens, []))
    tokenizer.decoder = decoders.BPEDecoder(suffix="</w>")
    return tokenizer


def words() -> Tokenizer:
    """No decoder at all."""
    return Tokenizer(models.WordLevel({token: number for number, token in enumerate(TOKENS)}, unk_token="s"))


@pytest.mark.parametrize("make", [byte_level, byte_fallback, unigram, word_piece, word_ends, words])
def test_any_tokens_give_the_decoded_text_once(make: Callable[[], Tokenizer]) -> None:
    tokenizer = make()
    tokenizer.add_special_tokens([AddedToken("<|im_end|>", special=True)])
    tokenizer.add_tokens([AddedToken("<note>", special=False)])
    source = random.Random(0)
    some = [*range(tokenizer.get_vocab_size()), tokenizer.get_vocab_size() + 7]  # a row that has no token
    likely = [token for spelling in (*TOKENS, "<0x0A>", "<|im_end|>") if (token := tokenizer.token_to_id(spelling))]
    whole_characters = [list(tokenizer.encode(character).ids) for character in "é東😀a"]
    for _ in range(400):
        ids: list[int] = []
        for _ in range(source.randrange(12)):
            kind = source.randrange(4)
            if kind == 0:
                ids += source.choice(whole_characters)  # spelled in bytes, where there are bytes
            else:
                ids.append(source.choice(some if kind == 1 or not likely else likely))
        assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids).rstrip("\N{REPLACEMENT CHARACTER}")


def test_tokens_are_settled_when_their_text_is_given(byte_tokenizer: Tokenizer) -> None:
    stream = TextStream(byte_tokenizer)
    settled = []
    for token in byte_tokenizer.encode("aé<|im_end|>😀b").ids:
        stream.push(token)
        settled.append(stream.settled)
    assert settled == [1, 1, 3, 3, 3, 3, 3, 8, 9]


def test_words_do_not_wait_for_one_another() -> None:
    vocabulary, tokenizer = byte_fallback().get_vocab(), byte_fallback()
    ids = [vocabulary[token] for token in ("▁red", "s", "<0xC3>", "<0xA9>", "▁red", "<0xC3>", "▁.", "<0xC3>")]
    assert pieces(tokenizer, ids) == ["red", "s", "", "", "é red", "", "\N{REPLACEMENT CHARACTER} .", "", ""]
