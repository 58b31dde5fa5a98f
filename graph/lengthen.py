"""A longer sequence that the program runs as a whole: a prompt in front of every input.

Every input along the sequence is joined with rows for the prompt, and all that read the
input read the joined one; sizes, masks and positions follow by themselves. Of outputs
that have a row for each token the caller gets those of its own tokens. A soft prompt
(Lester et al., arXiv 2104.08691) takes the place of the prompt's rows after the table:

    [P; E[ids]],    P [by, dim] learned
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from .restrict import END
from .rewriter import Rewriter
from .sequence import Sequence
from .shapes import value
from .widen import reserve, widen_inputs

aten = torch.ops.aten


def lengthen(
    rw: Rewriter, sequence: Sequence, by: int, ids: fx.Node | int, soft: fx.Node | None = None
) -> None:
    """Puts ``by`` tokens before every input of the program, and takes their outputs away.

    Args:
        rw: rewrites the program.
        sequence: of the program.
        ids: ids of the prompt, ``[by]``, or one for all of a soft prompt's.
        soft: its embeddings ``[by, dim]``, in place of those of ``ids``.

    Raises:
        PreconditionError: for a program that does not run on another length.
    """
    reserve(rw, sequence.dim, by)
    axes = [[i for i, dim in enumerate(spec.shape) if dim == sequence.dim]
            for spec in rw.program.signature.outputs]  # fmt: skip
    along = {n: _axis(sequence, n) for n in sequence.lookups}
    readers = {n: list(n.users) for n in sequence.places if n.op == "placeholder"}
    for node, wide in widen_inputs(rw, sequence, by, ids).items():
        rw.redirect(node, wide.whole, readers[node])
    rw.refresh()
    for node, axis in along.items():
        if soft is not None:
            _soften(rw, node, axis, by, soft)
    _cut_outputs(rw, by, axes)


def _cut_outputs(rw: Rewriter, by: int, axes: list[list[int]]) -> None:
    """Takes the prompt's rows off every output, along its ``axes``."""
    output = rw.graph.output_node()
    leaves: Any = output.args[0]
    for leaf, cut in dict(zip(leaves, axes, strict=True)).items():
        own = leaf
        for axis in cut:
            with rw.after(own):
                own = rw.call(aten.slice.Tensor, own, axis, by, END)
        rw.redirect(leaf, own, [output])


def _axis(sequence: Sequence, lookup: fx.Node) -> int:
    """The axis of a lookup's result that is the sequence's."""
    return next(i for i, size in enumerate(value(lookup).shape) if sequence.is_length(size))


def _soften(rw: Rewriter, lookup: fx.Node, axis: int, by: int, soft: fx.Node) -> None:
    readers = list(lookup.users)
    with rw.after(lookup):
        batch = rw.call(aten.sym_size.int, lookup, 1 - axis)
        rows = rw.call(aten.unsqueeze.default, soft, 1 - axis)
        rows = rw.call(
            aten.expand.default, rows, [batch if i == 1 - axis else -1 for i in range(3)]
        )
        own = rw.call(aten.slice.Tensor, lookup, axis, by, END)
        joined = rw.call(aten.cat.default, [rows, own], axis)
    rw.redirect(lookup, joined, readers)
