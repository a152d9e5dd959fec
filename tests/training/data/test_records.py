"""Record files of any size: each record is found by its place, whatever the windows cut, and read when asked for."""

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from switchkd.training.data import records as module
from switchkd.training.data.conversations import BrokenRecord, DataError
from switchkd.training.data.records import digest, read_records

TEXTS = ["plain", 'quoted \\" \\\\ [ ] { } ,', "日本語 😀 é", "line\nbreak\ttab", "", "x" * 700]
ROWS: list[dict[str, Any]] = [{"id": number, "turns": [{"value": text}, [], {}]} for number, text in enumerate(TEXTS)]


@pytest.mark.parametrize("window", [1, 7, 64, 10**6])
@pytest.mark.parametrize(("ascii_only", "indent"), [(True, None), (False, 2), (False, None)])
def test_json_and_jsonl_read_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, window: int, ascii_only: bool, indent: int | None
) -> None:
    monkeypatch.setattr(module, "WINDOW", window)
    (tmp_path / "a.json").write_text(json.dumps(ROWS, ensure_ascii=ascii_only, indent=indent), encoding="utf-8")
    lines = [json.dumps(row, ensure_ascii=ascii_only) for row in ROWS]
    (tmp_path / "a.jsonl").write_text("\n".join([lines[0], "", *lines[1:]]), encoding="utf-8-sig")
    assert list(read_records(tmp_path / "a.json")) == ROWS
    assert list(read_records(tmp_path / "a.jsonl")) == ROWS
    both = read_records(tmp_path / "a.jsonl", tmp_path / "a.json")
    assert [both[number]["id"] for number in range(len(both))] == [*range(len(TEXTS))] * 2
    assert list(both.only(np.array([7, 2]))) == [ROWS[1], ROWS[2]]
    assert list(both[4:6]) == ROWS[4:6]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[{", "not valid JSON in the record at byte 1"),
        ('[{"a": 1}, {"b": nope}]', "not valid JSON in the record at byte 11"),
        ('[{"a": 1}', "cut off"),
        ("[]", "no records"),
        ("\n \n", "no records"),
        (None, "no such file"),
    ],
)
def test_unreadable_files_say_why(tmp_path: Path, text: str | None, reason: str) -> None:
    path = tmp_path / "broken.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(DataError, match=f"broken.json: .*{reason}"):
        read_records(path)


@pytest.mark.parametrize("line", [b"{", b'"text"', b"[1]", b'{"a": "\xff"}', b"[" * 100_000])
def test_a_line_that_is_no_record_is_told_by_its_place(tmp_path: Path, line: bytes) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"id": 1}\n' + line + b'\n{"id": 2}\n')
    found = read_records(tmp_path / "a.jsonl")
    assert (found[0], found[2]) == ({"id": 1}, {"id": 2})
    with pytest.raises(BrokenRecord, match=r"a\.jsonl at byte 10"):
        found[1]


def test_the_digest_is_of_what_is_in_the_files(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("1")
    (tmp_path / "b").write_text("1")
    assert digest([tmp_path / "a"]) == digest([tmp_path / "b"])
    (tmp_path / "b").write_text("2")
    assert digest([tmp_path / "a"]) != digest([tmp_path / "b"])


@pytest.mark.parametrize("window", [1, 7, 10**6])
@pytest.mark.parametrize("mark", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("indent", [None, 1])
def test_what_follows_the_first_list_is_read_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, window: int, mark: str, indent: int | None
) -> None:
    monkeypatch.setattr(module, "WINDOW", window)
    a_list = json.dumps(ROWS, ensure_ascii=False, indent=indent).encode(mark)
    lines = "\n".join(json.dumps(row) for row in ROWS).encode(mark)
    path = tmp_path / "both.json"
    for parts in ([a_list, a_list], [a_list, b"\n", lines, b"\n"], [a_list, b" [] ", a_list, b"\n\n", a_list]):
        path.write_bytes(b"".join(parts))
        assert list(read_records(path)) == ROWS * sum(len(part) > 9 for part in parts)
    path.write_bytes(lines + b"\n" + lines + b"\n")
    assert list(read_records(path)) == ROWS * 2


@pytest.mark.parametrize("rest", [b"]", b"garbage", b'"text"', b"\0\0", b"7", b'[{"id": 3}', b'{"id": '])
def test_what_follows_and_is_no_record_is_refused_by_its_byte(tmp_path: Path, rest: bytes) -> None:
    (tmp_path / "a.json").write_bytes(b'[{"id": 1}]\n' + rest)
    with pytest.raises(DataError, match=r"a\.json: .*byte (12|13|22)\b"):
        read_records(tmp_path / "a.json")


@pytest.mark.parametrize("indent", [None, 1])
def test_a_list_behind_lines_is_refused_by_its_byte(tmp_path: Path, indent: int | None) -> None:
    (tmp_path / "a.jsonl").write_text('{"id": 1}\n' + json.dumps(ROWS, indent=indent))
    with pytest.raises(
        DataError, match=r"a\.jsonl: a list of records begins at byte 10, in a file with a record a line"
    ):
        read_records(tmp_path / "a.jsonl")


@pytest.mark.parametrize(
    ("beginning", "reason"),
    [
        (b"PAR1\x15\x04", "a Parquet file, .*switchkd data convert .*a.json --out FILE.json"),
        (gzip.compress(b"[]", mtime=0), "compressed by gzip, .*gunzip -k .*a.json"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a pointer of Git LFS"),
    ],
)
def test_files_that_are_no_text_name_the_way_out(tmp_path: Path, beginning: bytes, reason: str) -> None:
    (tmp_path / "a.json").write_bytes(beginning)
    with pytest.raises(DataError, match=f"a.json: {reason}"):
        read_records(tmp_path / "a.json")
