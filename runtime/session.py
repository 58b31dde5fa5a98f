"""onnxruntime behind tensors: a model on disk or in memory, run by name on the CPU.

Torch is imported where outputs are tensors (:meth:`OnnxSession.run`): values that stay in
onnxruntime, and a :class:`Binding`, do without.
Whatever onnxruntime complains about becomes an error that names the model's own
inputs, with the fix; onnxruntime itself prints nothing.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ftc.graph.cache_inputs import IN_PLACE, Array, Kind
from ftc.graph.errors import SourceError, UsageError, nearest

from .mapped import without_weights

if TYPE_CHECKING:
    import onnx_ir as ir
    from torch import Tensor

_CPU, _CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
_FATAL_ONLY = 4  # errors are raised too
_FOLDER = "session.model_external_initializers_file_folder_path"

_KINDS = {
    "tensor(float)": "float32",
    "tensor(double)": "float64",
    "tensor(float16)": "float16",
    **{f"tensor({kind})": kind for kind in ("int64", "int32", "int16", "int8", "uint8", "bool")},
}


class OnnxSession:
    """One loaded model.

    Args:
        model: path of a file, or a model in memory of less than 2 GB.
        threads: how many one operator may use; by default onnxruntime decides.
        device: ``cpu``, or ``cuda`` where onnxruntime has its provider; what that has no kernel
            for runs on the processor, as onnxruntime decides.

    Attributes:
        input_names, output_names: in the model's order.
        input_shapes, output_shapes: sizes and names of dynamic dimensions, by name.
        kinds: element types of inputs and outputs by name, ``float32``; those that arrays have.
        in_place: whether past and present of a cache may be one buffer, which is memory of
            the processor.

    Raises:
        SourceError: when the file is missing or onnxruntime refuses it.
        UsageError: for a device that this onnxruntime has no provider for.
    """

    def __init__(
        self, model: str | os.PathLike[str] | ir.Model, threads: int | None = None,
        device: str = "cpu",
    ) -> None:  # fmt: skip
        self._session = _open(model, threads, _providers(device))
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        self.input_names: tuple[str, ...] = tuple(i.name for i in inputs)
        self.output_names: tuple[str, ...] = tuple(o.name for o in outputs)
        self.input_shapes: dict[str, tuple[int | str, ...]] = {
            i.name: tuple(i.shape) for i in inputs
        }
        self.output_shapes: dict[str, tuple[int | str, ...]] = {
            o.name: tuple(o.shape) for o in outputs
        }
        self.kinds: dict[str, str | None] = {v.name: _KINDS.get(v.type)
                                             for v in (*inputs, *outputs)}  # fmt: skip
        metadata = self._session.get_modelmeta().custom_metadata_map
        self.in_place: bool = IN_PLACE in metadata.items() and device == "cpu"

    def run(self, inputs: Mapping[str, Tensor | Array]) -> dict[str, Tensor]:
        """Outputs by name.

        Args:
            inputs: CPU tensors or arrays by input name.

        Raises:
            UsageError: for a missing or unknown name, a wrong dtype, rank or size,
                or whatever else onnxruntime refuses when it runs.
        """
        import torch

        feed = {name: self._checked(name, given) for name, given in inputs.items()}
        for name in self.input_names:
            if name not in feed:
                known = ", ".join(self.input_names)
                raise UsageError(f"missing input {name!r}", fix=f"inputs: {known}")
        self._check_dimensions(feed)
        try:
            results = self._session.run(None, feed)
        except Exception as error:
            raise _refused(error, feed) from error
        return {
            name: torch.from_numpy(np.asarray(result))
            for name, result in zip(self.output_names, results, strict=True)
        }

    __call__ = run

    def run_held(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """As :meth:`run`, with outputs left where they are: a later run takes them uncopied.

        Args:
            inputs: CPU tensors or arrays, or values that an earlier run gave, by input name.

        Returns:
            Values of onnxruntime by output name; ``numpy()`` copies one out.
        """
        from onnxruntime import OrtValue

        feed = {
            name: given
            if isinstance(given, OrtValue)
            else OrtValue.ortvalue_from_numpy(self._checked(name, given))
            for name, given in inputs.items()
        }
        try:
            results = self._session.run_with_ort_values(list(self.output_names), feed)
        except Exception as error:
            arrays = {name: value.numpy() for name, value in feed.items()}
            raise _refused(error, arrays) from error
        return dict(zip(self.output_names, results, strict=True))

    def misfit(self, inputs: Mapping[str, Kind], outputs: Mapping[str, Kind]) -> str:
        """What the model takes or gives otherwise than it should; empty where nothing.

        Args:
            inputs, outputs: element types and sizes by name; those that are no number are free.
        """
        sides = (("takes other inputs", inputs, self.input_shapes),
                 ("gives other outputs", outputs, self.output_shapes))  # fmt: skip
        for what, wanted, found in sides:
            if wanted.keys() != found.keys():
                return f"{what} ({', '.join(found)})"
            for name, (kind, sizes) in wanted.items():
                both = zip(sizes, found[name], strict=False)
                fixed = ((a, b) for a, b in both if isinstance(a, int) and isinstance(b, int))
                alike = self.kinds[name] in (None, kind) and len(sizes) == len(found[name])
                if not alike or any(a != b for a, b in fixed):
                    return f"has another form of {name!r}"
        return ""

    def binding(self) -> Binding:
        """Inputs and outputs in the caller's own memory."""
        return Binding(self._session)

    def _check_dimensions(self, feed: Mapping[str, Array]) -> None:
        """One size for each named dimension, which onnxruntime does not check by itself."""
        sizes: dict[str, tuple[int, str]] = {}
        for name, array in feed.items():
            for dim, size in zip(self.input_shapes[name], array.shape, strict=True):
                if isinstance(dim, int):
                    continue
                first, where = sizes.setdefault(dim, (size, name))
                if size != first:
                    raise UsageError(
                        f"{dim!r} is {first} in {where!r} and {size} in {name!r}",
                        fix="give one size for each named dimension",
                    )

    def _checked(self, name: str, given: Tensor | Array) -> Array:
        if name not in self.input_shapes:
            raise UsageError(f"unknown input {name!r}", fix=nearest(name, self.input_names))
        shape, kind = self.input_shapes[name], str(given.dtype).removeprefix("torch.")
        fits = len(given.shape) == len(shape) and all(
            not isinstance(want, int) or want == got
            for want, got in zip(shape, given.shape, strict=True)
        )
        wanted = self.kinds[name]
        if not fits or (wanted is not None and kind != wanted):
            raise UsageError(
                f"input {name!r} is {kind} of shape {list(given.shape)}",
                fix=f"pass {wanted} of shape [{', '.join(map(str, shape))}]",
            )
        if isinstance(given, np.ndarray):
            return np.ascontiguousarray(given)
        array: Array = given.detach().cpu().contiguous().numpy()
        return array


class Binding:
    """Runs a session on arrays that stay where they are.

    Args:
        session: of onnxruntime.
    """

    def __init__(self, session: Any) -> None:
        self._session, self._held = session, session.io_binding()
        self._arrays: dict[str, Array] = {}

    def inputs(self, given: Mapping[str, Array]) -> None:
        """Arrays that are read at the next run, by their values now.

        One of the size and type of the run before is copied to where that run read it, which
        takes a tenth of what a new binding takes.
        """
        for name, array in given.items():
            bound = self._arrays.get(name)
            if bound is not None and bound.shape == array.shape and bound.dtype == array.dtype:
                bound[...] = array
            else:
                self._bind(self._held.bind_input, name, np.array(array, order="C"))

    def output(self, name: str, array: Array) -> None:
        """An array that is written by the next run."""
        self._bind(self._held.bind_output, name, array)

    def both(self, given: str, made: str, array: Array) -> None:
        """An array that is an input and, written, an output, of this run and those after it."""
        self._bind(self._held.bind_input, given, array)
        self._bind(self._held.bind_output, made, array)

    def run(self) -> None:
        """Runs once.

        Raises:
            UsageError: for what onnxruntime refuses.
        """
        try:
            self._session.run_with_iobinding(self._held)
        except Exception as error:
            raise _refused(error, self._arrays) from error

    def _bind(self, bind: Any, name: str, array: Array) -> None:
        """Tells onnxruntime where ``array`` is, and keeps it there."""
        bind(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        self._arrays[name] = array


def _providers(device: str) -> list[str]:
    """Onnxruntime's names of what computes, the first where it can."""
    import onnxruntime

    if device == "cuda" and _CUDA not in onnxruntime.get_available_providers():
        raise UsageError(
            f"onnxruntime {onnxruntime.__version__} has no {_CUDA} here",
            fix="pip install onnxruntime-gpu in place of onnxruntime, or --device cpu",
        )
    return [_CUDA, _CPU] if device == "cuda" else [_CPU]


def _open(model: Any, threads: int | None, providers: list[str]) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = _FATAL_ONLY
    if threads is not None:
        options.intra_op_num_threads = threads
    where = None
    if isinstance(model, (str, os.PathLike)):
        path = Path(model)
        where = str(path)
        if not path.is_file():
            raise SourceError(f"no ONNX file {path}", fix="write one with `ftc export`")
        source: Any = without_weights(path) or str(path)  # which onnxruntime refuses, with a reason
        options.add_session_config_entry(_FOLDER, str(path.absolute().parent))
    else:
        from onnx_ir import to_proto

        source = to_proto(model).SerializeToString()
    try:
        return onnxruntime.InferenceSession(source, options, providers=providers)
    except Exception as error:
        raise SourceError(
            f"onnxruntime cannot load the model: {_reason(error)}",
            where=where,
            fix="lower the program again with `ftc export`",
        ) from error


def _refused(error: BaseException, feed: Mapping[str, Array]) -> UsageError:
    return UsageError(
        f"onnxruntime cannot run these inputs: {_reason(error)}",
        where=", ".join(f"{name} {list(array.shape)}" for name, array in feed.items()),
        fix="give sizes and indices within the model's limits",
    )


def _reason(error: BaseException) -> str:
    """The sentence of onnxruntime's first line that says what is wrong: the last one."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")
    return line.rpartition("Status Message: ")[2]
