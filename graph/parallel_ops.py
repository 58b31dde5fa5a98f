"""Collectives of a program whose products are split over ranks, as operators with gradients.

Megatron-LM (Shoeybi et al., arXiv 1909.08053, section 3) needs two, ``f`` and ``g``:

==================  =====================  ================================
operator            forward                gradient
==================  =====================  ================================
``parallel_copy``   the value itself       sum over the ranks
``parallel_reduce`` sum over the ranks     the gradient itself
``parallel_gather`` parts joined           its own part
``parallel_part``   its own part           parts of all ranks put together
==================  =====================  ================================

Behind each of them a value is whole and equal on all ranks, or is one rank's own
share, and a gradient is so too: the gradient of every weight that is whole comes
out whole, on every rank. (An all-reduce that is differentiated as an all-reduce
gives the right loss and wrong gradients.)

Who a process is, is said once (:func:`place`, :func:`placed`); by default it is
alone, and then every operator here returns what it was given.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .quantized_ops import row_linear, row_peak
from .sharding import share


@dataclass(frozen=True, slots=True)
class Placement:
    """Which of the ranks that share a program this process is.

    Attributes:
        rank, size: in ``group``.
        group: the process group that sums and joins run in; None with more than one
            rank for shapes alone.
    """

    rank: int = 0
    size: int = 1
    group: Any = None


_here = Placement()


def here() -> Placement:
    """The placement of this process."""
    return _here


def place(placement: Placement) -> None:
    """Says which rank this process is, from here on; one program at a time is shared."""
    global _here
    _here = placement


@contextmanager
def placed(placement: Placement) -> Iterator[None]:
    """Within it this process is ``placement``."""
    before = here()
    place(placement)
    try:
        yield
    finally:
        place(before)


def own_part(x: Tensor, axis: int, segments: Sequence[int], blocks: Sequence[int]) -> Tensor:
    """This rank's part of a whole value, a view or a copy (see :func:`parallel_part`)."""
    if _here.size == 1:
        return x
    parts, at = [], 0
    for length, count in zip(segments, blocks, strict=True):
        start, stop = share(length, _here.rank, _here.size, count)
        parts.append(x.narrow(axis, at + start, stop - start))
        at += length
    return parts[0] if len(parts) == 1 else torch.cat(parts, axis)


def put_part(x: Tensor, axis: int, segments: Sequence[int], blocks: Sequence[int]) -> Tensor:
    """Zeros of the whole size with ``x`` where this rank's part is."""
    if _here.size == 1:
        return x
    shape = list(x.shape)
    shape[axis] = sum(segments)
    made = x.new_zeros(shape)
    at = begin = 0
    for length, count in zip(segments, blocks, strict=True):
        start, stop = share(length, _here.rank, _here.size, count)
        own = x.narrow(axis, begin, stop - start)
        made.narrow(axis, at + start, stop - start).copy_(own)
        at, begin = at + length, begin + stop - start
    return made


def _summed(x: Tensor) -> Tensor:
    """The sum over the ranks, in new memory."""
    made = x.clone(memory_format=torch.contiguous_format)
    if _here.size > 1:
        dist.all_reduce(made, group=_group())
    return made


def _group() -> Any:
    assert _here.group is not None, "several ranks without a process group"
    return _here.group


@torch.library.custom_op("ftc::parallel_copy", mutates_args=())
def parallel_copy(x: Tensor) -> Tensor:
    """``x``; its gradient is summed over the ranks. In front of products split by rows."""
    return x.clone()


@torch.library.custom_op("ftc::parallel_reduce", mutates_args=())
def parallel_reduce(x: Tensor) -> Tensor:
    """The sum of ``x`` over the ranks; its gradient is ``x``'s. Behind products split by columns.

    A rank's ``x`` is a partial sum over its own columns.
    """
    return _summed(x)


@torch.library.custom_op("ftc::parallel_gather", mutates_args=())
def parallel_gather(x: Tensor, axis: int, length: int) -> Tensor:
    """The ranks' parts joined along ``axis`` to ``length``; a rank's gradient is its own part."""
    if _here.size == 1:
        return x.clone()
    sizes = [share(length, r, _here.size) for r in range(_here.size)]
    widest = max(stop - start for start, stop in sizes)
    shape = list(x.shape)
    shape[axis] = widest - x.shape[axis]
    padded = torch.cat([x, x.new_zeros(shape)], axis) if shape[axis] else x.contiguous()
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded, group=_group())
    own = [p.narrow(axis, 0, stop - start) for p, (start, stop) in zip(parts, sizes, strict=True)]
    return torch.cat(own, axis)


@torch.library.custom_op("ftc::parallel_part", mutates_args=())
def parallel_part(x: Tensor, axis: int, segments: list[int], blocks: list[int]) -> Tensor:
    """This rank's part of a whole value.

    Args:
        x: equal on all ranks.
        axis: which is cut.
        segments: lengths it is joined from, each of which a part is taken of.
        blocks: equal blocks (heads) in each segment; fewer than there are ranks, and
            several ranks have the same one: their gradients are summed.
    """
    own = own_part(x, axis, segments, blocks)
    return own.clone(memory_format=torch.contiguous_format)


@torch.library.custom_op("ftc::parallel_place", mutates_args=())
def parallel_place(x: Tensor, axis: int, segments: list[int], blocks: list[int]) -> Tensor:
    """The parts of all ranks where they belong, those of one block summed: the transpose of
    :func:`parallel_part`."""
    return _summed(put_part(x, axis, segments, blocks))


@torch.library.custom_op("ftc::parallel_rows", mutates_args=())
def parallel_rows(ids: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Where ``ids`` are in this rank's part of a table, and which of them are.

    Args:
        ids: integers in ``[0, rows)``.
        rows: of the whole table.

    Returns:
        Rows of the part, 0 for what others hold, like ``ids``; 1 or 0, float32, ``[..., 1]``.
    """
    start, stop = share(rows, _here.rank, _here.size)
    own = (ids >= start) & (ids < stop)
    return torch.where(own, ids - start, 0), own.unsqueeze(-1).to(torch.float32)


@torch.library.custom_op("ftc::parallel_peak", mutates_args=())
def parallel_peak(x: Tensor) -> Tensor:
    """Largest magnitude of each row ``[..., 1]`` whose parts the ranks hold; has no gradient."""
    peak = row_peak(x)
    if _here.size > 1:
        dist.all_reduce(peak, dist.ReduceOp.MAX, group=_group())
    return peak


@torch.library.custom_op("ftc::quantized_linear_at", mutates_args=())
def quantized_linear_at(
    x: Tensor, peak: Tensor, data: Tensor, scale: Tensor, zero_point: Tensor | None,
    bits: int, group_size: int,
) -> Tensor:  # fmt: skip
    """``quantized_linear`` with ``activation="row"`` where each row's peak is given.

    Args:
        x: float ``[..., in]``.
        peak: ``[..., 1]``, no less than any magnitude in the row.
        data, scale, zero_point, bits, group_size: of ``W`` ``[out, in]``.
    """
    return row_linear(x, peak, data, scale, zero_point, bits)


@parallel_copy.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@parallel_reduce.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@parallel_gather.register_fake
def _(x: Tensor, axis: int, length: int) -> Tensor:
    shape = list(x.shape)
    shape[axis] = length
    return x.new_empty(shape)


@parallel_part.register_fake
def _(x: Tensor, axis: int, segments: list[int], blocks: list[int]) -> Tensor:
    shape = list(x.shape)
    spans = [share(n, _here.rank, _here.size, b) for n, b in zip(segments, blocks, strict=True)]
    shape[axis] = sum(stop - start for start, stop in spans)
    return x.new_empty(shape)


@parallel_place.register_fake
def _(x: Tensor, axis: int, segments: list[int], blocks: list[int]) -> Tensor:
    shape = list(x.shape)
    shape[axis] = sum(segments)
    return x.new_empty(shape)


@parallel_rows.register_fake
def _(ids: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    return torch.empty_like(ids), ids.new_empty((*ids.shape, 1), dtype=torch.float32)


@parallel_peak.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], 1))


@quantized_linear_at.register_fake
def _(
    x: Tensor, peak: Tensor, data: Tensor, scale: Tensor, zero_point: Tensor | None,
    bits: int, group_size: int,
) -> Tensor:  # fmt: skip
    return x.new_empty((*x.shape[:-1], data.shape[0]))


def _keep_axis(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.axis, ctx.length = inputs[1], inputs[2]


def _keep_cut(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.cut = inputs[1:]


def _keep_codes(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[2:5])
    ctx.how, ctx.dtype = inputs[5:], inputs[0].dtype


def _into_codes(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    weight = torch.ops.ftc.dequantize(*ctx.saved_tensors, *ctx.how).to(ctx.dtype)
    return grad @ weight, None, None, None, None, None, None


parallel_copy.register_autograd(lambda ctx, grad: torch.ops.ftc.parallel_reduce(grad))
parallel_reduce.register_autograd(lambda ctx, grad: grad)
parallel_peak.register_autograd(lambda ctx, grad: None)
parallel_gather.register_autograd(
    lambda ctx, grad: (
        torch.ops.ftc.parallel_part(grad, ctx.axis, [ctx.length], [ctx.length]), None, None),
    setup_context=_keep_axis,
)  # fmt: skip
parallel_part.register_autograd(
    lambda ctx, grad: (torch.ops.ftc.parallel_place(grad, *ctx.cut), None, None, None),
    setup_context=_keep_cut,
)
quantized_linear_at.register_autograd(_into_codes, setup_context=_keep_codes)
