"""From a mesh to an engine: the processes are joined, and each makes its part."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from ftc.graph.errors import UsageError
from ftc.graph.program import Program
from ftc.graph.stages import annotated
from ftc.passes.pipeline import Pipeline as Passes
from ftc.runtime.training.config import TrainConfig
from ftc.runtime.training.engine import Engine, OneProcess
from ftc.runtime.training.objectives.base import Objective, Scene

from .schedules import kind_of
from .world import Alone, World


@contextmanager
def joined(config: TrainConfig) -> Iterator[World | Alone]:
    """The processes of a run, while it runs.

    Raises:
        UsageError: for another number of processes than the mesh has.
        LostProcess: when one of them dies.
    """
    mesh = config.made_mesh()
    if mesh.size == 1 and os.environ.get("WORLD_SIZE", "1") == "1":
        yield Alone()
        return
    if mesh.tp > 1:
        raise UsageError("tensor parallel is not built into ftc train yet", fix="--mesh dp=2,pp=2")
    world = World(mesh, _device(config), config.timeout)
    try:
        with world.watched():
            yield world
    finally:
        world.leave()


def make_engine(
    program: Program, objective: Objective, scene: Scene, config: TrainConfig,
    world: World | Alone,
) -> Engine:  # fmt: skip
    """The engine of this process.

    Args:
        program: what is trained; for a pipeline cut where it is annotated, else balanced.
        objective, scene: of the run.
        config: of the run.
        world: its processes.
    """
    options = config.engine_options()
    if isinstance(world, Alone):
        return OneProcess(program, objective, scene, options)
    options = replace(options, device=str(world.device))
    if world.mesh.pp > 1:
        from .pipeline import Pipeline

        return Pipeline(program, objective, scene, options, world, config.pipeline)
    from .data_parallel import DataParallel

    return DataParallel(program, objective, scene, options, world)


def staged(program: Program, config: TrainConfig) -> Program:
    """The program with the stages that the run's schedule needs."""
    processes = config.made_mesh().pp
    count = processes * kind_of(config.pipeline).stages
    if processes == 1 or len(set(annotated(program).values())) == count:
        return program
    return Passes.parse(f"partition{{stages={count}}}").run(program).program


def _device(config: TrainConfig) -> torch.device:
    """Of this process: one GPU each."""
    if config.device != "cuda":
        return torch.device(config.device)
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device
