"""From a mesh to an engine: the processes are joined, and each makes its part."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from ftc.graph.program import Program
from ftc.runtime.training.config import TrainConfig
from ftc.runtime.training.engine import Engine, OneProcess
from ftc.runtime.training.objectives.base import Objective, Scene

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
        program: what is trained. It holds the result at the end, on the main process; until
            then a process of a mesh holds its parts only.
        objective, scene: of the run.
        config: of the run.
        world: its processes.
    """
    options = config.engine_options()
    if isinstance(world, Alone):
        return OneProcess(program, objective, scene, options)
    from .arrange import arrange
    from .data_parallel import DataParallel
    from .on_parts import OnParts, SpreadEngine
    from .pipeline import Pipeline

    options = replace(options, device=str(world.device))
    if world.mesh.pp == world.mesh.tp == 1:
        return DataParallel(program, objective, scene, options, world)
    arranged = arrange(program, world, config.pipeline)
    engine: SpreadEngine
    if world.mesh.pp > 1:
        engine = Pipeline(arranged.program, objective, scene, options, world, config.pipeline)
    else:
        engine = DataParallel(arranged.program, objective, scene, options, world)
    return OnParts(program, arranged, engine, world)


def _device(config: TrainConfig) -> torch.device:
    """Of this process: one GPU each."""
    if config.device != "cuda":
        return torch.device(config.device)
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device
