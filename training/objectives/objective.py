"""What every objective is given, and what it gives back.

Shapes: N supervised positions, M those of them whose row has a picture (they come first), V vocabulary of the model,
P pictures, L visual tokens of a picture, D width of a language model, H its attention heads, T tokens of a row.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor, nn

Terms = dict[str, Tensor]


@dataclass(frozen=True)
class Positions:
    """Logits at supervised positions: what each pathway says about the next token, and which token it is.

    `teacher_NV` is there if the objective `needs_teacher`. `switch_MV` is there if it `needs_switch` and some position
    has a picture whose encoder trains; it belongs to the first M positions.
    """

    labels_N: Tensor
    student_NV: Tensor
    teacher_NV: Tensor | None = None
    switch_MV: Tensor | None = None


@dataclass(frozen=True)
class PictureView:
    """What one model makes of each picture: its visual tokens, and the first layer's attention to them.

    `tokens_PLD` are the projector's, `states_PLD` the language model's last hidden states in their places.
    `attention_PHTL` is there if the objective `needs_attention`: of every query of the picture's row to its L tokens.
    """

    tokens_PLD: Tensor
    states_PLD: Tensor
    attention_PHTL: Tensor | None = None


@dataclass(frozen=True)
class Pictures:
    """Both models' views of the batch's pictures.

    `weight_P` is how many supervised positions a picture stands for (its row's, shared among the row's pictures): a sum
    over pictures with these weights adds up over batches and ranks just as a sum over positions does. `text_PT` is true
    at the text tokens of the picture's row, false at visual tokens and padding.
    """

    weight_P: Tensor
    text_PT: Tensor
    student: PictureView
    teacher: PictureView


@dataclass(frozen=True)
class Widths:
    """What an adapter between two models has to know of each."""

    encoder: int
    language_model: int
    heads: int


class Objective(ABC):
    """A training objective: sums over what it is shown, so that chunks, batches and ranks add up.

    A method that gives terms returns "loss", with its graph, and the terms to log, all 0-dim sums; nothing shown: 0.
    Beside a term there may be counts of its values (`spread.count_k`), named after it with COUNTS at the end.
    """

    @property
    def needs_teacher(self) -> bool:
        """Whether the teacher's logits are needed."""
        return False

    @property
    def needs_switch(self) -> bool:
        """Whether the logits of the visual switch are needed."""
        return False

    @property
    def needs_visual_logits(self) -> bool:
        """Whether `at_visual_positions` is to be called; both models must have the same visual tokens."""
        return False

    @property
    def needs_pictures(self) -> bool:
        """Whether `on_pictures` is to be called; both models must have the same visual tokens."""
        return False

    @property
    def needs_attention(self) -> bool:
        """Whether `on_pictures` looks at attention."""
        return False

    def make_adapters(self, student: Widths, teacher: Widths) -> dict[str, nn.Module]:
        """Return fresh modules, by name, that are trained with the student and thrown away with the teacher."""
        return {}

    @abstractmethod
    def __call__(self, positions: Positions) -> Terms:
        """Compare what the models say at supervised positions."""

    def at_visual_positions(self, student_NV: Tensor, teacher_NV: Tensor, weight_N: Tensor) -> Terms:
        """Compare what the models say at the N visual tokens, each with the weight of its share of a picture."""
        raise NotImplementedError

    def on_pictures(self, pictures: Pictures, adapters: nn.ModuleDict) -> Terms:
        """Compare what the models make of the pictures themselves."""
        raise NotImplementedError
