"""Timelines: what every device of a pipeline does when, simulated from the times of its stages.

A schedule is an order of work for each device: forward, backward and, where a
schedule tells them apart, the gradients of weights. A piece of work starts when
its device is free and what it needs has arrived. The orders are those of
torch.distributed's schedules:

* ``gpipe``: all forwards, then all backwards (Huang et al., arXiv 1811.06965).
* ``1f1b``: a forward and a backward in turn once the pipeline is full (Narayanan
  et al., arXiv 1806.03377): the bubble of GPipe, fewer activations.
* ``interleaved``: each device has several stages, so it fills sooner (Narayanan
  et al., arXiv 2104.04473).
* ``zero-bubble``: gradients of weights wait until a device would be idle (Qi et
  al., arXiv 2401.10241).

The bubble is the share of all devices' time in which they wait.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

from .errors import UsageError
from .shared_cores import run_on_cores

Schedule = Literal["gpipe", "1f1b", "interleaved", "zero-bubble"]
SCHEDULES: tuple[Schedule, ...] = get_args(Schedule)
Kind = Literal["forward", "backward", "weights"]
Work = tuple[Kind, int, int]
"""What, of which stage, for which microbatch."""


@dataclass(frozen=True, slots=True)
class StageTime:
    """What one stage takes for one microbatch.

    Attributes:
        forward, backward: seconds; backward is all of it.
        weights: the part of backward that computes gradients of weights.
        send: seconds until what it sends is at the next stage, either way.
        saved: bytes kept from forward until backward.
        held: bytes of weights, gradients and optimizer state.
    """

    forward: float
    backward: float
    weights: float = 0.0
    send: float = 0.0
    saved: int = 0
    held: int = 0


@dataclass(frozen=True, slots=True)
class Span:
    """One piece of work on one device."""

    device: int
    kind: Kind
    stage: int
    microbatch: int
    start: float
    end: float


@dataclass(frozen=True, slots=True)
class Timeline:
    """One training step of a pipeline.

    Attributes:
        schedule: its name.
        devices, microbatches: how many.
        seconds: from the first forward to the last backward.
        bubble: share of all devices' time that is idle.
        peak: the most bytes that each device holds: weights and what backward waits for.
        spans: all work, in order of its start.
    """

    schedule: Schedule
    devices: int
    microbatches: int
    seconds: float
    bubble: float
    peak: tuple[int, ...]
    spans: tuple[Span, ...]


def simulate(
    schedule: Schedule, stages: Sequence[StageTime], microbatches: int,
    devices: int | None = None, *, cores: int | None = None,
) -> Timeline:  # fmt: skip
    """Simulates one step.

    Args:
        schedule: one of :data:`SCHEDULES`.
        stages: in order; stage ``i`` runs on device ``i % devices``.
        microbatches: how many make a step.
        devices: as many as stages by default; fewer for ``interleaved`` and
            ``zero-bubble`` only.
        cores: that devices share, where they are processes of one thread on one machine
            (:mod:`ftc.graph.shared_cores`); by default each has its own.

    Raises:
        UsageError: for numbers that the schedule does not allow.
    """
    devices = len(stages) if devices is None else devices
    refuse(schedule, len(stages), microbatches, devices)
    orders = [order(schedule, rank, devices, len(stages), microbatches) for rank in range(devices)]
    split = schedule == "zero-bubble"
    if cores is None or cores >= devices:
        spans = _run(orders, stages, split=split)
    else:
        done = run_on_cores(orders, partial(_seconds, stages=stages, split=split),
                            partial(_ready, stages=stages), cores)  # fmt: skip
        spans = sorted((Span(rank, *work, start, end) for rank, work, start, end in done),
                       key=lambda span: (span.start, span.device))  # fmt: skip
    seconds = max((span.end for span in spans), default=0.0)
    busy = sum(span.end - span.start for span in spans)
    return Timeline(
        schedule, devices, microbatches, seconds,
        1 - busy / (devices * seconds) if seconds else 0.0,
        tuple(_peak(spans, rank, stages, split=split) for rank in range(devices)),
        tuple(spans),
    )  # fmt: skip


def refuse(schedule: Schedule, stages: int, microbatches: int, devices: int) -> None:
    """Raises UsageError where ``schedule`` cannot run so many stages and microbatches."""
    if microbatches < 1 or devices < 1 or stages < devices or stages % devices:
        raise UsageError(
            f"{stages} stages and {microbatches} microbatches on {devices} devices",
            fix="take a multiple of the devices as stages, and a microbatch or more",
        )
    local = stages // devices
    if schedule in ("gpipe", "1f1b"):
        if local != 1:
            raise UsageError(f"{schedule} has one stage a device, not {local}",
                             fix="take interleaved")  # fmt: skip
    elif microbatches % max(1, microbatches // devices):
        raise UsageError(
            f"{schedule} cannot share {microbatches} microbatches among {devices} devices",
            fix=f"take a multiple of {devices}",
        )


def order(
    schedule: Schedule, rank: int, devices: int, stages: int, microbatches: int
) -> list[Work]:
    """What device ``rank`` does, in order."""
    if schedule == "gpipe":
        forwards: list[Work] = [("forward", rank, m) for m in range(microbatches)]
        return forwards + [("backward", rank, m) for m in range(microbatches)]
    local = stages // devices
    a_round = microbatches // max(1, microbatches // devices)
    ahead = (local - 1) * a_round
    if schedule == "1f1b":
        ahead = devices - 1 - rank
    else:
        ahead += (2 if schedule == "interleaved" else 1) * (devices - 1 - rank)
    total = local * microbatches
    ahead = min(ahead, total)

    def forward(step: int) -> int:
        return (step // a_round) % local * devices + rank

    def backward(step: int) -> int:
        return (local - 1 - (step // a_round) % local) * devices + rank

    if schedule == "1f1b":  # rounds are of no account where a device has one stage
        return _alternate(total, ahead, lambda _: rank, lambda _: rank, None)
    return _alternate(total, ahead, forward, backward, rank if schedule == "zero-bubble" else None)


def _alternate(
    total: int, ahead: int, forward: Callable[[int], int], backward: Callable[[int], int],
    delay: int | None,
) -> list[Work]:  # fmt: skip
    """``ahead`` forwards, then a forward and a backward in turn, then backwards.

    Args:
        total: forwards in all.
        ahead: how many come before the first backward.
        forward, backward: the stage of the n-th of each.
        delay: gradients of weights start so many backwards late; None where they
            are part of a backward.
    """
    done: dict[Work, int] = {}
    found: list[Work] = []
    waiting: list[Work] = []

    def add(kind: Kind, stage: int) -> None:
        key: Work = (kind, stage, 0)
        done[key] = done.get(key, 0) + 1
        found.append((kind, stage, done[key] - 1))

    for step in range(ahead):
        add("forward", forward(step))
    for step in range(total):
        if ahead + step < total:
            add("forward", forward(ahead + step))
        add("backward", backward(step))
        if delay is not None:
            waiting.append(("weights", *found[-1][1:]))
            if step >= delay:
                found.append(waiting.pop(0))
    return found + waiting


def _run(orders: Sequence[list[Work]], stages: Sequence[StageTime], *, split: bool) -> list[Span]:
    """Every device works through its order as what it needs arrives."""
    ends: dict[Work, float] = {}
    at, free = [0] * len(orders), [0.0] * len(orders)
    spans: list[Span] = []
    moved = True
    while moved:
        moved = False
        for rank, todo in enumerate(orders):
            while at[rank] < len(todo):
                work = todo[at[rank]]
                ready = _ready(work, ends, stages)
                if ready is None:
                    break
                start = max(free[rank], ready)
                ends[work] = free[rank] = start + _seconds(work, stages, split=split)
                spans.append(Span(rank, *work, start, free[rank]))
                at[rank] += 1
                moved = True
    assert all(place == len(todo) for place, todo in zip(at, orders, strict=True)), "a deadlock"
    return sorted(spans, key=lambda span: (span.start, span.device))


def _ready(work: Work, ends: Mapping[Work, float], stages: Sequence[StageTime]) -> float | None:
    """When all that ``work`` needs has arrived; None while that is not known."""
    kind, stage, microbatch = work
    if kind == "weights":
        return ends.get(("backward", stage, microbatch))
    if kind == "forward":
        if stage == 0:
            return 0.0
        before = ends.get(("forward", stage - 1, microbatch))
        return None if before is None else before + stages[stage - 1].send
    if stage == len(stages) - 1:
        return ends.get(("forward", stage, microbatch))
    behind = ends.get(("backward", stage + 1, microbatch))
    return None if behind is None else behind + stages[stage].send


def _seconds(work: Work, stages: Sequence[StageTime], *, split: bool) -> float:
    kind, stage, _ = work
    if kind == "forward":
        return stages[stage].forward
    if kind == "weights":
        return stages[stage].weights
    return stages[stage].backward - (stages[stage].weights if split else 0.0)


def _peak(spans: Sequence[Span], rank: int, stages: Sequence[StageTime], *, split: bool) -> int:
    """The most bytes that a device holds at once."""
    own = [span for span in spans if span.device == rank]
    now = sum(stages[stage].held for stage in {span.stage for span in own})
    most = now
    last = "weights" if split else "backward"
    for span in own:
        if span.kind == "forward":
            now += stages[span.stage].saved
            most = max(most, now)
        elif span.kind == last:
            now -= stages[span.stage].saved
    return most
