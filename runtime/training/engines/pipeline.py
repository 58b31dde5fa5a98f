"""Pipeline parallel: each process has some stages of the cut graph.

torch's ``PipelineStage`` and schedules run what :mod:`ftc.graph.cut` made. With
``T`` the terms of the step in all microbatches and processes, each microbatch's
loss is ``(sum of its own terms) / T``, and gradients are summed, never scaled. A
parameter that several stages read gets the sum of their gradients after the step.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage

from ftc.graph.cut import Stage, cut, shared_parameters
from ftc.graph.errors import PreconditionError
from ftc.graph.program import Program
from ftc.runtime.training.engine import EngineOptions, autocasting
from ftc.runtime.training.modules import in_mode, running_buffers, trainable
from ftc.runtime.training.norm import scale_to
from ftc.runtime.training.objectives.base import Batch, Objective, Scene, hidden_name

from .data_parallel import shown
from .microbatch import cut_back, largest, padded, sizes_of
from .schedules import Kind, check_microbatches, kind_of, make_schedule, owners
from .shards import forget, keep, local, part_of, wholes
from .stage import StageModule, messages
from .world import World, add_gradients, gather


class Pipeline:
    """Some stages of a program, and what the whole pipeline computes with them.

    Args:
        program: annotated with as many stages as the schedule has; this process's
            tensors are moved to the device and written to.
        objective: gives the loss.
        scene: what the objective may know.
        options: how to compute.
        world: the processes.
        schedule: its name.

    Raises:
        PreconditionError: for a program with another number of stages.
    """

    notes: tuple[str, ...] = ()

    def __init__(
        self, program: Program, objective: Objective, scene: Scene, options: EngineOptions,
        world: World, schedule: str,
    ) -> None:  # fmt: skip
        options.check()
        self._program, self._objective, self._scene = program, objective, scene
        self._options, self._device, self.world = options, torch.device(options.device), world
        self.rank, self.size = world.data_rank, world.data_size
        self.process, self.main = world.process, world.main
        self._kind: Kind = kind_of(schedule)
        self._owners = owners(self._kind, world.mesh.pp)
        observed = objective.observed(program)
        self._names = (*program.signature.output_names, *map(hidden_name, range(len(observed))))
        self._stages = self._cut(program, training=True)
        self._evaluating = self._cut(program, training=False)
        self.mine = [i for i, owner in enumerate(self._owners) if owner == world.place("pp")]
        self._learns = trainable(program)
        self.names = frozenset((*self._learns, *running_buffers(program)))
        self._full = {name: tensor for i in self.mine
                      for name, tensor in self._stages[i].program.tensors()}  # fmt: skip
        shared = shared_parameters(self._stages)
        self._shared = {name: where for name, where in shared.items() if name in self._learns}
        self._place()
        self._schedules: dict[Any, Any] = {}
        self._step: list[Batch] = []
        self._sizes: dict[str, int] = {}
        self._totals: Mapping[str, float] = {}
        self._found: dict[str, float] = {}

    def _cut(self, program: Program, *, training: bool) -> tuple[Stage, ...]:
        observed = self._objective.observed(program)
        stages = cut(in_mode(program, training=training, observed=observed, narrowed=False))
        if len(stages) != len(self._owners):
            raise PreconditionError(
                f"the program has {len(stages)} stages, and the schedule runs {len(self._owners)}",
                fix=f"--passes partition{{stages={len(self._owners)}}}",
            )
        return stages

    def _place(self) -> None:
        """This process's stages on its device, sharded where the mesh says so."""
        keep(self._full.values(), self._device)
        others = (t for name, t in self._program.tensors() if name not in self._full)
        forget(others, self._device)
        self._modules = {i: StageModule(self._stages[i], self._options, self.world,
                                        splits=self._kind.splits) for i in self.mine}  # fmt: skip
        self._held: dict[str, nn.Parameter] = {}
        for module in self._modules.values():
            object.__setattr__(module, "autocast", self._autocast)
            for name, parameter in module.module.named_parameters():
                self._held.setdefault(name, parameter)
        self._parameters = {n: p for n, p in self._held.items() if p.requires_grad}
        if self.world.mesh.fsdp > 1:
            forget(self._full[name] for name in self._held)

    def _autocast(self) -> Any:
        return autocasting(self._options, self._device)

    def parameters(self) -> Mapping[str, nn.Parameter]:
        """What learns in this process's stages, by name."""
        return self._parameters

    def buffers(self) -> Mapping[str, Tensor]:
        """Running statistics of this process's stages, by name."""
        return {name: self._full[name] for i in self.mine
                for name in running_buffers(self._stages[i].program)}  # fmt: skip

    def gradients(self, batches: Sequence[Batch]) -> dict[str, float]:
        """Adds the gradients of the mean over the step's microbatches, in all processes."""
        totals = Counter[str]()
        for batch in batches:
            totals.update(batch.counts)
        self._totals = self.world.add(totals, "data")
        self._found = dict.fromkeys(self._totals, 0.0)
        self._run(list(batches))
        self._sum_gradients()
        return self.world.add(self._found)

    def _run(self, batches: list[Batch]) -> None:
        """One schedule over the step's microbatches."""
        check_microbatches(self._kind, len(batches), self.world.mesh.pp)
        self._step = [batch.to(self._device) for batch in batches]
        inputs = self._padded(self._step)
        schedule = self._schedule(inputs[0], len(batches))
        names = self._program.signature.input_names
        feed = [dict(zip(names, each, strict=True)) for each in inputs]
        for module in self._modules.values():
            object.__setattr__(module, "feed", feed)
        index = torch.arange(len(batches), device=self._device)
        target = index if len(self._stages) - 1 in self.mine else None
        schedule.step(index=index, target=target, return_outputs=False)

    def _padded(self, batches: Sequence[Batch]) -> list[tuple[Tensor, ...]]:
        signature = self._program.signature
        every = [sizes_of(batch, signature) for batch in batches]
        self._sizes = largest(every)
        return [padded(batch, signature, self._sizes) for batch in batches]

    def _schedule(self, inputs: Sequence[Tensor], count: int) -> Any:
        """The schedule for one number and shape of microbatches."""
        key = (count, tuple(self._sizes.items()))
        if key not in self._schedules:
            outputs = messages(self._stages, inputs, self._program.signature.input_names,
                               self._autocast)  # fmt: skip
            stages = [self._pipeline_stage(i, outputs) for i in self.mine]
            self._schedules[key] = make_schedule(self._kind, stages, count, self._loss)
        return self._schedules[key]

    def _pipeline_stage(self, index: int, outputs: Sequence[tuple[Tensor, ...]]) -> PipelineStage:
        before = outputs[index - 1][: len(self._stages[index].received)] if index else ()
        deferred = self._modules[index].deferred
        return PipelineStage(
            self._modules[index], index, len(self._stages), self._device, input_args=before,
            output_args=outputs[index], group=self.world.group("pp"),
            dw_builder=deferred and deferred.take,
        )  # fmt: skip

    def _loss(self, values: tuple[Tensor, ...], index: Tensor) -> Tensor:
        """The loss of one microbatch, from the outputs of the last stage."""
        batch = self._step[int(index)]
        parts = self._parts(values, batch)[1]
        means = {name: parts[name] * shown(batch) / max(total, 1)
                 for name, total in self._totals.items()}  # fmt: skip
        for name, mean in means.items():
            self._found[name] += float(mean.detach())
        scale = self.size if self.world.mesh.fsdp > 1 else 1  # FSDP takes the mean
        return torch.stack(list(means.values())).sum() * scale

    def _parts(
        self, values: Sequence[Tensor], batch: Batch
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Outputs by name, and the summed parts of the loss."""
        signature = self._program.signature
        shapes = {spec.name: spec.shape for spec in signature.outputs}
        outputs = {
            name: cut_back(value, shapes.get(name), batch, signature, self._sizes)
            for name, value in zip(self._names, values, strict=True)
        }
        return outputs, self._objective.losses(outputs, batch, self._scene)

    def _sum_gradients(self) -> None:
        """Over stages that share a parameter, then over processes that see other rows."""
        if self._shared:
            add_gradients([self._gradient(name) for name in self._shared], self.world.group("pp"))
        if self.world.mesh.fsdp == 1 and self.size > 1:
            own = [p.grad for p in self._parameters.values() if p.grad is not None]
            add_gradients(own, self.world.group("data"))

    def _gradient(self, name: str) -> Tensor:
        """This process's part of a shared gradient; zeros where it has none."""
        held = self._parameters.get(name)
        if held is None:
            return self._absent(name)
        if held.grad is None:
            held.grad = torch.zeros_like(held)
        return local(held.grad)

    def _absent(self, name: str) -> Tensor:
        """Zeros of the shape of the part that another stage's process has."""
        whole = self._learns[name]
        if self.world.mesh.fsdp == 1:
            return torch.zeros(whole.shape, dtype=whole.dtype, device=self._device)
        size, rank = self.world.mesh.fsdp, self.world.place("fsdp")
        rows = [len(each) for each in torch.arange(whole.shape[0]).chunk(size)]
        mine = rows[rank] if rank < len(rows) else 0
        return torch.zeros((mine, *whole.shape[1:]), dtype=whole.dtype, device=self._device)

    def clip(self, most: float) -> float:
        """Scales gradients to a norm of at most ``most``; what stages share counts once."""
        every = [local(p.grad) for p in self._parameters.values() if p.grad is not None]
        counted = list(self.counted().values())
        return scale_to(counted, every, most, self.counted_over(), self._device)

    def counted(self) -> dict[str, Tensor]:
        """Its gradients by name, without those of parameters that an earlier stage has too."""
        mine = self.world.place("pp")
        return {name: local(p.grad) for name, p in self._parameters.items()
                if p.grad is not None and (name not in self._shared
                or self._owners[self._shared[name][0]] == mine)}  # fmt: skip

    def counted_over(self) -> list[dist.ProcessGroup]:
        """Processes that hold other stages, or other parts."""
        axes = ("pp", "fsdp") if self.world.mesh.fsdp > 1 else ("pp",)
        return [self.world.group(axis) for axis in axes]

    def evaluate(self, batches: Iterable[Batch]) -> tuple[dict[str, float], dict[str, float]]:
        """Means of the loss's parts and sums of the metrics, in eval mode."""
        losses, counts, sums = Counter[str](), Counter[str](), Counter[str]()
        with torch.no_grad():
            for each in batches:
                batch = each.to(self._device)
                values = self._forward(batch)
                if values is not None and batch.examples:
                    outputs, parts = self._parts(values, batch)
                    losses.update({name: float(part) for name, part in parts.items()})
                    counts.update(batch.counts)
                    sums.update(self._objective.measure(outputs, batch, self._scene))
        losses, counts, sums = (self.world.merge(own) for own in (losses, counts, sums))
        return {name: losses[name] / max(counts[name], 1) for name in losses}, dict(sums)

    def _forward(self, batch: Batch) -> tuple[Tensor, ...] | None:
        """Runs one batch through the pipeline; its outputs where the last stage is."""
        names = self._program.signature.input_names
        inputs = self._padded([batch])[0]
        given = dict(zip(names, inputs, strict=True))
        shapes = messages(self._evaluating, inputs, names, self._autocast)
        here, held = self.world.place("pp"), dict[int, tuple[Tensor, ...]]()
        for i, stage in enumerate(self._evaluating):
            if self._owners[i] != here:
                continue
            received = held.pop(i - 1, None) if i else ()
            if received is None:
                received = tuple(self._receive(each, self._owners[i - 1])
                                 for each in shapes[i - 1][: len(stage.received)])  # fmt: skip
            held[i] = self._modules[i].evaluate(stage, given, received)
            following = self._owners[i + 1] if i + 1 < len(self._owners) else here
            if following != here:
                for value in held.pop(i)[: len(stage.sent)]:
                    dist.send(value.contiguous(), self.world.peer("pp", following))
        return held.get(len(self._owners) - 1)

    def _receive(self, like: Tensor, place: int) -> Tensor:
        value = torch.empty(like.shape, dtype=like.dtype, device=self._device)
        dist.recv(value, self.world.peer("pp", place))
        return value

    def each(self, value: Any) -> list[Any]:
        """What each process has."""
        return self.world.each(value)

    def agree(self, flag: bool) -> bool:
        """Whether any process says so."""
        return self.world.any(flag)

    def collect(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Whole tensors of all stages, on the main process."""
        return gather(wholes(tensors, here=self.world.speaks), self.world, "pp")

    def part(self, name: str, whole: Tensor) -> Tensor:
        """This process's part of a whole tensor."""
        return part_of(self._parameters.get(name), whole)

    def finish(self) -> None:
        """Frees what is only for training; :class:`OnParts` has gathered the result."""
        self._schedules.clear()
