"""CLIP encoders export too: several feature layers, and the class token left out by the `default` strategy."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest
from transformers import LlavaConfig, LlavaForConditionalGeneration
from transformers.models.clip import CLIPVisionConfig
from transformers.models.llama import LlamaConfig


@pytest.mark.parametrize(("strategy", "tokens"), [("default", 16), ("full", 17)])
def test_clip(
    clip_vision: CLIPVisionConfig,
    vision_graph_equals_torch: Callable[..., None],
    tmp_path: Path,
    strategy: Literal["default", "full"],
    tokens: int,
) -> None:
    config = LlavaConfig(
        vision_config=clip_vision,
        text_config=LlamaConfig(
            vocab_size=40, hidden_size=24, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
        ),
        image_token_index=3,
        vision_feature_layer=[-2, -3],
        vision_feature_select_strategy=strategy,
    )
    model = LlavaForConditionalGeneration(config).eval()
    vision_graph_equals_torch(model, tokens, 24, tmp_path / "vision_encoder.onnx", (3,))
