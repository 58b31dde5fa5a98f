"""What a low-rank weight is to be good for: the metric of each product, from calibration data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, fx

from ftc.graph.fisher import moments
from ftc.graph.products import Product
from ftc.graph.rewriter import Rewriter
from ftc.graph.spectrum import Spectrum, damped_root, spectrum

from .context import Context

Method = Literal["plain", "diagonal", "whitened", "fisher"]
_RANDOM_SHARE = 0.3
"""Of random inputs in the moments, so that other texts than the calibration's fare well."""


class Measure:
    """Spectra of products in one metric.

    Args:
        method: which metric.
        damping: of its moments, above 0.
        rw: of the program; is told what the data were.
        ctx: calibration data, or probes that stand for it.
        able: the products and their weights.
        keep: whether to keep spectra that are asked for again, in as much memory as the
            weights take.
    """

    def __init__(
        self, method: Method, damping: float, rw: Rewriter, ctx: Context,
        able: Sequence[tuple[Product, Tensor]], *, keep: bool = False,
    ) -> None:  # fmt: skip
        self._method, self._damping = method, damping
        self._known: dict[str, Spectrum] | None = {} if keep else None
        self._roots: dict[fx.Node, Tensor] = {}
        if self._method == "plain":
            return
        data = ctx.calibration or ctx.probes_for(rw.program)
        if not ctx.calibration:
            rw.note("no calibration data: random inputs stand for it")
        share = _RANDOM_SHARE if self._method == "fisher" and ctx.calibration else 0.0
        nodes = {product.node for product, _ in able}
        self._inputs = {p.weight: p.x for p, _ in able}  # as the data ran: rewrites change them
        self._moments = moments(rw.program, data, nodes, gradients=self._method == "fisher",
                                random_share=share, seed=ctx.seed)  # fmt: skip
        rw.note(f"factors are the best for the {self._method} metric of the data")

    def reaches(self, product: Product) -> bool:
        """Whether the outputs change when the product does, as far as gradients tell."""
        found = self._moments.gradients.get(product.node)
        return found is not None and bool(found.any())

    def __call__(self, product: Product, weight: Tensor) -> Spectrum:
        """The spectrum with its vectors."""
        if self._known is None:
            return spectrum(weight, *self._metric(product))
        if product.weight not in self._known:
            self._known[product.weight] = spectrum(weight, *self._metric(product))
        return self._known[product.weight]

    def values(self, product: Product, weight: Tensor) -> Spectrum:
        """The spectrum without."""
        return spectrum(weight, *self._metric(product), values_only=True)

    def _metric(self, product: Product) -> tuple[Tensor | None, Tensor | None]:
        """Roots of the metric of the product's outputs and inputs."""
        if self._method == "plain":
            return None, None
        source = self._inputs[product.weight]
        gram = self._moments.inputs[source]
        if self._method == "diagonal":
            size = gram.diagonal().double()
            return None, (size + self._damping * size.mean() + 1e-30) ** 0.25
        if source not in self._roots:
            self._roots = {source: damped_root(gram, self._damping)}  # readers follow it
        right = self._roots[source]
        if self._method == "whitened" or not self.reaches(product):
            return None, right
        return damped_root(self._moments.gradients[product.node], self._damping), right
