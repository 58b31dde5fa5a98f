"""Gradients of weights that wait: what fills the bubbles of a pipeline.

Of ``y = x W^T`` the backward pass has two halves (Qi et al., arXiv 2401.10241):

    dx = dy W         the stage before waits for it: computed at once
    dW = dy^T x       nobody waits for it: kept, and computed when a device would be idle

Each product with a weight that learns becomes one that keeps ``(dy, x)``; a schedule
takes what one microbatch kept and runs it later. Everything else that learns (norms,
biases, tables) gets its gradient at once: that is little. Splitting the autograd graph
itself, as torch does, depends on how the graph looks; this does not.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx, nn

_linear = torch.ops.aten.linear.default
_Kept = tuple[nn.Parameter, Tensor, Tensor]
"""A weight, the gradient of its product, and the product's input."""


class Deferred:
    """Products of one stage, and the gradients of their weights that wait."""

    def __init__(self) -> None:
        self._waiting: list[_Kept] = []

    def defer(self, module: nn.Module) -> None:
        """Exchanges the products in ``module``, in place, whose weight is its own and learns."""
        for each in module.modules():
            if not isinstance(each, fx.GraphModule):
                continue
            for node in each.graph.nodes:
                if node.target is _linear and _learns(each, node.args[1]):
                    node.target, node.kwargs = self._product, {}
            each.recompile()

    def take(self) -> Callable[[], None]:
        """What computes the gradients that wait now, and adds them to ``.grad``."""
        taken = self._waiting[:]
        self._waiting.clear()

        @torch.no_grad()
        def run() -> None:
            for weight, gradient, x in taken:
                made = (gradient.flatten(0, -2).T @ x.flatten(0, -2)).to(weight.dtype)
                weight.grad = made if weight.grad is None else weight.grad.add_(made)
            taken.clear()

        return run

    def _product(self, x: Tensor, weight: nn.Parameter, bias: Tensor | None = None) -> Tensor:
        made: Tensor = _Product.apply(x, weight, bias, self._waiting)  # type: ignore[no-untyped-call]
        return made


class _Product(torch.autograd.Function):
    """``linear`` of ``x [..., in]`` and ``W [out, in]``; the gradient of ``W`` is for later."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: nn.Parameter, bias: Tensor | None,
                waiting: list[_Kept]) -> Tensor:  # fmt: skip
        ctx.save_for_backward(x)
        ctx.weight, ctx.waiting = weight, waiting  # the Parameter itself, which has a .grad
        return nn.functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        kept = x.detach().to(gradient.dtype)  # without the graph that it came from
        ctx.waiting.append((ctx.weight, gradient, kept))
        before = bias = None
        if ctx.needs_input_grad[0]:
            before = (gradient @ ctx.weight.to(gradient.dtype)).to(x.dtype)
        if ctx.needs_input_grad[2]:
            bias = gradient.flatten(0, -2).sum(0)
        return before, None, bias, None


def _learns(module: nn.Module, weight: Any) -> bool:
    if not isinstance(weight, fx.Node) or weight.op != "get_attr":
        return False
    tensor = attrgetter(str(weight.target))(module)
    return isinstance(tensor, nn.Parameter) and tensor.requires_grad
