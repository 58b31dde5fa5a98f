"""A stage as a module that torch's schedules run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ftc.graph.cut import Stage
from ftc.graph.fold import Folded, fold
from ftc.runtime.training.engine import EngineOptions, prepare

from .data_parallel import Forwards, shard
from .deferred import Deferred
from .world import World


class StageModule(nn.Module):
    """Takes what the stage before sent and a number of a microbatch; returns what is sent on.

    Its floating outputs always require gradients, as the stage that receives them
    expects, also where the front of the model learns nothing.

    Args:
        stage: that it runs.
        options: how to compute.
        world: shards its weights where the mesh says so.
        splits: gradients of weights wait.

    Attributes:
        feed: the program's inputs of each microbatch, by name; set before a step.
        deferred: gradients of weights that wait; None where they do not.
    """

    def __init__(
        self, stage: Stage, options: EngineOptions, world: World, *, splits: bool = False
    ) -> None:
        super().__init__()
        self.stage = stage
        self.sharded = sharded = world.mesh.fsdp > 1
        folds = sharded or options.gradient_checkpointing
        folded = fold(stage.program) if folds else Folded(stage.module, ())
        self.folded, self.module = folded, folded.module
        self.runs: Any = None
        self.deferred = Deferred() if splits else None
        if self.deferred is not None:
            self.deferred.defer(folded.module)
        runs = prepare(folded, options, optional=True)
        if sharded:
            shard(folded, world, self)
        object.__setattr__(self, "runs", runs)  # compiled, it would be a second owner
        object.__setattr__(self, "feed", [])
        object.__setattr__(self, "autocast", None)

    def forward(self, *received: Tensor, index: Tensor) -> tuple[Tensor, ...]:
        """Runs the stage on microbatch ``index`` (int64 ``[1]``)."""
        for each in received:
            if each.requires_grad:  # what is sent back must be contiguous too
                each.register_hook(Tensor.contiguous)
        inputs = self.feed[int(index)]  # type: ignore[attr-defined]
        with self.autocast():  # type: ignore[attr-defined]
            values = self.runs(*(inputs[name] for name in self.stage.inputs), *received)
        if not torch.is_grad_enabled():
            return tuple(values)
        sent = len(self.stage.sent)
        return tuple(_open(value, sent=i < sent) for i, value in enumerate(values))

    def evaluate(
        self, stage: Stage, inputs: Mapping[str, Tensor], received: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
        """Runs ``stage``, the same one in eval mode, on this stage's weights."""
        folded = fold(stage.program) if self.sharded else None
        with self.autocast():  # type: ignore[attr-defined]
            arguments = (*(inputs[name] for name in stage.inputs), *received)
            if folded is None:
                return tuple(stage.module(*arguments))
            object.__setattr__(self, "feed", [inputs])
            with Forwards(self.folded, folded).swapped():
                return tuple(self(*received, index=torch.zeros(1, dtype=torch.int64)))


def _open(value: Tensor, *, sent: bool) -> Tensor:
    """A value as it is handed on, with a gradient if it can have one.

    What is sent is contiguous, and a tensor that nothing else holds.
    """
    if sent:
        value = value.clone(memory_format=torch.contiguous_format)
    if value.is_floating_point() and not value.requires_grad:
        return value.requires_grad_()
    return value


def messages(stages: Sequence[Stage], inputs: Sequence[Tensor], names: Sequence[str],
             autocast: Any) -> list[tuple[Tensor, ...]]:  # fmt: skip
    """What each stage yields for a microbatch, on meta: ``(*sent, *outputs)``.

    Args:
        stages: all of the program.
        inputs: of the program, of the microbatch's shapes.
        names: of them.
        autocast: makes the context in which stages run.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    given = {name: mode.from_tensor(t) for name, t in zip(names, inputs, strict=True)}
    passed: tuple[Tensor, ...] = ()
    found = []
    for stage in stages:
        with mode, torch.no_grad(), autocast():
            values = stage.module(*(given[name] for name in stage.inputs), *passed)
        passed = tuple(values[: len(stage.sent)])
        found.append(tuple(map(_message, values)))
    return found


def _message(value: Tensor) -> Tensor:
    """What arrives of a value: contiguous, and with a gradient if it can have one."""
    made = torch.empty(value.shape, dtype=value.dtype, device="meta")
    return made.requires_grad_(value.is_floating_point())
