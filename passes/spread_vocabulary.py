"""Tables of tokens and heads over them, cut by tokens.

    E[ids] = sum over ranks r of (ids in r) E_r[ids - start_r]
    logits = [x E_0^T, x E_1^T, ...]

A rank looks up the tokens it has and adds zeros for the others. Logits are put
together again behind the head, so that every loss sees all of them. Tokens need
not be a multiple of the ranks. A tied weight is one tensor, cut once.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from ftc.graph.cost import argument, operator_name
from ftc.graph.program import Program
from ftc.graph.shapes import shape, value
from ftc.graph.structure import Structure

from .split import Split, Whole
from .spread_edits import Applying, Edits

aten, ops = torch.ops.aten, torch.ops.ftc
_TABLES = {"aten.embedding": ((0,), 1), "ftc.quantized_embedding": ((0, 1, 2), 3)}
_CASTS = frozenset({"aten.to", "aten._to_copy", "aten.view", "aten.reshape", "aten.contiguous"})


def vocabulary(
    program: Program, structure: Structure, size: int
) -> Iterator[tuple[str, Edits | Whole]]:
    """Edits for each table of tokens, and each head that is at least as wide as its input."""
    tables = [node for node in program.graph.nodes if _is_table(node, size)]
    heads = [node for node, product in structure.products.items()
             if product.weight in structure.roles["head"] and _is_wide(node, size)]  # fmt: skip
    for kind, nodes, cut in (("table", tables, _lookup), ("head", heads, _head)):
        for node in nodes:
            edits = Edits(size)
            try:
                cut(edits, node)
            except Whole as whole:
                yield kind, whole
            else:
                yield kind, edits


def _is_table(node: fx.Node, size: int) -> bool:
    """Whether ``node`` looks up an input in a table that is longer than it is wide."""
    if node.op != "call_function" or operator_name(node) not in _TABLES:
        return False
    ids: Any = node.args[_TABLES[operator_name(node)][1]]
    while ids.op == "call_function" and operator_name(ids) in _CASTS:
        ids = ids.args[0]
    rows = _rows(node)
    return bool(ids.op == "placeholder" and rows >= max(shape(node)[-1], size))


def _is_wide(node: fx.Node, size: int) -> bool:
    if operator_name(node) not in ("aten.linear", "ftc.quantized_linear"):
        return False
    x = node.args[0]
    assert isinstance(x, fx.Node)
    return bool(shape(node)[-1] >= max(shape(x)[-1], size))


def _rows(node: fx.Node) -> int:
    table = node.args[0]
    assert isinstance(table, fx.Node)
    return int(value(table).shape[0])


def _lookup(edits: Edits, node: fx.Node) -> None:
    tensors, place = _TABLES[operator_name(node)]
    rows = _rows(node)
    for position in tensors:
        edits.cut(node, position, 0, (rows,))
    plain = operator_name(node) == "aten.embedding"
    padding = argument(node, "padding_idx") if plain else -1

    def change(on: Applying) -> None:
        rw, users, ids = on.rw, list(node.users), node.args[place]
        with rw.at(node):
            pair = rw.call(ops.parallel_rows.default, ids, rows)
            local, own = (rw.call(operator.getitem, pair, i) for i in range(2))
            if value(node).dtype != torch.float32:
                own = rw.call(aten.to.dtype, own, value(node).dtype)
        args = [*node.args]
        args[place] = local
        rw.set_args(node, *(args[:2] if plain else args))
        with rw.after(node):
            found = node
            if padding >= 0:  # its row does not learn, whoever has it
                other = rw.call(aten.unsqueeze.default, rw.call(aten.ne.Scalar, ids, padding), -1)
                fixed = rw.call(aten.detach.default, node)
                found = rw.call(aten.where.self, other, node, fixed)
            mine = rw.call(aten.mul.Tensor, found, own)
            total = rw.call(ops.parallel_reduce.default, mine)
        on.move(node, total, users)

    edits.step(change)


def _head(edits: Edits, node: fx.Node) -> None:
    rank, width = len(shape(node)), int(shape(node)[-1])
    edits.rows(node, Split(rank - 1, (width,), (width,)))

    def change(on: Applying) -> None:
        users = list(node.users)
        with on.rw.after(node):
            logits = on.rw.call(ops.parallel_gather.default, node, rank - 1, width)
        on.move(node, logits, users)

    edits.step(change)
