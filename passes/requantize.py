"""A change of a quantized weight: its float values plus the change, rounded again.

The scheme stays what it was: bits, groups, with or without zero points, the range.
Codes with extra columns (a kept 4-bit grid, see :mod:`ftc.passes.int4`) become plain
ones with zero points.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from ftc.graph.cost import argument
from ftc.graph.errors import PreconditionError
from ftc.graph.products import appended_share, plain_input
from ftc.graph.provenance import describe
from ftc.graph.quantize import Scheme, dequantize, is_reduced, pack
from ftc.graph.rewriter import Rewriter

from .rounding import to_nearest

ops = torch.ops.ftc


def requantize(rw: Rewriter, weight: str, change: Tensor, products: list[fx.Node]) -> list[fx.Node]:
    """Adds ``change`` ``[out, in]`` to the quantized ``weight``; returns the new products.

    Raises:
        PreconditionError: where something else reads the codes too.
    """
    coded = [_coded(node) for node in products]
    for reader in rw.get_attr(f"{weight}.quantized").users:
        if reader not in coded:
            raise PreconditionError(
                f"{rw.made_by}: {reader.target} reads the codes of {weight} too",
                where=describe(reader),
                fix="leave merge out: the adapter runs, saves and lowers beside the codes",
            )
    scheme, values = _values(rw, coded[0], change.shape[1])
    new = to_nearest((values + change.view(values.shape)).float(), scheme).coded
    data = pack(new.codes) if scheme.bits == 4 else new.codes
    for suffix, tensor in (
        ("quantized", data),
        ("scale", new.scale),
        ("zero_point", new.zero_point),
    ):
        _set(rw, f"{weight}.{suffix}", tensor)
    return [_replaced(rw, node, weight, scheme) for node in products]


def _coded(product: fx.Node) -> Any:
    """The node that reads the codes: the product, or what restores a convolution's weight."""
    return product if product.target is ops.quantized_linear.default else product.args[1]


def _values(rw: Rewriter, coded: fx.Node, width: int) -> tuple[Scheme, Tensor]:
    """How a weight is quantized, and its values in float64, extra columns added in."""
    names = ("data", "scale", "zero_point")
    data, scale, zero = (_tensor(rw, argument(coded, name)) for name in names)
    assert data is not None and scale is not None
    bits, group = int(argument(coded, "bits")), int(argument(coded, "group_size"))
    values = dequantize(data, scale, zero, bits).double()
    columns = values.flatten(1)
    narrow = bits == 8 and not group and is_reduced(data)
    share = appended_share(coded)
    extended = columns.shape[1] > width
    if extended:
        appended = columns[:, width : width + width // group] * share
        values = columns[:, :width] + appended.repeat_interleave(group, 1)
    return Scheme(bits, group, zero is None and not extended, narrow), values


def _tensor(rw: Rewriter, node: Any) -> Tensor | None:
    return None if node is None else rw.program.tensor(str(node.target)).detach()


def _set(rw: Rewriter, name: str, tensor: Tensor | None) -> None:
    if tensor is None:
        return
    if any(name == known for known, _ in rw.program.tensors()):
        rw.set_tensor(name, tensor)
    else:
        rw.add_buffer(name, tensor)


def _replaced(rw: Rewriter, product: fx.Node, weight: str, scheme: Scheme) -> fx.Node:
    """The product anew, for the values of its codes may have another shape."""
    data, scale = (rw.get_attr(f"{weight}.{suffix}") for suffix in ("quantized", "scale"))
    zero = None if scheme.symmetric else rw.get_attr(f"{weight}.zero_point")
    how = (scheme.bits, scheme.group_size)
    target: Any = product.target
    with rw.at(product):
        if target is ops.quantized_linear.default:
            bias, activation = argument(product, "bias"), argument(product, "activation")
            step = argument(product, "step")
            seen = (activation,) if step is None else (activation, step)
            new = rw.call(target, plain_input(product), data, scale, zero, bias, *how, *seen)
        else:
            restored = rw.call(ops.dequantize.default, data, scale, zero, *how)
            new = rw.call(target, product.args[0], restored, *product.args[2:], **product.kwargs)
    rw.replace(product, new)
    return new
