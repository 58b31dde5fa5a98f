"""Recovery: the factors of a low-rank program learn to say what the original says.

A short distillation on the calibration inputs, in the graph. Only the factors that
``lowrank`` made are trained; everything else stays as it was:

    scores:  KL( original || factored ) per row        states:  |a - b|^2 / |a|^2

with Adam, a learning rate that falls to 0 along a half cosine, and a fixed seed. It
comes right after ``lowrank``, so that what quantizes comes after what was learned.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import kl_div

from ftc.graph.cost import cost
from ftc.graph.drift import measure_drift, valid_rows
from ftc.graph.errors import PreconditionError, UsageError
from ftc.graph.pieces import Inputs, pieces
from ftc.graph.printer import fingerprint
from ftc.graph.program import PassRecord, Program
from ftc.graph.words import plural
from ftc.passes.base import Context, Effect
from ftc.passes.lowrank import LowRank
from ftc.passes.pipeline import Observer, Pipeline, PipelineResult

_RATE = 1e-4
_TOKENS = 128  # of a step
_LARGEST = 1.0  # norm of a gradient
_STATES = ("feature-extraction", "module")


def recovering(
    pipeline: Pipeline, steps: int | None, progress: Callable[[str], None] = lambda _: None
) -> Pipeline | Recovering:
    """``pipeline`` with a recovery after its last ``lowrank``; itself where ``steps`` is None.

    Raises:
        UsageError: for fewer steps than 1, or a pipeline without ``lowrank``.
    """
    if steps is None:
        return pipeline
    if steps < 1:
        raise UsageError(f"--recover {steps}: steps are 1 or more", fix="--recover 100")
    last = max((i for i, p in enumerate(pipeline.passes) if p.name == "lowrank"), default=None)
    if last is None:
        raise UsageError("--recover trains the factors of lowrank, and no such pass runs",
                         fix=f'--passes "{_with_lowrank(pipeline)}"')  # fmt: skip
    return Recovering(pipeline, last + 1, steps, progress)


def _with_lowrank(pipeline: Pipeline) -> Pipeline:
    """``pipeline`` with a cut before what quantizes or changes inputs and outputs."""
    cut, passes = LowRank(budget=0.8), pipeline.passes
    if passes and passes[0].name == "cleanup":  # comes first anyway
        passes = passes[1:]
    later = (p.provides & cut.forbids or p.effect is Effect.INTERFACE for p in passes)
    first = next((place for place, is_later in enumerate(later) if is_later), len(passes))
    return Pipeline((*passes[:first], cut, *passes[first:]))


@dataclass(frozen=True)
class Recovering:
    """A pipeline with a recovery in it.

    Attributes:
        pipeline: all its passes.
        first: how many of them run before the recovery.
        steps: of the recovery.
        progress: told the loss now and then.
    """

    pipeline: Pipeline
    first: int
    steps: int
    progress: Callable[[str], None]

    def run(self, program: Program, ctx: Context, observer: Observer) -> PipelineResult:
        """As :meth:`Pipeline.run`; the original is held until the recovery is done.

        Raises:
            FtcError: as the passes and :func:`recover` do.
        """
        self.pipeline.plan(program)  # a wrong order is refused before any work
        known, passes = len(program.history), self.pipeline.passes
        done = Pipeline(passes[: self.first]).run(program, ctx, observer).program
        done = recover(done, program, ctx, self.steps, self.progress)
        del program
        done = Pipeline(passes[self.first :]).run(done, ctx, observer).program
        return PipelineResult(done, done.history[known:], None)


def recover(
    program: Program, original: Program, ctx: Context, steps: int,
    progress: Callable[[str], None] = lambda _: None,
) -> Program:  # fmt: skip
    """``program`` with trained factors, and a record of it; ``program`` stays as it is.

    Args:
        program: with factors ``*.A`` and ``*.B``, not quantized.
        original: what it is to say; takes the same inputs.
        ctx: calibration inputs, probes, seed.
        steps: updates, 1 or more.
        progress: told the loss now and then.

    Raises:
        PreconditionError: without calibration data, or where nothing was factored.
    """
    if not ctx.calibration:
        raise PreconditionError("recovery learns from calibration data, and there is none",
                                fix="give some with --calib")  # fmt: skip
    names = _factors(program)
    if not names:
        raise PreconditionError("recovery trains factors, and lowrank made none",
                                fix="ask for a larger cut, such as lowrank{budget=0.8}, "
                                "or leave --recover out")  # fmt: skip
    start = time.perf_counter()
    student = _trainable(program, names)
    batches = pieces(original.signature, ctx.calibration, _TOKENS)
    losses = _train(student, original, names, batches, steps, ctx.seed, progress)
    trains = {name: p.requires_grad for name, p in program.module.named_parameters()}
    for name, parameter in student.module.named_parameters():
        parameter.requires_grad_(trains[name])
    return _recorded(student, original, ctx, names, losses, time.perf_counter() - start)


def _factors(program: Program) -> list[str]:
    """Names of the factors of every low-rank weight."""
    held = {name for name, _ in program.module.named_parameters()}
    whole = [name.removesuffix(".A") for name in held if name.endswith(".A")]
    return sorted(f"{name}.{part}" for name in whole if f"{name}.B" in held for part in "AB")


def _trainable(program: Program, names: Sequence[str]) -> Program:
    """A clone that owns its factors and trains nothing else."""
    student = program.clone()
    student.module.requires_grad_(False)
    for name in names:
        parameter = student.module.get_parameter(name)
        parameter.data = parameter.data.clone()
        parameter.requires_grad_(True)
    return student


def _train(
    student: Program, teacher: Program, names: Sequence[str], batches: Sequence[Inputs],
    steps: int, seed: int, progress: Callable[[str], None],
) -> list[float]:  # fmt: skip
    """The loss of each step."""
    parameters = [student.module.get_parameter(name) for name in names]
    optimizer = torch.optim.Adam(parameters, lr=_RATE)
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    losses = []
    for step in range(steps):
        order = order or torch.randperm(len(batches), generator=generator).tolist()
        given = batches[order.pop()]
        with torch.no_grad():
            expected = teacher(given)
        with torch.enable_grad():
            loss = _distance(student, student(given), expected, given)
            loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters, _LARGEST)
        for group in optimizer.param_groups:
            group["lr"] = _RATE * (1 + math.cos(math.pi * step / steps)) / 2
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        if step % 10 == 0 or step == steps - 1:
            progress(f"recovering, step {step + 1} of {steps}, loss {losses[-1]:.4g}")
    return losses


def _distance(program: Program, found: Inputs, wanted: Inputs, given: Inputs) -> Tensor:
    """Mean over the rows of each output, summed over outputs."""
    total = torch.zeros(())
    for spec in program.signature.outputs:
        a, b = wanted.get(spec.name), found[spec.name]
        if a is None or not b.requires_grad:
            continue
        valid = valid_rows(spec.shape, given, program.signature)
        a, b = (x[valid] if valid is not None else x.flatten(0, -2) for x in (a.float(), b.float()))
        if program.signature.task in _STATES:
            total = total + ((a - b).square().sum(-1) / a.square().sum(-1).clamp_min(1e-12)).mean()
        else:
            total = total + kl_div(b.log_softmax(-1), a.log_softmax(-1), log_target=True,
                                   reduction="batchmean")  # fmt: skip
    return total


def _recorded(
    student: Program, original: Program, ctx: Context, names: Sequence[str],
    losses: Sequence[float], seconds: float,
) -> Program:  # fmt: skip
    steps, few = len(losses), max(len(losses) // 10, 1)
    first, last = (sum(part) / few for part in (losses[:few], losses[-few:]))
    note = (f"trained {plural(len(names), 'factor')} for {plural(steps, 'step')} on "
            f"calibration data: the loss fell from {first:.4g} to {last:.4g}")  # fmt: skip
    if last > first:
        note = note.replace("fell", "rose")
    total = cost(student)
    record = PassRecord(
        f"recover{{steps={steps}}}", "approximate", len(names), (),
        measure_drift(original, student, ctx.probes_for(original), ctx.probe_source),
        total.parameters, total.bytes, total.operations, seconds,
        (note, "drift is against the original program"), fingerprint(student),
    )  # fmt: skip
    return replace(student, history=(*student.history, record))
