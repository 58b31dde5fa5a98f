"""Reading and writing at computed places.

torch's ``x[i, :, j]`` with index tensors at some axes becomes ``GatherND``: the
indexed axes are moved to the front, the index tensors are broadcast together and
stacked, and the result's index dimensions are moved to where torch puts them:
in the place of the first indexed axis when the indexed axes are adjacent, else
in front.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from onnx_ir import Value

from .elementwise import promoted
from .emitter import Emitter
from .table import Unsupported, lowers

aten = torch.ops.aten


@lowers(aten.embedding.default)
def embedding(
    e: Emitter, weight: Value, indices: Value, padding_idx: int = -1,
    scale_grad_by_freq: bool = False, sparse: bool = False,
) -> Value:  # fmt: skip
    return e.op("Gather", weight, indices, axis=0)


@lowers(aten.index_select.default)
def index_select(e: Emitter, x: Value, dim: int, index: Value) -> Value:
    return e.op("Gather", x, index, axis=dim)


@lowers(aten.gather.default)
def gather(e: Emitter, x: Value, dim: int, index: Value, sparse_grad: bool = False) -> Value:
    return e.op("GatherElements", x, e.cast(index, torch.int64), axis=dim)


@lowers(aten.take_along_dim.default)
def take_along_dim(e: Emitter, x: Value, indices: Value, dim: int | None = None) -> Value:
    if dim is None:
        raise Unsupported("take_along_dim without an axis")
    sizes = list(e.sizes.dims(e.out))
    axis = dim % len(sizes)
    own = [*sizes[:axis], e.dims(x)[axis], *sizes[axis + 1 :]]
    return gather(e, e.expand(x, own), axis, e.expand(indices, sizes))


@lowers(aten.index.Tensor)
def index(e: Emitter, x: Value, indices: Sequence[Value | None]) -> Value:
    axes = [axis for axis, i in enumerate(indices) if i is not None]
    given = [i for i in indices if i is not None]
    if any(e.dtype(i) in (torch.bool, torch.uint8) for i in given):
        return _masked(e, x, axes, given)
    if len(given) == 1:
        return e.op("Gather", x, given[0], axis=axes[0])
    rest = [a for a in range(e.rank(x)) if a not in axes]
    front = e.transpose(x, [*axes, *rest])
    found = e.op("GatherND", front, _stacked(e, given, _index_dims(e, axes, rest)))
    if axes != list(range(axes[0], axes[-1] + 1)) or axes[0] == 0:
        return found
    wide = len(e.out.shape) - len(rest)
    lead = axes[0]
    order = [*range(wide, wide + lead), *range(wide), *range(wide + lead, len(e.out.shape))]
    return e.transpose(found, order)


def _index_dims(e: Emitter, axes: list[int], rest: list[int]) -> tuple[Any, ...]:
    """The shape of the broadcast index tensors, which is a part of the result's."""
    dims = e.sizes.dims(e.out)
    adjacent = axes == list(range(axes[0], axes[-1] + 1))
    start = axes[0] if adjacent else 0
    return dims[start : start + len(dims) - len(rest)]


def _stacked(e: Emitter, given: Sequence[Value], dims: tuple[Any, ...]) -> Value:
    """Index tensors as one ``[*dims, len(given)]``."""
    wide = [e.expand(e.cast(i, torch.int64), dims) for i in given]
    return e.op("Concat", *(e.unsqueeze(i, len(dims)) for i in wide), axis=len(dims))


def _masked(e: Emitter, x: Value, axes: list[int], given: Sequence[Value]) -> Value:
    """``x[mask]`` with one boolean mask over the leading axes."""
    if len(given) != 1 or axes[0] != 0:
        raise Unsupported("a boolean mask among other indices")
    return e.op("GatherND", x, nonzero(e, given[0]))


@lowers(aten.masked_select.default)
def masked_select(e: Emitter, x: Value, mask: Value) -> Value:
    raise_to = e.dims(x) if e.rank(x) >= e.rank(mask) else e.dims(mask)
    if e.dims(x) != e.dims(mask):
        x, mask = e.expand(x, raise_to), e.expand(mask, raise_to)
    return e.op("Compress", e.op("Reshape", x, [-1]), e.op("Reshape", mask, [-1]), axis=0)


@lowers(aten.nonzero.default)
def nonzero(e: Emitter, x: Value) -> Value:
    return e.op("Transpose", e.op("NonZero", e.cast(x, torch.bool)), perm=[1, 0])


@lowers(aten.one_hot.default)
def one_hot(e: Emitter, x: Value, num_classes: int = -1) -> Value:
    if num_classes < 0:
        raise Unsupported("one_hot without a number of classes")
    return e.op("OneHot", x, e.const(num_classes, torch.int64), e.const([0, 1], torch.int64))


@lowers(aten.scatter.src, aten.scatter.value)
def scatter(e: Emitter, x: Value, dim: int, index: Value, source: Any) -> Value:
    return _scatter(e, x, dim, index, source, None)


@lowers(aten.scatter_add.default)
def scatter_add(e: Emitter, x: Value, dim: int, index: Value, source: Value) -> Value:
    return _scatter(e, x, dim, index, source, "add")


_REDUCTIONS = {"sum": "add", "prod": "mul", "amax": "max", "amin": "min"}


@lowers(aten.scatter_reduce.two)
def scatter_reduce(
    e: Emitter, x: Value, dim: int, index: Value, source: Value, reduce: str,
    include_self: bool = True,
) -> Value:  # fmt: skip
    if reduce not in _REDUCTIONS or not include_self:
        raise Unsupported(f"scatter_reduce by {reduce!r}")
    return _scatter(e, x, dim, index, source, _REDUCTIONS[reduce])


def _scatter(
    e: Emitter, x: Value, dim: int, index: Value, source: Any, reduction: str | None
) -> Value:
    sizes = e.dims(index)
    source = e.tensor(source, e.out.dtype)
    if e.rank(source) == 0:
        source = e.expand(source, sizes)
    elif e.dims(source) != sizes:
        ends = e.sizes.shape_value(sizes)
        source = e.op("Slice", source, [0] * len(sizes), ends, list(range(len(sizes))))
    return e.op("ScatterElements", x, index, source, axis=dim, reduction=reduction)


@lowers(aten.index_put.default)
def index_put(
    e: Emitter, x: Value, indices: Sequence[Value | None], values: Value, accumulate: bool = False
) -> Value:
    axes = [axis for axis, i in enumerate(indices) if i is not None]
    given = [i for i in indices if i is not None]
    if e.dtype(given[0]) in (torch.bool, torch.uint8):
        return _masked_put(e, x, axes, given, values, accumulate)
    if axes != list(range(axes[0], axes[-1] + 1)):
        raise Unsupported("index_put at axes that are not adjacent")
    lead, known, wide = axes[0], e.dims(x), _broadcast(e, given)
    rest = [a for a in range(e.rank(x)) if a not in axes]
    # torch lays the values out as the index dimensions in the place of the indexed axes.
    layout = [*known[:lead], *wide, *known[axes[-1] + 1 :]]
    values = e.expand(e.cast(values, e.out.dtype), layout)
    inner = range(lead, lead + len(wide))
    values = e.transpose(values, [*inner, *(a for a in range(len(layout)) if a not in inner)])
    order = [*axes, *rest]
    written = e.op("ScatterND", e.transpose(x, order), _stacked(e, given, wide), values,
                   reduction="add" if accumulate else None)  # fmt: skip
    return e.transpose(written, [order.index(a) for a in range(len(order))])


def _masked_put(
    e: Emitter, x: Value, axes: list[int], given: Sequence[Value], values: Value, accumulate: bool
) -> Value:
    """``x[mask] = value`` for one mask over the leading axes and one value."""
    if axes != [0] or e.rank(values) or accumulate:
        raise Unsupported("index_put through a mask with other than one value")
    mask = e.reshape(given[0], [*e.dims(given[0]), *[1] * (e.rank(x) - e.rank(given[0]))])
    return e.op("Where", e.cast(mask, torch.bool), values, x)


def _broadcast(e: Emitter, given: Sequence[Value]) -> tuple[Any, ...]:
    """The common shape of index tensors."""
    rank = max(map(e.rank, given))
    dims: list[Any] = [1] * rank
    for value in given:
        for at, size in enumerate(e.dims(value), rank - e.rank(value)):
            dims[at] = size if dims[at] == 1 else dims[at]
    return tuple(dims)


@lowers(aten.slice_scatter.default)
def slice_scatter(
    e: Emitter, x: Value, source: Value, dim: int = 0, start: Any = None, end: Any = None,
    step: Any = 1,
) -> Value:  # fmt: skip
    if step != 1 or not isinstance(start or 0, int) or (start or 0) < 0:
        raise Unsupported("slice_scatter with a step or a computed start")
    first = start or 0
    last = first + e.dims(source)[dim]
    tail = e.op("Slice", x, e.sizes.shape_value([last]), [2**63 - 1], [dim])
    head = [e.op("Slice", x, [0], [first], [dim])] if first else []
    return e.op("Concat", *head, source, tail, axis=dim)


@lowers(aten.bucketize.Tensor)
def bucketize(
    e: Emitter, x: Value, boundaries: Value, out_int32: bool = False, right: bool = False
) -> Value:
    dtype = promoted(e, x, boundaries)
    point, edges = e.cast(e.unsqueeze(x, -1), dtype), e.cast(boundaries, dtype)
    below = e.op("LessOrEqual" if right else "Less", edges, point)
    return e.op("ReduceSum", e.cast(below, torch.int64), [-1], keepdims=0)


@lowers(aten.unfold.default)
def unfold(e: Emitter, x: Value, dimension: int, size: int, step: int) -> Value:
    """Windows of ``size`` every ``step``, the position within a window as the last axis."""
    axis, rank = dimension % e.rank(x), e.rank(x)
    count = e.sizes.dims(e.out)[axis]
    starts = e.op("Range", e.scalar(0), e.op("Squeeze", e.sizes.value(count), [0]), e.scalar(1))
    starts = e.op("Mul", starts, e.scalar(step), dims=(count,))
    places = e.op("Add", e.unsqueeze(starts, 1), e.const(list(range(size)), torch.int64))
    windows = e.op("Gather", x, places, axis=axis)
    return e.transpose(windows, [*range(axis + 1), *range(axis + 2, rank + 1), axis + 1])


@lowers(aten.tril.default)
def tril(e: Emitter, x: Value, diagonal: int = 0) -> Value:
    return _triangle(e, x, diagonal, upper=0)


@lowers(aten.triu.default)
def triu(e: Emitter, x: Value, diagonal: int = 0) -> Value:
    return _triangle(e, x, diagonal, upper=1)


def _triangle(e: Emitter, x: Value, diagonal: int, upper: int) -> Value:
    return e.op("Trilu", x, e.scalar(diagonal), upper=upper)
