"""One module that holds student, teacher and objective: its forward returns the loss and the terms.

The pathways run inside one forward, so that DDP and ZeRO, which wrap this module, synchronise the student's gradients.

Shapes: B rows, T tokens of a row (the teacher's may be longer or shorter, by its visual tokens), P pictures, C
channels, H W pixels, L E encoder features and their width, D width of a language model, N supervised positions, M those
of them whose row has a picture, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypedDict

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import LlavaForConditionalGeneration
from transformers.modeling_layers import GradientCheckpointingLayer

from switchkd.export.llava.projectors import tokens_per_picture

from ..objectives import Objective, Positions, Terms, Widths
from ..objectives.spread import COUNTS
from .alignment import at_supervised, respell, supervised, with_blank_picture
from .picture_views import first_attention, lay_out, picture_view, pictures
from .switch import (
    check_pair,
    embed,
    features_width,
    last_hidden,
    switch_hidden,
    visual_features,
    visual_tokens,
)

# Logits of one head held at once: positions times vocabulary. Above it the heads and the objective run in chunks.
LOGITS_AT_ONCE = 2**25


class DistillationOutput(TypedDict):
    """`loss`, 0-dim with its graph; `terms`, each a detached 0-dim mean over the supervised positions; `counts` of k.

    `counts` are what `spread.count_k` found at the supervised positions, by the names of their terms.
    """

    loss: Tensor
    terms: Terms
    counts: dict[str, Tensor]


@dataclass(frozen=True)
class _Pathway:
    """A model on a batch as its own visual tokens spell it: what goes in, and its last hidden states."""

    ids_BT: Tensor
    mask_BT: Tensor
    labels_BT: Tensor
    tokens_PLD: Tensor | None
    embeds_BTD: Tensor
    hidden_BTD: Tensor


class Distillation(nn.Module):
    """Student, teacher and objective as one module; `student` and the objective's `adapters` are trained.

    The teacher is frozen and always in eval mode, and is left out of `state_dict()`. Adapters lead from one model to
    the other and are of no use without the teacher: they belong to a checkpoint to resume from, not to the result.
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
        super().__init__()
        if objective.needs_teacher and teacher is None:
            raise ValueError(f"the objective {type(objective).__name__} compares with a teacher, and there is none")
        self.student = student
        # A teacher that the objective does not ask for would only hold memory.
        self.teacher = teacher if objective.needs_teacher else None
        self.objective = objective
        self.chunk_positions = chunk_positions or max(1, LOGITS_AT_ONCE // student.lm_head.out_features)
        self.adapters = nn.ModuleDict()
        if self.teacher is not None:
            self.adapters = nn.ModuleDict(objective.make_adapters(_widths(student), _widths(self.teacher)))
            self.adapters.to(student.dtype)
            check_pair(
                student,
                self.teacher,
                switch=objective.needs_switch,
                adapter="encoder" in self.adapters,
                same_tokens=objective.needs_visual_logits or objective.needs_pictures,
            )
            self.teacher.requires_grad_(False).eval()
            if "encoder" in self.adapters and not self._encoder_trains():
                self.adapters["encoder"].requires_grad_(False)  # the switch pass will not be run
        self._recomputed: list[nn.Module] = []
        self.register_state_dict_post_hook(_leave_out_teacher)
        self.register_load_state_dict_post_hook(_expect_what_trains)

    def train(self, mode: bool = True) -> "Distillation":
        """Set the student's mode; the teacher stays in eval mode."""
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
            # A layer recomputes only in training. Its parts stay in eval mode, so that it computes what it did.
            for layer in self._recomputed:
                layer.training = mode
        return self

    def activation_checkpointing_enable(self, **settings: Any) -> None:
        """Recompute activations in the backward, in the student and in the switch pass through the teacher.

        The Trainer calls this for `gradient_checkpointing`.
        """
        self._recompute("activation_checkpointing_enable", settings)

    def gradient_checkpointing_enable(self, **settings: Any) -> None:
        """The name of the same in older releases of transformers."""
        self._recompute("gradient_checkpointing_enable", settings)

    def _recompute(self, enable: str, settings: dict[str, Any]) -> None:
        getattr(self.student, enable)(**settings)
        if self.teacher is not None and self.objective.needs_switch:
            language_model = self.teacher.model.language_model
            getattr(language_model, enable)(**settings)
            language_model.disable_input_require_grads()  # the features bring theirs; words need none
            self._recomputed = [
                part for part in language_model.modules() if isinstance(part, GradientCheckpointingLayer)
            ]
            self.train(self.training)

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
        if pixel_values is None and self._must_see():
            input_ids, attention_mask, labels, pixel_values = self._blank(input_ids, attention_mask, labels)
            has_picture_B = (input_ids == self.student.config.image_token_index).any(1)
        order_B = has_picture_B.argsort(descending=True, stable=True)
        spelling = input_ids[order_B], attention_mask[order_B], labels[order_B]
        features_PLE = None if pixel_values is None else visual_features(self.student, pixel_values)
        student = _run(self.student, spelling, features_PLE)
        labels_N = student.labels_BT[:, 1:][supervised(student.labels_BT)]
        student_ND = at_supervised(student.hidden_BTD, student.labels_BT)
        teacher_ND = switch_MD = None
        on_pictures: Terms = {}
        if self.teacher is not None:
            with torch.no_grad():
                seen_PLE = None if pixel_values is None else visual_features(self.teacher, pixel_values)
                teacher = _run(self.teacher, self._as_teacher(spelling), seen_PLE)
                teacher_ND = at_supervised(teacher.hidden_BTD, teacher.labels_BT)
            if features_PLE is not None and self._runs_switch():
                switch_MD = self._switch(teacher, features_PLE, int(has_picture_B.sum()))
            if features_PLE is not None:
                on_pictures = self._compare_pictures(student, teacher)
        at_positions = self._in_chunks(self._at_positions, labels_N, student_ND, teacher_ND, switch_MD)
        sums = _add(at_positions, on_pictures)
        counts = {name.removesuffix(COUNTS): sums.pop(name) for name in list(sums) if name.endswith(COUNTS)}
        count = max(len(labels_N), 1)
        loss = sums.pop("loss") / (count if num_items_in_batch is None else num_items_in_batch)
        return {"loss": loss, "terms": {name: value / count for name, value in sums.items()}, "counts": counts}

    def _as_teacher(self, spelling: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """The same rows with as many visual tokens a picture as the teacher has."""
        assert self.teacher is not None
        here, there = tokens_per_picture(self.student.config), tokens_per_picture(self.teacher.config)
        return respell(*spelling, image_token=self.student.config.image_token_index, here=here, there=there)

    def _switch(self, teacher: _Pathway, features_PLE: Tensor, rows: int) -> Tensor:
        """Hidden states [M, D] of the switch pathway at the supervised positions of the first `rows` rows."""
        assert self.teacher is not None
        if "encoder" in self.adapters:
            features_PLE = self.adapters["encoder"](features_PLE)
        hidden_BTD = switch_hidden(self.teacher, teacher.ids_BT[:rows], teacher.mask_BT[:rows], features_PLE)
        return at_supervised(hidden_BTD, teacher.labels_BT)

    def _compare_pictures(self, student: _Pathway, teacher: _Pathway) -> Terms:
        """What the objective says of the pictures themselves, where it asks for them; both spell them alike."""
        objective = self.objective
        if not (objective.needs_visual_logits or objective.needs_pictures):
            return {}
        assert self.teacher is not None
        image_token, tokens = self.student.config.image_token_index, tokens_per_picture(self.student.config)
        layout = lay_out(student.ids_BT, student.mask_BT, student.labels_BT, image_token, tokens)
        sums: Terms = {}
        if objective.needs_visual_logits:
            weight_N = (layout.weight_P / tokens).repeat_interleave(tokens)
            ours_ND, theirs_ND = (pathway.hidden_BTD[layout.image_BT] for pathway in (student, teacher))
            sums = self._in_chunks(self._at_visual_positions, ours_ND, theirs_ND, weight_N)
        if objective.needs_pictures:
            views = (
                picture_view(pathway.tokens_PLD, self._attention(model, pathway), layout)
                for model, pathway in ((self.student, student), (self.teacher, teacher))
                if pathway.tokens_PLD is not None
            )
            sums = _add(sums, objective.on_pictures(pictures(layout, *views), self.adapters))
        return sums

    def _attention(self, model: LlavaForConditionalGeneration, pathway: _Pathway) -> Tensor | None:
        if not self.objective.needs_attention:
            return None
        with torch.set_grad_enabled(torch.is_grad_enabled() and model is self.student):
            return first_attention(model, pathway.embeds_BTD, pathway.mask_BT)

    def _must_see(self) -> bool:
        """Whether a batch of text alone must run what pictures run, so that all ranks do the same.

        DDP and ZeRO exchange gradients parameter by parameter: a rank without one for its encoder keeps the others
        waiting. One process does it too, since AdamW moves a parameter with a gradient of 0 and skips one with none.
        """
        sight = (self.student.model.vision_tower, self.student.model.multi_modal_projector, self.adapters)
        learns = any(parameter.requires_grad for part in sight for parameter in part.parameters())
        return self.training and (learns or self._is_partitioned())

    def _is_partitioned(self) -> bool:
        """Whether ZeRO-3 holds the weights: it gathers them module by module, so all ranks must run the same ones."""
        return hasattr(self.student.lm_head.weight, "ds_id")

    def _blank(self, ids_BT: Tensor, mask_BT: Tensor, labels_BT: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The batch and one row more, of a blank picture with nothing to learn from; pixels [1, C, H, W] come last."""
        config: Any = self.student.config
        size = config.vision_config.image_size
        pixels_PCHW = torch.zeros(1, config.vision_config.num_channels, size, size, device=ids_BT.device)
        tokens = tokens_per_picture(config)
        return (*with_blank_picture(ids_BT, mask_BT, labels_BT, config.image_token_index, tokens), pixels_PCHW)

    def _runs_switch(self) -> bool:
        """Evaluation reports the term; training runs the pass only if the encoder can learn from it."""
        return self.objective.needs_switch and (self._encoder_trains() or not self.training)

    def _encoder_trains(self) -> bool:
        return any(parameter.requires_grad for parameter in self.student.model.vision_tower.parameters())

    def _in_chunks(self, function: Callable[..., Terms], *tensors: Tensor | None) -> Terms:
        """Sum what the function gives for every chunk of positions; tensors' first dimension is positions, or None."""
        count, step = max(len(tensor) for tensor in tensors if tensor is not None), self.chunk_positions
        if self._is_partitioned():
            count = _largest(count, self.student.lm_head.weight.device)
        if count <= step:
            return function(*tensors)
        sums: Terms = {}
        for start in range(0, count, step):
            chunk = [None if tensor is None else tensor[start : start + step] for tensor in tensors]
            # Logits of one chunk at a time: the backward computes them again.
            sums = _add(sums, checkpoint(function, *chunk, use_reentrant=False, preserve_rng_state=False))
        return sums

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


def _run(
    model: LlavaForConditionalGeneration, spelling: tuple[Tensor, Tensor, Tensor], features_PLE: Tensor | None
) -> _Pathway:
    ids_BT, mask_BT, labels_BT = spelling
    tokens_PLD = None if features_PLE is None else visual_tokens(model, features_PLE)
    embeds_BTD = embed(model, ids_BT, tokens_PLD)
    return _Pathway(ids_BT, mask_BT, labels_BT, tokens_PLD, embeds_BTD, last_hidden(model, embeds_BTD, mask_BT))


def _add(one: Terms, other: Terms) -> Terms:
    common = {name: one[name] + other[name] for name in one.keys() & other.keys()}
    return one | other | common


def _largest(count: int, device: torch.device) -> int:
    """The largest count of all ranks."""
    counts = torch.tensor(count, device=device)
    torch.distributed.all_reduce(counts, torch.distributed.ReduceOp.MAX)
    return int(counts)


def _widths(model: LlavaForConditionalGeneration) -> Widths:
    text: Any = model.config.text_config
    return Widths(features_width(model), text.hidden_size, text.num_attention_heads)


def _leave_out_teacher(_module: nn.Module, state: dict[str, Any], prefix: str, _metadata: dict[str, Any]) -> None:
    for key in [key for key in state if key.startswith(f"{prefix}teacher.")]:
        del state[key]


def _expect_what_trains(module: nn.Module, incompatible: Any) -> None:
    # A wrapper such as DDP puts its own prefix before ours.
    parameters = module.named_parameters(remove_duplicate=False)
    frozen = tuple(f".{name}" for name, parameter in parameters if not parameter.requires_grad)
    missing = incompatible.missing_keys
    missing[:] = [key for key in missing if ".teacher." not in f".{key}" and not f".{key}".endswith(frozen)]
