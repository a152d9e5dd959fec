"""Pictures fetched from public addresses: the address that was checked is the one that is connected to."""

import asyncio
import http.client
import socket
import ssl
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import SplitResult, urljoin, urlsplit

from .public_addresses import is_public

MOST_REDIRECTS = 3
REDIRECTS = (301, 302, 303, 307, 308)
_CHUNK = 65536
_FAULTS = (OSError, http.client.HTTPException, ssl.SSLError)


class RemotePictureError(ValueError):
    """A picture's address that is not fetched from, or that gave none."""


class RemotePictures:
    """Fetches what lies at an address, within bytes and seconds."""

    def __init__(
        self, most_bytes: int, seconds: float = 10.0, *, is_allowed: Callable[[str], bool] = is_public
    ) -> None:
        self._most_bytes = most_bytes
        self._seconds = seconds
        self._is_allowed = is_allowed
        self._threads = ThreadPoolExecutor(8, thread_name_prefix="remote-picture")

    async def fetch(self, url: str) -> bytes:
        """Return the bytes at a URL. Raises RemotePictureError."""
        fetching = _Fetching(url, self._most_bytes, time.monotonic() + self._seconds, self._is_allowed)
        try:
            async with asyncio.timeout(self._seconds + 1):
                return await asyncio.get_running_loop().run_in_executor(self._threads, fetching.run)
        except TimeoutError:
            raise RemotePictureError(f"did not come within {self._seconds:g} s") from None
        finally:
            fetching.close()  # a server that sends a byte now and then would keep the thread for ever


@dataclass
class _Fetching:
    """One fetch with its redirects, in a thread."""

    url: str
    most_bytes: int
    until: float
    is_allowed: Callable[[str], bool]
    connection: "_Connection | None" = None
    is_left: bool = False

    def run(self) -> bytes:
        url = self.url
        for _ in range(MOST_REDIRECTS + 1):
            parts = split(url)
            try:
                content, location = self._get(parts)
            except TimeoutError:
                raise RemotePictureError("did not come in time") from None
            except _FAULTS as error:
                raise RemotePictureError(f"could not be fetched ({type(error).__name__})") from error
            finally:
                self._end_connection()
            if location is None:
                return content
            url = urljoin(url, location)
        raise RemotePictureError(f"was redirected more than {MOST_REDIRECTS} times")

    def close(self) -> None:
        """Wake the thread and let it end, whatever it is at."""
        self.is_left = True
        self._end_connection()

    def _end_connection(self) -> None:
        connection = self.connection
        if connection is not None:
            connection.end()

    def _get(self, parts: SplitResult) -> tuple[bytes, str | None]:
        address = self._resolve(parts)
        self.connection = _Connection(parts, address, self._left())
        self._left()  # again: whoever leaves before this line does not see the connection
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        self.connection.request("GET", target, headers={"Accept": "image/*", "Accept-Encoding": "identity"})
        response = self.connection.getresponse()
        if response.status in REDIRECTS:
            return b"", response.headers.get("location", "")
        if response.status != 200:
            raise RemotePictureError(f"came with status {response.status}")
        content = bytearray()
        while chunk := response.read1(_CHUNK):
            content += chunk
            if len(content) > self.most_bytes:
                raise RemotePictureError(f"is larger than {self.most_bytes:,} bytes")
            self._left()
        return bytes(content), None

    def _resolve(self, parts: SplitResult) -> "_Address":
        """The first of a host's addresses, all of which have to be public."""
        assert parts.hostname is not None
        port = parts.port if parts.port is not None else _port(parts)
        try:
            found = socket.getaddrinfo(parts.hostname, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError):
            raise RemotePictureError("has a host that is unknown") from None
        if not found or not all(self.is_allowed(str(info[4][0])) for info in found):
            raise RemotePictureError("leads to an address that is not on the public internet")
        return found[0][0], found[0][4]

    def _left(self) -> float:
        left = self.until - time.monotonic()
        if left <= 0 or self.is_left:
            raise TimeoutError
        return left


_Address = tuple[socket.AddressFamily, Any]


class _Connection(http.client.HTTPConnection):
    """A connection to an address that was checked, whatever its host's name leads to by now."""

    def __init__(self, parts: SplitResult, address: _Address, timeout: float) -> None:
        self.default_port = _port(parts)
        super().__init__(parts.hostname or "", parts.port or self.default_port, timeout=timeout)
        self._tls = parts.scheme == "https"
        self._address = address
        self._open: socket.socket | None = None  # a response may take `sock` over

    def connect(self) -> None:
        family, address = self._address
        self.sock = self._open = socket.socket(family, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(address)
        if self._tls:
            self.sock = self._open = ssl.create_default_context().wrap_socket(self.sock, server_hostname=self.host)

    def end(self) -> None:
        """Close, and wake the thread that may be reading."""
        if self._open is not None:
            with suppress(OSError):  # it may not be connected any more
                self._open.shutdown(socket.SHUT_RDWR)
        self.close()


def split(url: str) -> SplitResult:
    """The parts of an address that pictures may be fetched from. Raises RemotePictureError."""
    # Readers of addresses differ in what they make of these; one that is plainly written has none.
    if not url.isascii() or any(character <= " " or character in "\\\x7f" for character in url):
        raise RemotePictureError("holds spaces, backslashes or other characters that an address has not")
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise RemotePictureError("is no address") from None
    if parts.scheme not in ("http", "https"):
        raise RemotePictureError("is neither a data: URI nor an http or https address")
    if not parts.hostname or port == 0:
        raise RemotePictureError("names no host")
    if "@" in parts.netloc:
        raise RemotePictureError("holds a name or a password")
    return parts


def _port(parts: SplitResult) -> int:
    return 443 if parts.scheme == "https" else 80
