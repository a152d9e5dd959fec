"""Time and peak memory of DBiLD, forward and backward, beside the explicit pairs and a full-vocabulary KL.

    python -m benchmarks.objective                        # a table; --json FILE writes it as JSON too
    python -m benchmarks.objective --positions 64 --windows 256 whole

Shapes: N positions, V vocabulary, K tokens compared.
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import kl_div

from benchmarks.explicit_pairs import explicit_dbild, explicit_pair_kl
from benchmarks.measuring import Work, cpu_peak_mib, cuda_peak_mib, describe_machine, memory_at_hand, spread, times_ms
from switchkd.training.objectives.dbild import dbild, pair_kl, rank

QWEN_VOCABULARY = 151_936
METHODS = ("full KL", "DBiLD", "explicit pairs")
# Tensors of [N, pairs] alive at once in the explicit form's forward and backward, both leaders (counted by hand).
PAIR_TENSORS = 14
# Tensors of [N, V] alive at once in a full KL and its backward, logits included.
VOCABULARY_TENSORS = 9


@dataclass(frozen=True)
class Case:
    """What is compared: `window` None is the whole vocabulary; `forced_k` sets min_k and max_k.

    `gathered` measures what comes after the selection: both leaders' K logits lie ready, and no vocabulary is touched.
    """

    positions: int
    vocabulary: int
    window: int | None
    forced_k: int | None = None
    gathered: bool = False
    logits: str = "language model"

    @property
    def title(self) -> str:
        """The case in a few words."""
        window = "whole" if self.window is None else str(self.window)
        forced = f", k={self.forced_k}" if self.forced_k else ""
        return f"N={self.positions} window={window}{forced}{', gathered' if self.gathered else ''}"

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of `dbild`."""
        forced = {"min_k": self.forced_k, "max_k": self.forced_k} if self.forced_k else {}
        return {"window": self.window, **forced}


def make_logits(case: Case, device: torch.device, seed: int) -> Tensor:
    """Return logits as a language model makes them (hidden · W of low rank, a few leaders far ahead), or normal."""
    generator = torch.Generator().manual_seed(seed)
    shape = case.positions, case.vocabulary
    if case.logits == "normal":
        return (torch.randn(shape, generator=generator) * 2.5).to(device)
    rank_ = 64
    weight_VR = torch.randn(case.vocabulary, rank_, generator=generator)
    weight_VR *= (0.3 * torch.randn(case.vocabulary, 1, generator=generator)).exp()
    logits_NV = torch.randn(case.positions, rank_, generator=generator) * 0.25 @ weight_VR.T
    logits_NV += 0.5 * torch.randn(case.vocabulary, generator=generator)
    leaders_NK = torch.randint(0, case.vocabulary, (case.positions, 12), generator=generator)
    ahead_NK = 12 * torch.rand(case.positions, 12, generator=generator)
    return logits_NV.scatter_add_(1, leaders_NK, ahead_NK).to(device)


def full_kl(reference_NV: Tensor, candidate_NV: Tensor) -> Tensor:
    """Return the summed forward KL over the whole vocabulary."""
    return kl_div(candidate_NV.log_softmax(1), reference_NV.log_softmax(1), log_target=True, reduction="sum")


def prepare(method: str, case: Case, device: torch.device) -> Work:
    """Return a forward and backward of the method, its inputs made."""
    return work_on(method, case, *(make_logits(case, device, seed) for seed in (0, 1)))


def work_on(method: str, case: Case, reference_NV: Tensor, candidate_NV: Tensor) -> Work:
    """Return a forward and backward of the method that returns the loss and the gradient."""
    if case.gathered:
        return _work_on_gathered(method, case, reference_NV, candidate_NV)
    losses: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "full KL": full_kl,
        "DBiLD": lambda reference, candidate: dbild(reference, candidate, reduction="sum", **case.settings),
        "explicit pairs": lambda reference, candidate: explicit_dbild(reference, candidate, **case.settings),
    }
    candidate_NV.requires_grad_()

    def work() -> tuple[Tensor, Tensor]:
        candidate_NV.grad = None
        loss = losses[method](reference_NV, candidate_NV)
        loss.backward()
        assert candidate_NV.grad is not None
        return loss.detach(), candidate_NV.grad

    return work


def _work_on_gathered(method: str, case: Case, reference_NV: Tensor, candidate_NV: Tensor) -> Work:
    pairs = []
    for leader_NV in (reference_NV, candidate_NV):
        leaders = rank(leader_NV, **case.settings)
        p_NK, q_NK = (z_NV.gather(1, leaders.ids_NK) / 3 for z_NV in (candidate_NV, reference_NV))
        pairs.append((p_NK.requires_grad_(), q_NK, leaders.k_N))
    kl = {"DBiLD": pair_kl, "explicit pairs": explicit_pair_kl}[method]

    def work() -> tuple[Tensor, Tensor]:
        for p_NK, _, _ in pairs:
            p_NK.grad = None
        loss = torch.stack([kl(*pair).sum() for pair in pairs]).sum()
        loss.backward()
        return loss.detach(), torch.cat([p_NK.grad for p_NK, _, _ in pairs if p_NK.grad is not None], dim=1)

    return work


def needed_bytes(method: str, case: Case, widest_k: int) -> int:
    """Return about how much memory the method will take, for leaving out what would not fit."""
    vocabulary = VOCABULARY_TENSORS * case.positions * case.vocabulary * 4
    return vocabulary + (PAIR_TENSORS * case.positions * widest_k * (widest_k - 1) // 2 * 4) * (method == METHODS[2])


def measure(case: Case, device: torch.device, repeats: int, memory: bool) -> list[dict[str, Any]]:
    """Return a record for every method: milliseconds, peak memory, agreement; or why it was left out."""
    reference_NV, candidate_NV = (make_logits(case, device, seed) for seed in (0, 1))
    k_N = torch.cat([rank(z_NV, **case.settings).k_N for z_NV in (reference_NV, candidate_NV)])
    at_hand = memory_at_hand(device)
    records: list[dict[str, Any]] = []
    for method in METHODS[case.gathered :]:
        needed = needed_bytes(method, case, int(k_N.max()))
        record: dict[str, Any] = {
            "method": method,
            "case": asdict(case),
            "title": case.title,
            "mean_k": k_N.double().mean().item(),
        }
        if needed > 0.8 * at_hand:
            record["skipped"] = f"needs about {needed / 2**30:.0f} GiB, {at_hand / 2**30:.0f} GiB are free"
        records.append(record)
    running = [record for record in records if "skipped" not in record]
    works = {each["method"]: work_on(each["method"], case, reference_NV, candidate_NV) for each in running}
    _check_agreement(works, case)
    for record in running:
        if memory:
            method = record["method"]
            peak = cuda_peak_mib(works[method], device) if device.type == "cuda" else None
            record |= peak or cpu_peak_mib(prepare, (method, case, device), (method, _tiny(case), device))
    taken = times_ms(works, repeats, device)
    for record in running:
        record["ms"] = spread(taken[record["method"]])
    return records


def _tiny(case: Case) -> Case:
    """The same in small: run once, it loads what the first run of a process loads."""
    return replace(case, positions=2, vocabulary=500, window=8 if case.window else None, forced_k=8 * bool(case.window))


def _check_agreement(works: dict[str, Work], case: Case) -> None:
    """Stop if the linear form and the explicit pairs do not give the same loss and gradient."""
    if "DBiLD" in works and "explicit pairs" in works:
        (got, got_grad), (expected, expected_grad) = works["DBiLD"](), works["explicit pairs"]()
        largest = expected_grad.abs().max().item()
        # Equal logits at the last place may be taken in another order, so single entries of the gradient may differ.
        apart = (got_grad - expected_grad).norm() / expected_grad.norm().clamp(min=1e-30)
        if not (torch.isclose(got, expected, rtol=1e-3, atol=1e-4) and (apart < 1e-2 or largest < 1e-6)):
            raise ValueError(
                f"{case.title}: the linear form gives {got.item()}, the explicit pairs {expected.item()}, gradients "
                f"{apart.item():.2g} of their norm apart; one of them is wrong, so no time of theirs means anything"
            )


COLUMNS = "case", "mean k", "method", "ms, median", "least – most", "× full KL", "peak MiB"
HEAD = f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|"


def lines(records: list[dict[str, Any]]) -> str:
    """Return one case's records as lines of a Markdown table."""
    kl = next((each["ms"]["median"] for each in records if each["method"] == METHODS[0] and "ms" in each), None)
    rows = []
    for record in records:
        cells = [record["title"], f"{record['mean_k']:.0f}", record["method"]]
        if "skipped" in record:
            cells += [f"left out: {record['skipped']}", "", "", ""]
        else:
            ms, peak = record["ms"], record.get("above_mib")
            cells += [f"{ms['median']:.2f}", f"{ms['min']:.2f} – {ms['max']:.2f}"]
            cells += ["" if kl is None else f"{ms['median'] / kl:.2f}", "" if peak is None else f"{peak:.0f}"]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def parse(words: list[str] | None) -> argparse.Namespace:
    """Return the arguments, checked."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.objective", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--positions", type=int, nargs="+", default=[64, 512, 2048])
    parser.add_argument("--windows", nargs="+", default=["32", "256", "2048", "whole"], help="numbers, or 'whole'")
    parser.add_argument("--forced-k", type=int, nargs="*", default=[256], help="window, min_k and max_k at once")
    parser.add_argument("--vocabulary", type=int, default=QWEN_VOCABULARY)
    parser.add_argument("--logits", choices=["language model", "normal"], default="language model")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, help="threads of torch and numpy (by default what torch chooses)")
    parser.add_argument("--device", choices=["cpu", "cuda"], nargs="+", help="by default every one there is")
    parser.add_argument("--no-memory", action="store_true", help="measure time only")
    parser.add_argument("--json", type=Path, help="write the records here")
    args = parser.parse_args(words)
    if args.repeats < 1 or min(args.positions) < 1:
        parser.error("--repeats and --positions are at least 1")
    for window in args.windows:
        if window != "whole" and not (window.isdigit() and int(window) >= 3):
            parser.error(f"a window is {window!r}; give a number from 3 or 'whole'")
    return args


def main(words: list[str] | None = None) -> int:
    """Measure, print and write."""
    args = parse(words)
    if args.threads:
        torch.set_num_threads(args.threads)
    names = args.device or (["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"])
    report = []
    for device in map(torch.device, names):
        cases = []
        for positions in args.positions:
            shape = positions, args.vocabulary
            cases += [Case(*shape, None if w == "whole" else int(w), logits=args.logits) for w in args.windows]
            cases += [Case(*shape, k, k, gathered, args.logits) for k in args.forced_k for gathered in (False, True)]
        machine = describe_machine(device)
        print(f"\n{machine}; V = {args.vocabulary:,}, {args.logits} logits, float32, {args.repeats} repeats\n\n{HEAD}")
        records = []
        for case in cases:
            measured = measure(case, device, args.repeats, not args.no_memory)
            print(lines(measured), flush=True)
            records += measured
        report.append({"machine": machine, "device": device.type, "repeats": args.repeats, "records": records})
    print("\nPeak: above the logits themselves; on a CPU resident memory of a fresh process, on CUDA the allocator's.")
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
