"""The decomposition of one operator at one node, for operators without a translation.

torch holds reference implementations of most operators in terms of fewer ones.
The node's operator is traced on its own fake values, symbolic shapes included,
with these implementations for all operators but those that have a translation.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from ftc.graph import shapes

from .table import Unsupported, lowered_operators


@dataclass(frozen=True, slots=True)
class Pieces:
    """A traced decomposition.

    Attributes:
        module: graph over the operands, in the order of :meth:`operands`.
        positions: where among the flattened arguments the operands are.
    """

    module: fx.GraphModule
    positions: tuple[int, ...]

    def operands(self, args: Any, kwargs: Mapping[str, Any]) -> Iterator[Any]:
        """The actual operands among the actual arguments, in the graph's order."""
        leaves = pytree.tree_leaves((args, dict(kwargs)), is_leaf=lambda x: x is None)
        return (leaves[i] for i in self.positions)


def decompose(node: fx.Node) -> Pieces:
    """Traces the decomposition of ``node``.

    Raises:
        Unsupported: when torch has none, with what its tracing said.
    """
    fakes = fx.node.map_arg((node.args, node.kwargs), shapes.value)
    leaves, spec = pytree.tree_flatten(
        (tuple(fakes[0]), dict(fakes[1])), is_leaf=lambda x: x is None
    )
    positions = tuple(
        i for i, leaf in enumerate(leaves) if isinstance(leaf, (Tensor, torch.SymInt))
    )
    mode = next((x.fake_mode for x in leaves if isinstance(x, torch._subclasses.FakeTensor)), None)

    def run(*operands: Any) -> Any:
        given = list(leaves)
        for position, operand in zip(positions, operands, strict=True):
            given[position] = operand
        args, kwargs = pytree.tree_unflatten(given, spec)
        return node.target(*args, **kwargs)  # type: ignore[operator]

    lowered = lowered_operators()
    table = {op: f for op, f in _decompositions().items() if op is node.target or op not in lowered}
    try:
        with torch.no_grad(), mode if mode is not None else torch.no_grad():
            traced = make_fx(run, decomposition_table=table)(*(leaves[i] for i in positions))
    except Exception as error:
        raise Unsupported(
            f"its decomposition does not trace: {str(error).splitlines()[0]}"
        ) from error
    for piece in traced.graph.nodes:
        schema = getattr(piece.target, "_schema", None)
        if schema is not None and schema.is_mutable:
            raise Unsupported(f"its decomposition writes in place ({piece.target})")
    if any(piece.target is node.target for piece in traced.graph.nodes):
        raise Unsupported("torch has no decomposition of it")
    return Pieces(traced, positions)


@cache
def _decompositions() -> dict[Any, Any]:
    return dict(torch.export.default_decompositions().items())
