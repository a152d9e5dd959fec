"""The picture world: deterministic, balanced, split by digit images, and scored above what guessing reaches."""

import hashlib
import json
import random
from collections import Counter
from pathlib import Path

import pytest

from switchkd.training.world.dataset import WorldSettings, is_written, picture_count, write_world
from switchkd.training.world.questions import KINDS, caption, with_article
from switchkd.training.world.scenes import COLOURS, DIGIT_SHARES, PICTURE_SIDE, Scene, Thing, draw, random_scene
from switchkd.training.world.scoring import above, difference, prior_by_kind, score
from switchkd.training.world.vocabulary import SPECIAL_TOKENS, train_tokenizer, world_texts

SETTINGS = WorldSettings(train_pictures=120, validation_questions=70, test_questions=1400)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small world on disk."""
    return write_world(tmp_path_factory.mktemp("world"), SETTINGS)


def digest(folder: Path) -> str:
    """A hash of all files and their names."""
    content = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            content.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return content.hexdigest()


def thing(name: str, cell: int) -> Thing:
    """A thing by its name, such as `red circle`."""
    colour, shape = name.split()
    return Thing(
        shape, colour, cell, 16, cell % 3 * 24 + 3, cell // 3 * 24 + 3, COLOURS[colour], 0 if shape.isdigit() else -1
    )


def scene(*things: tuple[str, int]) -> Scene:
    """A scene of named things."""
    return Scene(tuple(thing(name, cell) for name, cell in things), (240, 240, 240), 0)


def answers(kind: str, place: Scene) -> dict[str, str]:
    """All questions of a kind about a scene, with the turns before as a prefix."""
    return {" | ".join(t for t, _ in q.turns): q.answer for q in KINDS[kind](place)}


def test_same_seed_same_bytes_and_another_seed_others(world: Path, tmp_path: Path) -> None:
    again = write_world(tmp_path / "again", SETTINGS)
    assert digest(again) == digest(world)
    other = write_world(tmp_path / "other", WorldSettings(120, 70, 1400, seed=1))
    assert digest(other) != digest(world)


def test_a_complete_world_is_not_written_again_and_a_changed_one_is(tmp_path: Path) -> None:
    settings = WorldSettings(train_pictures=3, validation_questions=7, test_questions=7)
    drawn: list[int] = []
    write_world(tmp_path, settings, lambda: drawn.append(1))
    assert len(drawn) <= picture_count(settings) + 2 * len(KINDS)
    assert is_written(tmp_path, settings)
    drawn.clear()
    write_world(tmp_path, settings, lambda: drawn.append(1))
    assert not drawn
    write_world(tmp_path, WorldSettings(4, 7, 7), lambda: drawn.append(1))
    assert drawn


def test_digit_images_of_the_splits_are_disjoint() -> None:
    seen = {split: set[int]() for split in DIGIT_SHARES}
    for split, images in seen.items():
        rng = random.Random(split)
        for _ in range(300):
            images |= {t.digit_image for t in random_scene(rng, split).things if t.is_digit}
    assert all(seen.values())
    assert not seen["train"] & seen["test"]
    assert not seen["train"] & seen["validation"]
    assert not seen["validation"] & seen["test"]


def test_pictures_show_their_things() -> None:
    picture = draw(scene(("red square", 0), ("blue 7", 8)))
    assert picture.size == (PICTURE_SIDE, PICTURE_SIDE)
    assert picture.getpixel((11, 11)) == COLOURS["red"]
    bottom_right = picture.crop((48, 48, 72, 72)).getcolors(24 * 24)
    assert bottom_right is not None
    assert any(blue > red + 60 for _, (red, _, blue) in bottom_right)  # type: ignore[misc]
    left = picture.crop((0, 24, 24, 72)).getextrema()
    assert all(low > 200 for low, _ in left)  # type: ignore[misc]


def test_answers_are_true() -> None:
    place = scene(("red circle", 0), ("blue circle", 1), ("blue 7", 8))
    described = [caption(place, random.Random(seed)) for seed in range(200)]
    captions = {text for text in described if text[0] == "Describe the picture."}
    assert (
        "Describe the picture.",
        "A red circle is in the northwest, a blue circle is in the north, a blue 7 is in the southeast.",
    ) in captions
    assert (
        "Describe the picture.",
        "In the southeast is a blue 7, in the northwest is a red circle, in the north is a blue circle.",
    ) in captions
    assert len(captions) == 12  # six orders, two forms
    facts = [fact for request, text in described if request == "List facts." for fact in text.split(", ")]
    assert {"northwest red", "blue north", "circle red", "7 southeast", "southeast 7", "blue 7"} < set(facts)
    assert len(set(facts)) == 3 * 6  # six of each thing, all of them true
    assert with_article("orange 8") == "an orange 8"
    assert answers("attribute", place) == {
        "What colour is the 7?": "The 7 is blue.",
        "What shape is the red thing?": "The red thing is a circle.",
    }
    counts = answers("counting", place)
    assert counts["How many blue things are there?"] == "2"
    assert counts["How many circles are there?"] == "2"
    assert counts["How many crosses are there?"] == "0"
    assert counts["How many digits are there?"] == "1"
    assert counts["How many things are there?"] == "3"
    exists = answers("existence", place)
    assert {
        exists[f"Is there a {name}?"] for name in ("blue 7", "blue circle", "red circle", "circle", "red thing")
    } == {"yes"}
    assert {exists[f"Is there a {name}?"] for name in ("red 7", "cross", "green thing")} == {"no"}
    assert "Is there a red cross?" not in exists  # absent pairs are near misses: a colour and a shape of the scene
    where = answers("position", scene(("red circle", 0), ("blue square", 1), ("blue 7", 8)))
    assert where["Where is the 7?"] == "The 7 is in the southeast."
    assert where["Where is the red thing?"] == "The red thing is in the northwest."
    assert "Where is the blue thing?" not in where  # there are two
    side_by_side = "The circle is in the northwest, the square is in the north"
    assert where["Is the circle left of the square?"] == f"{side_by_side}: yes."
    assert where["Is the circle right of the square?"] == f"{side_by_side}: no."
    across = "The 7 is in the southeast, the circle is in the northwest"
    assert where["Is the 7 below the circle?"] == f"{across}: yes."
    assert where["Is the 7 above the circle?"] == f"{across}: no."
    assert "Is the circle above the square?" not in where  # side by side: neither
    reading = answers("reading", place)
    assert reading == {
        "What digit is in the southeast?": "The digit in the southeast is 7.",
        "What digit is blue?": "The blue digit is 7.",
        "Read the digits.": "7",
    }
    boxes = answers("region", place)
    assert boxes["What is in the region [0.04, 0.04, 0.26, 0.26]?"] == "In the northwest is a red circle."
    talk = answers("conversation", place)
    assert talk["What is in the northwest? | And what is to the right of it?"] == "In the north is a blue circle."
    assert talk["What is in the northwest? | And what is below it?"] == "In the west is nothing."
    assert talk["What is in the centre? | And what is to the left of it?"] == "In the west is nothing."
    assert talk["What is in the northwest? | Is there another thing of the same colour?"] == "no"
    assert talk["What is in the north? | Is there another thing of the same colour?"] == "yes"


def test_yes_and_no_are_balanced_and_no_answer_dominates(world: Path) -> None:
    records = json.loads((world / "test.json").read_text())
    assert Counter(row["kind"] for row in records) == dict.fromkeys(KINDS, 200)
    by_template: dict[str, Counter[str]] = {}
    for row in records:
        by_template.setdefault(row["template"], Counter())[row["fact"]] += 1
    for template in ("colour exists", "shape exists", "pair exists", "relation", "same colour"):
        counts = by_template[template]
        assert abs(counts["yes"] - counts["no"]) <= 0.06 * counts.total(), template
    assert all(prior <= 0.5 + 0.02 for prior in prior_by_kind(records).values())


def test_training_records_are_llava_records(world: Path) -> None:
    rows = json.loads((world / "train.json").read_text())
    assert sum("image" not in row for row in rows) > 0  # text-only samples among them
    for row in rows:
        first = row["conversations"][0]["value"]
        assert first.startswith("<image>\n") == ("image" in row)
        assert [turn["from"] for turn in row["conversations"]] == ["human", "gpt"] * (len(row["conversations"]) // 2)
        assert len(row["conversations"]) >= 2
        if "image" in row:
            assert (world / "pictures" / row["image"]).is_file()


def test_nonsense_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="train_pictures is 0"):
        WorldSettings(train_pictures=0)


def test_tokenizer_has_the_chat_tokens_and_reads_any_text() -> None:
    tokenizer = train_tokenizer(world_texts(random.Random(0), 200))
    assert len(tokenizer) >= 350
    for token in SPECIAL_TOKENS:
        assert len(tokenizer(token)["input_ids"]) == 1
    text = "Ein grüner Kreis, 图片 🙂\n\t12"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer("assistant")["input_ids"]) == 1


def test_scores_by_kind_and_above_the_prior() -> None:
    rows = [
        {"kind": kind, "template": kind, "fact": value, "conversations": [{"value": "?"}, {"value": value}]}
        for kind, value in (("a", "yes"), ("a", "no"), ("b", "red circle"), ("b", "red circle"), ("b", "blue 7"))
    ]
    result = score(["Yes.", "yes", "a red circle", "Red  circle", "blue"], rows)
    assert result.by_kind == {"a": 0.5, "b": 2 / 3}
    assert result.accuracy == 3 / 5
    assert result.prior_by_kind == {"a": 0.5, "b": 2 / 3}
    assert result.prior == pytest.approx((2 * 0.5 + 3 * 2 / 3) / 5)
    assert result.above_prior == pytest.approx(0)
    assert above(1.0, 0.5) == 1
    assert result.intervals["all"][0] < 3 / 5 < result.intervals["all"][1]  # type: ignore[operator]
    assert set(result.intervals) == {"all", "a", "b"}
    with pytest.raises(ValueError, match="1 answers for 5 records"):
        score(["yes"], rows)


def test_differences_are_paired_by_picture() -> None:
    rows = [
        {"kind": "a", "image": f"{number // 2}.png", "conversations": [{"value": "?"}, {"value": "yes"}]}
        for number in range(40)
    ]
    better, worse = ["yes"] * 40, ["yes"] * 36 + ["no"] * 4
    found = difference([better], [worse], rows)
    assert found.value == pytest.approx(0.1)
    assert found.clusters == 20
    # Two pictures of twenty differ by 2: SE² = 20/19 (2 (2 - 0.2)² + 18 0.2²) / 40².
    assert found.standard_error == pytest.approx((20 / 19 * (2 * 1.8**2 + 18 * 0.2**2) / 1600) ** 0.5)
    seeds = difference([better, better, better], [worse, better, worse], rows)
    assert seeds.value == pytest.approx(0.2 / 3)
    assert seeds.seeds == 3
