"""Pretrains the world's SigLIP encoder so that every patch says what is there and where.

The paper starts from SigLIP so400m, which nobody can fetch here; this is its toy stand-in. A pooled
contrastive loss alone leaves a small encoder with no binding of things to places, so each patch feature
of the layer that LLaVA reads (the last but one) is contrasted with the phrases of all regions: "red
circle in the north" must be nearer to the patches of that cell than any other phrase of the world.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase, SiglipVisionConfig, SiglipVisionModel

from switchkd.export.contract.pixels import Preprocessing, read_pixels

from .scenes import COLOURS, PICTURE_SIDE, POSITIONS, SHAPES

# Shapes: B pictures, N patches, D features, R regions' phrases, W tokens a phrase.

PATCH_SIDE = 12
NAMES = (*SHAPES, *(str(digit) for digit in range(10)))
PICTURE_PREPROCESSING = {
    "size": {"height": PICTURE_SIDE, "width": PICTURE_SIDE},
    "resample": 3,
    "rescale_factor": 1 / 255,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
    "do_convert_rgb": True,
}


def encoder_config() -> SiglipVisionConfig:
    """The toy encoder: 36 patches of 12 pixels, 4 layers of which LLaVA uses 3."""
    return SiglipVisionConfig(
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=PICTURE_SIDE,
        patch_size=PATCH_SIDE,
        vision_use_head=False,
    )


def region_phrases() -> list[str]:
    """Every phrase a region can have, by `phrase_index`."""
    things = ["nothing", *(f"{colour} {name}" for colour in COLOURS for name in NAMES)]
    return [f"{thing} in the {position}" for position in POSITIONS for thing in things]


def phrase_index(cell: int, colour: str | None, shape: str | None) -> int:
    """The index into `region_phrases` of what is in a cell (nothing, where colour is None)."""
    each = 1 + len(COLOURS) * len(NAMES)
    if colour is None or shape is None:
        return cell * each
    return cell * each + 1 + list(COLOURS).index(colour) * len(NAMES) + NAMES.index(shape)


class RegionDataset(Dataset[dict[str, Tensor]]):
    """Pictures [3, H, W] with the phrase of every patch [N]."""

    def __init__(self, world: Path) -> None:
        self._rows: list[dict[str, Any]] = json.loads((world / "regions.json").read_text())
        self._pictures = world / "pictures"
        self._preprocessing = Preprocessing.from_config(PICTURE_PREPROCESSING)
        grid = PICTURE_SIDE // PATCH_SIDE
        self._cells = [(row * 3 // grid) * 3 + column * 3 // grid for row in range(grid) for column in range(grid)]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = self._rows[index]
        pixels_CHW = read_pixels(self._pictures / row["image"], self._preprocessing)
        phrases = [phrase_index(thing["cell"], thing["colour"], thing["shape"]) for thing in row["things"]]
        return {
            "pixel_values": torch.from_numpy(pixels_CHW),
            "phrases": torch.tensor([phrases[cell] for cell in self._cells]),
        }


class RegionTextModel(nn.Module):
    """The encoder, and a bag-of-tokens text side that exists only while it is pretrained."""

    def __init__(self, encoder: SiglipVisionModel, tokenizer: PreTrainedTokenizerBase, width: int = 128) -> None:
        super().__init__()
        self.encoder = encoder
        self.patch_head = nn.Linear(encoder.config.hidden_size, width)
        self.words = nn.Embedding(len(tokenizer), width)
        self.phrase_head = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))
        self.log_scale = nn.Parameter(torch.tensor(2.3))
        tokens = tokenizer(region_phrases(), padding=True, return_tensors="pt")
        self.phrases_RW: Tensor
        self.mask_RW: Tensor
        self.register_buffer("phrases_RW", tokens["input_ids"], persistent=False)
        self.register_buffer("mask_RW", tokens["attention_mask"], persistent=False)

    def forward(self, pixel_values: Tensor, phrases: Tensor) -> dict[str, Tensor]:
        """Softmax contrastive loss of each patch over all phrases; `logits` are the patches' best phrases [B, N]."""
        states = self.encoder(pixel_values, output_hidden_states=True).hidden_states
        patches_BND = functional.normalize(self.patch_head(states[-2]), dim=-1)
        mask_RW1 = self.mask_RW[..., None]
        bag_RD = (self.words(self.phrases_RW) * mask_RW1).sum(1) / mask_RW1.sum(1)
        phrases_RD = functional.normalize(bag_RD + self.phrase_head(bag_RD), dim=-1)
        logits_BNR = self.log_scale.exp() * patches_BND @ phrases_RD.T
        loss = functional.cross_entropy(logits_BNR.flatten(0, 1), phrases.flatten())
        return {"loss": loss, "logits": logits_BNR.argmax(-1)}


def write_image_processor(folder: Path) -> None:
    """Write the world's preprocessing beside an encoder, as AutoImageProcessor reads it."""
    config = {"image_processor_type": "SiglipImageProcessor"} | PICTURE_PREPROCESSING
    (folder / "preprocessor_config.json").write_text(json.dumps(config, indent=1) + "\n")
