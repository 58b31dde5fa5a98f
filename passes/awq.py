"""AWQ: scale the channels that matter most, so that rounding to few bits spares them.

Rounding makes the same error in every weight of a group, whatever it multiplies.
A weight that is multiplied by ``s`` before it is rounded, and its input divided by
``s``, has an error that is ``s`` times smaller in the product, as long as the
group's step stays what it is (Lin et al., arXiv 2306.00978, equations 4 and 5):

    s_j = (E|x_j|)^alpha,    alpha = argmin_a sum_W E|x W^T - (x / s) Q(s W)^T|^2

``alpha`` is searched on a grid from 0, which changes nothing, to 1, for all
products that read one input together, with the Gram matrix of the calibration
data, so no product is run again. Where channels can be scaled at no cost is in
:mod:`ftc.passes.channels`. Weights that are on a 4-bit grid already are left
there: to scale their columns would take them off it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from ftc.graph.errors import UsageError
from ftc.graph.gram import grams
from ftc.graph.grids import keep_grid
from ftc.graph.observe import observe
from ftc.graph.program import Program
from ftc.graph.quantize import Scheme, choose_qparams, dequantize, quantize
from ftc.graph.rewriter import Rewriter
from ftc.graph.words import plural

from .base import Context, Effect, Pass
from .channels import Group, find_groups, scale_channels, shared
from .context import random_rows

_FLOOR = 1e-4  # of the mean channel: one that the data never used may be used tomorrow
_SAMPLE = 64  # rows that tell whether a weight is on a grid


@dataclass(frozen=True)
class Awq(Pass):
    """Scale channels that matter up before weights are rounded to 4 bits; outputs stay the same.

    Options:
        group_size: weights that will share a step, as ``int4`` has it.
        symmetric: whether they will have no zero point.
        steps: of the search for alpha; 0 changes nothing.
    """

    name: ClassVar[str] = "awq"
    effect: ClassVar[Effect] = Effect.EXACT
    needs: ClassVar[frozenset[str]] = frozenset({"canonical"})
    forbids: ClassVar[frozenset[str]] = frozenset({"quantized"})

    group_size: int = 32
    symmetric: bool = False
    steps: int = 20

    def __post_init__(self) -> None:
        if self.group_size < 1 or self.steps < 0:
            raise UsageError(f"{self.spec}: both are counts", fix="awq{group_size=32,steps=20}")

    def rewrite(self, rw: Rewriter, ctx: Context) -> None:
        """Scales the channels of every group where that makes the rounded outputs closer."""
        scheme = Scheme(4, self.group_size, self.symmetric)
        groups = [g for g in find_groups(rw.program) if self._fits(rw.program, g)]
        free = [g for g in groups if not _on_grid(rw.program, g, scheme)]
        data = ctx.calibration or random_rows(rw.program, ctx.seed)
        inputs = [group.x for group in free]
        sizes, found = _sizes(rw.program, data, inputs), grams(rw.program, data, inputs)
        scaled = 0
        for group in free:
            weights = [rw.program.tensor(name).detach().float() for name in group.weights]
            size = shared(sizes[group.x], group)
            scale = best_scale(weights, size, found[group.x], scheme, self.steps)
            if scale is not None:
                scale_channels(rw, group, scale)
                scaled += 1
        if groups:
            rw.note(
                f"scaled the channels of {scaled} of {plural(len(groups), 'input')} that can be"
            )
        if left := len(groups) - len(free):
            rw.note(f"left {plural(left, 'input')}: of weights on a 4-bit grid already")

    def _fits(self, program: Program, group: Group) -> bool:
        return program.tensor(group.weights[0]).shape[1] % self.group_size == 0


def best_scale(
    weights: list[Tensor], size: Tensor, gram: Tensor, scheme: Scheme, steps: int
) -> Tensor | None:
    """The scale ``[in]`` that makes the outputs of rounded ``weights`` closest; None for 1.

    Args:
        weights: float32, each ``[out, in]``.
        size: ``E|x_j|`` ``[in]``.
        gram: ``E x^T x`` ``[in, in]``.
        scheme: how they will be rounded.
        steps: of alpha, evenly from 0 to 1.
    """
    size = size.clamp_min(_FLOOR * float(size.mean())).clamp_min(torch.finfo(size.dtype).tiny)
    best: Tensor | None = None
    least = _lost(weights, torch.ones_like(size), gram, scheme)
    for step in range(1, steps + 1):
        scale = size ** (step / steps)
        scale = scale / (scale.amax() * scale.amin()).sqrt()
        if (error := _lost(weights, scale, gram, scheme)) < least:
            best, least = scale, error
    return best


def _lost(weights: list[Tensor], scale: Tensor, gram: Tensor, scheme: Scheme) -> float:
    """Mean squared error of the outputs, summed over the products."""
    total = 0.0
    for weight in weights:
        wide = weight * scale
        step, zero = choose_qparams(wide, scheme)
        rounded = dequantize(quantize(wide, step, zero, scheme), step, zero)
        error = rounded.sub_(wide).div_(scale)
        total += float(((error @ gram) * error).sum())
    return total


def _sizes(
    program: Program, data: Iterable[Mapping[str, Tensor]], nodes: list[fx.Node]
) -> dict[fx.Node, Tensor]:
    """``E|x_j|`` over all rows, ``[in]``, of each node."""
    sums: dict[fx.Node, Tensor] = {}
    rows: dict[fx.Node, int] = {}

    def watch(node: fx.Node) -> Callable[[Tensor], None]:
        def update(x: Tensor) -> None:
            flat = x.flatten(0, -2).float().abs()
            sums[node] = sums.get(node, torch.zeros(flat.shape[1])) + flat.sum(0)
            rows[node] = rows.get(node, 0) + len(flat)

        return update

    observe(program, data, {node: watch(node) for node in nodes})
    return {node: total / max(rows[node], 1) for node, total in sums.items()}


def _on_grid(program: Program, group: Group, scheme: Scheme) -> bool:
    first = (program.tensor(name).detach()[:_SAMPLE] for name in group.weights)
    return any(keep_grid(weight, scheme) is not None for weight in first)
