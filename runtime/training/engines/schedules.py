"""Schedules of a pipeline: which stage each process has, and torch's class for each name.

With ``p`` processes, process ``r`` has the stages ``r, r + p, …``. Schedules that split
the backward pass (zero bubble, arXiv 2401.10241) are left out: torch's detach what a
stage sends in place, which stages cut anywhere in a graph do not bear.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ftc.graph.errors import UsageError, nearest


@dataclass(frozen=True, slots=True)
class Kind:
    """One schedule.

    Attributes:
        title: torch's name for it.
        stages: of each process.
        paper: where it is from.
    """

    title: str
    stages: int
    paper: str = ""


SCHEDULES = {
    "gpipe": Kind("GPipe", 1, paper="arXiv 1811.06965"),
    "1f1b": Kind("1F1B", 1, paper="arXiv 1806.03377"),
    "interleaved": Kind("Interleaved1F1B", 2, paper="arXiv 2104.04473"),
    "looped-bfs": Kind("LoopedBFS", 2, paper="arXiv 2211.05953"),
}


def kind_of(name: str) -> Kind:
    """The schedule called ``name``.

    Raises:
        UsageError: for an unknown one.
    """
    if name not in SCHEDULES:
        raise UsageError(f"unknown schedule {name!r}", fix=nearest(name, SCHEDULES))
    return SCHEDULES[name]


def owners(kind: Kind, processes: int) -> tuple[int, ...]:
    """Which process has each stage."""
    return tuple(range(processes)) * kind.stages


def check_microbatches(kind: Kind, microbatches: int, processes: int) -> None:
    """Refuses a number of microbatches that a schedule cannot run.

    Raises:
        UsageError: with the nearest number that it can.
    """
    if kind.title in ("1F1B", "GPipe", "LoopedBFS"):
        fits = microbatches >= processes or kind.title != "1F1B"
    else:
        fits = microbatches >= processes and microbatches % processes == 0
    if not fits:
        good = max(processes, -(-microbatches // processes) * processes)
        raise UsageError(f"{microbatches} microbatches do not fit {processes} processes",
                         fix=f"--microbatches {good}, or --schedule gpipe")  # fmt: skip


def make_schedule(kind: Kind, stages: Sequence[Any], microbatches: int, loss: Any) -> Any:
    """torch's schedule over this process's stages; gradients are sums, not means."""
    from torch.distributed.pipelining import schedules

    made: Any = schedules.get_schedule_class(kind.title)
    several = issubclass(made, schedules.PipelineScheduleMulti)
    return made(list(stages) if several else stages[0], microbatches, loss_fn=loss,
                scale_grads=False)  # fmt: skip
