"""Rotary embeddings in any form: where queries and keys are turned by their position.

    y = x * cos(a) + r(x) * sin(a)

``a`` comes from positions alone, ``r`` only moves and negates channels (RoFormer,
Su et al., arXiv 2104.09864, equation 34). Halves may be turned or neighbours,
a whole head or its first channels; complex numbers turn by one product.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from ftc.graph.cost import operator_name
from ftc.graph.shapes import VAL

from .flow import Flow

_MOVES = frozenset(
    f"aten.{name}"
    for name in ("neg", "cat", "stack", "slice", "flatten", "view", "reshape", "unsqueeze",
                 "squeeze", "select", "unbind", "chunk", "split", "contiguous", "clone", "to",
                 "roll", "flip", "index_select", "transpose", "permute", "expand")
)  # fmt: skip
_CUTS = frozenset({"aten.slice", "aten.select", "aten.split", "aten.chunk", "aten.unbind",
                   "aten.split_with_sizes"})  # fmt: skip
_MOST = 20


@dataclass(frozen=True, slots=True)
class Rotary:
    """One turn.

    Attributes:
        node: yields the turned channels.
        x: what is turned.
        waves: the factors that positions give: cosines and sines, or one complex number.
    """

    node: fx.Node
    x: fx.Node
    waves: tuple[fx.Node, ...]


def find_rotary(flow: Flow, region: Iterable[fx.Node]) -> Rotary | None:
    """The last turn among the nodes between a product and where heads meet; None without one."""
    for node in sorted(region, key=flow.order.__getitem__, reverse=True):
        if (found := _turn(flow, node)) is not None:
            return found
    return None


def _turn(flow: Flow, node: fx.Node) -> Rotary | None:
    if operator_name(node) == "aten.mul" and _is_complex(node):
        parts = _split(flow, node)
        return Rotary(node, parts[0], (parts[1],)) if parts else None
    if operator_name(node) not in ("aten.add", "aten.sub") or len(node.all_input_nodes) != 2:
        return None
    first, second = (_split(flow, term) for term in node.all_input_nodes)
    if first is None or second is None or first[1] is second[1]:
        return None
    (x, cos), (other, sin) = first, second
    if _moves(other, x):
        return Rotary(node, x, (cos, sin))
    if _moves(x, other):
        return Rotary(node, other, (sin, cos))
    return _halves(node, x, other, (cos, sin))


def _halves(node: fx.Node, x: fx.Node, other: fx.Node, waves: tuple[fx.Node, ...]) -> Rotary | None:
    """Two pieces of one value, turned apart and joined: ``[x_1 c - x_2 s, x_2 c + x_1 s]``."""
    source = _whole(x)
    joined = next((u for u in node.users if operator_name(u) in ("aten.cat", "aten.stack")), None)
    if joined is None or x is other or source is not _whole(other):
        return None
    return Rotary(joined, source, waves)


def _whole(piece: fx.Node) -> fx.Node:
    """What ``piece`` is a part of."""
    while piece.target is operator.getitem or operator_name(piece) in _CUTS:
        piece = piece.all_input_nodes[0]
    return piece


def _split(flow: Flow, node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """``(x, wave)`` of a product of a computed value and one that positions give."""
    if operator_name(node) != "aten.mul" or len(node.all_input_nodes) != 2:
        return None
    left, right = node.all_input_nodes
    if flow.computed(right):
        left, right = right, left
    fake = right.meta.get(VAL)
    wide = isinstance(fake, Tensor) and fake.dim() >= 2
    if not wide or not flow.computed(left) or flow.computed(right) or flow.weights.name(right):
        return None
    return left, right


def _moves(node: fx.Node, x: fx.Node) -> bool:
    """Whether ``node`` is ``x`` with channels moved, some of them negated."""
    seen, stack, negated = {node}, [node], False
    while stack:
        top = stack.pop()
        if top is x:
            continue
        name = operator_name(top) if top.op == "call_function" else ""
        negated |= name == "aten.neg"
        if (name not in _MOVES and top.target is not operator.getitem) or len(seen) > _MOST:
            return False
        fresh = [n for n in top.all_input_nodes if n not in seen]
        seen.update(fresh)
        stack += fresh
    return negated and x in seen


def _is_complex(node: fx.Node) -> bool:
    fake = node.meta.get(VAL)
    return isinstance(fake, torch.Tensor) and fake.is_complex()
