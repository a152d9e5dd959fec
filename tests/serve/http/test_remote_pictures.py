"""Pictures from addresses: none that leads anywhere but to the public internet, however it is written."""

from __future__ import annotations

import asyncio
import io
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import uvicorn
from PIL import Image

from benchmarks.serve.hostile_addresses import HOSTILE_ADDRESSES
from switchkd.serve.http import ServerSettings, build_application
from switchkd.serve.http.api_errors import ApiError
from switchkd.serve.http.metrics import Metrics
from switchkd.serve.http.picture_sources import PictureSources
from switchkd.serve.http.public_addresses import is_public
from switchkd.serve.http.remote_pictures import RemotePictureError, RemotePictures
from switchkd.serve.http.server import listen
from switchkd.serve.scheduling import EngineOpening, Limits, Scheduler

if TYPE_CHECKING:
    from tests.serve.http.conftest import Server

INSIDE = [
    "0.0.0.0",
    "0.1.2.3",
    "10.0.0.1",
    "100.64.0.1",
    "100.100.100.200",
    "127.0.0.1",
    "127.9.9.9",
    "168.63.129.16",
    "169.254.169.254",
    "169.254.170.2",
    "172.16.0.1",
    "172.31.255.255",
    "192.0.0.1",
    "192.0.0.192",
    "192.0.2.1",
    "192.88.99.1",
    "192.168.1.1",
    "198.18.0.1",
    "198.51.100.1",
    "203.0.113.1",
    "224.0.0.1",
    "239.255.255.255",
    "240.0.0.1",
    "255.255.255.255",
    "::",
    "::1",
    "::127.0.0.1",
    "::8.8.8.8",
    "::ffff:127.0.0.1",
    "::ffff:8.8.8.8",
    "::ffff:0:7f00:1",
    "64:ff9b::7f00:1",
    "64:ff9b::808:808",
    "64:ff9b:1::1",
    "100::1",
    "2001::1",
    "2001:0:7f00:1::1",
    "2001:db8::1",
    "2001:10::1",
    "2002:7f00:1::1",
    "2002:808:808::1",
    "3fff::1",
    "5f00::1",
    "fc00::1",
    "fd00:ec2::254",
    "fe80::1",
    "fe80::1%eth0",
    "fec0::1",
    "ff02::1",
    "4000::1",
    "localhost",
    "2130706433",
    "0x7f000001",
]
OUTSIDE = [
    "1.1.1.1",
    "8.8.8.8",
    "9.255.255.255",
    "11.0.0.1",
    "100.63.255.255",
    "172.32.0.1",
    "192.169.0.1",
    "2606:4700::1",
    "2a00:1450::5",
]


def always(answer: bytes) -> Callable[[int], bytes]:
    def give(number: int) -> bytes:
        return answer

    return give


@contextmanager
def listener(address: str, answer: Callable[[int], bytes] = lambda _: b"") -> Iterator[tuple[int, list[bytes]]]:
    """Listen, answer each caller with what `answer` gives for its number, and keep what they sent."""
    with socket.create_server((address, 0)) as server:
        heads: list[bytes] = []

        def work() -> None:
            while True:
                try:
                    caller, _ = server.accept()
                except OSError:
                    return
                with caller, suppress(OSError):
                    heads.append(caller.recv(65536))
                    caller.sendall(answer(len(heads)))

        threading.Thread(target=work, daemon=True).start()
        try:
            yield server.getsockname()[1], heads
        finally:
            server.shutdown(socket.SHUT_RDWR)


def test_no_spelling_leads_to_this_machine(closed_server: Server) -> None:
    with listener("127.0.0.1") as (port, heads), closed_server.http() as http:
        for spelling in HOSTILE_ADDRESSES:
            url = spelling.format(port=port)
            messages = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]
            response = http.post("/v1/chat/completions", json={"model": "long", "messages": messages, "max_tokens": 1})
            assert response.status_code == 400, spelling
            assert response.json()["error"]["code"] == "invalid_picture", spelling
        assert heads == []
    assert len(HOSTILE_ADDRESSES) > 50


def test_which_addresses_are_public() -> None:
    assert [address for address in INSIDE if is_public(address)] == []
    assert [address for address in OUTSIDE if not is_public(address)] == []


# Below, "public" is one address of this machine: the rest of the way is what it is for any other.


def fetch(url: str, most_bytes: int = 10_000, seconds: float = 5.0, allowed: str = "127.0.0.2") -> bytes:
    return asyncio.run(RemotePictures(most_bytes, seconds, is_allowed=lambda address: address == allowed).fetch(url))


def response(status: str, body: bytes = b"", *headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", "Connection: close", *headers]
    return "\r\n".join([*lines, "", ""]).encode() + body


def test_a_picture_comes_from_the_address_that_was_checked() -> None:
    content = io.BytesIO()
    Image.new("RGB", (9, 9)).save(content, "PNG")
    with listener("127.0.0.2", always(response("200 OK", content.getvalue()))) as (port, heads):
        assert fetch(f"http://127.0.0.2:{port}/a/b.png?c=d#e") == content.getvalue()
    assert heads[0].startswith(b"GET /a/b.png?c=d HTTP/1.1\r\n")
    assert f"\r\nHost: 127.0.0.2:{port}\r\n".encode() in heads[0]


def test_every_redirect_is_checked_anew() -> None:
    with listener("127.0.0.1") as (inside, heads):
        for target in (
            f"http://127.0.0.1:{inside}/",
            f"//127.0.0.1:{inside}/",
            "file:///etc/passwd",
            "http://[::1]/",
            "",
        ):
            answer = response("302 Found", b"", f"Location: {target}")
            with listener("127.0.0.2", always(answer)) as (port, _), pytest.raises(RemotePictureError):
                fetch(f"http://127.0.0.2:{port}/")
        assert heads == []


@pytest.mark.parametrize(("redirects", "arrives"), [(3, True), (4, False)])
def test_redirects_are_followed_three_times(redirects: int, arrives: bool) -> None:
    def answer(number: int) -> bytes:
        return (
            response("301 Moved", b"", f"Location: /{number}") if number <= redirects else response("200 OK", b"here")
        )

    with listener("127.0.0.2", answer) as (port, heads):
        if arrives:
            assert fetch(f"http://127.0.0.2:{port}/") == b"here"
        else:
            with pytest.raises(RemotePictureError, match="more than 3 times"):
                fetch(f"http://127.0.0.2:{port}/")
        assert len(heads) == 4


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (response("200 OK", b"x" * 10_001), "larger than 10,000 bytes"),
        (b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + b"x" * 10_001, "larger than 10,000 bytes"),
        (response("404 Not Found", b"x"), "status 404"),
        (b"SSH-2.0-OpenSSH\r\n", "could not be fetched"),
        (b"", "could not be fetched"),
    ],
)
def test_what_is_no_picture_for_us(answer: bytes, message: str) -> None:
    with listener("127.0.0.2", always(answer)) as (port, _), pytest.raises(RemotePictureError, match=message):
        fetch(f"http://127.0.0.2:{port}/")


def test_a_server_that_never_ends_is_left() -> None:
    stop = threading.Event()

    def answer(number: int) -> bytes:
        stop.wait(30)
        return b""

    with listener("127.0.0.2", answer) as (port, _), pytest.raises(RemotePictureError, match=r"in time|within"):
        fetch(f"http://127.0.0.2:{port}/", seconds=0.3)
    stop.set()


def test_a_caller_that_leaves_stops_the_fetch(long_bundle: Path) -> None:
    """Of a server that would never answer, within a limit of minutes: only the caller's leaving can end it."""
    remote = RemotePictures(10_000, 250.0, is_allowed=lambda address: address == "127.0.0.2")
    parts = [{"type": "image_url", "image_url": {"url": "PLACE"}}]
    body = {"model": "long", "messages": [{"role": "user", "content": parts}]}

    async def work() -> None:
        left = asyncio.Event()

        async def keep_waiting(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            while await reader.read(65536):
                pass
            left.set()
            writer.close()

        far = await asyncio.start_server(keep_waiting, "127.0.0.2", 0)
        parts[0]["image_url"] = {"url": f"http://127.0.0.2:{far.sockets[0].getsockname()[1]}/"}
        async with far, application(long_bundle, remote) as (url, metrics), httpx.AsyncClient() as client:
            for _ in range(10):  # more than there are places to fetch at a time
                left.clear()
                with pytest.raises(httpx.ReadTimeout):
                    await client.post(f"{url}/v1/chat/completions", json=body, timeout=httpx.Timeout(9, read=0.2))
                await left.wait()
            assert 'switchkd_requests_total{route="/v1/chat/completions",status="499"} 10.0' in metrics.text().decode()

    asyncio.run(work())


@asynccontextmanager
async def application(bundle: Path, remote: RemotePictures) -> AsyncIterator[tuple[str, Metrics]]:
    """The server in this process, with its fetching made by the test."""
    metrics = Metrics()
    scheduler = Scheduler(EngineOpening(bundle, "fp32", 1), Limits(), lambda _: None)
    life = asyncio.create_task(scheduler.run())
    app = build_application(ServerSettings(), {"long": scheduler}, {}, metrics, remote)
    listening = listen("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="off"))
    web = asyncio.create_task(server.serve(sockets=[listening]))
    try:
        await scheduler.opened
        yield f"http://127.0.0.1:{listening.getsockname()[1]}", metrics
    finally:
        server.should_exit = True
        scheduler.close()
        await asyncio.gather(web, life)


def test_what_came_from_outside_is_a_picture_or_refused(closed_server: Server) -> None:
    """The name is unknown here, where tests have no network; what matters is that it is said in one line."""
    messages: list[Any] = [
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "https://no-such-host.invalid/a.png"}}]}
    ]
    with closed_server.http() as http:
        error = http.post("/v1/chat/completions", json={"model": "long", "messages": messages}).json()["error"]
    assert error["message"] == (
        "messages[0].content[0].image_url.url: the picture has a host that is unknown; send it as a data: URI"
    )


def test_pictures_from_elsewhere_have_one_limit_together() -> None:
    content = io.BytesIO()
    Image.effect_noise((60, 60), 50).save(content, "PNG")
    size = len(content.getvalue())

    async def read(port: int, pictures: int) -> int:
        remote = RemotePictures(10_000, is_allowed=lambda address: address == "127.0.0.2")
        sources = PictureSources(16, 25.0, 2 * size, remote)
        return len(await sources.read([("where", f"http://127.0.0.2:{port}/")] * pictures))

    with listener("127.0.0.2", always(response("200 OK", content.getvalue()))) as (port, _):
        assert asyncio.run(read(port, 2)) == 2
        with pytest.raises(ApiError, match="larger than"):
            asyncio.run(read(port, 3))
