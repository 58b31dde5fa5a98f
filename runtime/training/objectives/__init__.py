"""Objectives: what is learned. Their text form is that of passes: ``mlm{share=0.2}``.

An objective knows rows, tokens and named outputs; it knows no graph, no
optimizer and no device.
"""

from __future__ import annotations

from ftc.graph.errors import UsageError, nearest
from ftc.passes.text import parse_pass

from .base import Batch, Objective, Scene
from .causal import Causal
from .distill import Distillation
from .labels import Classification, Regression, TokenClassification
from .masked import Masked, NextSentence, Pretraining
from .prompted import Prompt

__all__ = ["OBJECTIVES", "Batch", "Objective", "Scene", "parse_objective"]

OBJECTIVES: dict[str, type[Objective]] = {
    each.name: each
    for each in (Causal, Masked, NextSentence, Pretraining, Classification, TokenClassification,
                 Regression, Distillation, Prompt)
}  # fmt: skip


def parse_objective(text: str) -> Objective:
    """The objective that ``text`` names.

    Raises:
        UsageError: for an unknown name or option, with the nearest one.
    """
    found = parse_pass(text, _get)  # type: ignore[arg-type]
    assert isinstance(found, Objective)
    return found


def _get(name: str) -> type[Objective]:
    if name not in OBJECTIVES:
        raise UsageError(f"no objective is called {name!r}", fix=nearest(name, OBJECTIVES))
    return OBJECTIVES[name]
