"""Normalizations: single operators, and the ones a model writes out by hand.

    rms(x)   = x / sqrt(mean(x^2) + eps) * w
    layer(x) = (x - mean(x)) / sqrt(var(x) + eps) * w + b

A written-out layer norm is an RMS norm of a centred value, so one pattern finds
both. ``w`` may also enter as ``1 + w``, casts may stand anywhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import fx

from .cost import argument, operator_name
from .match import Match, Miss, capture, commutative, const, match, op, skipping, tensor
from .program import Program
from .weights import Weights

_OPERATORS = {
    "aten.layer_norm": "layer", "aten.native_layer_norm": "layer", "aten.rms_norm": "rms",
    "aten.group_norm": "group", "aten.native_group_norm": "group", "aten.batch_norm": "batch",
    "aten.instance_norm": "instance",
}  # fmt: skip
_CASTS = ("aten.to", "aten._to_copy")
_MUL, _ADD = "aten.mul", "aten.add"

_x = skipping(_CASTS, capture("x"))
_square = op("aten.pow", _x, const(2)) | op("aten.square", _x) | op(_MUL, _x, _x)
_spread = op("aten.mean", skipping(_CASTS, _square))
_shifted = skipping(_CASTS, commutative(_ADD, skipping(_CASTS, _spread), capture("eps", const())))
_inverse = skipping(_CASTS, op("aten.rsqrt", _shifted))
_root = skipping(_CASTS, op("aten.sqrt", _shifted) | op("aten.pow", _shifted, const(0.5)))
_normal = commutative(_MUL, _x, _inverse) | op("aten.div", _x, _root)
_weight = skipping(_CASTS, tensor("weight"))
_gain = _weight | skipping(_CASTS, commutative(_ADD, _weight, const(1)))
SCALED = commutative(_MUL, skipping(_CASTS, _normal), _gain)
"""``normal(x) * w`` written out; captures ``x``, ``eps`` and the reader of ``weight``."""
_CENTRED = op("aten.sub", skipping(_CASTS, capture("x")), op("aten.mean", _x))


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
    found = match(SCALED, node)
    if isinstance(found, Miss):
        return None
    x, kind = _uncentred(found)
    last, bias = _shift(node, weights)
    return Norm(last, x, kind, weights.name(found["weight"]), bias, float(found["eps"]))


def _is_gain(value: Any, weights: Weights) -> bool:
    """Whether ``value`` may be ``1 + w``: a quick look before the whole pattern is tried."""
    found = match(_gain, value)
    return bool(found) and isinstance(found, Match) and weights.name(found["weight"]) is not None


def _uncentred(found: Match) -> tuple[fx.Node, str]:
    centred = match(_CENTRED, found["x"])
    if isinstance(centred, Match):
        return centred["x"], "layer"
    return found["x"], "rms"


def _shift(node: fx.Node, weights: Weights) -> tuple[fx.Node, str | None]:
    """``(add, bias)`` where the one reader of ``node`` adds a weight; else ``(node, None)``."""
    if len(node.users) == 1:
        (user,) = node.users
        found = match(commutative(_ADD, skipping(_CASTS, capture("y")), tensor("bias")), user)
        if isinstance(found, Match) and found["y"] is node:
            return user, weights.name(found["bias"])
    return node, None
