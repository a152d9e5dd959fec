"""What student and teacher make of the same pictures, for objectives that compare more than logits.

Shapes: B rows, T tokens of a row, P pictures, L visual tokens of a picture, D width of the language model, H heads,
N visual positions (P·L).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration
from transformers.models.qwen2.modeling_qwen2 import apply_rotary_pos_emb
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

from ..objectives import Pictures, PictureView
from ..objectives.knee import accumulable
from .alignment import supervised
from .pathway import Pathway

# Rotary angles, causal, grouped heads, no soft cap: the same computation but for what `_head_norms` says.
ATTENTIONS = ("LlamaAttention", "Qwen2Attention", "Qwen3Attention")


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
    """Return [B, H, T, T]: the attention weights of the language model's first layer, of a kind in ATTENTIONS.

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
        norm(part(hidden_BTD).view(heads)).transpose(1, 2)
        for part, norm in zip((attention.q_proj, attention.k_proj), _head_norms(attention), strict=True)
    )
    query_BHTd, key_BHTd = apply_rotary_pos_emb(query_BHTd, key_BHTd, cos, sin)
    key_BHTd = key_BHTd.repeat_interleave(query_BHTd.shape[1] // key_BHTd.shape[1], dim=1)
    scores_BHTT = accumulable(query_BHTd @ key_BHTd.mT * attention.scaling)
    seen_BTT = (positions <= positions[:, None]) & (mask_BT[:, None, :] == 1)
    # A padded query sees itself at least, as softmax needs something to look at.
    seen_BTT = seen_BTT | torch.eye(length, dtype=torch.bool, device=seen_BTT.device)
    return scores_BHTT.masked_fill(~seen_BTT[:, None], float("-inf")).softmax(-1).to(embeds_BTD.dtype)


def check_attention(model: LlavaForConditionalGeneration) -> None:
    """Raise ValueError unless `first_attention` knows how the model's language model attends."""
    language_model: Any = model.model.language_model
    attention = language_model.layers[0].self_attn
    kind, window = type(attention).__name__, getattr(attention, "sliding_window", None)
    if kind not in ATTENTIONS or window is not None:
        raise ValueError(
            "this objective looks at the first layer's attention, and the language model's is of the class "
            f"{kind}{'' if window is None else f' with a sliding window of {window}'}; known are "
            f"{', '.join(ATTENTIONS)} without a window: choose another objective, or turn its attention and visual "
            "terms off"
        )


def _head_norms(attention: Any) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """What a head's queries and keys pass before they are turned: Qwen3 scales them, the others leave them."""
    if isinstance(attention, Qwen3Attention):
        return attention.q_norm, attention.k_norm
    return nn.Identity(), nn.Identity()


def picture_view(
    model: LlavaForConditionalGeneration, pathway: Pathway, layout: Layout, *, attention: bool
) -> PictureView:
    """Return a model's view of each picture; attention, where it is asked for, is cut to the picture's own tokens."""
    assert pathway.tokens_PLD is not None
    states_PLD = pathway.hidden_BTD[layout.image_BT].view_as(pathway.tokens_PLD)
    if not attention:
        return PictureView(pathway.tokens_PLD, states_PLD)
    attention_BHTT = first_attention(model, pathway.embeds_BTD, pathway.spelling.mask_BT)
    by_token_BTHT = attention_BHTT.permute(0, 3, 1, 2)  # key first, so that a picture's keys are picked at once
    picked_NHT = by_token_BTHT[layout.image_BT]
    pictures = len(layout.row_P)
    attention_PLHT = picked_NHT.view(pictures, -1, *picked_NHT.shape[1:])
    return PictureView(pathway.tokens_PLD, states_PLD, attention_PLHT.permute(0, 2, 3, 1))


def pictures(layout: Layout, student: PictureView, teacher: PictureView) -> Pictures:
    """Return both views with each picture's weight and its row's text."""
    return Pictures(layout.weight_P, layout.text_BT[layout.row_P], student, teacher)
