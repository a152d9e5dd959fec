"""`switchkd push`: what may not be published is refused by name; what may reaches a hub, here one on this machine."""

import base64
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from switchkd.cli.main import main

CARD_TEXT = "---\nlicense: apache-2.0\n---\n\n# A tiny model\n\nServed at `/v1/chat/completions`; see https://example.org/a/b.\n"
REPO = "someone/tiny"


@pytest.fixture
def checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A checkpoint folder that may be published."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(tiny_checkpoint, folder)
    (folder / "README.md").write_text(CARD_TEXT)
    (folder / ".cache").mkdir()
    (folder / ".cache" / "state").write_text("hidden files stay")
    return folder


class Hub(ThreadingHTTPServer):
    """The few endpoints of the hub that an upload speaks to; `commits` holds what was uploaded."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.private: dict[str, bool] = {}
        self.commits: list[dict[str, bytes]] = []
        self.refusal: int | None = None
        self.address = f"http://127.0.0.1:{self.server_port}"


class _Answers(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        repo = self.path.removeprefix("/api/models/")
        found: dict[str, Any] = {"id": repo, "private": self.server.private.get(repo), "sha": "0" * 40, "siblings": []}
        self._answer(200 if repo in self.server.private else 404, found)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        path = self.path.partition("?")[0]
        if self.server.refusal is not None:
            return self._answer(self.server.refusal, {"error": "not with this token"})
        if path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked['organization']}/{asked['name']}"
            there = repo in self.server.private
            self.server.private.setdefault(repo, asked.get("visibility") == "private" or bool(asked.get("private")))
            return self._answer(409 if there else 200, {"url": f"{self.server.address}/{repo}"})
        if path.endswith("/preupload/main"):
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            return self._answer(200, {"files": files})
        if path.endswith("/commit/main"):
            lines = [json.loads(line) for line in body.splitlines()]
            files = [line["value"] for line in lines if line["key"] == "file"]
            self.server.commits.append({file["path"]: base64.b64decode(file["content"]) for file in files})
            url = f"{self.server.address}/{REPO}/commit/{'1' * 40}"
            return self._answer(200, {"commitUrl": url, "commitOid": "1" * 40})
        return self._answer(200, {})  # validate-yaml

    def _answer(self, status: int, content: dict[str, Any]) -> None:
        text = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: object) -> None:
        """Keep the tests' output for the tests."""


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def push(folder: Path, home: Path, endpoint: str, *words: str, token: str | None = "hf_test") -> Any:
    """Run the command as a person would: the library reads its settings when it is imported."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    environment |= {"HF_HOME": str(home), "HF_ENDPOINT": endpoint} | ({"HF_TOKEN": token} if token else {})
    command = [sys.executable, "-m", "switchkd.cli.main", "push", str(folder), REPO, *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_dry_run_says_what_would_leave(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["push", str(checkpoint), REPO, "--private"]) == 0
    out = capsys.readouterr().out
    names = {line.split()[-1] for line in out.splitlines() if line.startswith("  ")}
    assert names == {path.name for path in checkpoint.iterdir() if not path.name.startswith(".")}
    assert f"model {checkpoint} -> {REPO} (private): {len(names)} files" in out
    assert "nothing was uploaded" in out
    assert "note:" not in out


def test_yes_uploads_every_file_as_it_is(checkpoint: Path, hub: Hub, tmp_path: Path) -> None:
    done = push(checkpoint, tmp_path / "home", hub.address, "--private", "--yes")
    assert done.returncode == 0, done.stderr
    (commit,) = hub.commits
    expected = {path.name: path.read_bytes() for path in checkpoint.iterdir() if not path.name.startswith(".")}
    assert commit == expected
    assert hub.private == {REPO: True}
    assert "uploaded: " in done.stdout


def test_a_bundle_goes_out_too_and_what_the_hub_says_is_one_line(tiny_bundle: Path, hub: Hub, tmp_path: Path) -> None:
    home = tmp_path / "home"
    assert push(tiny_bundle, home, hub.address).returncode == 0
    assert not hub.commits  # without --yes nothing leaves
    assert not hub.private
    done = push(tiny_bundle, home, hub.address, "--yes")
    assert done.returncode == 0, done.stderr
    assert "bundle " in done.stdout
    (commit,) = hub.commits
    assert commit.keys() == {
        path.relative_to(tiny_bundle).as_posix() for path in tiny_bundle.rglob("*") if path.is_file()
    }
    assert hub.private == {REPO: False}
    refusals = [push(tiny_bundle, home, hub.address, "--private", "--yes")]
    for hub.refusal in (401, 403, 500):
        refusals.append(push(tiny_bundle, home, hub.address, "--yes"))
    refusals.append(push(tiny_bundle, home, hub.address, "--yes", token=None))
    refusals.append(push(tiny_bundle, home, "http://127.0.0.1:9", "--yes"))  # nobody listens there
    reasons = [
        "is there and public",
        "does not know the token",
        "may not write",
        "(500)",
        "no token",
        "cannot be reached",
    ]
    for refused, reason in zip(refusals, reasons, strict=True):
        assert refused.returncode == 2
        (line,) = refused.stderr.strip().splitlines()
        assert line.startswith("switchkd: error: ")
        assert reason in line
    assert len(hub.commits) == 1


def test_everything_in_the_way_is_named_at_once(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (checkpoint / "README.md").unlink()
    for name in ("optimizer.pt", "training_args.bin", "trainer_state.json", "modeling.py"):
        (checkpoint / name).write_text("{}")
    (checkpoint / "recipe.yaml").write_text("data:\n  pictures: /data/llava/images\n")
    (checkpoint / "log.jsonl").write_text('{"token": "hf_' + "a1B2" * 9 + '"}\n')
    (checkpoint / "notes.txt").symlink_to(tmp_path)
    config = json.loads((checkpoint / "config.json").read_text())
    config |= {"auto_map": {"AutoModel": "modeling.Model"}}
    (checkpoint / "config.json").write_text(json.dumps(config))
    assert main(["push", str(checkpoint), REPO]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    for reason in (
        "there is no README.md",
        "optimizer.pt is a training state",
        "training_args.bin is neither safetensors",
        "trainer_state.json is a training state",
        "modeling.py is neither safetensors",
        "recipe.yaml names a place of this machine (/data/llava/images)",
        "log.jsonl holds what looks like a token",
        "notes.txt is a link",
        "config.json names code that would have to run",
    ):
        assert reason in line
    assert "hf_a1B2" not in line


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        ("weights", "1 weights are missing"),
        ("config", "neither config.json nor manifest.json"),
        ("tokenizer", "does not load"),
        ("repo", "is no repository id"),
    ],
)
def test_a_folder_that_does_not_load_is_refused(
    damage: str, reason: str, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if damage == "weights":
        tensors = load_file(checkpoint / "model.safetensors")
        del tensors["language_model.model.norm.weight"]
        save_file(tensors, checkpoint / "model.safetensors", {"format": "pt"})
    elif damage == "config":
        (checkpoint / "config.json").unlink()
    elif damage == "tokenizer":
        (checkpoint / "tokenizer.json").unlink()
        (checkpoint / "tokenizer_config.json").unlink()
    assert main(["push", str(checkpoint), "tiny" if damage == "repo" else REPO]) == 2
    assert reason in capsys.readouterr().err.strip().splitlines()[-1]


def test_excluded_files_stay_at_home(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (checkpoint / "recipe.yaml").write_text("pictures: /data/llava/images\n")
    assert main(["push", str(checkpoint), REPO, "--exclude", "recipe.yaml"]) == 0
    assert "recipe.yaml" not in capsys.readouterr().out
