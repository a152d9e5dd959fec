"""A server under test, as a person starts it, and its callers."""

import asyncio
import base64
import re
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
from PIL import Image

from switchkd.serve import Engine

QUESTIONS, TOKENS, AT_ONCE = 48, 12, 64
COLOURS = ("red", "green", "blue", "white")


@dataclass
class Server:
    """A server under test."""

    process: subprocess.Popen[str]
    url: str

    def children(self) -> list[int]:
        """Its engines' process numbers."""
        listing = subprocess.run(
            ["ps", "-o", "pid=,args=", "--ppid", str(self.process.pid)], capture_output=True, text=True, check=False
        )
        return [int(line.split()[0]) for line in listing.stdout.splitlines() if "spawn_main" in line]

    def memory_mib(self) -> float:
        """Resident memory of the server and its engines."""
        pids = [self.process.pid, *self.children()]
        return sum(_memory(pid, "VmRSS") for pid in pids)

    def forget_peaks(self) -> None:
        """Let the kernel measure the most memory anew."""
        for pid in [self.process.pid, *self.children()]:
            Path(f"/proc/{pid}/clear_refs").write_text("5", encoding="utf-8")

    def peak_mib(self) -> float:
        """The most resident memory since then, of the server and its engines together."""
        return sum(_memory(pid, "VmHWM") for pid in [self.process.pid, *self.children()])


def _memory(pid: int, what: str) -> float:
    status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    return int(re.findall(rf"{what}:\s+(\d+)", status)[0]) / 1024


@contextmanager
def running(bundle: Path, *flags: str) -> Iterator[Server]:
    """Start `switchkd serve` on a free port."""
    words = [sys.executable, "-m", "switchkd.cli.main", "serve", str(bundle), "--port", "0", "--threads", "1"]
    process = subprocess.Popen(
        [*words, "--log-level", "critical", *flags], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout is not None
    try:
        yield Server(process, process.stdout.readline().split()[1])
    finally:
        process.kill()
        process.wait()


def data_uri(colour: str) -> str:
    """A small picture."""
    content = BytesIO()
    Image.new("RGB", (32, 24), colour).save(content, "PNG")
    return "data:image/png;base64," + base64.b64encode(content.getvalue()).decode()


def asked(number: int) -> tuple[list[Any], str | None]:
    """The messages of a question, and the picture of every third."""
    colour = COLOURS[number % len(COLOURS)] if number % 3 == 0 else None
    text = {"type": "text", "text": f"Number {number % QUESTIONS}: what do you see?"}
    parts = [text] if colour is None else [{"type": "image_url", "image_url": {"url": data_uri(colour)}}, text]
    return [{"role": "user", "content": parts}], colour


def expected_answers(bundle: Path) -> dict[tuple[int, str | None], str]:
    """What the engine says to each question alone."""
    engine = Engine.open(bundle, threads=1)
    found: dict[tuple[int, str | None], str] = {}
    for number in range(QUESTIONS * len(COLOURS)):
        messages, colour = asked(number)
        text = messages[0]["content"][-1]["text"]
        pictures = [] if colour is None else [Image.new("RGB", (32, 24), colour)]
        found[number % QUESTIONS, colour] = engine.answer(text, pictures, max_new_tokens=TOKENS).text
    return found


class Callers:
    """Many callers of one server."""

    def __init__(self, server: Server) -> None:
        self.server = server
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=AT_ONCE)
        self.client = httpx.AsyncClient(base_url=server.url, timeout=120, limits=limits)

    def body(self, number: int) -> dict[str, Any]:
        """The request of a question."""
        return {"model": "bundle", "messages": asked(number)[0], "max_tokens": TOKENS}

    async def all(self, questions: int) -> float:
        """Ask so many, 8 at a time, and return answers a second."""
        numbers, start = iter(range(questions)), time.perf_counter()

        async def caller() -> None:
            for number in numbers:
                status, text = await self.ask(number)
                assert status == 200, text

        await asyncio.gather(*(caller() for _ in range(8)))
        return questions / (time.perf_counter() - start)

    async def read(self, number: int, **changes: Any) -> None:
        """Read a stream to its end."""
        async for _ in self.pieces(number, **changes):
            pass

    async def until_idle(self) -> float:
        """Wait until nothing waits and nothing is answered, and return the seconds that it took."""
        start, address = time.perf_counter(), self.server.url.removesuffix("/v1") + "/metrics"
        while True:
            text = (await self.client.get(address)).text
            left = re.findall(r"^switchkd_(?:running|queue_length)\{.*\} (\S+)$", text, re.MULTILINE)
            if sum(map(float, left)) == 0:
                return time.perf_counter() - start
            await asyncio.sleep(0.1)

    async def ask(self, number: int, **changes: Any) -> tuple[int, str | None]:
        """One whole answer: status and text, or 0 and what went wrong."""
        try:
            reply = await self.client.post("/chat/completions", json={**self.body(number), **changes})
        except httpx.HTTPError as error:
            return 0, type(error).__name__
        text = reply.json()["choices"][0]["message"]["content"] if reply.status_code == 200 else None
        return reply.status_code, text

    async def pieces(self, number: int, **changes: Any) -> AsyncIterator[str]:
        """The lines of a stream."""
        body = {**self.body(number), "stream": True, **changes}
        async with self.client.stream("POST", "/chat/completions", json=body) as reply:
            async for line in reply.aiter_lines():
                if line:
                    yield line
