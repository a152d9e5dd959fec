"""What a checkpoint's files hold beside what the model built from its config takes: nothing may be left over unsaid.

transformers fills what is missing with random numbers, and drops what has no place in the model. Either gives another
model than the one that was trained. Training and export load by the same rule.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

IMPORT_LLAVA = (
    "its config.json is of LLaVA's own code (no text_config), which this program does not run; "
    "`switchkd import llava {} OUT` makes a standard folder of it"
)
# What no LLaVA reads, or every model computes for itself: SigLIP's pooling head; buffers that older releases saved.
_UNREAD = re.compile(
    r"(^|(^|\.)(vision_model|vision_tower)\.)head\.(probe$|attention\.|layernorm\.|mlp\.)"
    r"|(^|\.)rotary_emb\.|(^|\.)position_ids$"
)
# A whole SigLIP or CLIP, of which the vision tower alone is wanted, has these too.
_TEXT_TOWER = re.compile(r"^(text_model\.|logit_scale$|logit_bias$|text_projection\.|visual_projection\.)")


def is_llavas_own(config: Mapping[str, Any]) -> bool:
    """Tell whether a config.json was written by LLaVA's own code, LLaVA-1.5's or LLaVA-NeXT's.

    Its language model's settings lie flat in it. transformers, which has the name "llava" for another layout, finds
    no `text_config`, takes a default one of 7 billion parameters, and reads nearly none of the weights.
    """
    architectures = config.get("architectures") or []
    own = any(str(name).startswith("Llava") and str(name).endswith("ForCausalLM") for name in architectures)
    return own or "mm_vision_tower" in config or (config.get("model_type") == "llava" and "text_config" not in config)


def without_pooling_head(config: Any) -> None:
    """Let a LLaVA's config, or a vision encoder's, ask for no SigLIP pooling head: LLaVA never reads it."""
    vision = getattr(config, "vision_config", config)
    if getattr(vision, "model_type", None) == "siglip_vision_model":
        vision.vision_use_head = False


def is_unread(name: str) -> bool:
    """Tell whether a weight is known to have no use in a LLaVA, by the name it has in a file or after loading."""
    return _UNREAD.search(name) is not None


def misfit(loading: Mapping[str, Any], *, encoder: bool = False) -> str | None:
    """Say in what the weights do not fit the model, and the way out; None where all of them are read and all are there.

    `loading` is what `from_pretrained` gives with `output_loading_info`, and `ignore_mismatched_sizes` so that it does.
    An `encoder` may come from a whole SigLIP or CLIP.
    """
    if others := sorted(loading["mismatched_keys"]):
        name, found, expected = others[0]
        return (
            f"{len(others)} weights have other shapes than config.json says, the first is {name}: {list(found)}, "
            f"expected {list(expected)}; correct config.json"
        )
    if missing := sorted(loading["missing_keys"]):
        return f"{len(missing)} weights are missing, the first is {missing[0]}; save it again"
    names = (name for name in loading["unexpected_keys"] if not (encoder and _TEXT_TOWER.search(name)))
    return _left_over(names)


def _left_over(names: Iterable[str]) -> str | None:
    """Say which weights no part of the model reads, and the way out; None where there are but known exceptions."""
    unread = sorted(name for name in names if not is_unread(name))
    if not unread:
        return None
    first = f"{len(unread)} weights are read by no part of the model, the first is {unread[0]}"
    if any("lora_" in name for name in unread):
        return f"{first}: an adapter; merge it into the model and save that again"
    return (
        f"{first}: config.json describes another model than the one that was saved; correct config.json, or save the "
        "model again without them"
    )
