"""How far two programs are apart, and at which node they part.

:func:`compare` measures outputs: the relative error ``|a - b| / |a|`` in the
Frobenius norm, the largest elementwise difference, and the cosine of each row
(last axis). Sums are taken in float64 over chunks of rows, so logits of a large
vocabulary cost a few megabytes. Rows of an output that belong to padded
positions are left out, since attention leaves noise there: an output whose
leading dimensions are those of an input with role ``"mask"`` (``[batch,
sequence]``) is compared where that mask is not 0. Equal infinities and equal
NaNs agree.

:func:`trace` runs two programs side by side on the same inputs and compares the
values of the nodes that both have (same name and operator), which
:func:`locate` turns into the first node that parts and :func:`worst_jump` into
the rewrite that adds most.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from .program import Drift, Program
from .provenance import describe, provenance
from .signature import Signature

Inputs = Mapping[str, Tensor]
_CHUNK = 1 << 16  # elements in float64 at a time: half a megabyte

# Relative error that reordering sums may cost, by dtype: float32 keeps seven
# digits, and a network of thirty layers loses one or two of them.
ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@dataclass(slots=True)
class Difference:
    """Sums over pairs of tensors, from which a :class:`Drift` is made.

    Attributes:
        error, norm: sums of squares of ``a - b`` and of ``a``.
        max_abs, peak: largest ``|a - b|`` and largest ``|a|``.
        cosines, rows: sum of the rows' cosines, and how many.
        cosine_min: the smallest.
        rounding: the largest relative error that counts as rounding.
    """

    error: float = 0.0
    norm: float = 0.0
    max_abs: float = 0.0
    peak: float = 0.0
    cosines: float = 0.0
    rows: int = 0
    cosine_min: float = 1.0
    rounding: float = 0.0

    @property
    def relative(self) -> float:
        """``|a - b| / |a|``; infinite where ``a`` is 0 and ``b`` is not."""
        if self.error == 0:
            return 0.0
        return float((self.error / self.norm) ** 0.5) if self.norm else float("inf")

    @property
    def is_rounding(self) -> bool:
        """Whether both the whole and every element agree to rounding.

        The largest elementwise difference may be ten times the relative bound,
        measured against the largest magnitude: one wrong element among millions
        does not hide in the norm.
        """
        # `not >` and not `<=`: a NaN must fail
        return self.relative <= self.rounding and self.max_abs <= 10 * self.rounding * self.peak

    def add(self, a: Tensor, b: Tensor) -> None:
        """Adds one pair of equal shape."""
        self.rounding = max(self.rounding, ROUNDING.get(a.dtype, 0.0))
        width = a.shape[-1] if a.dim() else 1
        rows_a, rows_b = a.detach().reshape(-1, width), b.detach().reshape(-1, width)
        step = max(1, _CHUNK // max(1, width))
        for start in range(0, len(rows_a), step):
            self._add_rows(
                rows_a[start : start + step].double(), rows_b[start : start + step].double()
            )

    def _add_rows(self, a: Tensor, b: Tensor) -> None:
        if not a.numel():
            return
        gap = a - b
        if not torch.isfinite(gap.sum()):
            a, b, gap = _without_odd(a, b)
        of_a = torch.linalg.vecdot(a, a)
        norms = (of_a * torch.linalg.vecdot(b, b)).sqrt()
        errors = torch.linalg.vecdot(gap, gap)
        same = (errors == 0).double()  # the cosine of two rows of zeros
        cosines = torch.where(norms > 0, torch.linalg.vecdot(a, b) / norms, same)
        self.error += float(errors.sum())
        self.norm += float(of_a.sum())
        self.max_abs = max(self.max_abs, _largest(gap))
        self.peak = max(self.peak, _largest(a))
        self.cosines += float(cosines.sum())
        self.rows += len(a)
        self.cosine_min = min(self.cosine_min, float(cosines.min()))


def _largest(values: Tensor) -> float:
    low, high = values.aminmax()
    return max(-float(low), float(high))


def _without_odd(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Both with infinities and NaNs as 0, and their gap: 0 where those agree, else infinite."""
    odd = ~(a.isfinite() & b.isfinite())
    alike = (a == b) | (a.isnan() & b.isnan())
    gap = torch.where(alike, 0.0, torch.where(odd, torch.inf, a - b))
    return a.masked_fill(odd, 0.0), b.masked_fill(odd, 0.0), gap


def compare(
    before: Mapping[str, Tensor], after: Mapping[str, Tensor], inputs: Inputs, signature: Signature
) -> dict[str, Difference]:
    """Differences by the name of the output; an output that only one side has is left out."""
    found: dict[str, Difference] = {}
    for spec in signature.outputs:
        if spec.name not in before or spec.name not in after:
            continue
        a, b = before[spec.name], after[spec.name]
        found[spec.name] = difference = Difference()
        if a.shape != b.shape:
            difference.error = difference.max_abs = float("inf")
            continue
        valid = _valid_rows(spec.shape, inputs, signature)
        difference.add(a if valid is None else a[valid], b if valid is None else b[valid])
    return found


def summarize(differences: Sequence[Difference], inputs: str) -> Drift:
    """The worst relative and absolute difference, and the cosine over all rows."""
    rows = sum(d.rows for d in differences)
    return Drift(
        relative=max((d.relative for d in differences), default=0.0),
        max_abs=max((d.max_abs for d in differences), default=0.0),
        cosine_mean=sum(d.cosines for d in differences) / rows if rows else 1.0,
        cosine_min=min((d.cosine_min for d in differences), default=1.0),
        inputs=inputs,
    )


def measure_drift(
    before: Program, after: Program, inputs: Inputs | Sequence[Inputs], source: str = "given inputs"
) -> Drift:
    """Runs both programs on the same inputs and compares the outputs of the same names.

    Args:
        before: the program that is right.
        after: the other.
        inputs: one set of inputs or several.
        source: what the inputs are, in words.
    """
    sets = [inputs] if isinstance(inputs, Mapping) else inputs
    differences: list[Difference] = []
    for each in sets:
        with torch.no_grad():
            found = compare(before(each), after(each), each, before.signature)
        differences += found.values()
    return summarize(differences, source)


@dataclass(frozen=True, slots=True)
class Step:
    """Two programs' values of one node, compared.

    Attributes:
        node: the node in the later program.
        difference: of its value in both.
        jump: its relative error less the largest of those that its inputs carry.
        made: the new nodes that feed it directly, or through each other.
    """

    node: fx.Node
    difference: Difference
    jump: float
    made: tuple[fx.Node, ...]

    def __str__(self) -> str:
        text = f"{describe(self.node)} | relative error {self.difference.relative:.1e}"
        if self.made:
            text += f", fed by {', '.join(describe(n) for n in self.made[-3:])}"
        return text


def locate(before: Program, after: Program, inputs: Inputs) -> Step | None:
    """The first node whose value differs by more than rounding, in the later program's order."""
    return next((s for s in trace(before, after, inputs) if not s.difference.is_rounding), None)


def worst_jump(before: Program, after: Program, inputs: Inputs) -> Step | None:
    """The node at which the relative error grows most."""
    return max(trace(before, after, inputs), key=lambda step: step.jump, default=None)


def trace(before: Program, after: Program, inputs: Inputs) -> Iterator[Step]:
    """Compares every node that both programs have, and every output, on the same inputs.

    Both run in step, and a value is dropped after its last use.
    """
    pairs = _pairs(before, after)
    old = {pair for pair in pairs.values() if pair is not None}
    values: dict[str, Any] = {}
    left = ((n.name, v) for n, v in _run(before, inputs) if n.name in old)
    carried: dict[fx.Node, float] = {}
    made: dict[fx.Node, tuple[fx.Node, ...]] = {}
    for node, value in _run(after, inputs):
        feeds = [n for n in node.all_input_nodes if n.op == "call_function"]
        error = max((carried[n] for n in feeds), default=0.0)
        fresh = tuple(dict.fromkeys(m for n in feeds for m in (*made[n], *_self(n, pairs))))
        partner = pairs.get(node)
        carried[node], made[node] = error, () if partner else fresh
        if partner is None or node.op != "call_function":
            continue
        while partner not in values:
            name, found = next(left)
            values[name] = found
        difference = _difference(values.pop(partner), value)
        carried[node] = difference.relative
        yield Step(node, difference, difference.relative - error, fresh)


def _self(node: fx.Node, pairs: Mapping[fx.Node, str]) -> tuple[fx.Node, ...]:
    return () if node in pairs else (node,)


def _pairs(before: Program, after: Program) -> dict[fx.Node, str]:
    """For each node of ``after``, the name of the same node in ``before``."""
    known = {n.name: n for n in before.graph.nodes}
    pairs = {}
    for node in after.graph.nodes:
        other = known.get(node.name)
        if (
            other is not None
            and other.target == node.target
            and provenance(other) == provenance(node)
        ):
            pairs[node] = node.name
    taken = set(pairs.values())
    leaves: Any = (before.graph.output_node().args[0], after.graph.output_node().args[0])
    outputs = [dict(zip(p.signature.output_names, leaf, strict=True))
               for p, leaf in zip((before, after), leaves, strict=True)]  # fmt: skip
    for name, leaf in outputs[1].items():
        old = outputs[0].get(name)
        if old is not None and leaf not in pairs and old.name not in taken:
            pairs[leaf] = old.name
            taken.add(old.name)
    return pairs


def _run(program: Program, inputs: Inputs) -> Iterator[tuple[fx.Node, Any]]:
    """Values in graph order, each freed after its last use."""
    feed = iter(program.signature.bind(inputs))
    last = {used: node for node in program.graph.nodes for used in node.all_input_nodes}
    env: dict[fx.Node, Any] = {}
    for node in program.graph.nodes:
        if node.op == "output":
            return
        if node.op == "placeholder":
            env[node] = next(feed)
        elif node.op == "get_attr":
            env[node] = program.tensor(str(node.target))
        else:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), env.__getitem__)
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                env[node] = node.target(*args, **kwargs)
        yield node, env[node]
        for used in [n for n in (*node.all_input_nodes, node) if last.get(n, node) is node]:
            env.pop(used, None)


def _difference(a: Any, b: Any) -> Difference:
    """Of two values of a node: tensors, tuples of them, or numbers (which are exact)."""
    difference = Difference()
    if isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape:
        difference.add(a, b)
    elif isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)) and len(a) == len(b):
        for x, y in zip(a, b, strict=True):
            if isinstance(x, Tensor) and isinstance(y, Tensor) and x.shape == y.shape:
                difference.add(x, y)
    elif isinstance(a, Tensor) or a != b:
        difference.error = difference.max_abs = float("inf")
    return difference


def _valid_rows(shape: tuple[Any, ...], inputs: Inputs, signature: Signature) -> Tensor | None:
    """Where an output's leading dimensions are not padding; None where no mask says."""
    for spec in signature.inputs:
        if spec.role == "mask" and len(spec.shape) == 2 and shape[:2] == spec.shape:
            return inputs[spec.name] != 0
    return None
