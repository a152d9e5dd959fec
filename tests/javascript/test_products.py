"""Integers are multiplied exactly by ONNX Runtime's builds for JavaScript too."""

import base64
import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from switchkd.export.contract.bundle import INT7, INT8, UINT8
from switchkd.export.contract.integer_products import known_factors, known_product

HERE = Path(__file__).parent

pytestmark = [
    pytest.mark.skipif(shutil.which("node") is None, reason="there is no Node.js here"),
    pytest.mark.skipif(
        not (HERE / "node_modules").is_dir(), reason="transformers.js is not installed: `make javascript` does it"
    ),
]


@pytest.mark.parametrize("weights", [INT7, UINT8, INT8])
def test_integer_products_are_exact_in_javascript(weights: str) -> None:
    activations_MK, weights_KN = known_factors(weights)
    request = {
        "model": base64.b64encode(known_product(weights_KN)).decode(),
        "activations": base64.b64encode(activations_MK.tobytes()).decode(),
        "shape": activations_MK.shape,
    }
    command = ["node", "products.mjs"]
    done = subprocess.run(command, cwd=HERE, input=json.dumps(request), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    expected_MN = activations_MK.astype(np.int32) @ weights_KN.astype(np.int32)
    assert found["wasm"] == expected_MN.ravel().tolist()
    if weights != INT8:  # which the processor at hand decides
        assert found["native"] == expected_MN.ravel().tolist()
