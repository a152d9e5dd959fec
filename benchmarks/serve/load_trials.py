"""Trials of load: answers counted and compared, memory watched, callers that leave or read slowly, signals, crashes."""

import asyncio
import json
import os
import random
import signal
import socket
import statistics
import time
from collections import Counter
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

import httpx

from .server_under_test import AT_ONCE, QUESTIONS, Callers, Server, asked, expected_answers, running

SLOW_TOKENS = 60  # of a stream that is read slowly: more than its reader takes in while it is measured


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


async def too_many(bundle: Path, at_once: int) -> tuple[bool, str]:
    """All at once against a queue of 128: excess is refused, all accepted are answered."""
    with running(bundle, "--queue", "128") as server:
        callers = Callers(server)
        replies = await asyncio.gather(*(callers.ask(1) for _ in range(at_once)))
    statuses = Counter(status for status, _ in replies)
    return set(statuses) == {200, 429} and statuses[200] >= 128, f"statuses {dict(statuses)}"


async def leavers(bundle: Path, leaving: int) -> tuple[bool, str]:
    """Callers that leave at random points: nothing is left running."""
    with running(bundle, "--queue", "1000") as server:
        callers = Callers(server)

        async def leave(number: int) -> None:
            try:
                async with asyncio.timeout(random.Random(number).uniform(0, 2)):
                    async for _ in callers.pieces(number, max_tokens=400):
                        pass
            except TimeoutError:
                pass

        await asyncio.gather(*(leave(number) for number in range(leaving)))
        try:
            async with asyncio.timeout(10):
                seconds = await callers.until_idle()
        except TimeoutError:
            return False, "some are left running after 10 s"
    return True, f"nothing is left running after {seconds:.1f} s"


async def terminated(bundle: Path, streams: int) -> tuple[bool, str]:
    """SIGTERM with streams in flight: all end well-formed, exit code 0."""
    with running(bundle) as server:
        callers = Callers(server)

        async def read(number: int) -> str:
            last = ""
            try:
                async for line in callers.pieces(number, max_tokens=60):
                    last = line
            except httpx.HTTPError as error:
                return type(error).__name__
            if '"code":"shutting_down"' in last:
                return "refused"  # it came after the signal
            return "done" if last == "data: [DONE]" else f"ended by {last[:60]}"

        reading = [asyncio.create_task(read(number)) for number in range(streams)]
        await asyncio.sleep(0.5)
        server.process.send_signal(signal.SIGTERM)
        ends = Counter(await asyncio.gather(*reading))
        code = await asyncio.to_thread(server.process.wait, 60)
    return code == 0 and ends["done"] + ends["refused"] == streams, f"{dict(ends)}; exit code {code}"


async def killed_engine(bundle: Path, under_way: int) -> tuple[bool, str]:
    """Kill -9 of the engine with answers under way: each gets an error or a whole answer, later ones are answered."""
    expected = expected_answers(bundle)
    with running(bundle) as server:
        callers = Callers(server)
        asking = [asyncio.create_task(callers.ask(number)) for number in range(under_way)]
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


async def slow_readers(bundle: Path, readers: int) -> tuple[bool, str]:
    """Streams that are read at a crawl, once the engine has written them: other callers lose under 5 % of throughput.

    In turns beside so many that have read theirs at once, and beside slow ones; before that both take their turns of
    the engine like everybody.
    """
    questions, rates = 200, {"without": [0.0], "with": [0.0]}
    with running(bundle, "--queue", "1000") as server:
        callers = Callers(server)
        await callers.all(questions)  # the engine's first answers make its room
        for _ in range(5):
            await asyncio.gather(*(callers.read(number, max_tokens=SLOW_TOKENS) for number in range(readers)))
            rates["without"].append(await callers.all(questions))
            slow = [await SlowReader.start(server, callers.body(number)) for number in range(readers)]
            await callers.until_idle()
            rates["with"].append(await callers.all(questions))
            still = sum([await reader.still_reads() for reader in slow])
            if still < 0.95 * readers:  # a few answers are short
                return False, f"only {still} of {readers} were still reading"
    pairs = list(zip(rates["without"][1:], rates["with"][1:], strict=True))
    losses = sorted(1 - beside / without for without, beside in pairs)
    loss = statistics.median(losses)
    said = (
        f"{loss:+.1%} of throughput lost beside {readers} slow readers (rounds {losses[0]:+.1%} to {losses[-1]:+.1%})"
    )
    if losses[-1] - losses[0] > 0.1:  # such rounds say nothing of 5 %
        return False, f"{said}: the machine is too restless to tell"
    return loss < 0.05, said


class SlowReader:
    """A caller that takes its stream in a few bytes at a time, through the smallest buffer that the kernel allows."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._reading = asyncio.create_task(self._read())

    @classmethod
    async def start(cls, server: Server, body: dict[str, Any]) -> Self:
        """Ask, and read no faster than 20 bytes a second."""
        place = urlsplit(server.url)
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        connection.setblocking(False)
        await asyncio.get_running_loop().sock_connect(connection, (place.hostname, place.port))
        reader, writer = await asyncio.open_connection(sock=connection, limit=64)
        content = json.dumps({**body, "stream": True, "max_tokens": SLOW_TOKENS}).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {place.netloc}\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
        return cls(reader, writer)

    async def _read(self) -> None:
        while await self._reader.read(100):
            await asyncio.sleep(5)  # in which others have this process's time

    async def still_reads(self) -> bool:
        """Whether the stream has not come to its end; it is left."""
        ended = self._reading.done()
        self._reading.cancel()
        self._writer.close()
        return not ended


async def refusals(bundle: Path, asked_times: int) -> tuple[bool, str]:
    """While the queue is full: each 429 within 100 ms."""
    seconds: list[float] = []
    with running(bundle, "--queue", "8") as server:
        callers = Callers(server)

        async def keep_full() -> None:
            while True:
                await callers.ask(1, max_tokens=400)
                await asyncio.sleep(0.5)  # as Retry-After asks: it is not the callers' haste that is measured

        busy = [asyncio.create_task(keep_full()) for _ in range(24)]
        await asyncio.sleep(1)
        statuses: Counter[int] = Counter()
        while statuses[429] < asked_times and sum(statuses.values()) < 20 * asked_times:
            start = time.perf_counter()
            status, _ = await callers.ask(1)
            statuses[status] += 1
            if status == 429:
                seconds.append(time.perf_counter() - start)
        for task in busy:
            task.cancel()
        await asyncio.gather(*busy, return_exceptions=True)
    if statuses[429] < asked_times:
        return False, f"statuses {dict(statuses)}"
    median, most = 1000 * statistics.median(seconds), 1000 * max(seconds)
    late = sum(each > 0.1 for each in seconds)
    said = f"{len(seconds)} refused within {median:.1f} ms (median), {most:.1f} ms (the slowest)"
    return late == 0, f"{said}, {late} of them after 100 ms"
