"""Static steps: how the inputs of products are quantized, learned before the model runs.

With ``m_i`` the largest magnitude of row ``i`` of an input on the calibration data, its
step is

    s = quantile(m, 0.999) / 127

A row beyond that is clipped and not the reason that all others lose precision.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ftc.graph.cost import argument, operator_name
from ftc.graph.errors import PreconditionError
from ftc.graph.observe import observe
from ftc.graph.program import Program
from ftc.graph.quantized_ops import ROW_STEP, row_peak
from ftc.graph.rewriter import Rewriter

from .base import Context

Steps = Mapping[str, Tensor]
"""Float32 scalars above 0, by the name of the product whose input is quantized by each."""

_QUANTILE = 0.999


def static_steps(program: Program, products: Sequence[fx.Node], ctx: Context, spec: str) -> Steps:
    """The step of the input of each product.

    Args:
        products: nodes whose first argument is the input, float ``[..., in]``.
        ctx: its calibration data is run once.
        spec: who asks, for the message.

    Raises:
        PreconditionError: where there are products and no calibration data.
    """
    if not products:
        return {}
    if not ctx.calibration:
        raise PreconditionError(
            f"{spec}: static steps are learned from calibration data, and there is none",
            fix="--calib FILE with text or tensors like yours, or int8{activation=row}",
        )
    peaks: dict[Any, list[Tensor]] = {product.args[0]: [] for product in products}

    def keep(x: fx.Node) -> Callable[[Tensor], None]:
        return lambda value: peaks[x].append(row_peak(value).flatten().float())

    observe(program, ctx.calibration, {x: keep(x) for x in peaks})
    found = {x: _step(torch.cat(each)) for x, each in peaks.items()}
    return {product.name: found[product.args[0]] for product in products}


def step_of(rw: Rewriter, product: fx.Node, steps: Steps, name: str) -> fx.Node:
    """The buffer of a product's step: that of another product of the input, or ``name`` anew."""
    x = product.args[0]
    assert isinstance(x, fx.Node)
    for user in x.users:
        if operator_name(user) == "ftc.quantized_linear":
            known = argument(user, "step")
            if isinstance(known, fx.Node):
                return known
    return rw.add_buffer(name, steps[product.name])


def _step(peaks: Tensor) -> Tensor:
    """Of rows with these largest magnitudes ``[rows]``."""
    place = min(int(_QUANTILE * len(peaks)), len(peaks) - 1)
    return peaks.sort().values[place] * ROW_STEP
