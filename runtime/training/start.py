"""What a run starts from: the captured program after its passes, kept on disk until the run ends.

A run reads the program back from where it was saved, also the first time, so one
that is resumed starts from the very same bytes at the same alignment.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ftc.graph.bundle import is_bundle, load_bundle, save_bundle
from ftc.graph.bundle.bundle import check_output
from ftc.graph.cached import is_cached
from ftc.graph.errors import UsageError
from ftc.graph.program import Program
from ftc.graph.sources import capture
from ftc.graph.target import target
from ftc.passes.pipeline import Pipeline
from ftc.runtime.memory import collected_by_hand, release
from ftc.runtime.probes import make_context

from .config import TrainConfig
from .data.encoder import Encoder
from .dataset import load_dataset
from .engines import Alone, World
from .modules import in_mode, move
from .objectives.base import Objective, Scene, Tensors, hidden_name
from .objectives.distill import Distillation
from .report import TrainReport
from .shared import shared
from .toml_file import read_config

PROGRAM, CONFIG, DATA, REPORT = "program", "train.toml", "data.json", "train.json"
CHECKPOINTS = "checkpoints"
_ROUNDING = ("threads", "mesh", "pipeline", "microbatches")
"""Keys that may differ when a run is resumed, and change its weights by rounding."""
_FREE = {*_ROUNDING, "out", "log_every", "tensorboard", "save_every", "trust", "timeout"}
"""All that may differ."""
Say = Callable[[str], object]


def run_folder(config: TrainConfig) -> Path:
    """Where a run keeps what it needs to go on, ``OUT.run``."""
    out = Path(config.out).expanduser().resolve()
    return out.with_name(f"{out.name}.run")


@collected_by_hand()
def captured(config: TrainConfig, say: Say) -> Program:
    """The program after its passes.

    Raises:
        FtcError: as capture and passes do; UsageError where the objective does not fit.
    """
    say(f"capturing {config.program}")
    program = capture(config.program, task=config.task, trust=config.trust)
    pipeline = Pipeline.parse(config.passes)
    if pipeline.passes:
        ctx = make_context(program, None, target("portable"), None, None, config.seed)
        say(f"running {pipeline.spec}")
        program = pipeline.run(program, ctx).program
    if is_cached(program.signature):
        raise UsageError("this program has a cache, and gives scores of the last token alone",
                         fix="train it before --task generate, or the pass cache")  # fmt: skip
    config.made_objective().check(program)
    return program


def check_start(config: TrainConfig, force: bool) -> None:
    """Refuses to write over what is there.

    Raises:
        UsageError: when the bundle or an unfinished run is there, without ``force``.
    """
    folder = run_folder(config)
    check_output(Path(config.out).expanduser().resolve(), force=force)
    if _is_run(folder) and not force:
        raise UsageError(f"{folder} holds a run that did not end",
                         fix="--resume goes on with it, --force starts again")  # fmt: skip


def _is_run(folder: Path) -> bool:
    """Whether a run came as far as its data: what was refused before leaves nothing to lose."""
    return any((folder / name).exists() for name in (DATA, CHECKPOINTS))


def learning(config: TrainConfig, say: Say) -> Program:
    """The program after its passes, of which something learns.

    Raises:
        FtcError: as :func:`captured`; UsageError where nothing learns.
    """
    program = captured(config, say)
    if not any(p.requires_grad for p in program.module.parameters()):
        raise UsageError("no parameter of the program learns", fix="--passes freeze{train=all}")
    return program


def fresh(config: TrainConfig, force: bool, say: Say) -> Program:
    """The program that a new run starts from, as its folder keeps it.

    Raises:
        UsageError: as :func:`check_start` and :func:`learning` raise it.
    """
    check_start(config, force)
    program = learning(config, say)
    folder = run_folder(config)
    if _is_run(folder):  # data that is refused takes no earlier run with it
        load_dataset(config, config.made_objective(), scene_of(program, config), say)
    shutil.rmtree(folder, ignore_errors=True)
    say("saving the start of the run")
    save_bundle(program, folder / PROGRAM)
    _write(folder / CONFIG, config.to_toml())
    del program
    release()
    return load_bundle(folder / PROGRAM)


def resumed(config: TrainConfig) -> Program | None:
    """The program that the run in ``OUT.run`` started from; None where no run was started.

    Raises:
        UsageError: when the run had other options.
    """
    folder = run_folder(config)
    if not (_is_run(folder) and (folder / CONFIG).is_file() and is_bundle(folder / PROGRAM)):
        return None
    _check_same(config, folder / CONFIG)
    return load_bundle(folder / PROGRAM)


def ended(config: TrainConfig) -> TrainReport | None:
    """The report of the run that ended in ``OUT``; None where that is no trained program.

    Raises:
        UsageError: when the run had other options.
    """
    out = Path(config.out).expanduser().resolve()
    if run_folder(config).exists() or not (is_bundle(out) and (out / REPORT).is_file()):
        return None
    _check_same(config, out / CONFIG)
    stored = json.loads((out / REPORT).read_text(encoding="utf-8"))
    report = TrainReport(**{**stored, "notes": tuple(stored["notes"])})
    note = f"the run in {config.out} has ended: nothing was left to do, and --force trains again"
    return replace(report, notes=(*report.notes, note))


def _check_same(config: TrainConfig, path: Path) -> None:
    """Refuses options that a run did not have, which wrote its own to ``path``."""
    before = _written(path)
    for key in (k for k in vars(config) if k not in _FREE):
        old, new = getattr(before, key), getattr(config, key)
        if old != new:
            raise UsageError(f"the run had {key}={old!r}, and this call has {new!r}",
                             where=str(path),
                             fix="give the same options, or start again: --force")  # fmt: skip


def _written(path: Path) -> TrainConfig:
    """The configuration that a run wrote to ``path``."""
    return TrainConfig.of(read_config(path), str(path))


def rounding(config: TrainConfig) -> list[str]:
    """Options of a resumed run that differ from those it began with, one sentence each."""
    before = _written(run_folder(config) / CONFIG)
    return [f"the run began with {key}={old!r} and goes on with {new!r}: its weights are those of "
            "an uninterrupted run up to rounding, not to the bit"
            for key in _ROUNDING
            if (old := getattr(before, key)) != (new := getattr(config, key))]  # fmt: skip


def scene_of(program: Program, config: TrainConfig, teacher: Any = None) -> Scene:
    """What an objective knows of a run besides its batches."""
    return Scene(program, Encoder.of(program, config.length), teacher=teacher)


def keep_data(folder: Path, fingerprint: str) -> None:
    """Says which data a run is on; from here on it is one that can be lost."""
    _write(folder / DATA, json.dumps({"sha256": fingerprint}))


def same_data(folder: Path, fingerprint: str) -> None:
    """Refuses to go on with a run whose data has changed.

    Raises:
        UsageError: then.
    """
    path = folder / DATA
    if not path.exists():
        return
    if json.loads(path.read_text(encoding="utf-8"))["sha256"] != fingerprint:
        raise UsageError("the data has changed since the run began",
                         fix="restore it, or start again: --force")  # fmt: skip


def _write(path: Path, text: str) -> None:
    """Writes a file that appears whole or not at all."""
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def teacher(
    config: TrainConfig, student: Program, objective: Objective, say: Say, world: World | Alone
) -> Any:
    """Outputs of the program that is learned from, for distillation; else None.

    Raises:
        UsageError: where the student has none that can be compared with them.
    """
    if not isinstance(objective, Distillation):
        return None
    source = config.teacher or config.program
    say(f"capturing the teacher {source}")
    program = shared(lambda: capture(source, task=config.task, trust=config.trust), world)
    objective.check_teacher(student, program)
    observed = objective.observed(program)
    names = (*program.signature.output_names, *map(hidden_name, range(len(observed))))
    evaluating = in_mode(program, training=False, observed=observed)
    move(evaluating, torch.device(config.device))

    def outputs(inputs: Tensors) -> dict[str, Tensor]:
        wanted = {name: inputs[name] for name in program.signature.input_names if name in inputs}
        with torch.no_grad():
            values = evaluating.module(*program.signature.bind(wanted))
        return dict(zip(names, values, strict=True))

    return outputs
