"""A request's body, read with its limits: bytes, seconds, and JSON alone."""

import asyncio

from fastapi import Request

from .api_errors import ApiError

SECONDS = 60  # for a body to arrive


async def read_json_body(request: Request, most_bytes: int) -> bytes:
    """Return the body; raises ApiError as soon as it is too large (413), too slow (408) or not said to be JSON (415).

    Pages of other origins may send text unasked, but not JSON: a browser would ask us first, and we would refuse.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, "the Content-Type is not application/json; send JSON", code="unsupported_media_type")
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > most_bytes:
        raise _too_large(most_bytes)
    body = bytearray()
    try:
        async with asyncio.timeout(SECONDS):
            async for chunk in request.stream():
                body += chunk
                if len(body) > most_bytes:
                    raise _too_large(most_bytes)
    except TimeoutError:
        raise ApiError(
            408, f"the body did not arrive within {SECONDS} s; send it faster", code="timeout", headers=_CLOSE
        ) from None
    return bytes(body)


_CLOSE = {"Connection": "close"}  # what else of the body is under way is not for another request


def _too_large(most_bytes: int) -> ApiError:
    message = f"the body is larger than {most_bytes:,} bytes; send fewer or smaller pictures"
    return ApiError(413, message, code="body_too_large", headers=_CLOSE)
