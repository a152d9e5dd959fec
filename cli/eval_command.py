"""`switchkd eval MODEL --data FILE`: a model's answers, scored, with intervals, and compared with another's."""

from __future__ import annotations

import argparse
from pathlib import Path

from switchkd.export.contract.bundle import BundleError
from switchkd.export.contract.pixels import PictureError
from switchkd.export.contract.processor import this_machine
from switchkd.export.contract.prompt import PromptError
from switchkd.training.data.conversations import DataError
from switchkd.training.evaluation.asking import MAX_NEW_TOKENS, Model, evaluate
from switchkd.training.evaluation.kept_answers import Results, find_results, read_results
from switchkd.training.evaluation.metrics import METRICS, default_metrics, metric_of
from switchkd.training.evaluation.questions import EvaluationError, Question, read_questions
from switchkd.training.evaluation.report import System, make_report, report_text, write_report

from .eval_models import CHECKPOINT_BATCH, SERVER_BATCH, is_address, open_model

ERRORS: tuple[type[Exception], ...] = (EvaluationError, DataError, BundleError, PictureError, PromptError)
OUT = Path("runs/evaluation")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    model = "a checkpoint folder, a bundle folder (BUNDLE:PRECISION), http://host:8000/v1 (#NAME), or a results folder"
    parser.add_argument("models", nargs="+", metavar="MODEL", help=f"{model}; several are the seeds of one method")
    parser.add_argument(
        "--against",
        nargs="+",
        default=[],
        metavar="OTHER",
        help="give the paired difference from this, with its interval",
    )
    parser.add_argument(
        "--data", type=Path, metavar="FILE", help="LLaVA JSON or JSONL; the last turn is the right answer"
    )
    parser.add_argument(
        "--pictures", type=Path, metavar="FOLDER", help="what images are named from (default: FILE's folder)"
    )
    parser.add_argument(
        "--metric",
        action="append",
        metavar="NAME",
        help=f"one of {', '.join(METRICS)}; may be given several times (default: choice where all records have "
        "choices, vqa where all have several people's answers, else exact)",
    )
    parser.add_argument("--out", type=Path, default=OUT, metavar="FOLDER", help="answers and reports (%(default)s)")
    parser.add_argument("--limit", type=int, metavar="N", help="N questions alone, the same ones every time")
    parser.add_argument(
        "--max-new-tokens", type=int, default=MAX_NEW_TOKENS, metavar="N", help="most tokens of an answer (%(default)s)"
    )
    parser.add_argument(
        "--batch",
        type=int,
        metavar="N",
        help=f"questions of a checkpoint's batch ({CHECKPOINT_BATCH}), or under way at a server ({SERVER_BATCH})",
    )
    parser.add_argument("--precision", metavar="P", help="which of a bundle's precisions (default: its first)")
    parser.add_argument("--threads", type=int, metavar="N", help="threads of a bundle's engine (default: one a core)")
    parser.add_argument(
        "--model",
        metavar="NAME",
        help="which of a server's models; its key is read from the variable SWITCHKD_EVAL_API_KEY or OPENAI_API_KEY",
    )


def run(args: argparse.Namespace) -> int:
    """Answer, score, compare, write the report and print it."""
    if args.max_new_tokens < 1:
        raise EvaluationError(f"--max-new-tokens is {args.max_new_tokens}, expected 1 or more")
    counts = {len(args.models), len(args.against or args.models)}
    if len(counts) > 1 and 1 not in counts:
        raise EvaluationError(
            f"{len(args.models)} models against {len(args.against)}; seeds are compared in pairs: give as many of "
            "both, or one of one"
        )
    questions = _questions(args)
    for name in args.metric or (default_metrics(questions) if questions else ()):
        metric = metric_of(name)
        if questions is not None:  # what does not fit is known before hours of answering
            metric.rows(questions, [""] * len(questions))
    # All of them are looked at before the first is asked: what does not fit is known before hours of answering.
    ours, theirs = ([_plan(args, word, questions) for word in words] for words in (args.models, args.against))
    system = System(tuple(_results(args, each, questions) for each in ours))
    against = System(tuple(_results(args, each, questions) for each in theirs)) if theirs else None
    metrics = tuple(dict.fromkeys(args.metric or default_metrics(system.results[0].questions)))
    report = make_report(system, against, metrics)
    places = [args.out]
    if against is None and len(system.results) == 1:
        places.append(system.results[0].folder)
    for place in places:
        write_report(place, report)
    print(report_text(report), end="")
    print(f"\nThe report: {args.out / 'report.md'}, {args.out / 'report.json'}")
    for results in (*system.results, *(against.results if against else ())):
        print(f"The answers of {results.name}: {results.folder}")
    return 0


def _questions(args: argparse.Namespace) -> list[Question] | None:
    """The questions of --data; None where nothing but finished results is compared."""
    if args.data is None:
        return None
    pictures = args.pictures or args.data.parent
    return read_questions(args.data, pictures, args.limit)


def _plan(args: argparse.Namespace, word: str, questions: list[Question] | None) -> Results | Model:
    """Finished results, or a model that is to be asked."""
    kept = None if is_address(word) else find_results(Path(word))
    if kept is not None:
        return _checked(read_results(kept), questions)
    model = open_model(word, precision=args.precision, served=args.model, batch=args.batch, threads=args.threads)
    if questions is None:
        raise EvaluationError(f"{word}: has no answers yet; --data FILE says what it is to be asked")
    return model


def _results(args: argparse.Namespace, plan: Results | Model, questions: list[Question] | None) -> Results:
    """The results of a plan."""
    if isinstance(plan, Results):
        return plan
    assert questions is not None
    return evaluate(plan, questions, args.out, max_new_tokens=args.max_new_tokens, machine=this_machine())


def _checked(results: Results, questions: list[Question] | None) -> Results:
    """The results, unless --data holds other questions than they answer."""
    if questions is not None and [q.key for q in questions] != [q.key for q in results.questions]:
        raise EvaluationError(
            f"{results.folder}: answers other questions than those of --data (and --limit); a comparison needs the same"
        )
    return results
