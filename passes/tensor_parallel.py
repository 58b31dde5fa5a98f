"""Tensor parallel: attention and feed-forward blocks, tables and heads, cut over ranks.

The first products of a block are cut by rows and the last by columns
(Megatron-LM, Shoeybi et al., arXiv 1909.08053, section 3), so that a block needs
one sum over the ranks forward and one backward:

    Y = sum over ranks r of f(X A_r^T) B_r^T,    A = [A_0; A_1; ...],  B = [B_0, B_1, ...]

Attention is cut between heads. The program stays *one* program, with whole
tensors, that computes what it did; which part of a tensor a rank holds is on the
node that reads it (:mod:`ftc.graph.sharding`), and an engine cuts it when it loads.
How a block is cut is followed operator by operator (:mod:`~ftc.passes.spread`);
one that cannot be cut stays whole, on every rank, and the report says why.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import fx, nn

from ftc.graph.cost import operator_name
from ftc.graph.drift import compare
from ftc.graph.errors import PreconditionError, PromiseError, UsageError
from ftc.graph.lockstep import run_split
from ftc.graph.program import Program
from ftc.graph.rewriter import Rewriter
from ftc.graph.sharding import CUT
from ftc.graph.structure import AttentionCore, FeedForward, Structure, find_structure
from ftc.graph.words import plural

from . import spread_values, spread_views  # noqa: F401  (registers the rules)
from .base import Context, Effect, Pass
from .context import random_probes, run_probe
from .split import Whole
from .spread import Seed, Spreader
from .spread_edits import Applying, Edits
from .spread_vocabulary import vocabulary

_PRODUCTS = ("aten.linear", "ftc.quantized_linear")
_Queries = tuple[fx.Node, int] | None


@dataclass(frozen=True)
class TensorParallel(Pass):
    """Cut attention, feed-forward blocks, tables and heads over several ranks.

    Options:
        size: ranks that share the program; 1 changes nothing.
        vocabulary: cut tables of tokens and heads over them too.
    """

    name: ClassVar[str] = "tensor_parallel"
    effect: ClassVar[Effect] = Effect.EXACT
    needs: ClassVar[frozenset[str]] = frozenset({"canonical"})
    provides: ClassVar[frozenset[str]] = frozenset({CUT})
    forbids: ClassVar[frozenset[str]] = frozenset({CUT})

    size: int = 2
    vocabulary: bool = True

    def __post_init__(self) -> None:
        if self.size < 1:
            raise UsageError(
                f"tensor_parallel{{size={self.size}}}: size is 1 or more",
                fix="tensor_parallel{size=2}",
            )

    def rewrite(self, rw: Rewriter, ctx: Context) -> None:
        """Cuts every block that can be cut.

        Raises:
            PreconditionError: where there is none, with what stood in the way.
        """
        if self.size == 1:
            rw.note("one rank holds everything: nothing is cut")
            return
        found = _Found(rw.program, self.size)
        found.blocks()
        if self.vocabulary:
            found.tables()
        found.settle()
        if not found.edits:
            raise PreconditionError(
                f"{self.spec}: nothing in this program can be cut over {self.size} ranks",
                where="; ".join(found.reasons) or None,
                fix="choose a size that divides its heads, or train with data parallel",
            )
        applying = Applying(rw, _constant(rw.program))
        for edits, _ in found.edits:
            edits.apply(applying)
        for note in found.notes():
            rw.note(note)

    def ensures(self, before: Program, after: Program) -> None:
        """All ranks together compute, in lockstep, what the program did before."""
        if self.size == 1:
            return
        probe = random_probes(before)[0]
        expected = run_probe(before, probe)
        for rank, outputs in enumerate(run_split(after, self.size, probe)):
            for name, each in compare(expected, outputs, probe, before.signature).items():
                if not each.is_rounding:
                    raise PromiseError(
                        f"{self.spec} promises exact results, and {name} differs by "
                        f"{each.relative:.1e} on rank {rank}",
                        fix="the pass is wrong: please report it",
                    )


class _Found:
    """What can be cut in a program, and why the rest cannot."""

    def __init__(self, program: Program, size: int) -> None:
        self.edits: list[tuple[Edits, str]] = []
        self.whole: Counter[tuple[str, str]] = Counter()
        self._program, self._size = program, size
        self._structure: Structure = find_structure(program)

    @property
    def reasons(self) -> list[str]:
        """Why blocks stay whole, each reason once."""
        return list(dict.fromkeys(reason for _, reason in self.whole))

    def blocks(self) -> None:
        """Attention and feed-forward blocks, in graph order."""
        on = Spreader(self._program, self._size)
        both: list[AttentionCore | FeedForward] = [*self._structure.cores]
        both += self._structure.feed_forwards
        taken: set[fx.Node] = set()
        for block in sorted(both, key=lambda b: on.order[_place(b)]):
            attention = isinstance(block, AttentionCore)
            kind = "attention" if attention else "feed-forward"
            reasons = []
            for seeds, queries in _cuts(block, self._size):
                if not taken.isdisjoint(seeds):
                    reasons.append("it begins with a product of another block")
                    continue
                try:
                    self.edits.append((on.spread(seeds, queries), kind))
                    taken.update(seeds)
                    break
                except Whole as whole:
                    reasons.append(str(whole))
            else:
                self.whole[kind, reasons[0] if reasons else "its products are not known"] += 1

    def tables(self) -> None:
        """Tables of tokens, and heads."""
        for kind, found in vocabulary(self._program, self._structure, self._size):
            if isinstance(found, Edits):
                self.edits.append((found, kind))
            else:
                self.whole[kind, str(found)] += 1

    def settle(self) -> None:
        """Leaves blocks whole that read a tensor which others read whole, or cut elsewhere."""
        while (odd := self._odd()) is not None:
            self.edits.remove(odd[0])
            self.whole[odd[0][1], f"others read {odd[1].target} in another way"] += 1

    def _odd(self) -> tuple[tuple[Edits, str], fx.Node] | None:
        for each in self.edits:
            for reader, shard in each[0].shards.items():
                same = [e.uses[reader] for e, _ in self.edits if e.shards.get(reader) == shard]
                if set(reader.users) - set().union(*same):
                    return each, reader
        return None

    def notes(self) -> Iterator[str]:
        """What was cut, and what was not."""
        counts = Counter(kind for _, kind in self.edits)
        yield f"cut over {self._size} ranks: " + ", ".join(
            plural(count, kind) for kind, count in counts.items()
        )
        for (kind, reason), count in self.whole.items():
            yield f"left {plural(count, kind)} whole: {reason}"


def _place(block: AttentionCore | FeedForward) -> fx.Node:
    return block.node if isinstance(block, AttentionCore) else block.activation


def _cuts(
    block: AttentionCore | FeedForward, size: int
) -> Iterator[tuple[Mapping[fx.Node, Seed], _Queries]]:
    """Ways to cut the first products of a block, the likelier first."""
    if isinstance(block, FeedForward):
        first = (*block.up, *block.gate)
        if all(operator_name(node) in _PRODUCTS for node in first):
            widths = {node: _width(node) for node in first}
            yield {node: Seed((n,), (n,)) for node, n in widths.items()}, None
            if all(n % 2 == 0 for n in widths.values()):  # gate and up in one product
                yield {n: Seed((w // 2,) * 2, (w // 2,) * 2) for n, w in widths.items()}, None
        return
    known = all(operator_name(node) in _PRODUCTS for node in (*block.q, *block.k, *block.v))
    if not known or not (block.q and block.k and block.v and block.heads):
        return
    heads, groups, width = block.heads, block.kv_heads, block.head_dim
    if block.q != block.k:
        seeds = {node: Seed((_width(node),), (groups,)) for node in (*block.k, *block.v)}
        seeds.update({node: Seed((_width(node),), (heads,)) for node in block.q})
        yield seeds, (block.q[0], width)
        return
    parts = tuple(n * width for n in (heads, groups, groups))
    yield {node: Seed((_width(node),), (groups,)) for node in block.q}, None
    if all(_width(node) == sum(parts) for node in block.q):
        yield {node: Seed(parts, (heads, groups, groups)) for node in block.q}, None


def _width(node: fx.Node) -> int:
    return int(node.meta["val"].shape[-1])


def _constant(program: Program) -> frozenset[fx.Node]:
    """Nodes whose values depend on no parameter."""
    found = set()
    for node in program.graph.nodes:
        if node.op == "get_attr":
            learns = isinstance(program.tensor(str(node.target)), nn.Parameter)
        else:
            learns = any(used not in found for used in node.all_input_nodes)
        if not learns:
            found.add(node)
    return frozenset(found)
