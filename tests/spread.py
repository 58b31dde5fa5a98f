"""What each process of a test of engines does: the gradients of a step, at one mesh."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ftc.graph import shapes
from ftc.graph.bundle import load_bundle
from ftc.graph.errors import FtcError
from ftc.graph.program import Program
from ftc.graph.stages import carried
from ftc.runtime.training.config import TrainConfig
from ftc.runtime.training.engine import EngineOptions, OneProcess
from ftc.runtime.training.engines.join import make_engine
from ftc.runtime.training.engines.mesh import Mesh
from ftc.runtime.training.engines.schedules import kind_of, owners
from ftc.runtime.training.engines.world import World
from ftc.runtime.training.modules import owned
from ftc.runtime.training.objectives.base import Batch, Objective, Scene

_SDPA = torch.ops.aten.scaled_dot_product_attention.default
Gradients = Mapping[str, Tensor]


class Squares(Objective):
    """A loss of any program: the squares of all outputs, weighted so that no two are alike."""

    name = "squares"
    spec = "squares"

    def check(self, program: Program) -> None: ...

    def encode(self, rows: Any, scene: Scene) -> Any: ...

    def batch(self, table: Any, indices: Any, scene: Scene, draw: Any) -> Batch:
        raise NotImplementedError

    def losses(self, outputs: Any, batch: Batch, scene: Scene) -> dict[str, Tensor]:
        total = torch.zeros(())
        for output in outputs.values():
            if output.is_floating_point():
                flat = output.flatten(1).float()
                weights = 1 + torch.arange(flat.shape[1]).remainder(7) / 7
                total = total + (flat * weights).square().mean(1).sum()
        return {"loss": total}

    def measure(self, outputs: Any, batch: Batch, scene: Scene) -> dict[str, float]:
        return {"seen": float(batch.examples)}


def batches(program: Program, count: int = 2, rows: int = 8) -> list[Batch]:
    """Random batches."""
    found = []
    for i in range(count):
        sizes = {
            n: (rows if n == program.signature.dims[0] else s)
            for n, s in program.signature.sizes().items()
        }
        inputs = program.signature.probe(seed=i, **sizes)
        found.append(Batch(inputs, {}, {"loss": float(rows)}, rows, rows))
    return found


def share(batch: Batch, part: int, of: int) -> Batch:
    inputs = {name: tensor[part::of] for name, tensor in batch.inputs.items()}
    rows = len(next(iter(inputs.values())))
    return Batch(inputs, {}, {"loss": float(rows)}, rows, rows)


def one(folder: Path) -> tuple[dict[str, float], Gradients]:
    """Losses and gradients in one process."""
    program = owned(load_bundle(folder))
    engine = OneProcess(program, Squares(), Scene(program, None), EngineOptions())
    losses = engine.gradients(batches(program))
    return losses, {n: p.grad for n, p in engine.parameters().items() if p.grad is not None}


def still(program: Program) -> Program:
    """``program`` without dropout, which draws other numbers for other batches."""
    for node in program.graph.nodes:
        if node.target is torch.ops.aten.dropout.default:
            node.update_arg(1, 0.0)
        if "dropout_p" in node.kwargs:
            node.update_kwarg("dropout_p", 0.0)
        elif node.target is _SDPA and len(node.args) > 4:
            node.update_arg(4, 0.0)
        node.meta.get("custom", {}).pop("dropout_p", None)
    return program


def staged(program: Program, count: int) -> Program:
    """``program`` cut into stages of as many nodes each, wherever that is."""
    if shapes.fake_mode(program.graph) is None:
        shapes.propagate(program.module, program.signature)
    own = carried(program)
    nodes = [node for node in program.graph.nodes if node in own]
    for i, node in enumerate(nodes):
        node.meta["custom"] = {**node.meta.get("custom", {}), "stage": i * count // len(nodes)}
    return program


def spread_gradients(
    folders: list[Path], mesh: str, schedule: str, options: Mapping[str, Any]
) -> list[Any]:
    """Of each program, ``(losses, gradients, norm, evaluation)``; gradients on the main process."""
    world = World(Mesh.parse(mesh), torch.device("cpu"), 60.0)
    found = [_gradients(folder, world, schedule, options) for folder in folders]
    world.leave()
    return found


def _gradients(folder: Path, world: World, schedule: str, options: Mapping[str, Any]) -> Any:
    program = owned(load_bundle(folder))
    scene, micro = Scene(program, None), 1  # type: ignore[arg-type]
    if world.mesh.pp > 1:
        staged(program, len(owners(kind_of(schedule), world.mesh.pp)))
        micro = 2
    config = TrainConfig(mesh=str(world.mesh), pipeline=schedule, **options)
    engine = make_engine(program, Squares(), scene, config, world)
    mine = [share(b, engine.rank, engine.size) for b in batches(program)]
    mine = [share(b, i, micro) for b in mine for i in range(micro)]
    losses = engine.gradients(mine)
    held = {n: p.grad for n, p in engine.parameters().items() if p.grad is not None}
    whole = {n: t.clone().numpy() for n, t in engine.collect(held).items()}
    norm, evaluation = engine.clip(1e9), engine.evaluate(mine)
    return losses, whole if world.main else None, norm, evaluation


def trained(values: Mapping[str, Any], resume: bool = False, kill: int = 0) -> Any:
    """Trains in each process; ``kill`` ends process 1 after so many steps of the run."""
    import os

    from ftc.runtime.training import trainer
    from ftc.runtime.training.config import TrainConfig
    from ftc.runtime.training.run import train

    if kill and os.environ["RANK"] == "1":
        step = trainer.Trainer._step

        def last(self: Any, batches: Any) -> None:
            if self.state.step == kill:
                os._exit(9)
            step(self, batches)

        trainer.Trainer._step = last  # type: ignore[method-assign]
    try:
        report = train(TrainConfig.of(values), resume=resume)
    except FtcError as error:
        return str(error)
    return report.first_loss, report.last_loss, report.after or report.before
