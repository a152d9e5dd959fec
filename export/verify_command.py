"""`switchkd verify BUNDLE`: check a bundle's files and run its graphs, against its checkpoint if that is given."""

import argparse
from dataclasses import asdict
from pathlib import Path

from .bundle import Bundle, BundleError, Manifest
from .checkpoint import Checkpoint, open_checkpoint
from .graphs import ExportError
from .parity import Expected, SamplePrompt, check_scores, compare, record, sample_prompts
from .precisions import PRECISIONS
from .prompt import PromptError
from .reference import TorchReference
from .verification import GraphRunner, VerificationError, exercise

ERRORS: tuple[type[Exception], ...] = (BundleError, VerificationError, ExportError, PromptError)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command's arguments."""
    parser.add_argument("bundle", type=Path, help="bundle folder")
    parser.add_argument("--checkpoint", type=Path, help="compare with this checkpoint in PyTorch, not with fp32 graphs")
    add_full(parser)


def add_full(parser: argparse.ArgumentParser) -> None:
    """Describe the choice between minutes and seconds."""
    parser.add_argument(
        "--full",
        action="store_true",
        help="up to 4 pictures, 4 prompts at once, 2,048 new tokens and 4,096 before them (slow)",
    )


def _check_same_model(manifest: Manifest, source: Checkpoint) -> None:
    ours, theirs = asdict(manifest.model), asdict(source.facts())
    for name, value in ours.items():
        if value != theirs[name]:
            raise BundleError(
                f"{name} is {value} in the manifest and {theirs[name]} in {source.path}; give the checkpoint that the "
                "bundle was made from"
            )


def verify_bundle(path: Path, checkpoint: Path | None, *, full: bool) -> None:
    """Check hashes, names, axes and shapes, run every graph, compare, and print one line per precision."""
    bundle = Bundle.open(path, check_hashes=True)  # of every file, whatever its precision
    manifest = bundle.manifest
    for precision in manifest.precisions:
        if precision not in PRECISIONS:
            raise BundleError(f"{path}: precision {precision!r} is unknown to this switchkd; update it")
    prompts = sample_prompts(bundle, full=full)
    expected, compared_with = _expected(bundle, prompts, checkpoint)
    for variant, (precision, form) in manifest.variants().items():
        runner = GraphRunner(Bundle.open(path, precision).in_form(form))
        line = f"{variant}: {exercise(runner, full=full)} runs in order"
        if expected is not None:
            found = compare(runner, prompts, expected, PRECISIONS[precision].bounds)
            if not full:  # other prompts, other scores
                check_scores(variant, found, manifest.verification.get(variant, {}))
            line += (
                f"; against {compared_with}: logits off by {found['logits']['relative_rms']:.1e}, "
                f"{found['greedy']['equal']} of {found['greedy']['prompts']} greedy answers equal"
            )
        print(line)
    print(f"{path}: verified")


def _expected(
    bundle: Bundle, prompts: list[SamplePrompt], checkpoint: Path | None
) -> tuple[list[Expected] | None, str]:
    """What the checkpoint, or else the bundle's own float32 graphs, say; None where there is neither."""
    if checkpoint is not None:
        source = open_checkpoint(checkpoint)
        _check_same_model(bundle.manifest, source)
        return record(TorchReference(source.model, bundle.model.eos_token_ids), prompts), str(checkpoint)
    if "fp32" in bundle.manifest.precisions:
        return record(GraphRunner(Bundle.open(bundle.path, "fp32")), prompts), "its own fp32 graphs"
    return None, ""


def run(args: argparse.Namespace) -> int:
    """Verify, and say so."""
    verify_bundle(args.bundle, args.checkpoint, full=args.full)
    return 0
