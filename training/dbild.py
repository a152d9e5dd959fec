"""DBiLD, the dynamic bi-directional logits-difference loss of Switch-KD, in time linear in the tokens it compares.

Source: Switch-KD (arXiv 2604.14629), algorithm 2. The pairwise differences are never built: sums over all pairs i<j of
exp(x_i − x_j) come from running log-sum-exps along the sorted tokens.

Shapes: N positions (rows), V vocabulary, K tokens compared (the widest row's; others are masked).
"""

from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.nn.functional import pad

from .knee import Leaders, accumulable, knee_k, rank, refuse_non_finite

__all__ = ["DbildRows", "Direction", "Leaders", "LedBy", "Reduction", "dbild", "knee_k", "pair_kl", "rank"]

Direction = Literal["reverse", "forward"]
Reduction = Literal["mean", "sum", "none"]
LedBy = Literal["both", "reference", "candidate"]


@dataclass(frozen=True)
class DbildRows:
    """What `dbild` found in each row: both halves of the loss and how many tokens each compared (0: half not asked)."""

    led_by_reference_N: Tensor
    led_by_candidate_N: Tensor
    reference_k_N: Tensor
    candidate_k_N: Tensor


@overload
def dbild(
    reference_logits_NV: Tensor,
    candidate_logits_NV: Tensor,
    *,
    temperature: float = ...,
    window: int | None = ...,
    min_k: int = ...,
    max_k: int | None = ...,
    direction: Direction = ...,
    reduction: Reduction = ...,
    led_by: LedBy = ...,
    reference_leaders: Leaders | None = ...,
    return_rows: Literal[False] = ...,
) -> Tensor: ...
@overload
def dbild(
    reference_logits_NV: Tensor,
    candidate_logits_NV: Tensor,
    *,
    temperature: float = ...,
    window: int | None = ...,
    min_k: int = ...,
    max_k: int | None = ...,
    direction: Direction = ...,
    reduction: Reduction = ...,
    led_by: LedBy = ...,
    reference_leaders: Leaders | None = ...,
    return_rows: Literal[True],
) -> tuple[Tensor, DbildRows]: ...
def dbild(
    reference_logits_NV: Tensor,
    candidate_logits_NV: Tensor,
    *,
    temperature: float = 3.0,
    window: int | None = None,
    min_k: int = 3,
    max_k: int | None = None,
    direction: Direction = "reverse",
    reduction: Reduction = "mean",
    led_by: LedBy = "both",
    reference_leaders: Leaders | None = None,
    return_rows: bool = False,
) -> Tensor | tuple[Tensor, DbildRows]:
    """Return DBiLD of the candidate (student) against the reference (teacher), and its rows if asked (algorithm 2).

    For each leader in turn (reference, candidate): take its top-k tokens, k at the knee of its sorted logits (of the
    top `window` of them; None: all), and compare softmax(d/τ) of both models over the k(k−1)/2 differences
    d = z_i − z_j of pairs in the leader's order. `reverse` is KL(candidate ‖ reference), `forward` the other way; no τ²
    factor. Selection takes no gradient, the selected logits do. Vocabularies are cut to their shared prefix. Sums are
    made in float32 (float64 for float64 logits). No row at all gives 0. `reference_leaders`, from `rank` with the same
    settings over the same prefix, spares sorting a reference twice.

    Raises ValueError for settings that cannot hold, for unequal rows, and for NaN or inf, naming the row.
    """
    check_settings(temperature, window, min_k, max_k, direction, led_by)
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction is {reduction!r}; choose 'mean', 'sum' or 'none'")
    reference_NV, candidate_NV = shared_prefix(reference_logits_NV, candidate_logits_NV)

    no_ids_N = torch.zeros(len(candidate_NV), dtype=torch.long, device=candidate_NV.device)
    by_reference = by_candidate = Leaders(no_ids_N[:, None][:, :0], no_ids_N)
    if led_by != "candidate":
        by_reference = reference_leaders or rank(reference_NV, window=window, min_k=min_k, max_k=max_k)
    else:
        refuse_non_finite(reference_NV)
    if led_by != "reference":
        by_candidate = rank(candidate_NV, window=window, min_k=min_k, max_k=max_k)
    else:
        refuse_non_finite(candidate_NV)

    # Both halves' tokens are gathered at once, so that the backward fills one [N, V] gradient and not two.
    ids_NK = torch.cat([by_reference.ids_NK, by_candidate.ids_NK], dim=1)
    p_NK, q_NK = (accumulable(z_NV.gather(1, ids_NK)) / temperature for z_NV in (candidate_NV, reference_NV))
    if direction == "forward":
        p_NK, q_NK = q_NK, p_NK
    split = by_reference.ids_NK.shape[1]
    halves = (
        pair_kl(p_NK[:, :split], q_NK[:, :split], by_reference.k_N),
        pair_kl(p_NK[:, split:], q_NK[:, split:], by_candidate.k_N),
    )
    loss_N = halves[0] + halves[1]
    loss = loss_N if reduction == "none" else loss_N.sum() / (max(len(loss_N), 1) if reduction == "mean" else 1)
    if not return_rows:
        return loss
    return loss, DbildRows(halves[0].detach(), halves[1].detach(), by_reference.k_N, by_candidate.k_N)


def check_settings(
    temperature: float, window: int | None, min_k: int, max_k: int | None, direction: str, led_by: str
) -> None:
    """Raise ValueError for settings of `dbild` that cannot hold, with the way out."""
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; it divides the logits and must be above 0 (the paper's is 3)")
    if min_k < 3:
        raise ValueError(
            f"min_k is {min_k}; it must be at least 3: one token makes no pair, and two make one pair whose "
            "probability is always 1, so the loss would be 0 whatever the logits"
        )
    if max_k is not None and max_k < min_k:
        raise ValueError(f"max_k is {max_k}, below min_k {min_k}; raise max_k or lower min_k")
    if window is not None and window < min_k:
        raise ValueError(f"window is {window}, below min_k {min_k}; raise window, or None for the whole vocabulary")
    if direction not in ("reverse", "forward"):
        raise ValueError(f"direction is {direction!r}; choose 'reverse' (the paper's) or 'forward'")
    if led_by not in ("both", "reference", "candidate"):
        raise ValueError(f"led_by is {led_by!r}; choose 'both' (the paper's), 'reference' or 'candidate'")


def shared_prefix(reference_NV: Tensor, candidate_NV: Tensor) -> tuple[Tensor, Tensor]:
    """Cut both to the smaller vocabulary; padding the smaller with zeros would invent probability mass."""
    if reference_NV.ndim != 2 or candidate_NV.ndim != 2 or len(reference_NV) != len(candidate_NV):
        raise ValueError(
            f"reference logits are {tuple(reference_NV.shape)} and candidate logits {tuple(candidate_NV.shape)}; "
            "both must be [positions, vocabulary] with the same positions: gather the supervised positions of both"
        )
    vocabulary = min(reference_NV.shape[1], candidate_NV.shape[1])
    return reference_NV[:, :vocabulary], candidate_NV[:, :vocabulary]


def pair_kl(p_NK: Tensor, q_NK: Tensor, k_N: Tensor) -> Tensor:
    """Return KL(softmax over pairs of p ‖ softmax over pairs of q) for each row's first k_N entries.

    A row's pairs are all i<j in the given order, their logits x_i − x_j (temperature already applied). Linear in K:
    with logZ the log-sum-exp over pairs and w_i = ∂logZ/∂x_i, KL = Σ_i w_i(p) (p_i − q_i) − logZ(p) + logZ(q).
    """
    if p_NK.shape[1] == 0:
        return (p_NK - q_NK).sum(1)
    result: Tensor = _PairKL.apply(p_NK, q_NK, k_N)
    return result


class _PairKL(torch.autograd.Function):
    """`pair_kl` with its gradient written out: ∂/∂q = w(q) − w(p), ∂/∂p = Hessian of logZ(p) times (p − q)."""

    @staticmethod
    def forward(ctx: Any, p_NK: Tensor, q_NK: Tensor, k_N: Tensor) -> Tensor:
        valid_NK = torch.arange(p_NK.shape[1], device=k_N.device) < k_N[:, None]
        # Padding repeats the row's first entry, so that it changes neither the highest nor the lowest.
        p_NK, q_NK = (torch.where(valid_NK, x_NK, x_NK[:, :1]) for x_NK in (p_NK, q_NK))
        p, q = _pairs(p_NK, valid_NK), _pairs(q_NK, valid_NK)
        difference_NK = p_NK - q_NK
        kl_N = (p.weight_NK * difference_NK).sum(1) - p.logz_N + q.logz_N
        ctx.p, ctx.q, ctx.difference_NK, ctx.some_N = p, q, difference_NK, k_N > 1
        return torch.where(ctx.some_N, kl_N, 0)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        upstream_N1 = torch.where(ctx.some_N, upstream[0], 0)[:, None]
        grad_p = grad_q = None
        if ctx.needs_input_grad[0]:
            grad_p = ctx.p.hessian_times(ctx.difference_NK) * upstream_N1
        if ctx.needs_input_grad[1]:
            grad_q = (ctx.q.weight_NK - ctx.p.weight_NK) * upstream_N1
        return grad_p, grad_q, None


def _pairs(x_NK: Tensor, valid_NK: Tensor) -> "_Pairs":
    # Before it is scaled, a pair weighs exp(−2·span) at least, and exp ends near −87 in float32, −708 in float64: rows
    # of more than half of that take the slower exact sums.
    highest_N1, lowest_N1 = x_NK.amax(1, keepdim=True), x_NK.amin(1, keepdim=True)
    narrow = bool((highest_N1 - lowest_N1 < (300 if x_NK.dtype == torch.float64 else 40)).all())
    return (_Pairs if narrow else _WidePairs)(x_NK - highest_N1, lowest_N1 - x_NK, highest_N1 - lowest_N1, valid_NK)


class _Pairs:
    """The distribution over the pairs i<j of a row, P(i, j) ∝ exp(x_i − x_j), by its margins alone.

    `up_NK` is x minus the row's highest and `down_NK` the lowest minus x, so that no exponential exceeds 1; `span_N1`
    is what this takes off every pair.
    """

    def __init__(self, up_NK: Tensor, down_NK: Tensor, span_N1: Tensor, valid_NK: Tensor) -> None:
        self.valid_NK = valid_NK.to(up_NK.dtype)
        self.prepare(up_NK, down_NK)
        self.after_NK, self.before_NK = self.sums(self.valid_NK)
        self.weight_NK = self.after_NK - self.before_NK
        self.logz_N = (self.scale_N1 + span_N1).squeeze(1)

    def prepare(self, up_NK: Tensor, down_NK: Tensor) -> None:
        """Set the exponentials and `scale_N1`, the log-sum-exp over all pairs, less the span."""
        self.up_NK, self.down_NK = up_NK.exp() * self.valid_NK, down_NK.exp() * self.valid_NK
        total_N1 = (self.up_NK * _after(self.down_NK)).sum(1, keepdim=True)
        # A row without a pair sums to 0; scaled by 1 it stays 0.
        total_N1 = torch.where(total_N1 > 0, total_N1, 1)
        self.up_NK, self.scale_N1 = self.up_NK / total_N1, total_N1.log()

    def sums(self, v_NK: Tensor) -> tuple[Tensor, Tensor]:
        """Return Σ_{j>i} P(i, j) v_j and Σ_{j<i} P(j, i) v_j for every i; v is at least 0, and 0 in the padding."""
        return self.up_NK * _after(self.down_NK * v_NK), self.down_NK * _before(self.up_NK * v_NK)

    def hessian_times(self, v_NK: Tensor) -> Tensor:
        """Return the gradient of Σ_i w_i v_i, v held fixed: the pairs' covariance times v."""
        # Adding a constant to v changes nothing; the smallest constant that makes it positive loses the fewest digits.
        v_NK = (v_NK - v_NK.amin(1, keepdim=True)) * self.valid_NK
        after_NK, before_NK = self.sums(v_NK)
        mean_N1 = (self.weight_NK * v_NK).sum(1, keepdim=True)
        return (self.after_NK + self.before_NK) * v_NK - after_NK - before_NK - self.weight_NK * mean_N1


class _WidePairs(_Pairs):
    """The same for rows so wide that exponentials underflow: every sum is a log-sum-exp. Some five times slower."""

    def prepare(self, up_NK: Tensor, down_NK: Tensor) -> None:
        """Set the logarithms and `scale_N1`."""
        outside_NK = self.valid_NK.log()
        self.up_NK, self.down_NK = up_NK + outside_NK, down_NK + outside_NK
        log_pairs_NK = self.up_NK + _log_after(self.down_NK)
        self.scale_N1 = log_pairs_NK.logsumexp(1, keepdim=True).nan_to_num(neginf=0.0)

    def sums(self, v_NK: Tensor) -> tuple[Tensor, Tensor]:
        """Return Σ_{j>i} P(i, j) v_j and Σ_{j<i} P(j, i) v_j for every i; v is at least 0, and 0 in the padding."""
        log_NK = v_NK.log()
        after_NK = self.up_NK + _log_after(self.down_NK + log_NK) - self.scale_N1
        before_NK = self.down_NK + _log_before(self.up_NK + log_NK) - self.scale_N1
        return after_NK.exp(), before_NK.exp()


def _before(x_NK: Tensor) -> Tensor:
    """Sum of all entries before each one."""
    return pad(x_NK[:, :-1], (1, 0)).cumsum(1)


def _after(x_NK: Tensor) -> Tensor:
    """Sum of all entries after each one."""
    return _before(x_NK.flip(1)).flip(1)


def _log_before(x_NK: Tensor) -> Tensor:
    return pad(x_NK[:, :-1], (1, 0), value=-torch.inf).logcumsumexp(1)


def _log_after(x_NK: Tensor) -> Tensor:
    return _log_before(x_NK.flip(1)).flip(1)
