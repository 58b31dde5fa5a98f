"""Every product with a weight becomes ``aten.linear(x, W, b)`` with ``W [out, in]``.

Models write products in many forms: ``addmm`` between two views (GPT-2),
``einsum`` (XLNet), ``matmul`` by a transposed parameter. All are the contraction

    y = x W^T + b

up to permutations (:mod:`ftc.passes.contraction`). Here the weight is *stored*
as ``[out, in]``, a view of the same memory where strides allow, and the product
reads it directly, so that every later pass sees one kind of node. A weight is
stored anew only when all its readers are products that want it so; a weight of
one matrix per batch element (experts) stays as it is. Parameters keep their names.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import fx

from ftc.graph import shapes
from ftc.graph.rewriter import Rewriter
from ftc.graph.words import plural

from .base import Context, Effect, Pass
from .contraction import VIEWS, Contraction, recognise

aten = torch.ops.aten

_RESHAPES = (aten.view.default, aten.reshape.default, aten.flatten.using_ints,
             aten._unsafe_view.default)  # fmt: skip


@dataclass(frozen=True)
class Canonicalize(Pass):
    """Write every product with a weight as linear with the weight stored [out, in]."""

    name: ClassVar[str] = "canonicalize"
    effect: ClassVar[Effect] = Effect.EXACT
    provides: ClassVar[frozenset[str]] = frozenset({"canonical"})

    def rewrite(self, rw: Rewriter, ctx: Context) -> None:
        """Rewrites weight by weight, then takes biases that are added afterwards into products."""
        by_weight: dict[str, list[Contraction]] = {}
        left: list[tuple[str, str]] = []
        for node in rw.graph.nodes:
            found = recognise(node, rw.program)
            if isinstance(found, Contraction):
                by_weight.setdefault(found.weight, []).append(found)
            elif found is not None:
                left.append((found, node.name))
        relaid = rewritten = 0
        moved: dict[fx.Node, fx.Node] = {}
        for weight, contractions in by_weight.items():
            if reason := _obstacle(rw, weight, contractions):
                left.append((reason, weight))
                continue
            stored_so = contractions[0].is_stored_so
            if not stored_so:
                _store(rw, contractions[0])
                relaid += 1
            for contraction in contractions:
                if not stored_so or contraction.node.target is not aten.linear.default:
                    _emit(rw, contraction, moved)
                    rewritten += 1
        biases = sum(_take_bias(rw, node) for node in list(rw.graph.nodes))
        _say(rw, rewritten, relaid, biases, left)


def _obstacle(rw: Rewriter, weight: str, contractions: list[Contraction]) -> str | None:
    """Why the weight cannot be stored as its products want it."""
    layouts = {c.layout for c in contractions}
    if len(layouts) > 1:
        return "products read the weight in two layouts"
    if contractions[0].is_stored_so:
        return None
    products = {c.node for c in contractions}
    if any(reader not in products for reader in _readers(rw.get_attr(weight))):
        return "others read the weight as it is stored"
    return None


def _readers(node: fx.Node) -> Iterator[fx.Node]:
    """What computes with a parameter, behind transpositions and broadcasts."""
    for user in node.users:
        if user.target in VIEWS:
            yield from _readers(user)
        else:
            yield user


def _store(rw: Rewriter, contraction: Contraction) -> None:
    """Stores the parameter as ``[out, in]``."""
    tensor = rw.program.tensor(contraction.weight).detach().permute(contraction.weight_order)
    rows = math.prod(tensor.shape[: contraction.out])
    rw.set_tensor(contraction.weight, tensor.reshape(rows, -1))


def _emit(rw: Rewriter, c: Contraction, moved: dict[fx.Node, fx.Node]) -> None:
    """Replaces one product, and the reshapes around it where there are any.

    ``moved`` says what became of nodes that were replaced since ``c`` was
    recognised: a product may read another directly.
    """
    bias = None if c.bias is None else moved.get(c.bias, c.bias)
    c = replace(c, x=moved.get(c.x, c.x), bias=bias)
    outer = _reshaped_again(c)
    for old in outer or [c.node]:
        with rw.at(old):
            new = _linear(rw, c, whole=outer is not None)
        rw.replace(old, new)
        moved[old] = new


def _linear(rw: Rewriter, c: Contraction, *, whole: bool) -> fx.Node:
    """The canonical form of a product; ``whole``: of the value that ``c.x`` is a reshape of."""
    bias = c.bias if c.bias is not None and _is_row(c.bias, c.weight, rw) else None
    sizes = _out_sizes(c)
    weight = rw.get_attr(c.weight)
    x: Any = c.x.args[0] if whole else c.x
    if c.x_order != tuple(range(len(c.x_order))):
        x = rw.call(aten.permute.default, x, list(c.x_order))
    if c.contracted > 1:
        x = rw.call(aten.flatten.using_ints, x, -c.contracted, -1)
    y = rw.call(aten.linear.default, x, weight, *([] if bias is None else [bias]))
    if c.out > 1:
        y = rw.call(aten.unflatten.int, y, -1, sizes)
    if c.y_order != tuple(range(len(c.y_order))):
        y = rw.call(aten.permute.default, y, list(c.y_order))
        if any(user.target is aten.view.default for user in c.node.users):
            y = rw.call(aten.contiguous.default, y)  # a view needs the strides that it had
    if c.bias is not None and bias is None:
        y = rw.call(aten.add.Tensor, y, c.bias)
    return y


def _out_sizes(c: Contraction) -> list[int]:
    """Sizes of the output dimensions, in the order that the weight has them."""
    kept = len(c.x_order) - c.contracted
    sizes = shapes.shape(c.node)
    return [sizes[c.y_order.index(kept + i)] for i in range(c.out)]


def _reshaped_again(c: Contraction) -> list[fx.Node] | None:
    """The reshapes after a product of rows that undo the reshape before it; None without one.

    ``view(x, [-1, in])``, product, ``view(y, [*x.shape[:-1], out])`` is the
    product of ``x`` itself.
    """
    inner = c.x.args[0] if c.x.op == "call_function" and c.x.target in _RESHAPES else None
    if not isinstance(inner, fx.Node) or len(c.x_order) != 2 or c.x_order != (0, 1):
        return None
    wide, rows, out = shapes.shape(inner), shapes.shape(c.x), shapes.shape(c.node)
    if len(wide) < 2 or not shapes.same_size(wide[-1], rows[-1]) or c.out != 1:
        return None
    if c.bias is not None and len(shapes.shape(c.bias)) != 1:
        return None
    wanted = (*wide[:-1], out[-1])
    for user in c.node.users:
        if user.target not in _RESHAPES or not _same_shape(shapes.shape(user), wanted):
            return None
    return list(c.node.users) or None


def _same_shape(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    return len(a) == len(b) and all(map(shapes.same_size, a, b))


def _is_row(bias: fx.Node, weight: str, rw: Rewriter) -> bool:
    """Whether ``bias`` is a parameter ``[out]`` of the weight's dtype."""
    matrix = rw.program.tensor(weight)
    return (
        bias.op == "get_attr"
        and shapes.shape(bias) == (matrix.shape[0],)
        and shapes.value(bias).dtype == matrix.dtype
    )


def _take_bias(rw: Rewriter, node: fx.Node) -> bool:
    """``linear(x, W) + b`` becomes ``linear(x, W, b)`` where nothing else reads the product."""
    if node.op != "call_function" or node.target is not aten.add.Tensor or node.kwargs:
        return False
    for product, bias in (node.args, reversed(node.args)):
        if (
            isinstance(product, fx.Node)
            and isinstance(bias, fx.Node)
            and product.target is aten.linear.default
            and all(argument is None for argument in product.args[2:])
            and set(product.users) == {node}
            and isinstance(matrix := product.args[1], fx.Node)
            and matrix.op == "get_attr"
            and _is_row(bias, str(matrix.target), rw)
        ):
            with rw.at(node):
                rw.replace(node, rw.call(aten.linear.default, *product.args[:2], bias))
            rw.erase(product)
            return True
    return False


def _say(
    rw: Rewriter, rewritten: int, relaid: int, biases: int, left: list[tuple[str, str]]
) -> None:
    if rewritten:
        rw.note(
            f"rewrote {plural(rewritten, 'product')} as linear, "
            f"{plural(relaid, 'weight')} stored anew"
        )
    if biases:
        rw.note(f"took {plural(biases, 'bias', 'biases')} into products")
    for reason, count in Counter(reason for reason, _ in left).items():
        example = next(name for other, name in left if other == reason)
        more = f" and {count - 1} more" if count > 1 else ""
        rw.note(f"left {example}{more}: {reason}")
