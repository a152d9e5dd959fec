"""Trials of malice: pictures made to hurt whoever opens them, and addresses that lead to the server's own machine."""

import base64
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from .hostile_addresses import HOSTILE_ADDRESSES
from .hostile_pictures import HostilePicture, hostile_pictures, png
from .server_under_test import Server, running

SECONDS, MEBIBYTES, TRIES = 0.05, 20.0, 4


@dataclass(frozen=True)
class Reply:
    """What came of a hostile request: status, code or text, seconds, and the most memory meanwhile in MiB."""

    status: int
    said: str
    seconds: float
    memory: float


def ask_about(http: httpx.Client, server: Server, url: str) -> Reply:
    """Send a picture's URL, measured from the first byte sent to the last received."""
    parts = [{"type": "image_url", "image_url": {"url": url}}]
    body = {"model": "bundle", "messages": [{"role": "user", "content": parts}], "max_tokens": 1}
    request = http.build_request("POST", "/chat/completions", json=body)
    server.forget_peaks()
    start = time.perf_counter()
    response = http.send(request)
    seconds = time.perf_counter() - start
    found: dict[str, Any] = response.json()
    said = found["error"]["code"] if "error" in found else "answered"
    return Reply(response.status_code, said, seconds, server.peak_mib())


def best(replies: list[Reply]) -> Reply:
    """The quickest and the smallest of several: what else ran at the time is not the picture's doing."""
    return Reply(
        replies[0].status,
        replies[0].said,
        min(reply.seconds for reply in replies),
        min(reply.memory for reply in replies),
    )


def is_right(picture: HostilePicture, reply: Reply) -> bool:
    """Whether a picture was refused as pictures are, or answered where it may be."""
    if reply.status == 200:
        return picture.fine
    return reply.status == 413 or (reply.status, reply.said) in ((400, "invalid_picture"), (400, "invalid_value"))


async def hostile(bundle: Path, _: int) -> tuple[bool, str]:
    """Each refused, or answered where it may be, within 50 ms and 20 MiB beyond what its bytes take by themselves."""
    statuses: Counter[str] = Counter()
    wrong: list[str] = []
    slowest = largest = 0.0
    with running(bundle) as server, httpx.Client(base_url=server.url, timeout=120) as http:
        ask_about(http, server, as_uri(png(9, 9)))  # the engine's first answer makes its room
        for picture in hostile_pictures():
            reply, plain = measured(http, server, picture)
            statuses[f"{reply.status} {reply.said}"] += 1
            seconds, memory = reply.seconds - plain.seconds, reply.memory - plain.memory
            slowest, largest = max(slowest, seconds), max(largest, memory)
            if not is_right(picture, reply) or seconds > SECONDS or memory > MEBIBYTES:
                wrong.append(f"{picture.name} ({reply.said}, {1000 * seconds:.0f} ms, {memory:.1f} MiB)")
    said = f"{dict(statuses)}; at most {1000 * slowest:.0f} ms and {largest:.1f} MiB"
    return not wrong, said + "".join(f"\n        {line}" for line in wrong)


def as_uri(content: bytes) -> str:
    """A picture as a data: URI."""
    return "data:image/png;base64," + base64.b64encode(content).decode()


def measured(http: httpx.Client, server: Server, picture: HostilePicture) -> tuple[Reply, Reply]:
    """The best of several tries, and of one as large that does nothing: refused at once, or passed on to the engine."""
    first = ask_about(http, server, as_uri(picture.content))
    reached_engine = first.said in ("answered", "invalid_value")
    length = len(picture.content)
    plain = png(9, 9).ljust(length, b"\0") if reached_engine else bytes(length)
    replies, plain_ones = [first], []
    for _ in range(TRIES):  # in turns: what else runs on the machine comes and goes
        plain_ones.append(ask_about(http, server, as_uri(plain)))
        replies.append(ask_about(http, server, as_uri(picture.content)))
    return best(replies), best(plain_ones)


@contextmanager
def listener() -> Iterator[tuple[int, list[str]]]:
    """Listen on every address of this machine, and count who comes."""
    callers: list[str] = []
    with socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True) as listening:

        def work() -> None:
            while True:
                try:
                    caller, address = listening.accept()
                except OSError:
                    return
                callers.append(str(address))
                caller.close()

        threading.Thread(target=work, daemon=True).start()
        try:
            yield listening.getsockname()[1], callers
        finally:
            listening.shutdown(socket.SHUT_RDWR)


async def own_addresses(bundle: Path, _: int) -> tuple[bool, str]:
    """Spellings of addresses of this machine and of networks around it: all refused, and nobody is called."""
    wrong: list[str] = []
    with listener() as (port, callers), running(bundle, "--allow-remote-pictures") as server:
        with httpx.Client(base_url=server.url, timeout=120) as http:
            for spelling in HOSTILE_ADDRESSES:
                reply = ask_about(http, server, spelling.format(port=port))
                if (reply.status, reply.said) != (400, "invalid_picture"):
                    wrong.append(spelling)
        socket.create_connection(("127.0.0.1", port)).close()  # it does listen
        while not callers:
            time.sleep(0.01)
    good = not wrong and len(callers) == 1
    said = f"{len(HOSTILE_ADDRESSES) - len(wrong)} of {len(HOSTILE_ADDRESSES)} addresses refused"
    return good, f"{said}, {len(callers) - 1} connections" + (f"; {wrong}" if wrong else "")
