"""Freeze: which parameters learn. The graph and the weights stay as they are.

Trainability *is* ``requires_grad`` on the parameters; nothing else records it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ftc.graph.program import Program
from ftc.graph.rewriter import Rewriter
from ftc.graph.select import select

from .base import Context, Effect, Pass


@dataclass(frozen=True)
class Freeze(Pass):
    """Choose the parameters that training changes; freeze all others.

    Options:
        train: ``all``, ``none``, or a selector such as ``ffn`` or ``norm|bias``.
    """

    name: ClassVar[str] = "freeze"
    effect: ClassVar[Effect] = Effect.ANNOTATION

    train: str = "all"

    def rewrite(self, rw: Rewriter, ctx: Context) -> None:
        """Sets ``requires_grad`` of every parameter."""
        parameters = dict(rw.module.named_parameters())
        chosen = _chosen(self.train, rw.program, set(parameters))
        trained = 0
        for name, parameter in parameters.items():
            rw.set_trainable(name, name in chosen)
            trained += parameter.numel() if name in chosen else 0
        total = sum(p.numel() for p in parameters.values())
        share = trained / total if total else 0.0
        rw.note(
            f"{trained:,} of {total:,} parameters train ({share:.1%}), "
            f"in {len(chosen)} of {len(parameters)} tensors"
        )


def _chosen(text: str, program: Program, names: set[str]) -> set[str]:
    """The names to train: a tied tensor is chosen under any of its names."""
    if text in ("all", "none"):
        return names if text == "all" else set()
    selected = set(select(text, program))
    for tie in program.ties:
        if tie & selected:
            selected |= tie
    return selected & names
