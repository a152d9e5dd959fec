"""Integers are multiplied exactly on every processor: saturation is computed here, or shown by an older processor.

Shapes in names: M rows, K width, N columns.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper
from onnxruntime.quantization import QuantType, quantize_dynamic

from switchkd.cli.main import main
from switchkd.export.contract import integer_products
from switchkd.export.contract.bundle import (
    DECODER,
    EMBED_TOKENS,
    GRAPHS,
    INT7,
    INT8,
    MANIFEST,
    UINT8,
    VISION_ENCODER,
    WEIGHTS,
    Bundle,
    BundleError,
)
from switchkd.export.contract.integer_products import ASK_FOR_EXACT, known_factors, make_exact, products_are_exact
from switchkd.export.folders.digests import sha256
from switchkd.export.graphs.onnx_graph import OnnxGraph, Storage
from switchkd.export.graphs.parts import EMBEDDINGS, PARTS
from switchkd.export.quantisation.precisions import PRECISIONS, change_parts
from switchkd.export.quantisation.weight_only import integer_weights, quantize
from switchkd.serve import Engine

Integers = npt.NDArray[np.integer]


def saturating_product(activations_MK: Integers, weights_KN: Integers) -> Integers:
    """What an x86 processor without VNNI makes of it: two products are added in 16 bits, which stop at their limits."""
    if len(weights_KN) % 2:
        activations_MK, weights_KN = np.pad(activations_MK, ((0, 0), (0, 1))), np.pad(weights_KN, ((0, 1), (0, 0)))
    products_MKN = activations_MK.astype(np.int32)[:, :, None] * weights_KN.astype(np.int32)[None]
    pairs_MKN = products_MKN[:, 0::2] + products_MKN[:, 1::2]
    sums_MN: Integers = np.clip(pairs_MKN, -(2**15), 2**15 - 1).sum(axis=1)
    return sums_MN


def exact_product(activations_MK: Integers, weights_KN: Integers) -> Integers:
    """The integers themselves."""
    product_MN: Integers = activations_MK.astype(np.int32) @ weights_KN.astype(np.int32)
    return product_MN


# --- what is known of products ---


def test_the_known_product_tells_saturation_and_seven_bits_never_reach_it() -> None:
    wide, narrow = known_factors(INT8), known_factors(INT7)
    assert (saturating_product(*wide) != exact_product(*wide)).mean() > 0.5
    np.testing.assert_array_equal(saturating_product(*narrow), exact_product(*narrow))
    largest = np.full((1, 2), 255, np.uint8)
    for weight in (-64, 64):
        pair = np.full((2, 1), weight, np.int8)
        np.testing.assert_array_equal(saturating_product(largest, pair), exact_product(largest, pair))
    beyond = np.full((2, 1), 65, np.int8)
    assert saturating_product(largest, beyond) < exact_product(largest, beyond)


def test_onnxruntime_is_exact_here_with_seven_bits_with_uint8_and_where_it_is_asked() -> None:
    """True of every processor; whether int8 is exact unasked is what processors differ in."""
    assert products_are_exact(INT7)
    assert products_are_exact(UINT8)
    assert products_are_exact(INT8, asked=True)


def test_the_known_model_is_an_onnx_model() -> None:
    for weights in WEIGHTS:
        _, weights_KN = known_factors(weights)
        model = onnx.load_from_string(integer_products.known_product(weights_KN))
        onnx.checker.check_model(model, full_check=True)
        np.testing.assert_array_equal(numpy_helper.to_array(model.graph.initializer[0]), weights_KN)


class SaturatingSession:
    """An onnxruntime that computes MatMulInteger as a processor without VNNI; `obeys` the session option or not."""

    obeys = True

    def __init__(self, model: bytes, options: onnxruntime.SessionOptions, **_: Any) -> None:
        self._weights_KN = numpy_helper.to_array(onnx.load_from_string(model).graph.initializer[0])
        try:
            asked = options.get_session_config_entry(ASK_FOR_EXACT) == "1"
        except RuntimeError:  # there is no such entry
            asked = False
        signed = self._weights_KN.dtype == np.int8
        self._product = saturating_product if signed and not (asked and self.obeys) else exact_product

    def run(self, _: None, feeds: Mapping[str, Integers]) -> list[Integers]:
        return [self._product(feeds["activations"], self._weights_KN)]


class DeafSession(SaturatingSession):
    """One that saturates whatever it is asked."""

    obeys = False


@pytest.fixture
def processor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The processor that the test names, as long as it lasts."""
    products_are_exact.cache_clear()
    monkeypatch.setattr(onnxruntime, "InferenceSession", request.param)
    yield
    products_are_exact.cache_clear()


@pytest.mark.parametrize("processor", [SaturatingSession], indirect=True)
@pytest.mark.parametrize(("weights", "asked"), [(None, False), (INT7, False), (UINT8, False), (INT8, True)])
def test_a_saturating_processor_is_asked_to_be_exact_where_it_must(
    processor: None, weights: str | None, asked: bool
) -> None:
    options = onnxruntime.SessionOptions()
    assert make_exact(options, weights, Path("graph.onnx")) is asked
    if asked:
        assert options.get_session_config_entry(ASK_FOR_EXACT) == "1"
    else:
        with pytest.raises(RuntimeError, match=ASK_FOR_EXACT):
            options.get_session_config_entry(ASK_FOR_EXACT)


@pytest.mark.parametrize("processor", [DeafSession], indirect=True)
def test_a_processor_that_stays_wrong_is_refused(processor: None) -> None:
    with pytest.raises(BundleError, match=r"graph\.onnx: onnxruntime .* multiplies uint8 and int8 wrongly on this pro"):
        make_exact(onnxruntime.SessionOptions(), INT8, Path("graph.onnx"))
    assert not make_exact(onnxruntime.SessionOptions(), INT7, Path("graph.onnx"))


# --- what is in the files ---


def quantised(path: Path, name: str, form: str) -> OnnxGraph:
    """A float32 graph in a precision, or with every part in a mix's method."""
    graph = OnnxGraph.read(path)
    if form in PRECISIONS:
        PRECISIONS[form].change(name, graph)
    else:
        change_parts(graph, {part: form for part in PARTS if part != EMBEDDINGS}, activations={})
    return graph


@pytest.mark.parametrize(
    ("form", "weights"), [("int8", INT7), ("q8", INT7), ("int8_smooth", INT7), ("uint8", UINT8), ("fp32", None)]
)
@pytest.mark.parametrize("name", [VISION_ENCODER, DECODER])
def test_products_of_a_graph_cannot_saturate(tiny_bundle: Path, name: str, form: str, weights: str | None) -> None:
    """With the largest activations that there are, and with others."""
    graph = quantised(Bundle.open(tiny_bundle, "fp32").graph_path(name), name, form)
    random, constants = np.random.default_rng(0), graph.constants()
    products = [node for node in graph.proto.graph.node if node.op_type == "MatMulInteger"]
    assert integer_weights(graph) == weights
    assert (len(products) > 10) == (weights is not None)
    for node in products:
        weights_KN: Integers = numpy_helper.to_array(constants[node.input[1]])
        if weights == UINT8:
            assert weights_KN.dtype == np.uint8  # which goes another way, and uses all 8 bits
            assert weights_KN.max() > 250
            continue
        activations_MK = random.integers(0, 256, (5, len(weights_KN)), dtype=np.uint8)
        activations_MK[0] = 255
        expected_MN = exact_product(activations_MK, weights_KN)
        np.testing.assert_array_equal(saturating_product(activations_MK, weights_KN), expected_MN)
        assert max(abs(int(weights_KN.min())), int(weights_KN.max())) == 64  # and it uses the 7 bits that it has


def test_the_manifest_says_which_weights_are_multiplied(tiny_bundle: Path) -> None:
    found = {(graph.name, graph.precision): graph.integer_weights for graph in Bundle.open(tiny_bundle).manifest.graphs}
    assert found == {
        (name, precision): INT7 if precision == "int8" and name != EMBED_TOKENS else None
        for precision in ("fp32", "int8")
        for name in GRAPHS
    }


# --- bundles from before ---


@pytest.fixture(scope="module")
def older_bundle(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny bundle as it was made before: int8 weights of 8 bits, and a manifest that says nothing of them."""
    folder = tmp_path_factory.mktemp("older")
    path = Path(shutil.copytree(tiny_bundle, folder / "bundle"))
    content = json.loads((path / MANIFEST).read_text())

    def all_of_8_bits(model: onnx.ModelProto) -> onnx.ModelProto:
        quantize_dynamic(model, folder / "part.onnx", per_channel=True, weight_type=QuantType.QInt8)
        return onnx.load(folder / "part.onnx")

    for entry in content["graphs"]:
        del entry["integer_weights"]
        if entry["precision"] == "int8" and entry["name"] != "embed_tokens":
            graph = OnnxGraph.read(path / entry["file"].replace("_int8", ""))
            quantize(graph, "MatMul", all_of_8_bits)
            graph.write(path / entry["file"], Storage())
            content["files"][entry["file"]] = {
                "bytes": (path / entry["file"]).stat().st_size,
                "sha256": sha256(path / entry["file"]),
            }
    (path / MANIFEST).write_text(json.dumps(content))
    return path


def test_verify_says_that_an_older_bundle_relies_on_the_runtime(
    older_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert Bundle.open(older_bundle, "int8").graph(GRAPHS[0]).integer_weights == INT8
    assert Bundle.open(older_bundle, "fp32").graph(GRAPHS[0]).integer_weights is None
    assert main(["verify", str(older_bundle)]) == 0
    out = capsys.readouterr().out
    assert "int8: its weights use all of 8 bits, and an x86 processor without VNNI, which this processor is" in out
    assert "export again, and every runtime is exact" in out


def test_verify_finds_wide_weights_that_are_said_to_be_narrow(
    older_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = Path(shutil.copytree(older_bundle, tmp_path / "bundle"))
    content = json.loads((copy / MANIFEST).read_text())
    for entry in content["graphs"]:
        entry["integer_weights"] = INT7 if entry["precision"] == "int8" and entry["name"] != "embed_tokens" else None
    (copy / MANIFEST).write_text(json.dumps(content))
    assert main(["verify", str(copy)]) == 2
    assert (
        "vision_encoder_int8.onnx: the manifest says that its integer products have int7 weights, they have int8"
        in (capsys.readouterr().err)
    )


def test_unknown_integer_weights_are_refused(tiny_bundle: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    content = json.loads((copy / MANIFEST).read_text())
    content["graphs"][0]["integer_weights"] = "int6"
    (copy / MANIFEST).write_text(json.dumps(content))
    with pytest.raises(BundleError, match="integer_weights is 'int6', this switchkd knows int8, uint8, int7"):
        Bundle.open(copy)


# --- the processor itself ---

_ASKED = """
import json, sys
from pathlib import Path
from switchkd.export.contract.bundle import WEIGHTS
from switchkd.export.contract.integer_products import products_are_exact
from switchkd.serve import Engine
picture = Path(sys.argv[1]).read_bytes()
answers = [Engine.open(path, "int8", threads=1).answer("How many red circles?", [picture], max_new_tokens=8).tokens
           for path in sys.argv[2:]]
print(json.dumps({"exact": {weights: products_are_exact(weights) for weights in WEIGHTS}, "answers": answers}))
"""


def test_a_processor_without_vnni_gives_the_same_answers(
    tiny_bundle: Path, older_bundle: Path, tmp_path: Path, avx2_only: dict[str, str]
) -> None:
    """The real onnxruntime, in the code that it has for such a processor."""
    from PIL import Image

    picture = tmp_path / "picture.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)).save(picture)
    command = [sys.executable, "-c", _ASKED, str(picture), str(tiny_bundle), str(older_bundle)]
    result = subprocess.run(command, env=os.environ | avx2_only, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["exact"] == {INT8: False, UINT8: True, INT7: True}
    expected = [
        Engine.open(path, "int8", threads=1).answer("How many red circles?", [picture], max_new_tokens=8).tokens
        for path in (tiny_bundle, older_bundle)
    ]
    assert found["answers"] == [list(tokens) for tokens in expected]


def test_verify_holds_on_a_processor_without_vnni_what_was_recorded_with_it(
    older_bundle: Path, avx2_only: dict[str, str]
) -> None:
    command = [sys.executable, "-m", "switchkd.cli.main", "verify", str(older_bundle)]
    result = subprocess.run(command, env=os.environ | avx2_only, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "an x86 processor without VNNI, which this processor is: switchkd asks for it" in result.stdout
