"""The PyTorch model that graphs are compared with: its answers are those of transformers' own generation."""

import inspect
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaModel, LlavaForConditionalGeneration, Qwen2Model

from switchkd.export.graphs.checkpoint import open_checkpoint
from switchkd.export.graphs.tracing import CACHE
from switchkd.export.verification.reference import TorchReference

NEW = 12


def test_greedy_answers_are_those_of_generate(tiny_checkpoint: Path) -> None:
    """And come without a warning of a name that the installed transformers has given up."""
    model: Any = open_checkpoint(tiny_checkpoint).model
    ids = [1, *[model.config.image_token_id] * 16, 20, 30, 40]
    pixels = torch.randn(1, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        got = TorchReference(model, [2]).greedy(ids, pixels.numpy(), NEW).tokens
    inputs = {"input_ids": torch.tensor([ids]), "pixel_values": pixels, "attention_mask": torch.ones(1, len(ids))}
    expected = model.generate(**inputs, do_sample=False, max_new_tokens=NEW, eos_token_id=2)
    assert got == expected[0, len(ids) :].tolist()


def test_every_model_knows_its_cache_by_the_name_that_it_is_given() -> None:
    for kind in (LlavaForConditionalGeneration, Qwen2Model, LlamaModel):
        assert CACHE in inspect.signature(kind.forward).parameters
