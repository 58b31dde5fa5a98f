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

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from ftc.graph.errors import PreconditionError, UsageError
from ftc.graph.matrices import Matrix, matrices
from ftc.graph.program import Program
from ftc.graph.provenance import describe
from ftc.graph.rewriter import Rewriter
from ftc.graph.select import select
from ftc.graph.words import plural

from .base import Context, Effect, Pass
from .factors import factor
from .lowrank_budget import LeastBudget
from .lowrank_correct import corrected_biases
from .lowrank_metric import Measure, Method
from .lowrank_sizes import Chosen, Counted, no_smaller_note, sizes_of, slower_note
from .options import check_share
from .ranks import Curve, Size, check_budget, share_out

_DEFAULT_ENERGY = 0.9999
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
        of: what ``budget`` or ``max_drift`` counts: ``params``, ``bytes`` or
            ``operations``. Factors that are slower than their product on the target, at the
            shapes that were named, are used with ``bytes`` only.
        method: what the factors are best for: ``plain``, ``diagonal``, ``whitened`` or
            ``fisher``; ``auto`` is ``plain`` for ``energy``, ``fisher`` otherwise, on
            random inputs where there is no calibration data.
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
    of: Counted = "params"
    method: Literal["auto"] | Method = "auto"
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
        for option, usual in (("ratio", 0.8), ("energy", 0.9), ("budget", 0.8), ("max_drift", 0.1)):
            check_share(self, option, usual)
        for option, number, fix in (("rank", self.rank, 64), ("damping", self.damping, 0.1)):
            if number is not None and not number > 0:
                raise UsageError(
                    f"lowrank{{{option}={number}}}: {option} is above 0",
                    fix=f"lowrank{{{option}={fix}}}",
                )
        if self.of != "params" and not self._shared:
            raise UsageError(
                f"lowrank{{of={self.of}}} is what a budget counts, and there is none",
                fix=f"lowrank{{budget={self.ratio or 0.8:g},of={self.of}}}, or leave of out",
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
        """Whether ranks are shared out over weights."""
        return self.budget is not None or self.max_drift is not None

    @property
    def _asked(self) -> str:
        """The cut, as an option's text."""
        given = ((option, getattr(self, option)) for option in _CUTS)
        return next((f"{option}={value:g}" for option, value in given if value is not None),
                    f"energy={_DEFAULT_ENERGY}")  # fmt: skip

    @property
    def _method(self) -> Method:
        if self.method != "auto":
            return self.method
        return "fisher" if self._shared or self.ratio or self.rank else "plain"

    def milder(self, bound: float) -> str:
        """Let the drift be what is asked for."""
        searching = LowRank(max_drift=bound, damping=self.damping, select=self.select)
        return f"cut less, or let {searching.spec} look for a cut that keeps it"

    def requires(self, program: Program) -> None:
        """A rank beyond a selected weight's full rank is refused."""
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
        """Factors every selected weight where that makes it smaller."""
        if self.correct_bias and not ctx.calibration:
            raise PreconditionError(f"{self.spec}: biases are corrected on calibration data, "
                                    "and there is none", fix="give some with --calib")  # fmt: skip
        able, others = self._chosen(rw.program)
        if others:
            rw.note(f"left {plural(others, 'weight')} alone: not all that reads them "
                    "multiplies by the same matrix")  # fmt: skip
        if not able:
            rw.note("nothing that was selected can be factored: no product, embedding or "
                    "convolution of one group")  # fmt: skip
            return
        sizes = sizes_of(rw.program, ctx, able, self.of)
        if self.budget is not None:
            check_budget(sizes.values(), self.budget)
        if note := slower_note(sizes.values(), ctx.target.name):
            rw.note(note)
        measure = Measure(self._method, self.damping, rw, ctx, able,
                          keep=self.max_drift is not None)  # fmt: skip
        chosen = self._share if self._shared else self._each
        ranks = chosen(rw, ctx, able, measure, sizes)
        for matrix, _ in able:
            if matrix.weight not in ranks:
                measure.forget(matrix)
        made = ((m, measure(m, w).factors(ranks[m.weight])) for m, w in able if m.weight in ranks)
        saved = self._factor_corrected(rw, ctx, dict(made)) if self.correct_bias else sum(
            factor(rw, matrix, *pair) for matrix, pair in made)  # fmt: skip
        if ranks:
            what = "the weights alone" if self._method == "plain" else "the data"
            rw.note(f"factored {plural(len(ranks), 'weight')}, {plural(saved, 'parameter')} fewer: "
                    f"as is best for the {self._method} metric, of {what}")  # fmt: skip

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
        assert ctx.calibration
        biases = corrected_biases(rw.program, ctx.calibration, made, ctx.seed)
        rw.note(f"{plural(len(biases), 'bias', 'biases')} put a mean output back")
        return sum(factor(rw, m, a, b, biases.get(m.weight)) for m, (a, b) in made.items())

    def _each(
        self, rw: Rewriter, ctx: Context, able: list[Chosen], measure: Measure,
        sizes: Mapping[str, Size],
    ) -> dict[str, int]:  # fmt: skip
        """The rank of each weight by itself, where it makes the weight smaller."""
        wanted = {m.weight: self._own_rank(measure, m, w) for m, w in able}
        ranks = {name: rank for name, rank in wanted.items() if rank <= sizes[name].largest}
        left = [size for name, size in sizes.items() if name not in ranks and size.most != 0]
        if left:
            rw.note(no_smaller_note(left, self._asked))
        if not ranks and self._asked == f"energy={_DEFAULT_ENERGY}":
            rw.note("ask for a cut, which costs accuracy: budget=0.8 keeps 80 % of these weights")
        return ranks

    def _own_rank(self, measure: Measure, matrix: Matrix, weight: Tensor) -> int:
        """The rank that one weight is asked to have."""
        out, width = weight.shape
        if self.rank is not None:
            return self.rank
        if self.ratio is not None:
            return max(1, int(self.ratio * out * width / (out + width)))
        tails = measure.values(matrix, weight).tails
        left = (1 - (self.energy or _DEFAULT_ENERGY)) * tails[0]
        return max(1, int((tails > left).sum()))

    def _share(
        self, rw: Rewriter, ctx: Context, able: list[Chosen], measure: Measure,
        sizes: Mapping[str, Size],
    ) -> dict[str, int]:  # fmt: skip
        """Ranks under the budget, or under the least budget that drifts little enough."""

        def tails(matrix: Matrix, weight: Tensor) -> Tensor:
            known = measure if self.max_drift is not None else measure.values
            return known(matrix, weight).tails

        curves = {m.weight: Curve(sizes[m.weight], tails(m, w))
                  for m, w in able if measure.reaches(m)}  # fmt: skip
        if idle := len(able) - len(curves):
            rw.note(f"left {plural(idle, 'weight')} alone, not counted: no gradient of the outputs "
                    "reaches there")  # fmt: skip
        if not curves:
            return {}
        if self.budget is not None:
            ranks = share_out(curves, self.budget)
        else:
            assert self.max_drift is not None
            search = LeastBudget(rw.program, ctx, measure)
            ranks, share = search.smallest(curves, self.max_drift)
            rw.note(f"kept {share:.3f} of {self.of}: the least within a drift of "
                    f"{self.max_drift:g}")  # fmt: skip
        if left := sum(name not in ranks and curve.size.most != 0
                       for name, curve in curves.items()):  # fmt: skip
            rw.note(f"left {plural(left, 'weight')} alone: to cut others costs less")
        return ranks
