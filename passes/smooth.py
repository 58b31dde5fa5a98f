"""Smooth: move the outliers of activations into weights, exactly.

A few channels of a transformer's activations are tens of times larger than the
rest, and a scale that covers them leaves the others little precision. Where
what comes before a product can be scaled channel by channel, the channel is
made smaller there and the product's column larger (SmoothQuant, Xiao et al.,
arXiv 2211.10438, equation 4):

    y = (x / s) (s W)^T,    s_j = max|x_j|^alpha / max|W_j|^(1 - alpha)

The outputs are the same to rounding, the running time is the same, and both
``x`` and ``W`` quantize better. What comes before is found in the graph:

- the gain (and bias) of a norm that nothing but products reads;
- the rows of another product, directly, through a ReLU, or through one factor
  of a gated activation;
- the rows of the product that makes an attention's values, for the product
  that reads the attention's result: attention is linear in its values.

Maxima of ``|x_j|`` come from the calibration data, or from the probes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from ftc.graph.errors import UsageError
from ftc.graph.observe import observe
from ftc.graph.products import Product, products
from ftc.graph.program import Program
from ftc.graph.rewriter import Rewriter
from ftc.graph.shapes import value
from ftc.graph.structure import find_structure

from .base import Context, Effect, Pass

aten = torch.ops.aten

_TRANSPARENT: frozenset[object] = frozenset(
    {aten.dropout.default, aten.contiguous.default, aten.to.dtype}
)
_RESHAPING = _TRANSPARENT | {
    aten.view.default,
    aten.reshape.default,
    aten.transpose.int,
    aten.permute.default,
    aten.expand.default,
    aten.unsqueeze.default,
    aten.slice.Tensor,
    aten.clone.default,
}
_FLOOR = 0.1  # of the mean maximum: a channel that the data never used may be used tomorrow
_TINY = 1e-5  # a column of zeros needs no scale
_ENTRIES = 1  # of the calibration data: maxima need few rows
_EVEN = 0.01  # scales within 1 % of each other are not worth a rewrite


@dataclass(frozen=True)
class Group:
    """Products with one input, and the weights before them that can be scaled instead.

    Attributes:
        x: the input of the products, ``[..., in]``.
        weights: names of the products' weights, each ``[out, in]``.
        sources: names of the tensors to divide by the scale, along axis 0.
        repeat: (heads, kv_heads, head_dim) where ``in`` is heads that share the
            sources' rows in groups (grouped-query attention); None elsewhere.
    """

    x: fx.Node
    weights: tuple[str, ...]
    sources: tuple[str, ...]
    repeat: tuple[int, int, int] | None = None


@dataclass(frozen=True)
class Smooth(Pass):
    """Move activation outliers into the weights behind them; the outputs stay the same.

    Options:
        alpha: how much of the difficulty moves, in [0, 1]; 0.5 shares it evenly;
            none leaves everything as it is (for int8 without smoothing).
    """

    name: ClassVar[str] = "smooth"
    effect: ClassVar[Effect] = Effect.EXACT
    needs: ClassVar[frozenset[str]] = frozenset({"canonical"})
    provides: ClassVar[frozenset[str]] = frozenset({"smooth"})
    forbids: ClassVar[frozenset[str]] = frozenset({"quantized"})

    alpha: float | None = 0.5

    def __post_init__(self) -> None:
        if self.alpha is not None and not 0 <= self.alpha <= 1:
            raise UsageError(
                f"smooth{{alpha={self.alpha}}}: alpha lies in [0, 1]", fix="smooth{alpha=0.5}"
            )

    def rewrite(self, rw: Rewriter, ctx: Context) -> None:
        """Scales the weights of every group."""
        if self.alpha is None:
            return
        groups = list(find_groups(rw.program))
        peaks = _peaks(rw, groups, ctx)
        scaled = [g for g in groups if _scale(rw, g, peaks[g.x], self.alpha)]
        count = sum(len(group.weights) for group in scaled)
        if scaled:
            rw.note(f"smoothed the inputs of {count} products at {len(scaled)} places")
        elif not groups:
            rw.note("nothing to smooth: no product's input can be scaled before it")


def find_groups(program: Program) -> Iterator[Group]:
    """The places of a canonical program that can be smoothed."""
    by_input: dict[fx.Node, list[Product]] = {}
    for product in products(program):
        by_input.setdefault(product.x, []).append(product)
    values = _values_of_cores(program)
    for x, readers in by_input.items():
        weights = tuple(product.weight for product in readers)
        if set(x.users) != {product.node for product in readers}:
            continue
        if not all(_is_private(product.node.args[1]) for product in readers):
            continue
        if sources := _sources(x):
            yield Group(x, weights, sources)
        elif (core := _past(x, _RESHAPING)) in values:
            sources, repeat = values[core]
            yield Group(x, weights, sources, repeat)


def _sources(x: fx.Node) -> tuple[str, ...]:
    """Tensors whose axis 0 scales the channels of ``x`` and nothing else; empty if none do."""
    node = _past(x, _TRANSPARENT)
    if node is not x and len(node.users) > 1:
        return ()
    if node.target is aten.layer_norm.default:
        return _private_tensors(node.args[2:4])
    if node.target is aten.linear.default:
        return _private_tensors(node.args[1:3])
    if node.target is aten.relu.default:
        inner = node.args[0]
        return _sources(inner) if isinstance(inner, fx.Node) and _only_reader(inner) else ()
    if node.target is not aten.mul.Tensor:
        return ()
    factors = [f for f in node.args if isinstance(f, fx.Node)]
    for factor in factors:
        if factor.op == "get_attr" and value(factor).dim() == 1:
            return _private_tensors([factor])
    for factor in factors:
        behind = _past(factor, _TRANSPARENT)
        if _only_reader(factor) and behind.target is aten.linear.default and _only_reader(behind):
            return _private_tensors(behind.args[1:3])
    return ()


def _values_of_cores(
    program: Program,
) -> dict[fx.Node, tuple[tuple[str, ...], tuple[int, int, int]]]:
    """For each attention core: the tensors that make its values alone, and its heads."""
    found = {}
    for core in find_structure(program).cores:
        if len(core.v) != 1 or core.v[0] in (*core.q, *core.k) or not core.head_dim:
            continue
        product = core.v[0]
        used = core.node.args[2] if len(core.node.args) > 2 else None
        if core.softmax is not None or product.target is not aten.linear.default:
            continue
        if not isinstance(used, fx.Node) or _past(used, _RESHAPING) is not product:
            continue
        if tensors := _private_tensors(product.args[1:3]):
            found[core.node] = (tensors, (core.heads, core.kv_heads, core.head_dim))
    return found


def _past(node: fx.Node, skipped: frozenset[object]) -> fx.Node:
    """The first node at or before ``node`` that is not one of ``skipped``, along single readers."""
    while node.target in skipped and len(node.args[0].users) == 1:  # type: ignore[union-attr]
        node = node.args[0]  # type: ignore[assignment]
    return node


def _only_reader(node: object) -> bool:
    return isinstance(node, fx.Node) and len(node.users) == 1


def _is_private(node: object) -> bool:
    """Whether ``node`` reads a tensor for one node alone."""
    return isinstance(node, fx.Node) and node.op == "get_attr" and len(node.users) == 1


def _private_tensors(nodes: Iterable[object]) -> tuple[str, ...]:
    """Names of the tensors that ``nodes`` read; empty unless each is read there alone."""
    present = [node for node in nodes if node is not None]
    if not present or not all(map(_is_private, present)):
        return ()
    return tuple(str(node.target) for node in present if isinstance(node, fx.Node))


def _peaks(rw: Rewriter, groups: list[Group], ctx: Context) -> dict[fx.Node, Tensor]:
    """``max |x_j|`` over all rows, ``[in]``, at the input of every group."""
    peaks: dict[fx.Node, Tensor] = {}

    def watch(node: fx.Node) -> Callable[[Tensor], None]:
        def update(x: Tensor) -> None:
            peak = _peak(x.flatten(0, -2))
            peaks[node] = torch.maximum(peaks[node], peak) if node in peaks else peak

        return update

    calibration = (ctx.calibration or ())[:_ENTRIES]
    data = calibration or ctx.probes_for(rw.program)
    observe(rw.program, data, {group.x: watch(group.x) for group in groups})
    return peaks


def _scale(rw: Rewriter, group: Group, peak: Tensor, alpha: float) -> bool:
    """Scales one group; returns whether it was uneven enough to matter."""
    program = rw.program
    columns = torch.stack([_peak(program.tensor(w).detach()) for w in group.weights])
    weight = columns.amax(0)
    if group.repeat is not None:
        peak, weight = _shared(peak, group.repeat), _shared(weight, group.repeat)
    peak = peak.clamp_min(max(_FLOOR * float(peak.mean()), _TINY))
    scale = peak**alpha / weight.clamp_min(_TINY) ** (1 - alpha)
    scale = scale / scale.log().mean().exp()
    if bool((scale.log().abs() < _EVEN).all()):
        return False
    for name in group.sources:
        source = program.tensor(name).detach()
        rw.set_tensor(name, source / scale.view(-1, *[1] * (source.dim() - 1)))
    wide = scale if group.repeat is None else _spread(scale, group.repeat)
    for name in group.weights:
        rw.set_tensor(name, program.tensor(name).detach() * wide)
    return True


def _shared(wide: Tensor, repeat: tuple[int, int, int]) -> Tensor:
    """Maximum over the heads of a group: ``[heads * dim]`` -> ``[kv_heads * dim]``."""
    heads, kv_heads, dim = repeat
    return wide.view(kv_heads, heads // kv_heads, dim).amax(1).flatten()


def _spread(narrow: Tensor, repeat: tuple[int, int, int]) -> Tensor:
    """The inverse of :func:`_shared`: one scale for every head of a group."""
    heads, kv_heads, dim = repeat
    return narrow.view(kv_heads, 1, dim).expand(kv_heads, heads // kv_heads, dim).flatten()


def _peak(matrix: Tensor) -> Tensor:
    """Largest magnitude of each column, without a copy of the matrix."""
    return torch.maximum(matrix.amax(0), -matrix.amin(0))
