"""Pictures made to hurt whoever opens them: refused in a few words, or answered, and the memory stays what it was."""

from __future__ import annotations

import base64
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from benchmarks.serve.hostile_pictures import hostile_pictures, png
from benchmarks.serve.hostile_trials import Reply, is_right

if TYPE_CHECKING:
    from tests.serve.http.conftest import Server


def ask(server: Server, content: bytes) -> Reply:
    url = "data:image/png;base64," + base64.b64encode(content).decode()
    parts = [{"type": "image_url", "image_url": {"url": url}}]
    body = {"model": "bundle", "messages": [{"role": "user", "content": parts}], "max_tokens": 1}
    with server.http() as http:
        response = http.post("/v1/chat/completions", json=body)
    found: dict[str, Any] = response.json()
    return Reply(response.status_code, found["error"]["code"] if "error" in found else "answered", 0, 0)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the most memory is counted by Linux alone")
def test_each_is_refused_or_answered_and_takes_little_memory(server: Server) -> None:
    ask(server, png(9, 9))
    processes = [psutil.Process(server.process.pid), *psutil.Process(server.process.pid).children()]
    restarts = server.metric("switchkd_engine_restarts_total")
    before = sum(process.memory_info().rss for process in processes)
    for process in processes:
        Path(f"/proc/{process.pid}/clear_refs").write_text("5")
    statuses: Counter[int] = Counter()
    for picture in hostile_pictures():
        if len(picture.content) <= 2**21:  # larger ones take their size, several times over: see the benchmark
            reply = ask(server, picture.content)
            assert is_right(picture, reply), (picture.name, reply)
            statuses[reply.status] += 1
    assert set(statuses) == {200, 400}
    assert statuses[200] > 15
    assert statuses[400] > 150
    status = [Path(f"/proc/{process.pid}/status").read_text() for process in processes]
    peak = sum(int(text.partition("VmHWM:")[2].split()[0]) * 1024 for text in status)
    assert peak - before < 60 * 2**20  # of all processes together; one such picture took 4 GB
    assert server.metric("switchkd_engine_restarts_total") == restarts


@pytest.mark.parametrize("size", [(1, 70_000), (70_000, 1)])
def test_a_side_has_its_limit_too(server: Server, size: tuple[int, int]) -> None:
    """Every row of a picture takes memory of its own."""
    reply = ask(server, png(*size))
    assert (reply.status, reply.said) == (400, "invalid_picture")
