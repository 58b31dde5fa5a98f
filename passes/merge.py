"""Merge: low-rank adapters go into the weights that they adapt, and cost nothing any more.

A float weight becomes ``W + s B A``. Two low-rank factors take the adapter in as more
rank, ``[B_0 | s B] [A_0 ; A]``. Both are exact to rounding. A weight that is shared
with something the adapter does not change (a head tied to its embedding) is kept
for that, and stored a second time.

Codes of a quantized weight have to be rounded again, which loses something: how
much is measured on the outputs, and refused unless ``max_loss`` allows it. The
adapters can stay as they are instead: they run, save and lower beside the codes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from ftc.graph.adapters import LoraAdapter, adapter_kind, adapter_parameters, lora_adapters
from ftc.graph.drift import measure_drift
from ftc.graph.errors import BudgetError, PreconditionError
from ftc.graph.program import Program
from ftc.graph.provenance import describe, provenance
from ftc.graph.rewriter import Rewriter
from ftc.graph.structure.weights import logical_parameters
from ftc.graph.words import listed, plural

from .base import Context, Effect, Pass
from .factors import set_factors
from .options import check_share
from .requantize import requantize

aten = torch.ops.aten
_ROUNDING = 1e-6


@dataclass(frozen=True)
class Merge(Pass):
    """Put low-rank adapters into the weights that they adapt.

    Options:
        max_loss: largest relative change of the outputs that rounding quantized weights
            again may cost; none refuses it. With it, the pass is approximate.
    """

    name: ClassVar[str] = "merge"
    effect: ClassVar[Effect] = Effect.EXACT

    max_loss: float | None = None

    def __post_init__(self) -> None:
        if self.max_loss is None:
            return
        check_share(self, "max_loss", 0.05, "(0, 1)")
        object.__setattr__(self, "effect", Effect.APPROXIMATE)

    def requires(self, program: Program) -> None:
        """Adapters that another pass rewrote cannot be merged, and there has to be one."""
        found = {name for each in lora_adapters(program) for name in (each.a, each.b)}
        lora = {n for n in logical_parameters(program) if adapter_kind(n) == "lora"}
        if lost := sorted(lora - found):
            raise PreconditionError(
                f"merge: {lost[0]} is not part of an adapter as lora makes it",
                fix="merge before the pass that rewrote it",
            )
        merged = any(record.name == self.name for record in program.history)
        if not found and not merged:
            others = sorted(n for n in adapter_parameters(program) if adapter_kind(n) != "lora")
            raise PreconditionError(
                "merge: the program has no low-rank adapters"
                + (", and others cannot be in weights" if others else ""),
                where=", ".join(others[:3]) or None,
                fix="leave merge out, or give it the program with its adapters: lora,merge",
            )

    def rewrite(self, rw: Rewriter, ctx: Context) -> None:
        """Merges weight by weight, and measures what rounding again costs."""
        by_weight: dict[str, list[LoraAdapter]] = {}
        for each in lora_adapters(rw.program):
            by_weight.setdefault(each.weight, []).append(each)
        before = rw.program.clone()
        exact: list[str] = []
        rounded: list[str] = []
        for weight, adapters in by_weight.items():
            (rounded if _merge(rw, weight, adapters) else exact).append(weight)
        if exact:
            rw.note(f"merged the adapters of {plural(len(exact), 'weight')}")
        if rounded:
            self._weigh(rw, before, rounded, ctx)
        if left := [n for n in adapter_parameters(before) if adapter_kind(n) != "lora"]:
            rw.note(f"left {listed(left)}: only low-rank adapters can be in weights")

    def _weigh(self, rw: Rewriter, before: Program, rounded: list[str], ctx: Context) -> None:
        """Measures the loss, and refuses what is not allowed."""
        rw.module.recompile()
        loss = measure_drift(before, rw.program, ctx.probes_for(before)).relative
        what = (
            f"rounding {plural(len(rounded), 'quantized weight')} again changes the outputs "
            f"by {loss:.2%} (relative, on {ctx.probe_source})"
        )
        if loss <= max(self.max_loss or 0.0, _ROUNDING):
            rw.note(f"merged: {what}")
            return
        error = PreconditionError if self.max_loss is None else BudgetError
        allowed = "" if self.max_loss is None else f", and {self.max_loss:.2%} is allowed"
        raise error(
            f"merge: {what}{allowed}",
            where=listed(rounded),
            fix="leave merge out: the adapters run, save and lower beside the codes; or accept "
            f"the loss with merge{{max_loss={_above(loss)}}}",
        )


def _above(loss: float) -> str:
    """A short number that is somewhat above ``loss``."""
    return f"{loss * 1.1:.1g}" if float(f"{loss * 1.1:.1g}") > loss else f"{loss * 2:.1g}"


def _merge(rw: Rewriter, weight: str, adapters: list[LoraAdapter]) -> bool:
    """Puts one adapter into its weight at all its products; returns whether it was rounded."""
    first = adapters[0]
    a, b = (rw.program.tensor(name).detach().double() for name in (first.a, first.b))
    change = first.scale * b.flatten(1) @ a.flatten(1)
    held = {name for name, _ in rw.program.tensors()}
    bases = [each.base for each in adapters]
    if weight in held:
        _into_float(rw, weight, change, bases)
    elif f"{weight}.A" in held:
        bases = [_into_factors(rw, weight, base, a, first.scale * b) for base in bases]
    else:
        bases = requantize(rw, weight, change, bases)
    for each, base in zip(adapters, bases, strict=True):
        rw.replace(each.total, base)
    return f"{weight}.quantized" in held


def _into_float(rw: Rewriter, weight: str, change: Tensor, bases: list[fx.Node]) -> None:
    tensor = rw.program.tensor(weight).detach()
    merged = (tensor.double() + change.view(tensor.shape)).to(tensor.dtype)
    others = [user for user in rw.get_attr(weight).users if user not in bases]
    if others:
        _untie(rw, weight, merged, bases, others)
    else:
        rw.set_tensor(weight, merged)


def _untie(
    rw: Rewriter, weight: str, merged: Tensor, bases: list[fx.Node], others: list[fx.Node]
) -> None:
    """Gives ``bases`` the merged weight, and leaves ``others`` what there was."""
    tie = next((t for t in rw.program.ties if weight in t), frozenset({weight}))
    free = sorted(tie - {weight})
    if not free:
        raise PreconditionError(
            f"merge: {others[0].target} reads {weight} too, without the adapter",
            where=describe(others[0]),
            fix="leave merge out: the adapter runs, saves and lowers as it is",
        )
    module = provenance(bases[0]).module
    own = next((name for name in sorted(tie) if name.rpartition(".")[0] == module), free[0])
    tensor = rw.program.tensor(weight)
    if own == weight:
        _read(rw, weight, others, free[0], tensor.detach())
        rw.set_tensor(weight, merged)
    else:
        _read(rw, weight, bases, own, merged)
    left = tuple(t - {own} if t is tie else t for t in rw.program.ties)
    rw.program = replace(rw.program, ties=tuple(t for t in left if len(t) > 1))
    rw.note(f"stored {own} apart: what was tied to it has no adapter")


def _read(rw: Rewriter, old: str, users: list[fx.Node], name: str, tensor: Tensor) -> None:
    """Makes ``users`` read a new parameter ``name`` instead of ``old``."""
    trains = rw.program.tensor(old).requires_grad
    before, after = rw.get_attr(old), rw.add_parameter(name, tensor, trainable=trains)
    for user in users:
        args, kwargs = fx.map_arg((user.args, user.kwargs), lambda n: after if n is before else n)
        rw.set_args(user, *args, **kwargs)


def _into_factors(rw: Rewriter, weight: str, base: fx.Node, a: Tensor, b: Tensor) -> fx.Node:
    first: Any = base.args[0]
    inner, outer = (rw.program.tensor(f"{weight}.{which}").detach() for which in "AB")
    return set_factors(
        rw, first, base, torch.cat([inner, a.to(inner.dtype)]),
        torch.cat([outer, b.to(outer.dtype)], 1),
    )[1]  # fmt: skip
