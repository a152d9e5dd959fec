"""The server's life: engines opened, the address listened at, and an orderly end after a signal."""

import asyncio
import errno
import logging
import os
import signal
import socket
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn

from switchkd.export.contract.bundle import Bundle
from switchkd.export.contract.picture_bounds import bound_pillow

from ..scheduling import AnswerRefused, EngineOpening, Limits, Scheduler
from .application import build_application
from .metrics import Metrics
from .remote_pictures import RemotePictures
from .settings import ServerSettings, SettingsError

log = logging.getLogger(__name__)
LAST_WORDS = 5  # seconds in which the last bytes are taken from us


@dataclass(frozen=True)
class ServedModels:
    """What is served: engines by name and precision, and the plain name of each bundle's first precision."""

    openings: Mapping[str, EngineOpening]
    aliases: Mapping[str, str]


def served_models(folders: Sequence[str], settings: ServerSettings) -> ServedModels:
    """Read the bundles' manifests and name their models. Raises BundleError or SettingsError."""
    by_name: dict[str, Path] = {}
    openings: dict[str, EngineOpening] = {}
    aliases: dict[str, str] = {}
    for folder in folders:
        path = Path(os.path.abspath(folder))  # noqa: PTH100 - a link keeps its own name, which `resolve` would lose
        name = path.name
        if name in by_name:
            raise SettingsError(f"{by_name[name]} and {path} have the same name; rename one, callers ask by it")
        by_name[name] = path
        for precision in settings.precision or (None,):
            found = Bundle.open(path, precision).precision
            openings[f"{name}:{found}"] = EngineOpening(
                path,
                found,
                settings.threads,
                settings.log_level,
                settings.prefix_memory,
                None if settings.prefix_folder is None else Path(settings.prefix_folder),
                prefill=not settings.no_prefill,
            )
            aliases.setdefault(name, f"{name}:{found}")
    for name in aliases:
        if name in openings:  # a bundle's folder is called as a precision of another one's
            raise SettingsError(
                f"{by_name[name]} has the name of {openings[name].bundle} in {openings[name].precision}, {name}; "
                "rename one, callers ask by it"
            )
    return ServedModels(openings, aliases)


def serve(models: ServedModels, settings: ServerSettings, announce: Callable[[str], None]) -> None:
    """Serve until SIGTERM or Ctrl-C; `announce` is given the address when every engine is ready.

    Raises SettingsError where nothing can listen there, or a bundle turns out not to open.
    """
    logging.basicConfig(level=settings.log_level.upper(), format="%(levelname)s %(name)s: %(message)s")
    bound_pillow()
    logging.getLogger("uvicorn.access").addFilter(_without_query)
    with listen(settings.host, settings.port) as server_socket:
        asyncio.run(_serve(models, settings, server_socket, announce))


def _without_query(record: logging.LogRecord) -> bool:
    """Leave out of the access log what somebody may have put a key into."""
    if isinstance(record.args, tuple):
        record.args = tuple(part.partition("?")[0] if isinstance(part, str) else part for part in record.args)
    return True


def listen(host: str, port: int) -> socket.socket:
    """Take an address. Raises SettingsError with the way out where it cannot be had."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP)
        family, kind, protocol, _, address = found[0]
        # With its protocol named, asyncio sends what is small at once: otherwise each piece may wait for 40 ms.
        server_socket = socket.socket(family, kind, protocol)
    except OSError as error:
        raise _cannot_listen(host, port, error) from None
    try:
        if os.name == "posix":  # elsewhere it would let two servers have one port
            server_socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server_socket.bind(address)
        server_socket.listen(2048)
    except OSError as error:
        server_socket.close()
        raise _cannot_listen(host, port, error) from None
    return server_socket


def _cannot_listen(host: str, port: int, error: OSError) -> SettingsError:
    if error.errno == errno.EADDRINUSE:
        reason = f"port {port} is in use; stop the program that listens there, or choose another with --port"
    elif error.errno == errno.EACCES:
        reason = f"port {port} needs more rights; choose one from 1024 to 65535 with --port"
    else:
        reason = f"cannot listen at {host}:{port} ({error.strerror}); choose another with --host or --port"
    return SettingsError(reason)


class _Server(uvicorn.Server):
    """uvicorn with its hands off the signals: it would close before answers are finished, and end by the signal."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave them to us."""
        yield


class _Stopping:
    """Signals heard: the first asks for an orderly end, the second for one at once."""

    def __init__(self) -> None:
        self.asked, self.at_once = asyncio.Event(), asyncio.Event()
        loop = asyncio.get_running_loop()

        def hear(number: int, frame: FrameType | None) -> None:
            del number, frame
            loop.call_soon_threadsafe(self._hear)

        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, hear)

    def _hear(self) -> None:
        (self.at_once if self.asked.is_set() else self.asked).set()


async def _serve(
    models: ServedModels, settings: ServerSettings, server_socket: socket.socket, announce: Callable[[str], None]
) -> None:
    stopping, metrics = _Stopping(), Metrics()
    limits = Limits(settings.parallel, settings.queue, settings.deadline)
    schedulers = {
        name: Scheduler(opening, limits, partial(metrics.count_answer, name))
        for name, opening in models.openings.items()
    }
    remote = RemotePictures(settings.body_bytes) if settings.allow_remote_pictures else None
    app = build_application(settings, schedulers, models.aliases, metrics, remote)
    config = uvicorn.Config(
        app,
        http="h11",
        ws="none",
        lifespan="off",
        log_config=None,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=LAST_WORDS,
    )
    server = _Server(config)
    lives = [asyncio.create_task(scheduler.run()) for scheduler in schedulers.values()]
    web = asyncio.create_task(server.serve(sockets=[server_socket]))
    asked = asyncio.create_task(stopping.asked.wait())
    try:
        opened = asyncio.gather(*(scheduler.opened for scheduler in schedulers.values()))
        ends: list[asyncio.Future[Any]] = [asked, web, *lives]
        await asyncio.wait([opened, *ends], return_when=asyncio.FIRST_COMPLETED)
        if opened.done():
            opened.result()
            announce(_address(server_socket))
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        await _finish(schedulers.values(), stopping, settings.grace)
    except AnswerRefused as error:  # by a bundle that cannot be opened
        raise SettingsError(str(error)) from None
    finally:
        for scheduler in schedulers.values():
            scheduler.close()
        server.should_exit = True
        await asyncio.gather(web, *lives)
        asked.cancel()


async def _finish(schedulers: Collection[Scheduler], stopping: _Stopping, grace: float) -> None:
    """Take nothing new, and give what was accepted its time."""
    for scheduler in schedulers:
        scheduler.stop_accepting()
    log.info("shutting down; answers under way have %g s", grace)
    idle = asyncio.create_task(_all_idle(schedulers))
    at_once = asyncio.create_task(stopping.at_once.wait())
    ends: list[asyncio.Future[Any]] = [idle, at_once]
    await asyncio.wait(ends, timeout=grace, return_when=asyncio.FIRST_COMPLETED)
    for end in ends:
        end.cancel()


async def _all_idle(schedulers: Collection[Scheduler]) -> None:
    for scheduler in schedulers:
        await scheduler.idle()


def _address(server_socket: socket.socket) -> str:
    host, port = server_socket.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
