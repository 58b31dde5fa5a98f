"""The configuration of a run: one dataclass, from the command line, a TOML file, or Python.

Each field is a key of the file and an option of the command (``learning_rate``
and ``--learning-rate``). A run writes what it resolved to as ``train.toml``
beside its result, which gives the same run again.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from ftc.graph.errors import UsageError, nearest
from ftc.graph.words import plural
from ftc.passes.pipeline import Pipeline

from .engine import EngineOptions, Precision
from .engines.mesh import Mesh
from .engines.schedules import check_microbatches, check_options, kind_of
from .objectives import Objective, parse_objective
from .objectives.distill import Distillation
from .schedule import Schedule
from .toml_file import toml_value


@dataclass(frozen=True)
class TrainConfig:
    """What is trained, on what, how.

    Attributes:
        program: what :func:`ftc.capture` takes.
        data: JSONL, CSV, text, Parquet, or a folder of a dataset.
        objective: its text form, ``mlm{share=0.2}``.
        out: the bundle to write.
        passes: run before training, ``freeze{train=ffn}``.
        task: what to capture for.
        teacher: of distillation; by default the program as it came.
        eval: a file to evaluate on, or a share of the data, ``"0.1"``.
        columns: of the data with other names, ``text=review,label=stars``.
        limit: rows to use at most.
        length: tokens of a row at most; by default 128.
        batch: rows of a batch.
        accumulate: batches of a step.
        bucket: put rows of similar length together, for less padding.
        epochs: times that the data is seen.
        steps: instead of epochs; 0 only evaluates.
        learning_rate, weight_decay, beta1, beta2, epsilon: of AdamW; biases and norms
            do not decay.
        schedule: of the learning rate.
        warmup: steps in which it rises, or, below 1, the share of the steps.
        clip: largest norm of a gradient; 0 for any.
        precision: ``bf16`` computes products in bfloat16.
        gradient_checkpointing: compute each layer again for its gradients: less memory,
            more time.
        compile: through torch.compile.
        device: ``cpu`` or ``cuda``.
        mesh: processes along each axis, ``dp=2,tp=2``; torchrun starts them.
        pipeline: schedule of the stages: ``gpipe``, ``1f1b``, ``interleaved``,
            ``looped-bfs``, ``zero-bubble``, ``zbv`` or ``dualpipev``.
        microbatches: of a batch in a pipeline; by default two for each of its processes.
        timeout: seconds to wait for another process.
        threads: of the processor.
        evaluate_every, save_every: steps; by default an epoch.
        log_every: steps between lines of ``metrics.jsonl``.
        patience: evaluations without a better ``metric`` before the run stops and takes
            the best weights; 0 for never.
        metric: what patience looks at.
        tensorboard: a folder for TensorBoard.
        seed: of everything random.
        trust: allow a ``.pt2``.
    """

    program: str = ""
    data: str = ""
    objective: str = ""
    out: str = ""
    passes: str = ""
    task: str | None = None
    teacher: str | None = None
    eval: str | None = None
    columns: str = ""
    limit: int | None = None
    length: int | None = None
    batch: int = 16
    accumulate: int = 1
    bucket: bool = False
    epochs: float = 3.0
    steps: int | None = None
    learning_rate: float = 5e-5
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup: float = 0.0
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    clip: float = 1.0
    precision: Precision = "fp32"
    gradient_checkpointing: bool = False
    compile: bool = False
    device: str = "cpu"
    mesh: str = ""
    pipeline: str = "1f1b"
    microbatches: int | None = None
    timeout: float = 600.0
    threads: int | None = None
    evaluate_every: int | None = None
    save_every: int | None = None
    log_every: int = 10
    patience: int = 0
    metric: str = "loss"
    tensorboard: str | None = None
    seed: int = 0
    trust: bool = False

    @classmethod
    def of(cls, values: Mapping[str, Any], where: str | None = None) -> TrainConfig:
        """A configuration from plain values, checked.

        Args:
            values: by key.
            where: where they are from, for errors.

        Raises:
            UsageError: for an unknown key, with the nearest; for a value that makes no sense.
        """
        hints = get_type_hints(cls)
        for key, value in values.items():
            if key not in hints:
                raise UsageError(f"unknown key {key!r}", where=where, fix=nearest(key, hints))
            if not _fits(value, hints[key]):
                raise UsageError(
                    f"{key} is {value!r}", where=where, fix=f"write {_words(hints[key])}"
                )
        made = cls(**{k: float(v) if hints[k] is float else v for k, v in values.items()})
        made.check(where)
        return made

    def check(self, where: str | None = None) -> None:
        """Refuses what can be refused without any work.

        Raises:
            UsageError: with the fix.
        """
        for name in ("program", "data", "objective"):
            if not getattr(self, name):
                fix = "ftc train PROGRAM --data FILE --objective NAME -o OUT"
                raise UsageError(f"{name} is missing", where=where, fix=fix)
        if not self.out and self.steps != 0:
            raise UsageError("out is missing", where=where, fix="-o OUT, or --steps 0 to evaluate")
        for name in ("batch", "accumulate", "log_every", "length", "limit", "save_every",
                     "evaluate_every", "microbatches"):  # fmt: skip
            _positive(name, getattr(self, name), where)
        for name in ("learning_rate", "epochs", "epsilon", "timeout"):
            if not 0 < getattr(self, name) < math.inf:
                raise UsageError(f"{name} is {getattr(self, name):g}", where=where,
                                 fix="more than 0")  # fmt: skip
        for name in ("weight_decay", "warmup", "clip", "patience", "steps", "seed"):
            if not 0 <= (getattr(self, name) or 0) < math.inf:
                raise UsageError(f"{name} is {getattr(self, name):g}", where=where, fix="0 or more")
        if self.seed >= 2**62:
            raise UsageError(f"seed is {self.seed}", where=where, fix="a number below 2^62")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name):g}", where=where,
                                 fix="a number in [0, 1)")  # fmt: skip
        if self.tensorboard and Path(self.tensorboard).is_file():
            raise UsageError(f"tensorboard is {self.tensorboard}, a file", where=where,
                             fix="name a folder")  # fmt: skip
        if self.patience and not self.eval:
            raise UsageError("patience needs data to evaluate on", where=where, fix="--eval 0.1")
        objective = self.made_objective()
        if self.teacher and not isinstance(objective, Distillation):
            fix = f"--objective {Distillation.name}, or leave teacher out"
            raise UsageError(f"{objective.name} has no teacher", where=where, fix=fix)
        kind = kind_of(self.pipeline)
        if (mesh := self.made_mesh()).pp > 1:
            check_microbatches(kind, self.per_batch * self.accumulate, mesh.pp)
            check_options(self.pipeline, sharded=mesh.fsdp > 1, compiled=self.compile)
        Pipeline.parse(self.passes)
        self._check_columns(where)
        self.engine_options().check()

    def made_objective(self) -> Objective:
        """The objective that the text names."""
        return parse_objective(self.objective)

    def made_mesh(self) -> Mesh:
        """Processes along each axis."""
        return Mesh.parse(self.mesh)

    @property
    def per_batch(self) -> int:
        """Microbatches of a batch: one without a pipeline."""
        stages = self.made_mesh().pp
        return 1 if stages == 1 else self.microbatches or 2 * stages

    def engine_options(self) -> EngineOptions:
        """How the engine computes."""
        return EngineOptions(self.device, self.precision, self.gradient_checkpointing, self.compile)

    def columns_map(self) -> dict[str, str]:
        """``{wanted: given}`` of the columns to rename."""
        parts = [part.partition("=") for part in self.columns.split(",") if part]
        for wanted, equals, given in parts:
            if not (wanted and equals and given):
                raise UsageError(f"columns is {self.columns!r}", fix="text=review,label=stars")
        found = {wanted.strip(): given.strip() for wanted, _, given in parts}
        if len(found) < len(parts):
            raise UsageError(f"columns is {self.columns!r}: a column is named twice",
                             fix="text=review,label=stars")  # fmt: skip
        return found

    def _check_columns(self, where: str | None) -> None:
        """Refuses to rename to what the objective does not read."""
        objective = self.made_objective()
        known = (*objective.columns, *objective.optional)
        for wanted, given in self.columns_map().items():
            if wanted not in known:
                near = f"{wanted}={given} makes a column {wanted}: "
                fix = f"{given}={wanted}" if given in known else nearest(wanted, known)
                raise UsageError(
                    f"{objective.name} reads no column {wanted!r}",
                    where=where or f"columns is {self.columns!r}",
                    fix=near + fix,
                )

    def total_steps(self, per_epoch: int) -> int:
        """Steps of the run."""
        return self.steps if self.steps is not None else max(1, round(self.epochs * per_epoch))

    def notes(self, total: int) -> Iterator[str]:
        """What of the options has no effect in a run of ``total`` steps, in words."""
        if self.warmup >= total > 0:
            yield (f"warmup={self.warmup:g} is not shorter than the run of {plural(total, 'step')}:"
                   " the learning rate only rises")  # fmt: skip
        for name in ("pipeline", "microbatches") if self.made_mesh().pp == 1 else ():
            if (value := getattr(self, name)) != getattr(TrainConfig, name):
                yield f"{name}={value} is of a mesh with stages, pp=2 or more, and was not used"

    def made_schedule(self, total: int) -> Schedule:
        """The schedule of a run of ``total`` steps."""
        warmup = self.warmup * total if self.warmup < 1 else self.warmup
        return Schedule(self.schedule, total, round(warmup))

    def to_toml(self) -> str:
        """The configuration as TOML: every key that is not empty, in order."""
        values = dataclasses.asdict(self)
        return "".join(f"{k} = {toml_value(v)}\n" for k, v in values.items() if v not in (None, ""))


def _positive(name: str, value: int | None, where: str | None) -> None:
    if value is not None and value < 1:
        raise UsageError(f"{name} is {value}", where=where, fix="1 or more")


def _members(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if isinstance(hint, UnionType) else (hint,)


def _fits(value: Any, hint: Any) -> bool:
    for member in _members(hint):
        if get_origin(member) is Literal:
            if value in get_args(member):
                return True
        elif isinstance(value, bool) or member is bool:
            if isinstance(value, bool) and member is bool:
                return True
        elif isinstance(value, (int, float) if member is float else member):
            return True
    return False


def _words(hint: Any) -> str:
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    return " or ".join(
        ", ".join(map(str, get_args(m))) if get_origin(m) is Literal else names[m]
        for m in _members(hint)
        if m is not NoneType
    )
