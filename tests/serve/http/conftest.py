"""Servers as a person starts them: the real command in a process of its own, on a free port."""

from __future__ import annotations

import base64
import io
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from PIL import Image

KEY = "key-of-the-tests-8d1f"


@dataclass
class Server:
    """A running server: its process, its address, and what it has logged."""

    process: subprocess.Popen[str]
    url: str
    key: str
    log: Path

    def client(self, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=self.key, max_retries=0, timeout=60, **options)

    def http(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, headers={"Authorization": f"Bearer {self.key}"}, timeout=60)

    def metric(self, name: str) -> float:
        """The sum of a metric over its labels."""
        with self.http() as http:
            text = http.get("/metrics").text
        found = re.findall(rf"^{name}(?:\{{.*\}})? (\S+)$", text, re.MULTILINE)
        return sum(map(float, found))

    def wait_for(self, name: str, value: float) -> None:
        """Wait until a metric has a value; the test's own time limit ends a wait in vain."""
        while self.metric(name) != value:
            time.sleep(0.01)


@contextmanager
def running(*words: str | Path, environment: dict[str, str] | None = None) -> Iterator[Server]:
    environment = environment or {}
    with tempfile.TemporaryFile("w+") as nothing, tempfile.TemporaryDirectory(prefix="server-") as folder:
        log = Path(folder) / "log"
        with log.open("w") as errors:
            process = subprocess.Popen(
                [sys.executable, "-m", "switchkd.cli.main", "serve", *map(str, words), "--port", "0", "--threads", "1"],
                env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
                stdin=nothing,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        try:
            assert process.stdout is not None
            ready = re.match(r"ready: (\S+)/v1 ", process.stdout.readline())
            assert ready, log.read_text()
            yield Server(process, ready[1], environment.get("SWITCHKD_SERVE_API_KEY", "none"), log)
        finally:
            process.kill()
            process.wait()


@pytest.fixture(scope="session")
def start() -> Callable[..., AbstractContextManager[Server]]:
    """Starts a server of one's own."""
    return running


@pytest.fixture(scope="session")
def server(tiny_bundle: Path, long_bundle: Path) -> Iterator[Server]:
    """A server without a key, of two bundles, one in both precisions; tests leave it as they found it."""
    with running(tiny_bundle, long_bundle, "--queue", "12", "--precision", "fp32,int8") as server:
        yield server


@pytest.fixture(scope="session")
def closed_server(tiny_bundle: Path, long_bundle: Path) -> Iterator[Server]:
    """A server with a key, other limits, and remote pictures allowed."""
    flags = ("--deadline", "1.5", "--max-body", "1", "--max-pixels", "0.05", "--allow-remote-pictures")
    environment = {"SWITCHKD_SERVE_API_KEY": KEY, "SWITCHKD_SERVE_CORS": "https://page.example"}
    with running(long_bundle, *flags, environment=environment) as server:
        yield server


@pytest.fixture(scope="session")
def data_uri() -> Callable[..., str]:
    """Writes a picture as a data: URI."""

    def write(picture: Image.Image, kind: str = "PNG", declared: str = "image/png") -> str:
        content = io.BytesIO()
        picture.save(content, kind)
        return f"data:{declared};base64,{base64.b64encode(content.getvalue()).decode()}"

    return write
