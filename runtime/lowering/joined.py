"""Products of one input as one product, for an operator that takes their results side by side.

    [x Q^T + a, x K^T + b, x V^T + c]  =  x [Q; K; V]^T + [a; b; c]

Products are told by what they are and not by their names: the same operator on the same
input, with the same options, each read once. Whatever they hold, floats or codes with their
steps and zero points, has an output a row and is joined by rows, and the operator's own
translation makes the product of it. To split what was joined costs what joining saves, so
only who reads it whole asks for it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from onnx_ir import Value
from torch import Tensor, fx

from ftc.graph.cost import operator_name
from ftc.graph.shapes import VAL

from .emitter import Emitter

_PRODUCT = "ftc.product"
_TARGETS = frozenset({"aten.linear", "ftc.quantized_linear"})
_ROWS = ("weight", "data", "scale", "zero_point", "bias")  # what has an entry for each output


@dataclass(frozen=True, slots=True)
class _Product:
    """How a value was made.

    Attributes:
        node: of the program.
        translate: what translated it.
        rows: operands that have a row an output, or None where one was left out.
        rest: the other arguments, the input first.
    """

    node: fx.Node
    translate: Callable[..., Value]
    rows: Mapping[str, Value | None]
    rest: Mapping[str, Any]


def remember(node: fx.Node, value: Any, translate: Any, args: Any, kwargs: Any) -> None:
    """Says of ``value`` that it is a product that ``translate`` made of these arguments."""
    if operator_name(node) not in _TARGETS or len(node.users) != 1 or not isinstance(value, Value):
        return
    bound = inspect.signature(translate).bind(None, *args, **kwargs)
    bound.apply_defaults()
    given = dict(list(bound.arguments.items())[1:])
    rows = {name: given.pop(name) for name in _ROWS if name in given}
    if all(x is None or x.const_value is not None for x in rows.values()):
        value.meta[_PRODUCT] = _Product(node, translate, rows, given)


def joined(e: Emitter, values: Sequence[Value]) -> Value | None:
    """``values`` ``[..., n_i]`` beside each other, ``[..., sum n_i]``.

    None but for the parts of one value and for products of one input, which cost less joined.
    """
    if (whole := _whole(e, values)) is not None:
        return whole
    products: list[_Product | None] = [value.meta.get(_PRODUCT) for value in values]
    first = products[0]
    if first is None or not all(other is not None and _alike(first, other) for other in products):
        return None
    made = [product for product in products if product is not None]
    rows = {name: _joined_rows(e, name, made) for name in first.rows}
    width = sum(e.dims(value)[-1] for value in values)
    outer = e.node, e.out
    fake: Tensor = first.node.meta[VAL]
    e.node, e.out = first.node, fake.new_empty((*fake.shape[:-1], width))
    try:
        result = first.translate(e, **first.rest, **rows)
        e.describe(result, fake.dtype, e.sizes.dims(e.out))
    finally:
        e.node, e.out = outer
    return result


def _whole(e: Emitter, values: Sequence[Value]) -> Value | None:
    """What ``values`` are all the parts of, in order and along the last axis; None without one."""
    maker = values[0].producer()
    if maker is None or maker.op_type != "Split" or list(maker.outputs) != list(values):
        return None
    last = maker.attributes["axis"].as_int() == e.rank(values[0]) - 1
    return maker.inputs[0] if last else None


def _alike(a: _Product, b: _Product) -> bool:
    """Whether one product can compute both."""
    if a.translate is not b.translate or a.rest.keys() != b.rest.keys():
        return False
    if any(x is not y and (isinstance(x, Value) or x != y)
           for x, y in zip(a.rest.values(), b.rest.values(), strict=True)):  # fmt: skip
        return False
    return all(_fits(name, a.rows[name], b.rows[name]) for name in a.rows)


def _fits(name: str, a: Value | None, b: Value | None) -> bool:
    """Whether rows can be joined: of one width and type, and a bias also with none."""
    if a is None or b is None:
        return (a is b) or name == "bias"
    mine, other = _tensor(a), _tensor(b)
    return mine.shape[1:] == other.shape[1:] and mine.dtype == other.dtype


def _joined_rows(e: Emitter, name: str, products: Sequence[_Product]) -> Value | None:
    operands = [product.rows[name] for product in products]
    if all(x is None for x in operands):
        return None
    like = next(_tensor(x) for x in operands if x is not None)
    parts = [_tensor(x) if x is not None else like.new_zeros(_outputs(product))
             for x, product in zip(operands, products, strict=True)]  # fmt: skip
    title = next(x.name for x in operands if x is not None and x.name)
    return e.weight(f"{title}.joined", torch.cat(parts))


def _outputs(product: _Product) -> int:
    return int(product.node.meta[VAL].shape[-1])


def _tensor(value: Value) -> Tensor:
    held: Any = value.const_value
    tensor: Tensor = held.raw
    return tensor
