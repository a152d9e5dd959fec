"""`switchkd bench` on a tiny bundle: every stage of every contender, in turns, and what is said where one fails."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from switchkd.cli.main import main
from switchkd.serve.bench.protocol import STAGES

# A contender of somebody else's: prints other things too, and tells only what it can tell apart.
RIVAL = """
import sys
from pathlib import Path
from switchkd.serve.bench.protocol import requests
print("a library says hello")
for request, answered in requests(0.5, {"version": "1.0"}):
    assert Path(request["picture"]).is_file() and request["question"] and request["tokens"] == 3
    if len(sys.argv) > 1:
        sys.exit("out of memory")
    answered({"first_token": 2.0, "token": 0.25, "whole": 2.5, "tokens": 3})
"""


@pytest.fixture
def rival(tmp_path: Path) -> str:
    file = tmp_path / "rival.py"
    file.write_text(RIVAL, encoding="utf-8")
    return f"{sys.executable} {file}"


def bench(*words: str) -> int:
    return main(["bench", *words])


def test_every_stage_is_measured(
    tiny_bundle: Path, rival: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "report.json"
    words = ["--precision", "all", "--threads", "1", "--rounds", "2", "--tokens", "3", "--against", f"rival={rival}"]
    assert bench(str(tiny_bundle), *words, "--json", str(file)) == 0
    report: dict[str, Any] = json.loads(file.read_text())
    assert list(report["contenders"]) == ["switchkd fp32", "switchkd int8", "rival"]
    for name in ("switchkd fp32", "switchkd int8"):
        found = report["contenders"][name]
        rounds = found["rounds"]
        assert {len(values) for values in rounds.values()} == {2}
        assert found["load"] > 0
        assert found["peak"] > 10
        assert found["prompt_tokens"] > 40
        assert found["about"]["precision"] == name.split()[1]
        for number in range(2):
            taken = {stage: rounds[stage][number] for stage in STAGES}
            assert all(seconds > 0 for seconds in taken.values())
            assert taken["first_token"] == pytest.approx(taken["preprocess"] + taken["encode"] + taken["prefill"])
            assert taken["whole"] >= taken["first_token"] + 2 * taken["token"]
            assert rounds["tokens"][number] == 3
            assert rounds["second"][number] > 0
    assert report["contenders"]["rival"]["rounds"]["first_token"] == [2.0, 2.0]
    text = capsys.readouterr().out
    (line,) = [line for line in text.splitlines() if line.startswith("rival ")]
    *cells, peak, tokens = line.split()
    assert cells == ["rival", "0.50", "–", "–", "–", "2.00", "250.0", "2.50", "2.00"]
    assert int(peak) == round(report["contenders"]["rival"]["peak"])
    assert tokens == "3"
    assert report["machine"]["processor"] in text
    assert "1 threads on" in text


def test_a_contender_that_fails_is_named(
    tiny_bundle: Path, rival: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again = ["--tokens", "3", "--against"]
    assert bench(str(tiny_bundle), *again, f"rival={rival} dies") == 2
    assert "rival: ended without an answer (exit code 1)" in capsys.readouterr().err
    assert bench(str(tiny_bundle), *again, f"rival={tmp_path / 'nowhere'}") == 2
    assert f"rival: {tmp_path / 'nowhere'} cannot be started (No such file or directory)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--precision", "q3"], "holds no graphs in 'q3', only fp32, int8"),
        (["--against", "genai"], "--against is 'genai', expected NAME=COMMAND"),
        (["--rounds", "0"], "rounds is 0, expected 1 or more"),
        (["--threads", "2000"], "threads is 2000, expected 1 to 1024"),
    ],
)
def test_wrong_words_are_one_line(
    tiny_bundle: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    assert bench(str(tiny_bundle), *words) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_no_bundle_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench(str(tmp_path)) == 2
    assert "manifest.json" in capsys.readouterr().err
