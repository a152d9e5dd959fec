"""Bundles that would do harm are refused in one line, by `verify` and by the engine, before any session is opened."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from switchkd.cli.main import main
from switchkd.export.contract.bundle import MANIFEST, Bundle, BundleError
from switchkd.export.contract.onnx_wire import OnnxWireError, read_names
from switchkd.export.folders.digests import sha256
from switchkd.export.graphs.onnx_graph import OnnxGraph, Storage
from switchkd.serve import Engine

GRAPH = "onnx/embed_tokens.onnx"
DATA = "onnx/embed_tokens.onnx_data"


def relist(bundle: Path, *names: str) -> None:
    """Let the manifest say what is there now, as somebody who means harm would."""
    content = json.loads((bundle / MANIFEST).read_text())
    for name in names:
        content["files"][name] = {"bytes": (bundle / name).stat().st_size, "sha256": sha256(bundle / name)}
    (bundle / MANIFEST).write_text(json.dumps(content))


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A copy whose embeddings lie in a file beside the graph, and that a test may spoil."""
    copy = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    OnnxGraph(onnx.load(copy / GRAPH), {}).write(copy / GRAPH, Storage(inline_bytes=0))
    content = json.loads((copy / MANIFEST).read_text())
    next(graph for graph in content["graphs"] if graph["file"] == GRAPH)["data"] = [DATA]
    (copy / MANIFEST).write_text(json.dumps(content))
    relist(copy, GRAPH, DATA)
    assert Engine.open(copy).decoder.embed([5]).shape == (1, 32)
    return copy


def refused(bundle: Path, reason: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def no_session(*_: object, **__: object) -> None:
        raise AssertionError("a session was opened")

    with monkeypatch.context() as patch:
        patch.setattr(onnxruntime, "InferenceSession", no_session)
        with pytest.raises(BundleError, match=reason) as caught:
            Engine.open(bundle)
        assert "\n" not in str(caught.value)
        assert str(bundle) in str(caught.value)
        assert main(["verify", str(bundle)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("switchkd: error: ")
    assert str(caught.value) in error


def point_to(bundle: Path, location: str) -> None:
    model = onnx.load(bundle / GRAPH, load_external_data=False)
    (entry,) = (entry for entry in model.graph.initializer[0].external_data if entry.key == "location")
    entry.value = location
    (bundle / GRAPH).write_bytes(model.SerializeToString())
    relist(bundle, GRAPH)


@pytest.mark.parametrize(
    "location",
    ["../../secret", "/etc/hostname", "../manifest.json", "sub/../embed_tokens.onnx_data", "*/_ORT_MEM_ADDR_/*", ""],
)
def test_weights_from_elsewhere(
    bundle: Path, location: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    point_to(bundle, location)
    refused(bundle, "keeps weights in .*which the manifest does not list for it", capsys, monkeypatch)


def test_weights_that_link_outside(
    bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (bundle / DATA).rename(bundle.parent / "secret")
    (bundle / DATA).symlink_to(bundle.parent / "secret")
    refused(bundle, "embed_tokens.onnx_data: links to outside the bundle", capsys, monkeypatch)


def test_weights_that_the_hubs_cache_keeps_elsewhere(
    bundle: Path, tmp_path: Path, to_hub_cache: Callable[[Path, Path], Path]
) -> None:
    snapshot = to_hub_cache(bundle, tmp_path / "cache")
    assert (snapshot / DATA).is_symlink()
    there, here = (Engine.open(place).decoder.embed([5]) for place in (snapshot, bundle))
    np.testing.assert_array_equal(there, here)


def test_weights_missing_or_cut(
    bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with (bundle / DATA).open("r+b") as file:
        file.truncate(100)
    refused(bundle, "embed_tokens.onnx_data: 100 bytes, the manifest says 38,400", capsys, monkeypatch)
    (bundle / DATA).unlink()
    refused(bundle, "embed_tokens.onnx_data: missing", capsys, monkeypatch)


def test_altered_weights_are_found_by_verify(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (bundle / DATA).open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x7f")
    assert main(["verify", str(bundle)]) == 2
    assert "embed_tokens.onnx_data: its SHA-256 is not the manifest's" in capsys.readouterr().err


@pytest.mark.parametrize("place", ["node", "subgraph", "opset"])
def test_custom_operators(
    bundle: Path, place: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = onnx.load(bundle / GRAPH, load_external_data=False)
    if place == "node":
        model.graph.node[0].domain = "evil.corp"
    elif place == "subgraph":
        inner = helper.make_graph([helper.make_node("Run", [], ["y"], domain="evil.corp")], "inner", [], [])
        model.graph.node.append(helper.make_node("If", ["c"], ["d"], then_branch=inner, else_branch=inner))
    else:
        model.opset_import.append(helper.make_opsetid("evil.corp", 1))
    (bundle / GRAPH).write_bytes(model.SerializeToString())
    relist(bundle, GRAPH)
    refused(bundle, "uses operators of 'evil.corp', which ONNX Runtime lacks", capsys, monkeypatch)


@pytest.mark.parametrize("content", [b"", b"\x80\x04hello", b"\x3a\xff\xff\xff\xff\x0f", b"{}"])
def test_not_an_onnx_file(
    bundle: Path, content: bytes, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (bundle / GRAPH).write_bytes(content)
    relist(bundle, GRAPH)
    refused(bundle, r"embed_tokens\.onnx: not an ONNX graph", capsys, monkeypatch)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "onnx/weights.pkl", "training_args.PT"])
@pytest.mark.parametrize("listed", [True, False])
def test_pickles(
    bundle: Path, name: str, listed: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (bundle / name).write_bytes(b"\x80\x04N.")
    if listed:
        relist(bundle, name)
    refused(bundle, "files can hold code and belong in no bundle", capsys, monkeypatch)


def test_graphs_that_nobody_listed(
    bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (bundle / "onnx/decoder_model_merged.onnx_data").write_bytes(b"x")
    refused(bundle, r"decoder_model_merged\.onnx_data: the manifest does not list it", capsys, monkeypatch)


def test_other_files_disturb_verify_alone(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (bundle / ".gitattributes").write_text("x")
    Bundle.open(bundle, check_hashes=True)
    (bundle / "picture.png").write_bytes(b"x")  # as the card's script is used
    Engine.open(bundle)
    assert main(["verify", str(bundle)]) == 2
    assert "picture.png: the manifest does not list it" in capsys.readouterr().err


def test_what_is_read_is_what_onnx_reads(bundle: Path) -> None:
    for file in (bundle / "onnx").glob("*.onnx"):
        model = onnx.load(file, load_external_data=False)
        names = read_names(file)
        domains = {node.domain for node in model.graph.node} | {opset.domain for opset in model.opset_import}
        assert names.domains | {""} == domains | {""}
        entries = [entry for tensor in model.graph.initializer for entry in tensor.external_data]
        assert names.locations == {entry.value for entry in entries if entry.key == "location"}


def test_names_are_found_wherever_they_hide(tmp_path: Path) -> None:
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="hidden")
    sparse = onnx.SparseTensorProto(values=tensor)
    inner = helper.make_graph([helper.make_node("Constant", [], ["c"], sparse_value=sparse)], "inner", [], [])
    function = helper.make_function(
        "in.a.function", "f", [], ["y"], [helper.make_node("Op", [], ["y"], domain="in.a.node")], []
    )
    model = helper.make_model(helper.make_graph([helper.make_node("If", ["c"], ["y"], then_branch=inner)], "g", [], []))
    model.functions.append(function)
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    assert read_names(path).locations == {"hidden"}
    assert {"in.a.function", "in.a.node"} <= read_names(path).domains
    # An entry with its value before its key is the same entry.
    value_first = b"\x12\x01v" + b"\x0a\x08location"
    swapped = b"\x6a" + bytes([len(value_first)]) + value_first
    graph = b"\x2a" + bytes([len(swapped)]) + swapped
    path.write_bytes(b"\x3a" + bytes([len(graph)]) + graph)
    assert read_names(path).locations == {"v"}


def test_messages_without_end_are_refused(tmp_path: Path) -> None:
    message = b""
    for tag in (b"\x32", b"\x2a", b"\x0a") * 200 + (b"\x3a",):  # a graph in an attribute of a node of a graph ...
        size = len(message)
        message = tag + bytes([size & 0x7F | 0x80, size >> 7 & 0x7F | 0x80, size >> 14]) + message
    (tmp_path / "deep.onnx").write_bytes(message)
    with pytest.raises(OnnxWireError, match="too deep"):
        read_names(tmp_path / "deep.onnx")


def test_serving_refuses_without_onnx_and_torch(bundle: Path) -> None:
    point_to(bundle, "/etc/hostname")
    code = (
        "import sys\n"
        "from switchkd.serve import BundleError, Engine\n"
        "try:\n    Engine.open(sys.argv[1])\n"
        "except BundleError:\n    print([name for name in ('torch', 'onnx') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code, str(bundle)], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
