"""Int4: weights of 4 bits in groups that share a scale.

A product ``y = x W^T + b`` becomes ``ftc::quantized_linear`` at 4 bits (see
:mod:`ftc.graph.quantized_ops`), a table lookup ``ftc::quantized_embedding``; a
tied embedding and head stay one table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, fx

from ftc.graph import quantized_ops  # noqa: F401  (registers torch.ops.ftc)
from ftc.graph.quantize import Scheme, choose_qparams, pack, quantize
from ftc.graph.rewriter import Rewriter
from ftc.graph.select import select

from .base import Context, Effect, Pass

aten, ops = torch.ops.aten, torch.ops.ftc


@dataclass(frozen=True)
class Int4(Pass):
    """Quantize weights to 4 bits in groups that share a scale.

    Options:
        select: which weights, a selector.
        group_size: how many weights of a row share a scale: 16, 32, 64, 128 or 256.
        symmetric: no zero points.
        activation: how a product's input is quantized at run time: ``block`` (each
            group of a row by its own largest magnitude) or ``none``.
        min_size: leave weights with fewer elements as they are.
    """

    name: ClassVar[str] = "int4"
    effect: ClassVar[Effect] = Effect.APPROXIMATE
    needs: ClassVar[frozenset[str]] = frozenset({"canonical"})
    provides: ClassVar[frozenset[str]] = frozenset({"quantized"})

    select: str = "product | embedding"
    group_size: int = 32
    symmetric: bool = False
    activation: Literal["block", "none"] = "block"
    min_size: int = 2048

    def rewrite(self, rw: Rewriter, ctx: Context) -> None:
        tensors = dict(rw.program.tensors())
        for name in sorted(select(self.select, rw.program)):
            weight = tensors.get(name)
            if weight is None or weight.dim() != 2 or weight.numel() < self.min_size:
                continue
            if weight.shape[1] % self.group_size:
                continue
            readers = list(rw.get_attr(name).users)
            self._quantize(rw, name, weight.detach(), readers)

    def _quantize(self, rw: Rewriter, name: str, weight: Tensor, readers: list[fx.Node]) -> None:
        scheme = Scheme(4, self.group_size, self.symmetric)
        scale, zero = choose_qparams(weight, scheme)
        codes = quantize(weight, scale, zero, scheme)
        rw.remove_tensor(name)
        parts = [
            rw.add_buffer(f"{name}.quantized", pack(codes)),
            rw.add_buffer(f"{name}.scale", scale),
        ]
        parts.append(None if zero is None else rw.add_buffer(f"{name}.zero_point", zero))
        for reader in readers:
            with rw.at(reader):
                if reader.target is aten.linear.default:
                    bias = reader.args[2] if len(reader.args) > 2 else None
                    new = rw.call(
                        ops.quantized_linear.default,
                        reader.args[0],
                        *parts,
                        bias,
                        4,
                        self.group_size,
                        self.activation,
                    )
                else:
                    new = rw.call(
                        ops.quantized_embedding.default, *parts, reader.args[1], 4, self.group_size
                    )
                rw.replace(reader, new)
