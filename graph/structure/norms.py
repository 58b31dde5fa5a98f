"""Normalizations: single operators, and the ones a model writes out by hand.

    rms(x)   = x / sqrt(mean(x^2) + eps) * w
    layer(x) = (x - mean(x)) / sqrt(var(x) + eps) * w + b

A written-out layer norm is an RMS norm of a centred value, so one pattern, of
one value or the other, finds both. ``w`` may also enter as ``1 + w``; casts may
stand anywhere; the centred value may be computed once or twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import fx

from ftc.graph.cost import argument, operator_name
from ftc.graph.program import Program

from .match import Match, Pattern, capture, commutative, const, match, op, skipping, tensor
from .weights import Weights

_OPERATORS = {
    "aten.layer_norm": "layer", "aten.native_layer_norm": "layer", "aten.rms_norm": "rms",
    "aten.group_norm": "group", "aten.native_group_norm": "group", "aten.batch_norm": "batch",
    "aten.instance_norm": "instance",
}  # fmt: skip
_CASTS = ("aten.to", "aten._to_copy")
_MUL, _ADD = "aten.mul", "aten.add"

_x = skipping(_CASTS, capture("x"))
_centred = skipping(_CASTS, op("aten.sub", _x, skipping(_CASTS, op("aten.mean", _x))))
_weight = skipping(_CASTS, tensor("weight"))
_gain = _weight | skipping(_CASTS, commutative(_ADD, _weight, const(1)))


def scaled(value: Pattern) -> Pattern:
    """``value / sqrt(mean(value^2) + eps) * w`` written out; captures ``eps`` and ``weight``."""
    square = op("aten.pow", value, const(2)) | op("aten.square", value) | op(_MUL, value, value)
    spread = skipping(_CASTS, op("aten.mean", skipping(_CASTS, square)))
    shifted = skipping(_CASTS, commutative(_ADD, spread, capture("eps", const())))
    inverse = skipping(_CASTS, op("aten.rsqrt", shifted) | op("aten.pow", shifted, const(-0.5)))
    root = skipping(_CASTS, op("aten.sqrt", shifted) | op("aten.pow", shifted, const(0.5)))
    normal = commutative(_MUL, value, inverse) | op("aten.div", value, root)
    return commutative(_MUL, skipping(_CASTS, normal), _gain)


LAYER = scaled(_centred)
"""A layer norm written out, without its bias; captures ``x``, ``eps`` and ``weight``."""
RMS = scaled(_x)
"""An RMS norm written out; captures ``x``, ``eps`` and ``weight``."""


@dataclass(frozen=True, slots=True)
class Norm:
    """One normalization.

    Attributes:
        node: the node that yields the normalized, scaled and shifted value.
        x: what is normalized.
        kind: ``layer``, ``rms``, ``group``, ``batch`` or ``instance``.
        weight, bias: logical names, or None.
        eps: what is added to the variance.
    """

    node: fx.Node
    x: fx.Node
    kind: str
    weight: str | None
    bias: str | None
    eps: float

    @property
    def names(self) -> frozenset[str]:
        """Logical names of its weight and bias."""
        return frozenset(name for name in (self.weight, self.bias) if name)


def find_norms(program: Program) -> Iterator[Norm]:
    """The normalizations that hold a weight, in graph order."""
    weights = Weights(program)
    for node in program.graph.nodes:
        if node.op != "call_function":
            continue
        name = operator_name(node)
        if kind := _OPERATORS.get(name):
            norm = _operator(node, kind, weights)
        elif name == _MUL:
            norm = _written_out(node, weights)
        else:
            continue
        if norm is not None and norm.names:
            yield norm


def _operator(node: fx.Node, kind: str, weights: Weights) -> Norm | None:
    x: Any = node.args[0]
    weight, bias = argument(node, "weight"), argument(node, "bias")
    eps = argument(node, "eps")
    return Norm(node, x, kind, weights.name(weight), weights.name(bias), float(eps or 0.0))


def _written_out(node: fx.Node, weights: Weights) -> Norm | None:
    if all(weights.name(a) is None and not _is_gain(a, weights) for a in node.args):
        return None
    for kind, pattern in (("layer", LAYER), ("rms", RMS)):
        if isinstance(found := match(pattern, node), Match):
            last, bias = _shift(node, weights)
            weight, eps = weights.name(found["weight"]), float(found["eps"])
            return Norm(last, found["x"], kind, weight, bias, eps)
    return None


def _is_gain(value: Any, weights: Weights) -> bool:
    """Whether ``value`` may be ``1 + w``: a quick look before the whole pattern is tried."""
    found = match(_gain, value)
    return bool(found) and isinstance(found, Match) and weights.name(found["weight"]) is not None


def _shift(node: fx.Node, weights: Weights) -> tuple[fx.Node, str | None]:
    """``(add, bias)`` where the one reader of ``node`` adds a weight; else ``(node, None)``."""
    if len(node.users) == 1:
        (user,) = node.users
        found = match(commutative(_ADD, skipping(_CASTS, capture("y")), tensor("bias")), user)
        if isinstance(found, Match) and found["y"] is node:
            return user, weights.name(found["bias"])
    return node, None
