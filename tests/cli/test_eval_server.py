"""`switchkd eval URL`: our own server, and one that is busy, refuses, or says something else."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from switchkd.cli.eval_server import LONGEST_WAIT, asked_wait
from switchkd.cli.main import main
from switchkd.training.evaluation.kept_answers import read_results


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve questions about three pictures, and one without."""
    folder = tmp_path_factory.mktemp("server")
    for number, colour in enumerate(("red", "green", "blue")):
        Image.new("RGB", (30, 24), colour).save(folder / f"{number}.png")
    records = []
    for number in range(13):
        question = f"What colour is number {number}?"
        picture = {} if number == 12 else {"image": f"{number % 3}.png"}
        turns = [
            {"from": "human", "value": question if number == 12 else f"<image>\n{question}"},
            {"from": "gpt", "value": "yes"},
        ]
        records.append({"id": str(number), "conversations": turns, **picture})
    (folder / "data.json").write_text(json.dumps(records))
    return folder / "data.json"


def answers_of(out: Path) -> dict[str, tuple[str, bool]]:
    (stamp,) = out.glob("*/stamp.json")
    results = read_results(stamp.parent)
    return {q.name: (a.text, a.cut) for q, a in zip(results.questions, results.answers, strict=True)}


def test_our_server_answers_as_its_bundle_does(data: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    words = ["serve", str(tiny_bundle), "--precision", "fp32,int8", "--port", "0", "--queue", "3", "--threads", "1"]
    process = subprocess.Popen(
        [sys.executable, "-m", "switchkd.cli.main", *words],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert process.stdout is not None
        ready = re.match(r"ready: (\S+) ", process.stdout.readline())
        assert ready
        common = ["--data", str(data), "--max-new-tokens", "6", "--out"]
        for name in ("fp32", "int8"):
            there, here = tmp_path / f"{name}-there", tmp_path / f"{name}-here"
            # Twelve at once against a queue of three: some are told to come back.
            assert main(["eval", f"{ready[1]}#bundle:{name}", "--batch", "12", *common, str(there)]) == 0
            assert main(["eval", f"{tiny_bundle}:{name}", "--threads", "1", *common, str(here)]) == 0
            assert answers_of(there) == answers_of(here)
        report = json.loads((there / "report.json").read_text())
        assert report["system"]["seeds"][0]["model"] == {
            "kind": "server",
            "address": ready[1],
            "model": "bundle:int8",
        }
    finally:
        process.kill()
        process.wait()


class Elsewhere(ThreadingHTTPServer):
    """Somebody else's server: `reply` says status, headers and body of a request, its number given."""

    reply: Callable[[int, dict[str, Any], dict[str, str]], tuple[int, dict[str, str], Any]]
    models: tuple[int, Any]

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests: list[dict[str, Any]] = []
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Elsewhere

    def do_GET(self) -> None:
        status, body = self.server.models
        self._send(status, {}, body)

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.requests.append(asked)
            number = len(self.server.requests)
        self._send(*self.server.reply(number, asked, dict(self.headers)))

    def _send(self, status: int, headers: dict[str, str], body: Any) -> None:
        content = (body if isinstance(body, str) else json.dumps(body)).encode()
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Say nothing."""


@contextmanager
def serving() -> Iterator[Elsewhere]:
    server = Elsewhere()
    server.models = (200, {"data": [{"id": "only"}]})
    server.reply = lambda *_: (200, {}, chat("yes"))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def elsewhere() -> Iterator[Elsewhere]:
    with serving() as server:
        yield server


def chat(text: str, reason: str = "stop") -> dict[str, Any]:
    return {"choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": reason}]}


def test_a_busy_server_is_asked_again_when_it_says_and_the_key_is_sent(
    data: Path, elsewhere: Elsewhere, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "second")
    monkeypatch.setenv("SWITCHKD_EVAL_API_KEY", "first")
    keys = []

    def reply(number: int, asked: dict[str, Any], headers: dict[str, str]) -> tuple[int, dict[str, str], Any]:
        keys.append(headers["Authorization"])
        if number <= 6:  # all of the first, and more
            return (429, 503)[number % 2], {"Retry-After": "0"}, {"error": {"message": "later"}}
        return 200, {}, chat("yes" if number % 2 else "no, and", "stop" if number % 2 else "length")

    elsewhere.reply = reply
    assert main(["eval", elsewhere.url, "--data", str(data), "--out", str(tmp_path), "--max-new-tokens", "9"]) == 0
    assert len(elsewhere.requests) == 13 + 6
    assert set(keys) == {"Bearer first"}
    (first, *_), texts = (
        elsewhere.requests,
        [r for r in elsewhere.requests if isinstance(r["messages"][0]["content"], str)],
    )
    assert {name: first[name] for name in ("model", "max_tokens", "temperature")} == {
        "model": "only",
        "max_tokens": 9,
        "temperature": 0,
    }
    pictured = next(r for r in elsewhere.requests if not isinstance(r["messages"][0]["content"], str))
    parts = pictured["messages"][0]["content"]
    assert parts[0]["image_url"]["url"].startswith("data:image/png;base64,iVBOR")
    assert parts[1]["text"].startswith("What colour is number")
    assert {r["messages"][0]["content"] for r in texts} == {"What colour is number 12?"}
    report = json.loads((tmp_path / "report.json").read_text())
    right = report["metrics"]["exact"]["all"]["accuracy"]["estimate"]["value"]
    assert right == pytest.approx((13 - report["system"]["seeds"][0]["cut_off"]) / 13)


def test_several_are_under_way_at_once(data: Path, elsewhere: Elsewhere, tmp_path: Path) -> None:
    together = threading.Barrier(3, timeout=60)  # breaks where fewer come

    def reply(number: int, asked: Any, headers: Any) -> tuple[int, dict[str, str], Any]:
        if number <= 3:
            together.wait()
        return 200, {}, chat("yes")

    elsewhere.reply = reply
    assert main(["eval", elsewhere.url, "--batch", "3", "--data", str(data), "--out", str(tmp_path)]) == 0
    assert not together.broken


def test_a_server_that_gives_up_midway_is_gone_on_with(
    data: Path, elsewhere: Elsewhere, tmp_path: Path, capsys: Any
) -> None:
    elsewhere.reply = lambda number, *_: (
        (200, {}, chat("yes")) if number <= 5 else (400, {}, {"error": {"message": "too long."}})
    )
    words = ["eval", elsewhere.url, "--batch", "1", "--data", str(data), "--out", str(tmp_path)]
    assert main(words) == 2
    error = capsys.readouterr().err
    assert "HTTP 400: too long; the same command goes on behind the answers that are there" in error
    before = len(elsewhere.requests)
    elsewhere.reply = lambda *_: (200, {}, chat("yes"))
    assert main(words) == 0
    assert len(elsewhere.requests) - before == 13 - 5
    assert set(answers_of(tmp_path).values()) == {("yes", False)}


@pytest.mark.parametrize(
    ("models", "reply", "more", "reason"),
    [
        ((200, {"data": [{"id": "a"}, {"id": "b"}]}), None, [], "several models may be there; it has a, b; name one"),
        ((200, {"data": [{"id": "a"}]}), None, ["--model", "c"], "there is no model 'c'; it has a"),
        ((404, "nothing"), None, [], "several models may be there; it lists none; name one by --model"),
        (
            (401, {"error": {"message": "no key"}}),
            None,
            [],
            "HTTP 401: no key; put the key into the environment variable",
        ),
        ((200, "<html>"), None, [], "answered no JSON; is this the address that ends in /v1?"),
        ((200, {"data": [{"id": "a"}]}), (200, {}, {"choices": []}), [], "expected a chat completion"),
        (
            (200, {"data": [{"id": "a"}]}),
            (404, {}, {"error": {"message": "no route"}}),
            [],
            "HTTP 404: no route; is this",
        ),
    ],
)
def test_what_a_server_may_say_instead(
    models: Any, reply: Any, more: list[str], reason: str, data: Path, elsewhere: Elsewhere, tmp_path: Path, capsys: Any
) -> None:
    elsewhere.models = models
    if reply is not None:
        elsewhere.reply = lambda *_: reply
    assert main(["eval", elsewhere.url, "--data", str(data), "--out", str(tmp_path), *more]) == 2
    assert reason in capsys.readouterr().err


def test_a_server_without_a_list_is_taken_at_its_word(data: Path, elsewhere: Elsewhere, tmp_path: Path) -> None:
    elsewhere.models = (404, "nothing")
    words = ["eval", elsewhere.url, "--model", "theirs", "--data", str(data), "--out", str(tmp_path)]
    assert main(words) == 0
    assert {request["model"] for request in elsewhere.requests} == {"theirs"}


def test_what_is_no_picture_is_not_sent(data: Path, elsewhere: Elsewhere, tmp_path: Path, capsys: Any) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number in range(3):
        (pictures / f"{number}.png").write_text("a letter of somebody's")
    words = ["eval", elsewhere.url, "--data", str(data), "--pictures", str(pictures), "--out", str(tmp_path / "out")]
    assert main(words) == 2
    assert "no picture that can be sent" in capsys.readouterr().err
    assert all(isinstance(request["messages"][0]["content"], str) for request in elsewhere.requests)


def test_nobody_at_the_address(data: Path, tmp_path: Path, capsys: Any) -> None:
    with serving() as server:
        url = server.url
    assert main(["eval", url, "--data", str(data), "--out", str(tmp_path)]) == 2
    assert "cannot be reached" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("7", 7.0),
        ("0", 0.0),
        ("9999", LONGEST_WAIT),
        ("Fri, 31 Dec 1999 23:59:59 GMT", 0.0),
        ("Fri, 31 Dec 9998 23:59:59 GMT", LONGEST_WAIT),
        ("soon", 4.0),
        (None, 4.0),
    ],
)
def test_what_a_server_asks_to_wait(header: str | None, seconds: float) -> None:
    response = httpx.Response(429, headers={} if header is None else {"Retry-After": header})
    assert asked_wait(response, otherwise=4.0) == seconds
