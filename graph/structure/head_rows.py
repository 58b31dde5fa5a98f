"""Which rows of a product's weight make which head: what a split by heads has to know.

A fused product holds queries, keys and values one after another, head by head,
or group by group, and every model cuts it up by views of its own. Here the cuts
are followed with row numbers in place of values: what moves elements moves
numbers, and everything else (a bias, a norm, a turn by position) leaves them
where they are.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ftc.graph.cost import operator_name
from ftc.graph.program import Program
from ftc.graph.symbols import SizesAt

from .attention import AttentionCore
from .causal import Masks
from .weights import PASSING

_MOVING = (PASSING - {"aten.to", "aten._to_copy", "aten.type_as"}) | {
    f"aten.{name}"
    for name in ("slice", "index", "select", "split", "split_with_sizes", "chunk", "unbind",
                 "narrow", "index_select", "cat", "stack", "repeat", "repeat_interleave",
                 "_unsafe_view", "unsafe_split", "unsafe_chunk", "sym_size", "movedim", "swapaxes",
                 "broadcast_to")
}  # fmt: skip
_MOST = 400


@dataclass(frozen=True, slots=True)
class HeadRows:
    """The place of every head in the weights around one attention; None where it is not told.

    Attributes:
        q, k, v: rows of the weight of ``core.q`` (``.k``, ``.v``), int64 ``[heads, head_dim]``
            or ``[kv_heads, head_dim]``; of one weight where the product is fused.
        out: columns of the weight of ``core.out``, int64 ``[heads, head_dim]``.
    """

    q: Tensor | None
    k: Tensor | None
    v: Tensor | None
    out: Tensor | None


def head_rows(program: Program, core: AttentionCore) -> HeadRows:
    """Follows the heads of one attention to the products that feed it and that it feeds.

    Args:
        program: with fake values, as :func:`~ftc.graph.structure.find_structure` leaves it.
        core: one of its attention cores.
    """
    rows = _Rows(program, core)
    return HeadRows(
        rows.feeding(core.q, core.query, core.heads),
        rows.feeding(core.k, core.grouped_key, core.kv_heads),
        rows.feeding(core.v, core.grouped_value, core.kv_heads),
        rows.taking(),
    )


class _Rows:
    """Row numbers carried along the graph around one attention."""

    def __init__(self, program: Program, core: AttentionCore) -> None:
        self._core = core
        self._plain = Masks(program)
        self._sizes = SizesAt(program, self._plain.sizes)

    def feeding(self, products: tuple[fx.Node, ...], side: fx.Node, heads: int) -> Tensor | None:
        if len(products) != 1:
            return None
        shape = self._sizes.shape(products[0])
        numbers = torch.arange(shape[-1]).expand(shape)
        return self._by_head(self._follow(side, {products[0]: numbers}), heads)

    def taking(self) -> Tensor | None:
        core = self._core
        if len(core.out) != 1 or not core.heads:
            return None
        source: Any = core.out[0].args[0]
        width = core.heads * core.head_dim
        shape = self._sizes.shape(core.node)
        place = torch.arange(width).view(core.heads, core.head_dim)
        if len(shape) == 4 and shape[1] == core.heads:
            numbers = place[None, :, None].expand(shape)
        elif len(shape) == 3 and shape[0] % core.heads == 0:
            numbers = place[:, None].repeat(shape[0] // core.heads, shape[1], 1)
        else:
            return None
        found = self._follow(source, {core.node: numbers})
        if found is None or found.shape[-1] != width:
            return None
        columns = found.reshape(-1, width)[0].argsort().view(core.heads, core.head_dim)
        return columns if _is_permutation(found.reshape(-1, width)[0]) else None

    def _by_head(self, numbers: Tensor | None, heads: int) -> Tensor | None:
        """``[heads, head_dim]`` of ``[batch, heads, length, head_dim]`` or the batch folded in."""
        if numbers is None or numbers.dim() not in (3, 4) or not heads:
            return None
        width = self._core.head_dim
        if numbers.shape[-1] != width:
            numbers = numbers.transpose(-1, -2)
        if numbers.shape[-1] != width:
            return None
        rows = numbers[0, :, 0] if numbers.dim() == 4 else numbers[: self._core.heads, 0]
        rows = torch.unique_consecutive(rows, dim=0)
        distinct = rows.unique().numel() == rows.numel()
        return rows.clone() if distinct and rows.shape == (heads, width) else None

    def _follow(self, goal: fx.Node, known: dict[fx.Node, Any]) -> Tensor | None:
        """Row numbers at ``goal``; None where something on the way is not understood."""
        region = _between(set(known), goal)
        if region is None:
            return None
        try:
            for node in region:
                known[node] = self._number(node, known)
        except (RuntimeError, IndexError, ValueError, TypeError):
            return None
        found = known.get(goal)
        return found if isinstance(found, Tensor) else None

    def _number(self, node: fx.Node, known: dict[fx.Node, Any]) -> Any:
        if operator_name(node) in _MOVING or node.target is operator.getitem:
            args, kwargs = fx.node.map_arg(
                (node.args, node.kwargs),
                lambda n: known[n] if n in known else self._plain.value(n),
            )
            assert callable(node.target)
            return node.target(*args, **kwargs)
        shape = self._sizes.shape(node)
        carried = (known.get(n) for n in node.all_input_nodes)
        return next((c for c in carried if isinstance(c, Tensor) and c.shape == shape), None)


def _between(starts: set[fx.Node], goal: fx.Node) -> list[fx.Node] | None:
    """Nodes that the starts reach and that reach ``goal``, in graph order; None if too many."""
    above: set[fx.Node] = set()
    stack = [goal]
    while stack and len(above) < _MOST:
        node = stack.pop()
        if node not in above and node not in starts:
            above.add(node)
            stack += node.all_input_nodes
    if stack:
        return None
    reached, ordered = set(starts), []
    for node in goal.graph.nodes:
        if node in above and not reached.isdisjoint(node.all_input_nodes):
            reached.add(node)
            ordered.append(node)
    return ordered


def _is_permutation(numbers: Tensor) -> bool:
    return bool((numbers.sort().values == torch.arange(numbers.numel())).all())
