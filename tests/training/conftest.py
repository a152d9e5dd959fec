"""Tiny LLaVA pairs with random weights, and batches for them."""

from collections.abc import Callable, Iterator
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from transformers import LlavaConfig, LlavaForConditionalGeneration
from transformers.models.clip import CLIPVisionConfig
from transformers.models.qwen2 import Qwen2Config
from transformers.models.siglip import SiglipVisionConfig

IMAGE_TOKEN = 4
Batch = dict[str, Tensor]


def make_llava(
    seed: int,
    *,
    vocabulary: int = 61,
    width: int = 16,
    layers: int = 2,
    heads: int = 2,
    encoder_width: int = 16,
    patch: int = 6,
    image_size: int = 12,
    encoder: str = "siglip",
    image_token: int = IMAGE_TOKEN,
    strategy: Literal["full", "default"] = "full",
    feature_layer: int | list[int] = -2,
    tied: bool = True,
) -> LlavaForConditionalGeneration:
    """A LLaVA of 12x12 pictures (4 visual tokens) in float64, so that comparisons can be tight."""
    vision: dict[str, Any] = {
        "hidden_size": encoder_width,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": image_size,
        "patch_size": patch,
    }
    text = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        initializer_range=0.3,
    )
    config = LlavaConfig(
        vision_config=SiglipVisionConfig(**vision, vision_use_head=False)
        if encoder == "siglip"
        else CLIPVisionConfig(**vision),
        text_config=text,
        image_token_index=image_token,
        vision_feature_layer=feature_layer,
        vision_feature_select_strategy=strategy,
        tie_word_embeddings=tied,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlavaForConditionalGeneration(config).double()


def make_batch(seed: int, pictures: list[int], *, length: int = 14, visual_tokens: int = 4) -> Batch:
    """A batch of one row for every entry of `pictures`, which says how many pictures the row holds."""
    generator = torch.Generator().manual_seed(seed)
    rows = len(pictures)
    ids_BT = torch.randint(5, 50, (rows, length), generator=generator)
    labels_BT = torch.full_like(ids_BT, -100)
    mask_BT = torch.ones_like(ids_BT)
    for row, count in enumerate(pictures):
        ids_BT[row, 1 : 1 + visual_tokens * count] = IMAGE_TOKEN
        start, stop = 2 + visual_tokens * count, length - row % 3
        labels_BT[row, start:stop] = ids_BT[row, start:stop]
        mask_BT[row, stop:] = 0
    batch = {"input_ids": ids_BT, "attention_mask": mask_BT, "labels": labels_BT}
    if sum(pictures):
        shape = (sum(pictures), 3, 12, 12)
        batch["pixel_values"] = torch.randn(shape, generator=generator, dtype=torch.float64)
    return batch


def split_rows(batch: Batch, pictures: list[int]) -> Iterator[Batch]:
    """A batch's rows as batches of one, each with its own pictures."""
    left = list(batch.get("pixel_values", []))
    for row, count in enumerate(pictures):
        one = {name: value[row : row + 1] for name, value in batch.items() if name != "pixel_values"}
        if count:
            one["pixel_values"] = torch.stack([left.pop(0) for _ in range(count)])
        yield one


@pytest.fixture
def rows() -> Callable[..., Iterator[Batch]]:
    return split_rows


@pytest.fixture
def llava() -> Callable[..., LlavaForConditionalGeneration]:
    return make_llava


@pytest.fixture
def batch() -> Callable[..., Batch]:
    return make_batch
