"""model.safetensors: tensors on disk in one pass, without a second copy of any.

The format is the public one: u64 length of the header, a JSON header (dtype,
shape, first and last byte), the bytes. Each tensor is written and hashed straight
from its own memory; tensors that are one tensor are stored once; a tensor that
is dense under another order of its axes (a transposed weight) is stored in that
order and comes back with the same strides, so that a product with it takes the
same path and gives the same bits.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ftc.graph.errors import BundleError
from ftc.graph.program import Program

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.complex64: "C64",
}
_CHUNK = 1 << 24
ALIGNMENT = 64
"""Bytes: where torch puts its own tensors. Kernels round differently at other addresses."""


def describe_tensors(program: Program) -> tuple[dict[str, dict[str, Any]], dict[str, Tensor]]:
    """What graph.json says of each tensor, and the tensors to store.

    Returns:
        By name ``{"kind", "grad"?, "of"?, "order"?}``: whether it is a parameter
        and trains, whose bytes it has, and the order of its axes in the file;
        and the contiguous tensors by name.
    """
    facts: dict[str, dict[str, Any]] = {}
    stored: dict[str, Tensor] = {}
    seen: dict[tuple[Any, ...], str] = {}
    for name, tensor in _tensors(program):
        fact: dict[str, Any] = {"kind": "buffer"}
        if isinstance(tensor, nn.Parameter):
            fact = {"kind": "parameter", "grad": tensor.requires_grad}
        identity = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        if tensor.numel() and (first := seen.setdefault(identity, name)) != name:
            facts[name] = {**fact, "of": first}
            continue
        order = _dense_order(tensor)
        if order is not None:
            fact["order"] = order
        facts[name] = fact
        stored[name] = tensor.detach() if order is None else tensor.detach().permute(order)
    return facts, stored


def _tensors(program: Program) -> Iterable[tuple[str, Tensor]]:
    """What is read, by name: a module may hold more, but a program is its graph."""
    read = {str(n.target) for n in program.graph.nodes if n.op == "get_attr"}
    for name in sorted(read.union(program.signature.start.values())):
        yield name, program.tensor(name)


def _dense_order(tensor: Tensor) -> list[int] | None:
    """The order of axes that makes ``tensor`` contiguous; None for its own or where none does."""
    if tensor.is_contiguous():
        return None
    strides = tensor.stride()
    order = sorted(range(tensor.dim()), key=lambda axis: (-strides[axis], axis))
    return order if tensor.permute(order).is_contiguous() else None


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Writes a safetensors file; returns the sha256 of its bytes.

    Raises:
        BundleError: for a tensor on no device or of a dtype that the format lacks.
    """
    names = sorted(tensors, key=lambda n: _rank(n, tensors[n]))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name in names:
        tensor = tensors[name]
        if tensor.dtype not in _DTYPES or tensor.is_meta or tensor.layout != torch.strided:
            raise BundleError(f"tensor {name} ({tensor.dtype}, {tensor.device}) cannot be saved")
        size = tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [at, at + size],
        }
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for part in _parts(text, [tensors[n] for n in names]):
            file.write(part)
            digest.update(part)
    return digest.hexdigest()


def _rank(name: str, tensor: Tensor) -> tuple[bool, int, str]:
    """The order in the file: those whose size keeps the next one aligned stand first."""
    size = tensor.numel() * tensor.element_size()
    return size % ALIGNMENT != 0, -tensor.element_size(), name


def _parts(header: bytes, tensors: Iterable[Tensor]) -> Iterable[memoryview | bytes]:
    yield len(header).to_bytes(8, "little") + header
    for tensor in tensors:
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        if flat.numel():
            data = flat.view(torch.uint8).numpy().data
            for start in range(0, len(data), _CHUNK):
                yield data[start : start + _CHUNK]


def read_tensors(path: Path, facts: Mapping[str, Mapping[str, Any]]) -> dict[str, Tensor]:
    """The tensors that ``facts`` describe, mapped from the file.

    Raises:
        BundleError: when file and facts do not fit together.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        # .data: a view would keep its base, and with it the whole file, in memory
        stored = {n: t.data if aligned(t) else t.clone() for n, t in load_file(path).items()}
    except (SafetensorError, OSError) as error:
        raise BundleError(f"{path} is damaged: {error}", fix="make the bundle again") from None
    result: dict[str, Tensor] = {}
    for name, fact in facts.items():
        source = fact.get("of", name)
        if source not in stored:
            raise BundleError(f"{path} has no tensor {source}", fix="make the bundle again")
        result[name] = _restore(name, stored[source], facts[source].get("order"), fact)
    if unknown := set(stored) - set(facts):
        raise BundleError(f"{path} has a tensor that the graph does not know: {min(unknown)}")
    return result


def aligned(tensor: Tensor) -> bool:
    """Whether ``tensor`` starts where torch would have put it."""
    return tensor.data_ptr() % ALIGNMENT == 0


def _restore(name: str, tensor: Tensor, order: Any, fact: Mapping[str, Any]) -> Tensor:
    if order is not None:
        if sorted(order) != list(range(tensor.dim())):
            raise BundleError(f"the axes of tensor {name} are no permutation")
        inverse = [order.index(axis) for axis in range(tensor.dim())]
        tensor = tensor.permute(inverse)
    if fact["kind"] == "buffer":
        return tensor
    if fact["kind"] != "parameter":
        raise BundleError(f"tensor {name} is of the unknown kind {fact['kind']!r}")
    trains = bool(fact.get("grad"))
    if trains and not (tensor.is_floating_point() or tensor.is_complex()):
        raise BundleError(f"tensor {name} of {tensor.dtype} cannot train")
    return nn.Parameter(tensor, requires_grad=trains)
