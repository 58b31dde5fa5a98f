"""Operators that move data and compute nothing: views, axes, slices, joins.

The result's shape is known from the fake value, so every view is one reshape to
that shape, whatever operator asked for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from onnx_ir import Value

from .emitter import Emitter
from .table import Unsupported, lowers

aten = torch.ops.aten

_END = 2**63 - 1


@lowers(aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.view_as.default,
        aten.reshape_as.default, aten.flatten.using_ints, aten.unflatten.int,
        aten.unsqueeze.default, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims,
        aten.ravel.default)  # fmt: skip
def view(e: Emitter, x: Value, *how: Any) -> Value:
    return e.reshape(x, e.sizes.dims(e.out))


@lowers(aten.transpose.int)
def transpose(e: Emitter, x: Value, dim0: int, dim1: int) -> Value:
    perm = list(range(e.rank(x)))
    if perm:
        perm[dim0], perm[dim1] = perm[dim1], perm[dim0]
    return e.transpose(x, perm)


@lowers(aten.t.default, aten.numpy_T.default, aten.mT.default)
def swap(e: Emitter, x: Value) -> Value:
    return transpose(e, x, -2, -1) if e.rank(x) > 1 else x


@lowers(aten.permute.default)
def permute(e: Emitter, x: Value, dims: Sequence[int]) -> Value:
    return e.transpose(x, dims)


@lowers(aten.movedim.int)
def movedim(e: Emitter, x: Value, source: int, destination: int) -> Value:
    rank = e.rank(x)
    perm = [i for i in range(rank) if i != source % rank]
    perm.insert(destination % rank, source % rank)
    return e.transpose(x, perm)


@lowers(aten.expand.default, aten.expand_as.default, aten.broadcast_to.default)
def expand(e: Emitter, x: Value, size: Any, implicit: bool = False) -> Value:
    return e.expand(x, e.sizes.dims(e.out))


@lowers(aten.repeat.default, aten.tile.default)
def repeat(e: Emitter, x: Value, repeats: Sequence[Any]) -> Value:
    known = e.dims(x)
    lead = len(repeats) - len(known)
    if lead < 0:
        repeats = [*[1] * -lead, *repeats]
    x = e.reshape(x, [*[1] * lead, *known])
    return e.op("Tile", x, e.sizes.shape_value(repeats))


@lowers(aten.slice.Tensor)
def slice_(
    e: Emitter, x: Value, dim: int = 0, start: Any = None, end: Any = None, step: Any = 1
) -> Value:
    if step == 1 and e.sizes.dims(e.out) == e.dims(x):
        return x
    bounds = [e.sizes.shape_value([b])
              for b in (0 if start is None else start, _END if end is None else end)]  # fmt: skip
    return e.op("Slice", x, *bounds, [dim % e.rank(x)], None if step == 1 else [step])


@lowers(aten.narrow.default)
def narrow(e: Emitter, x: Value, dim: int, start: Any, length: Any) -> Value:
    return slice_(e, x, dim, start, start + length)


@lowers(aten.select.int)
def select(e: Emitter, x: Value, dim: int, index: Any) -> Value:
    return e.op("Gather", x, e.scalar(index), axis=dim % e.rank(x))


@lowers(aten.cat.default, aten.concat.default)
def cat(e: Emitter, tensors: Sequence[Value], dim: int = 0) -> Value:
    # torch lets a one-dimensional empty tensor join anything.
    joined = [t for t in tensors if e.dims(t) != (0,) or len(e.out.shape) == 1]
    if len(joined) == 1:
        return joined[0]
    return e.op("Concat", *(e.cast(t, e.out.dtype) for t in joined), axis=dim % len(e.out.shape))


@lowers(aten.stack.default)
def stack(e: Emitter, tensors: Sequence[Value], dim: int = 0) -> Value:
    axis = dim % len(e.out.shape)
    return e.op("Concat", *(e.unsqueeze(e.cast(t, e.out.dtype), axis) for t in tensors), axis=axis)


@lowers(aten.split.Tensor, aten.split.sizes, aten.split_with_sizes.default, aten.chunk.default,
        aten.tensor_split.sections)  # fmt: skip
def split(e: Emitter, x: Value, sizes: Any, dim: int = 0) -> Sequence[Value]:
    axis = dim % e.rank(x)
    if len(e.out) == 1:
        return [x]
    lengths = e.sizes.shape_value([part.shape[axis] for part in e.out])
    return e.op("Split", x, lengths, axis=axis, outputs=len(e.out))


@lowers(aten.unbind.int)
def unbind(e: Emitter, x: Value, dim: int = 0) -> Sequence[Value]:
    return [e.op("Gather", x, e.scalar(i), axis=dim % e.rank(x)) for i in range(len(e.out))]


@lowers(aten.flip.default)
def flip(e: Emitter, x: Value, dims: Sequence[int]) -> Value:
    axes = [d % e.rank(x) for d in dims]
    count = len(axes)
    return e.op("Slice", x, [-1] * count, [-_END] * count, axes, [-1] * count)


@lowers(aten.roll.default)
def roll(e: Emitter, x: Value, shifts: Sequence[int], dims: Sequence[int] = ()) -> Value:
    if not dims:
        flat = roll(e, e.reshape(x, [-1]), shifts, [0])
        return e.op("Reshape", flat, e.sizes.shape_value(e.dims(x)))
    for shift, dim in zip(shifts, dims, strict=True):
        size = e.out.shape[dim]
        if not isinstance(shift, int) or (not isinstance(size, int) and shift == 0):
            raise Unsupported("a roll by a symbolic amount")
        if isinstance(size, int):
            shift %= size
        if shift:
            head = e.op("Slice", x, [-shift], [_END], [dim])
            x = e.op("Concat", head, e.op("Slice", x, [0], [-shift], [dim]), axis=dim)
    return x


@lowers(aten.constant_pad_nd.default)
def constant_pad(e: Emitter, x: Value, pad: Sequence[Any], value: Any = 0) -> Value:
    return pad_(e, x, pad, "constant", value)


_PAD_MODES = {"constant": "constant", "reflect": "reflect", "replicate": "edge",
              "circular": "wrap"}  # fmt: skip


@lowers(aten.pad.default)
def pad_(
    e: Emitter, x: Value, pad: Sequence[Any], mode: str = "constant", value: Any = None
) -> Value:
    befores, afters = list(pad[0::2])[::-1], list(pad[1::2])[::-1]
    axes = list(range(e.rank(x) - len(befores), e.rank(x)))
    boolean = e.dtype(x) == torch.bool
    held = torch.int32 if boolean else e.dtype(x)
    fill = None if mode != "constant" else e.tensor(value or 0, held)
    padded = e.op("Pad", e.cast(x, held), e.sizes.shape_value([*befores, *afters]), fill, axes,
                  mode=_PAD_MODES[mode])  # fmt: skip
    return e.cast(padded, e.out.dtype)


@lowers(aten.pixel_shuffle.default)
def pixel_shuffle(e: Emitter, x: Value, upscale_factor: int) -> Value:
    if e.rank(x) != 4:
        raise Unsupported("pixel_shuffle of other than four dimensions")
    return e.op("DepthToSpace", x, blocksize=upscale_factor, mode="CRD")
