"""What several tests of exported graphs need."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from transformers import LlavaForConditionalGeneration
from transformers.models.clip import CLIPVisionConfig

from switchkd.export.contract.bundle import CacheShape, ModelFacts
from switchkd.export.graphs.onnx_graph import OnnxGraph
from switchkd.export.graphs.parts import part_of
from switchkd.export.graphs.tracing import VisionEncoder
from switchkd.export.quantisation.weight_only import constant_matrices


def compare_vision_graph(
    model: LlavaForConditionalGeneration, tokens: int, side: int, path: Path, pictures: tuple[int, ...]
) -> None:
    """Export a model's vision graph and run it on so many pictures: what comes out is what PyTorch gives."""
    facts = ModelFacts("<image>", 3, tokens, (3, side, side), (2,), 40, 24, 64, CacheShape(1, 2, 12))
    VisionEncoder(model.model.vision_tower.config, facts).write(model, path)
    parts = {part_of(node) for node, _ in constant_matrices(OnnxGraph.read(path), "MatMul")}
    assert parts == {"vision_encoder", "projector"}
    session = onnxruntime.InferenceSession(path)
    for count in pictures:
        pixels_PCHW = np.random.default_rng(count).standard_normal((count, 3, side, side), dtype=np.float32)
        got_PND = session.run(None, {"pixel_values": pixels_PCHW})[0]
        with torch.no_grad():
            expected = torch.stack(list(model.get_image_features(torch.from_numpy(pixels_PCHW)).pooler_output))
        assert got_PND.shape == (count, tokens, 24)
        np.testing.assert_allclose(got_PND, expected.numpy(), atol=1e-5)


@pytest.fixture
def vision_graph_equals_torch() -> Callable[..., None]:
    return compare_vision_graph


@pytest.fixture
def clip_vision() -> CLIPVisionConfig:
    """A tiny CLIP encoder of 24 pixels: 4 x 4 patches and a class token."""
    return CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=24, patch_size=6
    )
