"""Broken records are left out, counted and listed, and change nothing: the run ends in the clean subset's weights."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from switchkd.cli.main import main
from switchkd.training.data.check import check_data
from switchkd.training.data.conversations import BrokenRecord, Reason, to_messages
from switchkd.training.data.dataset import ConversationDataset
from switchkd.training.data.label_mask import model_inputs
from switchkd.training.data.picture_check import PicturesUnderCheck
from switchkd.training.data.sources import (
    A_OKVQA,
    GQA,
    LCS,
    LLAVA,
    OCRVQA,
    OTHER,
    REFCOCO,
    SHAREGPT,
    SOURCES,
    TEXTCAPS,
    VG,
    VQA,
    Source,
    source_of,
)
from switchkd.training.data.stage_data import Selection, StageDataset
from switchkd.training.models.alignment import IGNORED
from switchkd.training.models.vlm import load_vlm
from switchkd.training.preparation.report import lines, report
from switchkd.training.recipe.recipe import DataRecipe

GOOD = 40


def turns(answer: str = "A red circle.", question: str = "<image>\nWhat is it?") -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def photo(seed: int, size: tuple[int, int] = (60, 40)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8))


def write_good(folder: Path) -> list[dict[str, Any]]:
    """Sound records: photographs, unusual but sound pictures, text alone, a list of one picture."""
    pictures = folder / "pictures"
    (pictures / "sub").mkdir(parents=True)
    records: list[dict[str, Any]] = []
    for number in range(GOOD):
        photo(number).save(pictures / f"{number}.jpg")
        records.append({"id": f"good-{number}", "image": f"{number}.jpg", "conversations": turns(f"Number {number}.")})
    photo(90).convert("CMYK").save(pictures / "cmyk.jpg")
    Image.fromarray(np.arange(2400, dtype=np.uint16).reshape(40, 60) * 20).save(pictures / "deep.png")
    photo(91).quantize(16).save(pictures / "palette.png")
    rotated = Image.Exif()
    rotated[0x0112] = 6
    photo(92).save(pictures / "sub" / "rotated.jpg", exif=rotated)
    for name in ("cmyk.jpg", "deep.png", "palette.png", "sub/../sub/rotated.jpg"):
        records.append({"id": name, "image": name, "conversations": turns()})
    records.append({"id": "text", "conversations": turns(question="Who?")})
    records.append({"id": 7, "image": ["3.jpg"], "conversations": turns()})
    return records


def write_broken(folder: Path) -> dict[str, tuple[Any, Reason]]:
    """One record of every kind that cannot be trained on, by its id, with what it is counted under."""
    pictures = folder / "pictures"
    data = (pictures / "0.jpg").read_bytes()
    (pictures / "cut.jpg").write_bytes(data[: len(data) // 2])
    (pictures / "page.jpg").write_text("<html>404 Not Found</html>")
    (pictures / "empty.jpg").write_bytes(b"")
    (pictures / "folder.jpg").mkdir()
    photo(1, (1, 1)).save(pictures / "dot.png")
    Image.new("RGB", (20000, 10)).save(pictures / "thread.png")
    Image.new("L", (1, 20000)).save(pictures / "hair.png")
    Image.new("L", (6000, 5000)).save(pictures / "bomb.png")
    photo(2).save(folder / "secret.jpg")
    (pictures / "link.jpg").symlink_to(folder / "secret.jpg")
    (pictures / "loop.jpg").symlink_to(pictures / "loop.jpg")
    named = {
        "cut.jpg": Reason.UNREADABLE,
        "page.jpg": Reason.UNREADABLE,
        "empty.jpg": Reason.UNREADABLE,
        "folder.jpg": Reason.UNREADABLE,
        "loop.jpg": Reason.UNREADABLE,
        "dot.png": Reason.TOO_SMALL,
        "hair.png": Reason.TOO_SMALL,
        "thread.png": Reason.TOO_NARROW,
        "bomb.png": Reason.TOO_LARGE,
        "gone.jpg": Reason.MISSING,
        "0.jpg/below-a-file.jpg": Reason.MISSING,
        "../secret.jpg": Reason.OUTSIDE,
        str(folder / "secret.jpg"): Reason.OUTSIDE,
        "link.jpg": Reason.OUTSIDE,
        "nul\0.jpg": Reason.TEXT,
    }
    broken: dict[str, tuple[Any, Reason]] = {
        f"picture {name!r}": ({"image": name, "conversations": turns()}, reason) for name, reason in named.items()
    }
    image = {"image": "0.jpg"}
    long = turns("word " * 200, "<image>\n" + "why " * 200)
    later = [{"from": "human", "value": "say " * 150}, {"from": "gpt", "value": "yes"}, *turns()]
    broken |= {
        "no image token": (image | {"conversations": turns(question="What?")}, Reason.PLACEHOLDERS),
        "two image tokens": (image | {"conversations": turns(question="<image><image>")}, Reason.PLACEHOLDERS),
        "token, no picture": ({"conversations": turns()}, Reason.PLACEHOLDERS),
        "token in an answer": (image | {"conversations": turns("an <image>")}, Reason.PLACEHOLDERS),
        "two pictures": ({"image": ["0.jpg", "1.jpg"], "conversations": turns()}, Reason.SEVERAL),
        "picture 5": ({"image": 5, "conversations": turns()}, Reason.NOT_A_RECORD),
        "empty answer": (image | {"conversations": turns(" ")}, Reason.NO_ANSWER),
        "no answer": (image | {"conversations": turns()[:1]}, Reason.NO_ANSWER),
        "NUL": (image | {"conversations": turns("a\0b")}, Reason.TEXT),
        "half a character": (image | {"conversations": turns("a\ud83d")}, Reason.TEXT),
        "no conversations": (image, Reason.CONVERSATION),
        "turns are text": (image | {"conversations": ["hello"]}, Reason.CONVERSATION),
        "value is a number": (image | {"conversations": [{"from": "human", "value": 3}]}, Reason.CONVERSATION),
        "who": (image | {"conversations": [{"from": ["x"], "value": "?"}]}, Reason.SPEAKER),
        "answers cut off": (image | {"conversations": long}, Reason.CUT),
        "picture cut off": (image | {"conversations": later}, Reason.CUT),
    }
    return broken


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Reason]]:
    """clean.json and dirty.jsonl, which holds the same records with broken ones between them, in one folder."""
    folder = tmp_path_factory.mktemp("broken")
    good = write_good(folder)
    (folder / "clean.json").write_text(json.dumps(good))
    broken = write_broken(folder)
    lines = [json.dumps(record) for record in good]
    for place, (name, (record, _)) in enumerate(broken.items()):
        lines.insert(2 * place, json.dumps({"id": name} | record))
    lines += ['["a list"]', '{"id": "unfinished", "conversations": [', ""]
    (folder / "dirty.jsonl").write_text("\n".join(lines))
    return folder, {name: reason for name, (_, reason) in broken.items()}


def recipe_of(folder: Path, records: str, **changes: Any) -> DataRecipe:
    given: dict[str, Any] = {"max_length": 120, "max_broken": 0.5}
    return DataRecipe([str(folder / records)], str(folder / "pictures"), **(given | changes))


def write_recipe(path: Path, checkpoint: Path, data: DataRecipe, output: Path) -> Path:
    training: dict[str, Any] = {
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "use_cpu": True,
        "learning_rate": 1e-3,
    }
    training |= {"save_strategy": "no", "train_sampling_strategy": "group_by_length"}
    stage: dict[str, Any] = {"name": "sft", "train": ["projector", "language_model"], "objective": {"name": "sft"}}
    values = {name: getattr(data, name) for name in ("records", "pictures", "max_length", "max_broken")}
    stage |= {"data": values, "training": training}
    recipe = {"output": str(output), "model": {"checkpoint": str(checkpoint)}, "stages": [stage]}
    path.write_text(yaml.safe_dump(recipe))
    return path


@pytest.mark.parametrize("check", ["full", "headers"])
def test_every_broken_record_is_left_out_under_its_reason(
    check: str, data: tuple[Path, dict[str, Reason]], tiny_checkpoint: Path
) -> None:
    folder, reasons = data
    encoder, _ = model_inputs(load_vlm(tiny_checkpoint), 120)
    found = check_data(recipe_of(folder, "dirty.jsonl", check=check), encoder, None)
    by_id = {row.id: row.reason for row in found.broken.values() if row.id is not None}
    assert by_id == reasons
    assert sum(row.id is None for row in found.broken.values()) == 2  # the list, and the unfinished line
    clean = json.loads((folder / "clean.json").read_text())
    assert [found.records[number] for number in found.good_M.tolist()] == clean
    # A record that is listed is found again by its place in the file.
    listed = next(row for row in found.broken.values() if row.id == "two pictures")
    with Path(listed.file).open("rb") as file:
        file.seek(listed.byte)
        assert json.loads(file.readline())["id"] == "two pictures"


def test_the_run_ends_in_the_weights_of_the_clean_subset(
    data: tuple[Path, dict[str, Reason]], tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, reasons = data
    weights = []
    for records in ("clean.json", "dirty.jsonl"):
        output = tmp_path / records
        recipe = write_recipe(tmp_path / "r.yaml", tiny_checkpoint, recipe_of(folder, records), output)
        assert main(["train", str(recipe)]) == 0
        weights.append(load_file(output / "sft" / "model.safetensors"))
    clean, dirty = weights
    assert clean.keys() == dirty.keys()
    assert all(torch.equal(clean[name], dirty[name]) for name in clean)
    err = capsys.readouterr().err
    count = len(reasons) + 2
    assert f"sft: {count} of {count + GOOD + 6} records left out" in err
    listed = (tmp_path / "dirty.jsonl" / "data-check" / "sft.skipped.jsonl").read_text().splitlines()
    assert len(listed) == count
    facts = json.loads((tmp_path / "dirty.jsonl" / "sft" / "stage.json").read_text())["facts"]
    assert facts["left_out"][Reason.UNREADABLE] == 5
    assert sum(facts["left_out"].values()) == count


def test_above_the_share_it_stops_before_the_first_step(
    data: tuple[Path, dict[str, Reason]], tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, reasons = data
    recipe = write_recipe(tmp_path / "r.yaml", tiny_checkpoint, recipe_of(folder, "dirty.jsonl"), tmp_path / "out")
    assert main(["train", str(recipe), "stages.sft.data.max_broken=0.01"]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    listed = tmp_path / "out" / "data-check" / "sft.skipped.jsonl"
    for part in ("more than max_broken 1 %", "picture unreadable 5", "First: picture 'cut.jpg':", str(listed)):
        assert part in last
    assert len(listed.read_text().splitlines()) == len(reasons) + 2
    assert not (tmp_path / "out" / "sft").exists()


def test_a_second_check_looks_only_at_what_changed(
    data: tuple[Path, dict[str, Reason]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "data"
    shutil.copytree(data[0], folder, symlinks=True)
    recipe, memory = recipe_of(folder, "clean.json"), tmp_path / "memory"
    assert not check_data(recipe, None, memory).broken
    (kept,) = memory.glob("pictures-*.jsonl")
    kept.write_bytes(kept.read_bytes()[:-20])  # as if it had been interrupted in the middle of its last line
    (folder / "pictures" / "5.jpg").write_bytes(b"no picture any more")
    looked: list[int] = []
    original: Callable[..., Any] = PicturesUnderCheck.__getitem__

    def counted(self: PicturesUnderCheck, index: int) -> Any:
        seen = original(self, index)
        if seen is not None:
            looked.append(index)
        return seen

    monkeypatch.setattr(PicturesUnderCheck, "__getitem__", counted)
    found = check_data(recipe, None, memory)
    assert [row.id for row in found.broken.values()] == ["good-5"]
    assert looked == [5, GOOD + 3]
    (folder / "pictures" / "5.jpg").unlink()
    photo(5).save(folder / "pictures" / "5.jpg")
    looked.clear()
    assert not check_data(recipe, None, memory).broken
    assert looked == [5]


def test_headers_alone_miss_damage_in_the_middle_and_full_finds_it(
    data: tuple[Path, dict[str, Reason]], tmp_path: Path
) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    photo(3).save(pictures / "a.png")
    whole = bytearray((pictures / "a.png").read_bytes())
    whole[len(whole) // 2] ^= 0xFF
    (pictures / "a.png").write_bytes(whole)
    (tmp_path / "r.json").write_text(json.dumps([{"id": "a", "image": "a.png", "conversations": turns()}]))
    broken = [
        check_data(recipe_of(tmp_path, "r.json", check=check), None, None).broken for check in ("headers", "full")
    ]
    assert [len(found) for found in broken] == [0, 1]


def test_a_picture_that_only_the_resizing_makes_too_large_is_found_before_training(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))
    settings = json.loads((checkpoint / "processor_config.json").read_text())
    settings["image_processor"] |= {"size": {"shortest_edge": 700}, "do_center_crop": True, "crop_size": 24}
    (checkpoint / "processor_config.json").write_text(json.dumps(settings))
    (tmp_path / "pictures").mkdir()
    for name, size in {"a": (1600, 8), "b": (60, 40)}.items():  # 700 times 140,000 pixels, and 700 times 1,050
        photo(1, size).save(tmp_path / "pictures" / f"{name}.jpg")
    records = [{"id": name, "image": f"{name}.jpg", "conversations": turns()} for name in "ab"]
    (tmp_path / "r.json").write_text(json.dumps(records))
    data = recipe_of(tmp_path, "r.json")
    recipe = write_recipe(tmp_path / "r.yaml", checkpoint, data, tmp_path / "out")
    assert main(["data", "check", str(recipe), "--json", "--list", str(tmp_path / "all.jsonl")]) == 0
    (found,) = json.loads(capsys.readouterr().out)["sets"]
    assert found["left_out"] == {Reason.TOO_LARGE: 1}
    (row,) = map(json.loads, (tmp_path / "all.jsonl").read_text().splitlines())
    assert "a.jpg: 1600 x 8 is too narrow: resized to 140000 x 700 as the model wants it" in row["detail"]
    encoder, preprocessing = model_inputs(load_vlm(checkpoint), 120)
    dataset = ConversationDataset(records, tmp_path / "pictures", encoder, preprocessing)
    assert dataset[1].pixels_CHW is not None
    with pytest.raises(BrokenRecord, match="too narrow") as caught:
        dataset[0]
    assert caught.value.reason == Reason.TOO_LARGE


def test_links_out_of_the_folder_are_followed_when_asked_for(data: tuple[Path, dict[str, Reason]]) -> None:
    found = check_data(recipe_of(data[0], "dirty.jsonl", follow_links=True), None, None)
    assert "picture 'link.jpg'" not in {row.id for row in found.broken.values()}
    assert "picture '../secret.jpg'" in {row.id for row in found.broken.values()}


def test_a_picture_lost_while_training_is_replaced_by_a_sample_that_teaches_nothing(
    data: tuple[Path, dict[str, Reason]], tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("switchkd.training.data.stage_data.WAITS", (0.0,))
    recipe = recipe_of(data[0], "clean.json")
    encoder, preprocessing = model_inputs(load_vlm(tiny_checkpoint), 120)
    found = check_data(recipe, encoder, None)
    selection = Selection(found.records, found.length_N, {}, tmp_path / "skipped.jsonl")
    gone = DataRecipe(recipe.records, str(tmp_path), max_broken=0.01)
    dataset = StageDataset(selection, gone, encoder, preprocessing)
    sample = dataset[0]
    assert set(sample.labels_T) == {IGNORED}
    assert sample.pixels_CHW is None
    assert dataset[GOOD + 4].pixels_CHW is None  # text alone: not lost
    assert (dataset.seen, dataset.lost) == (2, 1)
    (line,) = (tmp_path / "skipped.jsonl").read_text().splitlines()
    assert json.loads(line)["reason"] == Reason.UNREADABLE
    assert json.loads(line)["while"] == "training"


def damage_unseen(path: Path) -> None:
    """Destroy a picture as a failing disk does: its size and time say that nothing happened."""
    status = path.stat()
    path.write_bytes(b"\0" * status.st_size)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize(("lost", "code"), [(1, 0), (10, 0), (11, 2)])
def test_pictures_lost_after_the_check_end_a_run_only_above_the_share(
    lost: int,
    code: int,
    data: tuple[Path, dict[str, Reason]],
    tiny_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("switchkd.training.data.stage_data.WAITS", (0.0,))
    folder = tmp_path / "data"
    shutil.copytree(data[0], folder, symlinks=True)
    recipe = write_recipe(
        tmp_path / "r.yaml", tiny_checkpoint, recipe_of(folder, "clean.json", max_broken=0.01), tmp_path / "out"
    )
    # Every step has one sample: those of lost pictures are all that a step has. 1 % is 10 of at least 1000 samples.
    changes = ["stages.sft.training.per_device_train_batch_size=1", f"stages.sft.training.max_steps={GOOD + 6}"]
    assert main(["data", "check", str(recipe), *changes]) == 0
    for number in range(lost):
        damage_unseen(folder / "pictures" / f"{number + 5}.jpg")
    capsys.readouterr()
    assert main(["train", str(recipe), *changes]) == code
    err = capsys.readouterr().err
    listed = (tmp_path / "out" / "data-check" / "sft.skipped.jsonl").read_text().splitlines()
    assert [json.loads(line)["while"] for line in listed] == ["training"] * lost
    if code:
        assert f"{lost} of " in err.strip().splitlines()[-1]
        assert "samples could not be read, more than max_broken 1 %" in err.strip().splitlines()[-1]
    else:
        assert f"{lost} samples could not be read while training" in err
        weights = load_file(tmp_path / "out" / "sft" / "model.safetensors")
        assert all(bool(weight.isfinite().all()) for weight in weights.values())


def test_the_command_reports_and_its_exit_code_says_whether_to_train(
    data: tuple[Path, dict[str, Reason]], tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, reasons = data
    recipe = write_recipe(tmp_path / "r.yaml", tiny_checkpoint, recipe_of(folder, "dirty.jsonl"), tmp_path / "out")
    listed = tmp_path / "all.jsonl"
    assert main(["data", "check", str(recipe), "--json", "--list", str(listed)]) == 0
    (found,) = json.loads(capsys.readouterr().out)["sets"]
    count = len(reasons) + 2
    assert (found["stages"], found["records"], found["trained_on"]) == (["sft"], GOOD + 6 + count, GOOD + 6)
    assert sum(found["left_out"].values()) == count == len(listed.read_text().splitlines())
    encoder, _ = model_inputs(load_vlm(tiny_checkpoint), 120)
    clean = json.loads((folder / "clean.json").read_text())
    samples = [encoder.encode(to_messages(record)) for record in clean]
    assert found["tokens"]["all"] == sum(len(ids) for ids, _ in samples)
    assert found["tokens"]["supervised"] == sum(label != IGNORED for _, labels in samples for label in labels)
    assert sum(row["records"] for row in found["tokens"]["histogram"]) == GOOD + 6
    assert main(["data", "check", str(recipe), "--max-broken", "0.1"]) == 1
    out = capsys.readouterr().out
    assert "not trainable: " in out
    assert "picture missing" in out
    assert main(["data", "check", str(folder / "clean.json"), "--pictures", str(folder / "pictures")]) == 0
    assert "tokens are not counted: records alone name no model" in capsys.readouterr().out
    assert main(["data", "check", str(tmp_path / "none.json")]) == 2


def test_truncated_conversations_and_the_histogram_are_counted(
    data: tuple[Path, dict[str, Reason]], tiny_checkpoint: Path
) -> None:
    whole, _ = model_inputs(load_vlm(tiny_checkpoint))
    clean = json.loads((data[0] / "clean.json").read_text())
    lengths = [len(whole.encode(to_messages(record))[0]) for record in clean]
    cut = max(lengths) - 2
    encoder, _ = model_inputs(load_vlm(tiny_checkpoint), cut)
    found = report(check_data(recipe_of(data[0], "clean.json", max_length=cut), encoder, None), cut)
    kept = [length for record, length in zip(clean, lengths, strict=True) if encoder.measure(to_messages(record))[1]]
    tokens = found["tokens"]
    assert tokens["truncated"] == sum(length > cut for length in kept) > 0
    for row in tokens["histogram"]:
        last = row["to"] or max(lengths)
        assert row["records"] == sum(row["from"] <= length <= last for length in kept)
    assert "lose their end" in "\n".join(lines(found))


SINGLE, LETTER = "Answer the question using a single word or phrase.", "Answer with the option's letter from the given "


@pytest.mark.parametrize(
    ("image", "question", "source"),
    [
        ("00453/004539375.jpg", "Describe it.", LCS),
        ("coco/train2017/1.jpg", "How many?\n" + SINGLE, VQA),
        ("coco/train2017/1.jpg", LETTER + "choices directly.", A_OKVQA),
        ("coco/train2017/1.jpg", "Please provide a short description for this region: [0, 0, 1, 1].", REFCOCO),
        ("coco/train2017/1.jpg", "What is unusual here?", LLAVA),
        ("gqa/images/1.jpg", "Which?\n" + SINGLE, GQA),
        ("ocr_vqa/images/1.jpg", "Who wrote it?\n" + SINGLE, OCRVQA),
        ("textvqa/train_images/1.jpg", "Provide a one-sentence caption for the provided image.", TEXTCAPS),
        ("vg/VG_100K/1.jpg", "Please provide a short description for this region: [0, 0, 1, 1].", VG),
        (None, "Write a poem.", SHAREGPT),
        ("train/1.png", "What?", OTHER),
    ],
)
def test_a_record_tells_its_source(image: str | None, question: str, source: Source) -> None:
    assert source_of({"image": image, "conversations": turns("x", question)}) is source


def test_sources_are_those_of_table_1() -> None:
    assert (
        sum(source.table_thousands or 0 for source in SOURCES) == 558 + 83 + 72 + 9 + 50 + 80 + 22 + 30 + 86 + 158 + 40
    )
