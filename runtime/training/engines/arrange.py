"""A program arranged for a mesh: cut into stages, its products cut over ranks.

The run's program stays as it is, so a checkpoint and the bundle at the end are
those of one process. What a process trains is another program on the same memory:

    program --tensor_parallel--> --partition--> --own parts of the tensors--> arranged

A pass may store a weight the other way round (``[in, out]`` as ``[out, in]``); as
long as that is a view of the same memory, the way back is known.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ftc.graph.errors import PreconditionError
from ftc.graph.placement import Placement, place
from ftc.graph.program import Program, attach
from ftc.graph.sharding import CUT, Shard, layout, shard_program
from ftc.graph.stages import KEY, annotated
from ftc.graph.words import plural
from ftc.passes.context import Context
from ftc.passes.partition import Partition
from ftc.passes.pipeline import Pipeline as Passes
from ftc.passes.tensor_parallel import TensorParallel
from ftc.runtime.training.modules import running_buffers, trainable

from .schedules import kind_of
from .shards import keep
from .world import World

_CUTTING = (TensorParallel.name, Partition.name)


@dataclass(frozen=True, slots=True)
class Arranged:
    """What one process of a mesh trains.

    Attributes:
        program: with this process's parts of the tensors.
        shards: of the tensors that are cut, by name.
        strides: of the whole tensors that are stored in another order than in the
            program they are from: their shape there, and their shape and strides here.
        notes: how it was cut, one sentence each; nothing of cuts that it came with.
    """

    program: Program
    shards: Mapping[str, Shard]
    strides: Mapping[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]
    notes: tuple[str, ...] = ()

    def stored(self, name: str, whole: Tensor) -> Tensor:
        """A whole tensor as the run's program stores it."""
        if name not in self.strides:
            return whole
        shape, size, strides = self.strides[name]
        made = torch.empty(shape, dtype=whole.dtype, device=whole.device)
        made.as_strided(size, strides).copy_(whole)
        return made

    def used(self, name: str, whole: Tensor) -> Tensor:
        """A whole tensor of the run's program as this one uses it."""
        if name not in self.strides:
            return whole
        _, size, strides = self.strides[name]
        return whole.contiguous().as_strided(size, strides)


def arrange(program: Program, world: World, schedule: str) -> Arranged:
    """``program`` for this process of a mesh; says which rank of a ``tp`` group it is.

    No weight is read but this rank's parts: that the cut program computes what the whole
    one does is for :func:`prove`, in one process of the run.

    Args:
        program: of the run; is not changed.
        world: the processes.
        schedule: of the pipeline, if there is one.

    Raises:
        PreconditionError: where the program cannot be cut over the mesh's ranks.
    """
    ranks = world.mesh.tp
    made = _over_ranks(program, ranks, Context(proven=True))
    made = staged(made, world.mesh.pp, schedule)
    strides, notes = _strides(program, made), _notes(program, made)
    if ranks == 1:
        return Arranged(_apart(made), {}, strides, notes)
    shards, rank = layout(made), world.place("tp")
    own = shard_program(made, rank, ranks)
    keep(tensor for name, tensor in own.tensors() if name not in shards)
    place(Placement(rank, ranks, world.group("tp")))
    return Arranged(own, shards, strides, notes)


def prove(program: Program, ranks: int) -> None:
    """Runs ``program`` whole and cut over ``ranks``, and compares; reads every weight.

    Raises:
        PreconditionError: where it cannot be cut.
        PromiseError: where the ranks compute something else.
    """
    _over_ranks(program, ranks, None)


def _over_ranks(program: Program, ranks: int, ctx: Context | None) -> Program:
    """The program with its products cut, if they are not yet."""
    place(Placement())  # passes run whole programs
    if ranks == 1 or any(CUT in record.provides for record in program.history):
        return program
    made = Passes((TensorParallel(ranks),)).run(program, ctx).program
    _join_stages(made)
    return made


def staged(program: Program, processes: int, schedule: str) -> Program:
    """The program with as many stages as a schedule needs: its own, else balanced ones."""
    count = processes * kind_of(schedule).stages
    if processes == 1 or len(set(annotated(program).values())) == count:
        return program
    ctx = Context(proven=True)  # it changes no number
    return Passes((Partition(count),)).run(program, ctx).program


def _notes(before: Program, after: Program) -> tuple[str, ...]:
    """What the passes chose that cut, and whether stages were cut anew."""
    found = [f"{record.name}: {note}" for record in after.history[len(before.history):]
             if record.name in _CUTTING for note in record.notes]  # fmt: skip
    had, has = (len(set(annotated(each).values())) for each in (before, after))
    if had not in (0, has):
        found.append(f"the program has {plural(had, 'stage')}, and this mesh and schedule take "
                     f"{has}: it was cut anew")  # fmt: skip
    return tuple(found)


def _apart(program: Program) -> Program:
    """A clone whose buffers too may get other memory."""
    clone = program.clone()
    for name, buffer in [*clone.module.named_buffers()]:
        attach(clone.module, name, buffer.detach())
    return clone


def _join_stages(program: Program) -> None:
    """Operators between ranks go to the stage that reads them, or what they copy would cross."""
    stages = annotated(program)
    for node in reversed(program.graph.nodes) if stages else ():
        readers = [stages[user] for user in node.users if user in stages]
        ours = node.op == "call_function" and "ftc.parallel_" in str(node.target)
        if ours and node not in stages and readers:
            stages[node] = min(readers)
            node.meta["custom"] = {**node.meta.get("custom", {}), KEY: stages[node]}


def _strides(
    before: Program, after: Program
) -> dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]:
    """How tensors are stored that ``after`` has in another order.

    Raises:
        PreconditionError: where a pass made a new tensor.
    """
    old, found = dict(before.tensors()), {}
    for name in (*trainable(after), *running_buffers(after)):
        was, tensor = old.get(name), after.tensor(name)
        if was is None or was.data_ptr() != tensor.data_ptr() or was.numel() != tensor.numel():
            raise PreconditionError(
                f"{name} is stored anew to be cut over ranks",
                fix="--passes canonicalize stores it so from the start",
            )
        if was.shape != tensor.shape or was.stride() != tensor.stride():
            found[name] = (tuple(was.shape), tuple(tensor.shape), tensor.stride())
    return found
