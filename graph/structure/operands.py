"""The numbers and values at one attention: what its scores are multiplied by, and what is repeated.

softmax(cap(scale * Q K^T) + mask) V,    cap(s) = c tanh(s / c)
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx

from ftc.graph.cost import argument, operator_name
from ftc.graph.shapes import VAL

from .flow import Flow, RawCore

_SDPA = "aten.scaled_dot_product_attention"
_REPEATING = frozenset(
    f"aten.{name}"
    for name in ("expand", "repeat", "repeat_interleave", "reshape", "view", "unsqueeze", "clone",
                 "contiguous", "flatten", "_unsafe_view", "slice")
)  # fmt: skip


def score_factors(flow: Flow, raw: RawCore, head_dim: int) -> tuple[float | None, float | None]:
    """``(scale, cap)``: what query times key is multiplied by, and what bounds it.

    A factor that a query or key was multiplied by before they meet is not in it.
    ``scale`` is None where it is no constant, ``cap`` where nothing bounds the scores.
    """
    if operator_name(raw.node) == _SDPA:
        scale = argument(raw.node, "scale")
        if scale is None:
            return (head_dim**-0.5 if head_dim else None), None
        return (float(scale) if isinstance(scale, (int, float)) else None), None
    assert raw.softmax is not None
    path = flow.behind([raw.softmax.args[0]], until=raw.scores)
    main = {min(raw.scores, key=flow.order.__getitem__)}  # other terms have factors of their own
    inner, outer = _own_factor(raw), 1.0
    bounded = False
    for node in sorted(path, key=flow.order.__getitem__):
        if main.isdisjoint(node.all_input_nodes):
            continue
        main.add(node)
        name = operator_name(node)
        if name == "aten.tanh":
            bounded = True
        if name not in ("aten.mul", "aten.div"):
            continue
        factor = _constant(node)
        if factor is None or inner is None:
            return None, None
        inner, outer = (inner, outer * factor) if bounded else (inner * factor, outer)
    if inner is None or not bounded:
        return inner, None
    return inner * outer, outer  # c tanh(i s) = c tanh(scale s / c) where scale = i c


def _own_factor(raw: RawCore) -> float | None:
    """What the product of queries and keys multiplies by itself."""
    factors = {float(argument(s, "alpha") or 1) for s in raw.scores
               if operator_name(s) == "aten.baddbmm"}  # fmt: skip
    return 1.0 if not factors else (factors.pop() if len(factors) == 1 else None)


def _constant(node: fx.Node) -> float | None:
    """The number that a product or quotient multiplies by."""
    numbers = [a for a in node.args if isinstance(a, (int, float))]
    if len(numbers) != 1 or not numbers[0]:
        return None
    return float(numbers[0]) if operator_name(node) == "aten.mul" else 1 / float(numbers[0])


def untransposed(node: fx.Node) -> fx.Node:
    """What ``node`` is with its last two axes exchanged; itself where it is no such thing."""
    name, args = operator_name(node), node.args
    fake = node.meta.get(VAL)
    rank = fake.dim() if isinstance(fake, Tensor) else 0
    axes: Any = ()
    if name == "aten.transpose":
        axes = args[1:3]
    elif name == "aten.permute" and isinstance(args[1], (list, tuple)):
        kept = [a % rank for a in args[1][:-2] if isinstance(a, int)]
        axes = args[1][-2:] if kept == list(range(rank - 2)) else ()
    last = sorted(a % rank for a in axes if isinstance(a, int)) if rank else []
    behind = args[0] if last == [rank - 2, rank - 1] else node
    return behind if isinstance(behind, fx.Node) else node


def before_repetition(node: fx.Node, heads: int, kv_heads: int) -> fx.Node:
    """A key or value as it is before each of its heads is repeated for several queries.

    Args:
        node: ``[batch, heads, length, width]``, or with the heads folded into the batch.

    Returns:
        The node ``[batch, kv_heads, length, width]`` behind it; itself where nothing is repeated.
    """
    if heads == kv_heads:
        return node
    here: Any = node
    while isinstance(here, fx.Node) and here.op == "call_function":
        fake = here.meta.get(VAL)
        if isinstance(fake, Tensor) and fake.dim() == 4 and fake.shape[1] == kv_heads:
            return here
        if operator_name(here) not in _REPEATING:
            break
        here = here.args[0]
    return node
