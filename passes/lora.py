"""LoRA: low-rank adapters beside frozen products.

    y = x W^T + b + (alpha / rank) (dropout(x) A^T) B^T,    A [rank, in],  B [out, rank]

(Hu et al., arXiv 2106.09685, equation 3). ``A`` starts uniform in
``+-1/sqrt(in)`` and ``B`` at 0, so nothing changes until training does. With
``init=pissa`` the largest singular values of ``W`` move into the adapter
(:mod:`ftc.passes.pissa`), and the sum stays what it was.

An adapter is added to what a product *yields*, so it does not matter how the
product is computed: from a float weight, from two low-rank factors, from codes of
8 or 4 bits, or as a convolution. The factor alpha / rank is on the thin value
``[..., rank]``: on the wide one it would cost as much as the addition. Adapters of
one input share its dropout. :mod:`ftc.graph.adapters` finds adapters again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import fx, nn

from ftc.graph.adapters import LORA_A, LORA_B, adapter_kind, lora_adapters
from ftc.graph.body import classifier_head
from ftc.graph.cost import cost
from ftc.graph.errors import PreconditionError, UsageError
from ftc.graph.program import Program
from ftc.graph.provenance import describe
from ftc.graph.rewriter import Rewriter
from ftc.graph.select import select
from ftc.graph.shapes import value
from ftc.graph.structure import Structure, find_structure
from ftc.graph.words import listed, plural

from .base import Context, Effect, Pass
from .lora_sites import LoraSite, counts, lora_sites
from .options import check_share
from .pissa import move_into_adapter

aten = torch.ops.aten


@dataclass(frozen=True)
class Lora(Pass):
    """Add low-rank adapters to products, and train nothing else.

    Options:
        rank: of each adapter.
        alpha: adapters are multiplied by alpha / rank.
        dropout: of the adapters' inputs in training.
        target: which products, a selector.
        init: ``default`` (an adapter starts as 0) or ``pissa`` (as the largest singular
            values of its weight, which keeps the rest).
        also: what else trains, a selector; ``auto`` is the head of a classifier, ``none``
            nothing.
    """

    name: ClassVar[str] = "lora"
    effect: ClassVar[Effect] = Effect.EXACT
    needs: ClassVar[frozenset[str]] = frozenset({"canonical"})
    provides: ClassVar[frozenset[str]] = frozenset({"adapted"})

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    target: str = "attention"
    init: Literal["default", "pissa"] = "default"
    also: str = "auto"

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UsageError(f"lora{{rank={self.rank}}}: rank is 1 or more", fix="lora{rank=8}")
        if not 0 < self.alpha < math.inf:
            raise UsageError(f"lora{{alpha={self.alpha}}}: alpha is above 0", fix="lora{alpha=16}")
        check_share(self, "dropout", 0.1, "[0, 1)")
        if self.init == "pissa":  # what it leaves of codes would have to be rounded again
            object.__setattr__(self, "forbids", frozenset({"quantized"}))

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return self.alpha / self.rank

    def rewrite(self, rw: Rewriter, ctx: Context) -> None:
        """Adds an adapter to every targeted product that has none, then freezes the rest."""
        structure = find_structure(rw.program)
        also = self._also(rw.program, structure)
        known = self._known(rw.program)
        adding = _Adding(rw, self, ctx.seed)
        for site in self._targeted(rw, structure, also):
            if site.weight in known:
                self._check_same(rw.program, site, known[site.weight])
            else:
                adding.add(site)
        self._train(rw, also)
        adding.say()

    def _also(self, program: Program, structure: Structure) -> frozenset[str]:
        """Parameters that train besides the adapters."""
        if self.also in ("auto", "none"):
            return classifier_head(program, structure) if self.also == "auto" else frozenset()
        chosen = select(self.also, program, structure)
        return program.with_ties(name for name in chosen if not adapter_kind(name))

    def _targeted(self, rw: Rewriter, structure: Structure, also: frozenset[str]) -> list[LoraSite]:
        chosen = select(self.target, rw.program, structure)
        sites, unfit = lora_sites(structure)
        targeted = [site for site in sites if site.names & chosen]
        if not targeted:
            raise UsageError(
                f"lora{{target={self.target}}}: none of the {len(chosen)} weights that it means is "
                "of a product that can have an adapter",
                where=listed(sorted(chosen)),
                fix=f"choose from: {counts(structure, sites)}",
            )
        if left := frozenset[str]().union(*(own for own in unfit if own & chosen)):
            rw.note(f"left products that are grouped, or batched (experts): {listed(sorted(left))}")
        if whole := {site.weight for site in targeted if site.names & also}:
            rw.note(f"trained whole, and not adapted: {listed(sorted(whole))}")
        return [site for site in targeted if site.weight not in whole]

    def _known(self, program: Program) -> dict[str, tuple[int, float, float]]:
        """Rank, scale and dropout of the adapters that are there, by weight."""
        return {
            each.weight: (program.tensor(each.a).shape[0], each.scale, each.dropout)
            for each in lora_adapters(program)
        }

    def _check_same(
        self, program: Program, site: LoraSite, known: tuple[int, float, float]
    ) -> None:
        """One adapter a weight: the same again is there already, another is refused."""
        if known == (self.rank, self.scale, self.dropout):
            return
        rank, scale, dropout = known
        raise PreconditionError(
            f"{self.spec}: {site.weight} has an adapter already, "
            f"lora{{rank={rank},alpha={scale * rank:g},dropout={dropout:g}}}",
            where=describe(site.node),
            fix="run merge first, or choose another target",
        )

    def _train(self, rw: Rewriter, also: frozenset[str]) -> None:
        trained = []
        for name, _ in list(rw.module.named_parameters()):
            chosen = name in also
            rw.set_trainable(name, chosen or adapter_kind(name) is not None)
            trained += [name] * chosen
        if also:
            rw.note(f"trained too: {listed(sorted(trained))}" if trained else
                    f"quantized, and so not trained: {listed(sorted(also))}")  # fmt: skip


class _Adding:
    """Adds adapters, one pair of parameters for each weight however many products read it."""

    def __init__(self, rw: Rewriter, given: Lora, seed: int) -> None:
        self._rw, self._given = rw, given
        self._random = torch.Generator().manual_seed(seed)
        self._dropped: dict[fx.Node, fx.Node] = {}
        self._made: dict[str, LoraSite] = {}
        self._count = 0

    def add(self, site: LoraSite) -> None:
        """Adds the adapter's result to that of one product."""
        rw = self._rw
        if site.weight not in self._made:
            site = self._parameters(site)
        x = site.x
        with rw.after(site.node):
            dropped = self._dropout(x)
            a, b = rw.get_attr(site.weight + LORA_A), rw.get_attr(site.weight + LORA_B)
            adapted = site.apply(rw, dropped, a, b, self._given.scale)
            rw.replace(site.node, rw.call(aten.add.Tensor, site.node, adapted))
        self._count += 1

    def _parameters(self, site: LoraSite) -> LoraSite:
        """Makes ``A`` and ``B``; the site is another one where its product had to change."""
        rank, dtype = self._given.rank, value(site.x).dtype
        if self._given.init == "pissa":
            site, a, b = move_into_adapter(self._rw, site, rank, self._given.scale)
        else:
            a, b = torch.empty(rank, *site.inner), torch.zeros(site.width, rank)
            nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=self._random)
        b = b.reshape(site.width, rank, *[1] * (len(site.inner) - 1))
        for suffix, tensor in ((LORA_A, a), (LORA_B, b)):
            self._rw.add_parameter(site.weight + suffix, tensor.to(dtype).contiguous())
        self._made[site.weight] = site
        return site

    def _dropout(self, x: fx.Node) -> fx.Node:
        """``x`` with dropout, which is off until the program is set to training."""
        if not self._given.dropout:
            return x
        if x not in self._dropped:
            self._dropped[x] = self._rw.call(aten.dropout.default, x, self._given.dropout, False)
        return self._dropped[x]

    def say(self) -> None:
        """Notes what was added."""
        if not self._count:
            self._rw.note("every product that was named has this adapter already")
            return
        rank, program = self._given.rank, self._rw.program
        size = sum(program.tensor(w + s).numel() for w in self._made for s in (LORA_A, LORA_B))
        total = cost(program).parameters
        self._rw.note(f"adapters of rank {rank} at {plural(self._count, 'product')}: "
                      f"{plural(size, 'parameter')}, {size / total:.1%} of all")  # fmt: skip
        if full := [w for w, site in self._made.items() if rank > site.largest_rank]:
            self._rw.note(f"rank {rank} is more than full for {listed(sorted(full))}")
