"""Answers a set of records with a checkpoint, greedily and in batches.

Shapes: B records of a batch, T tokens, P pictures.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from switchkd.export.contract.pixels import read_pixels

from ..data.conversations import to_messages
from ..data.label_mask import model_inputs
from ..models.vlm import Vlm


@torch.inference_mode()
def generate_answers(
    vlm: Vlm,
    records: Sequence[dict[str, Any]],
    pictures: Path,
    *,
    batch: int = 128,
    max_new_tokens: int = 32,
    title: str,
) -> list[str]:
    """The model's greedy answer to each record's last question, earlier turns given as they are in the record."""
    model, tokenizer = vlm.model.eval(), vlm.tokenizer
    encoder, preprocessing = model_inputs(vlm)
    all_prompts = [encoder.encode_prompt(to_messages(record)[:-1]) for record in records]
    # Questions of one length are mostly of one wording, so that a batch's answers end at about the same time.
    order = sorted(range(len(records)), key=lambda index: len(all_prompts[index]))
    answers = [""] * len(records)
    for batch_order in _batches(order, batch, title):
        rows = [records[index] for index in batch_order]
        prompts = [all_prompts[index] for index in batch_order]
        length = max(map(len, prompts))
        padding = tokenizer.pad_token_id
        # Left padding, so that every row's next token is at the same place.
        ids_BT = torch.tensor([[padding] * (length - len(prompt)) + prompt for prompt in prompts])
        attention_BT = torch.tensor([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        pixels = [
            torch.from_numpy(read_pixels(pictures / record["image"], preprocessing))
            for record in rows
            if record.get("image")
        ]
        generated_BT = model.generate(
            input_ids=ids_BT.to(model.device),
            attention_mask=attention_BT.to(model.device),
            pixel_values=torch.stack(pixels).to(model.device) if pixels else None,
            max_new_tokens=max_new_tokens,
            do_sample=False,
        )
        texts = tokenizer.batch_decode(generated_BT[:, length:], skip_special_tokens=True)
        for index, text in zip(batch_order, texts, strict=True):
            answers[index] = text
    return answers


def _batches(order: Sequence[int], size: int, title: str) -> Iterator[Sequence[int]]:
    for start in tqdm(range(0, len(order), size), desc=title, disable=None, unit="batch"):
        yield order[start : start + size]
