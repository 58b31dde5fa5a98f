"""Which operators a bundle's graph may call, and with what sizes.

A graph from disk is data. What it may call is what computes tensors from
tensors and nothing else: functional operators of ATen (no write to an argument,
no file, no storage, no stream), ftc's own, and Python's arithmetic on sizes. A
literal may not ask for more than 2^31 elements.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from ftc.graph.errors import BundleError

LIMIT = 2**31
"""Largest number of elements that the literals of one call may ask for."""

_PYTHON = {
    **{
        f"operator.{f.__name__}": f
        for f in (
            operator.add,
            operator.sub,
            operator.mul,
            operator.floordiv,
            operator.truediv,
            operator.mod,
            operator.neg,
            operator.pow,
            operator.eq,
            operator.ne,
            operator.lt,
            operator.le,
            operator.gt,
            operator.ge,
            operator.getitem,
            operator.and_,
            operator.or_,
            operator.not_,
        )
    },
    **{f"math.{f.__name__}": f for f in (math.ceil, math.floor, math.trunc)},
    **{
        f"torch.{f.__name__}": f
        for f in (
            torch.sym_int,
            torch.sym_float,
            torch.sym_max,
            torch.sym_min,
            torch.sym_not,
            torch.sym_ite,
            torch.sym_sum,
        )
    },
}
_NAMES = {function: name for name, function in _PYTHON.items()}

_TYPES = frozenset(
    {  # of arguments; lists and optionals of these are allowed too
        "Tensor",
        "int",
        "SymInt",
        "float",
        "SymFloat",
        "bool",
        "SymBool",
        "number",
        "Scalar",
        "ScalarType",
        "Layout",
        "Device",
        "MemoryFormat",
        "str",
        "Generator",
    }
)
_TEXTS = frozenset(
    {  # the arguments that may be strings: modes, no names of files
        "approximate",
        "equation",
        "rounding_mode",
        "reduce",
        "mode",
        "indexing",
        "padding_mode",
        "UPLO",
        "driver",
        "norm",
        "interpolation",
        "ord",
        "p",
        "activation",
    }
)
_PRIVATE = frozenset(
    {  # functional operators with a leading underscore that graphs contain
        "_softmax",
        "_log_softmax",
        "_to_copy",
        "_unsafe_view",
        "_convolution",
        "_native_batch_norm_legit",
        "_native_batch_norm_legit_no_training",
        "_adaptive_avg_pool2d",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_weight_norm",
        "__and__",
        "__or__",
        "__xor__",
        "__lshift__",
        "__rshift__",
    }
)
_GROWING = {  # operator -> positions of the arguments that are the sizes of its result
    "full": (0,),
    "zeros": (0,),
    "ones": (0,),
    "empty": (0,),
    "rand": (0,),
    "randn": (0,),
    "new_full": (1,),
    "new_zeros": (1,),
    "new_ones": (1,),
    "new_empty": (1,),
    "expand": (1,),
    "broadcast_to": (1,),
    "repeat": (1,),
    "tile": (1,),
    "randint": (0, 1, 2),
    "randperm": (0,),
    "eye": (0, 1),
    "tril_indices": (0, 1),
    "triu_indices": (0, 1),
    "one_hot": (1,),
    "pad": (1,),
    "constant_pad_nd": (1,),
    "repeat_interleave": (1,),
    "empty_strided": (0,),
    "new_empty_strided": (1,),
    "as_strided": (1,),
    "upsample_nearest2d": (1,),
    "upsample_bilinear2d": (1,),
    "adaptive_avg_pool1d": (1,),
    "adaptive_avg_pool2d": (1,),
    "adaptive_avg_pool3d": (1,),
    "adaptive_max_pool2d": (1,),
    "bincount": (2,),
    "hann_window": (0,),
    "fft_fft": (1,),
    "parallel_gather": (2,),
}
_RANGES = {"arange", "linspace", "logspace", "range"}


def operator_name(target: Any) -> str:
    """The name of an operator in a bundle.

    Raises:
        BundleError: when it is not allowed in one.
    """
    if isinstance(target, OpOverload):
        _check_operator(target)
        return str(target)
    if target in _NAMES:
        return _NAMES[target]
    raise BundleError(f"a bundle cannot hold a call of {target}")


def resolve(name: str) -> Any:
    """The operator of that name.

    Raises:
        BundleError: when there is none, or it is not allowed.
    """
    if name in _PYTHON:
        return _PYTHON[name]
    parts = name.split(".")
    if len(parts) != 3 or parts[0] not in ("aten", "ftc"):
        raise BundleError(f"operator {name[:80]!r} is not allowed")
    if parts[0] == "ftc":
        from ftc.graph import parallel_ops, quantized_ops  # noqa: F401  (registers them)
    namespace, base, overload = parts
    try:
        target = getattr(getattr(getattr(torch.ops, namespace), base), overload)
    except (AttributeError, RuntimeError):
        raise BundleError(
            f"there is no operator {name[:80]!r} in torch {torch.__version__}",
            fix="use the version of torch that wrote the bundle",
        ) from None
    if not isinstance(target, OpOverload):
        raise BundleError(f"operator {name[:80]!r} is not allowed")
    _check_operator(target)
    return target


def _check_operator(target: OpOverload) -> None:
    schema = target._schema
    namespace, base = schema.name.split("::")
    private = base.startswith("_") and base not in _PRIVATE
    sound = (
        namespace in ("aten", "ftc")
        and not private
        and not schema.is_mutable
        and len(schema.returns) > 0  # what returns nothing is called for a side effect
        and all(_sound(a.type, a.name) for a in schema.arguments)
        and all(_sound(r.type, "") for r in schema.returns)
    )
    if not sound:
        raise BundleError(
            f"operator {target} is not allowed in a bundle",
            fix="a graph may hold functional operators of aten and ftc",
        )


def _sound(kind: Any, name: str) -> bool:
    while hasattr(kind, "getElementType"):
        kind = kind.getElementType()
    text = str(kind)
    return text in _TYPES and (text != "str" or name in _TEXTS)


def check_call(target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Refuses arguments that the operator does not have, and absurd sizes.

    Raises:
        BundleError: saying which.
    """
    if not isinstance(target, OpOverload):
        _check_python(target, args, kwargs)
        return
    arguments = target._schema.arguments
    positional = [a for a in arguments if not a.kwarg_only]
    unknown = set(kwargs) - {a.name for a in arguments}
    if len(args) > len(positional) or unknown:
        raise BundleError(f"{target} does not take these arguments", fix=str(target._schema))
    base = target._schema.name.split("::")[1]
    given = {**dict(zip((a.name for a in arguments), args, strict=False)), **kwargs}
    if base in _RANGES:
        _check_range(target, given)
    for position in _GROWING.get(base, ()):
        if position < len(arguments) and arguments[position].name in given:
            _check_sizes(target, given[arguments[position].name])


def _check_sizes(target: OpOverload, value: Any) -> None:
    sizes = value if isinstance(value, (list, tuple)) else [value]
    count = 1
    for size in sizes:
        if isinstance(size, (int, float)) and not isinstance(size, bool) and size != 0:
            count *= abs(int(size))
    if count > LIMIT:
        raise BundleError(f"{target} asks for {count:,} elements", fix=f"at most {LIMIT:,}")


def _check_range(target: OpOverload, given: Mapping[str, Any]) -> None:
    numbers = {
        k: v for k, v in given.items() if isinstance(v, (int, float)) and not isinstance(v, bool)
    }
    if "steps" in numbers:
        count = abs(numbers["steps"])
    else:
        start, end, step = numbers.get("start", 0), numbers.get("end", 0), numbers.get("step", 1)
        count = abs(end - start) / abs(step) if step else math.inf
    if not count <= LIMIT:
        raise BundleError(f"{target} asks for {count:,} elements", fix=f"at most {LIMIT:,}")


def _check_python(target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Sizes are small numbers: no text, no tower of powers."""
    if kwargs:
        raise BundleError(f"{_NAMES[target]} takes no keywords")
    for value in args:
        nodes = value if isinstance(value, (list, tuple)) else [value]
        if not all(isinstance(v, (fx.Node, int, float, bool, slice, type(None))) for v in nodes):
            raise BundleError(f"{_NAMES[target]} of something that is no number")
    if (
        target is operator.pow
        and len(args) == 2
        and not (isinstance(args[1], (int, float)) and abs(args[1]) <= 64)
    ):
        raise BundleError("a power whose exponent is not small")
