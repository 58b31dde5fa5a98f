"""Recognising products with a weight in all the forms that models write them.

Every form is one contraction. With ``x`` permuted to ``[kept..., contracted...]``
and the weight to ``[out..., in...]``,

    y[kept, out] = sum over in of  x[kept, in] * W[out, in],    then y's dimensions permuted

so ``linear``, ``mm``, ``matmul`` (weight on either side), ``bmm`` with a weight
that is only broadcast over the batch, ``addmm`` and a two-operand ``einsum`` are
told apart by three permutations. An index that the weight shares with the
*result* is a true batch dimension (experts): no single matrix, and recognition
says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from ftc.graph import shapes
from ftc.graph.program import Program

aten = torch.ops.aten
_Letters = Sequence[Any]


@dataclass(frozen=True, slots=True)
class Contraction:
    """One product of a value with a weight.

    Attributes:
        node: the product.
        x: its input.
        weight: name of the parameter.
        x_order: permutation of ``x``'s dimensions to ``[kept..., contracted...]``.
        contracted: how many of them are contracted.
        weight_order: permutation of the parameter's dimensions to ``[out..., in...]``.
        out: how many of them are output dimensions.
        y_order: permutation of ``[kept..., out...]`` to the product's own dimensions.
        bias: what the product adds, or None.
    """

    node: fx.Node
    x: fx.Node
    weight: str
    x_order: tuple[int, ...]
    contracted: int
    weight_order: tuple[int, ...]
    out: int
    y_order: tuple[int, ...]
    bias: fx.Node | None = None

    @property
    def layout(self) -> tuple[tuple[int, ...], int]:
        """How the parameter must be stored for this product to be ``linear``."""
        return self.weight_order, self.out

    @property
    def is_stored_so(self) -> bool:
        """Whether the parameter is ``[out, in]`` already."""
        return self.layout == ((0, 1), 1)


@dataclass(frozen=True, slots=True)
class Operand:
    """A parameter seen through transpositions and broadcasts.

    Attributes:
        name: of the parameter.
        axes: for each dimension of the operand, the parameter's own, or None
            where it was broadcast.
    """

    name: str
    axes: tuple[int | None, ...]


def operand(node: Any, program: Program) -> Operand | None:
    """The parameter that ``node`` is, through views that move or add dimensions only."""
    if not isinstance(node, fx.Node):
        return None
    if node.op == "get_attr":
        tensor = program.tensor(str(node.target))
        if not isinstance(tensor, nn.Parameter):
            return None
        return Operand(str(node.target), tuple(range(tensor.dim())))
    if node.op != "call_function" or node.target not in VIEWS:
        return None
    inner = operand(node.args[0], program)
    return None if inner is None else _through(node, inner)


VIEWS = frozenset({
    aten.t.default, aten.numpy_T.default, aten.mT.default, aten.transpose.int,
    aten.permute.default, aten.unsqueeze.default, aten.expand.default,
    aten.contiguous.default, aten.clone.default,
})  # fmt: skip
"""Operators between a parameter and its product that only move or add dimensions."""


def _through(node: fx.Node, inner: Operand) -> Operand | None:
    axes = list(inner.axes)
    args: Any = node.args
    if node.target in (aten.t.default, aten.numpy_T.default):
        axes.reverse()
    elif node.target is aten.mT.default:
        axes[-1], axes[-2] = axes[-2], axes[-1]
    elif node.target is aten.transpose.int:
        axes[args[1]], axes[args[2]] = axes[args[2]], axes[args[1]]
    elif node.target is aten.permute.default:
        axes = [axes[d] for d in args[1]]
    elif node.target is aten.unsqueeze.default:
        axes.insert(args[1] % (len(axes) + 1), None)
    elif node.target is aten.expand.default:
        return _expanded(node, inner)
    return Operand(inner.name, tuple(axes))


def _expanded(node: fx.Node, inner: Operand) -> Operand | None:
    """A dimension that really grows is broadcast; one of the parameter's must not."""
    source: Any = node.args[0]
    old, new = shapes.shape(source), shapes.shape(node)
    added = len(new) - len(old)
    axes: list[int | None] = [None] * added
    for axis, a, b in zip(inner.axes, old, new[added:], strict=True):
        if axis is not None and not shapes.same_size(a, b):
            return None
        axes.append(axis)
    return Operand(inner.name, tuple(axes))


def recognise(node: fx.Node, program: Program) -> Contraction | str | None:
    """The contraction that ``node`` is; why it cannot be made one; None for anything else."""
    args: Any = node.args
    if node.op != "call_function":
        return None
    if node.target is aten.linear.default:
        bias = args[2] if len(args) > 2 else None
        return _right(node, args[0], operand(args[1], program), bias, transposed=True)
    if node.target in (aten.mm.default, aten.matmul.default, aten.bmm.default):
        if weight := operand(args[1], program):
            return _right(node, args[0], weight, None, transposed=False)
        return _left(node, operand(args[0], program), args[1])
    if node.target is aten.addmm.default:
        if any(scale != 1 for scale in node.kwargs.values()):
            return "it scales its summands" if operand(args[2], program) else None
        return _right(node, args[1], operand(args[2], program), args[0], transposed=False)
    if node.target is aten.einsum.default:
        return _einsum(node, program)
    return None


def _right(
    node: fx.Node, x: fx.Node, weight: Operand | None, bias: fx.Node | None, *, transposed: bool
) -> Contraction | str | None:
    """``x @ W``, or ``x @ W^T`` where ``transposed``."""
    if weight is None:
        return None
    if len(weight.axes) < 2:
        return "the weight is a vector"
    *batch, first, second = weight.axes
    if any(axis is not None for axis in batch):
        return "the weight has a batch dimension"
    out, inner = (first, second) if transposed else (second, first)
    rank = len(shapes.shape(x))
    if out is None or inner is None or len(shapes.shape(node)) != rank:
        return "the weight is broadcast into the product"
    order = tuple(range(rank))
    return Contraction(node, x, weight.name, order, 1, (out, inner), 1, order, bias)


def _left(node: fx.Node, weight: Operand | None, x: fx.Node) -> Contraction | str | None:
    """``W @ x`` = ``(x^T @ W^T)^T`` on the last two dimensions."""
    if weight is None:
        return None
    rank = len(shapes.shape(x))
    if len(weight.axes) < 2 or rank < 2:
        return "one side is a vector"
    *batch, out, inner = weight.axes
    if any(axis is not None for axis in batch):
        return "the weight has a batch dimension"
    if out is None or inner is None or len(shapes.shape(node)) != rank:
        return "the weight is broadcast into the product"
    swapped = (*range(rank - 2), rank - 1, rank - 2)
    return Contraction(node, x, weight.name, swapped, 1, (out, inner), 1, swapped)


def _einsum(node: fx.Node, program: Program) -> Contraction | str | None:
    equation, tensors = str(node.args[0]).replace(" ", ""), list(node.args[1])  # type: ignore[arg-type]
    weights = [operand(t, program) for t in tensors]
    if not any(weights):
        return None
    if len(tensors) != 2 or all(weights):
        return "it is an einsum of other than one weight and one value"
    at = 0 if weights[0] else 1
    weight, x = weights[at], tensors[1 - at]
    assert weight is not None and isinstance(x, fx.Node)
    letters = _letters(equation, [len(shapes.shape(t)) for t in tensors])
    if letters is None:
        return "its einsum repeats an index or has an ellipsis beyond ours"
    terms, result = letters
    of_x, of_weight = terms[1 - at], terms[at]
    contracted = [i for i in of_weight if i in of_x and i not in result]
    outs = [i for i in of_weight if i not in of_x]
    kept = [i for i in of_x if i not in contracted]
    if any(i in of_x and i in result for i in of_weight):
        return "the weight has a batch dimension"
    if set(kept) | set(outs) != set(result) or not contracted or not outs:
        return "its einsum is not a product of matrices"
    if any(axis is None for axis in weight.axes):
        return "the weight is broadcast into the product"
    axis_of = dict(zip(of_weight, weight.axes, strict=True))
    return Contraction(
        node, x, weight.name,
        tuple(of_x.index(i) for i in (*kept, *contracted)), len(contracted),
        tuple(a for i in (*outs, *contracted) if (a := axis_of[i]) is not None), len(outs),
        tuple([*kept, *outs].index(i) for i in result),
    )  # fmt: skip


def _letters(equation: str, ranks: list[int]) -> tuple[list[_Letters], _Letters] | None:
    """Indices of each operand and of the result; None where an index repeats within one.

    An ellipsis becomes indices ``0, 1, ...`` counted from the right.
    """
    left, arrow, right = equation.partition("->")
    terms: list[_Letters] = []
    dots: list[int] = []
    for term, rank in zip(left.split(","), ranks, strict=True):
        before, ellipsis, after = term.partition("...")
        count = rank - len(before) - len(after) if ellipsis else 0
        inside = list(range(count))[::-1]
        dots = max(dots, inside, key=len)
        terms.append([*before, *inside, *after])
    if arrow:
        before, ellipsis, after = right.partition("...")
        result: _Letters = [*before, *(dots if ellipsis else []), *after]
    else:
        flat = [i for term in terms for i in term if isinstance(i, str)]
        result = [*dots, *sorted(i for i in set(flat) if flat.count(i) == 1)]
    repeated = any(len(set(term)) != len(term) for term in (*terms, result))
    return None if repeated else (terms, result)
