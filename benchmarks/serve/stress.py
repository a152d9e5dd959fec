"""What a server does under load: answers counted and compared, memory watched, callers that leave, signals, crashes.

    python -m benchmarks.serve.stress BUNDLE [--requests 10000]

Every trial starts a server of its own and prints a line; the exit code is 1 where one did not hold what it promises.
Questions carry a number, and the answer to each is compared with what the engine says to it alone.
"""

import argparse
import asyncio
import base64
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
from PIL import Image

from switchkd.export.contract.processor import this_machine
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
        status = [Path(f"/proc/{pid}/status").read_text(encoding="utf-8") for pid in pids]
        return sum(int(re.findall(r"VmRSS:\s+(\d+)", text)[0]) for text in status) / 1024


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
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=AT_ONCE)
        self.client = httpx.AsyncClient(base_url=server.url, timeout=120, limits=limits)

    async def ask(self, number: int) -> tuple[int, str | None]:
        """One whole answer: status and text, or 0 and what went wrong."""
        messages, _ = asked(number)
        body = {"model": "bundle", "messages": messages, "max_tokens": TOKENS}
        try:
            reply = await self.client.post("/chat/completions", json=body)
        except httpx.HTTPError as error:
            return 0, type(error).__name__
        text = reply.json()["choices"][0]["message"]["content"] if reply.status_code == 200 else None
        return reply.status_code, text

    async def pieces(self, number: int, **changes: Any) -> AsyncIterator[str]:
        """The lines of a stream."""
        messages, _ = asked(number)
        body = {"model": "bundle", "messages": messages, "max_tokens": TOKENS, "stream": True, **changes}
        async with self.client.stream("POST", "/chat/completions", json=body) as reply:
            async for line in reply.aiter_lines():
                if line:
                    yield line


Trial = Callable[[Path, int], Coroutine[Any, Any, tuple[bool, str]]]


async def many_requests(bundle: Path, requests: int) -> tuple[bool, str]:
    """Many, AT_ONCE at a time, a third with pictures: all answered, none with another's answer, memory bounded."""
    expected = expected_answers(bundle)
    outcomes: Counter[str] = Counter()
    with running(bundle, "--queue", "256") as server:
        callers = Callers(server)
        numbers = iter(range(requests))
        memory: list[float] = []

        async def caller() -> None:
            for number in numbers:
                status, text = await callers.ask(number)
                right = text == expected[number % QUESTIONS, asked(number)[1]]
                outcomes["right" if right else f"{status}: {'wrong' if status == 200 else text}"] += 1
                if number % (requests // 10 or 1) == 0:
                    memory.append(server.memory_mib())

        start = time.perf_counter()
        await asyncio.gather(*(caller() for _ in range(AT_ONCE)))
        seconds = time.perf_counter() - start
        settled = memory[len(memory) // 5 :]  # every engine's first answers make its room
        growth = settled[-1] - settled[0]
    good = outcomes == {"right": requests} and growth < 50
    return good, f"{dict(outcomes)} in {seconds:.0f} s, {AT_ONCE} at once; memory grew by {growth:.1f} MiB"


async def too_many(bundle: Path, _: int) -> tuple[bool, str]:
    """1,000 at once against a queue of 128: excess is refused, all accepted are answered."""
    with running(bundle, "--queue", "128") as server:
        callers = Callers(server)
        replies = await asyncio.gather(*(callers.ask(1) for _ in range(1000)))
    statuses = Counter(status for status, _ in replies)
    return set(statuses) == {200, 429} and statuses[200] >= 128, f"statuses {dict(statuses)}"


async def leavers(bundle: Path, _: int) -> tuple[bool, str]:
    """500 callers that leave at random points: nothing is left running."""
    with running(bundle, "--queue", "1000") as server:
        callers = Callers(server)

        async def leave(number: int) -> None:
            try:
                async with asyncio.timeout(random.Random(number).uniform(0, 2)):
                    async for _ in callers.pieces(number, max_tokens=400):
                        pass
            except TimeoutError:
                pass

        await asyncio.gather(*(leave(number) for number in range(500)))
        root = server.url.removesuffix("/v1")
        for tries in range(100):
            text = (await callers.client.get(f"{root}/metrics")).text
            left = sum(map(float, re.findall(r"^switchkd_(?:running|queue_length)\{.*\} (\S+)$", text, re.MULTILINE)))
            if left == 0:
                return True, f"nothing is left running after {tries / 10:.1f} s"
            await asyncio.sleep(0.1)
    return False, f"{left:g} are left running"


async def terminated(bundle: Path, _: int) -> tuple[bool, str]:
    """SIGTERM with 64 streams in flight: all end well-formed, exit code 0."""
    with running(bundle) as server:
        callers = Callers(server)

        async def read(number: int) -> str:
            last = ""
            try:
                async for line in callers.pieces(number, max_tokens=60):
                    last = line
            except httpx.HTTPError as error:
                return type(error).__name__
            return "done" if last == "data: [DONE]" else f"ended by {last[:60]}"

        reading = [asyncio.create_task(read(number)) for number in range(AT_ONCE)]
        await asyncio.sleep(0.5)
        server.process.send_signal(signal.SIGTERM)
        ends = Counter(await asyncio.gather(*reading))
        code = await asyncio.to_thread(server.process.wait, 60)
    refused = sum(count for end, count in ends.items() if "shutting_down" in end)
    return code == 0 and ends["done"] + refused == AT_ONCE, f"{dict(ends)}; exit code {code}"


async def killed_engine(bundle: Path, _: int) -> tuple[bool, str]:
    """Kill -9 of the engine with 64 in flight: each gets an error or a whole answer, and later ones are answered."""
    expected = expected_answers(bundle)
    with running(bundle) as server:
        callers = Callers(server)
        asking = [asyncio.create_task(callers.ask(number)) for number in range(AT_ONCE)]
        await asyncio.sleep(0.3)
        os.kill(server.children()[0], signal.SIGKILL)
        outcomes: Counter[str] = Counter()
        for number, (status, text) in enumerate(await asyncio.gather(*asking)):
            right = text == expected[number % QUESTIONS, asked(number)[1]]
            outcomes["right" if right else str(status)] += 1
        for _ in range(100):
            if (await callers.ask(1))[0] == 200:
                break
            await asyncio.sleep(0.2)
        else:
            return False, f"{dict(outcomes)}; it was not started again"
    return set(outcomes) <= {"right", "503"}, f"{dict(outcomes)}; later ones are answered"


TRIALS: dict[str, Trial] = {
    "many requests": many_requests,
    "too many": too_many,
    "leavers": leavers,
    "SIGTERM": terminated,
    "kill -9 of the engine": killed_engine,
}


def main() -> int:
    """Run the trials."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, help="a bundle folder named `bundle`")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--trial", action="append", choices=TRIALS)
    args = parser.parse_args()
    print(json.dumps(this_machine()))
    failed = 0
    for name in args.trial or TRIALS:
        good, said = asyncio.run(TRIALS[name](args.bundle, args.requests))
        failed += not good
        print(f"{'held' if good else 'FAILED'}  {name}: {said}", flush=True)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
