"""The pass contract: program in, program out, and a numerical promise that is tested every time.

A pass is a frozen dataclass. Its fields are its options, its text form is
``name{option=value}``, and it says what it will do to the numbers:

=============  ==================================================================
``EXACT``      outputs agree to rounding (:data:`ftc.graph.drift.ROUNDING`)
``APPROXIMATE``  the drift is measured, recorded, and held to a budget if there is one
``INTERFACE``  inputs or outputs change; those outputs that stay are compared
``ANNOTATION``  no arithmetic changes: same graph, same weights
=============  ==================================================================

The promise is checked on probe inputs (:mod:`ftc.passes.context`) after every
run, and when it is broken the result is withheld and the error names the node.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import Enum
from typing import ClassVar, Self, final

from torch import Tensor

from ftc.graph.cost import cost
from ftc.graph.drift import Difference, compare, summarize
from ftc.graph.errors import (
    BudgetError,
    PreconditionError,
    PromiseError,
    UsageError,
    VerifyError,
)
from ftc.graph.printer import fingerprint
from ftc.graph.program import Drift, PassRecord, Program
from ftc.graph.rewriter import Rewriter
from ftc.graph.trace import locate, worst_jump
from ftc.graph.verify import verify

from .context import Context, run_probe
from .text import format_pass

__all__ = ["Context", "Effect", "Pass", "PassResult"]


class Effect(Enum):
    """What a pass promises about the numbers; the value is its name in reports."""

    EXACT = "exact"
    APPROXIMATE = "approximate"
    INTERFACE = "interface"
    ANNOTATION = "annotation"


@dataclass(frozen=True, slots=True)
class PassResult:
    """What a pass returns: the program after it, and the record that was added to its history."""

    program: Program
    record: PassRecord

    @property
    def modified(self) -> int:
        """How many rewrites were made."""
        return self.record.modified


@dataclass(frozen=True)
class Pass(ABC):
    """Base of every pass: subclass it as a frozen dataclass and write :meth:`rewrite`.

    Attributes:
        name: what the pass is called in text; words joined by hyphens.
        effect: its numerical promise.
        needs: facts that must hold before (``canonical``); a pipeline adds the
            pass that provides one.
        provides: facts that hold afterwards.
        forbids: facts that must not hold before.
    """

    name: ClassVar[str]
    effect: ClassVar[Effect]
    needs: ClassVar[frozenset[str]] = frozenset()
    provides: ClassVar[frozenset[str]] = frozenset()
    forbids: ClassVar[frozenset[str]] = frozenset()

    @abstractmethod
    def rewrite(self, rw: Rewriter, ctx: Context) -> None:
        """Changes the program through ``rw``, and through nothing else."""

    @property
    def needed(self) -> frozenset[str]:
        """``needs``, as far as these options need it."""
        return self.needs

    @property
    def otherwise(self) -> str | None:
        """What to do with a program that it does not fit: the fix of a refusal that has none."""
        return None

    def requires(self, program: Program) -> None:  # noqa: B027 (optional)
        """Raises PreconditionError where ``program`` does not allow this pass."""

    def ensures(self, before: Program, after: Program) -> None:  # noqa: B027 (optional)
        """Raises PromiseError where a promise of the pass's own is broken."""

    def freer(self) -> Self | None:
        """The same with options that let it stand in more places; None where there are none."""
        return None

    @classmethod
    def candidates(cls, program: Program) -> Iterable[Self]:
        """Instances that are worth trying on ``program``, for a search; none by default."""
        return ()

    def milder(self, bound: float) -> str:
        """How it drifts by ``bound``, in (0, 1), or less: ends the fix of a BudgetError."""
        return "choose milder options"

    @property
    def spec(self) -> str:
        """The text form, ``lowrank{ratio=0.6}``."""
        return format_pass(self)

    def __str__(self) -> str:
        return self.spec

    @final
    def __call__(self, program: Program, ctx: Context | None = None) -> PassResult:
        """Runs the pass on a clone, verifies the result and tests the promise.

        Args:
            program: is not changed.
            ctx: probes, budget and seed; random probes by default.

        Raises:
            PreconditionError: when the program does not allow the pass.
            VerifyError: when the result is not a legal program.
            PromiseError: when the numbers changed against the promise, with the
                first node that differs.
            BudgetError: when the drift exceeds ``ctx.max_drift``.
        """
        ctx = (ctx or Context()).within(program)
        self._check_facts(program)
        self.requires(program)
        start = time.perf_counter()
        rw = Rewriter(program.clone(), self.spec)
        try:
            self.rewrite(rw, ctx)
        except PreconditionError as error:
            error.fix = error.fix or self.otherwise
            raise
        if rw.modified and self.effect is not Effect.ANNOTATION:
            rw.finish()
        seconds = time.perf_counter() - start
        after = rw.program if rw.modified else program
        drift: Drift | None = None
        if rw.modified:
            self._verify(after)
            if not ctx.proven or self.effect is Effect.ANNOTATION:  # which runs nothing
                drift = self._test_promise(program, after, ctx)
            if not ctx.proven:
                self.ensures(program, after)
        elif self.effect is not Effect.ANNOTATION:
            drift = Drift(0.0, 0.0, 1.0, 1.0, ctx.probe_source)
        total = cost(after)
        record = PassRecord(
            self.spec, self.effect.value, rw.modified, tuple(sorted(self.provides)), drift,
            total.parameters, total.bytes, total.operations, seconds, tuple(rw.notes),
            fingerprint(after),
        )  # fmt: skip
        return PassResult(replace(after, history=(*program.history, record)), record)

    def _check_facts(self, program: Program) -> None:
        if missing := sorted(self.needed - program.facts):
            raise PreconditionError(
                f"{self.spec} needs a program that is {' and '.join(missing)}",
                fix="run it in a pipeline, which adds what is missing",
            )
        if hindering := sorted(self.forbids & program.facts):
            raise PreconditionError(
                f"{self.spec} cannot run on a program that is {' and '.join(hindering)}",
                fix=f"run {self.name} before the pass that made it so",
            )

    def _verify(self, after: Program) -> None:
        try:
            verify(after)
        except VerifyError as error:
            raise VerifyError(
                f"{self.spec}: {error.what}", where=error.where, fix=error.fix
            ) from error

    def _test_promise(self, before: Program, after: Program, ctx: Context) -> Drift | None:
        if self.effect is Effect.ANNOTATION:
            self._test_annotation(before, after)
            ctx.adopt(before, after)
            return None
        if before.signature.input_types != after.signature.input_types:
            return None  # an interface pass that changed the inputs: nothing to compare on
        signature = before.signature.with_outputs_of(after.signature)
        if not signature.outputs:
            return None  # one that changed all outputs
        probes = ctx.probes_for(after)
        if before.signature.limits == after.signature.limits:
            expected = ctx.outputs(before)
        else:  # an interface pass that takes shorter inputs
            expected = tuple(run_probe(before, probe) for probe in probes)
        differences: list[Difference] = []
        outputs = zip(probes, expected, self._outputs(after, ctx), strict=True)
        for probe, old, new in outputs:
            differences += compare(old, new, probe, signature).values()
        drift = summarize(differences, ctx.probe_source)
        if self.effect is Effect.EXACT and not all(d.is_rounding for d in differences):
            self._broken(before, after, drift, ctx)
        if self.effect is Effect.APPROXIMATE:
            self._hold_budget(before, after, drift, ctx)
        return drift

    def _outputs(self, after: Program, ctx: Context) -> tuple[dict[str, Tensor], ...]:
        """Outputs on the probes that the program before this pass ran on."""
        try:
            return ctx.outputs(after)
        except UsageError as error:
            raise PromiseError(
                f"{self.spec}: the result does not run, and the program before it did",
                where=f"{error.what} ({error.where})",
                fix="the pass is wrong: please report it",
            ) from error

    def _test_annotation(self, before: Program, after: Program) -> None:
        old, new = dict(before.tensors()), dict(after.tensors())
        same = old.keys() == new.keys() and all(
            t.data_ptr() == new[name].data_ptr() for name, t in old.items()
        )
        expected = before.clone()  # with what an annotation may change: who is trained
        for name, parameter in expected.module.named_parameters():
            parameter.requires_grad_(same and new[name].requires_grad)
        if not same or fingerprint(expected) != fingerprint(after):
            raise PromiseError(
                f"{self.spec} promises to change no arithmetic, and did",
                fix="the pass is wrong: its effect is not ANNOTATION",
            )

    def _broken(self, before: Program, after: Program, drift: Drift, ctx: Context) -> None:
        steps = (locate(before, after, probe) for probe in ctx.probes_for(before))
        step = next((s for s in steps if s is not None), None)
        raise PromiseError(
            f"{self.spec} promises exact results, and its outputs differ by {drift.relative:.1e}",
            where=f"first at {step}" if step else None,
            fix="the pass is wrong, or its effect is APPROXIMATE: please report it",
        )

    def _hold_budget(self, before: Program, after: Program, drift: Drift, ctx: Context) -> None:
        if ctx.max_drift is None or drift.relative <= ctx.max_drift:
            return
        step = worst_jump(before, after, ctx.probes_for(before)[0])
        milder = self.milder(ctx.max_drift) if 0 < ctx.max_drift < 1 else "choose milder options"
        raise BudgetError(
            f"{self.spec} drifts by {drift.relative:.3g}, beyond the budget of {ctx.max_drift:g}",
            where=f"most of it at {step}" if step else None,
            fix=f"raise --max-drift, or {milder}",
        )
