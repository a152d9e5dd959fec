"""A whole Switch-KD training step beside the obvious implementation: time, peak memory, utilisation.

    python -m benchmarks.step                  # real shapes on a GPU: SigLIP so400m, Qwen2.5 3B -> 0.5B, bfloat16
    python -m benchmarks.step --shapes heads   # for a CPU: one-layer models with the real vocabulary and head widths
    python -m benchmarks.step --shapes tiny    # to see that it runs

The obvious implementation has float32 logits at every position of all three pathways and explicit pairs of the top
256. Weights are random, which changes neither time nor memory.

Shapes: B rows, T tokens of a row, V vocabulary, N supervised positions.
"""

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlavaConfig, LlavaForConditionalGeneration
from transformers.models.qwen2 import Qwen2Config
from transformers.models.siglip import SiglipVisionConfig

from benchmarks.explicit_pairs import explicit_dbild
from benchmarks.measuring import Work, cpu_peak_mib, cuda_peak_mib, describe_machine, spread, times_ms
from switchkd.training.estimate.estimate import GPU_TFLOPS
from switchkd.training.models.distillation import Distillation
from switchkd.training.models.pathway import embed, last_hidden, visual_features, visual_tokens
from switchkd.training.models.switch import switch_hidden
from switchkd.training.objectives import build_objective

Sizes = dict[str, Any]

IMAGE_TOKEN = 5
SIGLIP: Sizes = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}
QWEN_05B: Sizes = {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14}
QWEN_3B: Sizes = {"hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16}
TINY: Sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}


@dataclass(frozen=True)
class Shapes:
    """Sizes of the models and of the batch."""

    vision: Sizes
    student: Sizes
    teacher: Sizes
    vocabulary: int = 151_936
    image_size: int = 384
    patch: int = 14
    text_tokens: int = 200
    supervised: int = 60

    @property
    def picture_tokens(self) -> int:
        """Visual tokens of a picture."""
        return int((self.image_size // self.patch) ** 2)


SHAPES = {
    "real": Shapes(SIGLIP, QWEN_05B, QWEN_3B),
    "heads": Shapes(TINY, QWEN_05B | {"num_hidden_layers": 1}, QWEN_3B | {"num_hidden_layers": 1}),
    "tiny": Shapes(TINY, TINY, TINY | {"hidden_size": 48}, 500, 24, 6, 12, 5),
}


def make_model(shapes: Shapes, language_model: Sizes, dtype: torch.dtype, device: torch.device) -> Any:
    """Return a LLaVA of these sizes with random weights."""
    heads = language_model["num_attention_heads"]
    vision = SiglipVisionConfig(
        **shapes.vision, image_size=shapes.image_size, patch_size=shapes.patch, vision_use_head=False
    )
    text = Qwen2Config(
        **language_model,
        vocab_size=shapes.vocabulary,
        num_key_value_heads=2 if heads % 2 == 0 else 1,
        tie_word_embeddings=True,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE_TOKEN,
        vision_feature_layer=-2,
        vision_feature_select_strategy="full",
        image_seq_length=shapes.picture_tokens,
        tie_word_embeddings=True,
        dtype=dtype,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model: Any = LlavaForConditionalGeneration(config)
        return model.to(dtype)


def make_batch(shapes: Shapes, rows: int, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """Return rows of one picture, then text whose last tokens are supervised."""
    generator = torch.Generator().manual_seed(1)
    text_BT = torch.randint(IMAGE_TOKEN + 1, shapes.vocabulary, (rows, shapes.text_tokens), generator=generator)
    ids_BT = torch.cat([torch.full((rows, shapes.picture_tokens), IMAGE_TOKEN), text_BT], dim=1)
    labels_BT = torch.full_like(ids_BT, -100)
    labels_BT[:, -shapes.supervised :] = ids_BT[:, -shapes.supervised :]
    pixels_BCHW = torch.rand(rows, 3, shapes.image_size, shapes.image_size, generator=generator).to(dtype)
    batch = {"input_ids": ids_BT, "attention_mask": torch.ones_like(ids_BT), "labels": labels_BT}
    return {name: tensor.to(device) for name, tensor in (batch | {"pixel_values": pixels_BCHW}).items()}


class Obvious(nn.Module):
    """Switch-KD as one writes it first: float32 logits everywhere, then the supervised positions, then all pairs."""

    def __init__(self, student: Any, teacher: Any, window: int) -> None:
        super().__init__()
        self.student, self.teacher, self.window = student, teacher.requires_grad_(False).eval(), window

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, pixel_values: Tensor) -> Tensor:
        """Return CE + DBiLD of the student + DBiLD of the switch, means over the supervised positions."""
        features_PLE = visual_features(self.student, pixel_values)
        student_BTV = self._logits(self.student, input_ids, attention_mask, visual_tokens(self.student, features_PLE))
        with torch.no_grad():
            tokens_PLD = visual_tokens(self.teacher, visual_features(self.teacher, pixel_values))
            teacher_BTV = self._logits(self.teacher, input_ids, attention_mask, tokens_PLD)
        switch_BTD = switch_hidden(self.teacher, input_ids, attention_mask, features_PLE)
        switch_BTV = self.teacher.lm_head(switch_BTD).float()

        ce = cross_entropy(student_BTV[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        supervised_BT = labels[:, 1:] != -100
        student_NV, teacher_NV, switch_NV = (
            logits_BTV[:, :-1][supervised_BT] for logits_BTV in (student_BTV, teacher_BTV, switch_BTV)
        )
        pairs = sum(explicit_dbild(teacher_NV, each_NV, window=self.window) for each_NV in (student_NV, switch_NV))
        return ce + pairs / len(student_NV)

    @staticmethod
    def _logits(model: Any, ids_BT: Tensor, mask_BT: Tensor, tokens_PLD: Tensor) -> Tensor:
        logits: Tensor = model.lm_head(last_hidden(model, embed(model, ids_BT, tokens_PLD), mask_BT)).float()
        return logits


def prepare(kind: str, shapes_name: str, rows: int, window: int, device: torch.device) -> Work:
    """Return a forward and backward of "ours" or "obvious"; `window` is the obvious one's, ours has none."""
    shapes = SHAPES[shapes_name]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    student, teacher = (make_model(shapes, sizes, dtype, device) for sizes in (shapes.student, shapes.teacher))
    batch = make_batch(shapes, rows, dtype, device)
    if kind == "obvious":
        step: nn.Module = Obvious(student.train(), teacher, window)
    else:
        own_window = window if kind == "ours, same window" else None
        step = Distillation(student, teacher, build_objective("switch_kd", window=own_window)).train()

    def work() -> Tensor:
        step.zero_grad(set_to_none=True)
        output = step(**batch)
        loss: Tensor = output if kind == "obvious" else output["loss"]
        loss.backward()
        return loss.detach()

    return work


def measure(args: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """Return a record for each implementation: milliseconds, tokens per second, peak memory, loss, utilisation."""
    shapes = SHAPES[args.shapes]
    tokens = args.rows * (shapes.picture_tokens + shapes.text_tokens)
    records: list[dict[str, Any]] = []
    for kind in ("ours", "ours, same window", "obvious"):
        settings = args.shapes, args.rows, args.window, device
        work = prepare(kind, *settings)
        loss = work()
        assert isinstance(loss, Tensor)
        ms = spread(times_ms({kind: work}, args.repeats, device)[kind])
        record: dict[str, Any] = {"implementation": kind, "loss": loss.item(), "ms": ms}
        record["tokens_per_s"] = tokens / ms["median"] * 1000
        if kind == "ours":
            with FlopCounterMode(display=False) as counter:
                work()
            record["tflop"] = counter.get_total_flops() / 1e12
        record["utilisation"] = utilisation(records[0]["tflop"] if records else record["tflop"], ms, args.peak, device)
        if device.type == "cuda":
            record |= cuda_peak_mib(work, device)
            del work
            torch.cuda.empty_cache()
        else:
            del work
            record |= cpu_peak_mib(prepare, (kind, *settings), (kind, "tiny", 1, 8, device))
        records.append(record)
    return records


def utilisation(tflop: float, ms: dict[str, float], peak: float | None, device: torch.device) -> float | None:
    """Return model FLOPs utilisation: the products that our step needs, over what the device could do meanwhile."""
    if peak is None and device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        peak = next((value for known, value in GPU_TFLOPS.items() if known in name), None)
    return None if peak is None else tflop / (ms["median"] / 1000) / peak


def table(records: list[dict[str, Any]]) -> str:
    """Return the records as lines of a Markdown table."""
    lines = [
        "| step | loss | ms, median | least – most | tokens/s | utilisation | peak MiB | above models and batch |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for each in records:
        ms, used = each["ms"], each["utilisation"]
        lines.append(
            f"| {each['implementation']} | {each['loss']:.3f} | {ms['median']:.0f} | {ms['min']:.0f} – {ms['max']:.0f} "
            f"| {each['tokens_per_s']:.0f} | {'' if used is None else f'{used:.1%}'} "
            f"| {each['peak_mib']:.0f} | {each['above_mib']:.0f} |"
        )
    return "\n".join(lines)


def main(words: list[str] | None = None) -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--shapes", choices=list(SHAPES), default="real", help="sizes of the models and of the batch")
    parser.add_argument("--rows", type=int, default=4, help="pictures, and so conversations, in the batch")
    parser.add_argument("--window", type=int, default=256, help="leading logits of the explicit pairs")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--peak", type=float, help="what the device can do, in TFLOP/s, if it is not a known GPU")
    parser.add_argument("--device", choices=["cpu", "cuda"])
    parser.add_argument("--json", type=Path, help="write the records here")
    args = parser.parse_args(words)
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if args.shapes == "real" and device.type == "cpu":
        parser.error("--shapes real needs a GPU (the models alone take 15 GiB in float32); use --shapes heads")
    shapes = SHAPES[args.shapes]
    records = measure(args, device)
    print(
        f"\n{describe_machine(device)}; shapes {args.shapes}: {args.rows} rows of {shapes.picture_tokens} visual and "
        f"{shapes.text_tokens} text tokens, {shapes.supervised} of them supervised; V = {shapes.vocabulary:,}\n"
    )
    print(table(records))
    if args.json:
        report = {"machine": describe_machine(device), "shapes": args.shapes, "rows": args.rows, "records": records}
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
