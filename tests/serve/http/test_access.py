"""Closed by default: keys on every route, this machine's names alone without one, other origins' pages left out."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import httpx
import openai
import pytest
from fastapi.routing import APIRoute
from starlette.routing import Route

from switchkd.serve.http import ServerSettings, build_application
from switchkd.serve.http.metrics import Metrics

if TYPE_CHECKING:
    from tests.serve.http.conftest import Server

OPEN = {"/health", "/ready"}


def routes() -> list[tuple[str, str]]:
    """Every method and path that a server has."""

    async def build() -> Any:
        return build_application(ServerSettings(), {}, {}, Metrics())

    app = asyncio.run(build())
    assert all(isinstance(route, Route | APIRoute) for route in app.routes)
    return sorted((method, route.path) for route in app.routes for method in route.methods)


def test_every_route_but_two_needs_the_key(closed_server: Server) -> None:
    found = routes()
    assert {"/v1/chat/completions", "/v1/models", "/metrics", "/openapi.json", *OPEN} <= {path for _, path in found}
    with httpx.Client() as http:
        for method, path in [*found, ("GET", "/no-such-route"), ("GET", "/health/"), ("PUT", "//")]:
            for headers in wrong_keys(closed_server.key):
                response = http.request(method, closed_server.url + path, headers=headers)
                if path in OPEN:
                    assert response.status_code == 200
                else:
                    assert response.status_code == 401, (method, path)
                    assert response.headers["www-authenticate"] == "Bearer"
                    if method != "HEAD":
                        assert response.json()["error"]["code"] == "invalid_api_key"
    with closed_server.http() as http:
        assert http.get("/v1/models").status_code == 200
        assert http.get("/openapi.json").status_code == 200


def wrong_keys(key: str) -> list[dict[str, str]]:
    words = [
        "",
        "Bearer",
        "Bearer x",
        f"Bearer {key}x",
        f"Bearer {key[:-1]}",
        f"Basic {key}",
        key,
        f"Bearer {key} {key}",
    ]
    return [{}, {"X-Api-Key": key}, *({"Authorization": word} for word in words)]


def test_the_client_says_that_its_key_is_wrong(closed_server: Server) -> None:
    client = openai.OpenAI(base_url=f"{closed_server.url}/v1", api_key="wrong", max_retries=0)
    with pytest.raises(openai.AuthenticationError, match="the key is missing or wrong"):
        client.models.list()


def test_without_a_key_the_server_answers_to_its_own_names_alone(server: Server, closed_server: Server) -> None:
    """A page's name may be made to lead to this machine; its requests carry that name."""
    port = server.url.rpartition(":")[2]
    for host in ("localhost", f"localhost:{port}", f"127.0.0.1:{port}", f"[::1]:{port}", "LOCALHOST"):
        assert httpx.get(f"{server.url}/v1/models", headers={"Host": host}).status_code == 200
    for host in (
        "attacker.example",
        f"attacker.example:{port}",
        "localhost.attacker.example",
        f"127.0.0.1.x:{port}",
        "x",
    ):
        response = httpx.get(f"{server.url}/v1/models", headers={"Host": host})
        assert (response.status_code, response.json()["error"]["code"]) == (403, "wrong_host")
    with closed_server.http() as http:  # there the key tells
        assert http.get("/v1/models", headers={"Host": "model.example"}).status_code == 200


def test_other_origins_are_let_in_by_name(server: Server, closed_server: Server) -> None:
    asking = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type,authorization"}
    for url, origin, allowed in (
        (server.url, "https://page.example", None),
        (closed_server.url, "https://page.example", "https://page.example"),
        (closed_server.url, "https://other.example", None),
    ):
        response = httpx.options(f"{url}/v1/chat/completions", headers={"Origin": origin, **asking})
        assert response.headers.get("access-control-allow-origin") == allowed
        assert (response.status_code == 200) == (allowed is not None)
    refused = httpx.get(f"{closed_server.url}/v1/models", headers={"Origin": "https://page.example"})
    assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, "https://page.example")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1"])
def test_an_address_that_others_reach_needs_a_key(host: str) -> None:
    words = [sys.executable, "-m", "switchkd.cli.main", "serve", "no-such-bundle", "--host", host]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert f"--host is {host}, which others can reach, and there is no key" in done.stderr
    assert done.stderr.count("\n") == 1
    assert ServerSettings(host=host, api_key="k").host == host
    assert ServerSettings(host=host, allow_without_key=True).host == host
