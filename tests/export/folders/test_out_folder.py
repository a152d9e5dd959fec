"""Where a folder is made: refused before the work, whole at its end, and nothing left of a work that ends early."""

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from switchkd.cli.main import main
from switchkd.export.folders.out_folder import LOCK, making

# Makes a folder and tells what it renames; with a word it waits in the middle of its work.
MAKER = """
import signal, sys, time
from pathlib import Path
from switchkd.export.folders.out_folder import making
if "hang up" in sys.argv:  # where the tests run under nohup, which starts its processes with SIGHUP ignored
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
with making(Path(sys.argv[1]), ValueError, last="b") as made:
    for name in "abc":
        (made / name).write_text(name)
    print(made, flush=True)
    if len(sys.argv) > 2:
        time.sleep(600)
    sys.addaudithook(lambda event, args: print(args[1]) if event == "os.rename" else None)
"""


class Refused(ValueError):
    """What the caller of `making` says."""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def make(out: Path) -> None:
    with making(out, Refused, last="b") as made:
        assert not any(made.iterdir())
        (made / "a").write_text("a")
        (made / "b").mkdir()


@contextmanager
def at_work(out: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that is making `out` and does not come to an end."""
    process = subprocess.Popen([sys.executable, "-c", MAKER, str(out), "hang up"], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline().endswith("made\n")
    yield process
    process.kill()
    process.wait()


def test_a_new_folder_with_those_around_it(tmp_path: Path) -> None:
    make(tmp_path / "deep" / "out")
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")) == [
        "deep",
        "deep/out",
        "deep/out/a",
        "deep/out/b",
    ]


def test_an_empty_folder_stays_and_gets_the_content(tmp_path: Path) -> None:
    """It may be a mount point, which cannot be renamed, or the one place in its folder that can be written to."""
    out = tmp_path / "out"
    out.mkdir(mode=0o750)
    before, around = out.stat(), tmp_path.stat()
    make(out)
    after = out.stat()
    assert (after.st_ino, after.st_mode) == (before.st_ino, before.st_mode)
    assert tmp_path.stat().st_mtime_ns == around.st_mtime_ns
    assert names(out) == ["a", "b"]


def test_into_an_empty_folder_what_makes_it_whole_comes_last(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", MAKER, str(tmp_path)], capture_output=True, text=True, check=True)
    renamed = [Path(line).name for line in done.stdout.splitlines()[1:]]
    assert (sorted(renamed), renamed[-1]) == (["a", "b", "c"], "b")


@pytest.mark.parametrize("there", [True, False])
def test_a_link_stays_and_is_followed(tmp_path: Path, there: bool) -> None:
    out, real = tmp_path / "out", tmp_path / "disk" / "real"
    real.parent.mkdir()
    if there:
        real.mkdir()
    out.symlink_to(real)
    make(out)
    assert out.readlink() == real
    assert names(real) == ["a", "b"]
    assert names(real.parent) == ["real"]
    assert names(tmp_path) == ["disk", "out"]


def test_the_folder_one_is_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make(Path())
    assert names(tmp_path) == ["a", "b"]


@pytest.mark.parametrize("there", [True, False])
def test_a_failure_leaves_nothing(tmp_path: Path, there: bool) -> None:
    out = tmp_path / "out"
    if there:
        out.mkdir()

    def fail() -> None:
        with making(out, Refused, last="b") as made:
            (made / "a").write_text("a")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert [path.name for path in tmp_path.rglob("*")] == (["out"] if there else [])


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("file", "exists already; remove it or choose another place"),
        ("full", "exists already"),
        ("loop", "exists already"),
        ("file/out", r"cannot be made \(.+\); choose another place"),
        ("a" * 250, r"cannot be made \(File name too long\)"),
        ("full/out", "lies inside the checkpoint"),
        pytest.param(
            "/proc/out", r"cannot be made \(", marks=pytest.mark.skipif(sys.platform != "linux", reason="no /proc")
        ),
    ],
)
def test_places_that_are_refused(tmp_path: Path, name: str, reason: str) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("x")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    before = sorted(tmp_path.rglob("*"))
    apart_from = tmp_path / "full" if "inside" in reason else None
    with (
        pytest.raises(Refused, match=reason) as caught,
        making(tmp_path / name, Refused, last="b", apart_from=apart_from),
    ):
        pytest.fail("the work began")
    assert str(tmp_path / name) in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "words",
    [["export"], ["export", "--format", "bitsandbytes"], ["import", "tinyllava"]],
    ids=["bundle", "bitsandbytes", "import"],
)
def test_every_command_tells_it_before_it_looks_at_the_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    (tmp_path / "file").write_text("x")
    assert main([*words, str(tmp_path / "no checkpoint"), str(tmp_path / "file" / "out")]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("switchkd: error: ")]
    assert "out: cannot be made (" in line


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_leaves_nothing(tmp_path: Path, number: signal.Signals) -> None:
    with at_work(tmp_path / "out") as process:
        process.send_signal(number)
        code = process.wait(timeout=60)
    assert code == (-number if number == signal.SIGINT else 128 + number)
    assert names(tmp_path) == []


def test_an_ignored_signal_stays_ignored(tmp_path: Path) -> None:
    code = "import signal, sys; signal.signal(signal.SIGHUP, signal.SIG_IGN)" + MAKER.replace(
        "        time.sleep(600)", "        signal.raise_signal(signal.SIGHUP)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "out"), "go on"], check=True)  # as nohup starts it
    assert names(tmp_path / "out") == ["a", "b", "c"]


@pytest.mark.parametrize("there", [True, False])
def test_what_a_killed_one_left_is_removed_and_what_is_alive_or_foreign_is_not(tmp_path: Path, there: bool) -> None:
    out = tmp_path / "out"
    if there:
        out.mkdir()
    foreign = tmp_path / ".out.partial-mine"
    foreign.mkdir()
    with at_work(out) as process:
        with pytest.raises(Refused, match="another process is making it just now; wait for it"):
            make(out)
        make(tmp_path / "other")  # its own matter
        process.kill()
        process.wait()
        left = list(tmp_path.rglob(LOCK))
        assert len(left) == 1
        assert (left[0].parent / "made" / "a").exists()
        make(out)
    assert not list(tmp_path.rglob(LOCK))
    assert names(out) == ["a", "b"]
    assert foreign.is_dir()


def test_an_export_that_is_ended_leaves_nothing(tiny_checkpoint: Path, tmp_path: Path) -> None:
    words = ["-m", "switchkd.cli.main", "export", str(tiny_checkpoint), str(tmp_path / "out")]
    process = subprocess.Popen([sys.executable, *words], stderr=subprocess.DEVNULL)
    while not list(tmp_path.glob(".out.partial-*/made/onnx")):
        assert process.poll() is None
        time.sleep(0.05)
    process.terminate()
    assert process.wait(timeout=120) == 128 + signal.SIGTERM
    assert names(tmp_path) == []
