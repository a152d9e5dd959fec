"""A model's pathway L(P(V(image)), text), in its steps: vision encoder V, projector P, language model L.

Shapes: B rows, T tokens of a row, P pictures, C channels, H W pixels, L visual tokens of a picture, E width of the
vision encoder, D width of the language model, N supervised positions.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from .alignment import Spelling, at_supervised


@dataclass(frozen=True)
class Pathway:
    """A model on a batch as its own visual tokens spell it: what goes in, and its last hidden states."""

    spelling: Spelling
    tokens_PLD: Tensor | None
    embeds_BTD: Tensor
    hidden_BTD: Tensor

    @property
    def answers_ND(self) -> Tensor:
        """The hidden states at the positions that say the supervised tokens."""
        return at_supervised(self.hidden_BTD, self.spelling.labels_BT)


def run_pathway(model: LlavaForConditionalGeneration, spelling: Spelling, features_PLE: Tensor | None) -> Pathway:
    """Return L(P(features), text): the pathway behind the vision encoder."""
    tokens_PLD = None if features_PLE is None else visual_tokens(model, features_PLE)
    embeds_BTD = embed(model, spelling.ids_BT, tokens_PLD)
    return Pathway(spelling, tokens_PLD, embeds_BTD, last_hidden(model, embeds_BTD, spelling.mask_BT))


def visual_features(model: LlavaForConditionalGeneration, pixels_PCHW: Tensor) -> Tensor:
    """Return features_PLE of the model's vision encoder, of the layer and with the tokens that its config selects."""
    config = model.config
    tower = model.model.vision_tower
    hidden: tuple[Tensor, ...] = tower(pixels_PCHW.to(tower.dtype), output_hidden_states=True).hidden_states
    layers = config.vision_feature_layer
    features_PLE = torch.cat([hidden[i] for i in ([layers] if isinstance(layers, int) else layers)], dim=-1)
    return features_PLE[:, 1:] if config.vision_feature_select_strategy == "default" else features_PLE


def visual_tokens(model: LlavaForConditionalGeneration, features_PLE: Tensor) -> Tensor:
    """Return tokens_PLD: the encoder's features as the model's projector hands them to its language model."""
    tokens_PLD: Tensor = model.model.multi_modal_projector(features_PLE)
    return tokens_PLD


def embed(model: LlavaForConditionalGeneration, input_ids_BT: Tensor, tokens_PLD: Tensor | None) -> Tensor:
    """Return embeds_BTD: the words' embeddings, the visual tokens put in place of the image tokens, in order."""
    embeds_BTD: Tensor = model.get_input_embeddings()(input_ids_BT)
    if tokens_PLD is None:
        return embeds_BTD
    tokens_PLD = tokens_PLD.to(embeds_BTD.dtype)
    place_BT1 = model.model.get_placeholder_mask(input_ids_BT, inputs_embeds=embeds_BTD, image_features=tokens_PLD)
    return embeds_BTD.masked_scatter(place_BT1, tokens_PLD)


def last_hidden(model: LlavaForConditionalGeneration, embeds_BTD: Tensor, attention_mask_BT: Tensor) -> Tensor:
    """Return hidden_BTD of the model's language model."""
    hidden_BTD: Tensor = model.model.language_model(
        inputs_embeds=embeds_BTD, attention_mask=attention_mask_BT, use_cache=False
    ).last_hidden_state
    return hidden_BTD


def features_width(model: LlavaForConditionalGeneration) -> int:
    """Return E, the width of the visual features that the model's projector takes."""
    layers = model.config.vision_feature_layer
    vision: Any = model.config.vision_config
    return int(vision.hidden_size) * (1 if isinstance(layers, int) else len(layers))
