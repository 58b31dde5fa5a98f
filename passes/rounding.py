"""How each weight of a program is rounded to 4 bits, given calibration data.

Three kinds of weights, in this order:

- those on a 4-bit grid already keep it (:mod:`ftc.graph.grids`);
- tables, and whatever several nodes read, are rounded for the Gram matrix of all
  their products' inputs in the float program (a tied table for the head's); a
  table without a product, to nearest;
- each other product when the run of the program comes to it, for the inputs that
  the weights rounded so far give it, and towards the float outputs
  (:mod:`ftc.graph.gptq`). The mean error goes to the bias, be it a new one, which
  the kernel adds for nothing, and the weight is rounded for deviations from the
  mean.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from ftc.graph.coded import Coded
from ftc.graph.gptq import Curvature, compensate, output_error
from ftc.graph.gram import grams
from ftc.graph.grids import keep_grid
from ftc.graph.program import Program
from ftc.graph.quantize import Scheme, choose_qparams, quantize
from ftc.graph.side_by_side import side_by_side

from .residual import Residual, residual

aten = torch.ops.aten
Readers = Mapping[str, Sequence[fx.Node]]


@dataclass(frozen=True)
class Rounded:
    """One weight in codes.

    Attributes:
        coded: the codes, with ``extra`` columns more than the weight has.
        extra: columns that multiply means of the input's groups.
        bias: the product's new bias, where it had none too; None: as it was.
        error: of the outputs on the calibration data, relative; None: not known.
        residual: what is added for the rounding error, or None.
    """

    coded: Coded
    extra: int = 0
    bias: Tensor | None = None
    error: float | None = None
    residual: Residual | None = None


def to_nearest(weight: Tensor, scheme: Scheme, rank: int = 0) -> Rounded:
    """Least to greatest value of each group, every weight to the nearest code.

    ``rank`` is that of the residual, 0 for none.
    """
    scale, zero = choose_qparams(weight, scheme)
    coded = Coded(quantize(weight, scale, zero, scheme), scale, zero)
    return Rounded(coded, residual=residual(weight, coded.weight(), rank, None))


def kept(program: Program, readers: Readers, scheme: Scheme) -> dict[str, Rounded]:
    """Those weights that are on a 4-bit grid already; a table only where no remainder is left."""
    found = {}
    for name, nodes in readers.items():
        grid = keep_grid(program.tensor(name), scheme)
        if grid and (not grid.extra or all(n.target is aten.linear.default for n in nodes)):
            found[name] = Rounded(grid.coded, grid.extra, error=0.0)
    return found


class Rounding:
    """Rounds weights for their inputs on calibration data.

    Args:
        program: canonical, in float.
        data: calibration inputs.
        scheme: 4 bits.
        rank: of the residual of each product that alone reads its weight; 0: none.
    """

    def __init__(
        self, program: Program, data: Sequence[Mapping[str, Tensor]], scheme: Scheme,
        rank: int = 0,
    ) -> None:  # fmt: skip
        self._program, self._data, self._scheme, self._rank = program, data, scheme, rank

    def __call__(self, readers: Readers) -> dict[str, Rounded]:
        """Every weight of ``readers`` in codes; a weight's readers are products or lookups."""
        alone = {
            nodes[0]: name
            for name, nodes in readers.items()
            if len(nodes) == 1 and nodes[0].target is aten.linear.default and _can_shift(nodes[0])
        }
        made = self._shared({n: r for n, r in readers.items() if n not in alone.values()})
        visit = _Visit(self._program, self._scheme, alone, self._rank)
        if alone:
            changed = {name: each.coded.weight() for name, each in made.items()}
            side_by_side(self._program, self._data, list(alone), visit, changed)
        return made | visit.made

    def _shared(self, readers: Readers) -> dict[str, Rounded]:
        inputs = {name: _inputs(nodes) for name, nodes in readers.items()}
        watched = [x for each in inputs.values() for x in each]
        found = grams(self._program, self._data, watched) if watched else {}
        made = {}
        for name, each in inputs.items():
            weight = self._program.tensor(name).detach()
            if not each:
                made[name] = to_nearest(weight, self._scheme)
                continue
            gram = torch.stack([found[x] for x in each]).mean(0)
            curvature = Curvature.of(gram, self._scheme.group_size)
            coded = compensate(weight, curvature, self._scheme)
            made[name] = Rounded(coded, error=output_error(weight, coded.weight(), gram))
        return made


def _inputs(readers: Sequence[fx.Node]) -> list[fx.Node]:
    """Inputs of the products among ``readers``."""
    found = [node.args[0] for node in readers if node.target is aten.linear.default]
    return [x for x in found if isinstance(x, fx.Node)]


@dataclass(frozen=True)
class _Moments:
    """Of a product's inputs, float ``x`` and quantized ``x'``: means ``[in]``, covariances."""

    mean: Tensor
    other_mean: Tensor
    gram: Tensor
    cross: Tensor

    @classmethod
    def of(cls, x: list[Tensor], other: list[Tensor]) -> _Moments:
        rows = torch.cat([each.flatten(0, -2) for each in x]).float()
        mean = rows.mean(0)
        rows = rows - mean
        if all(a is b for a, b in zip(x, other, strict=True)):
            gram = rows.T @ rows / len(rows)
            return cls(mean, mean, gram, gram)
        others = torch.cat([each.flatten(0, -2) for each in other]).float()
        other_mean = others.mean(0)
        others = others - other_mean
        gram, cross = others.T @ others, rows.T @ others
        return cls(mean, other_mean, gram / len(rows), cross / len(rows))


class _Visit:
    """Rounds the weight of each product that :func:`side_by_side` comes to."""

    def __init__(
        self, program: Program, scheme: Scheme, names: Mapping[fx.Node, str], rank: int
    ) -> None:
        self._program, self._scheme, self._names, self._rank = program, scheme, names, rank
        self._last: tuple[fx.Node, _Moments, Curvature] | None = None
        self.made: dict[str, Rounded] = {}

    def __call__(
        self, node: fx.Node, x: list[Tensor], other: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        name = self._names[node]
        weight = self._program.tensor(name).detach()
        moments, curvature = self._seen(node, x, other)
        coded = compensate(weight, curvature, self._scheme)
        restored = coded.weight()
        added = residual(weight, restored, self._rank, moments.gram)
        if added is not None:
            restored = restored + added.weight()
        bias = moments.mean @ weight.float().T - moments.other_mean @ restored.T
        if (own := _bias(node)) is not None:
            bias += self._program.tensor(str(own.target)).detach()
        bias = bias.to(weight.dtype)
        error = output_error(weight, restored, moments.gram)
        self.made[name] = Rounded(coded, bias=bias, error=error, residual=added)
        return restored.to(weight.dtype), bias

    def _seen(
        self, node: fx.Node, x: list[Tensor], other: list[Tensor]
    ) -> tuple[_Moments, Curvature]:
        """Products with one input come one after another, mostly: what the last says is kept."""
        source = node.args[0]
        assert isinstance(source, fx.Node)
        if self._last is None or self._last[0] is not source:
            self._last = None  # before there is another
            found = _Moments.of(x, other)
            size = self._scheme.group_size
            self._last = (source, found, Curvature.of(found.gram, size, cross=found.cross))
        return self._last[1:]


def _bias(product: fx.Node) -> fx.Node | None:
    bias = product.args[2] if len(product.args) > 2 else None
    assert bias is None or isinstance(bias, fx.Node)
    return bias


def _can_shift(product: fx.Node) -> bool:
    """Whether a product can have a bias of its own: it has none, or a tensor."""
    bias = _bias(product)
    return bias is None or bias.op == "get_attr"
