"""A program that is cut over ranks against the same program whole: outputs and gradients."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, fx

from ftc.graph import quantized_ops
from ftc.graph.bundle import load_bundle
from ftc.graph.placement import Placement, gather_whole, norm_of, placed
from ftc.graph.program import Program
from ftc.graph.sharding import layout, part, shard_program
from ftc.runtime.training.modules import owned

assert quantized_ops
ops: Any = torch.ops.ftc

Gradients = dict[str, Tensor]


def loss_of(outputs: dict[str, Tensor]) -> Tensor:
    """A sum of all float outputs with fixed random weights."""
    draw = torch.Generator().manual_seed(1)
    floats = [o for o in outputs.values() if o.is_floating_point()]
    return torch.stack([(o * torch.randn(o.shape, generator=draw)).mean() for o in floats]).sum()


def gradients(program: Program) -> Gradients:
    """The gradients that the last backward pass left, by name; they are taken away."""
    found = {}
    for name, parameter in program.module.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, f"{name} got no gradient"
            found[name], parameter.grad = parameter.grad, None
    return found


def whole_gradients(
    program: Program, probe: dict[str, Tensor]
) -> tuple[dict[str, Tensor], Gradients]:
    """Outputs and gradients of a whole program in this process."""
    outputs = program(probe)
    loss_of(outputs).backward()
    return outputs, gradients(program)


def in_float64(program: Program) -> Program:
    """A copy that computes in float64 where it computed in float32.

    In float32 two ways to compute the same gradients are up to 1e-6 apart by rounding alone, by
    the kernels of the machine.
    """
    wide = owned(program)
    wide.module.double()
    for node in list(wide.graph.nodes):
        arguments: Any = fx.node.map_aggregate(
            (node.args, node.kwargs), lambda a: torch.float64 if a is torch.float32 else a
        )
        node.args, node.kwargs = arguments
        if node.target in (ops.dequantize.default, ops.quantized_embedding.default):
            with wide.graph.inserting_after(node):
                cast = wide.graph.call_function(torch.ops.aten.to.dtype, (node, torch.float64))
            node.replace_all_uses_with(cast, lambda user, made=cast: user is not made)
    wide.module.recompile()
    inputs = (replace(s, dtype=torch.float64) if s.dtype is torch.float32 else s
              for s in wide.signature.inputs)  # fmt: skip
    return replace(wide, signature=replace(wide.signature, inputs=tuple(inputs)))


def assert_same_step(
    cut: Program, rank: int, size: int, outputs: dict[str, Tensor], found: Gradients,
    expected: tuple[dict[str, Tensor], Gradients],
) -> None:  # fmt: skip
    """One rank's outputs are the whole program's, its gradients their parts: to 1e-6 together.

    Args:
        cut: with whole tensors, for its layout.
    """
    shards = layout(cut)
    for name, wanted in expected[0].items():
        torch.testing.assert_close(outputs[name], wanted, rtol=1e-5, atol=1e-5)
    assert found.keys() == expected[1].keys()
    wrong = all_of = 0.0
    for name, wanted in expected[1].items():
        own = part(wanted, shards[name], rank, size) if name in shards else wanted
        off, length = float((found[name] - own).norm()), float(wanted.norm())
        assert off <= 1e-5 * length + 1e-9, f"{name}: {off:.1e} of {length:.1e}"
        wrong, all_of = wrong + off**2, all_of + length**2
    assert wrong <= 1e-12 * all_of, f"{(wrong / all_of) ** 0.5:.1e}"


def check_in_processes(folders: Iterable[Path], sizes: Sequence[int]) -> None:
    """Runs every bundle of a cut program in one gloo group of processes, over each number of ranks.

    Args:
        folders: of programs that were cut for the largest of ``sizes``.
        sizes: numbers of ranks; a smaller one is a group of the first ranks.
    """
    with tempfile.TemporaryDirectory() as store:
        arguments = (f"file://{store}/rendezvous", [str(f) for f in folders], list(sizes))
        torch.multiprocessing.spawn(_process, arguments, nprocs=max(sizes))


def _process(rank: int, store: str, folders: list[str], sizes: list[int]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=max(sizes),
                            timeout=timedelta(seconds=120))  # fmt: skip
    groups = {size: dist.new_group(list(range(size))) for size in sizes}
    for folder in folders:
        cut = in_float64(load_bundle(folder))
        probe = cut.signature.probe(seed=5)
        expected = whole_gradients(cut, probe)
        for size in sizes:
            if rank < size:
                with placed(Placement(rank, size, groups[size])):
                    _check(cut, rank, size, probe, expected)
    dist.destroy_process_group()


def _check(
    cut: Program, rank: int, size: int, probe: dict[str, Tensor],
    expected: tuple[dict[str, Tensor], Gradients],
) -> None:  # fmt: skip
    """One step's gradients, and the weights after three, on one rank."""
    own, alone, shards = shard_program(owned(cut), rank, size), owned(cut), layout(cut)
    outputs = own(probe)
    loss_of(outputs).backward()
    found = gradients(own)
    assert_same_step(cut, rank, size, outputs, found, expected)
    norm = torch.linalg.vector_norm(torch.cat([g.flatten() for g in expected[1].values()]))
    torch.testing.assert_close(norm_of(found, shards), norm.float())
    _train(own, probe)
    with placed(Placement()):
        _train(alone, probe)
    for name, trained in alone.tensors():
        held = own.tensor(name).detach()
        held = gather_whole(held, shards[name]) if name in shards else held
        torch.testing.assert_close(held, trained.detach(), rtol=1e-5, atol=1e-6)


def _train(program: Program, probe: dict[str, Tensor]) -> None:
    """Three steps of gradient descent."""
    learning = [p for p in program.module.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(learning, lr=0.1, momentum=0.9)
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(program(probe)).backward()
        optimizer.step()
    optimizer.zero_grad()
