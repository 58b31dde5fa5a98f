"""Low rank: a product becomes two thinner ones, by truncated SVD.

    y = W x + b   ~   B (A x) + b,    A [rank, in],   B [out, rank]

It pays where ``rank (in + out) < in out``; a product where it does not is left as it
is. A convolution becomes one to ``rank`` channels and one of size 1, a table the rows of
``B`` times ``A``, which a tied head multiplies by too (:mod:`ftc.graph.matrices`).
What "best" means is the metric (:mod:`ftc.graph.spectrum`):

============  ==================================================================
``plain``     the error of the weights (Eckart and Young, 1936): ruins a model
``diagonal``  weights times the size of their inputs (ASVD, arXiv 2312.05821)
``whitened``  the error of the product's output (SVD-LLM, arXiv 2403.07378)
``fisher``    the error of the *program's* outputs, to second order
============  ==================================================================

The last has one unit for all products, so ranks can be shared out over a program
under one ``budget`` (:mod:`ftc.passes.ranks`): what matters keeps its weights, and
most of what is cut comes from few products.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from ftc.graph.errors import PreconditionError, UsageError
from ftc.graph.matrices import Matrix, is_gather, matrices
from ftc.graph.program import Program
from ftc.graph.provenance import describe
from ftc.graph.rewriter import Rewriter
from ftc.graph.select import select
from ftc.graph.symbols import SizesAt

from .base import Context, Effect, Pass
from .factors import factor
from .lowrank_budget import LeastBudget
from .lowrank_correct import corrected_biases
from .lowrank_metric import Measure, Method
from .pace import Pace
from .ranks import Curve, share_out

_DEFAULT_ENERGY = 0.9999
Chosen = tuple[Matrix, Tensor]
_CUTS = ("ratio", "rank", "energy", "budget", "max_drift")


@dataclass(frozen=True)
class LowRank(Pass):
    """Factor products into two thinner ones, where that makes them smaller.

    Options (``ratio``, ``rank``, ``energy``, ``budget`` and ``max_drift`` exclude each other):
        ratio: keep this fraction of each product's parameters, in (0, 1].
        rank: keep this many singular values of every product.
        energy: keep this fraction of the sum of squared singular values, in (0, 1];
            0.9999 when nothing is given.
        budget: keep this fraction of the products' weights together, in (0, 1], with
            more where it matters more.
        max_drift: the smallest budget whose relative drift on the probes is not above this.
        of: what the budget counts: ``params``, ``bytes`` or ``operations``. Factors that are
            slower than their product on the target, at the shapes that were named, are
            used with ``bytes`` only.
        method: what the factors are best for: ``plain``, ``diagonal``, ``whitened`` or
            ``fisher``; ``auto`` is ``fisher`` where there is calibration data or a
            budget, ``plain`` elsewhere and for ``energy``.
        damping: how far the data's metric is pulled towards the plain one, above 0;
            more is safer on texts unlike the calibration's.
        correct_bias: whether the bias of each factored product puts its mean output back
            to what it was on calibration data; one that has none gets one.
        select: which weights, a selector: products, convolutions of one group, and where
            they are named embeddings, with a head that is tied to one.
    """

    name: ClassVar[str] = "lowrank"
    effect: ClassVar[Effect] = Effect.APPROXIMATE
    needs: ClassVar[frozenset[str]] = frozenset({"canonical"})
    provides: ClassVar[frozenset[str]] = frozenset({"low-rank"})
    forbids: ClassVar[frozenset[str]] = frozenset({"quantized"})

    ratio: float | None = None
    rank: int | None = None
    energy: float | None = None
    budget: float | None = None
    max_drift: float | None = None
    of: Literal["params", "bytes", "operations"] = "params"
    method: Literal["auto", "plain", "diagonal", "whitened", "fisher"] = "auto"
    damping: float = 0.1
    correct_bias: bool = False
    select: str = "product - embedding"

    def __post_init__(self) -> None:
        given = [option for option in _CUTS if getattr(self, option) is not None]
        if len(given) > 1:
            raise UsageError(
                f"lowrank takes one of {', '.join(_CUTS)}, not {' and '.join(given)}",
                fix=f"keep {given[0]} and drop the rest",
            )
        for option in ("ratio", "energy", "budget"):
            number = getattr(self, option)
            if number is not None and not 0 < number <= 1:
                raise UsageError(
                    f"lowrank{{{option}={number}}}: {option} lies in (0, 1]",
                    fix=f"lowrank{{{option}=0.9}}",
                )
        for option, number, fix in (
            ("rank", self.rank, 64),
            ("max_drift", self.max_drift, 0.1),
            ("damping", self.damping, 0.1),
        ):
            if number is not None and not number > 0:
                raise UsageError(
                    f"lowrank{{{option}={number}}}: {option} is above 0",
                    fix=f"lowrank{{{option}={fix}}}",
                )
        if self.correct_bias and self.max_drift is not None:
            raise UsageError(
                "lowrank{max_drift=…,correct_bias=true}: the search for a budget does not correct",
                fix="give the budget that it finds: lowrank{budget=…,correct_bias=true}",
            )
        if self._shared and self.method not in ("auto", "fisher"):
            raise UsageError(
                f"lowrank{{method={self.method}}} does not compare products with each other",
                fix="leave method out, or use ratio=",
            )

    @property
    def _shared(self) -> bool:
        """Whether ranks are shared out over products."""
        return self.budget is not None or self.max_drift is not None

    def _method(self, ctx: Context) -> Method:
        if self.method != "auto":
            return self.method
        by_data = ctx.calibration and (self.ratio is not None or self.rank is not None)
        return "fisher" if self._shared or by_data else "plain"

    def requires(self, program: Program) -> None:
        """A rank beyond a selected product's full rank is refused."""
        if self.rank is None:
            return
        for matrix, weight in self._chosen(program)[0]:
            if self.rank > min(weight.shape):
                raise PreconditionError(
                    f"{self.spec}: rank exceeds min{tuple(weight.shape)} of {matrix.weight}",
                    where=describe(matrix.node),
                    fix=f"choose rank <= {min(weight.shape)}, or narrow the selection with select=",
                )

    def rewrite(self, rw: Rewriter, ctx: Context) -> None:
        """Factors every selected product where that makes it smaller."""
        able, others = self._chosen(rw.program)
        if others:
            rw.note(f"left {others} weights as they are: not all that reads them "
                    "multiplies by the same matrix")  # fmt: skip
        if not able:
            rw.note("nothing that was selected can be factored: no product, embedding or "
                    "convolution of one group")  # fmt: skip
            return
        limits = self._limits(rw, ctx, able)
        measure = Measure(self._method(ctx), self.damping, rw, ctx, able,
                          keep=self.max_drift is not None)  # fmt: skip
        if self._shared:
            ranks = self._share(rw, ctx, able, measure, limits)
        else:
            ranks = {m.weight: r for m, w in able
                     if (r := self._own_rank(measure, m, w, limits))}  # fmt: skip
        for matrix, _ in able:
            if matrix.weight not in ranks:
                measure.forget(matrix)
        made = ((m, measure(m, w).factors(ranks[m.weight])) for m, w in able if m.weight in ranks)
        saved = self._factor_corrected(rw, ctx, dict(made)) if self.correct_bias else sum(
            factor(rw, matrix, *pair) for matrix, pair in made)  # fmt: skip
        self._say(rw, saved, len(ranks), len(able) - len(ranks))

    def _chosen(self, program: Program) -> tuple[list[Chosen], int]:
        """What can be factored, and how many selected weights cannot."""
        names = select(self.select, program)
        found = list(matrices(program))
        able = [(m, m.of(program)) for m in found if isinstance(m, Matrix) and m.weight in names]
        return able, sum(m in names for m in found if isinstance(m, str))

    def _factor_corrected(
        self, rw: Rewriter, ctx: Context, made: dict[Matrix, tuple[Tensor, Tensor]]
    ) -> int:
        """Factors with corrected biases; how many parameters that saves."""
        if not ctx.calibration:
            raise PreconditionError(f"{self.spec}: biases are corrected on calibration data, "
                                    "and there is none", fix="give some with --calib")  # fmt: skip
        biases = corrected_biases(rw.program, ctx.calibration, made, ctx.seed)
        rw.note(f"the biases of {len(biases)} products put their mean outputs back")
        return sum(factor(rw, m, a, b, biases.get(m.weight)) for m, (a, b) in made.items())

    def _limits(self, rw: Rewriter, ctx: Context, able: list[Chosen]) -> dict[str, int]:
        """The largest rank that pays in time, of products where that is known and asked for."""
        pace = Pace(rw.program, ctx)
        if self.of == "bytes" or not pace.known:
            return {}
        limits = {m.weight: pace.limit(m, w) or 0 for m, w in able if m.is_product}
        if slower := sum(not limit for limit in limits.values()):
            rw.note(f"left {slower} products as they are: factors of any rank are slower on "
                    f"{ctx.target.name} at the shapes that were named")  # fmt: skip
        return limits

    def _own_rank(
        self, measure: Measure, matrix: Matrix, weight: Tensor, limits: dict[str, int]
    ) -> int | None:
        """The rank of one weight by itself; None where its factors would not pay."""
        out, width = weight.shape
        most = (out * width - 1) // (out + width)
        most = min(most, limits.get(matrix.weight, most))
        if self.rank is not None:
            rank = self.rank
        elif self.ratio is not None:
            rank = max(1, int(self.ratio * out * width / (out + width)))
        else:
            tails = measure.values(matrix, weight).tails
            left = (1 - (self.energy or _DEFAULT_ENERGY)) * tails[0]
            rank = max(1, int((tails > left).sum()))
        return rank if rank <= most else None

    def _share(
        self, rw: Rewriter, ctx: Context, able: list[Chosen], measure: Measure,
        limits: dict[str, int],
    ) -> dict[str, int]:  # fmt: skip
        """Ranks under the budget, or under the least budget that drifts little enough."""
        units = self._units(rw.program, able)

        def tails(matrix: Matrix, weight: Tensor) -> Tensor:
            known = measure if self.max_drift is not None else measure.values
            return known(matrix, weight).tails

        reached = [(m, w) for m, w in able if measure.reaches(m)]
        curves = {m.weight: Curve((w.shape[0], w.shape[1]), tails(m, w), units[m.weight],
                                  limits.get(m.weight)) for m, w in reached}  # fmt: skip
        if len(curves) < len(able):
            rw.note(f"{len(able) - len(curves)} products do not change the outputs by gradient: "
                    "left as they are, not counted")  # fmt: skip
        if self.budget is not None:
            return share_out(curves, self.budget)
        search = LeastBudget(rw.program, ctx, measure)
        ranks, share = search.smallest(curves, self.max_drift or 0.0)
        rw.note(f"kept {share:.3f} of {self.of}: the least within a drift of {self.max_drift:g}")
        return ranks

    def _units(self, program: Program, able: list[Chosen]) -> dict[str, float]:
        """What one weight costs; of operations: how many rows are multiplied by it."""
        if self.of == "params":
            return {m.weight: 1.0 for m, _ in able}
        if self.of == "bytes":
            return {m.weight: float(w.element_size()) for m, w in able}
        at = SizesAt(program, program.signature.sizes())
        return {m.weight: sum(at.numel(node) / len(w) for node in m.nodes if not is_gather(node))
                for m, w in able}  # fmt: skip

    def _say(self, rw: Rewriter, saved: int, made: int, kept: int) -> None:
        if made:
            rw.note(f"factored {made} weights, {saved:,} parameters fewer")
        if kept:
            why = "their factors would be larger, or lose more than others"
            rw.note(f"left {kept} weights as they are: {why}")
        if not made and all(getattr(self, option) is None for option in _CUTS):
            rw.note(
                "nothing pays at the default energy of 0.9999: "
                "ask for a cut with budget=, ratio=, rank= or energy="
            )
