"""Int8: weights per channel, activations row by row at run time, embeddings per row.

A product ``y = x W^T + b`` becomes ``ftc::quantized_linear`` (see
:mod:`ftc.graph.quantized_ops`), a table lookup ``ftc::quantized_embedding``, a
convolution keeps its float arithmetic on ``ftc::dequantize`` of its weight.
Weights are symmetric, one scale a row (output channel, or table row):

    s_i = max_j |W_ij| / q_max,    q_ij = round(W_ij / s_i)

The defaults are those that are never silently wrong. The step of an integer
product is larger than ``q_max = 127`` needs where two neighbours' codes would sum
to more than 128, because a CPU with AVX2 but no VNNI adds pairs of products in 16
bits and saturates beyond that; every row of activations gets its own scale, because
with one scale for all a single outlier row destroys a language model; and outlier
channels are moved into the weights first (``smooth``), which costs nothing, or
spread over their neighbours where that is not enough (``rotate``). With static
activations the scale is known before the model runs (:mod:`ftc.passes.static_steps`).

Where few rows are multiplied at once another kernel is faster: weights in groups
of 32, activations quantized group by group (``blocked``); and a product may be so
small that quantizing it does not pay (``float``). Which one a product gets is
chosen for the target and the shapes that the user named
(:mod:`ftc.passes.kernel_choice`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, fx

from ftc.graph.errors import UsageError
from ftc.graph.provenance import describe
from ftc.graph.quantize import Scheme, choose_qparams, dequantize, quantize, relative_error
from ftc.graph.rewriter import Rewriter
from ftc.graph.select import select
from ftc.graph.target import Kernel, Target
from ftc.graph.words import listed, plural

from .base import Context, Effect, Pass
from .budget import Levels, Search, drift_of, milder_rounding
from .kernel_choice import KernelChoice
from .options import check_share
from .quantizing import ALL, check_group_size, quantized_reader, unsupported
from .static_steps import Steps, static_steps, step_of

aten = torch.ops.aten

_FLOAT = 2  # levels of max_drift: 0 as usual, 1 in groups, 2 not at all


@dataclass(frozen=True)
class Int8(Pass):
    """Quantize weights to 8 bits, and activations at run time.

    Options:
        select: which weights, a selector.
        activation: how a product's input is quantized at run time: ``row`` (each
            row by its own largest magnitude), ``tensor`` (one scale for all: faster,
            and ruined by outliers), ``static`` (one scale for all, learned from the
            calibration data: fastest), ``none`` (weights only).
        kernel: ``integer`` (a scale for each channel), ``blocked`` (for each 32 weights
            of one), ``float`` (left as it is), or ``auto``: the fastest for the target
            and the shapes.
        group_size: how many weights of a row share a scale in blocked products: 16, 32, 64,
            128 or 256.
        symmetric: no zero points; ``false`` covers the range from the least to the greatest
            weight, the textbook min-max scheme.
        per_tensor: one scale for all channels of a weight: what some runtimes need, and less
            precise.
        reduce_range: keep the sum of two neighbours' codes within 128 in integer
            products, which is right on machines without VNNI as well; ``auto`` does so
            unless the target has it.
        min_size: leave weights with fewer elements as they are.
        max_drift: largest relative drift of the outputs on the probes; the most sensitive
            weights get scales for groups, or stay in float, until it is kept.
    """

    name: ClassVar[str] = "int8"
    effect: ClassVar[Effect] = Effect.APPROXIMATE
    needs: ClassVar[frozenset[str]] = frozenset({"canonical", "smooth", "rotated"})
    provides: ClassVar[frozenset[str]] = frozenset({"quantized"})

    select: str = "product | embedding"
    activation: Literal["row", "tensor", "static", "none"] = "row"
    kernel: Literal["auto", "integer", "blocked", "float"] = "auto"
    group_size: int = 32
    symmetric: bool = True
    per_tensor: bool = False
    reduce_range: bool | Literal["auto"] = "auto"
    min_size: int = 2048
    max_drift: float | None = None

    def __post_init__(self) -> None:
        check_group_size(self, self.group_size)
        if self.min_size < 0:
            raise UsageError(
                f"int8{{min_size={self.min_size}}}: a number of elements, 0 or more",
                fix="int8{min_size=2048}",
            )
        check_share(self, "max_drift", 0.01)
        if self.per_tensor and self.kernel == "blocked":
            raise UsageError(
                "int8{per_tensor=true,kernel=blocked}: that kernel has a scale for each group",
                fix="leave out one of the two",
            )
        if self.kernel == "blocked" and self.activation in ("tensor", "static"):
            raise UsageError(
                f"int8{{kernel=blocked,activation={self.activation}}}: that kernel quantizes each "
                "group of the activations for itself",
                fix=f"int8{{activation={self.activation}}}, or int8{{kernel=blocked}}",
            )
        if self.kernel == "blocked" and self.reduce_range != "auto":
            raise UsageError(
                "int8{kernel=blocked,reduce_range=...}: the range is for integer products",
                fix="leave out one of the two",
            )
        if self.kernel in ("integer", "float") and self.group_size != 32:
            raise UsageError(
                f"int8{{kernel={self.kernel},group_size={self.group_size}}}: groups are for "
                "blocked products",
                fix=f"int8{{kernel=blocked,group_size={self.group_size}}}",
            )
        if self.activation == "none" and self.kernel in ("integer", "blocked"):
            raise UsageError(
                f"int8{{activation=none,kernel={self.kernel}}}: that kernel quantizes activations",
                fix="leave out one of the two",
            )

    @property
    def needed(self) -> frozenset[str]:
        """Activations are made ready only where they are quantized."""
        plain = self.activation == "none" or self.kernel == "float"
        return frozenset({"canonical"}) if plain else self.needs

    def milder(self, bound: float) -> str:
        """Mixed precision, or fewer weights."""
        return milder_rounding(self, bound)

    def rewrite(self, rw: Rewriter, ctx: Context) -> None:
        """Quantizes every selected weight whose readers all have a quantized form."""
        chosen, small = self._chosen(rw)
        steps = self._steps(rw, ctx, chosen)
        levels: Levels = {}
        if self.max_drift is not None and chosen:
            before = rw.program.clone()

            def drift(levels: Levels) -> float:
                return drift_of(
                    before,
                    ctx,
                    self.spec,
                    lambda trial: self._apply(trial, ctx, chosen, levels, steps),
                )

            sizes = {name: rw.program.tensor(name).numel() for name in chosen}
            levels = Search(sizes, _FLOAT, drift)(self.max_drift, self.spec)
            rw.note(_levels_note(levels, self.max_drift))
        self._apply(rw, ctx, chosen, levels, steps)
        if small:
            rw.note(
                f"left in float: {plural(len(small), 'weight')} of fewer than "
                f"{plural(self.min_size, 'element')}"
            )

    def _chosen(self, rw: Rewriter) -> tuple[list[str], list[str]]:
        """Names of the weights to quantize, and of those that are too small."""
        found: list[str] = []
        small: list[str] = []
        tensors = dict(rw.program.tensors())
        for name in sorted(select(self.select, rw.program)):
            weight = tensors.get(name)  # None: it is quantized already
            if weight is None or weight.dim() < 2 or not weight.is_floating_point():
                continue
            node = rw.get_attr(name)
            if (other := unsupported(node, ALL)) is not None:
                rw.note(f"left {name} as it is: {other.target} reads it too ({describe(other)})")
            else:
                (found if weight.numel() >= self.min_size else small).append(name)
        return found, small

    def _steps(self, rw: Rewriter, ctx: Context, names: list[str]) -> Steps:
        """Steps of the inputs of products; none unless they are asked for."""
        if self.activation != "static" or self.kernel == "float":
            return {}
        readers = [reader for name in names for reader in rw.get_attr(name).users]
        products = [reader for reader in readers if reader.target is aten.linear.default]
        return static_steps(rw.program, products, ctx, self.spec)

    def _apply(
        self, rw: Rewriter, ctx: Context, names: list[str], levels: Levels, steps: Steps
    ) -> None:
        """Quantizes ``names``, those with a level by that and not by what is fastest."""
        errors: dict[str, float] = {}
        kernels = KernelChoice(
            rw.program, ctx, None if self.kernel == "auto" else self.kernel, self.group_size
        )
        plain = self.activation == "none"
        narrow = not ctx.target.wide if self.reduce_range == "auto" else self.reduce_range
        for name in names:
            level, readers = levels.get(name, 0), list(rw.get_attr(name).users)
            if level == _FLOAT:
                continue
            weight = rw.program.tensor(name).detach()
            asked: Kernel | None = "blocked" if level else None
            kernel = "integer" if plain else kernels(name, weight, readers, asked)
            if kernel != "float":
                scheme = self._scheme(kernel, narrow and not plain, readers)
                errors[name] = self._quantize(rw, name, weight, readers, scheme, steps)
        for note in kernels.notes():
            rw.note(note)
        if self.group_size != 32 and "blocked" not in kernels.used:
            rw.note("group_size is for blocked products, and there are none: kernel=blocked")
        if self.activation in ("tensor", "static") and "blocked" in kernels.used:
            rw.note(f"activation={self.activation} is not for blocked products, which quantize "
                    "each group of the activations for itself: kernel=integer")  # fmt: skip
        if "integer" in kernels.used and not plain:
            rw.note(_range_note(ctx.target, narrow))
        self._say(rw, errors)

    def _scheme(self, kernel: Kernel, narrow: bool, readers: list[fx.Node]) -> Scheme:
        """Of integer products 7 bits if ``narrow``: tables and convolutions compute in float."""
        if kernel == "blocked":
            return Scheme(8, self.group_size, self.symmetric)
        integer = any(reader.target is aten.linear.default for reader in readers)
        return Scheme(8, 0, self.symmetric, narrow and integer, self.per_tensor)

    def _quantize(
        self,
        rw: Rewriter,
        name: str,
        weight: Tensor,
        readers: list[fx.Node],
        scheme: Scheme,
        steps: Steps,
    ) -> float:
        """Replaces one weight and all its readers; returns the weight's relative error."""
        scale, zero_point = choose_qparams(weight, scheme)
        codes = quantize(weight, scale, zero_point, scheme)
        error = relative_error(weight, dequantize(codes, scale, zero_point))
        rw.remove_tensor(name)
        held = (
            rw.add_buffer(f"{name}.quantized", codes),
            rw.add_buffer(f"{name}.scale", scale),
            None if zero_point is None else rw.add_buffer(f"{name}.zero_point", zero_point),
        )
        how = (8, scheme.group_size)
        for reader in readers:
            with rw.at(reader):
                seen = self._seen(rw, reader, name, scheme.group_size, steps)
                rw.replace(reader, quantized_reader(rw, reader, held, how, seen))
        return error

    def _seen(self, rw: Rewriter, reader: fx.Node, name: str, group: int, steps: Steps) -> Any:
        """How a product's input is quantized, as ``ftc::quantized_linear`` is told."""
        if group:
            return ("block",)
        if self.activation == "static" and reader.target is aten.linear.default:
            return ("static", step_of(rw, reader, steps, f"{name}.step"))
        return (self.activation,)

    def _say(self, rw: Rewriter, errors: dict[str, float]) -> None:
        if errors:
            worst = max(errors, key=errors.__getitem__)
            rw.note(
                f"quantized {plural(len(errors), 'weight')}; the largest relative error is "
                f"{errors[worst]:.2%}, of {worst}"
            )


def _levels_note(levels: Levels, budget: float) -> str:
    groups, floats = (sorted(n for n, at in levels.items() if at == level) for level in (1, _FLOAT))
    if not groups and not floats:
        return f"a drift of {budget:g} is kept with every weight quantized as usual"
    parts = [(groups, "with scales for groups of weights"), (floats, "left in float")]
    told = " and ".join(f"{plural(len(names), 'weight')} {what} ({listed(names)})"
                        for names, what in parts if names)  # fmt: skip
    return f"to keep a drift of {budget:g}: {told}"


def _range_note(target: Target, narrow: bool) -> str:
    if narrow:
        return (
            "neighbouring codes of integer products sum to 128 at most, which no machine "
            "saturates; --target native uses all 8 bits where the machine has VNNI"
        )
    wrong = "integer products use all 8 bits: wrong on machines with AVX2 and no VNNI"
    return wrong if target.wide else f"{wrong}, which target {target.name} allows for"
