"""CLIP encoders export too: several feature layers, and the class token left out by the `default` strategy."""

from pathlib import Path
from typing import Literal

import numpy as np
import onnxruntime
import pytest
import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration
from transformers.models.clip import CLIPVisionConfig
from transformers.models.llama import LlamaConfig

from switchkd.export.bundle import CacheShape, ModelFacts
from switchkd.export.graphs import VisionEncoder


@pytest.mark.parametrize(("strategy", "tokens"), [("default", 16), ("full", 17)])
def test_clip(tmp_path: Path, strategy: Literal["default", "full"], tokens: int) -> None:
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=24,
            patch_size=6,
        ),
        text_config=LlamaConfig(
            vocab_size=40, hidden_size=24, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
        ),
        image_token_index=3,
        vision_feature_layer=[-2, -3],
        vision_feature_select_strategy=strategy,
    )
    model = LlavaForConditionalGeneration(config).eval()
    facts = ModelFacts("<image>", 3, tokens, (3, 24, 24), (2,), 40, 24, 64, CacheShape(1, 2, 12, "float32"))
    path = tmp_path / "vision_encoder.onnx"
    VisionEncoder(model.model.vision_tower.config, facts).write(model, path)
    pixels_PCHW = np.random.default_rng(0).standard_normal((3, 3, 24, 24), dtype=np.float32)
    got_PND = onnxruntime.InferenceSession(path).run(None, {"pixel_values": pixels_PCHW})[0]
    with torch.no_grad():
        expected = torch.stack(list(model.get_image_features(torch.from_numpy(pixels_PCHW)).pooler_output))
    assert got_PND.shape == (3, tokens, 24)
    np.testing.assert_allclose(got_PND, expected.numpy(), atol=1e-5)
