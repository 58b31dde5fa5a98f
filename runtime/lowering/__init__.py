"""Translations of operators to ONNX: one small function an operator, by family.

A translation gets an :class:`~ftc.runtime.lowering.emitter.Emitter` and the
operator's own arguments, tensors as ONNX values and symbolic sizes as they are,
and returns the value or values that stand for its results::

    @lowers(aten.silu.default)
    def silu(e: Emitter, x: Value) -> Value:
        return e.op("Mul", x, e.op("Sigmoid", x))

Importing this package registers every family. An operator of one's own is such
a function in any module that is imported before :func:`ftc.runtime.lower.lower`
is called.
"""

from . import (
    activations,
    attention,
    coded_states,
    constants,
    convolution,
    elementwise,
    indexing,
    logic,
    normalization,
    parallel,
    products,
    quantized,
    reductions,
    shape_ops,
)
from .emitter import Emitter
from .table import Unsupported, lowers

__all__ = [
    "Emitter",
    "Unsupported",
    "activations",
    "attention",
    "coded_states",
    "constants",
    "convolution",
    "elementwise",
    "indexing",
    "logic",
    "lowers",
    "normalization",
    "parallel",
    "products",
    "quantized",
    "reductions",
    "shape_ops",
]
