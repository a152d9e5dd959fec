"""`switchkd ask` as a person meets it: any picture, streamed answers, one clear line for every mistake, no torch."""

import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from switchkd.cli.main import main
from switchkd.serve import Engine

QUESTION = "What colour is the square on the left?"
FORMATS = ["png", "jpg", "webp", "gif", "tiff", "bmp", "ppm", "tga", "ico", "avif", "jp2"]
MODES = ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"]

# Runs the real command where nothing can be imported but Python's own modules and the five packages that answer.
ALONE = """
import sys
from importlib.machinery import PathFinder
class OnlyServe:
    serve = {"switchkd", "onnxruntime", "tokenizers", "PIL", "numpy", "jinja2", "markupsafe"}
    def find_spec(self, name: str, path=None, target=None) -> None:
        if name.partition(".")[0] not in self.serve | sys.stdlib_module_names:
            raise ModuleNotFoundError(f"No module named {name!r} (blocked)", name=name)
sys.meta_path.insert(0, OnlyServe())
from switchkd.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


def ask_alone(folder: Path, *words: str | Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"}
    command = [sys.executable, "-c", ALONE, "ask", *map(str, words)]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def png(pictures: list[Image.Image], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "a picture.png"
    pictures[0].save(path)
    return path


@pytest.fixture
def own_bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A copy of the bundle that the test may break."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "own"))


def test_answers_without_torch_and_anything_else_beyond_serve(tiny_bundle: Path, png: Path, tmp_path: Path) -> None:
    expected = Engine.open(tiny_bundle, "fp32").answer(QUESTION, [png], max_new_tokens=20).text
    done = ask_alone(tmp_path, tiny_bundle, png, QUESTION, "--precision", "fp32", "--max-new-tokens", "20")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == expected + "\n"


def test_a_mistake_without_torch_is_one_line_and_exit_code_2(tiny_bundle: Path, tmp_path: Path) -> None:
    done = ask_alone(tmp_path, tiny_bundle, "nowhere.png", QUESTION)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "switchkd: error: nowhere.png: no such file; check the path\n"


def test_a_bundle_answers_wherever_it_lies_and_is_left_as_it_is(
    tiny_bundle: Path, hub_snapshot: Path, png: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    named = Path(shutil.copytree(tiny_bundle, tmp_path / "Bündel für zwölf 模型"))
    behind = tmp_path / "link"
    behind.symlink_to(named)

    def state() -> list[tuple[Path, int]]:
        files = [file for folder in (named, hub_snapshot.parents[1]) for file in (folder, *folder.rglob("*"))]
        return sorted((file, file.stat().st_mtime_ns) for file in files)

    before, answers = state(), set()
    for place in (tiny_bundle, hub_snapshot, named, behind):
        assert main(["ask", str(place), str(png), QUESTION, "--max-new-tokens", "8"]) == 0
        answers.add(capsys.readouterr().out)
    assert len(answers) == 1
    assert main(["verify", str(hub_snapshot)]) == 0
    assert state() == before  # so a disk that is only read will do


def test_tokens_are_printed_as_they_come(tiny_bundle: Path, png: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []

    class Terminal(io.StringIO):
        def flush(self) -> None:
            written.append(self.getvalue())

    monkeypatch.setattr(sys, "stdout", Terminal())
    assert main(["ask", str(tiny_bundle), str(png), QUESTION, "--max-new-tokens", "12"]) == 0
    assert len(set(written)) > 3


def test_json_says_everything(tiny_bundle: Path, png: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--json", "--precision", "int8", "--max-new-tokens", "5", "--temperature", "2", "--seed", "3", "--threads"]
    words = ["--top-k", "9", *words]
    assert main(["ask", str(tiny_bundle), str(png), QUESTION, *words, "1"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert set(said) == {"text", "tokens", "prompt_tokens", "finish_reason", "seconds", "precision"}
    assert said["precision"] == "int8"
    assert len(said["tokens"]) == 5
    assert said["finish_reason"] == "length"
    assert set(said["seconds"]) == {"encode", "prefill", "decode"}
    assert min(said["seconds"].values()) > 0


def test_json_is_json_on_a_narrow_terminal(tiny_bundle: Path, png: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = Engine.open(tiny_bundle, "fp32").answer(QUESTION, [png], max_new_tokens=20).text
    assert not answer.isascii()
    file = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(file, encoding="ascii"))
    assert main(["ask", str(tiny_bundle), str(png), QUESTION, "--json", "--max-new-tokens", "20"]) == 0
    assert json.loads(file.getvalue())["text"] == answer


def test_a_question_in_utf8_is_understood_where_the_locale_is_ascii(
    tiny_bundle: Path, png: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Python hands over the bytes that it cannot read as characters one by one."""
    answers = []
    for question in ("Farbe für Bär", "Farbe für Bär".encode().decode("ascii", "surrogateescape")):
        assert main(["ask", str(tiny_bundle), str(png), question, "--max-new-tokens", "8"]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1]


def test_timing_is_told_when_asked_for_and_never_into_a_pipe(
    tiny_bundle: Path, png: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["ask", str(tiny_bundle), str(png), QUESTION, "--max-new-tokens", "3"]
    assert main(words) == 0
    assert capsys.readouterr().err == ""
    assert main([*words, "--timing"]) == 0
    line = capsys.readouterr().err
    assert line.startswith("(picture ")
    assert "3 tokens at" in line
    assert line.endswith("cut off at the limit)\n")


@pytest.mark.parametrize("suffix", FORMATS)
def test_every_format_is_answered(
    tiny_bundle: Path, pictures: list[Image.Image], tmp_path: Path, capsys: pytest.CaptureFixture[str], suffix: str
) -> None:
    path = tmp_path / f"picture.{suffix}"
    pictures[1].save(path)
    assert main(["ask", str(tiny_bundle), str(path), QUESTION, "--max-new-tokens", "2"]) == 0
    assert capsys.readouterr().out.endswith("\n")


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_is_answered(
    tiny_bundle: Path, pictures: list[Image.Image], tmp_path: Path, capsys: pytest.CaptureFixture[str], mode: str
) -> None:
    path = tmp_path / "picture.tiff"
    if mode == "I;16":
        Image.fromarray(np.asarray(pictures[1].convert("L")).astype(np.uint16) * 257).save(path)
    else:
        pictures[1].convert(mode).save(path)
    assert main(["ask", str(tiny_bundle), str(path), QUESTION, "--max-new-tokens", "2"]) == 0
    assert capsys.readouterr().out.endswith("\n")


def test_a_picture_lying_on_its_side_is_turned(
    tiny_bundle: Path, pictures: list[Image.Image], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    upright, turned = tmp_path / "upright.png", tmp_path / "turned.png"
    pictures[2].save(upright)
    note = Image.Exif()
    note[0x0112] = 6  # to be turned by 90 degrees clockwise
    pictures[2].transpose(Image.Transpose.ROTATE_90).save(turned, exif=note)
    answers = []
    for path in (upright, turned):
        assert main(["ask", str(tiny_bundle), str(path), QUESTION, "--max-new-tokens", "16"]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1]


def fails(capsys: pytest.CaptureFixture[str], *words: str | Path) -> str:
    """Run the command, check that it ends with exit code 2 and one line, and return the line."""
    assert main(["ask", *map(str, words)]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("switchkd: error: ")
    assert said.err.count("\n") == 1
    return said.err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a picture"),
        (b"Dear diary, today I trained a model.", "not a picture"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a picture"),
        (b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR", "."),
    ],
)
def test_what_is_no_picture_is_refused(
    tiny_bundle: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    content: bytes,
    message: str,
) -> None:
    path = tmp_path / "thing.png"
    path.write_bytes(content)
    line = fails(capsys, tiny_bundle, path, QUESTION)
    assert str(path) in line
    assert message in line


def test_half_a_picture_a_folder_and_nothing_are_refused(
    tiny_bundle: Path, png: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    half = tmp_path / "half.png"
    half.write_bytes(png.read_bytes()[: png.stat().st_size // 2])
    assert f"{half}: damaged" in fails(capsys, tiny_bundle, half, QUESTION)
    assert f"{tmp_path}: is a folder" in fails(capsys, tiny_bundle, tmp_path, QUESTION)
    assert "nowhere.png: no such file" in fails(capsys, tiny_bundle, tmp_path / "nowhere.png", QUESTION)


def damage(path: Path) -> None:
    """Change a file's content but not its size, so that only reading it can tell."""
    path.write_bytes(b"\xff" * path.stat().st_size)


@pytest.mark.parametrize(
    ("name", "harm", "message"),
    [
        ("manifest.json", Path.unlink, "this is a checkpoint"),
        ("manifest.json", damage, "manifest.json: cannot be read"),
        ("onnx/decoder_model_merged.onnx", Path.unlink, "decoder_model_merged.onnx: missing"),
        ("onnx/embed_tokens.onnx", lambda path: path.write_bytes(path.read_bytes()[:-1]), "the manifest says"),
        ("onnx/vision_encoder.onnx", damage, "vision_encoder.onnx: not an ONNX graph"),
        ("tokenizer.json", damage, "tokenizer.json: no tokenizer"),
        ("chat_template.jinja", damage, "chat_template.jinja: cannot be read"),
    ],
)
def test_a_broken_bundle_is_refused(
    own_bundle: Path,
    png: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    harm: Callable[[Path], object],
    message: str,
) -> None:
    harm(own_bundle / name)
    line = fails(capsys, own_bundle, png, QUESTION, "--precision", "fp32")
    assert str(own_bundle / name) in line
    assert message in line


def test_a_missing_bundle_is_refused(png: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no such folder" in fails(capsys, tmp_path / "nowhere", png, QUESTION)
    assert "is a file" in fails(capsys, png, png, QUESTION)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([""], "the question is empty"),
        ([QUESTION, "--precision", "q4"], "'q4'"),
        ([QUESTION, "--temperature", "-1"], "temperature is -1.0"),
        ([QUESTION, "--max-new-tokens", "0"], "max_new_tokens is 0"),
        (["a " * 600], "ask with less text"),
        ([os.fsdecode("Bär".encode("latin-1"))], "character 2 is none (U+DCE4): the text came in another encoding"),
    ],
)
def test_what_cannot_be_asked_is_refused(
    tiny_bundle: Path, png: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert message in fails(capsys, tiny_bundle, png, *words)
