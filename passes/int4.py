"""Int4: weights of 4 bits in groups that share a step, as close to float as 4 bits allow.

A product ``y = x W^T + b`` becomes ``ftc::quantized_linear`` at 4 bits (see
:mod:`ftc.graph.quantized_ops`), a table lookup ``ftc::quantized_embedding``; a
tied embedding and head stay one table. onnxruntime multiplies by the codes
themselves (``MatMulNBits``), with each group of the activations on 255 steps.

How the weights are rounded is in :mod:`ftc.passes.rounding`: weights that come
from a 4-bit file keep their codes, all others are rounded one after another so
that errors cancel on the calibration data. A weight that keeps its grid may need
zero points that are not whole; what is left of them multiplies means of groups of
the input, which are appended to it:

    x' = [x, mean of group 1, ..., mean of group n, 0, ..., 0]
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import fx

from ftc.graph.errors import UsageError
from ftc.graph.provenance import describe
from ftc.graph.quantize import Scheme, pack
from ftc.graph.rewriter import Rewriter
from ftc.graph.select import select
from ftc.graph.shapes import value
from ftc.graph.words import listed, plural

from .base import Context, Effect, Pass
from .biases import with_values
from .budget import Levels, Search, drift_of, milder_rounding
from .context import random_rows
from .int8 import Int8
from .options import check_share
from .quantizing import PRODUCTS_AND_TABLES, check_group_size, quantized_reader, unsupported
from .residual import largest_rank
from .rounding import Rounded, Rounding, kept, to_nearest

aten = torch.ops.aten

_FLOAT = 2  # levels of max_drift: 0 for 4 bits, 1 for the fallback, 2 for float


@dataclass(frozen=True)
class Int4(Pass):
    """Quantize weights to 4 bits in groups that share a scale.

    Options:
        select: which weights, a selector.
        group_size: how many weights of a row share a scale: 16, 32, 64, 128 or 256.
        symmetric: no zero points: a little smaller, and less precise.
        method: ``gptq`` rounds so that errors cancel on the calibration data, ``rtn``
            to the nearest code.
        keep: leave weights that are on a 4-bit grid already on it.
        activation: how a product's input is quantized at run time: ``block`` (each
            group of a row by its own largest magnitude; several times faster) or
            ``none``.
        max_error: largest relative error of a product's output on the calibration
            data; weights beyond it are left to the fallback.
        fallback: what becomes of weights that 4 bits do not suit: ``int8``, or
            ``none`` to leave them in float.
        min_size: leave weights with fewer elements as they are.
        max_drift: largest relative drift of the outputs on the probes; the most sensitive
            weights are left to the fallback, or in float, until it is kept.
        residual_rank: the rank, 0 or more, of what is added to each product for its rounding
            error, in 8 bits; 0 adds nothing.
    """

    name: ClassVar[str] = "int4"
    effect: ClassVar[Effect] = Effect.APPROXIMATE
    needs: ClassVar[frozenset[str]] = frozenset({"canonical"})
    provides: ClassVar[frozenset[str]] = frozenset({"quantized"})

    select: str = "product | embedding"
    group_size: int = 32
    symmetric: bool = False
    method: Literal["gptq", "rtn"] = "gptq"
    keep: bool = True
    activation: Literal["block", "none"] = "block"
    max_error: float | None = None
    fallback: Literal["none", "int8"] = "none"
    min_size: int = 2048
    max_drift: float | None = None
    residual_rank: int = 0

    def __post_init__(self) -> None:
        check_group_size(self, self.group_size)
        if self.min_size < 0:
            raise UsageError(
                f"int4{{min_size={self.min_size}}}: a number of elements, 0 or more",
                fix="int4{min_size=2048}",
            )
        if self.residual_rank < 0:
            raise UsageError(
                f"int4{{residual_rank={self.residual_rank}}}: a rank, 0 or more",
                fix="int4{residual_rank=16}",
            )
        check_share(self, "max_drift", 0.1)
        check_share(self, "max_error", 0.1)
        if self.max_error is not None and self.method != "gptq":
            raise UsageError(
                f"int4{{max_error={self.max_error},method={self.method}}}: only gptq measures it",
                fix=replace(self, method="gptq").spec,
            )

    def milder(self, bound: float) -> str:
        """Mixed precision, or fewer weights."""
        return milder_rounding(self, bound)

    def rewrite(self, rw: Rewriter, ctx: Context) -> None:
        """Rounds every selected weight whose readers all have a quantized form."""
        readers, unfit = self._chosen(rw)
        rounded = self._rounded(rw, ctx, readers)
        levels = dict.fromkeys(unfit, 1)
        levels |= {name: 1 for name, each in rounded.items() if self._is_too_far(each)}
        if self.max_drift is not None and rounded:
            before = rw.program.clone()

            def drift(found: Levels) -> float:
                every = {**levels, **found}
                return drift_of(
                    before, ctx, self.spec, lambda trial: self._apply(trial, ctx, rounded, every)
                )

            sizes = {n: rw.program.tensor(n).numel() for n in rounded if n not in levels}
            top = _FLOAT if self.fallback == "int8" else 1
            levels |= Search(sizes, top, drift)(self.max_drift, self.spec)
        self._apply(rw, ctx, rounded, levels)

    def _apply(
        self, rw: Rewriter, ctx: Context, rounded: Mapping[str, Rounded], levels: Levels
    ) -> None:
        """Replaces the weights of level 0 by 4 bits, those of level 1 by the fallback."""
        means = _GroupMeans(rw, self.group_size)
        done = {name: each for name, each in rounded.items() if not levels.get(name)}
        left = [name for name, level in levels.items() if level == 1]
        for name, each in done.items():
            self._replace(rw, name, list(rw.get_attr(name).users), each, means)
        added = [name for name, each in done.items() if each.residual is not None]
        if added:
            factors = [f"{name}.residual.{part}" for name in added for part in "AB"]
            Int8(select=" | ".join(factors), min_size=0).rewrite(rw, ctx)
        self._say(rw, done, left)
        if self.residual_rank:
            self._check_rank(done, added)
            rw.note(f"a residual of rank {self.residual_rank} at {plural(len(added), 'product')}; "
                    "the others keep their weight, share it, or are too small")  # fmt: skip
        if left and self.fallback == "int8":
            Int8(select=" | ".join(left), min_size=self.min_size).rewrite(rw, ctx)
        if floats := [name for name, level in levels.items() if level == _FLOAT]:
            rw.note(f"left in float, to keep a drift of {self.max_drift:g}: {listed(floats)}")

    def _chosen(self, rw: Rewriter) -> tuple[dict[str, list[fx.Node]], list[str]]:
        """Readers of each weight to round; names of those that 4 bits in groups do not fit."""
        readers: dict[str, list[fx.Node]] = {}
        unfit: list[str] = []
        tensors = dict(rw.program.tensors())
        for name in sorted(select(self.select, rw.program)):
            weight = tensors.get(name)  # None: it is quantized already
            if weight is None or not weight.is_floating_point() or weight.numel() < self.min_size:
                continue
            node = rw.get_attr(name)
            if (other := unsupported(node, PRODUCTS_AND_TABLES)) is not None:
                rw.note(f"left {name}: {other.target} reads it too ({describe(other)})")
                unfit.append(name)
            elif weight.shape[1] % self.group_size:
                unfit.append(name)
            else:
                readers[name] = list(node.users)
        return readers, unfit

    def _rounded(
        self, rw: Rewriter, ctx: Context, readers: Mapping[str, list[fx.Node]]
    ) -> dict[str, Rounded]:
        scheme = Scheme(4, self.group_size, self.symmetric)
        done = kept(rw.program, readers, scheme) if self.keep else {}
        left = {name: nodes for name, nodes in readers.items() if name not in done}
        if self.method == "rtn":
            tensors = {name: rw.program.tensor(name).detach() for name in left}
            return done | {
                name: to_nearest(weight, scheme, self._rank_for(left[name]))
                for name, weight in tensors.items()
            }
        data = ctx.calibration or random_rows(rw.program, ctx.seed)
        return done | Rounding(rw.program, data, scheme, self.residual_rank)(left)

    def _rank_for(self, readers: list[fx.Node]) -> int:
        """Only what one product alone reads has a residual."""
        alone = len(readers) == 1 and readers[0].target is aten.linear.default
        return self.residual_rank if alone else 0

    def _check_rank(self, rounded: Mapping[str, Rounded], added: list[str]) -> None:
        """Refuses a rank that no weight which was rounded is large enough for."""
        shapes = [each.coded.codes.shape for each in rounded.values() if each.error != 0.0]
        largest = max((largest_rank(*shape) for shape in shapes), default=0)
        if not added and 0 < largest < self.residual_rank:
            raise UsageError(
                f"int4{{residual_rank={self.residual_rank}}}: for no product is that thin",
                fix=f"a rank of {largest} at most, for the largest of them",
            )

    def _is_too_far(self, rounded: Rounded) -> bool:
        error = rounded.error or 0.0
        return self.max_error is not None and error > self.max_error

    def _replace(
        self, rw: Rewriter, name: str, readers: list[fx.Node], rounded: Rounded, means: _GroupMeans
    ) -> None:
        """Replaces one weight and all its readers."""
        coded = rounded.coded
        rw.remove_tensor(name)
        data = rw.add_buffer(f"{name}.quantized", pack(coded.codes))
        scale = rw.add_buffer(f"{name}.scale", coded.scale)
        zero = None
        if coded.zero_point is not None:
            zero = rw.add_buffer(f"{name}.zero_point", coded.zero_point)
        how = (4, self.group_size)
        for reader in readers:
            x = means.extended(reader, rounded.extra) if rounded.extra else None
            bias = None
            if rounded.bias is not None:
                bias = with_values(rw, (*reader.args, None)[2], f"{name}.bias", rounded.bias)
            with rw.at(reader):
                new = quantized_reader(
                    rw, reader, (data, scale, zero), how, (self.activation,), x=x, bias=bias
                )
                if rounded.residual is not None:
                    new = rounded.residual.add(rw, name, reader, new)
            rw.replace(reader, new)

    def _say(self, rw: Rewriter, rounded: Mapping[str, Rounded], unfit: list[str]) -> None:
        same = [each for each in rounded.values() if each.error == 0.0]
        if same:
            count = sum(len(e.coded.codes) * (e.coded.codes.shape[1] - e.extra) for e in same)
            extra = sum(each.extra > 0 for each in same)
            rw.note(
                f"kept the codes of {plural(len(same), 'weight')} ({count:,} elements), on a "
                "4-bit grid already"
                + (f", {extra} with columns for their zero points" if extra else "")
            )
        errors = {n: e.error for n, e in rounded.items() if e.error}
        if errors:
            worst = max(errors, key=errors.__getitem__)
            rw.note(
                f"rounded {plural(len(rounded) - len(same), 'weight')}; the largest relative error "
                f"of an output on the calibration data is {errors[worst]:.2%}, of {worst}"
            )
        elif len(rounded) > len(same):
            rw.note(f"rounded {plural(len(rounded) - len(same), 'weight')} to the nearest code")
        if unfit:
            what = "quantized to 8 bits" if self.fallback == "int8" else "left in float"
            rw.note(f"{what}, since 4 bits do not suit them: {listed(unfit)}")


class _GroupMeans:
    """Inputs with the means of their groups behind them, one for all products of an input."""

    def __init__(self, rw: Rewriter, group_size: int) -> None:
        self._rw, self._size = rw, group_size
        self._made: dict[tuple[fx.Node, int], fx.Node] = {}

    def extended(self, product: fx.Node, extra: int) -> fx.Node:
        """The input of ``product`` with ``extra`` columns more."""
        x = product.args[0]
        assert isinstance(x, fx.Node)
        if (x, extra) not in self._made:
            call, count = self._rw.call, value(x).shape[-1] // self._size
            with self._rw.after(x):
                groups = call(aten.unflatten.int, x, -1, [count, self._size])
                parts = [x, call(aten.mean.dim, groups, [-1])]
                if extra > count:
                    unused = call(aten.slice.Tensor, x, -1, 0, extra - count)
                    parts.append(call(aten.zeros_like.default, unused))
                self._made[x, extra] = call(aten.cat.default, parts, -1)
        return self._made[x, extra]
