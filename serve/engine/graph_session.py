"""Opens one ONNX graph of a bundle with onnxruntime and runs it on values that stay onnxruntime's own."""

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
import numpy.typing as npt
import onnxruntime
from onnxruntime import OrtValue
from onnxruntime.capi import onnxruntime_pybind11_state as state

from switchkd.export.contract.bundle import Bundle, BundleError
from switchkd.export.contract.integer_products import make_exact

# onnxruntime's errors have no common base but Exception.
_UNUSABLE = (
    state.EPFail,
    state.Fail,
    state.InvalidArgument,
    state.InvalidGraph,
    state.InvalidProtobuf,
    state.NoSuchFile,
    state.NotImplemented,
    state.RuntimeException,
)


_GIVE_BACK = onnxruntime.RunOptions()
_GIVE_BACK.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")


class MissingOperatorError(BundleError):
    """A graph with an operator that this build of onnxruntime does not have."""


class GraphSession:
    """One graph ready to run; several threads may run it at once."""

    def __init__(self, bundle: Bundle, name: str, threads: int | None = None) -> None:
        """Open the graph `name` of a bundle.

        Raises MissingOperatorError where onnxruntime lacks an operator, BundleError where it cannot read the file or
        does not multiply its integers exactly on this processor.
        """
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors only: warnings are for those who made the graph
        if threads is not None:
            options.intra_op_num_threads = threads
        graph, path = bundle.graph(name), bundle.graph_path(name)
        make_exact(options, graph.integer_weights, path)
        try:
            self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except _UNUSABLE as error:
            reason = " ".join(str(error).split())
            if isinstance(error, state.NotImplemented) or "not a registered function/op" in reason:
                raise MissingOperatorError(
                    f"{path}: this onnxruntime lacks an operator of it ({reason}); install a whole one, or export with "
                    "`--decoder both`"
                ) from error
            raise BundleError(f"{path}: onnxruntime cannot use it ({reason}); copy the bundle again") from error
        self._dtypes = {tensor.name: np.dtype(tensor.dtype) for tensor in graph.inputs}
        self.form = graph.form
        self.outputs = tuple(tensor.name for tensor in graph.outputs)

    def takes(self, name: str) -> bool:
        """Whether the graph has an input of this name."""
        return name in self._dtypes

    def value(self, name: str, array: npt.NDArray[np.generic]) -> OrtValue:
        """Wrap an array for the input `name`, in the type that the graph wants there."""
        value: OrtValue = OrtValue.ortvalue_from_numpy(np.asarray(array, dtype=self._dtypes[name], order="C"))
        return value

    def run(
        self,
        inputs: Mapping[str, OrtValue],
        outputs: Mapping[str, OrtValue] = MappingProxyType({}),
        *,
        give_back: bool = False,
    ) -> dict[str, OrtValue]:
        """Run the graph; the results are onnxruntime's own memory and can go back in without a copy.

        Those of `outputs` are written there instead, which may be the memory of an input where the operators allow it.
        With `give_back` what the run took in between is not kept for the next one, but goes back to the system.
        """
        options = _GIVE_BACK if give_back else None
        if not outputs:
            results = self._session.run_with_ort_values(list(self.outputs), dict(inputs), options)
            return dict(zip(self.outputs, results, strict=True))
        binding = self._session.io_binding()
        for name, value in inputs.items():
            binding.bind_ortvalue_input(name, value)
        for name in self.outputs:
            if name in outputs:
                binding.bind_ortvalue_output(name, outputs[name])
            else:
                binding.bind_output(name)
        self._session.run_with_iobinding(binding, options)
        return dict(zip(self.outputs, binding.get_outputs(), strict=True))
