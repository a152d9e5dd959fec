"""Answers questions with a checkpoint, greedily and in batches.

Shapes: B questions of a batch, T tokens, P pictures.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from switchkd.export.contract.pixels import read_pixels

from ..data.conversations import picture_of, to_messages
from ..data.label_mask import model_inputs
from ..models.vlm import Vlm

Prompt = tuple[Sequence[Mapping[str, Any]], Path | None]  # messages, and the picture that they have a place for


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
    prompts: list[Prompt] = []
    for record in records:
        image = picture_of(record)
        prompts.append((to_messages(record)[:-1], None if image is None else pictures / image))
    answers = [""] * len(records)
    batches = generate_batches(vlm, prompts, batch=batch, max_new_tokens=max_new_tokens)
    total = -(-len(prompts) // batch)
    for answered in tqdm(batches, total=total, desc=title, disable=None, unit="batch"):
        for index, text, _ in answered:
            answers[index] = text
    return answers


@torch.inference_mode()
def generate_batches(
    vlm: Vlm, prompts: Sequence[Prompt], *, batch: int, max_new_tokens: int
) -> Iterator[list[tuple[int, str, bool]]]:
    """Each batch's answers as they come: which prompt, the text, and whether it was cut off at `max_new_tokens`."""
    model, tokenizer = vlm.model.eval(), vlm.tokenizer
    encoder, preprocessing = model_inputs(vlm)
    all_ids = [encoder.encode_prompt([dict(message) for message in messages]) for messages, _ in prompts]
    ends = _end_tokens(vlm)
    # Questions of one length are mostly of one wording, so that a batch's answers end at about the same time.
    order = sorted(range(len(prompts)), key=lambda index: len(all_ids[index]))
    for start in range(0, len(order), batch):
        rows = order[start : start + batch]
        length = max(len(all_ids[row]) for row in rows)
        padding = tokenizer.pad_token_id
        # Left padding, so that every row's next token is at the same place.
        ids_BT = torch.tensor([[padding] * (length - len(all_ids[row])) + all_ids[row] for row in rows])
        attention_BT = torch.tensor([[0] * (length - len(all_ids[row])) + [1] * len(all_ids[row]) for row in rows])
        paths = [path for row in rows if (path := prompts[row][1]) is not None]
        pixels = [torch.from_numpy(read_pixels(path, preprocessing)) for path in paths]
        # Not named where there is none: transformers would encode the None.
        seen = {"pixel_values": torch.stack(pixels).to(model.device)} if pixels else {}
        generated_BT = model.generate(
            input_ids=ids_BT.to(model.device),
            attention_mask=attention_BT.to(model.device),
            **seen,
            max_new_tokens=max_new_tokens,
            do_sample=False,
        )[:, length:]
        texts = tokenizer.batch_decode(generated_BT, skip_special_tokens=True)
        cut = [not ends & set(tokens) for tokens in generated_BT.tolist()]
        yield list(zip(rows, texts, cut, strict=True))


def _end_tokens(vlm: Vlm) -> set[int]:
    """The tokens that end an answer; an answer without one was cut off."""
    configured = vlm.model.generation_config.eos_token_id
    ends = configured if isinstance(configured, list) else [configured]
    return {token for token in (*ends, vlm.tokenizer.eos_token_id) if token is not None}
