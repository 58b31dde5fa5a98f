"""All ranks of a split program in one process, node by node: what several processes would compute.

Each operator of :mod:`ftc.graph.parallel_ops` that talks to other ranks sees the
values of all of them here, and so do its gradients. A pass proves by it what it
split, without starting a process; so can a test.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from . import parallel_ops  # noqa: F401  (registers torch.ops.ftc)
from .placement import Placement, own_part, placed, put_part
from .program import Program
from .quantized_ops import row_peak
from .sharding import shard_program, share

ops = torch.ops.ftc
Values = tuple[Tensor, ...]


def run_ranks(
    programs: Sequence[Program], inputs: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], ...]:
    """Outputs of every rank.

    Args:
        programs: of all ranks, in order (:func:`ftc.graph.sharding.shard_program`).
        inputs: the same for all.
    """
    size = len(programs)
    flat = programs[0].signature.bind(inputs)
    known: list[dict[fx.Node, Any]] = [{} for _ in programs]
    for nodes in zip(*(program.graph.nodes for program in programs), strict=True):
        first = nodes[0]
        if first.op == "placeholder":
            given = flat[len(known[0])]
            results: Sequence[Any] = [given] * size
        elif first.op == "get_attr":
            results = [p.tensor(str(n.target)) for p, n in zip(programs, nodes, strict=True)]
        else:
            found = [fx.node.map_arg((n.args, n.kwargs), k.__getitem__)
                     for n, k in zip(nodes, known, strict=True)]  # fmt: skip
            if first.op == "output":
                break
            results = _call(first.target, found)
        for node, values, result in zip(nodes, known, results, strict=True):
            values[node] = result
    names = programs[0].signature.output_names
    return tuple(dict(zip(names, args[0], strict=True)) for args, _ in found)


def run_split(
    program: Program, size: int, inputs: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], ...]:
    """Outputs of every one of ``size`` ranks of a program with whole tensors, without gradients."""
    parts = [shard_program(program, rank, size) for rank in range(size)]
    with torch.no_grad():
        return run_ranks(parts, inputs)


def _call(target: Any, calls: Sequence[tuple[tuple[Any, ...], dict[str, Any]]]) -> Sequence[Any]:
    size = len(calls)
    if (together := _TOGETHER.get(target)) is not None:
        values = [args[0] for args, _ in calls]
        made: Sequence[Any] = together.apply(size, calls[0][0][1:], *values)  # type: ignore[no-untyped-call]
        return made
    results = []
    for rank, (args, kwargs) in enumerate(calls):
        with placed(Placement(rank, size)):
            results.append(target(*args, **kwargs))
    return results


def _sums(values: Sequence[Tensor]) -> Values:
    total = torch.stack(tuple(values)).sum(0)
    return tuple(total.clone() for _ in values)


def _each(size: int, function: Callable[[int], Tensor]) -> Values:
    made = []
    for rank in range(size):
        with placed(Placement(rank, size)):
            made.append(function(rank))
    return tuple(made)


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, size: int, how: Any, *values: Tensor) -> Values:
        return tuple(v.clone() for v in values)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return None, None, *_sums(grads)


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, size: int, how: Any, *values: Tensor) -> Values:
        return _sums(values)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return None, None, *grads


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, size: int, how: Any, *values: Tensor) -> Values:
        ctx.size, (ctx.axis, ctx.length) = size, how
        joined = torch.cat(values, ctx.axis)
        return tuple(joined.clone() for _ in values)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        spans = [share(ctx.length, rank, ctx.size) for rank in range(ctx.size)]
        pairs = zip(grads, spans, strict=True)
        return None, None, *(g.narrow(ctx.axis, a, b - a) for g, (a, b) in pairs)


class _Part(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, size: int, how: Any, *values: Tensor) -> Values:
        ctx.size, ctx.how = size, how
        return _each(size, lambda rank: own_part(values[rank], *how).clone())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return None, None, *_sums(_each(ctx.size, lambda rank: put_part(grads[rank], *ctx.how)))


class _Peak(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, size: int, how: Any, *values: Tensor) -> Values:
        peak = torch.stack([row_peak(v) for v in values]).amax(0)
        made = tuple(peak.clone() for _ in values)
        ctx.mark_non_differentiable(*made)
        return made

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return (None, None, *(None for _ in grads))


_TOGETHER: dict[Any, type[torch.autograd.Function]] = {
    ops.parallel_copy.default: _Copy,
    ops.parallel_reduce.default: _Reduce,
    ops.parallel_gather.default: _Gather,
    ops.parallel_part.default: _Part,
    ops.parallel_peak.default: _Peak,
}
