"""What passes that quantize share: sizes of groups, and the nodes that read a weight.

Whoever quantizes a weight replaces all its readers, or none: a weight that one reader
still needs in float would be stored twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from ftc.graph import quantized_ops  # noqa: F401  (registers torch.ops.ftc)
from ftc.graph.errors import UsageError
from ftc.graph.rewriter import Rewriter
from ftc.graph.shapes import value

aten, ops = torch.ops.aten, torch.ops.ftc

PRODUCTS_AND_TABLES: Mapping[object, int] = {
    aten.linear.default: 1,
    aten.embedding.default: 0,
}
"""Operators by the position of their weight."""

ALL: Mapping[object, int] = {
    **PRODUCTS_AND_TABLES,
    aten.conv1d.default: 1,
    aten.conv2d.default: 1,
    aten.conv3d.default: 1,
    aten.conv1d.padding: 1,
    aten.conv2d.padding: 1,
}
"""Convolutions too, whose arithmetic stays in float."""


_GROUPS = (16, 32, 64, 128, 256)


def check_group_size(given: Any, size: int) -> None:
    """Raises UsageError where the ``group_size`` of the pass ``given`` is one no kernel knows."""
    if size not in _GROUPS:
        raise UsageError(
            f"{given.name}{{group_size={size}}}: groups are 16, 32, 64, 128 or 256 weights",
            fix=replace(given, group_size=32).spec,
        )


def unsupported(weight: fx.Node, positions: Mapping[object, int]) -> fx.Node | None:
    """The first reader that has no form for codes, or reads ``weight`` in another place too."""
    for reader in weight.users:
        places = [i for i, argument in enumerate(reader.args) if argument is weight]
        if places != [positions.get(reader.target)]:
            return reader
    return None


def quantized_reader(
    rw: Rewriter,
    reader: fx.Node,
    codes: tuple[fx.Node, fx.Node, fx.Node | None],
    how: tuple[int, int],
    activation: tuple[Any, ...],
    *,
    x: Any = None,
    bias: Any = None,
) -> fx.Node:
    """A node like ``reader`` that reads codes; to be called at its place.

    Args:
        rw: of the program.
        reader: one of :data:`ALL`.
        codes: data, scale and zero point or None, as buffers.
        how: bits and group size.
        activation: what ``ftc::quantized_linear`` is told about its input; of a product.
        x: the input of a product; None: that of ``reader``.
        bias: of a product; None: that of ``reader``.

    Returns:
        A node of the value and dtype of ``reader``.
    """
    if reader.target is aten.linear.default:
        x = reader.args[0] if x is None else x
        bias = (*reader.args, None)[2] if bias is None else bias
        return rw.call(ops.quantized_linear.default, x, *codes, bias, *how, *activation)
    if reader.target is aten.embedding.default:
        rows = rw.call(ops.quantized_embedding.default, *codes, reader.args[1], *how)
        dtype = value(reader).dtype
        return rows if value(rows).dtype == dtype else rw.call(aten.to.dtype, rows, dtype)
    args = list(reader.args)
    args[ALL[reader.target]] = rw.call(ops.dequantize.default, *codes, *how)
    assert callable(reader.target)
    return rw.call(reader.target, *args, **reader.kwargs)
