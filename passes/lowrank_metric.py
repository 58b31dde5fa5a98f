"""What a low-rank weight is to be good for: the metric of each product, from calibration data."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Literal

from torch import Tensor, fx

from ftc.graph.fisher import moments
from ftc.graph.products import Product
from ftc.graph.rewriter import Rewriter
from ftc.graph.spectrum import Spectrum, damped_outputs, damped_root, spectrum

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
        self._readers = Counter(self._inputs.values())
        narrow = set() if self._method == "diagonal" else _narrowing(able)
        self._moments = moments(rw.program, data, nodes, by_outputs=narrow,
                                gradients=self._method == "fisher",
                                random_share=share, seed=ctx.seed)  # fmt: skip
        rw.note(f"factors are the best for the {self._method} metric of the data")

    def reaches(self, product: Product) -> bool:
        """Whether the outputs change when the product does, as far as gradients tell."""
        found = self._moments.gradients.get(product.node)
        return found is not None and bool(found.any())

    def __call__(self, product: Product, weight: Tensor) -> Spectrum:
        """The spectrum with its vectors; of each product once, unless they are kept."""
        if self._known is None:
            found = self._spectrum(product, weight)
            self.forget(product)
            return found
        if product.weight not in self._known:
            self._known[product.weight] = self._spectrum(product, weight)
        return self._known[product.weight]

    def values(self, product: Product, weight: Tensor) -> Spectrum:
        """The spectrum without."""
        return self._spectrum(product, weight, values_only=True)

    def forget(self, product: Product) -> None:
        """Frees the moments that no other product still needs."""
        if self._method == "plain":
            return
        source = self._inputs[product.weight]
        self._moments.outputs.pop(product.node, None)
        self._moments.gradients.pop(product.node, None)
        self._readers[source] -= 1
        if not self._readers[source]:
            self._moments.inputs.pop(source, None)

    def _spectrum(self, product: Product, weight: Tensor, *, values_only: bool = False) -> Spectrum:
        if self._method == "plain":
            return spectrum(weight, values_only=values_only)
        source = self._inputs[product.weight]
        if self._method == "diagonal":
            size = self._moments.inputs[source].diagonal().double()
            scale = (size + self._damping * size.mean() + 1e-30) ** 0.25
            return spectrum(weight, right=scale, values_only=values_only)
        left = None
        if self._method == "fisher" and self.reaches(product):
            left = damped_root(self._moments.gradients[product.node], self._damping)
        if product.node in self._moments.outputs:
            moment, level = self._moments.outputs[product.node], self._moments.levels[source]
            outputs = damped_outputs(moment, level, weight, self._damping)
            return spectrum(weight, left, outputs=outputs, values_only=values_only)
        if source not in self._roots:  # readers follow each other
            self._roots = {source: damped_root(self._moments.inputs[source], self._damping)}
        return spectrum(weight, left, self._roots[source], values_only=values_only)


def _narrowing(able: Sequence[tuple[Product, Tensor]]) -> set[fx.Node]:
    """Products whose outputs' moments are smaller than those of the input that they read."""
    readers: dict[fx.Node, list[tuple[Product, Tensor]]] = defaultdict(list)
    for product, weight in able:
        readers[product.x].append((product, weight))
    return {
        product.node
        for own in readers.values()
        if sum(len(w) ** 2 for _, w in own) <= own[0][1].shape[1] ** 2
        for product, _ in own
    }
