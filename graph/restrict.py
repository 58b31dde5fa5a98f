"""Asking a value for some of its rows only, by asking its inputs for theirs.

Of ``where(a < b, x, 0)`` the rows from 16 on are those of ``a``, ``b`` and ``x``; of
``unsqueeze(x, 0)`` they are those of ``x`` one axis earlier. A rule says this for one
kind of operator: given the axes of a node's value that are restricted, and a function
``take(input, axes)``, it returns the node's restricted arguments. Where no rule
applies the caller computes the whole and slices it; a rule spares that work, which for
an attention mask over a long past is all but one row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from .cost import operator_name
from .sequence import LOOKUPS
from .shapes import VAL

Axes = frozenset[int]
Take = Callable[[fx.Node, Axes], fx.Node]
Rule = Callable[[fx.Node, Axes, Take], tuple[Any, ...] | None]

END = 2**63 - 1
"""What a slice says for "to the end"."""
_NONE: Axes = frozenset()
_ELEMENTWISE = frozenset(  # beyond those that torch tags as pointwise
    f"aten.{name}"
    for name in ("__and__", "__or__", "__xor__", "to", "_to_copy", "type_as", "contiguous", "clone",
                 "detach", "alias", "dropout", "full_like", "ones_like", "zeros_like")
)  # fmt: skip


def restrict(node: fx.Node, axes: Axes, take: Take) -> tuple[Any, ...] | None:
    """The arguments of ``node`` with which it yields its value restricted along ``axes``.

    Args:
        node: computes a tensor.
        axes: not empty, counted from the front.
        take: gives an input, restricted along axes of its own (perhaps none).

    Returns:
        Positional arguments; None where no rule is known.
    """
    name = operator_name(node)
    if name in _RULES:
        return _RULES[name](node, axes, take)
    return _elementwise(node, axes, take) if is_elementwise(node) else None


def is_elementwise(node: fx.Node) -> bool:
    """Whether an element of a node's value depends on the same element of its inputs alone."""
    if node.op != "call_function":
        return False
    tags = getattr(node.target, "tags", ())
    return operator_name(node) in _ELEMENTWISE or torch.Tag.pointwise in tags


def rank(node: fx.Node) -> int:
    """Dimensions of a tensor-valued node; 0 for a number."""
    fake = node.meta.get(VAL)
    return fake.dim() if isinstance(fake, Tensor) else 0


def aligned(axes: Axes, whole: int, part: int) -> Axes:
    """Axes of a value of rank ``part`` that broadcasting puts under ``axes`` of rank ``whole``."""
    return frozenset(a - (whole - part) for a in axes if a >= whole - part)


def _elementwise(node: fx.Node, axes: Axes, take: Take) -> tuple[Any, ...]:
    whole = rank(node)
    args: tuple[Any, ...] = fx.node.map_arg(
        node.args, lambda a: take(a, aligned(axes, whole, rank(a)))
    )
    return args


def _unsqueeze(node: fx.Node, axes: Axes, take: Take) -> tuple[Any, ...]:
    x, dim = _first(node)
    return take(x, frozenset(a - (a > dim) for a in axes)), dim


def _expand(node: fx.Node, axes: Axes, take: Take) -> tuple[Any, ...]:
    x: Any = node.args[0]
    sizes: Any = node.args[1]
    kept = [
        take(s, _NONE) if isinstance(s, fx.Node) and i not in axes else s
        for i, s in enumerate(sizes)
    ]
    return take(x, aligned(axes, len(sizes), rank(x))), kept


def _slice(node: fx.Node, axes: Axes, take: Take) -> tuple[Any, ...] | None:
    x, dim = _first(node)
    bounds = node.args[2:]
    whole = not bounds or (bounds[0] in (0, None) and bounds[1:] in ((), (None,), (END,)))
    if dim in axes and not whole:
        return None
    return take(x, axes), dim, *(take(b, _NONE) if isinstance(b, fx.Node) else b for b in bounds)


def _embedding(node: fx.Node, axes: Axes, take: Take) -> tuple[Any, ...] | None:
    place = LOOKUPS[operator_name(node)]
    index = node.args[place]
    assert isinstance(index, fx.Node)
    if max(axes) >= rank(index):
        return None
    return *node.args[:place], take(index, axes), *node.args[place + 1 :]


def _cat(node: fx.Node, axes: Axes, take: Take) -> tuple[Any, ...] | None:
    parts: Any = node.args[0]
    dim: Any = node.args[1] if len(node.args) > 1 else 0
    if dim % rank(node) in axes:
        return None
    return [take(part, axes) for part in parts], dim


def _index(node: fx.Node, axes: Axes, take: Take) -> tuple[Any, ...] | None:
    """With an index for every axis the result is elementwise in the indices."""
    x: Any = node.args[0]
    indices: Any = node.args[1]
    if len(indices) != rank(x) or not all(isinstance(i, fx.Node) for i in indices):
        return None
    own = [take(i, aligned(axes, rank(node), rank(i))) for i in indices]
    return take(x, _NONE), own


def _permute(node: fx.Node, axes: Axes, take: Take) -> tuple[Any, ...]:
    x: Any = node.args[0]
    order: Any = node.args[1]
    return take(x, frozenset(order[a] % rank(x) for a in axes)), order


def _transpose(node: fx.Node, axes: Axes, take: Take) -> tuple[Any, ...]:
    x: Any = node.args[0]
    pair: Any = node.args[1:3]
    a, b = (dim % rank(x) for dim in pair)
    swap = {a: b, b: a}
    return take(x, frozenset(swap.get(axis, axis) for axis in axes)), *pair


def _first(node: fx.Node) -> tuple[fx.Node, int]:
    """The tensor and the dimension that come first, the dimension counted from the front."""
    x, dim = node.args[0], node.args[1] if len(node.args) > 1 else 0
    assert isinstance(x, fx.Node) and isinstance(dim, int)
    return x, dim % rank(node)


_RULES: dict[str, Rule] = {
    "aten.unsqueeze": _unsqueeze,
    "aten.expand": _expand,
    "aten.slice": _slice,
    **dict.fromkeys(LOOKUPS, _embedding),
    "aten.cat": _cat,
    "aten.index": _index,
    "aten.permute": _permute,
    "aten.transpose": _transpose,
}
