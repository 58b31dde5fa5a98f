"""Smooth: move the outliers of activations into weights, exactly.

A few channels of a transformer's activations are tens of times larger than the
rest, and a scale that covers them leaves the others little precision. Where
what comes before a product can be scaled channel by channel
(:mod:`ftc.passes.channels`), the channel is made smaller there and the product's
column larger (SmoothQuant, Xiao et al., arXiv 2211.10438, equation 4):

    y = (x / s) (s W)^T,    s_j = max|x_j|^alpha / max|W_j|^(1 - alpha)

The outputs are the same to rounding, the running time is the same, and both
``x`` and ``W`` quantize better. Maxima of ``|x_j|`` come from the calibration data,
or from the probes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from ftc.graph.observe import observe
from ftc.graph.rewriter import Rewriter
from ftc.graph.words import plural

from .base import Context, Effect, Pass
from .channels import Group, find_groups, scale_channels, shared
from .options import check_share

_FLOOR = 0.1  # of the mean maximum: a channel that the data never used may be used tomorrow
_TINY = 1e-5  # a column of zeros needs no scale
_ENTRIES = 1  # of the calibration data: maxima need few rows
_EVEN = 0.01  # scales within 1 % of each other are not worth a rewrite


@dataclass(frozen=True)
class Smooth(Pass):
    """Move activation outliers into the weights behind them; the outputs stay the same.

    Options:
        alpha: how much of the difficulty moves, in [0, 1]; 0.5 shares it evenly;
            none leaves everything as it is (for int8 without smoothing).
    """

    name: ClassVar[str] = "smooth"
    effect: ClassVar[Effect] = Effect.EXACT
    needs: ClassVar[frozenset[str]] = frozenset({"canonical"})
    provides: ClassVar[frozenset[str]] = frozenset({"smooth"})
    forbids: ClassVar[frozenset[str]] = frozenset({"quantized"})

    alpha: float | None = 0.5

    def __post_init__(self) -> None:
        check_share(self, "alpha", 0.5, "[0, 1]")

    def rewrite(self, rw: Rewriter, ctx: Context) -> None:
        """Scales the weights of every group."""
        if self.alpha is None:
            return
        groups = list(find_groups(rw.program))
        peaks = _peaks(rw, groups, ctx)
        scaled = [g for g in groups if _scale(rw, g, peaks[g.x], self.alpha)]
        count = sum(len(group.weights) for group in scaled)
        if scaled:
            rw.note(
                f"smoothed the inputs of {plural(count, 'product')} "
                f"at {plural(len(scaled), 'place')}"
            )
        elif not groups:
            rw.note("nothing to smooth: no product's input can be scaled before it")


def _peaks(rw: Rewriter, groups: list[Group], ctx: Context) -> dict[fx.Node, Tensor]:
    """``max |x_j|`` over all rows, ``[in]``, at the input of every group."""
    peaks: dict[fx.Node, Tensor] = {}

    def watch(node: fx.Node) -> Callable[[Tensor], None]:
        def update(x: Tensor) -> None:
            peak = _peak(x.flatten(0, -2))
            peaks[node] = torch.maximum(peaks[node], peak) if node in peaks else peak

        return update

    calibration = (ctx.calibration or ())[:_ENTRIES]
    data = calibration or ctx.probes_for(rw.program)
    observe(rw.program, data, {group.x: watch(group.x) for group in groups})
    return peaks


def _scale(rw: Rewriter, group: Group, peak: Tensor, alpha: float) -> bool:
    """Scales one group; returns whether it was uneven enough to matter."""
    program = rw.program
    columns = torch.stack([_peak(program.tensor(w).detach()) for w in group.weights])
    weight = columns.amax(0)
    peak, weight = shared(peak, group), shared(weight, group)
    peak = peak.clamp_min(max(_FLOOR * float(peak.mean()), _TINY))
    scale = peak**alpha / weight.clamp_min(_TINY) ** (1 - alpha)
    scale = scale / scale.log().mean().exp()
    if bool((scale.log().abs() < _EVEN).all()):
        return False
    scale_channels(rw, group, scale)
    return True


def _peak(matrix: Tensor) -> Tensor:
    """Largest magnitude of each column, without a copy of the matrix."""
    return torch.maximum(matrix.amax(0), -matrix.amin(0))
