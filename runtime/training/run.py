"""A run, from its configuration to a bundle: prepare, train, save.

While it trains, everything it needs to go on is in ``OUT.run``: the program it
started from, the configuration, the log, and checkpoints. When OUT is written,
``OUT.run`` is removed.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ftc.graph.bundle import load_bundle, save_bundle
from ftc.graph.cost import cost
from ftc.graph.errors import UsageError
from ftc.graph.program import Program
from ftc.passes.pipeline import Pipeline
from ftc.runtime.compiled import compile_errors
from ftc.runtime.console import count, duration
from ftc.runtime.memory import peak_memory, release
from ftc.runtime.threads import set_threads

from .checkpoint import has_checkpoint
from .config import TrainConfig
from .data.order import Order
from .data.table import Examples
from .dataset import Dataset, check_files, load_dataset
from .engine import Engine
from .engines import Alone, World
from .engines.join import joined, make_engine
from .loader import Loader
from .log import Log
from .modules import owned, trainable
from .objectives.base import Objective
from .picture import draw_loss
from .progress import Bar
from .report import TrainReport, recorded
from .shared import prove_cut, proven
from .start import (
    CHECKPOINTS,
    CONFIG,
    PROGRAM,
    REPORT,
    Say,
    captured,
    check_start,
    ended,
    fresh,
    keep_data,
    learning,
    resumed,
    rounding,
    run_folder,
    same_data,
    scene_of,
    teacher,
)
from .trainer import LAST, Options, Trainer, metrics_of

LOG, PICTURE, MODEL_CONFIG = "metrics.jsonl", "loss.png", "config.json"
Metrics = Mapping[str, float]


def train(
    config: TrainConfig, *, resume: bool = False, force: bool = False, dry_run: bool = False,
    show: bool = False, say: Say = lambda _: None,
) -> TrainReport:  # fmt: skip
    """Trains a program; with ``steps=0`` it is only measured.

    Args:
        config: what, on what, how.
        resume: go on with the run that was stopped, if there is one; of one that ended,
            the report.
        force: replace a bundle or an unfinished run that is there.
        dry_run: do all that comes before the first step, compute that step, and write
            nothing but the tokens in the cache.
        show: a progress bar on the terminal.
        say: told what runs before and after the steps.

    Raises:
        FtcError: as capture, passes, data and bundle raise it; PromiseError when the
            loss is no number any more.
        Interrupted: when it was asked to stop; it can be resumed.
    """
    config.check()
    check_files(config)
    if dry_run and resume:
        raise UsageError("a dry run has nothing to go on with", fix="leave --resume out")
    if resume and (report := ended(config)) is not None:
        return report
    set_threads(config.threads)
    with joined(config) as world:
        if config.steps == 0:
            return _Run(config, proven(lambda: captured(config, say), world), say, world).score()
        if dry_run:
            world.first(lambda: check_start(config, force))
            return _Run(config, proven(lambda: learning(config, say), world), say, world).rehearse()
        program, new = _begin(config, resume, force, say, world)
        release()  # the weights as they came
        run = _Run(config, program, say, world)
        if resume and new:
            run.notes.append("there was no run to go on with: this is a new one")
        report = run.train(show and world.main)
        say(f"saving {config.out}")
        world.first(lambda: run.save(report))
    return report


def _begin(
    config: TrainConfig, resume: bool, force: bool, say: Say, world: World | Alone
) -> tuple[Program, bool]:
    """The program to change, and whether the run is a new one; the main process prepares it."""

    def prepare() -> tuple[Program, bool]:
        before = resumed(config) if resume else None
        has_checkpoint(run_folder(config) / CHECKPOINTS / LAST)  # mends one half exchanged
        made = before or fresh(config, force, say)
        if prove_cut(made, world):
            made = load_bundle(start, checked=True)  # of which nothing was read yet
        return made, before is None

    start = run_folder(config) / PROGRAM
    made = world.first(prepare)
    program, new = made or (load_bundle(start, checked=True), False)
    mesh = world.mesh
    spread = mesh.pp > 1 or mesh.fsdp > 1 or mesh.tp > 1
    return (program.clone() if spread else owned(program)), new


class _Run:
    """One run: the data and the program that it changes.

    Args:
        config: of the run.
        program: what it changes.
        say: told what runs.
        world: its processes.
    """

    def __init__(
        self, config: TrainConfig, program: Program, say: Say, world: World | Alone
    ) -> None:
        self.config, self.say, self.world = config, say, world
        self.objective: Objective = config.made_objective()
        self.program = program
        scene = scene_of(program, config, teacher(config, program, self.objective, say, world))
        self.data: Dataset = world.first(lambda: load_dataset(config, self.objective, scene, say))
        if not world.main:  # from the cache that the first one made
            self.data = load_dataset(config, self.objective, scene, say)
        passes = {each.spec for each in Pipeline.parse(config.passes).passes}
        self.notes = [f"{record.name}: {note}" for record in program.history
                      if record.spec in passes for note in record.notes]  # fmt: skip
        self.notes += self.data.notes
        self.records: list[Any] = []

    def score(self) -> TrainReport:
        """Metrics of the program as it is, on the evaluation data or else on all."""
        self.say("evaluating")
        losses, sums = self._engine().evaluate(
            self._loader(self.data.evaluation or self.data.training).evaluation()
        )
        found = metrics_of(self.objective, losses, sums)
        return self._report(None, found, None)

    def train(self, show: bool) -> TrainReport:
        """Every step that is left."""
        folder, config = run_folder(self.config), self.config
        self.world.first(lambda: same_data(folder, self.data.fingerprint))
        trainer = self._trainer()
        self.world.first(lambda: keep_data(folder, self.data.fingerprint))
        if trainer.resume():
            self.notes += [f"went on after step {trainer.state.step:,}", *rounding(config)]
        board = Path(config.tensorboard) if config.tensorboard else None
        if self.world.main:
            trainer.log = Log(folder / LOG, trainer.state.step, board)
        trainer.bar = Bar(show, trainer.options.steps, trainer.state.step)
        try:
            with compile_errors(config.compile):
                before = trainer.first_evaluation()
                trainer.run()
                after = trainer.evaluate() if trainer.evaluation else None
        finally:
            trainer.bar.stop()
            if trainer.log is not None:
                trainer.log.close()
        trainer.engine.finish()
        self.records = trainer.log.records if trainer.log is not None else []
        return self._report(trainer, before, after)

    def rehearse(self) -> TrainReport:
        """The first step, computed and not taken."""
        config, trainer = self.config, self._trainer()
        with compile_errors(config.compile):
            loss, seconds = trainer.rehearse()
        steps, rows = trainer.options.steps, config.batch * config.accumulate
        epochs = steps / trainer.data.order.steps_per_epoch
        self.notes.append(
            f"{steps:,} steps of {rows:,} examples, {epochs:.3g} epochs; the first took "
            f"{duration(seconds)}, so all might take {duration(steps * seconds)}; "
            f"{count(peak_memory())}B at most so far"
        )
        report = self._report(trainer, None, None)
        return replace(report, out="", first_loss=loss)

    def save(self, report: TrainReport) -> None:
        """Writes the bundle, with its history and what is said of the run, and ends the run."""
        folder = run_folder(self.config)
        program = recorded(self.program, self.config, report)
        report_text = json.dumps(report.to_dict(), indent=1) + "\n"
        files = {
            CONFIG: lambda path: path.write_text(self.config.to_toml(), encoding="utf-8"),
            LOG: lambda path: shutil.copyfile(folder / LOG, path),
            REPORT: lambda path: path.write_text(report_text, encoding="utf-8"),
            PICTURE: lambda path: draw_loss(self.records, path),
        }
        if (named := self._named_labels()) is not None:
            files[MODEL_CONFIG] = lambda path: path.write_text(named, encoding="utf-8")
        save_bundle(program, self.config.out, force=True, files=files)
        shutil.rmtree(folder)

    def _trainer(self) -> Trainer:
        """The loop, before its first step."""
        config = self.config
        torch.manual_seed(config.seed + self.world.data_rank)
        data = self._loader(self.data.training, shuffle=True)
        evaluation = self._loader(self.data.evaluation) if self.data.evaluation else None
        options = _options(config, data.order.steps_per_epoch)
        self.notes += config.notes(options.steps)
        engine = self._engine()
        release()  # what it was made from
        return Trainer(engine, self.objective, data, evaluation, options,
                       run_folder(config) / CHECKPOINTS)  # fmt: skip

    def _engine(self) -> Engine:
        engine = make_engine(self.program, self.objective, self.data.scene, self.config,
                             self.world)  # fmt: skip
        self.notes += engine.notes
        return engine

    def _loader(self, examples: Examples, *, shuffle: bool = False) -> Loader:
        """Batches of examples; evaluation puts similar lengths together where it can."""
        config, lengths = self.config, examples.lengths()
        if shuffle and config.bucket and lengths is None:
            raise UsageError(f"{self.objective.name} has no rows to sort by length",
                             fix="leave --bucket out")  # fmt: skip
        sort = config.bucket or not shuffle
        order = Order(len(examples), config.batch, config.accumulate if shuffle else 1,
                      config.seed, shuffle, lengths if sort else None)  # fmt: skip
        return Loader(examples, order, self.objective, self.data.scene, self.world.data_rank,
                      self.world.data_size, config.per_batch if shuffle else 1)  # fmt: skip

    def _named_labels(self) -> str | None:
        """The model's configuration with the names of the classes that were learned."""
        labels, assets = self.data.scene.labels, self.program.assets
        if not labels or assets is None or not (assets / MODEL_CONFIG).is_file():
            return None
        stored = json.loads((assets / MODEL_CONFIG).read_text(encoding="utf-8"))
        stored["id2label"] = {str(i): name for i, name in enumerate(labels)}
        stored["label2id"] = {name: i for i, name in enumerate(labels)}
        return json.dumps(stored, indent=2) + "\n"

    def _report(
        self, trainer: Trainer | None, before: Metrics | None, after: Metrics | None
    ) -> TrainReport:
        learn = trainable(self.program).values()
        state = trainer.state if trainer else None
        losses = [r["loss"] for r in self.records if "loss" in r]
        early = trainer is not None and trainer.options.patience > 0
        return TrainReport(
            self.config.program, self.config.out, self.objective.spec,
            state.step if state else 0, trainer.options.steps if trainer else 0,
            state.step / trainer.data.order.steps_per_epoch if state and trainer else 0.0,
            sum(p.numel() for p in learn), cost(self.program).parameters,
            state.examples if state else 0, state.tokens if state else 0,
            state.seconds if state else 0.0, losses[0] if losses else None,
            losses[-1] if losses else None, before, after,
            state.best_step if state and early else None, peak_memory(), tuple(self.notes),
        )  # fmt: skip


def _options(config: TrainConfig, per_epoch: int) -> Options:
    total = config.total_steps(per_epoch)
    return Options(
        total, config.made_schedule(total), config.learning_rate, config.weight_decay,
        config.beta1, config.beta2, config.epsilon, config.clip,
        config.evaluate_every or per_epoch, config.save_every or per_epoch, config.log_every,
        config.patience, config.metric,
    )  # fmt: skip
