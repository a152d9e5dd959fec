"""DBiLD, the dynamic bi-directional logits-difference loss of Switch-KD, in time linear in the tokens it compares.

Source: Switch-KD (arXiv 2604.14629), algorithm 2. The pairwise differences are never built: sums over all pairs i<j of
exp(x_i − x_j) come from running log-sum-exps along the sorted tokens.

Shapes: N positions (rows), V vocabulary, K tokens compared (the widest row's; others are padded), L leaders (1 or 2),
M = N·L rows of both leaders.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.nn.functional import pad

from .finite import refuse_non_finite
from .knee import Leaders, accumulable, knee_k, rank

__all__ = ["DbildRows", "Direction", "Leaders", "LedBy", "Reduction", "dbild", "knee_k", "pair_kl", "rank"]

Direction = Literal["reverse", "forward"]
Reduction = Literal["mean", "sum", "none"]
LedBy = Literal["both", "reference", "candidate"]

# Compared logits worked on together. On a CPU the temporaries then stay in its cache, and each of the many small steps
# on one thread: torch shares out from 32,768 elements, and waiting for the other threads takes longer than these steps.
ELEMENTS_AT_ONCE = {"cpu": 2**15, "other": 2**26}


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

    leaders = []
    for side, z_NV in (("reference", reference_NV), ("candidate", candidate_NV)):
        if led_by not in ("both", side):
            refuse_non_finite(z_NV)
        elif side == "reference" and reference_leaders:
            leaders.append(reference_leaders)
        else:
            leaders.append(rank(z_NV, window=window, min_k=min_k, max_k=max_k))
    # The ids are valid in the uncut logits too, which spares the backward of the cut a pass over the vocabulary.
    loss_NL: Tensor = _Dbild.apply(reference_logits_NV, candidate_logits_NV, leaders, temperature, direction)
    loss_N = loss_NL.sum(1)
    loss = loss_N if reduction == "none" else loss_N.sum() / (max(len(loss_N), 1) if reduction == "mean" else 1)
    if not return_rows:
        return loss
    halves = [(loss_NL[:, i].detach(), each.k_N) for i, each in enumerate(leaders)]
    not_asked = torch.zeros_like(halves[0][0]), torch.zeros_like(halves[0][1])
    by_reference = not_asked if led_by == "candidate" else halves[0]
    by_candidate = not_asked if led_by == "reference" else halves[-1]
    return loss, DbildRows(by_reference[0], by_candidate[0], by_reference[1], by_candidate[1])


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


class _Dbild(torch.autograd.Function):
    """KL of each leader's pairs, [N, L]. The gradients of the few logits compared are made at once, row by row.

    The backward only scatters them into zeros: one pass over the vocabulary for both leaders.
    """

    @staticmethod
    def forward(
        ctx: Any,
        reference_NV: Tensor,
        candidate_NV: Tensor,
        leaders: list[Leaders],
        temperature: float,
        direction: Direction,
    ) -> Tensor:
        width = max(each.ids_NK.shape[1] for each in leaders)
        ids_NLK = torch.stack([each.padded(width) for each in leaders], dim=1)
        k_NL = torch.stack([each.k_N for each in leaders], dim=1)
        # KL(p ‖ q): the reverse direction's expectation is under the candidate.
        sources = [candidate_NV, reference_NV] if direction == "reverse" else [reference_NV, candidate_NV]
        needed = ctx.needs_input_grad[1::-1] if direction == "reverse" else ctx.needs_input_grad[:2]

        def of(rows: slice) -> tuple[Tensor | None, ...]:
            ids_NK = ids_NLK[rows].flatten(1)
            p_MK, q_MK = (
                accumulable(z_NV[rows].gather(1, ids_NK)).reshape(k_NL[rows].numel(), width) / temperature
                for z_NV in sources
            )
            return _kl_and_gradients(p_MK, q_MK, k_NL[rows].flatten(), *needed)

        kl_M, grad_p_MK, grad_q_MK = _in_slices(of, len(ids_NLK), ids_NLK[:1].numel(), ids_NLK.device)
        grads = (grad_q_MK, grad_p_MK) if direction == "reverse" else (grad_p_MK, grad_q_MK)
        ctx.save_for_backward(ids_NLK, *grads)
        ctx.temperature, ctx.shapes = temperature, [(z_NV.shape, z_NV.dtype) for z_NV in (reference_NV, candidate_NV)]
        loss_NL: Tensor = kl_M.view(k_NL.shape)
        return loss_NL

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        ids_NLK, *grads = ctx.saved_tensors
        scale_NL1 = (upstream[0] / ctx.temperature)[:, :, None]
        results: list[Tensor | None] = []
        for grad_MK, (shape, dtype) in zip(grads, ctx.shapes, strict=True):
            if grad_MK is None:
                results.append(None)
                continue
            grad_NLK = (grad_MK.view(ids_NLK.shape) * scale_NL1).to(dtype)
            zeros_NV = torch.zeros(shape, dtype=dtype, device=grad_NLK.device)
            results.append(zeros_NV.scatter_add_(1, ids_NLK.flatten(1), grad_NLK.flatten(1)))
        return *results, None, None, None


def pair_kl(p_NK: Tensor, q_NK: Tensor, k_N: Tensor) -> Tensor:
    """Return KL(softmax over pairs of p ‖ softmax over pairs of q) for each row's first k_N entries.

    A row's pairs are all i<j in the given order, their logits x_i − x_j (temperature already applied). Linear in K:
    with logZ the log-sum-exp over pairs and w_i = ∂logZ/∂x_i, KL = Σ_i w_i(p) (p_i − q_i) − logZ(p) + logZ(q).
    """
    result: Tensor = _PairKL.apply(p_NK, q_NK, k_N)
    return result


class _PairKL(torch.autograd.Function):
    """`pair_kl` with its gradient written out: ∂/∂q = w(q) − w(p), ∂/∂p = Hessian of logZ(p) times (p − q)."""

    @staticmethod
    def forward(ctx: Any, p_NK: Tensor, q_NK: Tensor, k_N: Tensor) -> Tensor:
        def of(rows: slice) -> tuple[Tensor | None, ...]:
            valid_NK = torch.arange(p_NK.shape[1], device=k_N.device) < k_N[rows, None]
            # Padding repeats the row's first entry, so that it changes neither the highest nor the lowest.
            p, q = (torch.where(valid_NK, x_NK[rows], x_NK[rows, :1]) for x_NK in (p_NK, q_NK))
            return _kl_and_gradients(p, q, k_N[rows], *ctx.needs_input_grad[:2])

        rows, width = p_NK.shape
        kl_N, *grads = _in_slices(of, rows, width, p_NK.device)
        ctx.save_for_backward(*grads)
        loss_N: Tensor = kl_N
        return loss_N

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        grads = [None if grad_NK is None else grad_NK * upstream[0][:, None] for grad_NK in ctx.saved_tensors]
        return *grads, None


def _in_slices(
    work: Callable[[slice], tuple[Tensor | None, ...]], rows: int, width: int, device: torch.device
) -> tuple[Any, ...]:
    """Concatenate what the work returns for slices of the rows, so small that its temporaries stay small."""
    step = max(1, ELEMENTS_AT_ONCE["cpu" if device.type == "cpu" else "other"] // max(width, 1))
    parts = [work(slice(start, start + step)) for start in range(0, max(rows, 1), step)]
    return tuple(None if column[0] is None else torch.cat(column) for column in zip(*parts, strict=True))


def _kl_and_gradients(
    p_NK: Tensor, q_NK: Tensor, k_N: Tensor, needs_p: bool, needs_q: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return `pair_kl` of rows and its gradients by p and by q, if needed."""
    if p_NK.numel() == 0:
        return (p_NK - q_NK).sum(1), torch.zeros_like(p_NK), torch.zeros_like(q_NK)
    padding_NK = torch.arange(p_NK.shape[1], device=k_N.device) >= k_N[:, None]
    p, q = _pairs(p_NK, padding_NK), _pairs(q_NK, padding_NK)
    difference_NK = p_NK - q_NK
    weight_NK = p.weight()
    # A row without a pair has weights and gradients of 0.
    kl_N = torch.where(k_N > 1, (weight_NK * difference_NK).sum(1) - p.logz_N + q.logz_N, 0)
    grad_p_NK = p.hessian_times(difference_NK, weight_NK) if needs_p else None
    grad_q_NK = q.weight().sub_(weight_NK) if needs_q else None
    return kl_N, grad_p_NK, grad_q_NK


def _pairs(x_NK: Tensor, padding_NK: Tensor) -> "_Pairs":
    # Before it is scaled, a pair weighs exp(−2·span) at least, and exp ends near −87 in float32, −708 in float64: rows
    # of more than half of that take the slower exact sums.
    highest_N1, lowest_N1 = x_NK.amax(1, keepdim=True), x_NK.amin(1, keepdim=True)
    narrow = bool((highest_N1 - lowest_N1 < (300 if x_NK.dtype == torch.float64 else 40)).all())
    return (_Pairs if narrow else _WidePairs)(x_NK, highest_N1, lowest_N1, padding_NK)


class _Pairs:
    """The distribution over the pairs i<j of a row, P(i, j) ∝ exp(x_i − x_j), by its margins alone.

    Exponents are x minus the row's highest for i and the row's lowest minus x for j, so that no exponential exceeds 1;
    highest − lowest is what this takes off every pair. Padding never is j, and no pair begins in it. Where it holds
    anything but the row's own logits, it may widen the row, which costs digits.
    """

    def __init__(self, x_NK: Tensor, highest_N1: Tensor, lowest_N1: Tensor, padding_NK: Tensor) -> None:
        self.padding_NK = padding_NK
        self.prepare(x_NK - highest_N1, lowest_N1 - x_NK)
        self.logz_N = (self.scale_N1 + highest_N1 - lowest_N1).squeeze(1)

    def prepare(self, up_NK: Tensor, down_NK: Tensor) -> None:
        """Set the exponentials, the first margin and `scale_N1`, the log-sum-exp over all pairs, less the span."""
        self.up_NK, self.down_NK = up_NK.exp_(), down_NK.exp_().masked_fill_(self.padding_NK, 0)
        tail_NK = _after(self.down_NK)
        total_N1 = (self.up_NK * tail_NK).sum(1, keepdim=True)
        # A row without a pair sums to 0; scaled by 1 it stays 0.
        total_N1.masked_fill_(total_N1 == 0, 1)
        self.up_NK /= total_N1
        self.first_NK, self.scale_N1 = tail_NK.mul_(self.up_NK), total_N1.log()

    def second(self) -> Tensor:
        """Return Σ_{j<i} P(j, i) for every i."""
        return _before(self.up_NK).mul_(self.down_NK)

    def sums(self, v_NK: Tensor) -> tuple[Tensor, Tensor]:
        """Return Σ_{j>i} P(i, j) v_j and Σ_{j<i} P(j, i) v_j for every i; v is at least 0."""
        return _after(self.down_NK * v_NK).mul_(self.up_NK), _before(self.up_NK * v_NK).mul_(self.down_NK)

    def weight(self) -> Tensor:
        """Return w_i = ∂logZ/∂x_i, the probability of being first in a pair less that of being second."""
        return self.first_NK - self.second()

    def hessian_times(self, v_NK: Tensor, weight_NK: Tensor) -> Tensor:
        """Return the gradient of Σ_i w_i v_i, v held fixed: the pairs' covariance times v."""
        # Adding a constant to v changes nothing; the smallest constant that makes it positive loses the fewest digits.
        v_NK = v_NK - v_NK.amin(1, keepdim=True)
        after_NK, before_NK = self.sums(v_NK)
        mean_N1 = (weight_NK * v_NK).sum(1, keepdim=True)
        # first + second = 2·first − w
        either_NK = (2 * self.first_NK).sub_(weight_NK)
        return either_NK.mul_(v_NK).sub_(after_NK).sub_(before_NK).addcmul_(weight_NK, mean_N1, value=-1)


class _WidePairs(_Pairs):
    """The same for rows so wide that exponentials underflow: every sum is a log-sum-exp. Some five times slower."""

    def prepare(self, up_NK: Tensor, down_NK: Tensor) -> None:
        """Set the logarithms, the first margin and `scale_N1`."""
        self.up_NK, self.down_NK = up_NK, down_NK.masked_fill_(self.padding_NK, -torch.inf)
        log_pairs_NK = up_NK + _log_after(self.down_NK)
        self.scale_N1 = log_pairs_NK.logsumexp(1, keepdim=True).nan_to_num(neginf=0.0)
        # All margins are rounded in the same order, the scale last, so that they still cancel where they should.
        self.first_NK = log_pairs_NK.sub_(self.scale_N1).exp_()

    def second(self) -> Tensor:
        """Return Σ_{j<i} P(j, i) for every i."""
        return (self.down_NK + _log_before(self.up_NK)).sub_(self.scale_N1).exp_()

    def sums(self, v_NK: Tensor) -> tuple[Tensor, Tensor]:
        """Return Σ_{j>i} P(i, j) v_j and Σ_{j<i} P(j, i) v_j for every i; v is at least 0."""
        log_NK = v_NK.log()
        after_NK = self.up_NK + _log_after(self.down_NK + log_NK)
        before_NK = self.down_NK + _log_before(self.up_NK + log_NK)
        return after_NK.sub_(self.scale_N1).exp_(), before_NK.sub_(self.scale_N1).exp_()


def _before(x_NK: Tensor) -> Tensor:
    """Sum of all entries before each one."""
    sums_NK = torch.empty_like(x_NK)
    sums_NK[:, 0] = 0
    torch.cumsum(x_NK[:, :-1], 1, out=sums_NK[:, 1:])
    return sums_NK


def _after(x_NK: Tensor) -> Tensor:
    """Sum of all entries after each one."""
    return _before(x_NK.flip(1)).flip(1)


def _log_before(x_NK: Tensor) -> Tensor:
    return pad(x_NK[:, :-1], (1, 0), value=-torch.inf).logcumsumexp(1)


def _log_after(x_NK: Tensor) -> Tensor:
    return _log_before(x_NK.flip(1)).flip(1)
