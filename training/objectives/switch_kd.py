"""Switch-KD: cross-entropy, DBiLD of the student, and DBiLD of the visual switch, both against the teacher.

Source: Switch-KD (arXiv 2604.14629), algorithm 1. What its public text leaves open is a setting here.
"""

import sys
from dataclasses import dataclass

from torch import Tensor, nn

from .dbild import DbildRows, Direction, Leaders, LedBy, check_settings, dbild, rank
from .finite import naming
from .objective import Objective, Positions, Terms, Widths
from .sft import check_ce_temperature, check_weight, summed_cross_entropy
from .spread import COUNTS, count_k


@dataclass(frozen=True)
class SwitchKd(Objective):
    """CE + λ1·DBiLD(teacher, student) + λ2·DBiLD(teacher, switch); a weight of 0 turns its term off.

    `temperature`, `window`, `min_k`, `max_k`, `direction` and `led_by` are those of `dbild`. `vocabulary` compares only
    the first so many tokens (None: all that both models have). `tau_squared` multiplies DBiLD by temperature².
    `encoder_adapter` puts a trained linear layer between the student's encoder and the teacher's projector where their
    widths differ; without it such a pair is refused. The paper has none: its encoders are of one width.
    """

    lambda_ce: float = 1.0
    lambda_dbild: float = 1.0
    lambda_vsd: float = 1.0
    temperature: float = 3.0
    tau_squared: bool = False
    window: int | None = None
    min_k: int = 3
    max_k: int | None = None
    direction: Direction = "reverse"
    led_by: LedBy = "both"
    vocabulary: int | None = None
    ce_temperature: float = 1.0
    encoder_adapter: bool = False

    def __post_init__(self) -> None:
        check_settings(self.temperature, self.window, self.min_k, self.max_k, self.direction, self.led_by)
        check_ce_temperature(self.ce_temperature)
        for name in ("lambda_ce", "lambda_dbild", "lambda_vsd"):
            check_weight(name, getattr(self, name))
        if self.vocabulary is not None and self.vocabulary < self.min_k:
            raise ValueError(f"vocabulary is {self.vocabulary}, below min_k {self.min_k}; raise it, or None for all")

    @property
    def needs_teacher(self) -> bool:
        """Whether any term compares with the teacher."""
        return self.lambda_dbild > 0 or self.lambda_vsd > 0

    @property
    def needs_switch(self) -> bool:
        """Whether the switch pathway has to be run at all."""
        return self.lambda_vsd > 0

    def make_adapters(self, student: Widths, teacher: Widths) -> dict[str, nn.Module]:
        """Return `encoder`, from the student's encoder width to the teacher's, if asked for and if they differ."""
        if not (self.needs_switch and self.encoder_adapter) or student.encoder == teacher.encoder:
            return {}
        adapter = nn.Linear(student.encoder, teacher.encoder)
        # Keeps lengths and angles as far as the widths allow: the teacher's projector is used to features of that size.
        nn.init.orthogonal_(adapter.weight)
        nn.init.zeros_(adapter.bias)
        return {"encoder": adapter}

    def __call__(self, positions: Positions) -> Terms:
        """Return "loss", the unweighted sums "ce", "dbild", "vsd", "k_teacher", "k_student", and counts of both k."""
        ce = summed_cross_entropy(positions, self.ce_temperature)
        loss = self.lambda_ce * ce
        terms = {"ce": ce.detach()}
        if self.needs_teacher:
            assert positions.teacher_NV is not None
            # One prefix for both terms, so that the teacher's leading tokens are found once.
            shared = min(positions.teacher_NV.shape[1], positions.student_NV.shape[1], self.vocabulary or sys.maxsize)
            teacher_NV = positions.teacher_NV[:, :shared]
            with naming("the teacher's logits"):
                leaders = rank(teacher_NV, window=self.window, min_k=self.min_k, max_k=self.max_k)
            terms |= _k("k_teacher", leaders.k_N)
            if self.lambda_dbild > 0:
                with naming("dbild"):
                    dbild_sum, rows = self._dbild(teacher_NV, positions.student_NV[:, :shared], leaders)
                loss = loss + self.lambda_dbild * dbild_sum
                terms |= {"dbild": dbild_sum.detach()} | _k("k_student", rows.candidate_k_N)
            if self.lambda_vsd > 0:
                vsd_sum = ce.new_zeros(())
                if positions.switch_MV is not None:
                    with_picture = len(positions.switch_MV)
                    with naming("vsd"):
                        vsd_sum, _ = self._dbild(
                            teacher_NV[:with_picture], positions.switch_MV[:, :shared], leaders.rows(0, with_picture)
                        )
                    loss = loss + self.lambda_vsd * vsd_sum
                terms["vsd"] = vsd_sum.detach()
        return {"loss": loss, **terms}

    def _dbild(self, teacher_NV: Tensor, candidate_NV: Tensor, leaders: Leaders) -> tuple[Tensor, DbildRows]:
        total, rows = dbild(
            teacher_NV,
            candidate_NV,
            temperature=self.temperature,
            window=self.window,
            min_k=self.min_k,
            max_k=self.max_k,
            direction=self.direction,
            reduction="sum",
            led_by=self.led_by,
            reference_leaders=leaders,
            return_rows=True,
        )
        return total * (self.temperature**2 if self.tau_squared else 1), rows


def _k(name: str, k_N: Tensor) -> Terms:
    return {name: k_N.sum(), f"{name}{COUNTS}": count_k(k_N)}
