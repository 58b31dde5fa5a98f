"""A signature as JSON and back: shapes, ranges and limits that can be, or the place that cannot."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, get_args

import torch

from ftc.graph.errors import BundleError
from ftc.graph.signature import Dim, InputSpec, OutputSpec, Role, Signature, dtype_name

from .allowed import LIMIT

_NAME_LENGTH, _RANK = 200, 16
_INTEGERS = range(-(2**63), 2**63)


def encode_signature(signature: Signature) -> dict[str, Any]:
    """The signature as JSON values."""

    def spec(given: InputSpec | OutputSpec) -> dict[str, Any]:
        return {**asdict(given), "dtype": dtype_name(given.dtype)}

    return {
        "task": signature.task,
        "inputs": [spec(i) for i in signature.inputs],
        "outputs": [spec(o) for o in signature.outputs],
        "limits": dict(sorted(signature.limits.items())),
        **({"start": dict(signature.start)} if signature.start else {}),
    }


def decode_signature(stored: Mapping[str, Any]) -> Signature:
    """The signature of :func:`encode_signature`'s JSON.

    Raises:
        BundleError: naming the entry that no program could have.
    """
    signature = Signature(
        task=str(stored["task"]),
        inputs=tuple(_input(spec, f"inputs[{i}]") for i, spec in enumerate(stored["inputs"])),
        outputs=tuple(_output(spec, f"outputs[{i}]") for i, spec in enumerate(stored["outputs"])),
        limits={str(name): size for name, size in stored["limits"].items()},
        start={str(name): str(held) for name, held in stored.get("start", {}).items()},
    )
    for name, size in signature.limits.items():
        parts = name.split("+")  # of one dimension, or of the sum of two
        known = len(parts) <= 2 and set(parts) <= set(signature.dims)
        if not known or not _is_size(size) or size < 1:
            raise _refused(f"limits.{name}", size, "a size of a dynamic dimension of the inputs")
    if len(set(signature.input_names)) < len(signature.inputs):
        raise _refused("inputs", list(signature.input_names), "names that differ")
    if odd := sorted(signature.start.keys() - set(signature.input_names)):
        raise _refused("start", odd, "names of inputs")
    return signature


def _input(stored: Mapping[str, Any], place: str) -> InputSpec:
    low, high, role = stored.get("low", 0), stored.get("high", 2), stored.get("role", "value")
    if not (_is_integer(low) and _is_integer(high) and low < high):
        raise _refused(f"{place}.low, high", [low, high], "two integers, the first smaller")
    if role not in get_args(Role):
        raise _refused(f"{place}.role", role, " or ".join(get_args(Role)))
    spec = _output(stored, place)
    return InputSpec(spec.name, spec.dtype, spec.shape, low, high, role)


def _output(stored: Mapping[str, Any], place: str) -> OutputSpec:
    name, dtype = stored["name"], getattr(torch, str(stored["dtype"]), None)
    if not isinstance(name, str) or not 0 < len(name) <= _NAME_LENGTH:
        raise _refused(f"{place}.name", name, "a short text")
    if not isinstance(dtype, torch.dtype):
        raise _refused(f"{place}.dtype", stored["dtype"], "a dtype of torch")
    return OutputSpec(name, dtype, _shape(stored["shape"], f"{place}.shape"))


def _shape(stored: Any, place: str) -> tuple[Dim, ...]:
    listed = isinstance(stored, Sequence) and not isinstance(stored, str)
    if not listed or len(stored) > _RANK or not all(map(_is_dim, stored)):
        raise _refused(place, stored, "a list of sizes and names of dynamic dimensions")
    if math.prod(size for size in stored if isinstance(size, int)) > LIMIT:
        raise _refused(place, stored, f"a shape of at most {LIMIT:,} elements")
    return tuple(stored)


def _is_dim(value: Any) -> bool:
    return (isinstance(value, str) and 0 < len(value) <= _NAME_LENGTH) or _is_size(value)


def _is_size(value: Any) -> bool:
    return _is_integer(value) and 0 <= value <= LIMIT


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value in _INTEGERS


def _refused(place: str, value: Any, wanted: str) -> BundleError:
    return BundleError(
        f"signature.{place} is {str(value)[:80]}, not {wanted}", fix="make the bundle again"
    )
