"""`switchkd serve` before it serves: flags, the environment, mistakes in one line, and its page in the documents."""

from __future__ import annotations

import argparse
import json
import re
import shutil
import socket
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from switchkd.cli.main import main
from switchkd.serve import serve_command
from switchkd.serve.http import ServerSettings, served_models
from switchkd.serve.http.settings import flag, variable

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _no_variables_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for setting in fields(ServerSettings):
        monkeypatch.delenv(variable(setting), raising=False)


def resolved(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, object]:
    assert main(["serve", "some/bundle", *words, "--print-config"]) == 0
    shown: dict[str, object] = json.loads(capsys.readouterr().out)
    return shown


def mistake(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["serve", *words]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_the_defaults_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert resolved(capsys) == {
        "bundles": ["some/bundle"],
        "host": "127.0.0.1",
        "port": 8000,
        "precision": [],
        "threads": None,
        "no_prefill": False,
        "prefix_memory": 128,
        "prefix_folder": None,
        "parallel": 4,
        "queue": 128,
        "deadline": 300.0,
        "grace": 30.0,
        "api_key": None,
        "allow_without_key": False,
        "cors": [],
        "allow_remote_pictures": False,
        "max_body": 20,
        "max_pixels": 25.0,
        "max_pictures": 16,
        "log_level": "info",
    }


# A value of each setting as it is written, and as it is shown.
VALUES: dict[str, tuple[str, object]] = {
    "host": ("::1", "::1"),
    "port": ("8001", 8001),
    "precision": ("int8, fp32", ["int8", "fp32"]),
    "threads": ("2", 2),
    "no_prefill": ("true", True),
    "prefix_memory": ("64", 64),
    "prefix_folder": ("kept", "kept"),
    "parallel": ("7", 7),
    "queue": ("0", 0),
    "deadline": ("2.5", 2.5),
    "grace": ("0", 0.0),
    "api_key": ("a-secret", "***"),
    "allow_without_key": ("yes", True),
    "cors": ("https://a.example,https://b.example", ["https://a.example", "https://b.example"]),
    "allow_remote_pictures": ("1", True),
    "max_body": ("5", 5),
    "max_pixels": ("1.5", 1.5),
    "max_pictures": ("3", 3),
    "log_level": ("debug", "debug"),
}


def test_every_flag_is_a_variable_and_wins_over_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert set(VALUES) == {setting.name for setting in fields(ServerSettings)}
    for setting in fields(ServerSettings):
        written, shown = VALUES[setting.name]
        words = [flag(setting)] if isinstance(shown, bool) else [flag(setting), written]
        assert resolved(capsys, *words)[setting.name] == shown
        with monkeypatch.context() as context:
            context.setenv(variable(setting), written)
            assert resolved(capsys)[setting.name] == shown
    with monkeypatch.context() as context:
        context.setenv("SWITCHKD_SERVE_PORT", "1")
        context.setenv("SWITCHKD_SERVE_ALLOW_WITHOUT_KEY", "no")
        assert resolved(capsys, "--port", "2")["port"] == 2
        assert resolved(capsys)["allow_without_key"] is False
        assert resolved(capsys, "--allow-without-key")["allow_without_key"] is True


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--port", "many"], "--port is 'many', expected a whole number"),
        (["--port", "65536"], "--port is 65536, expected 0 to 65535"),
        (["--parallel", "0"], "--parallel is 0, expected 1 to 1024"),
        (["--threads", "0"], "--threads is 0, expected 1 to 1024"),
        (["--prefix-memory", "-1"], "--prefix-memory is -1, expected 0"),
        (["--queue", "-1"], "--queue is -1, expected 0"),
        (["--deadline", "nan"], "--deadline is nan, expected"),
        (["--grace", "soon"], "--grace is 'soon', expected a number"),
        (["--max-body", "0"], "--max-body is 0, expected 1"),
        (["--max-pixels", "100"], "--max-pixels is 100, expected"),
        (["--log-level", "loud"], "--log-level is 'loud', expected one of critical"),
        (["--api-key", ""], "--api-key is empty"),
        (["--api-key", "key-of-a-file\n"], "or holds spaces, line ends"),
        (["--cors", "page.example"], "--cors is 'page.example', expected an origin"),
        (["--host", "no-such-host.invalid"], "--host is no-such-host.invalid, which is unknown"),
        (["--host", "0.0.0.0"], "set SWITCHKD_SERVE_API_KEY"),
    ],
)
def test_a_wrong_setting_is_one_line(capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    assert message in mistake(capsys, "some/bundle", *words)


def test_a_wrong_variable_is_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWITCHKD_SERVE_ALLOW_REMOTE_PICTURES", "perhaps")
    error = mistake(capsys, "some/bundle")
    assert "SWITCHKD_SERVE_ALLOW_REMOTE_PICTURES is 'perhaps', expected true or false" in error


def test_a_wrong_bundle_is_one_line(capsys: pytest.CaptureFixture[str], tiny_bundle: Path, tmp_path: Path) -> None:
    assert "no-such-folder" in mistake(capsys, str(tmp_path / "no-such-folder"))
    assert "holds no graphs in 'q3', only fp32, int8" in mistake(capsys, str(tiny_bundle), "--precision", "q3")
    twin = tmp_path / tiny_bundle.name
    twin.symlink_to(tiny_bundle)
    error = mistake(capsys, str(tiny_bundle), f"{twin}/")
    assert f"{tiny_bundle} and {twin} have the same name" in error


def test_a_folder_that_is_called_as_anothers_precision_is_one_line(
    capsys: pytest.CaptureFixture[str], tiny_bundle: Path, tmp_path: Path
) -> None:
    other = tmp_path / f"{tiny_bundle.name}:int8"
    other.symlink_to(tiny_bundle)
    for order in ([tiny_bundle, other], [other, tiny_bundle]):
        error = mistake(capsys, *map(str, order), "--precision", "fp32,int8")
        assert f"{other} has the name of {tiny_bundle} in int8, bundle:int8; rename one" in error
    # Where the other precision is not served, the names are different ones.
    models = served_models([str(tiny_bundle), str(other)], ServerSettings(precision=("fp32",)))
    assert [*models.aliases] == ["bundle", "bundle:int8"]
    assert [*models.openings] == ["bundle:fp32", "bundle:int8:fp32"]


def test_a_bundle_that_the_engine_finds_wrong_is_one_line(tiny_bundle: Path, tmp_path: Path) -> None:
    """What its files hold is read by the engine's own process."""
    broken = tmp_path / "broken"
    shutil.copytree(tiny_bundle, broken)
    tokenizer = broken / "tokenizer.json"
    tokenizer.write_text("x" * tokenizer.stat().st_size)
    command = [
        sys.executable,
        "-m",
        "switchkd.cli.main",
        "serve",
        str(broken),
        "--port",
        "0",
        "--log-level",
        "critical",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("switchkd: error:")
    assert "tokenizer.json: no tokenizer" in done.stderr
    assert done.stderr.count("\n") == 1


def test_an_address_in_use_is_one_line(capsys: pytest.CaptureFixture[str], tiny_bundle: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert f"port {port} is in use" in mistake(capsys, str(tiny_bundle), "--port", port)


def test_asking_and_the_engine_need_none_of_the_server() -> None:
    """On a board without FastAPI; nor does the server need torch."""
    server = ("fastapi", "starlette", "pydantic", "uvicorn", "prometheus_client")
    others = ("torch", "transformers", "httpx", "openai", "gradio", "onnx")
    for blocked, module in ((server, "ask_command"), (server, "scheduling.engine_loop"), (others, "serve_command")):
        code = f"import sys\nfor name in {blocked!r}: sys.modules[name] = None\nimport switchkd.serve.{module}"
        subprocess.run([sys.executable, "-c", code], check=True)


def test_the_page_names_every_flag_with_its_default() -> None:
    text = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    rows = {row[0]: row[1].strip() for row in re.findall(r"^\| `(--[\w-]+)[^`|]*` \| ([^|]*) \|", text, re.MULTILINE)}
    parser = argparse.ArgumentParser()
    serve_command.add_arguments(parser)
    options = {option for action in parser._actions for option in action.option_strings if option.startswith("--")}
    assert set(rows) == options - {"--help"}
    for setting in fields(ServerSettings):
        default = setting.default
        shown = f"`{default:g}`" if isinstance(default, float) else f"`{default}`"
        assert rows[flag(setting)] == ("" if default in (None, (), False) else shown)
