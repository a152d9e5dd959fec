"""A LLaVA checkpoint to ONNX graphs: each graph is described with Optimum's exporter framework and traced by torch.

Shapes in names: B batch, C channels, H height, W width, N visual tokens, D hidden size, T new tokens, S past + new
tokens, K key-value heads, E size of a head, V vocabulary.
"""

import inspect
import logging
import warnings
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch
from optimum.exporters.base import ExporterConfig
from optimum.utils import (
    DummyInputGenerator,
    DummyTextInputGenerator,
    DummyVisionInputGenerator,
    NormalizedTextConfig,
    NormalizedTextConfigWithGQA,
    NormalizedVisionConfig,
)
from torch import nn
from transformers import DynamicCache, LlavaForConditionalGeneration, PreTrainedConfig

from ..contract.bundle import (
    DECODER,
    EMBED_TOKENS,
    NUM_LOGITS_TO_KEEP,
    PORTABLE,
    VISION_ENCODER,
    ModelFacts,
    TensorSpec,
    portable_tensors,
)
from .onnx_graph import Storage, unload
from .parts import name_by_part

OPSET = 20  # the newest that browsers' and phones' ONNX Runtime all know
TASK = "image-text-to-text"
# What a model's forward calls its cache: transformers 5.24 has renamed it, and warns of the former name.
CACHE = "cache" if "cache" in inspect.signature(LlavaForConditionalGeneration.forward).parameters else "past_key_values"


class ExportError(ValueError):
    """A checkpoint that cannot be exported, or a place that cannot be written to."""


class GraphDescription(ExporterConfig):  # type: ignore[misc]  # optimum carries no types
    """What one graph is: its name, form, inputs and outputs with their free axes, and how it is written."""

    name: str
    form: str
    stem = ""  # of its files' names where the graph's name is another form's

    def __init__(self, config: PreTrainedConfig, facts: ModelFacts) -> None:
        super().__init__(config, task=TASK)
        self.facts = facts

    def tensors(self, cache_dtype: str = "float32") -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
        """What the contract says goes in and out."""
        return portable_tensors(self.name, self.facts, cache_dtype)

    @property
    def inputs(self) -> dict[str, dict[int, str]]:
        """Input names in the graph's order, each with the names of its free axes."""
        return _free_axes(self.tensors()[0])

    @property
    def outputs(self) -> dict[str, dict[int, str]]:
        """Output names in the graph's order, each with the names of its free axes."""
        return _free_axes(self.tensors()[1])

    @abstractmethod
    def write(self, model: LlavaForConditionalGeneration, path: Path) -> None:
        """Write the graph of `model` in float32 to `path`, its weights beside it."""


def _free_axes(tensors: tuple[TensorSpec, ...]) -> dict[str, dict[int, str]]:
    return {
        tensor.name: {axis: size for axis, size in enumerate(tensor.shape) if isinstance(size, str)}
        for tensor in tensors
    }


class TracedGraph(GraphDescription):
    """A graph in plain operators, traced by torch from a small module around the model's own parts."""

    form = PORTABLE

    @abstractmethod
    def module(self, model: LlavaForConditionalGeneration) -> nn.Module:
        """The part of the model that becomes the graph."""

    def example(self) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """Arguments to trace with, and their free axes in the same structure."""
        with torch.random.fork_rng():
            dummies = self.generate_dummy_inputs()
        return tuple(dummies.values()), tuple(self.inputs[name] for name in dummies)

    def write(self, model: LlavaForConditionalGeneration, path: Path) -> None:
        """Trace, tidy and save the graph; weights go from the model's own memory to the file."""
        arguments, free_axes = self.example()
        with quiet():
            program = torch.onnx.export(
                self.module(model).eval(),
                arguments,
                dynamo=True,
                opset_version=OPSET,
                input_names=list(self.inputs),
                output_names=list(self.outputs),
                dynamic_shapes=free_axes,
                verbose=False,
            )
        assert program is not None
        unload(program.model, path, Storage().part_bytes)
        proto = ir.to_proto(program.model)
        self._tidy(proto)
        onnx.save_model(proto, path)

    def _tidy(self, proto: onnx.ModelProto) -> None:
        """Name the free axes as described, and leave out traces of this machine."""
        described = self.inputs | self.outputs
        for value in [*proto.graph.input, *proto.graph.output]:
            for axis, name in described[value.name].items():
                dim = value.type.tensor_type.shape.dim[axis]
                if dim.HasField("dim_param"):  # a number there means that tracing froze the axis: verification's case
                    dim.dim_param = name
        for node in proto.graph.node:
            name_by_part(self.name, node)
        # torch notes source paths and stack traces at every node: megabytes, private, and another hash each time.
        for annotated in [*proto.graph.node, *proto.graph.input, *proto.graph.output, *proto.graph.initializer]:
            del annotated.metadata_props[:]
        del proto.graph.value_info[:]
        del proto.graph.metadata_props[:]
        del proto.metadata_props[:]


class VisionEncoderModule(nn.Module):
    """Vision tower, feature selection and projector in one."""

    def __init__(self, model: LlavaForConditionalGeneration) -> None:
        super().__init__()
        self.vision_tower = model.model.vision_tower
        self.projector = model.model.multi_modal_projector
        layers = model.config.vision_feature_layer
        self.layers: list[int] = [layers] if isinstance(layers, int) else list(layers)
        self.first_token = 1 if model.config.vision_feature_select_strategy == "default" else 0

    def forward(self, pixel_values_BCHW: torch.Tensor) -> torch.Tensor:
        """Pixels to features_BND; what lies behind the chosen layers is traced, found unused and left out."""
        hidden = self.vision_tower(pixel_values_BCHW, output_hidden_states=True, return_dict=True).hidden_states
        chosen_BND = torch.cat([hidden[layer][:, self.first_token :] for layer in self.layers], dim=-1)
        features_BND: torch.Tensor = self.projector(chosen_BND)
        return features_BND


class VisionEncoder(TracedGraph):
    """pixel_values [B, 3, H, W] -> image_features [B, N, D], as wide as the language model."""

    name = VISION_ENCODER
    NORMALIZED_CONFIG_CLASS = NormalizedVisionConfig
    DUMMY_INPUT_GENERATOR_CLASSES = (DummyVisionInputGenerator,)

    def module(self, model: LlavaForConditionalGeneration) -> nn.Module:
        """Vision tower and projector."""
        return VisionEncoderModule(model)


class EmbedTokens(TracedGraph):
    """input_ids [B, T] -> inputs_embeds [B, T, D]."""

    name = EMBED_TOKENS
    NORMALIZED_CONFIG_CLASS = NormalizedTextConfig
    DUMMY_INPUT_GENERATOR_CLASSES = (DummyTextInputGenerator,)

    def module(self, model: LlavaForConditionalGeneration) -> nn.Module:
        """The language model's own embedding."""
        return model.get_input_embeddings()


class DecoderModule(nn.Module):
    """Language model and head, with the KV cache as plain tensors."""

    def __init__(self, model: LlavaForConditionalGeneration) -> None:
        super().__init__()
        self.language_model = model.model.language_model
        self.lm_head = model.lm_head

    def forward(
        self,
        inputs_embeds_BTD: torch.Tensor,
        attention_mask_BS: torch.Tensor,
        position_ids_BT: torch.Tensor,
        num_logits_to_keep: torch.Tensor,
        past_BKPE: list[tuple[torch.Tensor, torch.Tensor]],
    ) -> tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]:
        """New tokens after a cache of P: logits of the last of them (0: of all), and the cache grown to S = P + T."""
        cache = DynamicCache()
        for layer, (key_BKPE, value_BKPE) in enumerate(past_BKPE):
            cache.update(key_BKPE, value_BKPE, layer)
        # The mask is built here, not by the model: its own code chooses by the example's mask and cache, and the
        # choice would be frozen into the graph. The smallest number, not -inf: a padded row would become NaN.
        new, total = inputs_embeds_BTD.shape[1], attention_mask_BS.shape[1]
        query_T = torch.arange(new) + (total - new)
        causal_TS = torch.arange(total)[None, :] <= query_T[:, None]
        allowed_BTS = causal_TS[None] & (attention_mask_BS[:, None, :] > 0)
        mask_B1TS = torch.where(allowed_BTS[:, None], 0.0, torch.finfo(inputs_embeds_BTD.dtype).min)
        output = self.language_model(
            inputs_embeds=inputs_embeds_BTD,
            attention_mask=mask_B1TS,
            position_ids=position_ids_BT,
            use_cache=True,
            **{CACHE: cache},
        )
        layers: list[Any] = cache.layers
        present_BKSE = [(layer.keys, layer.values) for layer in layers]
        return self.lm_head(_last(output.last_hidden_state, num_logits_to_keep)), present_BKSE


def _last(hidden_BTD: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """The last `count` of T places, all for 0.

    A node by name: torch traces no slice whose size is a tensor's number. It takes the result to be of the size T.
    """
    bounds = (-count.reshape(1), torch.tensor([torch.iinfo(torch.int64).max]), torch.tensor([1]))  # start, end, axis
    return torch.onnx.ops.symbolic("Slice", (hidden_BTD, *bounds), dtype=hidden_BTD.dtype, shape=hidden_BTD.shape)


class DecoderInputs(DummyInputGenerator):  # type: ignore[misc]  # optimum carries no types
    """Example inputs of a decoder with a filled cache, in Optimum's manner; sizes of 2 and up keep axes free."""

    SUPPORTED_INPUT_NAMES = (
        "inputs_embeds",
        "attention_mask",
        "position_ids",
        NUM_LOGITS_TO_KEEP,
        "past_key_values",
    )

    def __init__(self, task: str, normalized_config: NormalizedTextConfigWithGQA, **_: Any) -> None:
        self.task = task
        self.batch, self.new, self.past = 2, 5, 7
        self.hidden_size = normalized_config.hidden_size
        heads = normalized_config.num_attention_heads
        self.cache = (
            self.batch,
            normalized_config.num_key_value_heads,
            self.past,
            normalized_config.head_dim if normalized_config.has_attribute("head_dim") else self.hidden_size // heads,
        )

    def generate(
        self, input_name: str, framework: str = "pt", int_dtype: str = "int64", float_dtype: str = "fp32"
    ) -> Any:
        """One tensor for the input of this name."""
        if input_name == "inputs_embeds":
            shape = (self.batch, self.new, self.hidden_size)
            return self.random_float_tensor(shape, framework=framework, dtype=float_dtype)
        if input_name == "attention_mask":
            return self.constant_tensor((self.batch, self.past + self.new), framework=framework, dtype=torch.int64)
        if input_name == "position_ids":
            return self.random_int_tensor((self.batch, self.new), self.past, framework=framework, dtype=int_dtype)
        if input_name == NUM_LOGITS_TO_KEEP:
            return self.constant_tensor([], value=0, framework=framework, dtype=torch.int64)
        return self.random_float_tensor(self.cache, framework=framework, dtype=float_dtype)


class PortableDecoder(TracedGraph):
    """inputs_embeds, attention_mask, position_ids, num_logits_to_keep, past_key_values.* -> logits, present.*

    Right for an empty cache, for a prompt in pieces, and for a batch with padding on either side.
    """

    name = DECODER
    NORMALIZED_CONFIG_CLASS = NormalizedTextConfigWithGQA
    DUMMY_INPUT_GENERATOR_CLASSES = (DecoderInputs,)

    def module(self, model: LlavaForConditionalGeneration) -> nn.Module:
        """Language model and head."""
        return DecoderModule(model)

    def example(self) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """The cache tensors are handed over as one list of (key, value)."""
        arguments, free_axes = super().example()
        plain = len(arguments) - 2 * self.facts.cache.layers
        return (*arguments[:plain], _pairs(arguments[plain:])), (*free_axes[:plain], _pairs(free_axes[plain:]))


def _pairs(values: tuple[Any, ...]) -> list[tuple[Any, Any]]:
    return list(zip(values[::2], values[1::2], strict=True))


@contextmanager
def quiet() -> Iterator[None]:
    """Hold back what torch and ONNX Runtime's tools say about their own insides while they work."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
