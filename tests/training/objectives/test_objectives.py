"""Every objective against its formula, and the choice of one by name."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from switchkd.training.objectives import OBJECTIVES, Positions, build_objective
from switchkd.training.objectives.dbild import dbild
from switchkd.training.objectives.finite import NonFiniteError
from switchkd.training.objectives.spread import BINS, COUNTS

ROWS, WITH_PICTURE, OURS, THEIRS = 7, 4, 31, 33


def make_positions(dtype: torch.dtype = torch.float64, rows: int = ROWS, theirs: int = THEIRS) -> Positions:
    generator = torch.Generator().manual_seed(0)

    def logits(count: int, vocabulary: int) -> Tensor:
        z_NV = 3 * torch.randn(count, vocabulary, generator=generator, dtype=torch.float64)
        return z_NV.to(dtype)

    return Positions(
        torch.randint(0, OURS, (rows,), generator=generator),
        logits(rows, OURS).requires_grad_(),
        logits(rows, theirs),
        logits(WITH_PICTURE, theirs).requires_grad_() if rows else None,
    )


def cross_entropy(positions: Positions, temperature: float = 1.0) -> Tensor:
    probability_NV = (positions.student_NV.double() / temperature).softmax(1)
    return -sum(probability_NV[i, label].log() for i, label in enumerate(positions.labels_N))  # type: ignore[return-value]


def kl(p_NV: Tensor, q_NV: Tensor) -> Tensor:
    return (p_NV * (p_NV / q_NV).log()).sum()


def shared(positions: Positions) -> tuple[Tensor, Tensor, Tensor]:
    assert positions.teacher_NV is not None
    assert positions.switch_MV is not None
    return positions.teacher_NV[:, :OURS], positions.student_NV, positions.switch_MV[:, :OURS]


def top_pairs_kl(p_NV: Tensor, q_NV: Tensor, leader_NV: Tensor, k: int, temperature: float) -> Tensor:
    total = p_NV.new_zeros(())
    i, j = torch.triu_indices(k, k, offset=1)
    for p_V, q_V, leader_V in zip(p_NV, q_NV, leader_NV, strict=True):
        ids = leader_V.argsort(descending=True)[:k]
        p_K, q_K = p_V[ids] / temperature, q_V[ids] / temperature
        total = total + kl((p_K[i] - p_K[j]).softmax(0), (q_K[i] - q_K[j]).softmax(0))
    return total


def test_sft() -> None:
    positions = make_positions()
    torch.testing.assert_close(build_objective("sft")(positions)["loss"], cross_entropy(positions))
    warm = build_objective("sft", ce_temperature=3.0)(positions)
    torch.testing.assert_close(warm["ce"], cross_entropy(positions, 3.0))


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_kd(direction: str, temperature: float) -> None:
    positions = make_positions()
    teacher_NV, student_NV, _ = ((z / temperature).softmax(1) for z in shared(positions))
    expected = kl(teacher_NV, student_NV) if direction == "forward" else kl(student_NV, teacher_NV)
    settings = {"direction": direction, "temperature": temperature, "lambda_ce": 0.5, "lambda_kd": 2.0}
    terms = build_objective("kd", **settings)(positions)
    torch.testing.assert_close(terms["kd"], expected)
    torch.testing.assert_close(terms["loss"], 0.5 * cross_entropy(positions) + 2 * expected)
    squared = build_objective("kd", **settings, tau_squared=True)(positions)
    torch.testing.assert_close(squared["kd"], expected * temperature**2)


@pytest.mark.parametrize("k", [3, 8])
def test_bild(k: int) -> None:
    positions = make_positions()
    teacher_NV, student_NV, _ = shared(positions)
    expected = sum(top_pairs_kl(teacher_NV, student_NV, leader, k, 3.0) for leader in (teacher_NV, student_NV))
    terms = build_objective("bild", k=k)(positions)
    torch.testing.assert_close(terms["loss"], expected)
    with_labels = build_objective("bild", k=k, lambda_ce=1.0)(positions)
    torch.testing.assert_close(with_labels["loss"], expected + cross_entropy(positions))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 2.0, "tau_squared": True},
        {"window": 9, "direction": "forward", "max_k": 6},
        {"vocabulary": 20, "ce_temperature": 3.0, "lambda_ce": 0.3},
        {"led_by": "reference", "lambda_dbild": 0.0},
        {"lambda_vsd": 0.0, "lambda_dbild": 2.0},
    ],
    ids=str,
)
def test_switch_kd(settings: dict[str, Any]) -> None:
    positions = make_positions()
    teacher_NV, student_NV, switch_MV = (z[:, : settings.get("vocabulary")] for z in shared(positions))
    own = {
        name: settings[name] for name in ("temperature", "window", "direction", "max_k", "led_by") if name in settings
    }
    factor = settings.get("temperature", 3.0) ** 2 if settings.get("tau_squared") else 1
    expected = settings.get("lambda_ce", 1.0) * cross_entropy(positions, settings.get("ce_temperature", 1.0))
    against_student = factor * dbild(teacher_NV, student_NV, reduction="sum", **own)
    against_switch = factor * dbild(teacher_NV[:WITH_PICTURE], switch_MV, reduction="sum", **own)
    expected = expected + settings.get("lambda_dbild", 1.0) * against_student
    expected = expected + settings.get("lambda_vsd", 1.0) * against_switch
    terms = build_objective("switch_kd", **settings)(positions)
    torch.testing.assert_close(terms["loss"], expected)
    assert ("vsd" in terms) == (settings.get("lambda_vsd") != 0)
    assert ("dbild" in terms) == (settings.get("lambda_dbild") != 0)


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("theirs", [THEIRS, 23])
def test_cross_entropy_is_over_the_students_whole_vocabulary(name: str, theirs: int) -> None:
    """Where the teacher's is smaller too: a token that it lacks learns from the labels, and from them alone."""
    positions = make_positions(theirs=theirs)
    positions.labels_N[0] = OURS - 1
    terms = build_objective(name, **({} if name == "sft" else {"lambda_ce": 1.0}))(positions)
    torch.testing.assert_close(terms["ce"], cross_entropy(positions).detach())
    (found_NV,) = torch.autograd.grad(terms["loss"], positions.student_NV)
    alone_NV = positions.student_NV.detach().softmax(1) - one_hot(positions.labels_N, OURS)
    torch.testing.assert_close(found_NV[:, theirs:], alone_NV[:, theirs:])


def test_switch_kd_compares_what_both_have_where_the_teachers_vocabulary_is_the_smaller() -> None:
    positions = make_positions(theirs=23)
    assert positions.teacher_NV is not None
    assert positions.switch_MV is not None
    terms = build_objective("switch_kd")(positions)
    expected = dbild(positions.teacher_NV, positions.student_NV[:, :23], reduction="sum")
    torch.testing.assert_close(terms["dbild"], expected.detach())
    expected = dbild(positions.teacher_NV[:WITH_PICTURE], positions.switch_MV, reduction="sum")
    torch.testing.assert_close(terms["vsd"], expected.detach())


def test_switch_kd_without_pictures_counts_no_switch_term() -> None:
    with_pictures = make_positions()
    positions = Positions(with_pictures.labels_N, with_pictures.student_NV, with_pictures.teacher_NV)
    assert build_objective("switch_kd")(positions)["vsd"] == 0


def test_switch_kd_needs_what_its_weights_ask_for() -> None:
    objective = build_objective("switch_kd")
    assert objective.needs_teacher
    assert objective.needs_switch
    assert not build_objective("switch_kd", lambda_vsd=0.0).needs_switch
    assert not build_objective("switch_kd", lambda_vsd=0.0, lambda_dbild=0.0).needs_teacher
    assert not build_objective("sft").needs_teacher


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_add_up_over_positions_and_none_give_zero(name: str, dtype: torch.dtype) -> None:
    objective, positions = build_objective(name), make_positions(dtype)
    whole = objective(positions)
    assert positions.teacher_NV is not None
    assert positions.switch_MV is not None
    parts = [
        objective(
            Positions(
                positions.labels_N[rows],
                positions.student_NV[rows],
                positions.teacher_NV[rows],
                positions.switch_MV[rows] if len(positions.switch_MV[rows]) else None,
            )
        )
        for rows in (slice(0, 3), slice(3, 5), slice(5, None))
    ]
    for term, value in whole.items():
        assert value.shape == ((BINS,) if term.endswith(COUNTS) else ())
        torch.testing.assert_close(torch.stack([part[term] for part in parts]).sum(0), value, rtol=1e-5, atol=1e-4)
        assert value.requires_grad == (term == "loss")
    assert whole["loss"].dtype == torch.float32

    nothing = make_positions(dtype, rows=0)
    loss = objective(nothing)["loss"]
    loss.backward()
    assert loss == 0
    assert nothing.student_NV.grad is not None


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("switchkd", {}, "no objective 'switchkd'; did you mean 'switch_kd'"),
        ("zzz", {}, "no objective 'zzz'; there are: sft, kd"),
        ("switch_kd", {"lambda_vs": 1}, "no setting 'lambda_vs'; did you mean 'lambda_vsd'"),
        ("sft", {"window": 9}, "no setting 'window'; there are: ce_temperature"),
        ("switch_kd", {"lambda_vsd": -1.0}, "lambda_vsd is -1.0"),
        ("switch_kd", {"lambda_dbild": math.nan}, "lambda_dbild is nan"),
        ("switch_kd", {"vocabulary": 2}, "vocabulary is 2, below min_k 3"),
        ("switch_kd", {"ce_temperature": 0.0}, "ce_temperature is 0.0"),
        ("switch_kd", {"min_k": 1}, "min_k is 1"),
        ("bild", {"k": 2}, "min_k is 2"),
        ("kd", {"temperature": -1.0}, "temperature is -1.0"),
        ("kd", {"direction": "up"}, "direction is 'up'"),
    ],
)
def test_wrong_names_and_settings_are_refused(name: str, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        build_objective(name, **settings)


@pytest.mark.parametrize("whose", ["teacher", "student"])
@pytest.mark.parametrize("number", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("name", ["kd", "bild", "llava_kd", "align_kd", "switch_kd"])
def test_logits_that_are_not_finite_are_named_by_their_row(name: str, number: float, whose: str) -> None:
    positions = make_positions()
    broken_NV = (positions.student_NV if whose == "student" else positions.teacher_NV).detach().clone()  # type: ignore[union-attr]
    broken_NV[5, 3] = broken_NV[6, 2] = number
    with pytest.raises(NonFiniteError, match="row 5 has 1 logits that are NaN or inf") as found:
        build_objective(name)(replace(positions, **{f"{whose}_NV": broken_NV}))
    if name in ("kd", "llava_kd", "align_kd"):
        assert str(found.value).startswith(f"the {whose}'s logits: row 5")


def test_logits_at_visual_tokens_that_are_not_finite_are_named() -> None:
    positions = make_positions()
    assert positions.teacher_NV is not None
    positions.teacher_NV[2, 0] = float("inf")
    with pytest.raises(NonFiniteError, match=r"visual tokens: the teacher's logits: row 2 has 1 logits"):
        build_objective("llava_kd").at_visual_positions(positions.student_NV, positions.teacher_NV, torch.ones(ROWS))
