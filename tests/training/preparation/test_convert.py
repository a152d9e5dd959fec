"""Other formats become LLaVA JSON: every format's own record, tables with pictures in them, all of it or nothing."""

import base64
import io
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from switchkd.cli.main import main
from switchkd.training.data.conversations import Reason

ASKED = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "Red."}]
TEXT = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "Red."}]
OPENAI = [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "Red."}]


def png(colour: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (20, 10), colour).save(file, "PNG")
    return file.getvalue()


def said(*texts: str) -> list[dict[str, str]]:
    return [{"from": "gpt" if number % 2 else "human", "value": text} for number, text in enumerate(texts)]


def uri(colour: str) -> str:
    return "data:image/png;base64," + base64.b64encode(png(colour)).decode()


PARTS = [{"type": "text", "text": "What?"}, {"type": "image_url", "image_url": {"url": "file:///data/a.png"}}]
RECORDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "LLaVA": ({"id": 7, "image": "a.png", "conversations": ASKED, "model": "m"}, {"id": 7, "model": "m"}),
    "ShareGPT of LLaMA-Factory": ({"conversations": ASKED, "images": ["a.png"], "tools": ""}, {}),
    "with a system": ({"conversations": ASKED, "image": "a.png", "system": "Be brief."}, {"system": "Be brief."}),
    "OpenAI": (
        {"messages": [{"role": "developer", "content": "Be brief."}, *OPENAI], "images": ["a.png"]},
        {"conversations": [{"from": "system", "value": "Be brief."}, said("<image>What?")[0], ASKED[1]]},
    ),
    "OpenAI in parts": (
        {"messages": [{"role": "user", "content": PARTS}, {"role": "assistant", "content": "Red.", "weight": 1}]},
        {"image": "/data/a.png"},
    ),
    "TRL": (
        {
            "messages": [
                {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "What?"}]},
                {"role": "assistant", "content": [{"type": "text", "text": "Red.", "index": None}]},
            ],
            "images": [{"path": "a.png", "bytes": None}],
        },
        {},
    ),
    "TRL in two": (
        {"prompt": OPENAI[:1], "completion": OPENAI[1:]} | {"image": "a.png"},
        {"conversations": said("<image>What?", "Red.")},
    ),
    "ms-swift": ({"messages": [OPENAI[0] | {"content": "What?"}, OPENAI[1]], "images": ["a.png"]}, {}),
    "ms-swift's older": (
        {"query": "And?", "response": "12", "history": [["What?", "Red."]], "images": ["a.png"]},
        {"conversations": said("<image>\nWhat?", "Red.", "And?", "12")},
    ),
    "Alpaca": (
        {
            "instruction": "<image>What?",
            "input": "Be brief.",
            "output": "Red.",
            "system": "Be kind.",
            "images": ["a.png"],
        },
        {"conversations": said("<image>What?\nBe brief.", "Red."), "system": "Be kind."},
    ),
    "The Cauldron": (
        {
            "texts": [{"user": "What?", "assistant": "Red.", "source": "x"}, {"user": "And?", "assistant": "12"}],
            "images": ["a.png"],
        },
        {"conversations": said("<image>\nWhat?", "Red.", "And?", "12")},
    ),
    "columns": ({"conversations": {"from": ["human", "gpt"], "value": ["What?", "Red."]}, "image": "a.png"}, {}),
    "question and answer": (
        {"question": "What?", "answer": "Red.", "image_path": "a.png", "question_id": 3},
        {"question_id": 3},
    ),
}


@pytest.mark.parametrize("kind", RECORDS)
def test_a_record_of_each_format_becomes_llavas(kind: str, tmp_path: Path) -> None:
    given, changes = RECORDS[kind]
    (tmp_path / "a.jsonl").write_text(json.dumps(given) + "\n")
    assert main(["data", "convert", str(tmp_path / "a.jsonl"), "--out", str(tmp_path / "out.json")]) == 0
    (record,) = json.loads((tmp_path / "out.json").read_text())
    assert record == {"id": "a-0", "image": "a.png", "conversations": ASKED} | changes
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "out.json"]


REFUSED: dict[str, tuple[dict[str, Any], Reason, str]] = {
    "tools": ({"messages": OPENAI, "images": ["a"], "tools": "[{}]"}, Reason.KEY, "content under tools"),
    "tool calls": ({"messages": [*OPENAI, {"role": "assistant", "tool_calls": [1]}]}, Reason.KEY, "under tool_calls"),
    "a tool's turn": ({"messages": [*OPENAI, {"role": "tool", "content": "3"}]}, Reason.SPEAKER, "'tool'"),
    "video": ({"messages": OPENAI, "videos": ["a.mp4"]}, Reason.KEY, "content under videos"),
    "boxes": ({"messages": OPENAI, "images": ["a"], "objects": {"bbox": [[1]]}}, Reason.KEY, "under objects"),
    "a part of sound": (
        {"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]},
        Reason.KEY,
        "input_audio",
    ),
    "preference": ({"conversations": TEXT, "chosen": TEXT[1], "rejected": TEXT[1]}, Reason.KEY, "chosen, rejected"),
    "unlearned": ({"messages": [OPENAI[0], OPENAI[1] | {"weight": 0}], "images": ["a"]}, Reason.KEY, "under weight"),
    "two pictures": ({"messages": OPENAI, "images": ["a.png", "b.png"]}, Reason.SEVERAL, "names 2 pictures"),
    "an address": ({"messages": OPENAI, "images": ["https://x/a.png"]}, Reason.MISSING, "download the pictures"),
    "no picture": ({"messages": OPENAI}, Reason.PLACEHOLDERS, "1 <image> placeholders for 0 pictures"),
    "no base64": ({"messages": OPENAI, "images": ["data:image/png;base64,?"]}, Reason.UNREADABLE, "base64"),
    "no picture's bytes": ({"messages": OPENAI, "images": ["data:image/png;base64,aGk="]}, Reason.UNREADABLE, ""),
    "captions alone": ({"image": "a.png", "caption": "Red."}, Reason.CONVERSATION, "keys (image, caption)"),
    "no answer": ({"instruction": "What?", "output": "Red.", "history": "x"}, Reason.CONVERSATION, "history holds"),
}


def test_what_has_no_place_is_refused_counted_and_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [row for row, _, _ in REFUSED.values()]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, [*rows, {"conversations": TEXT}])) + "\n{broken\n")
    out = tmp_path / "sub" / "out.jsonl"
    command = ["data", "convert", str(tmp_path / "a.jsonl"), "--out", str(out)]
    assert main(command) == 1
    assert json.loads(out.read_text()) == {"id": f"a-{len(rows)}", "conversations": TEXT}
    listed = [json.loads(line) for line in (out.parent / "out.refused.jsonl").read_text().splitlines()]
    for number, (found, (_, reason, words)) in enumerate(zip(listed, REFUSED.values(), strict=False)):
        assert (found["record"], found["reason"]) == (f"a-{number}", reason)
        assert words in found["detail"]
    assert (len(listed), listed[-1]["reason"]) == (len(rows) + 1, Reason.NOT_A_RECORD)
    printed = capsys.readouterr().out
    assert f"{len(listed)} refused ({100 * len(listed) / (len(listed) + 1):.4g} %): content under a key" in printed
    # Nothing is overwritten, and a second command changes nothing.
    assert main(command) == 2
    assert f"{out} exists, and nothing is overwritten" in capsys.readouterr().err
    assert main([*command[:-1], str(tmp_path / "more.json"), "--max-broken", "1"]) == 0


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same two records as a table of each kind, the pictures inside."""
    folder = tmp_path_factory.mktemp("tables")
    rows = [
        {"image": {"bytes": png(colour), "path": None}, "conversations": TEXT, "data_source": colour, "video": None}
        for colour in ("red", "blue")
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "plain.parquet")
    turn = {"from": datasets.Value("string"), "value": datasets.Value("string")}
    text = datasets.Value("string")
    kinds = datasets.Features({"image": datasets.Image(), "conversations": [turn], "data_source": text, "video": text})
    table = datasets.Dataset.from_list(rows, features=kinds)
    table.to_parquet(folder / "typed.parquet")
    table.save_to_disk(folder / "saved")
    datasets.DatasetDict({"train": table}).save_to_disk(folder / "splits")
    (folder / "shards").mkdir()
    for number in range(2):
        table.select([number]).to_parquet(folder / "shards" / f"{number}.parquet")
    return folder


@pytest.mark.parametrize("name", ["plain.parquet", "typed.parquet", "saved", "splits", "shards"])
def test_tables_give_records_and_their_pictures_as_files(
    name: str, tables: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, pictures = tmp_path / "train.json", tmp_path / "train-pictures"
    (tmp_path / ".train.json.partial").write_text("of a run that was killed")
    assert main(["data", "convert", str(tables / name), "--out", str(out)]) == 0
    assert f"{out}: 2 records, 2 pictures in {pictures}" in capsys.readouterr().out
    records = json.loads(out.read_text())
    assert [record["data_source"] for record in records] == ["red", "blue"]
    assert all(record["conversations"] == ASKED for record in records)
    assert [(pictures / record["image"]).read_bytes() for record in records] == [png("red"), png("blue")]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["train-pictures", "train.json"]
    assert main(["data", "check", str(out), "--pictures", str(pictures), "--max-broken", "0"]) == 0


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ("cut.parquet", "cut.parquet: cannot be read: "),
        ("gone.parquet", "gone.parquet: there is no such file"),
        ("gone.json", "gone.json: there is no such file"),
        ("notes.txt", "notes.txt: neither a file of .json, .jsonl, .parquet"),
        ("empty", "empty: holds no .parquet files"),
    ],
)
def test_a_conversion_that_ends_in_the_middle_leaves_nothing(
    bad: str, reason: str, tables: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "cut.parquet").write_bytes((tables / "plain.parquet").read_bytes()[:-30])
    (tmp_path / "notes.txt").write_text("?")
    (tmp_path / "empty").mkdir()
    out = tmp_path / "out" / "train.json"
    sources = [str(tables / "plain.parquet"), str(tmp_path / bad)]
    assert main(["data", "convert", *sources, "--out", str(out)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"switchkd: error: {tmp_path}/{reason}")
    assert list(out.parent.iterdir()) == []


def test_pictures_inside_of_json_become_files_too(tmp_path: Path) -> None:
    rows = [{"messages": OPENAI, "images": [uri(colour)]} for colour in ("red", "blue")]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "mine").mkdir()
    command = ["data", "convert", str(tmp_path / "a.json"), "--out", str(tmp_path / "out.json"), "--pictures"]
    assert main([*command, str(tmp_path / "mine")]) == 2  # a folder of somebody's, not ours to fill
    assert main([*command, str(tmp_path / "new")]) == 0
    records = json.loads((tmp_path / "out.json").read_text())
    assert [(tmp_path / "new" / record["image"]).read_bytes() for record in records] == [png("red"), png("blue")]
