"""A server under load and at its end: full queues, callers that leave, deadlines, dead engines, signals."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import openai
import psutil
import pytest

from switchkd.serve.http.server import listen

if TYPE_CHECKING:
    from tests.serve.http.conftest import Server

CHAT = "/v1/chat/completions"
HI = [{"role": "user", "content": "Hi"}]
LONG = {"model": "long", "messages": [{"role": "user", "content": "Describe what you see."}], "max_tokens": 500_000}


class Reading:
    """A stream that is read in a thread of its own, to its end or until it is left."""

    def __init__(self, server: Server, **changes: Any) -> None:
        self.http = server.http()
        self.events: list[Any] = []
        self.failure: httpx.HTTPError | None = None
        self.status: int | None = None
        self.began = threading.Event()
        self.thread = threading.Thread(target=self._read, args=({**LONG, "stream": True, **changes},), daemon=True)
        self.thread.start()

    def _read(self, body: dict[str, Any]) -> None:
        try:
            with self.http.stream("POST", CHAT, json=body) as response:
                self.status = response.status_code
                for line in response.iter_lines():
                    if line.startswith("data: "):
                        self.events.append(line.removeprefix("data: "))
                        if len(self.events) > 3:
                            self.began.set()
        except httpx.HTTPError as error:
            self.failure = error
        self.began.set()

    def end(self) -> list[Any]:
        """Every event, once the stream has ended as streams do."""
        self.thread.join(60)
        assert not self.thread.is_alive()
        assert self.failure is None
        assert self.events[-1] == "[DONE]"
        return [json.loads(event) for event in self.events[:-1]]

    def leave(self) -> None:
        self.http.close()


def test_a_full_queue_is_told_at_once_and_a_caller_that_leaves_makes_room(server: Server) -> None:
    callers = [Reading(server) for _ in range(4 + 12)]
    server.wait_for("switchkd_queue_length", 12)
    assert server.metric("switchkd_running") == 4
    with server.http() as http:
        response = http.post(CHAT, json={**LONG, "max_tokens": 1})
        assert (response.status_code, response.json()["error"]["code"]) == (429, "queue_full")
        assert 1 <= int(response.headers["retry-after"]) <= 60
        assert response.elapsed.total_seconds() < 5  # the answers in front of it take minutes
        # The other engine has a queue of its own, and whoever asks how the server is does not wait at all.
        assert http.post(CHAT, json={"model": "bundle", "messages": HI, "max_tokens": 2}).status_code == 200
        assert http.get("/ready").json()["models"]["long:fp32"] == "ready"
    with pytest.raises(openai.RateLimitError):
        server.client().chat.completions.create(**{**LONG, "max_tokens": 1})  # type: ignore[call-overload]
    for caller in callers:
        caller.leave()
    server.wait_for("switchkd_queue_length", 0)
    server.wait_for("switchkd_running", 0)


def test_a_caller_that_leaves_stops_its_answer(server: Server) -> None:
    before = server.metric("switchkd_answers_total")
    with pytest.raises(httpx.ReadTimeout), server.http() as http:
        http.post(CHAT, json=LONG, timeout=0.5)
    server.wait_for("switchkd_running", 0)
    reading = Reading(server)
    reading.began.wait()
    assert server.metric("switchkd_running") == 1
    reading.leave()
    server.wait_for("switchkd_running", 0)
    assert server.metric("switchkd_answers_total") == before + 2


def test_a_short_answer_does_not_wait_behind_long_ones(server: Server) -> None:
    callers = [Reading(server) for _ in range(3)]
    for caller in callers:
        caller.began.wait()
    with server.http() as http:
        answer = http.post(CHAT, json={**LONG, "max_tokens": 5}).json()
    assert answer["usage"]["completion_tokens"] == 5
    assert all(caller.thread.is_alive() for caller in callers)
    for caller in callers:
        caller.leave()
    server.wait_for("switchkd_running", 0)


def test_a_deadline_is_a_status_before_a_stream_and_an_event_within_one(closed_server: Server) -> None:
    """Of 1.5 s here; the engine has four places, all taken."""
    client = closed_server.client()
    with ThreadPoolExecutor(5) as threads:
        reading = Reading(closed_server)
        reading.began.wait()
        create: Callable[..., Any] = client.chat.completions.create
        whole = [threads.submit(create, **LONG) for _ in range(5)]
        for answer in whole:
            error = answer.exception()
            assert isinstance(error, openai.APIStatusError)
            assert (error.status_code, error.code) == (504, "deadline_exceeded")
        *pieces, last = reading.end()
    assert all(piece["object"] == "chat.completion.chunk" for piece in pieces)
    assert (last["error"]["code"], last["error"]["type"]) == ("deadline_exceeded", "server_error")
    with pytest.raises(openai.APIError, match=r"not finished within 1\.5 s"):
        for _ in create(**LONG, stream=True):
            pass
    closed_server.wait_for("switchkd_running", 0)


def seconds_of_engines(server: Server) -> dict[int, float]:
    """What each engine's process has computed, in seconds of the processor."""
    children = psutil.Process(server.process.pid).children()
    engines = [child for child in children if "spawn_main" in " ".join(child.cmdline())]  # and no resource tracker
    return {child.pid: sum(child.cpu_times()[:2]) for child in engines}


def test_a_dead_engine_fails_what_it_had_and_comes_back(server: Server) -> None:
    restarts = server.metric("switchkd_engine_restarts_total")
    before = seconds_of_engines(server)
    reading = Reading(server)
    reading.began.wait()
    with ThreadPoolExecutor(5) as threads, server.http() as http:
        whole = [threads.submit(http.post, CHAT, json=LONG) for _ in range(5)]  # the last two of them wait
        server.wait_for("switchkd_queue_length", 2)
        after = seconds_of_engines(server)
        os.kill(max(after, key=lambda pid: after[pid] - before[pid]), signal.SIGKILL)
        for answer in whole:
            response = answer.result()
            assert (response.status_code, response.json()["error"]["code"]) == (503, "engine_died")
            assert response.headers["retry-after"] == "1"
        assert reading.end()[-1]["error"]["code"] == "engine_died"
        response = http.post(CHAT, json={**LONG, "max_tokens": 1})
        assert (response.status_code, response.json()["error"]["code"]) == (503, "engine_not_ready")
        assert http.get("/health").status_code == 200
        assert http.get("/ready").status_code == 503
        # The engine of the other bundle has noticed nothing.
        assert http.post(CHAT, json={"model": "bundle", "messages": HI, "max_tokens": 2}).status_code == 200
        while http.get("/ready").status_code != 200:
            time.sleep(0.05)
        assert http.post(CHAT, json={**LONG, "max_tokens": 3}).json()["usage"]["completion_tokens"] == 3
    assert server.metric("switchkd_engine_restarts_total") == restarts + 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_answers_finish_and_takes_no_new_ones(
    start: Callable[..., AbstractContextManager[Server]], long_bundle: Path, number: signal.Signals
) -> None:
    with start(long_bundle, "--parallel", "2", "--grace", "60") as server:
        children = psutil.Process(server.process.pid).children(recursive=True)
        callers = [Reading(server, max_tokens=600) for _ in range(3)]
        with ExitStack() as stack:
            kept = stack.enter_context(server.http())
            assert kept.get("/ready").status_code == 200
            callers[0].began.wait()
            server.wait_for("switchkd_queue_length", 1)
            # As a terminal and a service manager do it: everybody in the group hears.
            for child in children:
                os.kill(child.pid, number)
            server.process.send_signal(number)
            while kept.get("/ready").status_code == 200:
                time.sleep(0.001)
            response = kept.post(CHAT, json={**LONG, "max_tokens": 1})
            assert (response.status_code, response.json()["error"]["code"]) == (503, "shutting_down")
            assert kept.get("/health").status_code == 200
        for caller in callers:
            assert caller.end()[-1]["choices"][0]["finish_reason"] == "length"
        assert server.process.wait(30) == 0
        _, alive = psutil.wait_procs(children, timeout=10)
        assert alive == []
        assert "Traceback" not in server.log.read_text()


@pytest.mark.parametrize("signals", [1, 2])
def test_answers_that_take_too_long_for_the_grace_end_with_an_error(
    start: Callable[..., AbstractContextManager[Server]], long_bundle: Path, signals: int
) -> None:
    with start(long_bundle, "--grace", "0.3" if signals == 1 else "60") as server:
        callers = [Reading(server) for _ in range(5)]
        whole = ThreadPoolExecutor(1).submit(server.http().post, CHAT, json=LONG)
        callers[0].began.wait()
        server.wait_for("switchkd_queue_length", 2)
        for _ in range(signals):
            server.process.send_signal(signal.SIGTERM)
            time.sleep(0.1)
        codes = []
        for caller in callers:
            caller.thread.join(60)
            if caller.status == 200:  # those that wait in the queue have had no status yet, and get this one
                codes.append(caller.end()[-1]["error"]["code"])
            else:
                assert caller.status == 503
        assert codes == ["shutting_down"] * len(codes)
        assert len(codes) >= 3
        assert whole.result().status_code == 503
        assert server.process.wait(30) == 0
        assert "Traceback" not in server.log.read_text()


def test_engines_end_with_a_server_that_was_killed(
    start: Callable[..., AbstractContextManager[Server]], long_bundle: Path
) -> None:
    with start(long_bundle) as server:
        children = psutil.Process(server.process.pid).children(recursive=True)
        reading = Reading(server)
        reading.began.wait()
        server.process.kill()
        _, alive = psutil.wait_procs(children, timeout=20)
        assert [child for child in alive if child.status() != psutil.STATUS_ZOMBIE] == []


def test_ctrl_c_while_engines_start_is_an_orderly_end(long_bundle: Path, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "switchkd.cli.main", "serve", str(long_bundle), "--port", "0"]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(words, stdout=log, stderr=log, start_new_session=True)
    while not any("spawn_main" in " ".join(child.cmdline()) for child in psutil.Process(process.pid).children()):
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(30) == 0
    said = (tmp_path / "log").read_text()
    assert "Traceback" not in said
    assert "ready" not in said


def test_small_pieces_are_sent_at_once() -> None:
    """asyncio switches Nagle's algorithm off where a socket names its protocol."""
    with listen("127.0.0.1", 0) as listening:
        assert listening.proto == socket.IPPROTO_TCP
