"""The table of precisions: how each is made from the float32 graphs, and how far it may be from the model."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from onnxruntime.quantization import QuantType, quantize_dynamic

from .bundle import EMBED_TOKENS
from .graphs import ExportError, quiet


@dataclass(frozen=True)
class Bounds:
    """How far a graph's outputs may be from PyTorch's before the export is refused."""

    vision_max: float  # largest absolute difference of an image feature
    logits_max: float  # largest absolute difference of a logit
    relative_rms: float  # root mean square of the difference over that of the expected values, any graph
    same_tokens: bool  # whether greedy answers must be equal


@dataclass(frozen=True)
class Precision:
    """One column of a bundle: files named `graph + suffix + .onnx`."""

    name: str
    suffix: str  # as transformers.js looks for it
    write: Callable[[str, Path, Path], None]  # graph name, float32 file, file to write
    bounds: Bounds


def _copy(_: str, source: Path, target: Path) -> None:
    shutil.copyfile(source, target)


def _int8(graph: str, source: Path, target: Path) -> None:
    """Dynamic quantisation to MatMulInteger: 8-bit activations without sign, weights with sign, per output channel.

    Products of two activations stay float32. Embeddings become 8 bit too: they are the largest table of a small model.
    """
    with quiet():
        quantize_dynamic(
            source,
            target,
            op_types_to_quantize=["Gather"] if graph == EMBED_TOKENS else ["MatMul"],
            per_channel=True,
            weight_type=QuantType.QInt8,
            extra_options={"MatMulConstBOnly": True},
        )


PRECISIONS = {
    precision.name: precision
    for precision in (
        Precision(
            name="fp32",
            suffix="",
            write=_copy,
            bounds=Bounds(vision_max=1e-4, logits_max=1e-3, relative_rms=1e-4, same_tokens=True),
        ),
        # A broken 8-bit graph is off by its whole signal (1.0 and more); a sound one by some hundredths.
        Precision(
            name="int8",
            suffix="_int8",
            write=_int8,
            bounds=Bounds(vision_max=float("inf"), logits_max=float("inf"), relative_rms=0.3, same_tokens=False),
        ),
    )
}


def choose_precisions(names: tuple[str, ...] | list[str]) -> list[Precision]:
    """Look precisions up by name, each once, in the order given; raises ExportError for an unknown one."""
    if not names:
        raise ExportError(f"no precision given; choose from {', '.join(PRECISIONS)}")
    for name in names:
        if name not in PRECISIONS:
            raise ExportError(f"precision {name!r} is unknown; choose from {', '.join(PRECISIONS)}")
    return [PRECISIONS[name] for name in dict.fromkeys(names)]
