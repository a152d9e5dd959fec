"""`switchkd export CHECKPOINT OUT`: make a bundle of ONNX graphs from a checkpoint folder."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .assembly import DECODERS, DEFAULT_PRECISIONS, export_checkpoint
from .bnb_checkpoint import export_bnb
from .contract.bundle import PORTABLE, BundleError
from .contract.prompt import PromptError
from .graphs.onnx_graph import Storage
from .graphs.tracing import ExportError
from .process.memory import return_freed_blocks
from .quantisation.precisions import MIXED, parse_parts
from .search.calibration import PAIRS as CALIBRATION_PAIRS
from .search.mix_options import MAX_DROP, MixOptions
from .verification.graph_runner import VerificationError
from .verification.parity import PAIRS
from .verify_command import add_full, show_progress, verify_bundle

ERRORS: tuple[type[Exception], ...] = (ExportError, VerificationError, BundleError, PromptError)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command's arguments."""
    parser.add_argument("checkpoint", type=Path, help="folder of a LlavaForConditionalGeneration model; only read")
    parser.add_argument("out", type=Path, help="folder to make; may be there if it is empty")
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
        "--prefill",
        metavar="PRECISION",
        help="the precision that reads pictures and prompts for those of --dtype, which then write: int8 for q4, say; "
        "one that is not among them does nothing else",
    )
    _add_mix_arguments(parser)
    parser.add_argument(
        "--external-data",
        action="store_true",
        help="weights of every graph in files beside it, not only of graphs over 1 GiB",
    )
    parser.add_argument(
        "--only", choices=["verify"], help="write nothing: compare the bundle OUT with the checkpoint it was made from"
    )
    parser.add_argument(
        "--ort", action="store_true", help="every graph in onnxruntime's own format too, for its minimal builds"
    )
    parser.add_argument(
        "--examples", type=Path, metavar="FOLDER", help="pictures and an examples.json that go in too, for the demo"
    )
    add_full(parser)
    parser.add_argument(
        "--format",
        choices=["onnx", "bitsandbytes"],
        default="onnx",
        help="a bundle of graphs, or a Hugging Face checkpoint in 4 or 8 bit for machines with a GPU",
    )
    parser.add_argument("--bits", type=int, choices=[4, 8], default=4, help="of bitsandbytes (default: %(default)s)")


def _add_mix_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--parts",
        metavar="PART=METHOD,...",
        help="what `--dtype mixed` is made of: fp32, int8, int8_smooth, q4 or q4_gptq for each of vision_encoder, "
        "projector, embeddings (fp32, int8 or q4), decoder and lm_head; those not named stay fp32",
    )
    parser.add_argument(
        "--max-drop",
        type=float,
        metavar="POINTS",
        help=f"percentage points of accuracy that the mix found by `--dtype auto` may lose (default: {MAX_DROP})",
    )
    parser.add_argument(
        "--calibration",
        type=Path,
        metavar="FILE",
        help="questions and answers in LLaVA JSON or JSONL, half to calibrate on and half to score every precision on "
        "(default: generated where they are needed, with the float32 model's own answers)",
    )
    parser.add_argument("--picture-root", type=Path, help="folder of their pictures (default: the file's)")
    parser.add_argument(
        "--calibration-pairs",
        type=int,
        default=CALIBRATION_PAIRS,
        metavar="N",
        help="how many are taken, evenly spread over the file (default: %(default)s)",
    )


def _check_used(args: argparse.Namespace) -> None:
    """Raise ExportError for an option that would have no effect."""
    graphs = {"dtype", "decoder", "prefill", "parts", "max_drop", "calibration", "picture_root", "calibration_pairs"}
    graphs |= {"external_data", "ort", "examples"}
    verification = {"pairs", "full"}
    if args.only == "verify":
        what, unused = "--only verify", graphs | {"bits", "format"}
    elif args.format == "bitsandbytes":
        what, unused = "--format bitsandbytes", graphs | verification
    else:
        what, unused = "--format onnx", {"bits", "full"}
    defaults = argparse.ArgumentParser()
    add_arguments(defaults)
    for name in sorted(unused):
        if getattr(args, name) != defaults.get_default(name):
            raise ExportError(f"--{name.replace('_', '-')} has no effect with {what}; leave one of the two out")


def run(args: argparse.Namespace) -> int:
    """Export, verify and print sizes and parity."""
    return_freed_blocks()
    _check_used(args)
    if args.only == "verify":
        verify_bundle(args.out, args.checkpoint, full=args.full, pairs=args.pairs)
        return 0
    if args.format == "bitsandbytes":
        _export_bnb(args)
        return 0
    precisions = [name.strip() for name in args.dtype.split(",") if name.strip()]
    storage = Storage(inline_bytes=0) if args.external_data else Storage()
    report = export_checkpoint(
        args.checkpoint,
        args.out,
        precisions=precisions,
        decoder=args.decoder,
        prefill=args.prefill,
        mix=MixOptions(
            parts=None if args.parts is None else parse_parts(args.parts),
            max_drop=args.max_drop,
            calibration=args.calibration,
            picture_root=args.picture_root,
            pairs=args.calibration_pairs,
        ),
        storage=storage,
        pairs=PAIRS if args.pairs is None else args.pairs,
        ort=args.ort,
        examples=args.examples,
        progress=show_progress,
    )
    for precision, sizes in report.bytes.items():
        record = report.verification[precision]
        line = (
            f"{precision}: {sum(sizes.values()) / 1e6:.2f} MB, logits off by {record['logits']['relative_rms']:.1e}, "
            f"{record['greedy']['equal']} of {record['greedy']['prompts']} greedy answers equal"
        )
        if scored := record.get("calibration"):
            line += f", {scored['accuracy']:.1%} of {scored['pairs']} scored answers right"
        print(line)
    if search := report.verification.get(MIXED, {}).get("search"):
        _show_search(search)
    for note in report.notes:
        print(f"note: {note}")
    print(f"{report.path}: verified, made in {sum(report.seconds.values()):.0f} s")
    return 0


def _show_search(search: Mapping[str, Any]) -> None:
    """What each part costs and saves, the mixes that were built, and how to make the chosen one again."""
    base, columns = search["float32"], f"{'drop':>7} {'same':>6} {'logits':>8} {'size':>7} {'time':>7}"
    print(
        f"\nfp32 answers {search['accuracy']:.1%} right, in {base['seconds'] * 1e3:.1f} ms each. Below: points of that "
        "lost, answers as in fp32, error of logits, bytes and seconds beside fp32's"
    )
    print(f"{'one part changed':32} {columns}")
    for trial in search["trials"]:
        _show_row(f"{trial['part']}={trial['method']}", trial, base)
    print(f"{'mixes, cheapest first':32} {columns}")
    for number, attempt in enumerate(search["attempts"], 1):
        _show_row(
            f"{number}. {'taken' if attempt['held'] else 'dropped too much'}",
            {**attempt["score"], **attempt},
            base,
        )
    if not any(attempt["held"] for attempt in search["attempts"]):
        print("no mix of them held: taken is the cheapest of the parts that held alone, or float32")
    print(f"again without the search: --dtype mixed {search['command']}\n")


def _show_row(name: str, row: Mapping[str, Any], base: Mapping[str, Any]) -> None:
    print(
        f"{name:32} {row['drop']:+7.1f} {row['agreement']:6.0%} {row['relative_rms']:8.1e} "
        f"{row['bytes'] / base['bytes']:7.0%} {row['seconds'] / base['seconds']:7.0%}"
    )


def _export_bnb(args: argparse.Namespace) -> None:
    report = export_bnb(args.checkpoint, args.out, args.bits, progress=show_progress)
    if report.note is not None:
        print(f"note: {report.note}")
    print(
        f"{report.path}: {report.bytes / 1e6:.2f} MB in place of {report.bytes_before / 1e6:.2f} MB, logits off by "
        f"{report.logits_rms:.1e}, {report.equal_answers} of {report.prompts} greedy answers equal"
    )
