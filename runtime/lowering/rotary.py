"""Rotary position embeddings: eight nodes that a model writes out, as one operator.

Pairs of channels ``(j, j + d / 2)`` of each head are turned by an angle that grows
with the position (RoFormer, Su et al., arXiv 2104.09864, equation 34):

    y = x * cos(a) + [-x_2, x_1] * sin(a),    x = [x_1, x_2],  a = [angle, angle]

The pattern is found on the program's graph, before translation, since what is
written there is still whole. A head whose last channels are not turned is a
slice turned and joined with the rest, and is one operator as well. Heads that
were split from ``[batch, length, width]`` are given unsplit, the fastest form.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from onnx_ir import Value
from torch import Tensor, fx

from ftc.graph.program import Program
from ftc.graph.shapes import VAL
from ftc.graph.structure.match import (
    Match,
    Pattern,
    capture,
    commutative,
    const,
    listed,
    match,
    op,
    skipping,
)

from .attention import HEADS_FIRST, merged
from .emitter import Emitter

_LAST = const(-1, 3)
_TO, _MUL = ("aten.to", "aten._to_copy"), "aten.mul"
_PLACED = ("aten.unsqueeze", *_TO)
_ANGLE = op("aten.cat", listed(capture("angle"), capture("angle")), const())


def _wave(name: str) -> Pattern:
    """``cos`` or ``sin`` of ``[angle, angle]``, perhaps times a number, in any type, unsqueezed."""
    plain = op(f"aten.{name}", skipping(_TO, _ANGLE))
    scaled = plain | op(_MUL, skipping(_PLACED, plain), const())
    return capture(name, skipping(_PLACED, scaled))


def _turned(x: Pattern) -> Pattern:
    first = op("aten.slice", x, _LAST, const(0), capture("half", const()))
    second = op("aten.slice", x, _LAST, capture("half", const()))
    other = op("aten.cat", listed(op("aten.neg", second), first), _LAST)
    straight = commutative(_MUL, x, _wave("cos"))
    return commutative("aten.add", straight, commutative(_MUL, other, _wave("sin")))


WHOLE = _turned(capture("x"))
"""Every channel of ``x`` turned; captures ``x``, ``cos``, ``sin`` and ``half``."""
_part = op("aten.slice", capture("all"), _LAST, const(0), capture("width", const()))
_rest = op("aten.slice", capture("all"), _LAST, capture("width", const()))
PART = op("aten.cat", listed(_turned(capture("x", _part)), _rest), _LAST)
"""The first ``width`` channels of ``all`` turned, the others left."""


@dataclass(frozen=True, slots=True)
class Rotary:
    """One rotary embedding.

    Attributes:
        inputs: what is turned ``[batch, heads, length, dim]``, cosines and sines
            ``[batch or 1, 1, length, width]``.
        width: channels of a head that are turned.
    """

    inputs: tuple[fx.Node, fx.Node, fx.Node]
    width: int

    def lower(self, e: Emitter, x: Value, cos: Value, sin: Value) -> Value:
        """The operator, on unsplit heads where there are such."""
        batch, heads, length, depth = e.dims(x)
        waves = [self._half(e, wave, batch, length) for wave in (cos, sin)]
        part = None if self.width == depth else self.width
        joined = merged(e, x)
        if joined is None:
            return e.op("RotaryEmbedding", x, *waves, rotary_embedding_dim=part, dims=e.dims(x))
        y = e.op("RotaryEmbedding", joined, *waves, rotary_embedding_dim=part, num_heads=heads,
                 dims=e.dims(joined))  # fmt: skip
        return e.transpose(e.reshape(y, [batch, length, heads, depth]), HEADS_FIRST)

    def _half(self, e: Emitter, wave: Value, batch: Any, length: Any) -> Value:
        """``[batch, length, width / 2]`` of ``[batch or 1, 1, length, width]``."""
        half = self.width // 2
        flat = e.reshape(wave, [e.dims(wave)[0], length, self.width])
        first = e.op("Slice", flat, [0], [half], [2], dims=(*e.dims(flat)[:2], half))
        return e.expand(first, [batch, length, half])


def find_rotary(program: Program) -> Mapping[fx.Node, Rotary]:
    """The rotary embeddings of a program with fake values, by the node of their result."""
    found: dict[fx.Node, Rotary] = {}
    for node in program.graph.nodes:
        for pattern, x in ((WHOLE, "x"), (PART, "all")):
            got = match(pattern, node)
            if isinstance(got, Match) and (made := _rotary(got, got[x])) is not None:
                found[node] = made
    return found


def _rotary(got: Match, x: fx.Node) -> Rotary | None:
    """The match as one, where its shapes and types are those that the operator takes."""
    values = [node.meta.get(VAL) for node in (x, got["cos"], got["sin"])]
    if not all(isinstance(v, Tensor) and v.dim() == 4 and v.dtype == torch.float32 for v in values):
        return None
    heads, cos, sin = values
    width, turned = cos.shape[3], got["x"].meta[VAL].shape[3]
    if not isinstance(width, int) or width != turned or got["half"] * 2 != width:
        return None
    if cos.shape[1] != 1 or sin.shape != cos.shape or not isinstance(heads.shape[3], int):
        return None
    return Rotary((x, got["cos"], got["sin"]), width)
