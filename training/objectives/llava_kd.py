"""LLaVA-KD: the teacher's distributions at answer and visual tokens, and how its visual tokens relate to each other.

Source: LLaVA-KD (arXiv 2410.16236). Its stages are distilled pre-training, SFT, distilled fine-tuning.

Shapes: P pictures, L visual tokens of a picture, D width, N positions, V vocabulary.
"""

from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, normalize

from .dbild import Direction, check_settings
from .finite import naming
from .kd import kl_per_position
from .knee import accumulable
from .objective import Objective, Pictures, Positions, Terms
from .sft import check_weight, summed_cross_entropy

RelationOf = Literal["language_model", "projector"]


@dataclass(frozen=True)
class LlavaKd(Objective):
    """λ_ce·CE + λ_kd·KL at answer tokens + λ_visual·KL at visual tokens + λ_relation·(1 − cos of Gram matrices).

    The weights are the paper's; its public code has lambda_relation 1. A picture's KL is the mean over its L visual
    tokens; its Gram matrix is that of the cosines between its visual tokens as the language model leaves them, or with
    `relation_of: projector` as it is given them, where the language model learns nothing from it. `forward` is
    KL(teacher ‖ student), as the paper writes it.
    """

    lambda_ce: float = 1.0
    lambda_kd: float = 1.0
    lambda_visual: float = 1.0
    lambda_relation: float = 0.5
    relation_of: RelationOf = "language_model"
    temperature: float = 1.0
    direction: Direction = "forward"

    def __post_init__(self) -> None:
        check_settings(self.temperature, None, 3, None, self.direction, "both")
        for name in ("lambda_ce", "lambda_kd", "lambda_visual", "lambda_relation"):
            check_weight(name, getattr(self, name))
        if self.relation_of not in get_args(RelationOf):
            raise ValueError(
                f"relation_of is {self.relation_of!r}; choose from {', '.join(get_args(RelationOf))}: whose visual "
                "tokens are related"
            )

    @property
    def needs_teacher(self) -> bool:
        """Always."""
        return True

    @property
    def needs_visual_logits(self) -> bool:
        """For the KL at visual tokens."""
        return self.lambda_visual > 0

    @property
    def needs_pictures(self) -> bool:
        """For the relations."""
        return self.lambda_relation > 0

    def __call__(self, positions: Positions) -> Terms:
        """Return "loss" and the unweighted sums "ce" and "kd"."""
        assert positions.teacher_NV is not None
        kd = self._kl(positions.student_NV, positions.teacher_NV).sum()
        ce = summed_cross_entropy(positions, 1.0)
        return {"loss": self.lambda_ce * ce + self.lambda_kd * kd, "ce": ce.detach(), "kd": kd.detach()}

    def at_visual_positions(self, student_NV: Tensor, teacher_NV: Tensor, weight_N: Tensor) -> Terms:
        """Return "loss" and the unweighted sum "visual_kd"."""
        with naming("visual tokens"):
            kd = (self._kl(student_NV, teacher_NV) * weight_N).sum()
        return {"loss": self.lambda_visual * kd, "visual_kd": kd.detach()}

    def on_pictures(self, pictures: Pictures, adapters: nn.ModuleDict) -> Terms:
        """Return "loss" and the unweighted sum "relation"."""
        ours, theirs = (
            relations(view.tokens_PLD if self.relation_of == "projector" else view.states_PLD)
            for view in (pictures.student, pictures.teacher)
        )
        relation = ((1 - cosine_similarity(ours.flatten(1), theirs.flatten(1))) * pictures.weight_P).sum()
        return {"loss": self.lambda_relation * relation, "relation": relation.detach()}

    def _kl(self, student_NV: Tensor, teacher_NV: Tensor) -> Tensor:
        return kl_per_position(teacher_NV, student_NV, self.temperature, self.direction)


def relations(tokens_PLD: Tensor) -> Tensor:
    """Return the cosine between every two visual tokens of a picture, [P, L, L]."""
    unit_PLD = normalize(accumulable(tokens_PLD), dim=-1)
    return unit_PLD @ unit_PLD.mT
