"""What a process of a mesh holds: its own weights, and with checkpointing few values."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ftc.graph.bundle import load_bundle, save_bundle
from ftc.runtime.memory import hand_back_at_once, release
from ftc.runtime.training.config import TrainConfig
from ftc.runtime.training.engines.join import make_engine
from ftc.runtime.training.engines.mesh import Mesh
from ftc.runtime.training.engines.world import World, let_go
from ftc.runtime.training.modules import owned
from ftc.runtime.training.objectives.base import Scene

from .processes import spread
from .spread import Squares, batches, share
from .tiny import custom

STATUS, REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
LAYERS = 8
_IMPORTED = (
    "torch.distributed.fsdp", "torch.distributed.nn.functional", "torch.distributed.pipelining",
    "torch.distributed.tensor", "ftc.runtime.training.engines.on_parts",
    "ftc.runtime.training.engines.pipeline",
)  # fmt: skip
pytestmark = pytest.mark.skipif(not REFS.exists(), reason="no /proc/self/clear_refs")


class Layer(nn.Module):
    """A feed-forward block with a skip."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = (
            nn.LayerNorm(width), nn.Linear(width, inner), nn.Linear(inner, width),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


class Layers(nn.Module):
    """Several of them."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(width, inner) for _ in range(LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def _kept(tmp_path: Path, width: int, inner: int) -> tuple[Path, int]:
    program = custom(Layers(width, inner), x=torch.randn(2, width))
    save_bundle(program, tmp_path / "program")
    return tmp_path / "program", sum(t.nbytes for _, t in program.tensors())


def _now(key: str) -> int:
    """Bytes of this process: ``RssAnon``, ``VmRSS``, or since it was reset the peak ``VmHWM``."""
    line = next(x for x in STATUS.read_text().splitlines() if x.startswith(key))
    return 1024 * int(line.split()[1])


def _forget_peak() -> int:
    """Resident bytes, from which the peak counts again."""
    release()
    REFS.write_text("5")
    return _now("VmRSS")


def _made(program: Any, mesh: str, **options: Any) -> tuple[Any, World]:
    world = World(Mesh.parse(mesh), torch.device("cpu"), 60.0)
    return make_engine(program, Squares(), Scene(program, None),  # type: ignore[arg-type]
                       TrainConfig(mesh=mesh, **options), world), world  # fmt: skip


def _held(folder: Path, mesh: str) -> tuple[int, int, bool]:
    """Growth of private and of peak memory by an engine, and whether the file is still mapped."""
    hand_back_at_once()
    for name in _IMPORTED:  # on the way; no part of an engine
        importlib.import_module(name)
    warm = load_bundle(folder)
    release()
    del warm
    private, resident = _now("RssAnon"), _forget_peak()
    engine, world = _made(load_bundle(folder, checked=True), mesh)
    let_go()
    release()
    grown = _now("RssAnon") - private, _now("VmHWM") - resident
    world.leave()
    assert engine.names
    return *grown, "model.safetensors" in Path("/proc/self/maps").read_text()


def test_a_process_reads_and_holds_its_part_of_the_weights(tmp_path: Path) -> None:
    """Half of them, and while it copies those, half or all of the file in clean pages."""
    folder, size = _kept(tmp_path, 768, 3072)
    found = {mesh: spread(2, _held, folder, mesh) for mesh in ("pp=2", "tp=2", "fsdp=2")}
    for mesh, ranks in found.items():
        for private, peak, mapped in ranks:
            assert private <= 0.75 * size and not mapped, mesh
            assert peak <= (1.8 if mesh == "tp=2" else 1.5) * size, mesh


def _step(folder: Path, mesh: str) -> list[int]:
    """What a step's peak adds, without and with values that are computed again."""
    hand_back_at_once()
    found = []
    for again in (False, True):
        program = owned(load_bundle(folder))
        engine, world = _made(program, mesh, gradient_checkpointing=again)
        mine = [share(b, engine.rank, engine.size) for b in batches(program, 4, 2048)]
        engine.gradients(mine)  # gradients have their memory from here on
        before = _forget_peak()
        engine.gradients(mine)
        found.append(_now("VmHWM") - before)
        world.leave()
    return found


@pytest.mark.parametrize("mesh", ["dp=2", "fsdp=2", "pp=2", "tp=2"])
def test_layers_computed_again_keep_less(mesh: str, tmp_path: Path) -> None:
    folder, _ = _kept(tmp_path, 64, 1024)
    for kept, again in spread(2, _step, folder, mesh):
        assert again <= 0.5 * kept
