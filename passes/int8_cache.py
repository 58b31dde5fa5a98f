"""Int8 cache: keys and values of earlier tokens stay in 8 bits.

Behind a long text a token reads more keys and values than weights. Each channel ``d`` of
each head ``h`` of an attention gets a step of its own from the calibration data, and what
comes in and goes out are codes:

    s_hd = max |k_hd| / 127,    q = clamp(round(k / s), -128, 127),    k ~ q s

A key's channels differ in size a hundredfold, the same ones at every token, which is why the
step is a channel's and not a token's (KIVI, arXiv 2402.02750). onnxruntime's attention
multiplies by the codes as they lie; elsewhere they are floats again for each run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, fx

from ftc.graph import quantized_ops  # noqa: F401  (registers torch.ops.ftc)
from ftc.graph.cache_inputs import present_of
from ftc.graph.cached import run_in_pieces, states, step_inputs
from ftc.graph.drift import Difference
from ftc.graph.errors import BudgetError, PreconditionError
from ftc.graph.observe import observe
from ftc.graph.program import Program
from ftc.graph.provenance import describe
from ftc.graph.rewriter import Rewriter
from ftc.graph.sequence import inputs
from ftc.graph.words import plural

from .base import Context, Effect, Pass
from .context import Inputs

aten = torch.ops.aten
ops: Any = torch.ops.ftc
_LEVELS = 127
_ROWS = 16  # of random tokens, where nothing is given to learn from


@dataclass(frozen=True)
class Int8Cache(Pass):
    """Keep the cache in 8 bits: a quarter of its memory, read in half the time.

    The inputs ``past_key_N`` and ``past_value_N`` and the outputs ``present_key_N`` and
    ``present_value_N`` become int8; each channel of each head has a step of its own, learned
    from the calibration data.
    """

    name: ClassVar[str] = "int8_cache"
    effect: ClassVar[Effect] = Effect.INTERFACE
    needs: ClassVar[frozenset[str]] = frozenset({"cached"})

    def rewrite(self, rw: Rewriter, ctx: Context) -> None:
        """Puts codes between the runs, and floats before everything that reads them."""
        if not any(spec.dtype.is_floating_point for spec in states(rw.program.signature)):
            rw.note("the cache is in 8 bits already")
            return
        before = rw.program.clone()
        joined = _joined(rw)
        steps = _steps(rw.program, joined, ctx)
        for name, node in joined.items():
            _code(rw, name, node, steps[name])
        _set_signature(rw)
        _code_start(rw, steps)
        rw.refresh()
        rw.note(f"keys and values of {plural(len(joined) // 2, 'attention')} are in 8 bits")
        if not ctx.proven:
            self._measure(rw, before, ctx)

    def _measure(self, rw: Rewriter, before: Program, ctx: Context) -> None:
        """Says how far scores of texts move that are read in pieces."""
        rw.module.recompile()
        name, scores = before.signature.inputs[0].name, before.signature.output_names[0]
        gap = Difference()
        for probe in [p for p in ctx.probes if name in p] or ctx.probes_for(before):
            rows = list(probe[name])
            half, rest = divmod(len(rows[0]), 2)
            pieces = [count for count in (half, 1, half + rest - 1) if count]
            with torch.no_grad():
                old, new = (run_in_pieces(p, rows, pieces)[scores] for p in (before, rw.program))
            gap.add(old, new)
        rw.note(f"scores of texts in pieces move by {gap.relative:.2%} (relative, on "
                f"{ctx.probe_source})")  # fmt: skip
        if ctx.max_drift is not None and not gap.relative <= ctx.max_drift:
            raise BudgetError(
                f"{self.spec} drifts by {gap.relative:.3g}, beyond the budget of {ctx.max_drift:g}",
                fix="raise --max-drift, or leave it out",
            )


def _joined(rw: Rewriter) -> dict[str, fx.Node]:
    """By the input of a past: the node that puts the new keys or values behind it."""
    leaves: Any = rw.graph.output_node().args[0]
    made = dict(zip(rw.program.signature.output_names, leaves, strict=True))
    placed = {spec.name: node for node, spec in inputs(rw.program)}
    found = {}
    for spec in states(rw.program.signature):
        past, node = placed[spec.name], made[present_of(spec.name)]
        if node.target is not aten.cat.default or node.args[0][0] is not past:
            raise PreconditionError(
                f"{rw.made_by}: this attention does not join {spec.name} as it comes",
                where=describe(node),
                fix="leave int8_cache out for this model",
            )
        found[spec.name] = node
    return found


def _steps(program: Program, joined: Mapping[str, fx.Node], ctx: Context) -> dict[str, Tensor]:
    """Steps ``[heads, 1, dim]``, float32 above 0, by the input of the past."""
    peaks: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[Tensor], None]:
        def watch(found: Tensor) -> None:
            peak = found.abs().amax((0, 2)).unsqueeze(1).float()
            peaks[name] = torch.maximum(peaks.get(name, peak), peak)

        return watch

    signature = program.signature
    data = ctx.calibration or (signature.probe(seed=ctx.seed + 1000, **{signature.dims[0]: _ROWS}),)
    given = [_first_step(program, each) for each in data]
    new = {name: node.args[0][1] for name, node in joined.items()}  # type: ignore[index]
    observe(program, given, {node: keep(name) for name, node in new.items()})  # type: ignore[misc]
    return {n: torch.where(p > 0, p / _LEVELS, torch.ones_like(p)) for n, p in peaks.items()}


def _first_step(program: Program, given: Inputs) -> Inputs:
    """Calibration data of the program without a cache, behind an empty past."""
    signature = program.signature
    if all(spec.name in given for spec in signature.inputs):
        return given
    ids = given[signature.inputs[0].name]
    mask = next((given[s.name] for s in signature.inputs if s.role == "mask" and s.name in given),
                torch.ones_like(ids))  # fmt: skip
    return step_inputs(signature, ids, mask, {})


def _code(rw: Rewriter, name: str, joined: fx.Node, steps: Tensor) -> None:
    """Codes of the new keys or values behind those of the past, and floats for who reads them."""
    past, new = cast(Sequence[fx.Node], joined.args[0])
    step = rw.add_buffer(f"{name}.step", steps)
    readers = [user for user in joined.users if user.op != "output"]
    with rw.after(joined):
        codes = rw.call(ops.quantize_states.default, new, step)
        whole = rw.call(aten.cat.default, [past, codes], 2)
        floats = rw.call(ops.dequantize_states.default, whole, step)
    rw.redirect(joined, floats, readers)
    rw.redirect(joined, whole, [rw.graph.output_node()])


def _set_signature(rw: Rewriter) -> None:
    signature = rw.program.signature
    kept = {spec.name for spec in states(signature)}
    coded = {present_of(name) for name in kept}
    taken = (replace(s, dtype=torch.int8, low=-_LEVELS, high=_LEVELS + 1) if s.name in kept else s
             for s in signature.inputs)  # fmt: skip
    made = (replace(s, dtype=torch.int8) if s.name in coded else s for s in signature.outputs)
    rw.set_signature(replace(signature, inputs=tuple(taken), outputs=tuple(made)))


def _code_start(rw: Rewriter, steps: Mapping[str, Tensor]) -> None:
    """A folded prompt's keys and values, in codes."""
    for name, tensor in rw.program.signature.start.items():
        if name in steps:
            rw.set_tensor(tensor, ops.quantize_states(rw.program.tensor(tensor), steps[name]))
