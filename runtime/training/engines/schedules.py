"""Schedules of a pipeline: which stage each process has, and torch's class for each name.

With ``p`` processes, process ``r`` has the stages ``r, r + p, …``; or, where the stages
turn at the last process and come back (V), ``r`` and ``2p - 1 - r``. Some schedules
compute gradients of weights when a process would be idle (:mod:`.deferred`).
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
        splits: gradients of weights wait until there is time.
        turns: stages come back from the last process to the first.
        least: microbatches for each process, at least; 0 for any number.
        rounds: microbatches are a multiple of the processes.
    """

    title: str
    stages: int
    paper: str = ""
    splits: bool = False
    turns: bool = False
    least: int = 0
    rounds: bool = False


SCHEDULES = {
    "gpipe": Kind("GPipe", 1, "arXiv 1811.06965"),
    "1f1b": Kind("1F1B", 1, "arXiv 1806.03377", least=1),
    "interleaved": Kind("Interleaved1F1B", 2, "arXiv 2104.04473", least=1, rounds=True),
    "looped-bfs": Kind("LoopedBFS", 2, "arXiv 2211.05953"),
    "zero-bubble": Kind("InterleavedZeroBubble", 1, "arXiv 2401.10241", splits=True, least=1,
                        rounds=True),
    "zbv": Kind("ZBVZeroBubble", 2, "arXiv 2401.10241", splits=True, turns=True),
    "dualpipev": Kind("DualPipeV", 2, "arXiv 2412.19437", splits=True, turns=True, least=2),
}  # fmt: skip


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
    there = tuple(range(processes))
    return (*there, *reversed(there)) if kind.turns else there * kind.stages


def check_microbatches(kind: Kind, microbatches: int, processes: int) -> None:
    """Refuses a number of microbatches that a schedule cannot run.

    Raises:
        UsageError: with the nearest number that it can.
    """
    least = max(1, kind.least * processes)
    step = processes if kind.rounds else 1
    if microbatches < least or microbatches % step:
        good = max(least, -(-microbatches // step) * step)
        raise UsageError(f"{microbatches} microbatches do not fit {processes} processes",
                         fix=f"--microbatches {good}, or --pipeline gpipe")  # fmt: skip


def check_options(name: str, *, sharded: bool, compiled: bool) -> None:
    """Refuses what the schedule called ``name`` does not go with.

    Raises:
        UsageError: for sharded weights or torch.compile, where gradients of weights wait.
    """
    if kind_of(name).splits and (sharded or compiled):
        other = "fsdp, which sends gradients away at once" if sharded else "--compile"
        raise UsageError(
            f"--pipeline {name} does not go with {other}", fix="--pipeline interleaved"
        )


def make_schedule(kind: Kind, stages: Sequence[Any], microbatches: int, loss: Any) -> Any:
    """torch's schedule over this process's stages; gradients are sums, not means."""
    from torch.distributed.pipelining import schedules

    made: Any = schedules.get_schedule_class(kind.title)
    several = issubclass(made, schedules.PipelineScheduleMulti)
    return made(list(stages) if several else stages[0], microbatches, loss_fn=loss,
                scale_grads=False)  # fmt: skip
