"""/openapi.json: what it refers to is there, and what it says of errors is what the page says."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from switchkd.serve.http import ServerSettings, build_application
from switchkd.serve.http.metrics import Metrics

if TYPE_CHECKING:
    from tests.serve.http.conftest import Server


def described(**settings: Any) -> Any:
    async def build() -> Any:
        return build_application(ServerSettings(**settings), {}, {}, Metrics()).openapi()

    return asyncio.run(build())


def references(node: Any) -> Iterator[str]:
    """Everything that a document refers to."""
    children = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    if isinstance(node, dict) and isinstance(node.get("$ref"), str):
        yield node["$ref"]
    for child in children:
        yield from references(child)


def test_every_reference_leads_somewhere(server: Server) -> None:
    with server.http() as http:
        document = http.get("/openapi.json").json()
    names = document["components"]["schemas"]["ChatRequest"]["properties"]["model"].pop("enum")
    assert names == ["bundle", "long", "bundle:fp32", "bundle:int8", "long:fp32", "long:int8"]
    assert document == described()
    found = set(references(document))
    assert {"#/components/schemas/ChatRequest", "#/components/schemas/ImagePart"} <= found
    for reference in found:
        place = document
        for step in reference.removeprefix("#/").split("/"):
            place = place[step]
        assert place
    assert "$defs" not in str(document)
    assert document["openapi"].startswith("3.1.")


def test_the_request_is_described_field_by_field() -> None:
    schemas = described()["components"]["schemas"]
    request = schemas["ChatRequest"]
    assert request["required"] == ["model", "messages"]
    assert request["additionalProperties"] is False
    assert request["properties"]["top_logprobs"]["anyOf"][0] == {"type": "integer", "minimum": 0, "maximum": 20}
    ranges = {name: {**request["properties"][name]} for name in ("temperature", "top_p", "top_k", "seed")}
    assert ranges["temperature"].items() >= {"minimum": 0, "maximum": 100}.items()
    assert ranges["top_p"].items() >= {"exclusiveMinimum": 0, "maximum": 1}.items()
    assert ranges["top_k"]["minimum"] == ranges["seed"]["minimum"] == 0
    assert schemas["ImagePart"]["properties"]["image_url"] == {"$ref": "#/components/schemas/ImageUrl"}


def test_the_errors_are_those_of_the_page() -> None:
    page = (Path(__file__).resolve().parents[3] / "docs" / "serving.md").read_text(encoding="utf-8")
    said = {int(status) for status in re.findall(r"^\| (\d{3}) \|", page, re.MULTILINE)}
    described_statuses = set(described()["paths"]["/v1/chat/completions"]["post"]["responses"]) - {"200"}
    assert {str(status) for status in said - {405}} == described_statuses  # 405: there is no such operation


def test_a_stream_is_no_text_of_json() -> None:
    answered = described()["paths"]["/v1/chat/completions"]["post"]["responses"]["200"]["content"]
    assert answered["application/json"] == {"schema": {"$ref": "#/components/schemas/Completion"}}
    assert answered["text/event-stream"] == {}


def test_the_key_is_asked_for_where_there_is_one() -> None:
    paths = described(api_key="secret")["paths"]
    assert {path for path, operations in paths.items() if all("security" in each for each in operations.values())} == {
        "/v1/chat/completions",
        "/v1/models",
        "/metrics",
    }
    assert "secret" not in str(described(api_key="secret"))
    assert "security" not in str(described())
