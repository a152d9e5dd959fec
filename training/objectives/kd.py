"""Plain knowledge distillation: KL over the whole vocabulary at the answer tokens (Hinton et al. 2015)."""

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import kl_div

from .dbild import Direction, check_settings, shared_prefix
from .finite import check_logits
from .knee import accumulable
from .objective import Objective, Positions, Terms
from .sft import check_weight, summed_cross_entropy


@dataclass(frozen=True)
class Kd(Objective):
    """λ_ce·CE + λ_kd·KL between softmax(z/τ) of teacher and student over the tokens that both have.

    `forward` is KL(teacher ‖ student), `reverse` KL(student ‖ teacher). `tau_squared` multiplies KL by temperature².
    """

    lambda_ce: float = 1.0
    lambda_kd: float = 1.0
    temperature: float = 1.0
    tau_squared: bool = False
    direction: Direction = "forward"

    def __post_init__(self) -> None:
        check_settings(self.temperature, None, 3, None, self.direction, "both")
        check_weight("lambda_ce", self.lambda_ce)
        check_weight("lambda_kd", self.lambda_kd)

    @property
    def needs_teacher(self) -> bool:
        """Always."""
        return True

    def __call__(self, positions: Positions) -> Terms:
        """Return "loss" and the unweighted sums "ce" and "kd"."""
        assert positions.teacher_NV is not None
        kl_N = kl_per_position(positions.teacher_NV, positions.student_NV, self.temperature, self.direction)
        kd = kl_N.sum() * (self.temperature**2 if self.tau_squared else 1)
        ce = summed_cross_entropy(positions, 1.0)
        return {"loss": self.lambda_ce * ce + self.lambda_kd * kd, "ce": ce.detach(), "kd": kd.detach()}


def kl_per_position(teacher_NV: Tensor, student_NV: Tensor, temperature: float, direction: Direction) -> Tensor:
    """Return [N]: KL(teacher ‖ student) of softmax(z/τ) for `forward`, KL(student ‖ teacher) for `reverse`.

    Over the tokens that both have, in float32 (float64 for float64 logits). Raises NonFiniteError naming the row.
    """
    both = shared_prefix(teacher_NV, student_NV)
    check_logits(*both)
    log_p_NV, log_q_NV = ((accumulable(z_NV) / temperature).log_softmax(1) for z_NV in both)
    if direction == "reverse":
        log_p_NV, log_q_NV = log_q_NV, log_p_NV
    # torch's kl_div(input, target) is KL(target ‖ input).
    return kl_div(log_q_NV, log_p_NV, log_target=True, reduction="none").sum(1)
