"""A model of one product for each kernel, as the lowering emits it, to be timed.

The weights are random; only shapes decide about time. Every product has a bias,
as most have.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from ftc.graph.quantized_ops import ROW_STEP
from ftc.graph.target import Kernel

from .lower import IR_VERSION, OPSET
from .lowering.blockwise import DOMAIN

Array = np.ndarray[Any, Any]
GROUP = 32
_ERRORS_ONLY = 3


def one_product(kernel: Kernel, inputs: int, outputs: int) -> Callable[[Array], Array]:
    """``x [rows, in] -> y [rows, out]`` by ``kernel``, in onnxruntime on one thread.

    Args:
        inputs: ``in``; a multiple of 32.
    """
    rng = np.random.default_rng(0)
    tensors: dict[str, Array] = {"bias": rng.standard_normal(outputs).astype(np.float32)}
    if kernel == "float":
        tensors["weight"] = rng.standard_normal((inputs, outputs)).astype(np.float32)
        nodes = [_node("MatMul", "x weight", "p"), _node("Add", "p bias", "y")]
    elif kernel == "integer":
        nodes = _integer(tensors, inputs, outputs, rng)
    else:
        nodes = _blocked(tensors, inputs, outputs, 4 if kernel == "blocked4" else 8, rng)
    session = _session(nodes, tensors, inputs, outputs)

    def run(x: Array) -> Array:
        (y,) = session.run(None, {"x": x})
        result: Array = y
        return result

    return run


def _integer(tensors: dict[str, Array], inputs: int, outputs: int, rng: Any) -> list[Any]:
    tensors.update(
        weight=rng.integers(-64, 65, (inputs, outputs)).astype(np.int8),
        scale=np.full(outputs, 1e-3, np.float32),
        axis=np.array([-1]),
        tiny=np.array(np.finfo(np.float32).tiny),
        step=np.array(ROW_STEP, np.float32),
        zero=np.array(128, np.uint8),
    )
    return [
        _node("Abs", "x", "size"), _node("ReduceMax", "size axis", "most", keepdims=1),
        _node("Max", "most tiny", "peak"), _node("Reciprocal", "peak", "inverse"),
        _node("Mul", "x inverse", "even"), _node("QuantizeLinear", "even step zero", "codes"),
        _node("MatMulIntegerToFloat", "codes weight step scale zero", "p", domain=DOMAIN),
        _node("Mul", "p peak", "rows"), _node("Add", "rows bias", "y"),
    ]  # fmt: skip


def _blocked(
    tensors: dict[str, Array], inputs: int, outputs: int, bits: int, rng: Any
) -> list[Any]:
    groups = inputs // GROUP
    codes = rng.integers(0, 256, (outputs, groups, GROUP * bits // 8))
    tensors.update(
        weight=codes.astype(np.uint8), scale=np.full((outputs, groups), 1e-3, np.float32)
    )
    return [
        helper.make_node(
            "MatMulNBits", ["x", "weight", "scale", "", "", "bias"], ["y"], domain=DOMAIN,
            K=inputs, N=outputs, bits=bits, block_size=GROUP, accuracy_level=4,
        )
    ]  # fmt: skip


def _node(op_type: str, inputs: str, outputs: str, **attributes: Any) -> Any:
    return helper.make_node(op_type, inputs.split(), outputs.split(), **attributes)


def _session(nodes: list[Any], tensors: dict[str, Array], inputs: int, outputs: int) -> Any:
    graph = helper.make_graph(
        nodes, "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", inputs])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", outputs])],
        [numpy_helper.from_array(array, name) for name, array in tensors.items()],
    )  # fmt: skip
    domains = [onnx.OperatorSetIdProto(domain="", version=OPSET),
               onnx.OperatorSetIdProto(domain=DOMAIN, version=1)]  # fmt: skip
    model = helper.make_model(graph, opset_imports=domains, ir_version=IR_VERSION)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = _ERRORS_ONLY
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
