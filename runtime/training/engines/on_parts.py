"""An engine on an arranged program, as seen by a run that knows the whole one.

Another engine computes with this process's parts (:mod:`.arrange`). Here parts become
whole tensors in the layout of the run's program, and back: for checkpoints, for the norm
of all gradients, and for the weights at the end.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ftc.graph.errors import PreconditionError
from ftc.graph.placement import gather_whole
from ftc.graph.program import Program
from ftc.graph.sharding import part
from ftc.runtime.training.engine import Engine
from ftc.runtime.training.modules import mostly
from ftc.runtime.training.norm import scale_to
from ftc.runtime.training.objectives.base import Batch

from .arrange import Arranged
from .shards import forget, keep, local, whole_of, wholes
from .world import World


class SpreadEngine(Engine, Protocol):
    """An engine of several processes."""

    def counted(self) -> Mapping[str, Tensor]:
        """Its parts of gradients by name; a part that several processes hold only in one."""
        ...

    def counted_over(self) -> Sequence[dist.ProcessGroup]:
        """Groups whose processes' counted parts are all of a gradient."""
        ...


class OnParts:
    """An engine whose tensors are parts of those of the run's program.

    Args:
        program: of the run; its tensors are forgotten, and hold the result at the end where
            the main process is.
        arranged: what ``inner`` trains.
        inner: computes.
        world: the processes.
    """

    def __init__(
        self, program: Program, arranged: Arranged, inner: SpreadEngine, world: World
    ) -> None:
        self._program, self._arranged, self._inner, self.world = program, arranged, inner, world
        self.rank, self.size = inner.rank, inner.size
        self.process, self.main, self.names = inner.process, inner.main, inner.names
        self.notes = arranged.notes
        self._let_go()

    def parameters(self) -> Mapping[str, nn.Parameter]:
        """This process's parts of what learns."""
        return self._inner.parameters()

    def buffers(self) -> Mapping[str, Tensor]:
        """Running statistics."""
        return self._inner.buffers()

    def gradients(self, batches: Sequence[Batch]) -> dict[str, float]:
        """Adds the gradients of one step.

        Raises:
            PreconditionError: where ranks that share a program drew other random numbers.
        """
        found = self._inner.gradients(batches)
        if self.world.mesh.tp > 1:
            self._drew_the_same()
        return found

    def clip(self, most: float) -> float:
        """Scales gradients to a norm of at most ``most``; what all ranks have counts once."""
        if self.world.mesh.tp == 1:
            return self._inner.clip(most)
        first, cut = self.world.place("tp") == 0, self._arranged.shards
        counted = [g for name, g in self._inner.counted().items() if first or name in cut]
        every = [local(p.grad) for p in self.parameters().values() if p.grad is not None]
        groups = [*self._inner.counted_over(), self.world.group("tp")]
        return scale_to(counted, every, most, groups, self.world.device)

    def evaluate(self, batches: Iterable[Batch]) -> tuple[dict[str, float], dict[str, float]]:
        """Means of the loss's parts and sums of the metrics."""
        return self._inner.evaluate(batches)

    def agree(self, flag: bool) -> bool:
        """Whether any process says so."""
        return self._inner.agree(flag)

    def each(self, value: Any) -> list[Any]:
        """What each process has, those that share a program counting as one."""
        return self._inner.each(value)

    def collect(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Whole tensors, as the run's program stores them."""
        gathered = wholes(tensors, here=self.world.speaks, gather=self._whole)
        return self._inner.collect(gathered)

    def part(self, name: str, whole: Tensor) -> Tensor:
        """This process's part of a whole tensor."""
        used = self._arranged.used(name, whole)
        if (shard := self._arranged.shards.get(name)) is not None:
            used = part(used, shard, self.world.place("tp"), self.world.mesh.tp)
        return self._inner.part(name, used)

    def finish(self) -> None:
        """The run's program holds the result, on the CPU, on the main process."""
        held = {name: p.detach() for name, p in self.parameters().items()}
        everything = self.collect({**held, **self.buffers()})
        if self.main:
            for name, tensor in everything.items():
                self._program.tensor(name).data = tensor.cpu()
        self._inner.finish()

    def _let_go(self) -> None:
        """The run's tensors, and with them the file; what stays as it was is for the bundle."""
        tensors = dict(self._program.tensors())
        rest = {name: t for name, t in tensors.items() if name not in self.names and self.main}
        forget(tensor for name, tensor in tensors.items() if name not in rest)
        if mostly(self._program, self.names):
            keep(rest.values())

    def _whole(self, name: str, tensor: Tensor) -> Tensor:
        """The whole of a parameter, or of what an optimizer keeps of it (``name/key``)."""
        name = name.partition("/")[0]
        made = whole_of(tensor)
        if made.dim() == 0:
            return made
        if (shard := self._arranged.shards.get(name)) is not None:
            made = gather_whole(made.to(self.world.device), shard)
        return self._arranged.stored(name, made)

    def _drew_the_same(self) -> None:
        """Ranks hold the same whole values only if their dropout drew the same numbers."""
        states = [torch.get_rng_state()]
        if self.world.device.type == "cuda":
            states.append(torch.cuda.get_rng_state(self.world.device))
        digest = hashlib.sha256(b"".join(state.numpy().tobytes() for state in states)).digest()
        mine = int.from_bytes(digest[:7], "big")
        both = torch.tensor([mine, -mine], device=self.world.device)
        dist.all_reduce(both, dist.ReduceOp.MAX, group=self.world.group("tp"))
        if both[0] != -both[1]:
            raise PreconditionError(
                "ranks that share the program drew dropout for parts of other sizes",
                fix="choose a size of tp that divides heads and widths, or no dropout",
            )
