"""Train and eval mode, and unrounded activations, as a rewrite of arguments.

An exported graph has no ``.train()``: dropout's flag, the attention's
``dropout_p`` and batch norm's ``training`` are arguments of nodes. A node whose
probability is zeroed for eval keeps it in ``meta["custom"]["dropout_p"]``, which
survives saving, so both directions are exact.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from . import quantized_ops as _registered  # noqa: F401

if TYPE_CHECKING:
    from .program import Program

aten = torch.ops.aten

_FLAG = {  # operator -> position of its boolean `training` argument
    aten.dropout.default: 2,
    aten.feature_dropout.default: 2,
    aten.alpha_dropout.default: 2,
    aten.batch_norm.default: 5,
    aten.instance_norm.default: 5,
    aten.rrelu.default: 3,
    aten.lstm.input: 6,
    aten.gru.input: 6,
    aten.rnn_tanh.input: 6,
    aten.rnn_relu.input: 6,
}
_SDPA = aten.scaled_dot_product_attention.default
_DROPOUT_P = 4
_QUANTIZED = torch.ops.ftc.quantized_linear.default
_ACTIVATION = 7


def set_mode(module: fx.GraphModule, *, training: bool) -> int:
    """Switches every mode-dependent node; returns how many changed. Recompile afterwards."""
    changed = 0
    for node in module.graph.nodes:
        if node.op != "call_function":
            continue
        if (position := _FLAG.get(node.target)) is not None:
            changed += _set_argument(node, position, training)
        elif node.target is _SDPA:
            changed += _set_attention(node, training)
    return changed


def unrounded(program: Program) -> Program:
    """A copy whose quantized products take their inputs as they are.

    What is rounded at run time makes a step of a difference in the last bit, so two ways
    to compute the same can be compared only without.
    """
    copy = program.clone()
    for node in copy.graph.nodes:
        if node.op == "call_function" and node.target is _QUANTIZED:
            node.update_arg(_ACTIVATION, "none")
    copy.module.recompile()
    return copy


def draws_in_eval(graph: fx.Graph) -> bool:
    """Whether a graph draws random numbers that no switch of mode turns off."""
    return any(
        node.op == "call_function"
        and node.target not in _FLAG
        and node.target is not _SDPA
        and torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
        for node in graph.nodes
    )


def _set_argument(node: fx.Node, position: int, value: Any) -> bool:
    if len(node.args) <= position or node.args[position] == value:
        return False
    node.update_arg(position, value)
    return True


def _set_attention(node: fx.Node, training: bool) -> bool:
    """``dropout_p`` may be positional or a keyword; eval keeps the old value aside."""
    positional = len(node.args) > _DROPOUT_P
    current = node.args[_DROPOUT_P] if positional else node.kwargs.get("dropout_p", 0.0)
    custom = node.meta.get("custom", {})
    wanted = custom.get("dropout_p", current) if training else 0.0
    if wanted == current:
        return False
    if not training:
        node.meta["custom"] = {**custom, "dropout_p": current}
    if positional:
        node.update_arg(_DROPOUT_P, wanted)
    else:
        node.update_kwarg("dropout_p", wanted)
    return True
