"""The decoder in ONNX Runtime's fused operators, built from the model's own weights; nothing is traced.

A layer is twelve nodes: attention with its rotary angles and its KV cache is one of them, queries, keys and values
come out of one product, and a sum with the normalisation after it is one.

Shapes in names: B batch, T new tokens, R the last of them, S past + new tokens, P positions, D hidden size, E size of a
head, I and O a product's inputs and outputs, V vocabulary.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import torch
from optimum.utils import NormalizedTextConfigWithGQA
from transformers import LlavaForConditionalGeneration, PreTrainedConfig

from ..contract.bundle import DECODER, FUSED, ModelFacts, TensorSpec, fused_tensors
from .onnx_graph import Storage, unload
from .tracing import OPSET, ExportError, GraphDescription

MICROSOFT = "com.microsoft"
IR_VERSION = 10  # onnx 1.16's, which goes with the opset
# Angles that depend on the position alone. Others change with the length of the prompt; a table cannot hold those.
ROTARY_TYPES = ("default", "linear", "llama3", "yarn")

Floats = npt.NDArray[np.float32]


class FusedDecoder(GraphDescription):
    """inputs_embeds, attention_mask, num_logits_to_keep, past_key_values.* -> logits, present.*

    Right for one prompt, whole or in pieces, and for a batch with padding on the right of which one token at a time
    follows. Wrong for padding on the left; onnxruntime refuses more tokens at once after a batch's past. Raises
    ExportError for a language model that the operators would compute wrongly.
    """

    name = DECODER
    form = FUSED
    NORMALIZED_CONFIG_CLASS = NormalizedTextConfigWithGQA

    def __init__(self, config: PreTrainedConfig, facts: ModelFacts) -> None:
        super().__init__(config, facts)
        _check(config, facts.cache.head_dim)

    def tensors(self, cache_dtype: str = "float32") -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
        """What the contract says goes in and out."""
        return fused_tensors(self.facts, cache_dtype)

    def write(self, model: LlavaForConditionalGeneration, path: Path) -> None:
        """Write the graph in float32; a weight is turned over when it goes to the file, and no earlier."""
        with torch.no_grad():
            graph = _build(model, *self.tensors())
            unload(graph, path, Storage().part_bytes)
        onnx.save_model(ir.to_proto(graph), path)


def _check(config: Any, head_dim: int) -> None:
    rotary = config.rope_parameters.get("rope_type", "default")
    portion = config.rope_parameters.get("partial_rotary_factor", 1.0)
    for wrong, reason in (
        (rotary not in ROTARY_TYPES, f"rope_type is {rotary!r}, known are {', '.join(ROTARY_TYPES)}"),
        (portion != 1.0, f"partial_rotary_factor is {portion}, expected 1"),
        (config.hidden_act != "silu", f"hidden_act is {config.hidden_act!r}, expected 'silu'"),
        (head_dim % 16 != 0, f"a head has {head_dim} numbers, expected a multiple of 16"),
    ):
        if wrong:
            raise ExportError(f"this language model has no fused decoder: {reason}; use `--decoder portable`")


class _Nodes:
    """A graph's nodes and weights as they are put down; a node and what comes out of it have the same name."""

    def __init__(self) -> None:
        self.tape = ir.tape.Tape()

    def op(
        self,
        name: str,
        op_type: str,
        *inputs: ir.Value | None,
        domain: str = "",
        output: ir.Value | None = None,
        **attributes: float | list[int],
    ) -> ir.Value:
        """One node with one output."""
        value = self.tape.op(op_type, inputs, attributes, domain=domain, name=name, output=output)
        value.name = value.name or name
        return value

    def constant(self, name: str, values: npt.NDArray[Any]) -> ir.Value:
        """A small tensor."""
        return self.tape.initializer(ir.Tensor(values, name=name))

    def linear(self, name: str, hidden_BTI: ir.Value, *layers: Any, output: ir.Value | None = None) -> ir.Value:
        """The product with the weights of one or more nn.Linear side by side, and their biases if they have any."""
        biased = any(layer.bias is not None for layer in layers)
        width_O = sum(layer.out_features for layer in layers)
        weight_IO = self.tape.initializer(
            ir.LazyTensor(
                _side_by_side(layers),
                dtype=ir.DataType.FLOAT,
                shape=ir.Shape([layers[0].in_features, width_O]),
                name=f"{name}.weight",
            )
        )
        if not biased:
            return self.op(name, "MatMul", hidden_BTI, weight_IO, output=output)
        biases = [layer.weight.new_zeros(layer.out_features) if layer.bias is None else layer.bias for layer in layers]
        product_BTO = self.op(f"{name}.product", "MatMul", hidden_BTI, weight_IO)
        bias_O = self.constant(f"{name}.bias", torch.cat(biases).float().numpy())
        return self.op(name, "Add", product_BTO, bias_O, output=output)

    def normalized_sum(self, name: str, a_BTD: ir.Value, b_BTD: ir.Value, norm: Any) -> tuple[ir.Value, ir.Value]:
        """The root-mean-square normalisation of a sum, and the sum."""
        outputs = [ir.Value(name=name), ir.Value(name=""), ir.Value(name=""), ir.Value(name=f"{name}.sum")]
        self.tape.op_multi_out(
            "SkipSimplifiedLayerNormalization",
            [a_BTD, b_BTD, self.gain(name, norm)],
            {"epsilon": float(norm.variance_epsilon)},
            outputs=outputs,
            domain=MICROSOFT,
            name=name,
        )
        return outputs[0], outputs[3]

    def gain(self, name: str, norm: Any) -> ir.Value:
        """The weight of a normalisation."""
        return self.constant(f"{name}.weight", norm.weight.float().numpy())


def _side_by_side(layers: tuple[Any, ...]) -> Callable[[], ir.TensorProtocol]:
    """Reads the weights [out, in] of nn.Linear layers as one matrix [in, out], at the moment when it is written."""

    def read() -> ir.TensorProtocol:
        width_O = sum(layer.out_features for layer in layers)
        whole_IO: Floats = np.empty((layers[0].in_features, width_O), dtype=np.float32)
        start = 0
        for layer in layers:
            whole_IO[:, start : start + layer.out_features] = layer.weight.detach().float().numpy().T
            start += layer.out_features
        return ir.Tensor(whole_IO)

    return read


def _build(
    model: LlavaForConditionalGeneration, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]
) -> ir.Model:
    given, results = [_value(spec) for spec in inputs], [_value(spec) for spec in outputs]
    language_model: Any = model.model.language_model
    nodes = _Nodes()
    embeds_BTD, mask_BS, keep, *past = given
    logits_BRV, *present = results
    shared = [*_lengths(nodes, mask_BS), *_angles(nodes, language_model)]
    bounds = _last(nodes, keep)
    residual_BTD, branch_BTD = embeds_BTD, None
    for number, layer in enumerate(language_model.layers):
        name, cache = f"layers.{number}", slice(2 * number, 2 * number + 2)
        norm = layer.input_layernorm
        if branch_BTD is None:
            normed_BTD = nodes.op(
                f"{name}.input_norm",
                "SimplifiedLayerNormalization",
                embeds_BTD,
                nodes.gain(f"{name}.input_norm", norm),
                epsilon=float(norm.variance_epsilon),
                axis=-1,
                stash_type=1,
            )
        else:
            normed_BTD, residual_BTD = nodes.normalized_sum(f"{name}.input_norm", residual_BTD, branch_BTD, norm)
        mixed_BTD = _attention(
            nodes, f"{name}.attention", layer.self_attn, normed_BTD, past[cache], present[cache], shared
        )
        if number == len(language_model.layers) - 1:  # what follows looks at one place at a time
            mixed_BTD = nodes.op("kept", "Slice", mixed_BTD, *bounds)
            residual_BTD = nodes.op("kept_residual", "Slice", residual_BTD, *bounds)
        mixed_BTD = nodes.linear(f"{name}.attention.output", mixed_BTD, layer.self_attn.o_proj)
        norm = layer.post_attention_layernorm
        normed_BTD, residual_BTD = nodes.normalized_sum(f"{name}.middle_norm", residual_BTD, mixed_BTD, norm)
        branch_BTD = _feed_forward(nodes, f"{name}.mlp", layer.mlp, normed_BTD)
    assert branch_BTD is not None
    normed_BTD, _ = nodes.normalized_sum("norm", residual_BTD, branch_BTD, language_model.norm)
    nodes.linear("lm_head", normed_BTD, model.lm_head, output=logits_BRV)
    return ir.Model(
        ir.Graph(
            given,
            results,
            nodes=nodes.tape.nodes,
            initializers=nodes.tape.initializers,
            opset_imports={"": OPSET, MICROSOFT: 1},
            name="main_graph",
        ),
        ir_version=IR_VERSION,
    )


def _value(spec: TensorSpec) -> ir.Value:
    dtype = ir.TensorType(ir.DataType.from_numpy(np.dtype(spec.dtype)))
    return ir.Value(name=spec.name, type=dtype, shape=ir.Shape(spec.shape))


def _last(nodes: _Nodes, count: ir.Value) -> list[ir.Value]:
    """Start, end and axis of a Slice that leaves the last `count` of T places, all for 0."""
    axis = nodes.constant("axis_of_time", np.array([1], dtype=np.int64))
    end = nodes.constant("end_of_time", np.array([np.iinfo(np.int64).max]))
    shape = nodes.constant("shape_of_bound", np.array([1], dtype=np.int64))
    return [nodes.op("first_kept", "Reshape", nodes.op("minus_kept", "Neg", count), shape), end, axis]


def _lengths(nodes: _Nodes, mask_BS: ir.Value) -> tuple[ir.Value, ir.Value]:
    """What GroupQueryAttention asks of the mask: tokens of every row less one, and positions in all (both int32)."""
    one = nodes.constant("one", np.array([1], dtype=np.int64))
    counts_B = nodes.op("tokens", "ReduceSum", mask_BS, one, keepdims=0)
    last_B = nodes.op("last_token", "Sub", counts_B, one)
    total_1 = nodes.op("positions", "Shape", mask_BS, start=1, end=2)
    int32 = ir.DataType.INT32.value
    return nodes.op("seqlens_k", "Cast", last_B, to=int32), nodes.op("total_length", "Cast", total_1, to=int32)


def _angles(nodes: _Nodes, language_model: Any) -> tuple[ir.Value, ir.Value]:
    """Cosines and sines [P, E/2] of every position, from the model's own rotary embedding, scaling included."""
    positions_1P = torch.arange(language_model.config.max_position_embeddings)[None]
    cos_1PE, sin_1PE = language_model.rotary_emb(torch.zeros(1), positions_1P)
    half = cos_1PE.shape[-1] // 2  # the other half repeats it
    cos_PE, sin_PE = (table[0, :, :half].contiguous().numpy() for table in (cos_1PE, sin_1PE))
    return nodes.constant("cos_cache", cos_PE), nodes.constant("sin_cache", sin_PE)


def _attention(
    nodes: _Nodes,
    name: str,
    attention: Any,
    normed_BTD: ir.Value,
    past: list[ir.Value],
    present: list[ir.Value],
    shared: list[ir.Value],
) -> ir.Value:
    """Self-attention of one layer but its last product; `shared` holds lengths and angles, in the operator's order."""
    config = attention.config
    packed = nodes.linear(f"{name}.qkv", normed_BTD, attention.q_proj, attention.k_proj, attention.v_proj)
    mixed = ir.Value(name=name)
    nodes.tape.op_multi_out(
        "GroupQueryAttention",
        [packed, None, None, *past, *shared],
        {
            "num_heads": config.num_attention_heads,
            "kv_num_heads": config.num_key_value_heads,
            "scale": float(attention.scaling),
            "do_rotary": 1,
        },
        outputs=[mixed, *present],
        domain=MICROSOFT,
        name=name,
    )
    return mixed


def _feed_forward(nodes: _Nodes, name: str, mlp: Any, normed_BTD: ir.Value) -> ir.Value:
    """down(silu(gate(x)) * up(x))."""
    gate = nodes.linear(f"{name}.gate", normed_BTD, mlp.gate_proj)
    up = nodes.linear(f"{name}.up", normed_BTD, mlp.up_proj)
    opened = nodes.op(f"{name}.silu", "Mul", gate, nodes.op(f"{name}.sigmoid", "Sigmoid", gate))
    return nodes.linear(f"{name}.down", nodes.op(f"{name}.product", "Mul", opened, up), mlp.down_proj)
