"""Attention whose heads are folded into the batch, written with heads of their own.

    S = beta * bias + alpha * Q K^T        bias [b h, 1, t], Q [b h, s, d], K [b h, t, d]
    y = P V                                P [b h, s, t] from S, V [b h, t, d]

is the same over ``[b, h, ..]``, to rounding: ``bmm`` and ``baddbmm`` between reshapes become
``matmul`` and an addition without. What gives an attention more keys and values needs the
heads apart (:mod:`ftc.graph.states`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from .cost import argument, operator_name
from .rewriter import Rewriter
from .shapes import VAL, same_size, value
from .structure.flow import Flow, RawCore

aten = torch.ops.aten
_RESHAPES = frozenset({"aten.view", "aten.reshape", "aten._unsafe_view"})


@dataclass(frozen=True, slots=True)
class _Folded:
    """A core, its operands ``[b, h, .., ..]``, keys transposed, and what reads its results so."""

    raw: RawCore
    score: fx.Node
    queries: fx.Node
    keys: fx.Node
    probabilities: fx.Node
    values: fx.Node
    scores_read: tuple[fx.Node, ...]
    results_read: tuple[fx.Node, ...]


def unfold_heads(rw: Rewriter) -> None:
    """Rewrites each attention of this form; others stay as they are."""
    found = [_folded(raw) for raw in Flow(rw.program).cores.values()]
    for folded in found:
        if folded is not None:
            _unfold(rw, folded)
    if any(found):
        rw.drop_unread()


def _folded(raw: RawCore) -> _Folded | None:
    """The parts of a core of this form, all of them or none."""
    node = raw.node
    if operator_name(node) != "aten.bmm" or node.args[1] is not raw.v or len(raw.scores) != 1:
        return None
    (score,) = raw.scores
    if operator_name(score) not in ("aten.bmm", "aten.baddbmm"):
        return None
    parts = (_heads(raw.q), _keys(raw.k), _heads(node.args[0]), _heads(raw.v))
    queries, keys, probabilities, values = parts
    if queries is None or keys is None or probabilities is None or values is None:
        return None
    heads = value(queries).shape[1]
    if not isinstance(heads, int) or any(value(p).shape[1] != heads for p in parts if p):
        return None
    read = [tuple(each.users) for each in (score, node)]
    if not all(_is_unfolding(user, heads) for users in read for user in users):
        return None
    return _Folded(raw, score, queries, keys, probabilities, values, *read)


def _heads(node: Any) -> fx.Node | None:
    """What ``[b h, n, d]`` was before the fold: ``[b, h, n, d]``."""
    if not isinstance(node, fx.Node) or operator_name(node) not in _RESHAPES:
        return None
    inner: Any = node.args[0]
    before, after = inner.meta.get(VAL), value(node)
    if not isinstance(before, Tensor) or before.dim() != 4 or after.dim() != 3:
        return None
    same = all(same_size(a, b) for a, b in zip(before.shape[-2:], after.shape[-2:], strict=True))
    return inner if same else None


def _keys(node: fx.Node) -> fx.Node | None:
    """Keys ``[b, h, t, d]`` of ``[b h, d, t]``: transposed behind the fold."""
    if operator_name(node) != "aten.transpose":
        return None
    swapped = {int(axis) % 3 for axis in node.args[1:]}  # type: ignore[arg-type]
    return _heads(node.args[0]) if swapped == {1, 2} else None


def _is_unfolding(node: fx.Node, heads: int) -> bool:
    """Whether a node makes ``[b, h, n, m]`` of ``[b h, n, m]``."""
    if operator_name(node) not in _RESHAPES:
        return False
    before, after = value(node.args[0]), value(node)  # type: ignore[arg-type]
    return after.dim() == 4 and after.shape[1] == heads and all(
        same_size(a, b) for a, b in zip(before.shape[-2:], after.shape[-2:], strict=True)
    )  # fmt: skip


def _unfold(rw: Rewriter, found: _Folded) -> None:
    with rw.at(found.score):
        scores = _scores(rw, found)
    for node in found.scores_read:
        rw.replace(node, scores)
    node = found.raw.node
    with rw.at(node):
        results = rw.call(aten.matmul.default, found.probabilities, found.values)
    for user in found.results_read:
        rw.replace(user, results)


def _scores(rw: Rewriter, found: _Folded) -> fx.Node:
    """Scores ``[b, h, s, t]``."""
    turned = rw.call(aten.transpose.int, found.keys, 2, 3)
    scores = rw.call(aten.matmul.default, found.queries, turned)
    if operator_name(found.score) != "aten.baddbmm":
        return scores
    alpha, beta = argument(found.score, "alpha"), argument(found.score, "beta")
    if alpha != 1:
        scores = rw.call(aten.mul.Tensor, scores, alpha)
    bias: Any = found.score.args[0]
    heads, sizes = value(found.queries).shape[1], value(bias).shape
    batch = rw.call(aten.sym_size.int, found.queries, 0)
    rows, columns = (
        size if isinstance(size, int) else rw.call(aten.sym_size.int, bias, axis)
        for axis, size in ((1, sizes[1]), (2, sizes[2]))
    )
    bias = rw.call(aten.reshape.default, bias, [batch, heads, rows, columns])
    if beta != 1:
        bias = rw.call(aten.mul.Tensor, bias, beta)
    return rw.call(aten.add.Tensor, scores, bias)
