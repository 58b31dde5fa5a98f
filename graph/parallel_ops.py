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

Who a process is, is said once (:mod:`ftc.graph.placement`); by default it is alone,
and then every operator here returns what it was given.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .placement import group, here, joined, own_part, put_part, summed
from .quantized_ops import row_linear, row_peak
from .sharding import share


@torch.library.custom_op("ftc::parallel_copy", mutates_args=())
def parallel_copy(x: Tensor) -> Tensor:
    """``x``; its gradient is summed over the ranks. In front of products split by rows."""
    return x.clone()


@torch.library.custom_op("ftc::parallel_reduce", mutates_args=())
def parallel_reduce(x: Tensor) -> Tensor:
    """The sum of ``x`` over the ranks; its gradient is ``x``'s. Behind products split by columns.

    A rank's ``x`` is a partial sum over its own columns.
    """
    return summed(x)


@torch.library.custom_op("ftc::parallel_gather", mutates_args=())
def parallel_gather(x: Tensor, axis: int, length: int) -> Tensor:
    """The ranks' parts joined along ``axis`` to ``length``; a rank's gradient is its own part."""
    size = here().size
    if size == 1:
        return x.clone()
    spans = [share(length, rank, size) for rank in range(size)]
    return torch.cat(joined(x, axis, [stop - start for start, stop in spans]), axis)


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
    return summed(put_part(x, axis, segments, blocks))


@torch.library.custom_op("ftc::parallel_rows", mutates_args=())
def parallel_rows(ids: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Where ``ids`` are in this rank's part of a table, and which of them are.

    Args:
        ids: integers in ``[0, rows)``.
        rows: of the whole table.

    Returns:
        Rows of the part, 0 for what others hold, like ``ids``; 1 or 0, float32, ``[..., 1]``.
    """
    start, stop = share(rows, here().rank, here().size)
    own = (ids >= start) & (ids < stop)
    return torch.where(own, ids - start, 0), own.unsqueeze(-1).to(torch.float32)


@torch.library.custom_op("ftc::parallel_peak", mutates_args=())
def parallel_peak(x: Tensor) -> Tensor:
    """Largest magnitude of each row ``[..., 1]`` whose parts the ranks hold; has no gradient."""
    peak = row_peak(x)
    if here().size > 1:
        dist.all_reduce(peak, dist.ReduceOp.MAX, group=group())
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
    me = here()
    spans = [share(n, me.rank, me.size, b) for n, b in zip(segments, blocks, strict=True)]
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
