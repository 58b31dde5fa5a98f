"""A longer sequence: values of places as they would be with more tokens in front.

For a program over ``s`` tokens, :class:`Widened` gives the value that any place
(:mod:`ftc.graph.sequence`) would have over ``by + s`` tokens: the same nodes once
more, on widened inputs, with ``by`` added to every size that is the length. Along the
axes that are asked for it keeps the rows of the caller's tokens only:

    rows of positions ``by .. by + s``      widened.take(angles, {1})
    queries of the mask, all its keys       widened.take(mask, {2})

The rows are cut as near to the inputs as possible (:mod:`ftc.graph.restrict`), and a
value that comes out the same is not computed again. ``by`` is a number, or a node that
yields one (the length of a cache).
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from .cache_inputs import POSITIONS
from .cost import operator_name
from .errors import PreconditionError
from .provenance import describe
from .restrict import END, Axes, restrict
from .rewriter import Rewriter
from .sequence import Sequence, inputs
from .shapes import value
from .signature import InputSpec

aten = torch.ops.aten
_RESHAPING = frozenset({"aten.view", "aten.reshape", "aten._unsafe_view", "aten.flatten"})


@dataclass(frozen=True, slots=True)
class WideInput:
    """An input of a longer sequence.

    Attributes:
        whole: its values for all tokens, ``[batch, by + length]``.
        own: its values for the caller's tokens, ``[batch, length]``.
    """

    whole: fx.Node
    own: fx.Node


def head(graph: fx.Graph) -> fx.Node:
    """The first node that computes: what is inserted before it can read every input."""
    first: fx.Node = next(n for n in graph.nodes if n.op not in ("placeholder", "get_attr"))
    return first


def widen_inputs(
    rw: Rewriter,
    sequence: Sequence,
    by: fx.Node | int,
    ids: fx.Node | int,
    mask: fx.Node | None = None,
) -> dict[fx.Node, WideInput]:
    """Every input along the sequence with ``by`` tokens in front.

    They may be seen (a mask of 1), stand at positions 0 to ``by - 1``, and have the
    lowest legal value of any other input (token type 0).

    Args:
        by: how many tokens, or a node at the graph's head that yields their number; the
            caller then counts positions with them.
        ids: their ids, ``[by]``, or one id for all.
        mask: which of them may be seen, ``[batch, by]``; None where all may.

    Raises:
        PreconditionError: for an input along the sequence that is no ``[batch, length]``.
    """
    made: dict[fx.Node, WideInput] = {}
    given = isinstance(by, fx.Node)
    with rw.after(by) if isinstance(by, fx.Node) else rw.at(head(rw.graph)):
        batch = rw.call(aten.sym_size.int, sequence.tokens, 0)
        for node, spec in inputs(rw.program):
            if node in sequence.places:
                _check(rw, node, spec)
                front: Any = ids if node is sequence.tokens else _front(spec, by, rw)
                if mask is not None and spec.role == "mask":
                    rows = mask
                elif isinstance(front, int):
                    rows = rw.call(aten.full.default, [batch, by], front, dtype=spec.dtype)
                else:
                    rows = rw.call(aten.expand.default, front, [batch, by])
                at = spec.name == POSITIONS
                own = rw.call(aten.add.Tensor, node, by) if at and not given else node
                made[node] = WideInput(rw.call(aten.cat.default, [rows, own], 1), own)
    return made


def _front(spec: InputSpec, by: fx.Node | int, rw: Rewriter) -> fx.Node | int:
    if spec.name == POSITIONS:
        return rw.call(aten.arange.default, by, dtype=spec.dtype)
    return 1 if spec.role == "mask" else spec.low


def _check(rw: Rewriter, node: fx.Node, spec: InputSpec) -> None:
    if len(spec.shape) != 2 or (spec.dtype.is_floating_point and spec.role != "mask"):
        raise PreconditionError(
            f"{rw.made_by}: the input {spec.name} has a sequence that cannot be lengthened",
            where=describe(node),
            fix="capture the model with inputs of [batch, sequence] alone",
        )


def reserve(rw: Rewriter, dim: str, count: int) -> None:
    """Lowers the longest legal sequence by ``count`` tokens, where there is one.

    Raises:
        PreconditionError: when nothing is left for the caller.
    """
    signature = rw.program.signature
    limit = signature.limits.get(dim)
    if limit is None:
        return
    if limit <= count:
        raise PreconditionError(
            f"{rw.made_by}: {count} tokens in front, and the model reads {limit} in all",
            fix=f"use fewer than {limit}",
        )
    limits = {**signature.limits, dim: limit - count}
    rw.set_signature(replace(signature, limits=limits))


class Widened:
    """Places of a program over a sequence that is ``by`` tokens longer in front.

    Args:
        rw: rewrites the program; copies of nodes go beside the originals.
        sequence: of the program.
        by: how many tokens, or a node that yields their number.
        wide: the longer inputs.
    """

    def __init__(
        self,
        rw: Rewriter,
        sequence: Sequence,
        by: fx.Node | int,
        wide: Mapping[fx.Node, WideInput],
    ) -> None:
        self.sequence, self.by = sequence, by
        self._rw, self._wide = rw, wide
        self._made: dict[tuple[fx.Node, Axes], fx.Node] = {}

    def take(self, node: fx.Node, own: Axes = frozenset()) -> fx.Node:
        """The value of a place over the longer sequence.

        Args:
            node: a place; any other node is returned as it is.
            own: axes along which only the caller's tokens are kept.

        Raises:
            PreconditionError: for an axis that is not the sequence's length itself.
        """
        if node not in self.sequence.places:
            return node
        axes = self.sequence.axes(node) & own
        if (node, axes) not in self._made:
            self._made[node, axes] = self._make(node, axes)
        return self._made[node, axes]

    def own(self, node: fx.Node) -> fx.Node:
        """The value of a place for the caller's tokens alone, along every axis.

        A value without such an axis (how many tokens there are, for a mean over them)
        is left: it counts the caller's tokens.
        """
        axes = self.sequence.axes(node)
        return self.take(node, axes) if axes else node

    def _make(self, node: fx.Node, own: Axes) -> fx.Node:
        if node.op == "placeholder":
            return self._wide[node].own if own else self._wide[node].whole
        if operator_name(node) == "aten.sym_size" and self._is_foreign(node):
            return self._longer(node)
        if not own:
            return self._copy(node, fx.node.map_arg(node.args, self.take))
        if own == self.sequence.axes(node) and operator_name(node) in _RESHAPING:
            return self._copy(node, (self.own(node.args[0]), *node.args[1:]))  # type: ignore[arg-type]
        arguments = restrict(node, own, self.take)
        return self._cut(node, own) if arguments is None else self._copy(node, arguments)

    def _is_foreign(self, size: fx.Node) -> bool:
        """Whether a size is read off a value that has no longer form: the stream's, or an input."""
        source = size.args[0]
        return source not in self.sequence.places or self.sequence.is_length(value(size))

    def _longer(self, size: fx.Node) -> fx.Node:
        if not self.sequence.is_length(value(size)):
            raise self._refusal(size)
        with self._rw.after(size):
            return self._rw.call(operator.add, size, self.by)

    def _copy(self, node: fx.Node, args: Any) -> fx.Node:
        kwargs = fx.node.map_arg(node.kwargs, self.take)
        if args == node.args and kwargs == node.kwargs:
            return node
        assert callable(node.target)
        with self._rw.after(node):
            return self._rw.call(node.target, *args, **kwargs)

    def _cut(self, node: fx.Node, own: Axes) -> fx.Node:
        lengths = [self.sequence.is_length(value(node).shape[axis]) for axis in own]
        if operator_name(node) == "aten.arange" and not any(lengths):
            return node  # numbers the caller's tokens, and is no position in the sequence
        if not all(lengths):
            raise self._refusal(node)
        cut = self.take(node)
        for axis in sorted(own):
            with self._rw.after(cut):
                cut = self._rw.call(aten.slice.Tensor, cut, axis, self.by, END)
        return cut

    def _refusal(self, node: fx.Node) -> PreconditionError:
        shape = list(getattr(value(node), "shape", [value(node)]))
        return PreconditionError(
            f"{self._rw.made_by}: a value of size {shape} depends on the sequence in a way that "
            "does not say what it would be for a longer one",
            where=describe(node),
        )
