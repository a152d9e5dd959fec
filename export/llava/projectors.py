"""The projectors between a vision encoder and a language model: LLaVA's own MLP, and LDPv2 for small devices.

A checkpoint folder says in `config.json` which one it has: `projector_type: "ldpv2"` with `projector_grid`, or nothing,
which is LLaVA's. Training builds such folders and export reads them; both take the classes from here.

Shapes: P pictures, S side of the encoder's square grid of tokens, L = S·S tokens of the encoder, G side of the pooled
grid, E width of the vision encoder, D width of the language model.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn
from transformers import LlavaConfig, LlavaForConditionalGeneration
from transformers.activations import ACT2FN
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)

PROJECTORS = MLP, LDPV2 = ("mlp", "ldpv2")
GRID = 12  # 144 visual tokens a picture, as MobileVLM V2 has them


class ProjectorError(ValueError):
    """A projector that is unknown, or that the encoder's tokens do not fit; the message says which and the way out."""


class Ldpv2Projector(nn.Module):
    """The lightweight downsample projector of MobileVLM V2: features_PLE to tokens_PGGD, flattened to G·G tokens.

    A 2-layer MLP with GELU, token by token; average pooling of the square grid to `projector_grid` on a side; and a
    positional encoding generator, a depthwise 3x3 convolution added to its own input. Source: MobileVLM V2 (arXiv
    2402.03766), with the layers and the initial weights of its public code.
    """

    def __init__(self, config: LlavaConfig) -> None:
        super().__init__()
        vision: Any = config.vision_config
        text: Any = config.text_config
        layers = config.vision_feature_layer
        features = vision.hidden_size * (1 if isinstance(layers, int) else len(layers))
        width = text.hidden_size
        self.grid = int(_setting(config, "projector_grid"))
        self.linear_1 = nn.Linear(features, width)
        self.act = ACT2FN[config.projector_hidden_act]
        self.linear_2 = nn.Linear(width, width)
        self.peg = nn.Conv2d(width, width, 3, padding=1, groups=width)

    def forward(self, features_PLE: Tensor) -> Tensor:
        """Return the G·G tokens of each picture, D wide, row by row."""
        tokens_PLD: Tensor = self.linear_2(self.act(self.linear_1(features_PLE)))
        pictures, count, width = tokens_PLD.shape
        side = _side(count)
        pool_GS = tokens_PLD.new_tensor(pooling_weights(side, self.grid))
        # Pooling the rows and then the columns by products gives adaptive_avg_pool2d, for which ONNX has no operator
        # where S is no multiple of G. The matrix stands on the left: quantisation touches constants on the right.
        rows_PGSD = (pool_GS @ tokens_PLD.reshape(pictures, side, side * width)).reshape(-1, self.grid, side, width)
        pooled_PGGD = pool_GS @ rows_PGSD
        positions_PDGG = self.peg(pooled_PGGD.permute(0, 3, 1, 2))
        placed_PGGD: Tensor = pooled_PGGD + positions_PDGG.permute(0, 2, 3, 1)
        return placed_PGGD.flatten(1, 2)


def pooling_weights(side: int, grid: int) -> list[list[float]]:
    """Return pool_GS, whose row i averages what adaptive_avg_pool1d puts into place i: ⌊iS/G⌋ up to ⌈(i+1)S/G⌉."""
    windows = [(row * side // grid, -(-(row + 1) * side // grid)) for row in range(grid)]
    return [[(start <= place < stop) / (stop - start) for place in range(side)] for start, stop in windows]


class Ldpv2LlavaForConditionalGeneration(LlavaForConditionalGeneration):
    """LLaVA with the LDPv2 projector in the MLP's place; its weights are saved under LLaVA's own names.

    Plain transformers takes such a folder for a LLaVA with an MLP. It warns of the convolution's weights, and refuses
    the first picture: the folder's processor makes G·G image tokens of it, the MLP alone gives L features. Only
    where G = S would the two agree, and the convolution be missed by the warning alone.
    """

    def __init__(self, config: LlavaConfig) -> None:
        super().__init__(config)
        self.model.multi_modal_projector = Ldpv2Projector(config)
        self.post_init()


# transformers gives the weights in a file other names than the modules have, and knows for its own classes alone which.
register_checkpoint_conversion_mapping(
    Ldpv2LlavaForConditionalGeneration.__name__, get_checkpoint_conversion_mapping("llava"), overwrite=True
)


def projector_type(config: LlavaConfig) -> str:
    """Return which of PROJECTORS a config asks for; a plain LlavaConfig asks for the MLP."""
    return str(_setting(config, "projector_type", MLP))


def llava_class(config: LlavaConfig) -> type[LlavaForConditionalGeneration]:
    """Return the class that a folder with this config is loaded as. Raises ProjectorError where the two do not fit."""
    check_projector(config)
    return Ldpv2LlavaForConditionalGeneration if projector_type(config) == LDPV2 else LlavaForConditionalGeneration


def encoder_tokens(config: LlavaConfig) -> int:
    """Return L, the tokens that reach the projector: patches, and what the selection leaves of a class token."""
    vision: Any = config.vision_config
    patches = (vision.image_size // vision.patch_size) ** 2
    class_token = 1 if vision.model_type == "clip_vision_model" else 0
    return int(patches + class_token - (config.vision_feature_select_strategy == "default"))


def tokens_per_picture(config: LlavaConfig) -> int:
    """Return how many visual tokens the projector gives the language model for a picture."""
    return int(_setting(config, "projector_grid")) ** 2 if projector_type(config) == LDPV2 else encoder_tokens(config)


def check_projector(config: LlavaConfig) -> None:
    """Raise ProjectorError unless the projector is known and can pool the encoder's tokens."""
    kind = projector_type(config)
    if kind not in PROJECTORS:
        raise ProjectorError(f"projector_type is {kind!r}, expected {' or '.join(PROJECTORS)}")
    if kind == MLP:
        return
    count, grid = encoder_tokens(config), _setting(config, "projector_grid")
    vision: Any = config.vision_config
    side = vision.image_size // vision.patch_size
    if count != side**2:
        raise ProjectorError(
            f"the encoder's {count} tokens are no square grid ({side} x {side} would be {side**2}), which ldpv2 pools; "
            "keep every patch and no class token: drop_first_patch false, or projector mlp"
        )
    if not isinstance(grid, int) or not 1 <= grid <= side:
        raise ProjectorError(
            f"projector_grid is {grid!r}, expected 1 to {side}: ldpv2 pools the encoder's {side} x {side} tokens to "
            "that many on a side, and cannot make more of them"
        )


def _setting(config: LlavaConfig, name: str, default: Any = None) -> Any:
    return getattr(config, name, default)  # LlavaConfig keeps what it does not know, and declares none of it


def _side(count: int) -> int:
    side = math.isqrt(count)
    assert side * side == count, f"{count} tokens are no square grid"  # check_projector has seen the config
    return side
