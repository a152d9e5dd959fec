"""The next question about a picture is read from behind it, and answered to the last bit as if it were the first."""

import json
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest
from PIL import Image

from switchkd.cli.main import main
from switchkd.serve import ConversationError, Engine, Message, PrefixFolderError
from switchkd.serve.engine.conversation import to_messages
from switchkd.serve.engine.decoder import Floats
from switchkd.serve.engine.kv_cache import KVCache
from switchkd.serve.engine.prefix_cache import Prefix, PrefixCache, prefixes
from switchkd.serve.engine.prompt_reader import Reading

FIRST, SECOND = "What colour is the square on the left?", "How many circles are there?"
IMAGE = 9
T = TypeVar("T")


def result(work: Generator[None, None, T]) -> T:
    """What is returned behind the last step."""
    while True:
        try:
            next(work)
        except StopIteration as done:
            return done.value  # type: ignore[no-any-return]


def look(engine: Engine, question: str | Sequence[Message], pictures: Sequence[Image.Image]) -> Reading:
    """What the engine does before it reads a prompt."""
    prompt = engine.prompt.encode(to_messages(question, len(pictures)), len(pictures))
    return result(engine.reader.look(prompt, [engine.encoder.open(picture) for picture in pictures], len(prompt) + 1))


def logits(engine: Engine, question: str | Sequence[Message], pictures: Sequence[Image.Image]) -> Floats:
    return result(engine.reader.read(look(engine, question, pictures)))


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_known_picture_changes_no_bit_of_an_answer(
    tiny_bundle: Path, pictures: list[Image.Image], precision: str
) -> None:
    warm, cold = (Engine.open(tiny_bundle, precision, threads=1) for _ in range(2))
    logits(warm, FIRST, pictures[:1])
    reading = look(warm, SECOND, pictures[:1])
    assert reading.cache.length > warm.bundle.model.tokens_per_picture
    assert not reading.features  # the encoder was not asked
    assert not reading.to_read
    np.testing.assert_array_equal(result(warm.reader.read(reading)), logits(cold, SECOND, pictures[:1]))
    assert warm.answer(SECOND, pictures[:1]).tokens == cold.answer(SECOND, pictures[:1]).tokens


def test_a_conversation_goes_on_behind_its_picture(tiny_bundle: Path, pictures: list[Image.Image]) -> None:
    engine = Engine.open(tiny_bundle, "fp32", threads=1)
    turn: Message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": FIRST}]}
    said: Message = {
        "role": "assistant",
        "content": engine.answer([turn], pictures[:1], max_new_tokens=5).text or "red",
    }
    more: list[Message] = [turn, said, {"role": "user", "content": SECOND}]
    assert look(engine, more, pictures[:1]).cache.length > engine.bundle.model.tokens_per_picture


def test_only_the_same_beginning_is_known(tiny_bundle: Path, pictures: list[Image.Image]) -> None:
    engine = Engine.open(tiny_bundle, "fp32", threads=1)
    logits(engine, FIRST, pictures[:2])
    both = look(engine, SECOND, pictures[:2])
    assert not both.features
    first = look(engine, SECOND, [pictures[0], pictures[2]])  # goes on behind the first picture
    assert len(first.features) == len(first.to_read) == 1
    assert 0 < first.cache.length < both.cache.length
    for other in ([pictures[1], pictures[0]], pictures[1:2]):
        assert look(engine, FIRST, other).cache.length == 0
    system: list[Message] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": FIRST}]},
    ]
    assert look(engine, system, pictures[:1]).cache.length == 0
    assert look(engine, FIRST, []).cache.length == 0


def test_answers_do_not_write_into_what_is_kept(tiny_bundle: Path, pictures: list[Image.Image]) -> None:
    engine = Engine.open(tiny_bundle, "fp32", threads=1)
    before = engine.answer(FIRST, pictures[:1], max_new_tokens=20)
    engine.answer(SECOND, pictures[:1], max_new_tokens=20)
    assert engine.answer(FIRST, pictures[:1], max_new_tokens=20).tokens == before.tokens
    kept = look(engine, FIRST, pictures[:1]).cache
    assert kept.inputs["past_key_values.0.key"].shape()[2] == kept.length


def test_without_memory_nothing_is_kept(tiny_bundle: Path, pictures: list[Image.Image]) -> None:
    engine, other = Engine.open(tiny_bundle, "fp32", threads=1, prefix_memory=0), Engine.open(tiny_bundle, "fp32", 1)
    in_one_piece = logits(engine, FIRST, pictures[:1])
    assert look(engine, FIRST, pictures[:1]).cache.length == 0
    np.testing.assert_allclose(in_one_piece, logits(other, FIRST, pictures[:1]), atol=1e-5)
    with pytest.raises(ConversationError, match="prefix_memory is -1 MiB, expected 0"):
        Engine.open(tiny_bundle, "fp32", prefix_memory=-1)


def test_the_budget_is_kept_and_the_oldest_go_first(tiny_bundle: Path) -> None:
    engine = Engine.open(tiny_bundle, "fp32", threads=1)

    def cache(positions: int) -> KVCache:
        memory = engine.decoder.new_cache(13)
        engine.decoder.read(engine.decoder.embed([5] * positions), memory)
        assert memory.nbytes == sum(value.numpy().nbytes for value in memory.inputs.values())
        return memory

    small = cache(4)
    kept = PrefixCache(3 * small.nbytes)
    one, two, three = (Prefix(4, name) for name in (b"one", b"two", b"three"))
    kept.keep(one, small)
    kept.keep(two, small)
    assert kept.longest([one]) is not None  # used again
    kept.keep(three, cache(8))
    assert kept.longest([two]) is None
    assert kept.longest([one]) is not None
    longest = kept.longest([one, three])
    assert longest is not None
    assert longest.length == 8
    kept.keep(Prefix(9, b"larger than all"), cache(13))
    assert kept.longest([Prefix(9, b"larger than all")]) is None
    assert kept.longest([one]) is not None  # and nothing went for it


def test_prefixes_end_with_pictures_and_know_them() -> None:
    prompt = [1, IMAGE, IMAGE, 2, IMAGE, IMAGE, 3]
    first, second = prefixes(prompt, [b"a", b"b"], IMAGE, 2)
    assert (first.end, second.end) == (3, 6)
    assert prefixes(prompt, [b"a", b"c"], IMAGE, 2)[0] == first
    assert prefixes(prompt, [b"a", b"c"], IMAGE, 2)[1] != second
    assert prefixes([4, *prompt[1:]], [b"a", b"b"], IMAGE, 2)[0] != first
    assert prefixes([*prompt[:3], 7, *prompt[4:]], [b"a", b"b"], IMAGE, 2)[1] != second
    assert prefixes(prompt[:6], [b"a", b"b"], IMAGE, 2) == [first]  # something has to be left to read
    assert prefixes([1, 2], [], IMAGE, 2) == []


def test_a_later_process_goes_on_from_files(
    tiny_bundle: Path, pictures: list[Image.Image], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, picture = tmp_path / "kept" / "prefixes", tmp_path / "picture.png"
    pictures[0].save(picture)
    first = Engine.open(tiny_bundle, "fp32", threads=1, prefix_folder=folder)
    logits(first, FIRST, [pictures[0], pictures[1]])
    names = sorted(file.name for file in folder.iterdir())
    assert len(names) == 2  # one up to each picture, and nothing half written
    later = Engine.open(tiny_bundle, "fp32", threads=1, prefix_folder=folder, prefix_memory=0)
    reading = look(later, SECOND, [pictures[0], pictures[1]])
    assert not reading.features
    cold = Engine.open(tiny_bundle, "fp32", threads=1)
    np.testing.assert_array_equal(result(later.reader.read(reading)), logits(cold, SECOND, [pictures[0], pictures[1]]))
    other = Engine.open(tiny_bundle, "int8", threads=1, prefix_folder=folder)
    assert look(other, SECOND, [pictures[0], pictures[1]]).cache.length == 0  # another precision's are its own
    assert sorted(file.name for file in folder.iterdir()) == names
    words = ["ask", str(tiny_bundle), str(picture), FIRST, "--precision", "fp32", "--prefixes", str(folder), "--json"]
    assert [main(words) for _ in range(2)] == [0, 0]
    one, two = (json.loads(line)["tokens"] for line in capsys.readouterr().out.splitlines())
    assert one == two
    assert sorted(file.name for file in folder.iterdir()) == names  # it begins as the one of both pictures does


def test_folders_and_files_that_are_none_say_so(tiny_bundle: Path, pictures: list[Image.Image], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(PrefixFolderError, match=r"file: cannot be made \(File exists\); choose another place"):
        Engine.open(tiny_bundle, "fp32", prefix_folder=tmp_path / "file")
    folder = tmp_path / "prefixes"
    engine = Engine.open(tiny_bundle, "fp32", threads=1, prefix_folder=folder, prefix_memory=0)
    logits(engine, FIRST, pictures[:1])
    (file,) = folder.iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole[:-9])
    with pytest.raises(PrefixFolderError, match=r"safetensors: cannot be read \(.+\); remove it"):
        look(engine, FIRST, pictures[:1])
    start = file.name.split("-")[0].encode()
    file.write_bytes(whole.replace(start, start[::-1]))
    with pytest.raises(PrefixFolderError, match="is of another bundle; remove it"):
        look(engine, FIRST, pictures[:1])
