"""What a low-rank weight is to be good for: the metric of each product, from calibration data."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Literal

from torch import Tensor, fx

from ftc.graph.fisher import moments
from ftc.graph.matrices import Matrix, is_gather, source
from ftc.graph.rewriter import Rewriter
from ftc.graph.spectrum import Spectrum, damped_outputs, damped_root, spectrum

from .context import Context, random_rows

Method = Literal["plain", "diagonal", "whitened", "fisher"]
RANDOM_SHARE = 0.3
"""Of random inputs in the moments, so that other texts than the calibration's fare well."""


class Measure:
    """Spectra of products in one metric.

    Args:
        method: which metric.
        damping: of its moments, above 0.
        rw: of the program; is told what the data were.
        ctx: calibration data, or probes that stand for it.
        able: the weights that readers multiply by, and their matrices.
        keep: whether to keep spectra that are asked for again, in as much memory as the
            weights take.
    """

    def __init__(
        self, method: Method, damping: float, rw: Rewriter, ctx: Context,
        able: Sequence[tuple[Matrix, Tensor]], *, keep: bool = False,
    ) -> None:  # fmt: skip
        self._method, self._damping = method, damping
        self._known: dict[str, Spectrum] | None = {} if keep else None
        self._roots: dict[fx.Node, Tensor] = {}
        if self._method == "plain":
            return
        data = ctx.calibration or random_rows(rw.program, ctx.seed)
        if not ctx.calibration:
            rw.note("no calibration data: random inputs stand for it, others than drift is "
                    "measured on")  # fmt: skip
        share = RANDOM_SHARE if self._method == "fisher" and ctx.calibration else 0.0
        nodes = {node for matrix, _ in able for node in matrix.nodes}
        # as the data ran: rewrites change them
        self._nodes = {matrix.weight: matrix.nodes for matrix, _ in able}
        self._sources = {node: source(node) for node in nodes}
        self._readers = Counter(self._sources.values())
        narrow = set() if self._method == "diagonal" else _narrowing(able)
        self._moments = moments(rw.program, data, nodes, by_outputs=narrow,
                                gradients=self._method == "fisher",
                                random_share=share, seed=ctx.seed)  # fmt: skip

    def reaches(self, matrix: Matrix) -> bool:
        """Whether the outputs change when the weight does, as far as gradients tell."""
        found = [self._moments.gradients.get(node) for node in self._nodes[matrix.weight]]
        return any(f is not None and bool(f.any()) for f in found)

    def __call__(self, matrix: Matrix, weight: Tensor) -> Spectrum:
        """The spectrum with its vectors; of each weight once, unless they are kept."""
        if self._known is None:
            found = self._spectrum(matrix, weight)
            self.forget(matrix)
            return found
        if matrix.weight not in self._known:
            self._known[matrix.weight] = self._spectrum(matrix, weight)
        return self._known[matrix.weight]

    def values(self, matrix: Matrix, weight: Tensor) -> Spectrum:
        """The spectrum without."""
        return self._spectrum(matrix, weight, values_only=True)

    def forget(self, matrix: Matrix) -> None:
        """Frees the moments that no other weight still needs."""
        if self._method == "plain":
            return
        for node in self._nodes[matrix.weight]:
            self._moments.outputs.pop(node, None)
            self._moments.gradients.pop(node, None)
            self._readers[self._sources[node]] -= 1
            if not self._readers[self._sources[node]]:
                self._moments.inputs.pop(self._sources[node], None)

    def _spectrum(self, matrix: Matrix, weight: Tensor, *, values_only: bool = False) -> Spectrum:
        if self._method == "plain" or (matrix.is_table and self._method != "fisher"):
            return spectrum(weight, values_only=values_only)
        if matrix.is_table:
            return spectrum(weight, *self._of_table(matrix), values_only=values_only)
        node = self._nodes[matrix.weight][0]
        key = self._sources[node]
        if self._method == "diagonal":
            size = self._moments.inputs[key].diagonal().double()
            scale = (size + self._damping * size.mean() + 1e-30) ** 0.25
            return spectrum(weight, right=scale, values_only=values_only)
        left = None
        if self._method == "fisher" and self.reaches(matrix):
            left = damped_root(self._moments.gradients[node], self._damping)
        if node in self._moments.outputs:
            moment, level = self._moments.outputs[node], self._moments.levels[key]
            outputs = damped_outputs(moment, level, weight, self._damping)
            return spectrum(weight, left, outputs=outputs, values_only=values_only)
        if key not in self._roots:  # readers follow each other
            self._roots = {key: damped_root(self._moments.inputs[key], self._damping)}
        return spectrum(weight, left, self._roots[key], values_only=values_only)

    def _of_table(self, matrix: Matrix) -> tuple[Tensor, Tensor]:
        """Roots of the metric of rows and of columns.

        A gather weighs rows by how often they are looked up and columns by the gradients
        there, a product rows by its gradients and columns by its inputs. Their sum is no
        product of two metrics: taken is the product of both sums, of the same trace.
        """
        found = self._moments
        rows: Tensor | float = 0.0
        columns: Tensor | float = 0.0
        for node in self._nodes[matrix.weight]:
            gradients = found.gradients.get(node)
            if gradients is None:
                continue
            high, wide = gradients, found.inputs.get(self._sources[node])
            if is_gather(node):
                high, wide = found.shares[node], gradients
            assert wide is not None
            high = (high if high.dim() == 1 else high.diagonal()).double()
            rows = rows + high * float(wide.diagonal().sum())
            columns = columns + wide.double() * float(high.sum())
        assert isinstance(rows, Tensor) and isinstance(columns, Tensor)
        columns = columns / rows.sum().clamp_min(1e-300)
        return damped_root(rows, self._damping), damped_root(columns, self._damping)


def _narrowing(able: Sequence[tuple[Matrix, Tensor]]) -> set[fx.Node]:
    """Readers whose outputs' moments are smaller than those of the input that they read."""
    readers: dict[fx.Node, list[tuple[Matrix, Tensor]]] = defaultdict(list)
    shared = {source(node) for m, _ in able if m.is_table for node in m.nodes}
    for matrix, weight in able:
        if source(matrix.node) not in shared:
            readers[source(matrix.node)].append((matrix, weight))
    return {
        matrix.node
        for own in readers.values()
        if sum(len(w) ** 2 for _, w in own) <= own[0][1].shape[1] ** 2
        for matrix, _ in own
    }
