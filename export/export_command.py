"""`switchkd export CHECKPOINT OUT`: make a bundle of ONNX graphs from a checkpoint folder."""

import argparse
import sys
from pathlib import Path

from .assembly import DEFAULT_PRECISIONS, export_checkpoint
from .bundle import BundleError
from .graphs import ExportError
from .prompt import PromptError
from .verification import VerificationError

ERRORS: tuple[type[Exception], ...] = (ExportError, VerificationError, BundleError, PromptError)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command's arguments."""
    parser.add_argument("checkpoint", type=Path, help="folder of a LlavaForConditionalGeneration model; only read")
    parser.add_argument("out", type=Path, help="folder to make; must not exist yet")
    parser.add_argument(
        "--dtype",
        default=",".join(DEFAULT_PRECISIONS),
        help="precisions, separated by commas; the first is the bundle's default (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """Export, verify and print sizes and parity."""
    precisions = [name.strip() for name in args.dtype.split(",") if name.strip()]
    report = export_checkpoint(args.checkpoint, args.out, precisions=precisions, progress=_show)
    for precision, sizes in report.bytes.items():
        record = report.verification[precision]
        print(
            f"{precision}: {sum(sizes.values()) / 1e6:.2f} MB, logits off by {record['logits']['relative_rms']:.1e}, "
            f"{record['greedy']['equal']} of {record['greedy']['prompts']} greedy answers equal"
        )
    print(f"{report.path}: verified, made in {sum(report.seconds.values()):.0f} s")
    return 0


def _show(step: str, done: int, total: int) -> None:
    if sys.stderr.isatty():
        print(f"[{done + 1}/{total}] {step}", file=sys.stderr)
