"""What the server is told: flags, the environment's variables of the same names, defaults, and their checks."""

import argparse
import ipaddress
import os
import socket
from collections.abc import Callable, Mapping
from dataclasses import Field, asdict, dataclass, field, fields
from typing import Any, Self

from ..engine.prefix_cache import PREFIX_MEMORY

PREFIX = "SWITCHKD_SERVE_"
LOG_LEVELS = ("critical", "error", "warning", "info", "debug")
_TRUE, _FALSE = ("1", "true", "yes", "on"), ("0", "false", "no", "off", "")


class SettingsError(ValueError):
    """A setting that the server cannot be started with."""


def _switch(word: str) -> bool:
    if word.lower() in _TRUE + _FALSE:
        return word.lower() in _TRUE
    raise ValueError


def _list(word: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in word.split(",") if part.strip())


_KINDS: Mapping[Callable[[str], Any], str] = {
    int: "a whole number",
    float: "a number",
    _switch: "true or false",
    _list: "words with commas between",
    str: "a word",
}


def _flag(read: Callable[[str], Any], default: Any, metavar: str, text: str) -> Any:
    return field(default=default, metadata={"read": read, "metavar": metavar, "text": text})


@dataclass(frozen=True)
class ServerSettings:
    """The server's settings, checked. Raises SettingsError."""

    host: str = _flag(str, "127.0.0.1", "HOST", "address to listen at; others than this machine's own need a key")
    port: int = _flag(int, 8000, "PORT", "port to listen at; 0 takes a free one")
    precision: tuple[str, ...] = _flag(_list, (), "P,P", "precisions to serve of each bundle (default: its first)")
    threads: int | None = _flag(int, None, "N", "threads that an engine computes with (default: one a core)")
    no_prefill: bool = _flag(_switch, False, "", "do without the precision that reads for another: less memory")
    prefix_memory: int = _flag(int, PREFIX_MEMORY, "MIB", "memory for what an engine made of pictures; 0 keeps nothing")
    prefix_folder: str | None = _flag(str, None, "FOLDER", "keep it in files too, for when the server starts again")
    parallel: int = _flag(int, 4, "N", "answers that an engine writes at a time, in turns")
    queue: int = _flag(int, 128, "N", "questions that may wait for an engine; further ones get 429")
    deadline: float = _flag(float, 300.0, "SECONDS", "time from a question to its answer's end")
    grace: float = _flag(float, 30.0, "SECONDS", "time that answers have to end after SIGTERM or Ctrl-C")
    api_key: str | None = _flag(str, None, "KEY", "key that callers have to send; better given by the environment")
    allow_without_key: bool = _flag(_switch, False, "", "listen at any address without a key")
    cors: tuple[str, ...] = _flag(_list, (), "ORIGIN,ORIGIN", "web origins whose pages may ask (default: none)")
    allow_remote_pictures: bool = _flag(_switch, False, "", "fetch pictures from public http and https addresses")
    max_body: int = _flag(int, 20, "MIB", "largest request, and the most that its remote pictures may take")
    max_pixels: float = _flag(float, 25.0, "MEGAPIXELS", "largest picture")
    max_pictures: int = _flag(int, 16, "N", "pictures in one request")
    log_level: str = _flag(str, "info", "LEVEL", f"one of {', '.join(LOG_LEVELS)}")

    def __post_init__(self) -> None:
        _check_range("port", self.port, 0, 65535)
        if self.threads is not None:
            _check_range("threads", self.threads, 1, 1024)
        _check_range("prefix-memory", self.prefix_memory, 0, 1_000_000)
        _check_range("parallel", self.parallel, 1, 1024)
        _check_range("queue", self.queue, 0, 1_000_000)
        _check_range("deadline", self.deadline, 0.001, 86_400)
        _check_range("grace", self.grace, 0, 86_400)
        _check_range("max-body", self.max_body, 1, 1024)
        _check_range("max-pixels", self.max_pixels, 0.000001, 89)  # the engine itself decodes no larger ones
        _check_range("max-pictures", self.max_pictures, 0, 10_000)
        if self.log_level not in LOG_LEVELS:
            raise SettingsError(f"--log-level is {self.log_level!r}, expected one of {', '.join(LOG_LEVELS)}")
        key = self.api_key
        if key is not None and not (key.isascii() and key.isprintable() and key and " " not in key):
            raise SettingsError(
                "--api-key is empty, or holds spaces, line ends or more than ASCII; no header carries it, give another"
            )
        for origin in self.cors:
            if origin != "*" and not origin.startswith(("http://", "https://")):
                raise SettingsError(f"--cors is {origin!r}, expected an origin such as https://example.org")
        if self.api_key is None and not self.allow_without_key and not is_loopback(self.host):
            raise SettingsError(
                f"--host is {self.host}, which others can reach, and there is no key; set {PREFIX}API_KEY, or let "
                "everybody in with --allow-without-key"
            )

    @classmethod
    def resolve(cls, args: argparse.Namespace, environment: Mapping[str, str] = os.environ) -> Self:
        """The settings of a command line over those of the environment over the defaults. Raises SettingsError."""
        values: dict[str, Any] = {}
        for setting in fields(cls):
            given, name = getattr(args, setting.name), variable(setting)
            if given is not None:
                values[setting.name] = _read(setting, given, flag(setting))
            elif name in environment:
                values[setting.name] = _read(setting, environment[name], name)
        return cls(**values)

    def shown(self) -> dict[str, Any]:
        """The settings as they may be shown: the key masked."""
        return asdict(self) | {"api_key": None if self.api_key is None else "***"}

    @property
    def body_bytes(self) -> int:
        """The largest request in bytes."""
        return self.max_body * 2**20


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Declare a flag for every setting; a flag that is not given is None."""
    for setting in fields(ServerSettings):
        read, text = setting.metadata["read"], setting.metadata["text"]
        if setting.default not in (None, (), False):
            text += (
                f" (default: {setting.default:g})"
                if isinstance(setting.default, float)
                else (f" (default: {setting.default})")
            )
        if read is _switch:
            parser.add_argument(flag(setting), dest=setting.name, action="store_const", const="true", help=text)
        else:
            parser.add_argument(flag(setting), dest=setting.name, metavar=setting.metadata["metavar"], help=text)


def flag(setting: Field[Any]) -> str:
    """A setting's flag."""
    return "--" + setting.name.replace("_", "-")


def variable(setting: Field[Any]) -> str:
    """A setting's variable in the environment."""
    return PREFIX + setting.name.upper()


def is_loopback(host: str) -> bool:
    """Whether a host's addresses are all this machine's own. Raises SettingsError where it has none."""
    try:
        found = {info[4][0] for info in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)}
    except OSError:
        raise SettingsError(
            f"--host is {host}, which is unknown; use 127.0.0.1, or 0.0.0.0 for every network of this machine"
        ) from None
    return bool(host) and all(ipaddress.ip_address(str(address).partition("%")[0]).is_loopback for address in found)


def _read(setting: Field[Any], word: str, name: str) -> Any:
    read = setting.metadata["read"]
    try:
        return read(word)
    except ValueError:
        raise SettingsError(f"{name} is {word!r}, expected {_KINDS[read]}") from None


def _check_range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:  # also where it is no number
        raise SettingsError(f"--{name} is {value:g}, expected {low:g} to {high:g}")
