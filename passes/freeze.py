"""Freeze: which parameters learn. The graph and the weights stay as they are.

Trainability *is* ``requires_grad`` on the parameters; nothing else records it.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass
from typing import ClassVar

from ftc.graph.adapters import adapter_kind
from ftc.graph.errors import PreconditionError
from ftc.graph.provenance import provenance
from ftc.graph.rewriter import Rewriter
from ftc.graph.select import select
from ftc.graph.words import listed, plural

from .base import Context, Effect, Pass


@dataclass(frozen=True)
class Freeze(Pass):
    """Choose the parameters that training changes; freeze all others.

    Options:
        train: ``all``, ``none``, a role (``ffn``, ``attention``, ``norm``, ``bias``,
            ``head``, ``adapter``, …) or any other selector, such as ``norm|bias``; a norm's
            bias is of ``norm``.
    """

    name: ClassVar[str] = "freeze"
    effect: ClassVar[Effect] = Effect.ANNOTATION

    train: str = "all"

    def rewrite(self, rw: Rewriter, ctx: Context) -> None:
        """Sets ``requires_grad`` of every parameter."""
        parameters = dict(rw.module.named_parameters())
        chosen = self._chosen(rw, set(parameters))
        trained = 0
        for name, parameter in parameters.items():
            rw.set_trainable(name, name in chosen)
            trained += parameter.numel() if name in chosen else 0
        total = sum(p.numel() for p in parameters.values())
        share = trained / total if total else 0.0
        rw.note(
            f"{trained:,} of {plural(total, 'parameter')} train ({share:.1%}), "
            f"in {len(chosen)} of {plural(len(parameters), 'tensor')}"
        )
        if chosen:
            self._say_new(rw, parameters.keys() - chosen)

    def _say_new(self, rw: Rewriter, frozen: Set[str]) -> None:
        """Says which parameters stay as a pass began them, which nothing has trained before."""
        new = {r.spec for r in rw.program.history if r.effect == Effect.INTERFACE.value}
        roles = {}
        for node in rw.graph.find_nodes(op="get_attr"):
            if (name := str(node.target)) in frozen and (
                adapter_kind(name) or provenance(node).made_by in new
            ):
                roles[name] = "adapter" if adapter_kind(name) else "head"
        if roles:
            more = "|".join([self.train, *sorted(set(roles.values()))])
            rw.note(f"frozen as a pass began them: {listed(sorted(roles))}; "
                    f"freeze{{train={more}}} trains them too")  # fmt: skip

    def _chosen(self, rw: Rewriter, names: set[str]) -> frozenset[str]:
        """The names to train: a tied tensor is chosen under any of its names.

        Raises:
            PreconditionError: where all that was selected is quantized.
        """
        if self.train in ("all", "none"):
            return frozenset(names if self.train == "all" else ())
        selected = select(self.train, rw.program)
        chosen = rw.program.with_ties(selected) & names
        codes = selected - rw.program.with_ties(chosen)
        if not chosen:
            raise PreconditionError(
                f"{self.spec}: all {len(codes)} weights that it means are quantized, and codes "
                "do not train",
                where=min(codes),
                fix=f'train adapters beside them: lora{{target="{self.train}"}}',
            )
        if codes:
            rw.note(f"{plural(len(codes), 'selected weight')} quantized: codes do not train")
        return chosen
