"""`switchkd verify BUNDLE`: check a bundle's files and run its graphs, against its checkpoint if that is given."""

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

from .card.mobile_checker import check_mobile
from .card.ort_files import check_ort_files, has_ort_files, is_checked
from .contract.bundle import INT7, INT8, PORTABLE, Bundle, BundleError, GraphFile, Manifest
from .contract.integer_products import ASK_FOR_EXACT, products_are_exact
from .contract.prompt import PromptError
from .graphs.checkpoint import Checkpoint, open_checkpoint
from .graphs.onnx_graph import OnnxGraph
from .graphs.tracing import ExportError
from .process.memory import return_freed_blocks
from .process.progress import Steps
from .quantisation.precisions import MIXED, PRECISIONS, precision_of
from .quantisation.weight_only import integer_weights
from .verification.graph_runner import GraphRunner, ValuesError, VerificationError, exercise
from .verification.parity import Expected, Pairs, check_pairs, check_scores, compare, record, recorded_pairs
from .verification.reference import TorchReference

ERRORS: tuple[type[Exception], ...] = (BundleError, VerificationError, ExportError, PromptError)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command's arguments."""
    parser.add_argument("bundle", type=Path, help="bundle folder")
    parser.add_argument("--checkpoint", type=Path, help="compare with this checkpoint in PyTorch, not with fp32 graphs")
    parser.add_argument(
        "--mobile", action="store_true", help="say what onnxruntime's mobile usability checker says of each graph"
    )
    add_full(parser)


def add_full(parser: argparse.ArgumentParser) -> None:
    """Describe the choice between minutes and seconds."""
    parser.add_argument(
        "--pairs",
        type=int,
        help="pictures and questions whose greedy answers are compared (default: 200 at export, and what a bundle "
        "records when it is verified)",
    )
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


def verify_bundle(
    path: Path, checkpoint: Path | None, *, full: bool, pairs: int | None = None, mobile: bool = False
) -> None:
    """Check hashes, names, axes and shapes, run every graph, compare, and print one line per precision.

    By default on as many pairs as the bundle records.
    """
    bundle = Bundle.open(path, check_hashes=True)  # of every file, whatever its precision
    manifest = bundle.manifest
    for precision in dict.fromkeys(graph.precision for graph in manifest.graphs):
        if precision not in (*PRECISIONS, MIXED):
            raise BundleError(f"{path}: precision {precision!r} is unknown to this switchkd; update it")
    for graph in manifest.graphs:
        _check_integer_weights(path, graph)
    pairs = recorded_pairs(manifest.verification) if pairs is None else pairs
    check_pairs(pairs)
    if mobile:
        _say_mobile(path, manifest)
    prompts = Pairs(bundle, pairs, full=full)
    steps = Steps(1 + len(manifest.variants()), show_progress)
    with steps.step("ask the reference"):
        expected, compared_with = _expected(bundle, prompts, checkpoint, steps)
    for variant, run in manifest.variants().items():
        with steps.step(f"verify {variant}"):
            runner = GraphRunner.open(path, run)
            line = f"{variant}: {exercise(runner, full=full)} runs in order"
            if expected is not None:
                found = compare(runner, prompts, expected, precision_of(run.precision).bounds, steps.pairs_done)
                if not full:  # other prompts, other scores
                    check_scores(variant, found, manifest.verification.get(variant, {}))
                line += (
                    f"; against {compared_with}: logits off by {found['logits']['relative_rms']:.1e}, "
                    f"{found['greedy']['equal']} of {found['greedy']['prompts']} greedy answers equal"
                )
            if has_ort_files(manifest) and is_checked(manifest, run):
                check_ort_files(path, run, prompts.first[:3])
                line += "; .ort files give the same"
        print(line)
    _say_integers(manifest)
    print(f"{path}: verified")


def _check_integer_weights(path: Path, graph: GraphFile) -> None:
    """Raise ValuesError where weights that are said to have 7 bits have more: no session would be asked to be exact."""
    if graph.integer_weights == INT7 and (found := integer_weights(OnnxGraph.read(path / graph.file))) != INT7:
        raise ValuesError(
            f"{graph.file}: the manifest says that its integer products have {INT7} weights, they have {found}; "
            "export again"
        )


def _say_integers(manifest: Manifest) -> None:
    """Print which precisions rely on the runtime for exact integers, as bundles did before their weights had 7 bits."""
    for precision in sorted({graph.precision for graph in manifest.graphs if graph.integer_weights == INT8}):
        exact = products_are_exact(INT8)
        here = "which this processor is not" if exact else "which this processor is: switchkd asks for it"
        print(
            f"{precision}: its weights use all of 8 bits, and an x86 processor without VNNI, {here}, answers wrongly "
            f"unless the session option {ASK_FOR_EXACT} is 1; export again, and every runtime is exact"
        )


def _say_mobile(path: Path, manifest: Manifest) -> None:
    """Print the checker's verdicts on the graphs of plain operators; it knows no others."""
    for graph in manifest.graphs:
        if graph.form == PORTABLE:
            accelerated, verdicts = check_mobile(path / graph.file)
            print(f"{graph.file}: " + ("an accelerator may help" if accelerated else "best on the CPU"))
            print(*(f"    {verdict}" for verdict in verdicts), sep="\n")


def _expected(
    bundle: Bundle, prompts: Pairs, checkpoint: Path | None, steps: Steps
) -> tuple[list[Expected] | None, str]:
    """What the checkpoint, or else the bundle's own float32 graphs, say; None where there is neither."""
    if checkpoint is not None:
        source = open_checkpoint(checkpoint)
        _check_same_model(bundle.manifest, source)
        reference = TorchReference(source.model, bundle.model.eos_token_ids)
        return record(reference, prompts, steps.pairs_done), str(checkpoint)
    if "fp32" in bundle.manifest.precisions:
        return record(GraphRunner(Bundle.open(bundle.path, "fp32")), prompts, steps.pairs_done), "its own fp32 graphs"
    return None, ""


def show_progress(step: str, done: int, total: int) -> None:
    """Write how far a command is over the line before, where somebody looks at a terminal."""
    if sys.stderr.isatty():
        print(f"\033[K[{done + 1}/{total}] {step}", end="\r", file=sys.stderr, flush=True)


def run(args: argparse.Namespace) -> int:
    """Verify, and say so."""
    return_freed_blocks()
    verify_bundle(args.bundle, args.checkpoint, full=args.full, pairs=args.pairs, mobile=args.mobile)
    return 0
