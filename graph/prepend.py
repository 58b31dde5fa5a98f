"""More keys and values in front of those that an attention computes.

    y = softmax(scale * q [K_0; K]^T + [M_0, M]) [V_0; V]

``K_0, V_0`` are ``by`` rows that a parameter (a prefix), a constant (a folded prompt)
or an input (a cache) holds. The queries are those of the caller's tokens, so all work
but the attention itself stays what it was. Their positions go on after the rows in
front, as after a prompt of ``by`` tokens: learned and rotary positions are shifted, and
the mask has the rows of the queries and the columns of all keys.

With ``visible`` every query sees all of ``K_0``; without, it sees of them what the model
lets it see of tokens before it, which differs where attention reaches back only so far
(a sliding window).
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from .cost import argument, operator_name
from .errors import PreconditionError
from .provenance import describe
from .restrict import END, Axes, aligned, rank
from .rewriter import Rewriter
from .shapes import value
from .states import States, find_states
from .structure.flow import Flow, RawCore
from .widen import Widened

aten = torch.ops.aten
_SHAPING = frozenset({"aten.view", "aten.reshape", "aten.expand", "aten._unsafe_view"})


class Prepending:
    """Puts keys and values in front at attention cores, one core after the other.

    Call :meth:`core` for each of ``flow.cores``, then :meth:`finish` once.

    Args:
        rw: rewrites the program.
        flow: of the program, found before.
        by: how many keys, or a node that yields their number.
        widened: places over the longer sequence; None for a program without a sequence
            (an image), whose positions stay.
        visible: whether every query sees every key in front.
    """

    def __init__(
        self,
        rw: Rewriter,
        flow: Flow,
        by: fx.Node | int,
        widened: Widened | None,
        *,
        visible: bool,
    ) -> None:
        self._rw, self._flow, self._by = rw, flow, by
        self._widened, self._visible = widened, visible
        self._masks: dict[fx.Node, fx.Node] = {}
        self._causal: fx.Node | None = None
        self._inner: set[fx.Node] = set()

    def core(self, raw: RawCore, key: fx.Node, value: fx.Node) -> tuple[fx.Node, fx.Node]:
        """Gives one core more keys and values.

        Args:
            raw: the core.
            key, value: what goes in front, ``[kv_heads, by, dim]`` or with a batch.

        Returns:
            All keys and all values, ``[batch, kv_heads, by + length, dim]``.

        Raises:
            PreconditionError: for a core that cannot be rewritten.
        """
        keys, values = find_states(raw)
        with self._rw.at(raw.node):
            all_keys, all_values = self._joined(key, keys), self._joined(value, values)
            k, v = self._again(keys, all_keys), self._again(values, all_values)
        new = self._fused(raw, k, v) if raw.softmax is None else self._written_out(raw, k, v)
        self._rw.replace(raw.node, new)
        return all_keys, all_values

    def finish(self) -> None:
        """Shifts the positions of the caller's tokens."""
        if self._widened is None:
            return
        for node in self._rw.graph.nodes:
            if node in self._widened.sequence.stream and node not in self._inner:
                own = self._widened.own
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), _tensors(own))
                if args != node.args or kwargs != node.kwargs:
                    self._rw.set_args(node, *args, **kwargs)

    def _joined(self, front: fx.Node, states: States) -> fx.Node:
        """``front`` and the states themselves, along the length."""
        if rank(front) < rank(states.node) or value(front).shape[0] == 1:
            sizes = [self._size(states.node, 0), *[-1] * (rank(states.node) - 1)]
            front = self._rw.call(aten.expand.default, front, sizes)
        return self._rw.call(aten.cat.default, [front, states.node], -2)

    def _again(self, states: States, joined: fx.Node) -> fx.Node:
        """The steps that lead from the states to the core, done on all of them."""
        made = {states.node: joined}
        for step in states.steps:
            args = fx.node.map_arg(step.args, lambda a: made.get(a) or self._take(a))
            made[step] = self._rw.call(step.target, *args, **step.kwargs)  # type: ignore[arg-type]
            joined = made[step]
        return joined

    def _fused(self, raw: RawCore, k: fx.Node, v: fx.Node) -> fx.Node:
        """The fused operator; a causal flag becomes a mask, which counts from the first key."""
        node = raw.node
        mask = self._mask(raw.mask) if raw.mask else None
        with self._rw.at(node):
            if argument(node, "is_causal"):
                mask = self._causal_mask(raw.q)
            options = {n: x for n, x in node.kwargs.items() if n not in ("attn_mask", "is_causal")}
            dropout = node.args[4:5]  # where graph.mode looks for it
            return self._rw.call(node.target, raw.q, k, v, mask, *dropout, **options)  # type: ignore[arg-type]

    def _written_out(self, raw: RawCore, k: fx.Node, v: fx.Node) -> fx.Node:
        """Everything from the scores to the result once more, with longer rows."""
        assert raw.softmax is not None
        inner = self._between(raw)
        self._inner |= {*inner, raw.node}
        made = {raw.k: k, raw.v: v}
        if raw.mask:
            made[raw.mask] = self._mask(raw.mask)
        whole = rank(raw.softmax)
        columns: Any = raw.softmax.args[1]

        def longer(a: fx.Node) -> fx.Node:
            own = frozenset(range(rank(a))) - aligned(frozenset({columns % whole}), whole, rank(a))
            return made.get(a) or (self._take(a, own) if rank(a) else a)

        for node in (*inner, raw.node):
            self._check_shaping(node)
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), longer)
            with self._rw.at(raw.node):
                made[node] = self._rw.call(node.target, *args, **kwargs)  # type: ignore[arg-type]
        return made[raw.node]

    def _between(self, raw: RawCore) -> list[fx.Node]:
        """The nodes from the scores to the result, which is left out, in order."""
        order = self._flow.order
        nodes = list(order)[min(order[s] for s in raw.scores) : order[raw.node]]
        after = set(raw.scores)
        for node in nodes:
            if not after.isdisjoint(node.all_input_nodes):
                after.add(node)
        before = set(raw.node.all_input_nodes)
        for node in reversed(nodes):
            if node in before:
                before.update(node.all_input_nodes)
        return [node for node in nodes if node in after and node in before]

    def _check_shaping(self, node: fx.Node) -> None:
        """Refuses a reshape of scores: of two equal lengths it does not say which is the keys'."""
        if self._widened is None or operator_name(node) not in _SHAPING:
            return
        sizes = [value(a) for a in node.all_input_nodes if not rank(a)]
        if any(map(self._widened.sequence.depends, sizes)):
            raise PreconditionError(
                f"{self._rw.made_by}: the scores of this attention are reshaped by the length",
                where=describe(node),
                fix="capture the model with attn_implementation='sdpa'",
            )

    def _mask(self, mask: fx.Node) -> fx.Node:
        """The mask of the caller's queries over all keys."""
        if mask not in self._masks:
            self._masks[mask] = self._longer_mask(mask)
        return self._masks[mask]

    def _longer_mask(self, mask: fx.Node) -> fx.Node:
        fake, last = value(mask), rank(mask) - 1
        if fake.shape[last] == 1:
            return mask  # the same for every key
        place = self._widened is not None and mask in self._widened.sequence.places
        if self._visible and (fake.dtype == torch.bool or not place):
            with self._rw.after(mask):
                seen = self._full(mask, fake.dtype == torch.bool)
                return self._rw.call(aten.cat.default, [seen, mask], -1)
        if not place:
            raise PreconditionError(
                f"{self._rw.made_by}: what may see what depends on the tokens themselves",
                where=describe(mask),
            )
        longer = self._take(mask, frozenset(range(last)))
        return self._shown(longer) if self._visible else longer

    def _full(self, mask: fx.Node, seen: bool) -> fx.Node:
        """Columns for the keys in front that hide nothing."""
        fake = value(mask)
        sizes = [self._size(mask, axis) for axis in range(rank(mask) - 1)]
        fill: Any = True if seen else 0.0
        return self._rw.call(aten.full.default, [*sizes, self._by], fill, dtype=fake.dtype)

    def _shown(self, mask: fx.Node) -> fx.Node:
        """An added mask whose columns in front hide nothing, and keep their bias."""
        lowest = torch.finfo(value(mask).dtype).min / 2
        with self._rw.after(mask):
            front = self._rw.call(aten.slice.Tensor, mask, -1, 0, self._by)
            hidden = self._rw.call(aten.lt.Scalar, front, lowest)
            front = self._rw.call(aten.masked_fill.Scalar, front, hidden, 0.0)
            rest = self._rw.call(aten.slice.Tensor, mask, -1, self._by, END)
            return self._rw.call(aten.cat.default, [front, rest], -1)

    def _causal_mask(self, q: fx.Node) -> fx.Node:
        """``[length, by + length]``: a query sees all in front, and no token after its own."""
        if self._causal is None:
            rows = self._size(q, rank(q) - 2)
            columns = (
                rows + self._by
                if isinstance(rows, int) and isinstance(self._by, int)
                else self._rw.call(operator.add, rows, self._by)
            )
            row = self._rw.call(aten.arange.default, rows)
            row = self._rw.call(aten.unsqueeze.default, row, 1)
            row = self._rw.call(aten.add.Tensor, row, self._by)
            column = self._rw.call(aten.arange.default, columns)
            self._causal = self._rw.call(aten.le.Tensor, column, row)
        return self._causal

    def _size(self, node: fx.Node, axis: int) -> fx.Node | int:
        size = value(node).shape[axis]
        return size if isinstance(size, int) else self._rw.call(aten.sym_size.int, node, axis)

    def _take(self, node: fx.Node, own: Axes = frozenset()) -> fx.Node:
        return node if self._widened is None else self._widened.take(node, own)


def _tensors(own: Callable[[fx.Node], fx.Node]) -> Callable[[fx.Node], fx.Node]:
    """``own`` for tensors: sizes in the stream are those of the caller's tokens already."""
    return lambda node: own(node) if rank(node) else node
