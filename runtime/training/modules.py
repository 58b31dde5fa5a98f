"""Modules that an engine runs: a program in one mode, on the program's own Parameters."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

import torch
from torch import Tensor, fx, nn

from ftc.graph.mode import set_mode
from ftc.graph.narrow import narrow
from ftc.graph.program import Program, build_module

aten = torch.ops.aten
_RUNNING = (aten.batch_norm.default, aten.instance_norm.default)


def owned(program: Program) -> Program:
    """A clone that may be written to: what learns has memory of its own, and so have statistics.

    Frozen weights stay shared, and mapped from their file. Where most of the bytes
    learn, the rest is copied too: one tensor keeps the whole file in memory.
    """
    clone = program.clone()
    tensors = dict(clone.tensors())
    written = {*trainable(clone), *running_buffers(clone)}
    for name in tensors if mostly(clone, written) else written:
        tensors[name].data = tensors[name].detach().clone()
    return clone


def mostly(program: Program, names: Collection[str]) -> bool:
    """Whether most bytes of a program's tensors are those of ``names``."""
    sizes = {name: tensor.nbytes for name, tensor in program.tensors()}
    return 2 * sum(sizes[name] for name in names) > sum(sizes.values())


def in_mode(
    program: Program, *, training: bool, observed: Sequence[fx.Node] = (), narrowed: bool = True
) -> Program:
    """The program in one mode, on the same Parameters and buffers.

    Args:
        program: is not changed.
        training: dropout on, running statistics updated.
        observed: nodes whose values are returned behind the outputs.
        narrowed: rows that nobody reads are left out. Not for a graph that is cut by its
            layers: both modes must have the same ones, and each layer its own stage.
    """
    graph, copied = fx.Graph(), dict[fx.Node, fx.Node]()
    output = graph.graph_copy(program.graph, copied)
    assert isinstance(output, tuple)
    graph.output((*output, *(copied[node] for node in observed)))
    for old, new in copied.items():
        new.meta = dict(old.meta)
    module = build_module(dict(program.tensors()), graph)
    set_mode(module, training=training)
    made = replace(program, module=module)
    return narrow(made) if narrowed else made


def trainable(program: Program) -> dict[str, nn.Parameter]:
    """The parameters that learn, by name."""
    return {name: parameter for name, parameter in program.module.named_parameters()
            if parameter.requires_grad}  # fmt: skip


def running_buffers(program: Program) -> tuple[str, ...]:
    """Buffers that a forward pass in train mode writes: the running statistics of batch norm."""
    written = (argument for node in program.graph.nodes if node.target in _RUNNING
               for argument in node.args[3:5])  # fmt: skip
    return tuple(dict.fromkeys(str(each.target) for each in written if isinstance(each, fx.Node)))


def move(program: Program, device: torch.device) -> None:
    """Moves every tensor of ``program`` to ``device``, in place."""
    for _, tensor in program.tensors():
        _move(tensor, device)


def _move(tensor: Tensor, device: torch.device) -> None:
    if tensor.device != device:
        tensor.data = tensor.data.to(device)
