"""OpenAI's client for JavaScript, in Node, before a real server: what it makes of answers, streams and errors."""

import base64
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from switchkd.serve import Answer, Engine

HERE = Path(__file__).parent
KEY = "key-of-the-tests-5c20"

pytestmark = [
    pytest.mark.skipif(shutil.which("node") is None, reason="there is no Node.js here"),
    pytest.mark.skipif(
        not (HERE / "node_modules" / "openai").is_dir(),
        reason="OpenAI's client is not installed: `make javascript` does it",
    ),
]


@pytest.fixture(scope="module")
def picture() -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (40, 30), "green").save(content, "PNG")
    return content.getvalue()


@pytest.fixture(scope="module")
def got(tiny_bundle: Path, picture: bytes, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """Everything that chat.mjs prints."""
    words = [sys.executable, "-m", "switchkd.cli.main", "serve", str(tiny_bundle), "--port", "0", "--threads", "1"]
    log = tmp_path_factory.mktemp("server") / "log"
    with log.open("w") as errors:
        environment = {**os.environ, "SWITCHKD_SERVE_API_KEY": KEY, "OMP_NUM_THREADS": "1"}
        server = subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True)
    try:
        assert server.stdout is not None
        ready = re.match(r"ready: (\S+) ", server.stdout.readline())
        assert ready, log.read_text()
        url = f"data:image/png;base64,{base64.b64encode(picture).decode()}"
        command = ["node", "chat.mjs", ready[1], KEY, "bundle", url]
        done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr
        yield json.loads(done.stdout)
    finally:
        server.kill()
        server.wait()


@pytest.fixture(scope="module")
def engine(tiny_bundle: Path) -> Engine:
    return Engine.open(tiny_bundle, threads=1)


@pytest.fixture(scope="module")
def expected(engine: Engine) -> Answer:
    return engine.answer("Hi", max_new_tokens=12, logprobs=0)


def test_a_whole_answer_is_the_engines(got: dict[str, Any], expected: Answer) -> None:
    (choice,) = got["whole"]["choices"]
    assert got["models"] == ["bundle", "bundle:fp32"]
    assert choice["message"]["content"] == expected.text
    assert choice["finish_reason"] == expected.finish_reason
    assert [each["logprob"] for each in choice["logprobs"]["content"]] == [
        each.logprob for each in expected.logprobs or ()
    ]
    assert got["whole"]["usage"]["completion_tokens"] == len(expected.tokens)


def test_a_stream_comes_in_pieces_of_the_same(got: dict[str, Any], expected: Answer) -> None:
    stream = got["stream"]
    assert "".join(stream["pieces"]) == expected.text
    assert len([piece for piece in stream["pieces"] if piece]) > 2
    assert stream["reason"] == expected.finish_reason
    assert stream["logprobs"] == got["whole"]["choices"][0]["logprobs"]["content"]


def test_a_picture_is_seen(got: dict[str, Any], engine: Engine, picture: bytes) -> None:
    answer = engine.answer("What do you see?", [picture], max_new_tokens=12)
    assert got["picture"]["choices"][0]["message"]["content"] == answer.text
    assert got["picture"]["usage"]["prompt_tokens"] == answer.prompt_tokens


def test_errors_are_of_the_clients_own_kinds(got: dict[str, Any]) -> None:
    unknown = {"kind": "BadRequestError", "status": 400, "code": "unsupported_parameter", "param": "best_of"}
    assert got["unknown"] == unknown
    closed = {"kind": "AuthenticationError", "status": 401, "code": "invalid_api_key", "param": None}
    assert got["closed"] == closed
