"""Before a compilation: the pipeline that was asked for, and the program it starts from.

The task ``generate`` is ``causal-lm`` with the pass ``cache`` as late in the pipeline as can
be: what is learned or measured from text before it reads whole texts, and only what fills the
cache stands behind it.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from ftc.graph.bundle import check_output
from ftc.graph.errors import OrderError, SourceError
from ftc.graph.program import Program
from ftc.graph.sources import capture
from ftc.graph.target import target as named_target
from ftc.passes.base import Pass
from ftc.passes.ordering import arrange
from ftc.passes.pipeline import Pipeline
from ftc.passes.registry import get

GENERATE, _CAUSAL = "generate", "causal-lm"


def prepare(passes: str, out: str | Path, target: str, force: bool, task: str | None) -> Pipeline:
    """The pipeline, cleanup first, after everything that can be refused without work."""
    asked = Pipeline.parse(passes).passes
    if task == GENERATE and not any(each.name == "cache" for each in asked):
        asked = _with_cache(asked)
    named_target(target)
    check_output(Path(out).expanduser().resolve(), force=force)
    cleanup = get("cleanup")
    return Pipeline(asked if asked and isinstance(asked[0], cleanup) else (cleanup(), *asked))


def _with_cache(passes: tuple[Pass, ...]) -> tuple[Pass, ...]:
    """The pass ``cache`` at the last place where it may stand; at the end where there is none."""
    cache = get("cache")()
    orders = [(*passes[:n], cache, *passes[n:]) for n in range(len(passes), -1, -1)]
    for order in orders:
        with suppress(OrderError):
            arrange(order, frozenset())
            return order
    return orders[0]


def captured(source: Any, task: str | None, trust: bool) -> Program:
    """The program of whatever :func:`ftc.capture` takes, or of a program."""
    if isinstance(source, Program):
        return source
    if task != GENERATE:
        return capture(source, task=task, trust=trust)
    try:
        return capture(source, task=_CAUSAL, trust=trust)
    except SourceError as error:
        error.what += f": --task {GENERATE} is {_CAUSAL} with a cache"
        raise
