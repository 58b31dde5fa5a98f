"""Which part of each tensor a rank holds, when a program's products are split over ranks.

A split program is *one* graph for every rank and for none: run with whole tensors
in one process it computes what it computed before; run with each rank's parts and
the collectives of :mod:`ftc.graph.parallel_ops` it computes the same on all of
them. Nothing in it names a rank or a local size.

What a rank holds is a :class:`Shard`, kept on the node that reads the tensor
(``node.meta["custom"]["shard"]``, which survives saving). Tensors without one are
whole everywhere, and so are their gradients: equal on every rank. An engine needs

- :func:`layout`, the shard of each name;
- :func:`part` and :func:`whole`, between a whole tensor and the parts;
- :func:`shard_program`, the program of one rank;
- :func:`ftc.graph.placement.gather_whole`, the whole of a part, over processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx, nn

from . import shapes
from .errors import FtcError, PreconditionError
from .program import Program, build_module

CUT = "cut over ranks"
"""The fact that a program has been cut."""
_KEY = "shard"


@dataclass(frozen=True, slots=True)
class Shard:
    """How one tensor is cut.

    Attributes:
        axis: which is cut.
        segments: lengths that the axis is joined from (queries, keys and values of a
            fused product), each of which every rank holds its share of:
            rows ``l r // n`` to ``l (r + 1) // n`` of a segment of ``l`` rows.
        ranks: how many the cut was made for; any divisor will do too.
    """

    axis: int
    segments: tuple[int, ...]
    ranks: int


def layout(program: Program) -> dict[str, Shard]:
    """The shard of every parameter and buffer that is cut, by name; others are whole."""
    found = {}
    for node in program.graph.nodes:
        if node.op == "get_attr" and (given := node.meta.get("custom", {}).get(_KEY)):
            found[str(node.target)] = Shard(
                int(given["axis"]), tuple(map(int, given["segments"])), int(given["ranks"])
            )
    return found


def set_shard(reader: fx.Node, shard: Shard) -> None:
    """Says how the tensor that ``reader`` reads is cut."""
    content = {"axis": shard.axis, "segments": list(shard.segments), "ranks": shard.ranks}
    reader.meta["custom"] = {**reader.meta.get("custom", {}), _KEY: content}


def share(length: int, rank: int, size: int, blocks: int | None = None) -> tuple[int, int]:
    """``(start, stop)`` of a rank's part of ``length`` rows.

    Args:
        blocks: equal blocks that the rows consist of; of fewer than there are ranks,
            each is held whole by several. By default any row can be the first of a part.
    """
    if blocks is None or blocks >= size:
        return length * rank // size, length * (rank + 1) // size
    width, mine = length // blocks, rank * blocks // size
    return mine * width, (mine + 1) * width


def part(tensor: Tensor, shard: Shard, rank: int, size: int) -> Tensor:
    """What ``rank`` of ``size`` ranks holds of a whole tensor: a contiguous copy.

    Raises:
        PreconditionError: for a tensor or a number of ranks that the shard is not for.
    """
    if tensor.shape[shard.axis] != sum(shard.segments):
        raise PreconditionError(
            f"a tensor of {list(tensor.shape)} is not cut along axis {shard.axis} "
            f"into {list(shard.segments)}",
            fix="give the whole tensor",
        )
    _check_size(shard, size)
    pieces, at = [], 0
    for length in shard.segments:
        start, stop = share(length, rank, size)
        pieces.append(tensor.narrow(shard.axis, at + start, stop - start))
        at += length
    if len(pieces) > 1:
        return torch.cat(pieces, shard.axis)
    return pieces[0].clone(memory_format=torch.contiguous_format)


def whole(parts: Sequence[Tensor], shard: Shard) -> Tensor:
    """The tensor that ``parts`` of all ranks, in order, are parts of; inverse of :func:`part`."""
    size = len(parts)
    pieces = []
    begin = [0] * size
    for length in shard.segments:
        for rank, own in enumerate(parts):
            start, stop = share(length, rank, size)
            pieces.append(own.narrow(shard.axis, begin[rank], stop - start))
            begin[rank] += stop - start
    return torch.cat(pieces, shard.axis)


def shard_program(program: Program, rank: int, size: int) -> Program:
    """The program of one rank: the same graph and names, its own parts of the tensors.

    It runs inside :func:`ftc.graph.placement.placed`, in a process group of ``size``.
    Its parts are copies, so that the whole tensors can go; what is not cut is shared
    with ``program``.

    Args:
        program: after ``tensor_parallel``, with whole tensors.
        rank, size: in the group that shares the program.

    Raises:
        PreconditionError: where it was not split, or not for this many ranks, or was
            rewritten afterwards in a way that its parts do not fit.
    """
    from .placement import Placement, placed

    shards = layout(program)
    if not shards and size > 1:
        raise PreconditionError(
            "this program is not split over ranks", fix=f"run tensor_parallel{{size={size}}} on it"
        )
    tensors: dict[str, Tensor] = dict(program.tensors())
    for name, old in list(tensors.items()):
        own = old.detach()
        if name in shards:
            own = part(own, shards[name], rank, size)
        learns = isinstance(old, nn.Parameter)
        tensors[name] = nn.Parameter(own, requires_grad=old.requires_grad) if learns else own
    graph, copied = fx.Graph(), dict[fx.Node, fx.Node]()
    graph.output(graph.graph_copy(program.graph, copied))
    for old_node, new in copied.items():
        new.meta = {key: kept for key, kept in old_node.meta.items() if key != shapes.VAL}
    made = replace(program, module=build_module(tensors, graph))
    if not _rewritten_since(program):
        return made  # its shapes were proven by the pass
    try:
        with placed(Placement(rank, size)):
            shapes.propagate(made.module, made.signature)
    except FtcError as error:
        raise PreconditionError(
            f"the parts of this program do not fit together on rank {rank} of {size}: {error.what}",
            where=error.where,
            fix="run tensor_parallel last",
        ) from error
    return made


def _rewritten_since(program: Program) -> bool:
    """Whether a pass changed the graph after it was cut."""
    cut = [i for i, record in enumerate(program.history) if CUT in record.provides]
    later = program.history[cut[-1] + 1 :] if cut else program.history
    return any(record.modified and record.effect != "annotation" for record in later)


def _check_size(shard: Shard, size: int) -> None:
    if size < 1 or shard.ranks % size:
        raise PreconditionError(
            f"the program was split for {shard.ranks} ranks, and there are {size}",
            fix=f"run tensor_parallel{{size={size}}} on the program as it was before",
        )
