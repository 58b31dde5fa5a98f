"""Data parallel engines: every process sees other rows.

With ``T`` the terms of the step in all processes, each process computes the
gradient of ``(sum of its own terms) / T``; the gradient of the step is the sum:

* **DDP** keeps all weights in each process and sums gradients while the backward
  pass runs (arXiv 2006.15704);
* **FSDP2** keeps a share of each weight, and gathers a layer's just before it is
  used (arXiv 2304.11277). Its unit is a folded layer; what several layers read,
  tied weights among it, belongs to the root.

Both take means over processes, so losses are multiplied by their number.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ftc.graph.fold import Folded, fold
from ftc.graph.program import Program
from ftc.runtime.memory import hand_back_at_once
from ftc.runtime.training.engine import EngineOptions, OneProcess, prepare
from ftc.runtime.training.norm import scale_to
from ftc.runtime.training.objectives.base import Batch, Objective, Scene

from .shards import forget, keep, local, part_of, wholes
from .world import World


class _Loss(nn.Module):
    """The loss of a batch as a module: what does not reach it is unused, and DDP must know."""

    def __init__(self, module: nn.Module, means: Callable[[Batch], Mapping[str, Tensor]]) -> None:
        super().__init__()
        self.module, self._means = module, means

    def forward(self, batch: Batch) -> tuple[Tensor, ...]:
        return tuple(self._means(batch).values())


class DataParallel(OneProcess):
    """One of several processes that hold the same program and see other rows.

    Args:
        program: what is trained; its tensors are moved to the device and written to.
        objective: gives the loss.
        scene: what the objective may know.
        options: how to compute.
        world: the processes; with ``fsdp`` above 1 weights are sharded.

    Raises:
        UsageError: for checkpointing on a program without layers.
    """

    def __init__(self, program: Program, objective: Objective, scene: Scene,
                 options: EngineOptions, world: World) -> None:  # fmt: skip
        self.world = world
        self._narrowed = world.mesh.fsdp == 1
        super().__init__(program, objective, scene, options)
        self.rank, self.size = world.data_rank, world.data_size
        self.process, self.main = world.process, world.main
        self._totals: Mapping[str, float] = {}
        self._sharded = world.mesh.fsdp > 1
        self._loss: Any = _Loss(self._training, self._means)
        if self._sharded:
            self._shard()
        elif self.size > 1:  # or it would keep gradients twice
            self._loss = nn.parallel.DistributedDataParallel(
                self._loss, process_group=world.group("data"),
                find_unused_parameters=True,
            )  # fmt: skip

    def _prepared(self, program: Program, options: EngineOptions) -> Any:
        if self.world.mesh.fsdp == 1:
            return super()._prepared(program, options)
        self._folded = fold(program)
        return prepare(self._folded, options)

    def _shard(self) -> None:
        """Shards each layer, then what is left."""
        hand_back_at_once()
        plain = fold(self._in_mode(training=False))
        self._evaluation = Forwards(self._folded, plain)
        shard(self._folded, self.world)
        keep(buffer for _, buffer in self._program.module.named_buffers())  # not the whole file
        self._full = dict(self._program.module.named_parameters())
        forget(self._full.values())  # the shards are copies
        sharded = dict(self._folded.module.named_parameters())
        self._parameters = {name: sharded[name] for name in self._parameters}
        self._all = sharded

    def gradients(self, batches: Sequence[Batch]) -> dict[str, float]:
        """Adds the gradients of the mean over the step's batches, in all processes."""
        totals = Counter[str]()
        for batch in batches:
            totals.update(batch.counts)
        self._totals = self.world.add(totals, "data")
        found = dict.fromkeys(self._totals, 0.0)
        for i, batch in enumerate(batches):
            with self._only_at_the_end(last=i == len(batches) - 1):
                for name, value in self._run(batch.to(self._device)).items():
                    found[name] += value
        return self.world.add(found, "data")

    def _run(self, batch: Batch) -> dict[str, float]:
        means = [*self._means(batch).values()] if self._sharded else self._loss(batch)
        (torch.stack([*means]).sum() * self.size).backward()  # type: ignore[no-untyped-call]
        return {name: float(mean.detach()) for name, mean in zip(self._totals, means, strict=True)}

    def _means(self, batch: Batch) -> dict[str, Tensor]:
        parts = self._losses(self._training, batch)[1]
        return {name: parts[name] * shown(batch) / max(total, 1)
                for name, total in self._totals.items()}  # fmt: skip

    @contextmanager
    def _only_at_the_end(self, *, last: bool) -> Iterator[None]:
        """Sends gradients once a step."""
        if self._sharded:
            self._folded.module.set_requires_gradient_sync(last)
            yield
            return
        with nullcontext() if last or self.size == 1 else self._loss.no_sync():
            yield

    def clip(self, most: float) -> float:
        """Scales gradients to a norm of at most ``most``."""
        gradients = list(self.counted().values())
        return scale_to(gradients, gradients, most, self.counted_over(), self._device)

    def counted(self) -> dict[str, Tensor]:
        """Its parts of gradients, by name."""
        return {n: local(p.grad) for n, p in self._parameters.items() if p.grad is not None}

    def counted_over(self) -> list[dist.ProcessGroup]:
        """Processes that hold other parts."""
        return [self.world.group("fsdp")] if self._sharded else []

    def evaluate(self, batches: Iterable[Batch]) -> tuple[dict[str, float], dict[str, float]]:
        """Means of the loss's parts and sums of the metrics of all processes, in eval mode."""
        with self._evaluation.swapped() if self._sharded else nullcontext():
            module = self._folded.module if self._sharded else self._evaluating
            own = self._sums(module, batches)
        losses, counts, sums = (self.world.merge(each) for each in own)
        return {name: losses[name] / max(counts[name], 1) for name in losses}, dict(sums)

    def each(self, value: Any) -> list[Any]:
        """What each process has."""
        return self.world.each(value)

    def agree(self, flag: bool) -> bool:
        """Whether any process says so."""
        return self.world.any(flag)

    def collect(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Whole tensors."""
        return wholes(tensors, here=self.main)

    def part(self, name: str, whole: Tensor) -> Tensor:
        """This process's part of a whole tensor."""
        return part_of(self._parameters.get(name), whole)

    def finish(self) -> None:
        """The program's own tensors hold the result, on the CPU, on the main process."""
        if self._sharded:
            held = {name: tensor.detach() for name, tensor in self._all.items()}
            for name, whole in wholes(held, here=self.main).items():
                self._full[name].data = whole.clone()
        super().finish()


def shard(folded: Folded, world: World, root: nn.Module | None = None) -> None:
    """``fully_shard`` on each block, and on what is left.

    Args:
        folded: blocks to shard one by one.
        world: shards along ``fsdp``, and copies along ``dp``.
        root: what holds the blocks; by default their module.
    """
    from torch.distributed.fsdp import fully_shard

    mesh = world.devices["dp", "fsdp"] if world.mesh.dp > 1 else world.devices["fsdp"]
    for path in folded.blocks:
        block = folded.module.get_submodule(path)
        _ = block.code  # compiled by fx before its class is exchanged
        fully_shard(block, mesh=mesh)
    _ = folded.module.code
    fully_shard(root or folded.module, mesh=mesh)


class Forwards:
    """Runs sharded blocks with the code of the same blocks in eval mode."""

    def __init__(self, training: Folded, evaluating: Folded) -> None:
        assert training.blocks == evaluating.blocks
        self._pairs = []
        for path in ("", *training.blocks):
            plain = evaluating.module.get_submodule(path)
            _ = plain.code
            self._pairs.append((training.module.get_submodule(path), type(plain).forward))

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Eval mode inside."""
        before = [vars(module).get("forward") for module, _ in self._pairs]
        for module, forward in self._pairs:
            module.forward = forward.__get__(module)
        try:
            yield
        finally:
            for (module, _), own in zip(self._pairs, before, strict=True):
                del module.forward
                if own is not None:
                    module.forward = own


def shown(batch: Batch) -> float:
    """0 for a batch that only keeps a process in step with the others."""
    return 1.0 if batch.examples else 0.0
