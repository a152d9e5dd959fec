"""`switchkd verify BUNDLE`: check a bundle's files and run its graphs, against its checkpoint if that is given."""

import argparse
from dataclasses import asdict
from pathlib import Path

from .bundle import Bundle, BundleError, Manifest, read_manifest
from .checkpoint import Checkpoint, open_checkpoint
from .graphs import ExportError
from .parity import Reference, compare
from .precisions import PRECISIONS
from .prompt import PromptError
from .reference import TorchReference
from .verification import GraphRunner, VerificationError, exercise

ERRORS: tuple[type[Exception], ...] = (BundleError, VerificationError, ExportError, PromptError)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command's arguments."""
    parser.add_argument("bundle", type=Path, help="bundle folder")
    parser.add_argument("--checkpoint", type=Path, help="compare with this checkpoint in PyTorch, not with fp32 graphs")


def _check_same_model(manifest: Manifest, source: Checkpoint) -> None:
    ours, theirs = asdict(manifest.model), asdict(source.facts())
    for name, value in ours.items():
        if value != theirs[name]:
            raise BundleError(
                f"{name} is {value} in the manifest and {theirs[name]} in {source.path}; give the checkpoint that the "
                "bundle was made from"
            )


def run(args: argparse.Namespace) -> int:
    """Check hashes, names, axes and shapes, run every graph, compare, and print one line per precision."""
    manifest = read_manifest(args.bundle)
    reference: Reference | None = None
    compared_with = "its own fp32 graphs"
    if args.checkpoint is not None:
        source = open_checkpoint(args.checkpoint)
        _check_same_model(manifest, source)
        reference = TorchReference(source.model, manifest.model.eos_token_ids)
        compared_with = str(args.checkpoint)
    elif "fp32" in manifest.precisions:
        reference = GraphRunner(Bundle.open(args.bundle, "fp32"))
    for number, precision in enumerate(manifest.precisions):
        if precision not in PRECISIONS:
            raise BundleError(f"{args.bundle}: precision {precision!r} is unknown to this switchkd; update it")
        # Hashes cover all precisions at once.
        runner = GraphRunner(Bundle.open(args.bundle, precision, check_hashes=number == 0))
        line = f"{precision}: {exercise(runner)} runs in order"
        if reference is not None:
            record = compare(runner, reference, PRECISIONS[precision].bounds)
            line += (
                f"; against {compared_with}: logits off by {record['logits']['relative_rms']:.1e}, "
                f"{record['greedy']['equal']} of {record['greedy']['prompts']} greedy answers equal"
            )
        print(line)
    print(f"{args.bundle}: verified")
    return 0
