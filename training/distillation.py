"""One module that holds student, teacher and objective: its forward returns the loss and the terms.

The pathways run inside one forward, so that DDP and ZeRO, which wrap this module, synchronise the student's gradients.

Shapes: B rows, T tokens of a row, P pictures, C channels, H W pixels, D width of a language model, N supervised
positions, M those of them whose row has a picture, V vocabulary.
"""

from typing import Any, TypedDict

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import LlavaForConditionalGeneration

from .objectives import Objective, Positions, Terms
from .switch import check_pair, last_hidden, switch_hidden, visual_features, visual_tokens

# Logits of one head held at once: positions times vocabulary. Above it the heads and the objective run in chunks.
LOGITS_AT_ONCE = 2**25
IGNORED = -100


class DistillationOutput(TypedDict):
    """`loss`, 0-dim with its graph, and `terms`, each a detached 0-dim mean over the supervised positions."""

    loss: Tensor
    terms: Terms


class Distillation(nn.Module):
    """Student, teacher and objective as one module; only `student` is trained and saved.

    The teacher is frozen and always in eval mode, and is left out of `state_dict()`. `chunk_positions` bounds how many
    positions have logits at once (None: chosen from the vocabulary).
    """

    def __init__(
        self,
        student: LlavaForConditionalGeneration,
        teacher: LlavaForConditionalGeneration | None,
        objective: Objective,
        *,
        chunk_positions: int | None = None,
    ) -> None:
        super().__init__()
        if objective.needs_teacher and teacher is None:
            raise ValueError(f"the objective {type(objective).__name__} compares with a teacher, and there is none")
        self.student = student
        # A teacher that the objective does not ask for would only hold memory.
        self.teacher = teacher if objective.needs_teacher else None
        self.objective = objective
        self.chunk_positions = chunk_positions or max(1, LOGITS_AT_ONCE // student.lm_head.out_features)
        if self.teacher is not None:
            check_pair(student, self.teacher, switch=objective.needs_switch)
            self.teacher.requires_grad_(False).eval()
        self.register_state_dict_post_hook(_leave_out_teacher)
        self.register_load_state_dict_post_hook(_expect_no_teacher)

    def train(self, mode: bool = True) -> "Distillation":
        """Set the student's mode; the teacher stays in eval mode."""
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self

    def activation_checkpointing_enable(self, **settings: Any) -> None:
        """Recompute the student's activations in the backward; the Trainer calls this for `gradient_checkpointing`."""
        self.student.activation_checkpointing_enable(**settings)

    def gradient_checkpointing_enable(self, **settings: Any) -> None:
        """The name of the same in older releases of transformers."""
        self.student.gradient_checkpointing_enable(**settings)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor,
        pixel_values: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> DistillationOutput:
        """Return the loss and terms of a batch.

        `input_ids`, `attention_mask` and `labels` are [B, T]; labels are not shifted and −100 where unsupervised. Image
        tokens are already repeated for every visual token; `pixel_values` is [P, C, H, W] in their order. The loss is a
        sum over the supervised positions divided by `num_items_in_batch`, their number in the whole batch over all
        ranks and accumulation steps (None: their number here). Without a picture, or with a frozen encoder while
        training, the switch pathway has no gradient to give: it is not run and counts 0. Raises ValueError if there are
        image tokens but no pictures.
        """
        # Rows with a picture first: then the switch pathway's positions are the first M of all.
        has_picture_B = (input_ids == self.student.config.image_token_index).any(1)
        if pixel_values is None and bool(has_picture_B.any()):
            raise ValueError(
                f"{int(has_picture_B.sum())} rows have image tokens and there are no pixel_values; give both"
            )
        order_B = has_picture_B.argsort(descending=True, stable=True)
        ids_BT, mask_BT, labels_BT = input_ids[order_B], attention_mask[order_B], labels[order_B]
        supervised_BT = labels_BT[:, 1:] != IGNORED
        labels_N = labels_BT[:, 1:][supervised_BT]

        def at_supervised(hidden_BTD: Tensor) -> Tensor:
            return hidden_BTD[:, :-1][supervised_BT[: len(hidden_BTD)]]

        features_PLE = None if pixel_values is None else visual_features(self.student, pixel_values)
        tokens_PLD = None if features_PLE is None else visual_tokens(self.student, features_PLE)
        student_ND = at_supervised(last_hidden(self.student, ids_BT, mask_BT, tokens_PLD))
        if pixel_values is None and self.training and torch.distributed.is_initialized():
            student_ND = student_ND + self._unseen_picture()
        teacher_ND = switch_MD = None
        if self.teacher is not None:
            with torch.no_grad():
                teacher_tokens_PLD = None
                if pixel_values is not None:
                    teacher_tokens_PLD = visual_tokens(self.teacher, visual_features(self.teacher, pixel_values))
                teacher_ND = at_supervised(last_hidden(self.teacher, ids_BT, mask_BT, teacher_tokens_PLD))
            if features_PLE is not None and self._runs_switch():
                rows = int(has_picture_B.sum())
                switch_MD = at_supervised(switch_hidden(self.teacher, ids_BT[:rows], mask_BT[:rows], features_PLE))
        return self._objective_in_chunks(labels_N, student_ND, teacher_ND, switch_MD, num_items_in_batch)

    def _unseen_picture(self) -> Tensor:
        """Return 0 with the encoder and projector in its graph, for a text-only batch among several processes.

        Gradients are exchanged parameter by parameter: a rank without one for its encoder keeps the others waiting.
        """
        vision: Any = self.student.config.vision_config
        size = vision.image_size
        pixels_PCHW = self.student.lm_head.weight.new_zeros(1, vision.num_channels, size, size)
        return 0 * visual_tokens(self.student, visual_features(self.student, pixels_PCHW)).sum()

    def _runs_switch(self) -> bool:
        """Evaluation reports the term; training runs the pass only if the encoder can learn from it."""
        encoder_trains = any(parameter.requires_grad for parameter in self.student.model.vision_tower.parameters())
        return self.objective.needs_switch and (encoder_trains or not self.training)

    def _objective_in_chunks(
        self,
        labels_N: Tensor,
        student_ND: Tensor,
        teacher_ND: Tensor | None,
        switch_MD: Tensor | None,
        num_items_in_batch: Tensor | int | None,
    ) -> DistillationOutput:
        count, step = len(labels_N), self.chunk_positions
        sums: Terms = {}
        for start in range(0, max(count, 1), step):
            chunk = slice(start, start + step)
            pathways = (
                labels_N[chunk],
                student_ND[chunk],
                None if teacher_ND is None else teacher_ND[chunk],
                None if switch_MD is None else switch_MD[chunk],
            )
            if count <= step:
                terms = self._objective_on(*pathways)
            else:
                # Logits of one chunk at a time: the backward computes them again.
                terms = checkpoint(self._objective_on, *pathways, use_reentrant=False, preserve_rng_state=False)
            sums = {name: sums[name] + value if sums else value for name, value in terms.items()}
        loss = sums.pop("loss") / (max(count, 1) if num_items_in_batch is None else num_items_in_batch)
        return {"loss": loss, "terms": {name: value / max(count, 1) for name, value in sums.items()}}

    def _objective_on(
        self, labels_N: Tensor, student_ND: Tensor, teacher_ND: Tensor | None, switch_MD: Tensor | None
    ) -> Terms:
        teacher_NV = switch_MV = None
        if self.teacher is not None and teacher_ND is not None:
            with torch.no_grad():
                teacher_NV = self.teacher.lm_head(teacher_ND)
            if switch_MD is not None and len(switch_MD):
                switch_MV = self.teacher.lm_head(switch_MD)
        return self.objective(Positions(labels_N, self.student.lm_head(student_ND), teacher_NV, switch_MV))


def _leave_out_teacher(_module: nn.Module, state: dict[str, Any], prefix: str, _metadata: dict[str, Any]) -> None:
    for key in [key for key in state if key.startswith(f"{prefix}teacher.")]:
        del state[key]


def _expect_no_teacher(_module: nn.Module, incompatible: Any) -> None:
    # A wrapper such as DDP puts its own prefix before ours.
    missing = incompatible.missing_keys
    missing[:] = [key for key in missing if not f".{key}".startswith(".teacher.") and ".teacher." not in key]
