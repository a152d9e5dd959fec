"""What student and teacher make of the same pictures, for objectives that compare more than logits.

Shapes: B rows, T tokens of a row, P pictures, L visual tokens of a picture, D width of the language model, H heads,
N visual positions (P·L).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration
from transformers.models.qwen2.modeling_qwen2 import apply_rotary_pos_emb

from ..objectives import Pictures, PictureView
from ..objectives.knee import accumulable
from .alignment import supervised
from .pathway import Pathway


@dataclass(frozen=True)
class Layout:
    """Where the pictures of a batch stand, and what each weighs."""

    image_BT: Tensor  # true at visual tokens
    text_BT: Tensor  # true at text, false at padding too
    row_P: Tensor  # the row of each picture
    weight_P: Tensor  # supervised positions of its row, shared among the row's pictures


def lay_out(ids_BT: Tensor, mask_BT: Tensor, labels_BT: Tensor, image_token: int, tokens: int) -> Layout:
    """Find the pictures of a batch, each `tokens` image tokens long."""
    image_BT = ids_BT == image_token
    pictures_B = image_BT.sum(1) // tokens
    row_P = torch.arange(len(ids_BT), device=ids_BT.device).repeat_interleave(pictures_B)
    weight_B = supervised(labels_BT).sum(1) / pictures_B.clamp(min=1)
    return Layout(image_BT, (mask_BT == 1) & ~image_BT, row_P, weight_B[row_P])


def first_attention(model: LlavaForConditionalGeneration, embeds_BTD: Tensor, mask_BT: Tensor) -> Tensor:
    """Return [B, H, T, T]: the attention weights of the language model's first layer, of Qwen2's and Llama's kind.

    Made here from the layer's own parts: asked for attentions, transformers would keep them for every layer.
    """
    language_model: Any = model.model.language_model
    layer = language_model.layers[0]
    attention = layer.self_attn
    hidden_BTD = layer.input_layernorm(embeds_BTD)
    length = embeds_BTD.shape[1]
    positions = torch.arange(length, device=embeds_BTD.device)
    cos, sin = language_model.rotary_emb(hidden_BTD, positions[None])
    heads = (*hidden_BTD.shape[:2], -1, attention.head_dim)
    query_BHTd, key_BHTd = (
        part(hidden_BTD).view(heads).transpose(1, 2) for part in (attention.q_proj, attention.k_proj)
    )
    query_BHTd, key_BHTd = apply_rotary_pos_emb(query_BHTd, key_BHTd, cos, sin)
    key_BHTd = key_BHTd.repeat_interleave(query_BHTd.shape[1] // key_BHTd.shape[1], dim=1)
    scores_BHTT = accumulable(query_BHTd @ key_BHTd.mT * attention.scaling)
    seen_BTT = (positions <= positions[:, None]) & (mask_BT[:, None, :] == 1)
    # A padded query sees itself at least, as softmax needs something to look at.
    seen_BTT = seen_BTT | torch.eye(length, dtype=torch.bool, device=seen_BTT.device)
    return scores_BHTT.masked_fill(~seen_BTT[:, None], float("-inf")).softmax(-1).to(embeds_BTD.dtype)


def picture_view(
    model: LlavaForConditionalGeneration, pathway: Pathway, layout: Layout, *, attention: bool
) -> PictureView:
    """Return a model's view of each picture; attention, where it is asked for, is cut to the picture's own tokens."""
    assert pathway.tokens_PLD is not None
    if not attention:
        return PictureView(pathway.tokens_PLD)
    attention_BHTT = first_attention(model, pathway.embeds_BTD, pathway.spelling.mask_BT)
    by_token_BTHT = attention_BHTT.permute(0, 3, 1, 2)  # key first, so that a picture's keys are picked at once
    picked_NHT = by_token_BTHT[layout.image_BT]
    pictures = len(layout.row_P)
    attention_PLHT = picked_NHT.view(pictures, -1, *picked_NHT.shape[1:])
    return PictureView(pathway.tokens_PLD, attention_PLHT.permute(0, 2, 3, 1))


def pictures(layout: Layout, student: PictureView, teacher: PictureView) -> Pictures:
    """Return both views with each picture's weight and its row's text."""
    return Pictures(layout.weight_P, layout.text_BT[layout.row_P], student, teacher)
