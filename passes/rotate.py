"""Rotate: spread outlier channels over their neighbours before a product, exactly.

One channel that is tens of times larger than the rest leaves the others of its row
few of 255 steps. With ``H`` the Hadamard matrix of 16 channels over 4, which is
orthogonal and symmetric, on each 16 channels of ``x``,

    y = x W^T = (x H) (W H)^T

has the same outputs to rounding, and in ``x H`` the outlier is shared by 16 channels
(QuaRot, Ashkboos et al., arXiv 2404.00456, there on whole rows and 4 bits). ``W H`` is
computed here; ``x H`` costs 16 multiply-adds a channel at run time. A table that is
a head as well is rotated once, and its rows are rotated back where they are looked up.

Where it pays is computed from the calibration data. With a step for each row of ``x``
and of ``W``, as ``int8`` has them, both errors are noise without direction, and the
expected error of the outputs is, up to factors that a rotation leaves as they are,

    |x|^2 sum_i max_j W_ij^2 / 64^2  +  |W|^2 max_j x_j^2 / 127^2

A product is rotated where that falls to less than ``gain`` of what it was. It goes
where ``smooth`` cannot: no channel has to be scalable before the product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from ftc.graph.observe import observe
from ftc.graph.products import products
from ftc.graph.program import Program
from ftc.graph.rewriter import Rewriter
from ftc.graph.select import select
from ftc.graph.shapes import value
from ftc.graph.words import plural

from .base import Context, Effect, Pass
from .options import check_share

aten = torch.ops.aten

BLOCK = 16
"""Channels that are mixed: of 8, 16, 32 and 64 the most that costs next to nothing. SmolLM2's
feed-forward outputs lose 3.1e-4 of their energy with 32 and 1.4e-3 without, and take 3 % more
time with 16, 9 % with 32 and 28 % with 64."""
_ENTRIES = 1  # of the calibration data: maxima need few rows
_CONDITION = 200.0  # trained models: below 40; float32 keeps 1e-5 up to 500
_ROWS = 512  # of a weight that are looked at


@dataclass(frozen=True)
class Site:
    """Products that share an input, with weights that nothing but they and lookups read.

    Attributes:
        x: the input, ``[..., in]``.
        products: in graph order.
        weights: names of the weights, each ``[out, in]``.
        lookups: nodes that read rows of these weights.
    """

    x: fx.Node
    products: tuple[fx.Node, ...]
    weights: tuple[str, ...]
    lookups: tuple[fx.Node, ...]


@dataclass(frozen=True)
class Rotate(Pass):
    """Spread outlier channels over 16 neighbours before products; the outputs stay the same.

    Options:
        select: which products, a selector.
        gain: rotate where the expected error of 8 bits falls to less than this part, in
            (0, 1]; none rotates nothing (for int8 without rotations).
    """

    name: ClassVar[str] = "rotate"
    effect: ClassVar[Effect] = Effect.EXACT
    needs: ClassVar[frozenset[str]] = frozenset({"canonical", "smooth"})
    provides: ClassVar[frozenset[str]] = frozenset({"rotated"})
    forbids: ClassVar[frozenset[str]] = frozenset({"quantized", "rotated"})

    select: str = "product"
    gain: float | None = 0.4

    def __post_init__(self) -> None:
        check_share(self, "gain", 0.4)

    def rewrite(self, rw: Rewriter, ctx: Context) -> None:
        """Rotates the inputs and weights of every site where it pays."""
        if self.gain is None:
            return
        chosen = select(self.select, rw.program)
        sites = [site for site in find_sites(rw.program) if chosen.issuperset(site.weights)]
        ratios = _ratios(rw.program, sites, ctx)
        taken = [site for site in sites if ratios[site.x] < self.gain]
        matrix = hadamard(BLOCK)
        block = rw.add_buffer("rotation.hadamard", matrix) if taken else None
        for site in taken:
            assert block is not None
            _rotate(rw, site, block, matrix)
        if taken:
            count = sum(len(site.weights) for site in taken)
            names = ", ".join(site.weights[0] for site in taken[:2])
            rw.note(
                f"rotated the inputs of {plural(count, 'product')} by blocks of {BLOCK} channels "
                f"({names}{', ...' if len(taken) > 2 else ''}): their expected error at 8 bits "
                f"falls to {min(ratios[s.x] for s in taken):.2f} to "
                f"{max(ratios[s.x] for s in taken):.2f} of what it was"
            )


def hadamard(size: int) -> Tensor:
    """Sylvester's matrix of a power of two, symmetric, scaled to be orthogonal."""
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    scaled: Tensor = matrix / size**0.5
    return scaled


def find_sites(program: Program) -> Iterator[Site]:
    """The places of a canonical program that can be rotated."""
    by_input: dict[fx.Node, list[fx.Node]] = {}
    for product in products(program):
        by_input.setdefault(product.x, []).append(product.node)
    for x, nodes in by_input.items():
        weights = dict.fromkeys(_weight(node) for node in nodes)
        readers = [user for weight in weights for user in weight.users]
        lookups = tuple(user for user in readers if user.target is aten.embedding.default)
        if value(x).shape[-1] % BLOCK or value(x).dtype != torch.float32:
            continue
        if set(readers) - set(lookups) == set(nodes):
            yield Site(x, tuple(nodes), tuple(str(each.target) for each in weights), lookups)


def _weight(product: fx.Node) -> fx.Node:
    weight = product.args[1]
    assert isinstance(weight, fx.Node)
    return weight


def _ratios(program: Program, sites: list[Site], ctx: Context) -> dict[fx.Node, float]:
    """Expected error with a rotation over that without, at the input of every site."""
    weights = {site.x: [program.tensor(w).detach() for w in site.weights] for site in sites}
    found: dict[fx.Node, list[float]] = {}
    matrix = hadamard(BLOCK)

    def watch(node: fx.Node) -> Callable[[Tensor], None]:
        def update(x: Tensor) -> None:
            rows = x.flatten(0, -2)
            samples = [w[:: max(len(w) // _ROWS, 1)].float() for w in weights[node]]
            plain = _expected_error(rows, samples)
            turned = _expected_error(
                turn(rows, matrix), [turn(sample, matrix) for sample in samples]
            )
            exact = all(_condition(rows, sample) < _CONDITION for sample in samples)
            found.setdefault(node, []).append(turned / plain if plain and exact else 1.0)

        return update

    calibration = (ctx.calibration or ())[:_ENTRIES]
    data = calibration or ctx.probes_for(program)
    observe(program, data, {site.x: watch(site.x) for site in sites})
    return {node: sum(each) / len(each) for node, each in found.items()}


def _expected_error(rows: Tensor, weights: list[Tensor]) -> float:
    """The formula of the module's docstring, summed over rows and weights."""
    energy, peaks = float(rows.square().sum()), float(rows.abs().amax(1).square().sum())
    return sum(
        energy * float(w.abs().amax(1).square().sum()) / 64**2
        + float(w.square().sum()) * peaks / 127**2
        for w in weights
    )


def _condition(rows: Tensor, weight: Tensor) -> float:
    """How much larger the summands of ``x W^T`` are than the sums, as norms.

    A rotation mixes what a zero kept apart: a channel that is asleep with a weight that is
    huge. Their rounding errors stay when they cancel, this many times the usual.
    """
    product = float(torch.linalg.vector_norm(rows @ weight.T))
    whole = float(torch.linalg.vector_norm(rows) * torch.linalg.vector_norm(weight))
    return whole / product if product else torch.inf


def turn(rows: Tensor, matrix: Tensor) -> Tensor:
    """``[n, in]`` with each block of channels multiplied by ``matrix``."""
    turned: Tensor = rows.reshape(len(rows), -1, len(matrix)) @ matrix.to(rows.dtype)
    return turned.flatten(1)


def _rotate(rw: Rewriter, site: Site, block: fx.Node, matrix: Tensor) -> None:
    for name in site.weights:
        rw.set_tensor(name, turn(rw.program.tensor(name).detach(), matrix))
    with rw.at(site.products[0]):
        turned = _turned(rw, site.x, block)
    for product in site.products:
        rw.set_args(product, turned, *product.args[1:])
    for lookup in site.lookups:
        readers = list(lookup.users)
        with rw.after(lookup):
            back = _turned(rw, lookup, block)
        for reader in readers:
            renamed = {node: node for node in reader.all_input_nodes} | {lookup: back}
            args, kwargs = fx.node.map_arg((reader.args, reader.kwargs), renamed.__getitem__)
            rw.set_args(reader, *args, **kwargs)


def _turned(rw: Rewriter, x: fx.Node, block: fx.Node) -> fx.Node:
    """``x`` with each block of channels multiplied by ``block``."""
    width = value(x).shape[-1]
    parts = rw.call(aten.unflatten.int, x, -1, [width // BLOCK, BLOCK])
    return rw.call(aten.flatten.using_ints, rw.call(aten.matmul.default, parts, block), -2, -1)
