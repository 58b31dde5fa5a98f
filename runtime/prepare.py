"""Before a compilation: the pipeline that was asked for, and the program it starts from.

The task ``generate`` is ``causal-lm`` with the pass ``cache`` at the end of the pipeline:
what is learned or measured from text before it reads whole texts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ftc.graph.bundle import check_output
from ftc.graph.program import Program
from ftc.graph.sources import capture
from ftc.graph.target import target as named_target
from ftc.passes.pipeline import Pipeline
from ftc.passes.registry import get

GENERATE, _CAUSAL = "generate", "causal-lm"


def prepare(passes: str, out: str | Path, target: str, force: bool, task: str | None) -> Pipeline:
    """The pipeline, cleanup first, after everything that can be refused without work."""
    asked = Pipeline.parse(passes).passes
    if task == GENERATE and not any(each.name == "cache" for each in asked):
        asked = (*asked, get("cache")())
    named_target(target)
    check_output(Path(out).expanduser().resolve(), force=force)
    cleanup = get("cleanup")
    return Pipeline(asked if asked and isinstance(asked[0], cleanup) else (cleanup(), *asked))


def captured(source: Any, task: str | None, trust: bool) -> Program:
    """The program of whatever :func:`ftc.capture` takes, or of a program."""
    if isinstance(source, Program):
        return source
    return capture(source, task=_CAUSAL if task == GENERATE else task, trust=trust)
