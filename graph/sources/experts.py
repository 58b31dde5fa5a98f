"""Mixtures of experts in a form that a graph can hold: every expert computes, the router weighs.

    y = sum_e r_e(x) E_e(x),    r_e(x) = 0 for experts that are not chosen

transformers gathers the tokens of each expert, by loops over the experts that
were hit or by a product with groups of rows. The first depends on values, the
second is an operator that ONNX has not. Computing all experts is the same sum;
it costs ``experts / chosen`` times as many multiply-adds, which the note says.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_NAME = "ftc_dense"
_INTERFACE = "transformers.integrations.moe"
_MARKS = ("has_gate", "has_bias", "is_transposed", "has_post_expert_norm", "num_experts")


@contextmanager
def dense_experts(model: nn.Module) -> Iterator[tuple[str, ...]]:
    """Experts of a model of transformers compute densely within; yields a note if it has some."""
    found = [m for m in model.modules() if all(hasattr(m, mark) for mark in _MARKS)]
    if not found or _INTERFACE not in sys.modules:
        yield ()
        return
    sys.modules[_INTERFACE].ALL_EXPERTS_FUNCTIONS.register(_NAME, dense_forward)
    configs: list[Any] = [each.config for each in found]
    before = [config._experts_implementation for config in configs]
    try:
        for config in configs:
            config._experts_implementation = _NAME
        yield (
            f"each of {found[0].num_experts} experts is computed for every token, and those that "
            "the router does not choose are weighed with 0: more work than choosing them first",
        )
    finally:
        for config, name in zip(configs, before, strict=True):
            config._experts_implementation = name


def dense_forward(experts: Any, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """The weighted sum of all experts.

    Args:
        experts: a module of transformers with ``gate_up_proj`` or ``up_proj``, and ``down_proj``,
            each ``[experts, out, in]`` (or ``[experts, in, out]`` where ``is_transposed``).
        x: ``[tokens, width]``.
        index, weight: the chosen experts and their weights ``[tokens, chosen]``.

    Returns:
        ``[tokens, width]``.
    """
    every = torch.arange(experts.num_experts, device=index.device)
    routing = ((index.unsqueeze(-1) == every) * weight.unsqueeze(-1)).sum(1)
    inner = _product(experts, "gate_up_proj" if experts.has_gate else "up_proj", x)
    inner = experts._apply_gate(inner) if experts.has_gate else experts.act_fn(inner)
    y = _product(experts, "down_proj", inner)
    if experts.has_post_expert_norm:
        y = experts.post_expert_norm(y)
    return (y * routing.t().unsqueeze(-1)).sum(0).to(x.dtype)


def _product(experts: Any, name: str, x: Tensor) -> Tensor:
    """``[experts, tokens, out]``: each expert's product with ``x``, or with its own rows of it."""
    weight = getattr(experts, name)
    y = torch.matmul(x, weight if experts.is_transposed else weight.transpose(1, 2))
    return y + getattr(experts, f"{name}_bias").unsqueeze(1) if experts.has_bias else y
