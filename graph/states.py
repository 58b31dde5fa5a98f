"""Keys and values of an attention core, where they are still whole: before repetition.

What a core reads is often not what a cache or a prefix holds: the keys of grouped
heads are repeated for every query head of the group, a written-out product reads them
transposed. :func:`find_states` goes back over such steps to

    [batch, kv_heads, length, head_dim]     after rotary embedding and norms

and keeps the steps, so that they can be done again on more keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from .cost import operator_name
from .errors import PreconditionError
from .provenance import describe
from .shapes import VAL, same_size, value
from .structure.flow import RawCore

_STEPS = frozenset(
    f"aten.{name}"
    for name in ("unsqueeze", "expand", "reshape", "view", "_unsafe_view", "slice", "contiguous",
                 "clone", "to", "detach")
)  # fmt: skip
_SDPA = "aten.scaled_dot_product_attention"
_MATMULS = frozenset({"aten.matmul", "aten.bmm"})


@dataclass(frozen=True, slots=True)
class States:
    """The keys, or the values, of one core.

    Attributes:
        node: ``[batch, kv_heads, length, dim]``, or ``[batch, length, dim]`` with one head.
        steps: the nodes from there to what the core reads, in order.
    """

    node: fx.Node
    steps: tuple[fx.Node, ...]

    @property
    def heads(self) -> int:
        """Heads that have keys of their own."""
        fake = value(self.node)
        return int(fake.shape[1]) if fake.dim() == 4 else 1

    @property
    def dim(self) -> int:
        """Channels of a head."""
        return int(value(self.node).shape[-1])


def find_states(raw: RawCore) -> tuple[States, States]:
    """The keys and the values of a core.

    Raises:
        PreconditionError: where the core is written out in a form that is not understood,
            or scores depend on more than queries and keys (relative positions).
    """
    if raw.extra:
        raise _refusal(raw, "its scores have terms besides queries and keys (relative positions)")
    scores = [operator_name(node) for node in raw.scores]
    if operator_name(raw.node) == _SDPA:
        axes = (-2, -2)
    elif {operator_name(raw.node), *scores} <= _MATMULS and raw.node.args[1] is raw.v:
        axes = (-1, -2)
    else:
        raise _refusal(raw, f"it is written out as {operator_name(raw.node)}")
    found = [_walk(node, axis) for node, axis in zip((raw.k, raw.v), axes, strict=True)]
    keys, values = found
    if keys is None or values is None or keys.heads != values.heads:
        raise _refusal(raw, "its keys and values are not [batch, heads, length, dim]")
    return keys, values


def _walk(operand: fx.Node, axis: int) -> States | None:
    """The earliest value before ``operand`` that has heads, or else rows, of their own."""
    length = value(operand).shape[axis]
    best: States | None = None
    node, steps = operand, tuple[fx.Node, ...]()
    while True:
        if _is_states(node, length, heads=True) or (
            best is None and _is_states(node, length, heads=False)
        ):
            best = States(node, steps)
        if not _is_step(node):
            return best
        steps = (node, *steps)
        node = node.args[0]  # type: ignore[assignment]


def _is_states(node: fx.Node, length: Any, *, heads: bool) -> bool:
    fake = node.meta.get(VAL)
    if not isinstance(fake, Tensor) or fake.dim() != 3 + heads:
        return False
    fixed = (fake.shape[-1], *(fake.shape[1:2] if heads else ()))
    return same_size(fake.shape[-2], length) and all(isinstance(n, int) for n in fixed)


def _is_step(node: fx.Node) -> bool:
    if node.op != "call_function" or not isinstance(node.args[0], fx.Node):
        return False
    name = operator_name(node)
    if name == "aten.transpose":
        rank = value(node).dim()
        swapped = {int(d) % rank for d in node.args[1:]}  # type: ignore[arg-type]
        return swapped == {rank - 2, rank - 1}
    return name in _STEPS


def _refusal(raw: RawCore, why: str) -> PreconditionError:
    return PreconditionError(
        f"this attention cannot be given more keys and values: {why}",
        where=describe(raw.node),
    )
