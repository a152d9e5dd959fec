"""Student, teacher and the adapters between them as one module: what trains, what recomputes, what is saved."""

from typing import Any, Self

from torch import nn
from transformers import LlavaForConditionalGeneration
from transformers.modeling_layers import GradientCheckpointingLayer

from ..objectives import Objective, Widths
from .pathway import features_width
from .picture_views import check_attention
from .switch import check_pair


class StudentTeacher(nn.Module):
    """The models that an objective asks for; `student` and the objective's `adapters` are trained.

    The teacher is frozen and always in eval mode, and is left out of `state_dict()`. Adapters lead from one model to
    the other and are of no use without the teacher: they belong to a checkpoint to resume from, not to the result.
    """

    def __init__(
        self,
        student: LlavaForConditionalGeneration,
        teacher: LlavaForConditionalGeneration | None,
        objective: Objective,
    ) -> None:
        super().__init__()
        if objective.needs_teacher and teacher is None:
            raise ValueError(f"the objective {type(objective).__name__} compares with a teacher, and there is none")
        self.student = student
        # A teacher that the objective does not ask for would only hold memory.
        self.teacher = teacher if objective.needs_teacher else None
        self.objective = objective
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
            if objective.needs_attention:
                for model in (student, self.teacher):
                    check_attention(model)
            self.teacher.requires_grad_(False).eval()
            if "encoder" in self.adapters and not self.encoder_trains():
                self.adapters["encoder"].requires_grad_(False)  # the switch pass will not be run
        self._recomputed: list[nn.Module] = []
        self.register_state_dict_post_hook(_leave_out_teacher)
        self.register_load_state_dict_post_hook(_expect_what_trains)

    def train(self, mode: bool = True) -> Self:
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

    def encoder_trains(self) -> bool:
        """Whether the student's vision encoder takes gradients."""
        return any(parameter.requires_grad for parameter in self.student.model.vision_tower.parameters())

    def must_see(self) -> bool:
        """Whether a batch of text alone must run what pictures run, so that all ranks do the same.

        DDP and ZeRO exchange gradients parameter by parameter: a rank without one for its encoder keeps the others
        waiting. One process does it too, since AdamW moves a parameter with a gradient of 0 and skips one with none.
        """
        sight = (self.student.model.vision_tower, self.student.model.multi_modal_projector, self.adapters)
        learns = any(parameter.requires_grad for part in sight for parameter in part.parameters())
        return self.training and (learns or self.is_partitioned())

    def is_partitioned(self) -> bool:
        """Whether ZeRO-3 holds the weights: it gathers them module by module, so all ranks must run the same ones."""
        return hasattr(self.student.lm_head.weight, "ds_id")


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
