"""A pipeline: passes in an order that was checked, each proven before the next runs.

Every pass tests its own promise (:mod:`ftc.passes.base`), so a pipeline that
goes wrong stops at the pass and node where it does. At the end the whole is
measured against the program it began with; a budget that every pass kept and
their sum does not is traced to the pass that drifted most, and to the node in it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from ftc.graph.drift import compare, summarize
from ftc.graph.errors import BudgetError, FtcError
from ftc.graph.printer import diff, print_graph
from ftc.graph.program import Drift, PassRecord, Program
from ftc.graph.signature import Signature
from ftc.graph.trace import worst_jump

from .base import Context, Effect, Pass
from .ordering import arrange, order_text
from .registry import providers
from .text import parse_passes


class Observer:
    """Hears of each pass as it runs; override what is of interest."""

    def planned(self, passes: Sequence[Pass]) -> None:
        """The order was checked; ``passes`` will run, those that were added included."""

    def started(self, given: Pass, program: Program) -> None:
        """``given`` is about to run on ``program``."""

    def finished(self, given: Pass, before: Program, after: Program) -> None:
        """``given`` has run and kept its promise; its record is ``after.history[-1]``."""

    def failed(self, given: Pass, before: Program, error: FtcError) -> None:
        """``given`` was refused or broke its promise; the error is raised next."""


class PrintIr(Observer):
    """Prints the program after passes, the way ``--print-ir-after`` asks for.

    Args:
        after: names of passes; ``all`` means every one.
        write: takes the text.
        whole: print the whole graph; otherwise what changed.
    """

    def __init__(
        self, after: Collection[str], write: Callable[[str], object] = print, *, whole: bool = True
    ) -> None:
        self._after, self._write, self._whole = after, write, whole

    def finished(self, given: Pass, before: Program, after: Program) -> None:
        """Prints, if ``given`` is one of the passes asked for."""
        if "all" in self._after or given.name in self._after:
            text = print_graph(after) if self._whole else diff(before, after)
            self._write(f"// after {given.spec}\n{text}")


@dataclass(frozen=True, slots=True)
class PipelineResult:
    """What a pipeline returns.

    Attributes:
        program: the result; its history has grown by ``records``.
        records: one for each pass that ran.
        drift: of the result against the program the pipeline began with; None
            where the inputs changed, or where it is proven elsewhere.
    """

    program: Program
    records: tuple[PassRecord, ...]
    drift: Drift | None


@dataclass(frozen=True, slots=True)
class Pipeline:
    """Passes in order.

    Attributes:
        passes: as asked for; what they need is added when they run.
    """

    passes: tuple[Pass, ...]

    @classmethod
    def parse(cls, text: str) -> Pipeline:
        """The pipeline that ``lowrank{ratio=0.6},int8`` names; empty text is no passes.

        Raises:
            UsageError: with a caret under the first mistake.
        """
        return cls(parse_passes(text)) if text.strip() else cls(())

    @property
    def spec(self) -> str:
        """The text form."""
        return order_text(self.passes)

    def __str__(self) -> str:
        return self.spec

    def plan(self, program: Program) -> tuple[tuple[Pass, str | None], ...]:
        """What would run on ``program``, each pass with the reason it was added, or None.

        Raises:
            OrderError: when the order cannot work.
        """
        return arrange(self.passes, program.facts)

    def run(
        self, program: Program, ctx: Context | None = None, observer: Observer | None = None
    ) -> PipelineResult:
        """Checks the order, then runs pass after pass.

        Only two programs are held at a time: a caller that gives its program
        away (``run(holder.pop())``) has the memory of its weights back as soon
        as a pass has replaced them.

        Args:
            program: is not changed.
            ctx: probes, budget, seed; random probes by default.
            observer: hears of each pass.

        Raises:
            OrderError: before anything ran.
            PreconditionError, VerifyError, PromiseError, BudgetError: as a pass
                raises them; the budget also holds for the pipeline as a whole.
        """
        ctx = ctx or Context.for_program(program)
        observer = observer or Observer()
        plan = self.plan(program)
        observer.planned([each for each, _ in plan])
        known, signature = len(program.history), program.signature
        expected = () if ctx.proven else ctx.outputs(program)
        current, worst = program, None
        del program
        for each, reason in plan:
            observer.started(each, current)
            try:
                after = _note(each(current, ctx).program, reason)
                after = _note(after, _nothing_left(each, after.history, known))
            except FtcError as error:
                if reason is not None:
                    error.what += f" ({reason})"
                observer.failed(each, current, error)
                raise
            observer.finished(each, current, after)
            if ctx.max_drift is not None and (
                worst is None or _relative(after) > _relative(worst[2])
            ):
                worst = (each, current, after)
            current = after
            del after
        drift = None if ctx.proven else _total_drift(signature, expected, current, ctx)
        if worst and drift and ctx.max_drift is not None and drift.relative > ctx.max_drift:
            raise _over_budget(drift, ctx, *worst)
        return PipelineResult(current, current.history[known:], drift)


def _note(program: Program, reason: str | None) -> Program:
    """Puts a note first in the record of the last pass."""
    if reason is None:
        return program
    *earlier, last = program.history
    return replace(program, history=(*earlier, replace(last, notes=(reason, *last.notes))))


def _nothing_left(each: Pass, history: Sequence[PassRecord], known: int) -> str | None:
    """What to say of a last pass that changed nothing, because it or one like it had run before.

    The first ``known`` records are older than this pipeline; they count for approximate passes.
    """
    *earlier, last = history
    if last.modified:
        return None
    alike = {each.name}
    if each.effect is Effect.APPROXIMATE:
        alike |= {cls.name for fact in each.provides for cls in providers(fact)}
    else:
        earlier = earlier[known:]
    before = next((r.spec for r in reversed(earlier) if r.name in alike and r.modified), None)
    return before and f"nothing was left for it after {before}"


def _relative(program: Program) -> float:
    """Drift of the last pass."""
    drift = program.history[-1].drift
    return drift.relative if drift else 0.0


def _total_drift(
    before: Signature, expected: Sequence[Mapping[str, Tensor]], after: Program, ctx: Context
) -> Drift | None:
    """Drift of the whole; None where the inputs (and so the probes) or all outputs changed."""
    before = before.with_outputs_of(after.signature)
    if before.input_types != after.signature.input_types or not before.outputs:
        return None
    outputs = zip(ctx.probes_for(after), expected, ctx.outputs(after), strict=True)
    differences = [
        difference
        for probe, old, new in outputs
        for difference in compare(old, new, probe, before).values()
    ]
    return summarize(differences, ctx.probe_source)


def _over_budget(
    drift: Drift, ctx: Context, worst: Pass, before: Program, after: Program
) -> BudgetError:
    step = worst_jump(before, after, ctx.probes_for(before)[0])
    return BudgetError(
        f"the pipeline drifts by {drift.relative:.3g}, beyond the budget of {ctx.max_drift:g}; "
        f"{worst.spec} drifts most, by {_relative(after):.3g}",
        where=f"most of it at {step}" if step else None,
        fix="raise --max-drift, or choose milder options of that pass",
    )
