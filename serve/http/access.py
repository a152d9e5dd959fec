"""Who may ask: callers with the key, and without one only those who call the server by this machine's own names."""

import hmac
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

from .api_errors import ApiError

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

WITHOUT_KEY = ("/health", "/ready")  # whoever watches over the server's process asks these
_OWN_NAMES = ("localhost", "127.0.0.1", "[::1]")


class Access:
    """Lets a request through, or answers it with 401 or 403; it stands before the router, so that no route slips by."""

    def __init__(self, app: Application, key: str | None, own_names_only: bool) -> None:
        self._app = app
        self._key = None if key is None else key.encode()
        self._own_names_only = own_names_only

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        error = self._objection(scope) if scope["type"] == "http" else None
        if error is None:
            await self._app(scope, receive, send)
        else:
            await error.response()(scope, receive, send)

    def _objection(self, scope: Scope) -> ApiError | None:
        headers: Mapping[bytes, bytes] = dict(scope["headers"])
        # A page whose name was made to lead to this machine calls us by that name.
        if self._own_names_only and _name(headers.get(b"host", b"")) not in _OWN_NAMES:
            return ApiError(
                403, "without a key this server answers to localhost alone; start it with a key", code="wrong_host"
            )
        if self._key is None or scope["path"] in WITHOUT_KEY:
            return None
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        if scheme.lower() == b"bearer" and hmac.compare_digest(given.strip(), self._key):
            return None
        return ApiError(
            401,
            "the key is missing or wrong; send it as the header Authorization: Bearer KEY",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )


def _name(host: bytes) -> str:
    """The Host header less its port."""
    name, colon, port = host.decode("latin-1").lower().rpartition(":")
    return name if colon and port.isdecimal() else host.decode("latin-1").lower()
