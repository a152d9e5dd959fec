"""What is refused, with a status, the parameter and a way out: parameters, bodies, pictures."""

from __future__ import annotations

import base64
import io
import json
import struct
import zlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import openai
import pytest
from PIL import Image

if TYPE_CHECKING:
    from tests.serve.http.conftest import Server

HI = [{"role": "user", "content": "Hi"}]
CHAT = "/v1/chat/completions"


def refused(server: Server, status: int = 400, **changes: Any) -> dict[str, Any]:
    """Post a request that is right but for the changes, and return the error."""
    with server.http() as http:
        response = http.post(CHAT, json={"model": "long", "messages": HI, "max_tokens": 4, **changes})
    assert response.status_code == status, response.text
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


@pytest.mark.parametrize(
    ("parameter", "value"),
    [
        ("tools", []),
        ("tool_choice", "none"),
        ("functions", []),
        ("response_format", {"type": "json_object"}),
        ("logit_bias", {}),
        ("modalities", ["text"]),
        ("service_tier", "auto"),
        ("store", True),
        ("reasoning_effort", "low"),
        ("parallel_tool_calls", False),
        ("best_of", 2),
        ("echo", True),
        ("no_such_parameter", None),
    ],
)
def test_a_parameter_that_is_not_followed_is_named(server: Server, parameter: str, value: Any) -> None:
    error = refused(server, **{parameter: value})
    assert (error["param"], error["code"], error["type"]) == (
        parameter,
        "unsupported_parameter",
        "invalid_request_error",
    )
    assert error["message"] == f"{parameter}: not supported; leave it out"


@pytest.mark.parametrize(
    ("changes", "param", "message"),
    [
        ({"top_logprobs": 3}, None, "set logprobs to true"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "less than or equal to 20"),
        ({"n": 2}, "n", "1"),
        ({"frequency_penalty": 0.5}, "frequency_penalty", "0"),
        ({"messages": []}, "messages", "at least 1 item"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0]", "role system or user or assistant"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "missing"),
        ({"messages": [{"role": "user", "content": "x", "name": "a"}]}, "messages[0].name", "not supported"),
        ({"messages": [{"role": "user", "content": []}]}, "messages[0].content", "at least 1 item"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content", "string"),
        ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, "messages[0].content[0]", "text or image"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
            "messages[0].content[0].image_url",
            "",
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x", "detail": 1}}]}
                ]
            },
            "messages[0].content[0].image_url.detail",
            "auto",
        ),
        (
            {"messages": [{"role": "assistant", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0].content[0].type",
            "text",
        ),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": "4"}, "max_tokens", "integer"),
        ({"max_completion_tokens": 5}, None, "are different"),
        ({"stream": 1}, "stream", "boolean"),
        ({"stream_options": {"include_usage": True}}, None, "set stream to true"),
        ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation", ""),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop", "at most 4"),
        ({"stop": ""}, "stop", "at least 1 character"),
        ({"stop": ["a", 3]}, "stop[1]", "string"),
        ({"temperature": -1}, "temperature", "expected 0 (greedy)"),
        ({"temperature": "hot"}, "temperature", "number"),
        ({"top_p": 0}, "top_p", "expected more than 0"),
        ({"top_k": -1}, "top_k", "expected 0"),
        ({"seed": -1}, "seed", "expected 0 or more"),
        ({"user": 3}, "user", "string"),
        (
            {"messages": [{"role": "user", "content": "x" * 1_000_001}]},
            None,
            "1,000,001 characters, expected 1,000,000",
        ),
    ],
)
def test_a_wrong_value_is_named(server: Server, changes: dict[str, Any], param: str | None, message: str) -> None:
    error = refused(server, **changes)
    assert error["param"] == param
    assert message in error["message"]
    assert error["code"] in ("invalid_value", "missing_required_parameter", "unsupported_parameter")


@pytest.mark.parametrize("stream", [False, True])
def test_what_the_engine_refuses_is_said_in_its_words(server: Server, stream: bool) -> None:
    """Before a stream begins, so that the status tells."""
    messages = [{"role": "user", "content": "What is <image>?"}]
    assert "leave <image> out of the text" in refused(server, messages=messages, stream=stream)["message"]
    long = [{"role": "user", "content": "Hi " * 600}]
    assert "the model reads at most 511" in refused(server, messages=long, stream=stream, model="bundle")["message"]


def test_an_unknown_model_and_route_and_method(server: Server) -> None:
    with pytest.raises(openai.NotFoundError, match="there are bundle, long, bundle:fp32") as caught:
        server.client().chat.completions.create(model="gpt-4o", messages=[{"role": "user", "content": "Hi"}])
    assert caught.value.code == "model_not_found"
    with server.http() as http:
        for method, path, status in (("GET", CHAT, 405), ("POST", "/v1/completions", 404), ("GET", "/docs", 404)):
            response = http.request(method, path)
            assert (response.status_code, response.json()["error"]["code"]) == (status, None)


# --- bodies ---


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"3", b"\xff\xfe", b'{"model": "\\ud800"}', b"[" * 100_000])
def test_a_body_that_is_no_request(server: Server, body: bytes) -> None:
    with server.http() as http:
        response = http.post(CHAT, content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", None])
def test_a_body_that_a_page_could_send_unasked(server: Server, kind: str | None) -> None:
    body = json.dumps({"model": "bundle", "messages": HI}).encode()
    with server.http() as http:
        response = http.post(CHAT, content=body, headers={"Content-Type": kind} if kind else {})
    assert (response.status_code, response.json()["error"]["code"]) == (415, "unsupported_media_type")


@pytest.mark.parametrize("is_chunked", [False, True])
def test_a_body_beyond_the_limit_is_refused_as_it_arrives(closed_server: Server, is_chunked: bool) -> None:
    sent = 0

    def chunks() -> Iterator[bytes]:
        nonlocal sent
        for _ in range(1024):
            sent += 65536
            yield b" " * 65536

    with closed_server.http() as http:
        body: Any = chunks() if is_chunked else b" " * (2**20 + 1)
        response = http.post(CHAT, content=body, headers={"Content-Type": "application/json"})
        assert (response.status_code, response.json()["error"]["code"]) == (413, "body_too_large")
        assert sent < 16 * 2**20  # of 64
        fits = json.dumps({"model": "long", "messages": HI, "max_tokens": 2}).encode().ljust(2**20)
        assert http.post(CHAT, content=fits, headers={"Content-Type": "application/json"}).status_code == 200


# --- pictures ---


def picture(url: str) -> list[Any]:
    return [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]


def as_uri(content: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


def png(width: int, height: int, rows: bytes = b"") -> bytes:
    """A PNG of a header that says so, whatever its rows hold."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + rows


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("data:image/png;base64,####", "base64 is broken"),
        ("data:image/png;base64,aGVsbG8", "base64 is broken"),
        ("data:image/png;base64,", "not a picture"),
        ("data:image/png;base64,aGVsbG8=", "not a picture"),
        ("data:image/png,hello", "not base64"),
        ("data:", "not base64"),
        ("file:///etc/hostname", "no data: URI"),
        ("/etc/hostname", "no data: URI"),
        ("picture.png", "no data: URI"),
        ("http://127.0.0.1/picture.png", "--allow-remote-pictures"),
        ("https://example.org/picture.png", "--allow-remote-pictures"),
        ("", "no data: URI"),
        (as_uri(png(65_000, 65_000)), "pixels"),
        (as_uri(png(5001, 5000)), "5001 x 5000 pixels, more than 25 megapixels"),
        (as_uri(png(40, 40)), "damaged"),
        (as_uri(b"<svg xmlns='http://www.w3.org/2000/svg'/>"), "not a picture"),
        (as_uri(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"), "not a picture"),
    ],
)
def test_a_picture_that_is_none(server: Server, url: str, message: str) -> None:
    error = refused(server, messages=picture(url))
    assert message in error["message"]
    assert error["param"] in ("messages[0].content[0].image_url.url", "messages")


@pytest.mark.parametrize("kind", ["TIFF", "ICO", "JPEG2000", "PPM", "DIB"])
def test_a_format_beyond_those_of_the_web(server: Server, data_uri: Callable[..., str], kind: str) -> None:
    error = refused(server, messages=picture(data_uri(Image.new("RGB", (32, 32)), kind, "image/png")))
    assert f"the picture is {kind}, expected one of JPEG, PNG, WebP, GIF, BMP, AVIF" in error["message"]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "AVIF"])
def test_a_picture_cut_short(server: Server, pictures: list[Image.Image], kind: str) -> None:
    content = io.BytesIO()
    pictures[2].save(content, kind)
    error = refused(server, messages=picture(as_uri(content.getvalue()[: len(content.getvalue()) // 2])))
    assert "the picture" in error["message"]


def test_the_largest_picture_is_a_setting(closed_server: Server, data_uri: Callable[..., str]) -> None:
    error = refused(closed_server, messages=picture(data_uri(Image.new("RGB", (251, 200)))))
    assert "251 x 200 pixels, more than 0.05 megapixels" in error["message"]


def test_more_pictures_than_a_request_may_have(server: Server, data_uri: Callable[..., str]) -> None:
    messages = picture(data_uri(Image.new("RGB", (8, 8))))
    messages[0]["content"] *= 17
    assert refused(server, messages=messages)["code"] == "too_many_pictures"


def test_nothing_that_was_asked_is_logged(server: Server, closed_server: Server) -> None:
    secret = "the-prompt-of-this-test-4711"
    for each in (server, closed_server):
        client = each.client()
        messages: Any = [{"role": "user", "content": secret}]
        client.chat.completions.create(model="long", messages=messages, max_tokens=2)
        for wrong in ([{"role": "user", "content": secret + "<image>"}], picture(f"data:{secret};base64,####")):
            refused(each, messages=wrong)
        refused(each, messages=[{"role": secret, "content": secret, secret: secret}])
        with each.http() as http:
            assert http.get(f"/v1/models?key={secret}").status_code == 200
        log = each.log.read_text()
        assert '"POST /v1/chat/completions HTTP/1.1" 200' in log
        assert '"GET /v1/models HTTP/1.1" 200' in log
        assert secret not in log
        assert each.key not in log or each.key == "none"
