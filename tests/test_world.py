"""How a process leaves the others: the threads of groups end before the interpreter does."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from ftc.graph.bundle import load_bundle, save_bundle
from ftc.runtime.training.config import TrainConfig
from ftc.runtime.training.engines.join import make_engine
from ftc.runtime.training.engines.mesh import Mesh
from ftc.runtime.training.engines.world import World, let_go
from ftc.runtime.training.modules import owned
from ftc.runtime.training.objectives.base import Scene

from .processes import spread
from .spread import Squares, batches, share
from .tiny import tiny

TASKS = Path("/proc/self/task")
pytestmark = pytest.mark.skipif(not TASKS.exists(), reason="no /proc/self/task")


def _gloo_threads() -> int:
    return sum("gloo" in (task / "comm").read_text() for task in TASKS.iterdir())


def _threads(folder: Path, mesh: str) -> tuple[int, int]:
    """While an engine has made a step, and when the process ends."""
    torch.manual_seed(0)  # as a run does: ranks of tp draw the same
    program = owned(load_bundle(folder))
    world = World(Mesh.parse(mesh), torch.device("cpu"), 60.0)
    engine = make_engine(program, Squares(), Scene(program, None), TrainConfig(mesh=mesh), world)  # type: ignore[arg-type]
    mine = [share(b, engine.rank, engine.size) for b in batches(program)]
    engine.gradients([share(b, i, 2) for b in mine for i in range(2)])
    during = _gloo_threads()
    del engine, program  # whose weights may be parts
    world.leave()
    let_go()  # as when the process ends
    end = time.monotonic() + 5
    while (after := _gloo_threads()) and time.monotonic() < end:
        time.sleep(0.1)
    return during, after


@pytest.mark.parametrize("fresh", [False, True], ids=["forked", "fresh"])
@pytest.mark.parametrize("mesh", ["dp=2", "fsdp=2", "tp=2", "pp=2"])
def test_no_thread_of_a_group_outlives_the_run(mesh: str, fresh: bool, tmp_path: Path) -> None:
    """Whether modules of torch are imported before a run has begun, or in it."""
    save_bundle(tiny("llama"), tmp_path / "program")
    for during, after in spread(2, _threads, tmp_path / "program", mesh, fresh=fresh):
        assert during > 0 and after == 0
