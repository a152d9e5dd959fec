"""Align-KD: the teacher's distributions, what its text looks at in the first layer, and its visual tokens.

Source: Align-KD (arXiv 2412.01282). Its public code never hands its two adapters to the optimizer, so that they stay as
they were drawn; here they train with the student.

Shapes: P pictures, L visual tokens of a picture, D width, H heads, T tokens of a row, N positions, V vocabulary.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from .dbild import shared_prefix
from .finite import check_logits
from .knee import accumulable
from .objective import Objective, Pictures, Positions, Terms, Widths
from .sft import check_weight, summed_cross_entropy


@dataclass(frozen=True)
class AlignKd(Objective):
    """λ_ce·CE + λ_logits·CE(teacher, student) + λ_attention·MSE(attention) + λ_visual·(MSE(all) + MSE(top)).

    CE(teacher, student) is −Σ p_teacher log p_student at answer tokens. Attention is that of the first layer's text
    queries to visual tokens, the teacher's heads mapped to the student's by a 1×1 convolution. Visual tokens are those
    of the projectors, the teacher's mapped to the student's width by a linear adapter: all of them, and the
    `top_tokens` that the teacher's text looks at most. Weights are the paper's.
    """

    lambda_ce: float = 1.0
    lambda_logits: float = 1.0
    lambda_attention: float = 1.0
    lambda_visual: float = 1.0
    top_tokens: int = 16

    def __post_init__(self) -> None:
        for name in ("lambda_ce", "lambda_logits", "lambda_attention", "lambda_visual"):
            check_weight(name, getattr(self, name))
        if self.top_tokens < 1:
            raise ValueError(f"top_tokens is {self.top_tokens}; choose at least 1 visual token (the paper's is 16)")

    @property
    def needs_teacher(self) -> bool:
        """Always."""
        return True

    @property
    def needs_pictures(self) -> bool:
        """For attention and visual tokens."""
        return self.lambda_attention > 0 or self.lambda_visual > 0

    @property
    def needs_attention(self) -> bool:
        """The visual term asks for it too: it says which tokens matter."""
        return self.needs_pictures

    def make_adapters(self, student: Widths, teacher: Widths) -> dict[str, nn.Module]:
        """Return `heads`, from the teacher's to the student's heads, and `tokens`, between the widths."""
        adapters: dict[str, nn.Module] = {}
        if self.lambda_attention > 0:
            adapters["heads"] = nn.Conv2d(teacher.heads, student.heads, kernel_size=1)
        if self.lambda_visual > 0:
            adapters["tokens"] = nn.Linear(teacher.language_model, student.language_model)
        return adapters

    def __call__(self, positions: Positions) -> Terms:
        """Return "loss" and the unweighted sums "ce" and "logits"."""
        assert positions.teacher_NV is not None
        teacher_NV, student_NV = map(accumulable, shared_prefix(positions.teacher_NV, positions.student_NV))
        check_logits(teacher_NV, student_NV)
        logits = -(teacher_NV.softmax(1) * student_NV.log_softmax(1)).sum()
        ce = summed_cross_entropy(positions, 1.0)
        return {"loss": self.lambda_ce * ce + self.lambda_logits * logits, "ce": ce.detach(), "logits": logits.detach()}

    def on_pictures(self, pictures: Pictures, adapters: nn.ModuleDict) -> Terms:
        """Return "loss" and the unweighted sums "attention" and "visual", those that are on."""
        loss, terms = pictures.weight_P.new_zeros(()), {}
        for name, weight, measure in (
            ("attention", self.lambda_attention, _attention_error),
            ("visual", self.lambda_visual, self._token_error),
        ):
            if weight > 0:
                term = (measure(pictures, adapters) * pictures.weight_P).sum()
                loss = loss + weight * term
                terms[name] = term.detach()
        return {"loss": loss, **terms}

    def _token_error(self, pictures: Pictures, adapters: nn.ModuleDict) -> Tensor:
        attention_PHTL = pictures.teacher.attention_PHTL
        assert attention_PHTL is not None
        error_PL = (adapters["tokens"](pictures.teacher.tokens_PLD) - pictures.student.tokens_PLD).pow(2).mean(-1)
        looked_at_PL = (attention_PHTL.mean(1) * pictures.text_PT[..., None]).sum(1)
        top_PK = looked_at_PL.topk(min(self.top_tokens, error_PL.shape[1]), dim=1).indices
        error_P: Tensor = error_PL.mean(1) + error_PL.gather(1, top_PK).mean(1)
        return error_P


def _attention_error(pictures: Pictures, adapters: nn.ModuleDict) -> Tensor:
    ours_PHTL, theirs_PHTL = pictures.student.attention_PHTL, pictures.teacher.attention_PHTL
    assert ours_PHTL is not None
    assert theirs_PHTL is not None
    error_PTL = (adapters["heads"](theirs_PHTL) - ours_PHTL).pow(2).mean(1)
    text_PT = pictures.text_PT.to(error_PTL.dtype)
    error_P: Tensor = (error_PTL.mean(-1) * text_PT).sum(1) / text_PT.sum(1).clamp(min=1)
    return error_P
