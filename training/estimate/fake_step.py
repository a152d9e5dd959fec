"""A training step that takes no memory: how many bytes its tensors would hold at once, and how many FLOPs it takes.

The real modules run on torch's fake tensors, which have shapes and no numbers. Only what looks at logits cannot: how
many tokens an objective compares depends on them. So the objective is run on a few real positions, and what it took
there stands in for it.

Shapes: B rows, T tokens of a row, P pictures, N positions, V vocabulary.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlavaConfig

from switchkd.export.llava.projectors import tokens_per_picture

from ..models.alignment import IGNORED
from ..models.distillation import Distillation
from ..models.vlm import train_only
from ..objectives import Objective, Positions, Terms
from ..recipe.model_sizes import build_without_memory

ACTIVATIONS, LOGITS, GRADIENTS, BACKWARD = "activations", "logits and objective", "gradients", "working memory"
# Of the objective's trial on real logits: enough for its bytes to be in proportion, few enough to be quick.
TRIAL_LOGITS, TRIAL_POSITIONS = 2**23, 256
SHALLOW = 2  # layers of a stack whose FLOPs are counted


@dataclass(frozen=True)
class Arrangement:
    """How a stage holds its models: what trains, in which dtypes, with what recomputed and what kept.

    `autocast` is the dtype that torch's autocast computes in, with weights in another (None: no autocast).
    `keeps_gradients` is false where ZeRO takes each gradient away as soon as it is made.
    """

    train: tuple[str, ...]
    student_dtype: torch.dtype
    teacher_dtype: torch.dtype
    autocast: torch.dtype | None
    checkpointing: bool
    accumulates: bool
    keeps_gradients: bool


@dataclass(frozen=True)
class Batch:
    """A micro-batch: `rows` of one picture and `text` tokens each, of which `supervised` are to be learned."""

    rows: int
    text: int
    supervised: int


class StorageTracker(TorchDispatchMode):
    """Counts the bytes of the storages that torch's operations make, by the part named at the time, and their peak.

    torch's own MemTracker does this too, but refuses modules with frozen parameters.
    """

    def __init__(self) -> None:
        super().__init__()
        self.held: Counter[str] = Counter()
        self.total = self.peak = 0
        self.at_peak: dict[str, int] = {}
        self._part = ACTIVATIONS
        self._storages: dict[int, tuple[str, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self.count(value)
        return result

    def know(self, tensors: Iterator[Tensor]) -> None:
        """Leave tensors out of the count: weights, and whatever else was there before."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._storages[storage._cdata] = ("", 0)
            weakref.finalize(storage, self._storages.pop, storage._cdata, None)

    def count(self, tensor: Tensor, part: str | None = None) -> None:
        """Count a tensor's storage, or put one that is counted to another part."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._storages:
            if part is None or self._storages[key][0] == part:
                return
            self._forget(key)
        else:
            weakref.finalize(storage, self._forget, key)
        part, size = part or self._part, storage.nbytes()
        self._storages[key] = (part, size)
        self.held[part] += size
        self.total += size
        if self.total > self.peak:
            self.peak, self.at_peak = self.total, dict(self.held)

    def _forget(self, key: int) -> None:
        part, size = self._storages.pop(key)
        self.held[part] -= size
        self.total -= size

    @contextlib.contextmanager
    def counting_as(self, part: str) -> Iterator[None]:
        """Count what is made meanwhile as this part."""
        before, self._part = self._part, part
        try:
            yield
        finally:
            self._part = before


def step_bytes(
    student: LlavaConfig, teacher: LlavaConfig | None, objective: Objective, how: Arrangement, batch: Batch
) -> dict[str, int]:
    """Bytes of a micro-batch's tensors by part when most are held; weights and optimizer are left out.

    A forward and a backward of the real `Distillation` are run on fake tensors. Raises ModelError, ValueError.
    """
    tracker = StorageTracker()
    fake, module = _fake_module(tracker, student, teacher, objective, how)
    tracker.know(iter([*module.parameters(), *module.buffers()]))
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(_after_gradient(tracker, how.keeps_gradients))
            if how.accumulates and how.keeps_gradients:  # of the micro-batches before
                parameter.grad = torch.empty_like(parameter)
                tracker.count(parameter.grad, GRADIENTS)
    inputs = _fake_batch(fake, module, batch)
    for tensor in inputs.values():
        tracker.count(tensor)
    _run(fake, module, inputs, how, tracker)
    return tracker.at_peak


def step_flops(
    student: LlavaConfig, teacher: LlavaConfig | None, objective: Objective, how: Arrangement, batch: Batch
) -> float:
    """FLOPs of a micro-batch, what checkpointing computes again included. Raises ModelError, ValueError.

    Layers of a stack are alike, so models of two layers and of one more in each stack tell all that are to come.
    """
    configs = [config for config in (student, teacher) if config is not None]
    stacks: list[Any] = [part for config in configs for part in (config.vision_config, config.text_config)]
    depths = [stack.num_hidden_layers for stack in stacks]
    few = [min(SHALLOW, depth) for depth in depths]
    for place, config in enumerate(configs):
        if config.vision_feature_layer not in (-1, -2):  # a layer that a shallow encoder may not have
            few[2 * place] = depths[2 * place]

    def of(layers: list[int]) -> float:
        shallow = [_at_depth(config, *layers[2 * i : 2 * i + 2]) for i, config in enumerate(configs)]
        return _counted_flops(shallow, objective, how, batch)

    flops = least = of(few)
    for place, depth in enumerate(depths):
        if depth > few[place]:
            one_more = [layers + (place == at) for at, layers in enumerate(few)]
            flops += (of(one_more) - least) * (depth - few[place])
    return flops


def _at_depth(config: LlavaConfig, vision: int, text: int) -> LlavaConfig:
    shallow: Any = copy.deepcopy(config)
    shallow.vision_config.num_hidden_layers = vision
    shallow.text_config.num_hidden_layers = text
    if getattr(shallow.text_config, "layer_types", None) is not None:
        shallow.text_config.layer_types = shallow.text_config.layer_types[:text]
    return shallow  # type: ignore[no-any-return]


def _counted_flops(configs: list[LlavaConfig], objective: Objective, how: Arrangement, batch: Batch) -> float:
    student, teacher = configs[0], configs[1] if len(configs) > 1 else None
    fake, module = _fake_module(StorageTracker(), student, teacher, objective, how)
    # Apart from the bytes: torch's counter keeps what a checkpoint recomputes until garbage is collected.
    counter = FlopCounterMode(display=False)
    _run(fake, module, _fake_batch(fake, module, batch), how, counter)
    return float(counter.get_total_flops())


def _run(fake: FakeTensorMode, module: Distillation, inputs: dict[str, Tensor], how: Arrangement, counter: Any) -> None:
    casts = torch.autocast("cpu", dtype=how.autocast) if how.autocast else contextlib.nullcontext()
    in_backward = counter.counting_as(BACKWARD) if isinstance(counter, StorageTracker) else contextlib.nullcontext()
    with _KnownMasks(fake), counter:
        with casts:
            loss = module(**inputs)["loss"]
        with in_backward:
            loss.backward()


def _after_gradient(tracker: StorageTracker, keeps: bool) -> Callable[[Tensor], None]:
    def made(parameter: Tensor) -> None:
        assert parameter.grad is not None
        if keeps:
            tracker.count(parameter.grad, GRADIENTS)
        else:
            parameter.grad = None

    return made


def _fake_module(
    tracker: StorageTracker,
    student: LlavaConfig,
    teacher: LlavaConfig | None,
    objective: Objective,
    how: Arrangement,
) -> tuple[FakeTensorMode, Distillation]:
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    models = [build_without_memory(student, how.student_dtype)]
    train_only(models[0], how.train)
    if objective.needs_teacher:
        assert teacher is not None
        models.append(build_without_memory(teacher, how.teacher_dtype))
    # Both are given the same ids; which id it is changes no size.
    image_token = min(model.lm_head.out_features for model in models) - 1
    for model in models:
        model.config.image_token_index = model.config.image_token_id = image_token
    with torch.device("meta"):
        module = _FakeDistillation(tracker, models[0], models[1] if len(models) > 1 else None, objective)
    module.try_objective(how.autocast)
    with fake:
        module.to_empty(device="cpu")
    for model in models:
        model.tie_weights()
    module.train()
    if how.checkpointing:
        module.activation_checkpointing_enable()
    return fake, module


def _fake_batch(fake: FakeTensorMode, module: Distillation, batch: Batch) -> dict[str, Tensor]:
    """Ids, mask and labels are real, so that what follows from them can be told; pixels are not."""
    config: Any = module.student.config
    visual, vision = tokens_per_picture(config), config.vision_config
    ids_BT = torch.zeros(batch.rows, visual + batch.text, dtype=torch.long)
    ids_BT[:, :visual] = config.image_token_index
    labels_BT = torch.full_like(ids_BT, IGNORED)
    labels_BT[:, ids_BT.shape[1] - batch.supervised :] = 0
    mask_BT = torch.ones_like(ids_BT)
    if batch.rows > 1:
        mask_BT[-1, -1] = 0  # some row is shorter: attention then needs a mask, which is larger than none
    with fake:
        pixels_PCHW = torch.empty(batch.rows, vision.num_channels, vision.image_size, vision.image_size)
    return {"input_ids": ids_BT, "attention_mask": mask_BT, "labels": labels_BT, "pixel_values": pixels_PCHW}


class _KnownMasks(TorchFunctionMode):
    """Lets real masks meet fake tensors: what one selects is told from its numbers, and an attention mask is faked."""

    def __init__(self, fake: FakeTensorMode) -> None:
        super().__init__()
        self._fake = fake

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.__getitem__ and isinstance(args[1], Tensor) and args[1].dtype == torch.bool:
            args = (args[0], args[1].nonzero(as_tuple=True))
        if func is scaled_dot_product_attention and isinstance(kwargs.get("attn_mask"), Tensor):
            kwargs = kwargs | {"attn_mask": self._fake.from_tensor(kwargs["attn_mask"])}
        return func(*args, **kwargs)


class _FakeDistillation(Distillation):
    """Distillation whose objective at text positions is stood in for by the memory it takes."""

    def __init__(self, tracker: StorageTracker, student: Any, teacher: Any, objective: Objective) -> None:
        super().__init__(student, teacher, objective)
        self._tracker = tracker

    def try_objective(self, dtype: torch.dtype | None) -> None:
        """Find out what the objective holds for logits of that dtype (None: that of the models)."""
        heads: list[Any] = [self.student.lm_head, None, None]
        if self.teacher is not None:
            heads[1:] = [self.teacher.lm_head, self.teacher.lm_head if self._runs_switch() else None]
        given = tuple(None if head is None else (head.out_features, dtype or head.weight.dtype) for head in heads)
        self._holds = _trial(self.objective, given, self.chunk_positions)

    def _at_positions(
        self, labels_N: Tensor, student_ND: Tensor, teacher_ND: Tensor | None, switch_MD: Tensor | None
    ) -> Terms:
        with self._tracker.counting_as(LOGITS):
            said = self._logits(labels_N, student_ND, teacher_ND, switch_MD)
            return {"loss": _StandIn.apply(self._holds, said.student_NV, said.teacher_NV, said.switch_MV)}

    def _at_visual_positions(self, student_ND: Tensor, teacher_ND: Tensor, weight_N: Tensor) -> Terms:
        with self._tracker.counting_as(LOGITS):
            return super()._at_visual_positions(student_ND, teacher_ND, weight_N)


@dataclass(frozen=True)
class _Holds:
    """Bytes a position that an objective holds beside its logits: in its forward, after it, and in its backward.

    `lets_go` says of each model's logits whether the objective needs them no more after its forward.
    """

    forward: float
    after: float
    backward: float
    lets_go: tuple[bool, ...]


@functools.cache
def _trial(objective: Objective, given: tuple[tuple[int, torch.dtype] | None, ...], most: int) -> _Holds:
    """Run an objective on random logits of these vocabularies and dtypes, and count what it holds."""
    rows = max(1, min(most, TRIAL_POSITIONS, TRIAL_LOGITS // max(size for size, _ in filter(None, given))))
    student, *teachers = (None if z is None else torch.randn(rows, z[0], dtype=z[1]) for z in given)
    assert student is not None
    leaves = [student.requires_grad_(), *teachers]
    if teachers[1] is not None:
        teachers[1].requires_grad_()
    # Copies, since the graph holds a leaf even where the objective lets it go.
    logits: list[Any] = [None if leaf is None else leaf.clone() for leaf in leaves]
    alive = [None if z_NV is None else weakref.ref(z_NV.untyped_storage()) for z_NV in logits]
    tracker = StorageTracker()
    tracker.know(z_NV for z_NV in logits if z_NV is not None)
    with tracker:
        loss = objective(Positions(torch.zeros(rows, dtype=torch.long), *logits))["loss"]
    del logits
    lets_go = tuple(ref is None or ref() is None for ref in alive)
    forward, after = tracker.peak, tracker.total
    tracker.peak = tracker.total
    with tracker:
        loss.backward()
    return _Holds(forward / rows, after / rows, tracker.peak / rows, lets_go)


class _StandIn(torch.autograd.Function):
    """Holds beside its logits what an objective does, for as long; gives a loss of 0."""

    @staticmethod
    def forward(ctx: Any, holds: _Holds, *logits: Tensor | None) -> Tensor:
        student_NV = logits[0]
        assert student_NV is not None
        ctx.holds, ctx.positions = holds, len(student_NV)
        _bytes(student_NV, holds.forward * ctx.positions)
        held = _bytes(student_NV, holds.after * ctx.positions)
        kept = [z_NV for z_NV, gone in zip(logits, holds.lets_go, strict=True) if z_NV is not None and not gone]
        ctx.save_for_backward(held, *kept)
        ctx.given = [None if z_NV is None else (z_NV.shape, z_NV.dtype) for z_NV in logits]
        return student_NV.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_upstream: Tensor) -> tuple[Tensor | None, ...]:
        held = ctx.saved_tensors[0]
        grads = [
            held.new_empty(given[0], dtype=given[1]) if given and needed else None
            for given, needed in zip(ctx.given, ctx.needs_input_grad[1:], strict=True)
        ]
        most = ctx.holds.backward * ctx.positions
        _bytes(held, most - held.nbytes - sum(grad.nbytes for grad in grads if grad is not None))
        return None, *grads


def _bytes(like: Tensor, count: float) -> Tensor:
    return like.new_empty(max(0, int(count)), dtype=torch.uint8)
