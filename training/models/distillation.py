"""One module that holds student, teacher and objective: its forward returns the loss and the terms.

The pathways run inside one forward, so that DDP and ZeRO, which wrap this module, synchronise the student's gradients.

Shapes: B rows, T tokens of a row (the teacher's may be longer or shorter, by its visual tokens), P pictures, C
channels, H W pixels, L E encoder features and their width, D width of a language model, N supervised positions, M those
of them whose row has a picture, V vocabulary.
"""

from collections.abc import Callable
from typing import Any, TypedDict

import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from switchkd.export.llava.projectors import tokens_per_picture

from ..objectives import Objective, Positions, Terms
from ..objectives.spread import COUNTS
from .alignment import Spelling, at_supervised, respell, supervised, with_blank_picture
from .chunks import LOGITS_AT_ONCE, add, in_chunks, largest_of_ranks, longest
from .pair import StudentTeacher
from .pathway import Pathway, run_pathway, visual_features
from .picture_views import lay_out, picture_view, pictures
from .switch import switch_hidden


class DistillationOutput(TypedDict):
    """`loss`, 0-dim with its graph; `terms`, each a detached 0-dim mean over the supervised positions; `counts` of k.

    `counts` are what `spread.count_k` found at the supervised positions, by the names of their terms.
    """

    loss: Tensor
    terms: Terms
    counts: dict[str, Tensor]


class Distillation(StudentTeacher):
    """The pathways of algorithm 1 (arXiv 2604.14629) over a student and its teacher, compared by an objective.

    `chunk_positions` bounds how many positions have logits at once (None: chosen from the vocabulary).
    """

    def __init__(
        self,
        student: LlavaForConditionalGeneration,
        teacher: LlavaForConditionalGeneration | None,
        objective: Objective,
        *,
        chunk_positions: int | None = None,
    ) -> None:
        super().__init__(student, teacher, objective)
        self.chunk_positions = chunk_positions or max(1, LOGITS_AT_ONCE // student.lm_head.out_features)

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
        text, image_PCHW, seeing = self._rows(Spelling(input_ids, attention_mask, labels), pixel_values)

        # Algorithm 1, line 3: z_student = L_S(P_S(V_S(image)), text), here and below up to the last hidden states.
        features_PLE = None if image_PCHW is None else visual_features(self.student, image_PCHW)
        student = run_pathway(self.student, text, features_PLE)

        # Line 2: z_teacher = L_T(P_T(V_T(image)), text), without a gradient.
        teacher = None if self.teacher is None else self._teach(text, image_PCHW)

        # Line 6: z_switch = L_T(P_T(V_S(image)), text), whose gradient reaches V_S alone.
        switch_MD = self._switch(teacher, features_PLE, seeing)

        # Lines 4, 7, 10 and 12: what the objective makes of their logits at the supervised positions.
        labels_N = text.labels_BT[:, 1:][supervised(text.labels_BT)]
        teacher_ND = None if teacher is None else teacher.answers_ND
        on_pictures = self._on_pictures(student, teacher)  # nothing in Switch-KD; its rivals look at more than text
        at_positions = self._in_chunks(self._at_positions, labels_N, student.answers_ND, teacher_ND, switch_MD)
        sums = add(at_positions, on_pictures)

        counts = {name.removesuffix(COUNTS): sums.pop(name) for name in list(sums) if name.endswith(COUNTS)}
        count = max(len(labels_N), 1)
        loss = sums.pop("loss") / (count if num_items_in_batch is None else num_items_in_batch)
        return {"loss": loss, "terms": {name: value / count for name, value in sums.items()}, "counts": counts}

    def _rows(self, text: Spelling, pixels_PCHW: Tensor | None) -> tuple[Spelling, Tensor | None, int]:
        """The batch with its rows in order: those with a picture first, and how many they are.

        So the switch pathway's positions are the first M of all. Where a batch of text alone must run what pictures
        run, a row with a blank picture is added that teaches nothing. Raises ValueError, see `forward`.
        """
        image_token = self.student.config.image_token_index
        seeing_B = (text.ids_BT == image_token).any(1)
        if pixels_PCHW is None and bool(seeing_B.any()):
            raise ValueError(f"{int(seeing_B.sum())} rows have image tokens and there are no pixel_values; give both")
        if pixels_PCHW is None and self.must_see():
            config: Any = self.student.config
            size = config.vision_config.image_size
            pixels_PCHW = torch.zeros(1, config.vision_config.num_channels, size, size, device=text.ids_BT.device)
            text = with_blank_picture(*text, image_token, tokens_per_picture(config))
            seeing_B = (text.ids_BT == image_token).any(1)
        order_B = seeing_B.argsort(descending=True, stable=True)
        return text.rows(order_B), pixels_PCHW, int(seeing_B.sum())

    @torch.no_grad()
    def _teach(self, text: Spelling, image_PCHW: Tensor | None) -> Pathway:
        """The teacher's pathway on the same rows, with as many visual tokens a picture as the teacher has."""
        assert self.teacher is not None
        here, there = tokens_per_picture(self.student.config), tokens_per_picture(self.teacher.config)
        spelling = respell(*text, image_token=self.student.config.image_token_index, here=here, there=there)
        features_PLE = None if image_PCHW is None else visual_features(self.teacher, image_PCHW)
        return run_pathway(self.teacher, spelling, features_PLE)

    def _switch(self, teacher: Pathway | None, features_PLE: Tensor | None, seeing: int) -> Tensor | None:
        """Hidden states [M, D] of the switch pathway at the supervised positions of the first rows, which see."""
        if self.teacher is None or teacher is None or features_PLE is None or not self._runs_switch():
            return None
        if "encoder" in self.adapters:
            features_PLE = self.adapters["encoder"](features_PLE)
        rows = teacher.spelling.rows(slice(seeing))
        return at_supervised(switch_hidden(self.teacher, rows.ids_BT, rows.mask_BT, features_PLE), rows.labels_BT)

    def _runs_switch(self) -> bool:
        """Evaluation reports the term; training runs the pass only if the encoder can learn from it."""
        return self.objective.needs_switch and (self.encoder_trains() or not self.training)

    def _on_pictures(self, student: Pathway, teacher: Pathway | None) -> Terms:
        """What the objective says of the pictures themselves, where it asks for them; both spell them alike."""
        objective, ours_PLD = self.objective, student.tokens_PLD
        asks = objective.needs_visual_logits or objective.needs_pictures
        if not asks or self.teacher is None or teacher is None or ours_PLD is None:
            return {}
        layout = lay_out(*student.spelling, self.student.config.image_token_index, ours_PLD.shape[1])
        sums: Terms = {}
        if objective.needs_visual_logits:
            weight_N = (layout.weight_P / ours_PLD.shape[1]).repeat_interleave(ours_PLD.shape[1])
            ours_ND, theirs_ND = (pathway.hidden_BTD[layout.image_BT] for pathway in (student, teacher))
            sums = self._in_chunks(self._at_visual_positions, ours_ND, theirs_ND, weight_N)
        if objective.needs_pictures:
            ours = picture_view(self.student, student, layout, attention=objective.needs_attention)
            with torch.no_grad():
                theirs = picture_view(self.teacher, teacher, layout, attention=objective.needs_attention)
            sums = add(sums, objective.on_pictures(pictures(layout, ours, theirs), self.adapters))
        return sums

    def _in_chunks(self, function: Callable[..., Terms], *tensors: Tensor | None) -> Terms:
        """Sum what the function gives for every chunk of positions; under ZeRO-3 every rank runs as many of them."""
        count = longest(tensors)
        if self.is_partitioned():
            count = largest_of_ranks(count, self.student.lm_head.weight.device)
        return in_chunks(function, self.chunk_positions, tensors, count)

    def _at_positions(
        self, labels_N: Tensor, student_ND: Tensor, teacher_ND: Tensor | None, switch_MD: Tensor | None
    ) -> Terms:
        return self.objective(self._logits(labels_N, student_ND, teacher_ND, switch_MD))

    def _logits(
        self, labels_N: Tensor, student_ND: Tensor, teacher_ND: Tensor | None, switch_MD: Tensor | None
    ) -> Positions:
        teacher_NV = switch_MV = None
        if self.teacher is not None and teacher_ND is not None:
            with torch.no_grad():
                teacher_NV = self.teacher.lm_head(teacher_ND)
            if switch_MD is not None:
                switch_MV = self.teacher.lm_head(switch_MD)
        return Positions(labels_N, self.student.lm_head(student_ND), teacher_NV, switch_MV)

    def _at_visual_positions(self, student_ND: Tensor, teacher_ND: Tensor, weight_N: Tensor) -> Terms:
        assert self.teacher is not None
        with torch.no_grad():
            teacher_NV = self.teacher.lm_head(teacher_ND)
        return self.objective.at_visual_positions(self.student.lm_head(student_ND), teacher_NV, weight_N)
