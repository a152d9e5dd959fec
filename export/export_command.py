"""`switchkd export CHECKPOINT OUT`: make a bundle of ONNX graphs from a checkpoint folder."""

import argparse
import sys
from pathlib import Path

from .assembly import DECODERS, DEFAULT_PRECISIONS, export_checkpoint
from .bnb_checkpoint import export_bnb
from .bundle import PORTABLE, BundleError
from .graphs import ExportError
from .onnx_graph import Storage
from .prompt import PromptError
from .verification import VerificationError
from .verify_command import add_full, verify_bundle

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
    parser.add_argument(
        "--decoder",
        choices=list(DECODERS),
        default=PORTABLE,
        help="operators of the decoder: plain ones, ONNX Runtime's fused ones (writes faster), or a file of each "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--external-data",
        action="store_true",
        help="weights of every graph in files beside it, not only of graphs over 2 GB",
    )
    parser.add_argument(
        "--only", choices=["verify"], help="write nothing: compare the bundle OUT with the checkpoint it was made from"
    )
    add_full(parser)
    parser.add_argument(
        "--format",
        choices=["onnx", "bitsandbytes"],
        default="onnx",
        help="a bundle of graphs, or a Hugging Face checkpoint in 4 or 8 bit for machines with a GPU",
    )
    parser.add_argument("--bits", type=int, choices=[4, 8], default=4, help="of bitsandbytes (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Export, verify and print sizes and parity."""
    if args.only == "verify":
        verify_bundle(args.out, args.checkpoint, full=args.full)
        return 0
    if args.format == "bitsandbytes":
        _export_bnb(args)
        return 0
    precisions = [name.strip() for name in args.dtype.split(",") if name.strip()]
    storage = Storage(inline_bytes=0) if args.external_data else Storage()
    report = export_checkpoint(
        args.checkpoint, args.out, precisions=precisions, decoder=args.decoder, storage=storage, progress=_show
    )
    for precision, sizes in report.bytes.items():
        record = report.verification[precision]
        print(
            f"{precision}: {sum(sizes.values()) / 1e6:.2f} MB, logits off by {record['logits']['relative_rms']:.1e}, "
            f"{record['greedy']['equal']} of {record['greedy']['prompts']} greedy answers equal"
        )
    print(f"{report.path}: verified, made in {sum(report.seconds.values()):.0f} s")
    return 0


def _export_bnb(args: argparse.Namespace) -> None:
    report = export_bnb(args.checkpoint, args.out, args.bits, progress=_show)
    print(
        f"{report.path}: {report.bytes / 1e6:.2f} MB in place of {report.bytes_before / 1e6:.2f} MB, logits off by "
        f"{report.logits_rms:.1e}, {report.equal_answers} of {report.prompts} greedy answers equal"
    )


def _show(step: str, done: int, total: int) -> None:
    if sys.stderr.isatty():
        print(f"[{done + 1}/{total}] {step}", file=sys.stderr)
