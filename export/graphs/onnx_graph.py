"""ONNX graphs whose weights stay on disk: read without them, changed, and written with them inside or beside.

A graph of gigabytes must not lie in memory several times over. Here its protobuf holds small tensors alone; large ones
are read one at a time, when they are written or changed.
"""

import gc
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
from onnx_ir.external_data import convert_tensors_to_external
from onnx_ir.passes.common import RemoveUnusedNodesPass

from ..contract.onnx_wire import head

MAX_PROTOBUF_BYTES = 2**31 - 2**20  # the format's own limit, less the graph around the weights
_SMALL = 1024  # bytes; shapes and the like stay inside: tools look at them
_LARGE = 2**26  # bytes; memory that is worth a search for what can be freed
_ALIGNMENT = 2**16  # older runtimes map only tensors that begin at a page, which on Windows is so large
_ALIGNED = 2**20  # bytes; smaller tensors follow each other


@dataclass(frozen=True)
class Storage:
    """Where weights go: into the .onnx file up to `inline_bytes`, above that beside it in parts of `part_bytes`.

    A runtime maps the files beside a graph, and copies what is inside it: gigabytes, of a large one.
    """

    inline_bytes: int = 2**30
    part_bytes: int = MAX_PROTOBUF_BYTES  # what a browser holds in one piece


class OnnxGraph:
    """A graph's protobuf, and the large weights it names but does not hold."""

    def __init__(self, proto: onnx.ModelProto, weights: dict[str, ir.TensorProtocol]) -> None:
        self.proto = proto
        self.weights = weights
        self.largest: Mapping[str, float] = {}  # of each float tensor, where `ranges` has looked

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a graph that this program wrote; its large weights stay in the files."""
        proto = onnx.load(path, load_external_data=False)
        return cls(
            proto,
            {
                tensor.name: ir.serde.deserialize_tensor(tensor, str(path.parent))
                for tensor in proto.graph.initializer
                if tensor.data_location == onnx.TensorProto.EXTERNAL
            },
        )

    def constants(self) -> dict[str, onnx.TensorProto]:
        """Constant tensors by name; where `weights` has the name, only type and shape can be read here."""
        return {tensor.name: tensor for tensor in self.proto.graph.initializer}

    def array(self, tensor: onnx.TensorProto) -> npt.NDArray[np.floating]:
        """The numbers of one of `constants`."""
        weight = self.weights.get(tensor.name)
        return onnx.numpy_helper.to_array(tensor) if weight is None else np.asarray(weight.numpy())

    def write(self, path: Path, storage: Storage) -> tuple[str, ...]:
        """Write the graph, sorted and without what it does not use; returns the names of the data files beside it."""
        model = ir.from_proto(self.proto)
        for name, tensor in self.weights.items():
            if name in model.graph.initializers:
                model.graph.initializers[name].const_value = tensor
        model.graph.sort()
        RemoveUnusedNodesPass()(model)
        data: tuple[str, ...] = ()
        size = sum(_bytes(value) for value in model.graph.initializers.values())
        if size > storage.inline_bytes:
            data = unload(model, path, storage.part_bytes)
            onnx.save_model(ir.to_proto(model), path)
        else:
            _save_whole(model, path)
        del model
        if size > _LARGE:
            gc.collect()  # its nodes and values refer to each other, and to all weights
        return data


def unload(model: ir.Model, path: Path, part_bytes: int) -> tuple[str, ...]:
    """Write a model's large weights beside `path`, one after the other, and let it refer to them.

    Returns the names of the files, as transformers.js asks for them: `name.onnx_data`, `name.onnx_data_1`, ... A tensor
    larger than `part_bytes` gets a part of its own.
    """
    parts: list[list[ir.Value]] = [[]]
    filled = 0
    for value in model.graph.initializers.values():
        if (size := _bytes(value)) < _SMALL:
            continue
        if parts[-1] and filled + size > part_bytes:
            parts.append([])
            filled = 0
        parts[-1].append(value)
        filled += size + (_ALIGNMENT if size > _ALIGNED else 0)
    names = []
    for number, values in enumerate(parts if parts[0] else []):
        names.append(f"{path.name}_data{f'_{number}' if number else ''}")
        tensors = [value.const_value for value in values if value.const_value is not None]
        written = convert_tensors_to_external(
            tensors, path.parent, names[-1], alignment=_ALIGNMENT, align_threshold=_ALIGNED
        )
        for value, tensor in zip(values, written, strict=True):
            value.const_value = tensor
    return tuple(names)


def _save_whole(model: ir.Model, path: Path) -> None:
    """Write a model as one file, its large weights put in one at a time: protobuf would hold all of them, twice."""
    initializers = model.graph.initializers
    large = {name: value.const_value for name, value in initializers.items() if _bytes(value) >= _SMALL}
    for name in large:
        del initializers[name]
    proto = ir.to_proto(model)
    graph = proto.graph.SerializeToString()
    proto.ClearField("graph")
    heads = []
    for name, tensor in large.items():
        assert tensor is not None
        plain = onnx.TensorProto(name=name, data_type=tensor.dtype, dims=tensor.shape.numpy())
        raw_data = plain.SerializeToString() + head(9, tensor.nbytes)
        heads.append((head(5, len(raw_data) + tensor.nbytes) + raw_data, tensor))  # GraphProto.initializer
    with path.open("wb") as file:
        file.write(proto.SerializeToString())
        file.write(head(7, len(graph) + sum(len(start) + tensor.nbytes for start, tensor in heads)) + graph)
        for start, tensor in heads:
            file.write(start)
            tensor.tofile(file)  # type: ignore[attr-defined]  # every tensor of onnx_ir has it, its protocol not yet


def _bytes(value: ir.Value) -> int:
    return 0 if value.const_value is None else value.const_value.nbytes
