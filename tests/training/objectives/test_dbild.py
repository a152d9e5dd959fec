"""DBiLD against its definition with explicit pairs, and at the edges of its inputs."""

from typing import Any

import pytest
import torch
from torch import Tensor

from switchkd.training.objectives import knee
from switchkd.training.objectives.dbild import dbild, knee_k, pair_kl, rank


def pairs(z_K: Tensor) -> Tensor:
    """All z_i − z_j of i<j."""
    first, second = torch.triu_indices(len(z_K), len(z_K), offset=1)
    return z_K[first] - z_K[second]


def reference_pair_kl(p_K: Tensor, q_K: Tensor) -> Tensor:
    log_p, log_q = pairs(p_K).log_softmax(0), pairs(q_K).log_softmax(0)
    return (log_p.exp() * (log_p - log_q)).sum()


def reference_knee(z_V: Tensor, min_k: int, max_k: int | None) -> int:
    sorted_V = z_V.sort(descending=True).values
    span = sorted_V[0] - sorted_V[-1]
    if span == 0:
        return min(min_k, len(z_V))
    y = (sorted_V - sorted_V[-1]) / span
    x = torch.linspace(0, 1, len(z_V), dtype=z_V.dtype)
    k = int((1 - x - y).argmax()) + 1
    return min(max(k, min_k), max_k or k + min_k, len(z_V))


def reference_dbild(
    teacher_NV: Tensor,
    student_NV: Tensor,
    temperature: float = 3.0,
    window: int | None = None,
    min_k: int = 3,
    max_k: int | None = None,
    direction: str = "reverse",
) -> Tensor:
    """Algorithm 2 of the paper, row by row, pair by pair."""
    vocabulary = min(teacher_NV.shape[1], student_NV.shape[1])
    loss = []
    for teacher_V, student_V in zip(teacher_NV[:, :vocabulary], student_NV[:, :vocabulary], strict=True):
        total = teacher_V.new_zeros(())
        for leader_V in (teacher_V, student_V):
            ids = leader_V.detach().sort(descending=True, stable=True).indices[:window]
            ids = ids[: reference_knee(leader_V.detach()[ids], min_k, max_k)]
            student_K, teacher_K = student_V[ids] / temperature, teacher_V[ids] / temperature
            ordered = (student_K, teacher_K) if direction == "reverse" else (teacher_K, student_K)
            total = total + reference_pair_kl(*ordered)
        loss.append(total)
    return torch.stack(loss)


def logits(seed: int, rows: int, vocabulary: int, dtype: torch.dtype = torch.float64, spread: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    z_NV = torch.randn(rows, vocabulary, generator=generator, dtype=torch.float64) * spread
    z_NV[:, : vocabulary // 20] += 4 * torch.rand(rows, vocabulary // 20, generator=generator, dtype=torch.float64)
    return z_NV.to(dtype)


SETTINGS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.7},
    {"temperature": 0.01},
    {"direction": "forward"},
    {"window": 17},
    {"window": 10_000},
    {"min_k": 9, "max_k": 9},
    {"max_k": 5, "direction": "forward", "temperature": 2.0},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize(("rows", "ours", "theirs"), [(3, 47, 47), (1, 123, 131), (5, 260, 211), (2, 3, 3)])
def test_equals_the_explicit_pairs_with_gradients(settings: dict[str, Any], rows: int, ours: int, theirs: int) -> None:
    teacher_NV, student_NV = logits(0, rows, theirs).requires_grad_(), logits(1, rows, ours).requires_grad_()
    expected_N = reference_dbild(teacher_NV, student_NV, **settings)
    got_N = dbild(teacher_NV, student_NV, reduction="none", **settings)
    torch.testing.assert_close(got_N, expected_N, rtol=1e-10, atol=1e-10)

    weights_N = torch.arange(1.0, rows + 1, dtype=torch.float64)
    expected = torch.autograd.grad((expected_N * weights_N).sum(), (teacher_NV, student_NV))
    got = torch.autograd.grad((got_N * weights_N).sum(), (teacher_NV, student_NV))
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10 / min(1, settings.get("temperature", 1)))


@pytest.mark.parametrize("k", [2, 3, 8, 50, 400])
@pytest.mark.parametrize("spread", [1.0, 30.0, 1000.0])
def test_linear_time_sums_equal_the_pairs(k: int, spread: float) -> None:
    p_NK, q_NK = logits(0, 3, 400, spread=spread).requires_grad_(), logits(1, 3, 400, spread=spread).requires_grad_()
    got_N = pair_kl(p_NK, q_NK, torch.tensor([k, 2, max(k - 1, 0)]))
    lengths = (k, 2, k - 1)
    expected_N = torch.stack([reference_pair_kl(p_NK[i, :n], q_NK[i, :n]) for i, n in enumerate(lengths)])
    torch.testing.assert_close(got_N, expected_N, rtol=1e-10, atol=1e-10)
    got = torch.autograd.grad(got_N.sum(), (p_NK, q_NK))
    expected = torch.autograd.grad(expected_N.sum(), (p_NK, q_NK))
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10 * max(1, spread / 30))


@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_gradcheck(direction: Any) -> None:
    teacher_NV, student_NV = logits(2, 3, 31).requires_grad_(), logits(3, 3, 29).requires_grad_()
    assert torch.autograd.gradcheck(lambda t, s: dbild(t, s, direction=direction), (teacher_NV, student_NV))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocabulary", [123, 5000])
def test_lower_precision_sums_in_float32(dtype: torch.dtype, vocabulary: int) -> None:
    teacher_NV, student_NV = logits(4, 3, vocabulary, dtype), logits(5, 3, vocabulary, dtype).requires_grad_()
    wide_NV = student_NV.detach().double().requires_grad_()
    got, expected = dbild(teacher_NV, student_NV), dbild(teacher_NV.double(), wide_NV)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-5)
    got.backward()
    expected.backward()
    assert student_NV.grad is not None
    assert wide_NV.grad is not None
    assert student_NV.grad.dtype == dtype
    torch.testing.assert_close(student_NV.grad.double(), wide_NV.grad, rtol=2e-2, atol=1e-5)


def test_rows_wider_than_float32_exponentials_agree_with_float64() -> None:
    teacher_NV, student_NV = logits(6, 4, 90, spread=300.0), logits(7, 4, 90, spread=300.0)
    narrow = dbild(teacher_NV.float(), student_NV.float(), reduction="none")
    torch.testing.assert_close(narrow.double(), dbild(teacher_NV, student_NV, reduction="none"), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("span", [30.0, 39.0, 45.0, 80.0, 130.0])
@pytest.mark.parametrize("k", [3, 4, 40])
def test_orders_turned_round_keep_their_digits_in_float32(span: float, k: int) -> None:
    # Where one model's leader is the other's last, every pair's difference is negative: all exponentials are small.
    up_NK = torch.linspace(0, span, k, dtype=torch.float64)[None].requires_grad_()
    other_NK = logits(16, 1, k).requires_grad_()
    for p_NK, q_NK in ((up_NK, other_NK), (other_NK, up_NK), (up_NK, -up_NK)):
        expected = reference_pair_kl(p_NK[0], q_NK[0])
        got = pair_kl(p_NK.float(), q_NK.float(), torch.tensor([k]))[0]
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-6 * span)
        expected_grad, got_grad = (torch.autograd.grad(loss, up_NK)[0] for loss in (expected, got))
        torch.testing.assert_close(got_grad, expected_grad, rtol=1e-4, atol=1e-7 * span**2)


def test_zero_when_candidate_equals_reference_and_when_only_its_level_differs() -> None:
    z_NV = logits(8, 4, 64)
    torch.testing.assert_close(dbild(z_NV, z_NV.clone()), torch.zeros((), dtype=torch.float64))
    torch.testing.assert_close(dbild(z_NV, z_NV + 7), torch.zeros((), dtype=torch.float64))


def test_no_row_and_reductions() -> None:
    teacher_NV, student_NV = logits(9, 5, 40), logits(10, 5, 40).requires_grad_()
    none = dbild(teacher_NV[:0], student_NV[:0])
    none.backward()
    assert none.item() == 0
    assert student_NV.grad is not None
    assert not student_NV.grad.any()
    loss_N = dbild(teacher_NV, student_NV, reduction="none")
    torch.testing.assert_close(dbild(teacher_NV, student_NV), loss_N.mean())
    torch.testing.assert_close(dbild(teacher_NV, student_NV, reduction="sum"), loss_N.sum())


def test_all_equal_logits_get_the_least_k_and_a_finite_gradient() -> None:
    teacher_NV = torch.full((2, 30), 1.5)
    student_NV = torch.randn(2, 30, generator=torch.Generator().manual_seed(0)).requires_grad_()
    loss, rows = dbild(teacher_NV, student_NV, return_rows=True)
    assert rows.reference_k_N.tolist() == [3, 3]
    loss.backward()
    assert loss.isfinite()
    assert student_NV.grad is not None
    assert student_NV.grad.isfinite().all()
    assert dbild(teacher_NV, teacher_NV).item() == 0


def test_rows_add_up_and_each_side_can_be_asked_alone() -> None:
    teacher_NV, student_NV = logits(11, 5, 80), logits(12, 5, 80)
    loss, rows = dbild(teacher_NV, student_NV, return_rows=True)
    torch.testing.assert_close(loss, (rows.led_by_reference_N + rows.led_by_candidate_N).mean())
    assert rows.reference_k_N.tolist() == rank(teacher_NV).k_N.tolist()
    assert rows.candidate_k_N.tolist() == rank(student_NV).k_N.tolist()
    for side, part_N in (("reference", rows.led_by_reference_N), ("candidate", rows.led_by_candidate_N)):
        alone = dbild(teacher_NV, student_NV, led_by=side, reduction="none")  # type: ignore[call-overload]
        torch.testing.assert_close(alone, part_N)
    torch.testing.assert_close(dbild(teacher_NV, student_NV, reference_leaders=rank(teacher_NV)), loss)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("vocabulary", [40, 5000])
@pytest.mark.parametrize("led_by", ["both", "reference", "candidate"])
def test_nan_and_inf_name_the_row(bad: float, vocabulary: int, led_by: Any) -> None:
    for spoilt in (0, 1):
        pair = [logits(13, 6, vocabulary), logits(14, 6, vocabulary)]
        pair[spoilt][4, 7] = bad
        with pytest.raises(ValueError, match="row 4 has 1 logits that are NaN or inf"):
            dbild(*pair, led_by=led_by)
        with pytest.raises(ValueError, match="row 4"):
            dbild(*pair, led_by=led_by, window=20)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"min_k": 2}, "min_k is 2.*at least 3"),
        ({"min_k": 9, "max_k": 8}, "max_k is 8, below min_k 9"),
        ({"window": 2}, "window is 2, below min_k 3"),
        ({"direction": "backward"}, "direction is 'backward'"),
        ({"reduction": "batchmean"}, "reduction is 'batchmean'"),
        ({"led_by": "teacher"}, "led_by is 'teacher'"),
    ],
)
def test_settings_that_cannot_hold_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        dbild(logits(0, 2, 20), logits(1, 2, 20), **settings)


def test_unequal_positions_are_refused_with_both_shapes() -> None:
    with pytest.raises(ValueError, match=r"\(2, 20\).*\(3, 20\)"):
        dbild(logits(0, 2, 20), logits(1, 3, 20))


def test_knee_is_the_largest_gap_below_the_chord() -> None:
    # y = 1, .5, .1, 0: below the chord (1, 2/3, 1/3, 0) by 0, .17, .23, 0.
    assert knee_k(torch.tensor([[10.0, 5.0, 1.0, 0.0]])).tolist() == [3]
    # A curve above its chord everywhere but at its ends has no gap: k at its least.
    assert knee_k(torch.tensor([[10.0, 9.0, 8.0, 7.0, 0.0]])).tolist() == [3]
    assert knee_k(torch.arange(50.0).flip(0)[None] ** 4, max_k=4).tolist() == [4]
    assert knee_k(torch.ones(2, 2)).tolist() == [2, 2]
    assert knee_k(torch.ones(0, 9)).shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("rows", "vocabulary"), [(999, 61), (99, 9001)])
@pytest.mark.parametrize("power", [1.0, 3.0])
def test_where_nothing_lies_below_the_chord_k_is_its_least(
    dtype: torch.dtype, rows: int, vocabulary: int, power: float
) -> None:
    """On the chord, or above it but at its ends: rounding alone would put one of the points below it."""
    generator = torch.Generator().manual_seed(0)
    highest_N1, span_N1 = 40 * torch.rand(2, rows, 1, generator=generator, dtype=torch.float64) - 20
    z_NV = highest_N1 - span_N1.abs() * torch.linspace(0, 1, vocabulary, dtype=torch.float64) ** power
    assert set(knee_k(z_NV.to(dtype), min_k=5).tolist()) == {5}
    assert set(rank(z_NV.to(dtype).flip(1), min_k=5).k_N.tolist()) == {5}


def test_a_tie_that_rounding_decides_is_decided_as_in_a_full_sort() -> None:
    """Two knees a rounding apart: exactly it is the upper, in float32 the lower, which the floor must reach."""
    hexes = ("0x1.3f03f4p-1", "0x1.3b804p-3", "0x1.369d92p-4", "0x1.8e8fa4p-5", "-0x1.6a2574p-2")
    values, counts = [float.fromhex(value) for value in hexes], [1, 30, 119, 3387, 4687]
    sorted_1V = torch.tensor(values).repeat_interleave(torch.tensor(counts))[None]
    # The sample that the search guesses from sees all but the upper knee.
    sampled = [*range(150), *range(8224 - 107, 8224)]
    z_1V = torch.empty_like(sorted_1V)
    z_1V[:, :: knee.SAMPLED] = sorted_1V[:, sampled]
    others = torch.ones(8224, dtype=torch.bool).index_fill(0, torch.arange(0, 8224, knee.SAMPLED), False)
    z_1V[:, others] = sorted_1V[:, 150 : 8224 - 107]
    assert knee_k(sorted_1V.double()).tolist() == [151]
    assert knee_k(sorted_1V).tolist() == [3538]
    assert rank(z_1V).k_N.tolist() == [3538]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", ["bell", "ramp", "flat with peaks", "steps", "tiny span"])
def test_histogram_finds_what_a_full_sort_finds(
    dtype: torch.dtype, shape: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    z_NV = logits(15, 7, 6000)
    if shape == "ramp":
        z_NV = torch.linspace(-5, 5, 6000, dtype=torch.float64).repeat(7, 1) + 0.001 * z_NV
    elif shape == "flat with peaks":
        z_NV[:, 12:] = 0.25
    elif shape == "steps":
        z_NV = (z_NV * 2).round()
    elif shape == "tiny span":
        z_NV = z_NV * 1e-38
    z_NV[3] = 0.5
    z_NV = z_NV.to(dtype)
    monkeypatch.setattr(knee, "ELEMENTS_AT_ONCE", 13_000)
    by_histogram = rank(z_NV)
    monkeypatch.setattr(knee, "FULL_SORT_VOCABULARY", 10**9)
    by_sort = rank(z_NV)
    assert by_histogram.k_N.tolist() == by_sort.k_N.tolist()
    ordered = z_NV.sort(dim=1, descending=True, stable=True).indices
    for row, k in enumerate(by_sort.k_N.tolist()):
        assert by_histogram.ids_NK[row, :k].tolist() == by_sort.ids_NK[row, :k].tolist() == ordered[row, :k].tolist()
