"""``ftc plan``: how to train a program on a number of devices, by simulating every way.

Devices are shared out over pipelines that see different data (``dp``) and stages
within each (``pp``). For each of those, each schedule and each size of a
microbatch the graph is cut, its timeline is simulated, and what the pipelines
add up at the end of a step is charged as a ring does it::

    seconds = timeline + 2 (dp - 1) / dp * gradient bytes of the largest device / link

What needs more memory than a device has is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from torch import fx

from ftc.graph.cut import Stage, cut
from ftc.graph.errors import PreconditionError, UsageError
from ftc.graph.program import Program
from ftc.graph.stage_plan import StageCost, parse_bytes, plan_stages, stage_costs
from ftc.graph.timeline import SCHEDULES, Schedule, Timeline, simulate
from ftc.graph.training_cost import (
    Device,
    NodeTraining,
    find_device,
    training_costs,
    usual_sizes,
)

from .training.engines.schedules import check_microbatches, kind_of

_SHOWN = 8
_ROUNDS = 2  # stages a device, where a schedule takes several


@dataclass(frozen=True, slots=True)
class Plan:
    """One way to train.

    Attributes:
        schedule: ``none`` where one device holds the whole program.
        replicas: pipelines that see different data.
        devices: of each pipeline.
        stages: of each pipeline.
        microbatch: rows of one.
        microbatches: of a step, in each pipeline.
        seconds: a step, simulated.
        bubble: share of the time that devices wait for each other within a pipeline.
        peak: the most bytes on a device.
    """

    schedule: str
    replicas: int
    devices: int
    stages: int
    microbatch: int
    microbatches: int
    seconds: float
    bubble: float
    peak: int

    @property
    def mesh(self) -> str:
        """``dp=2,pp=4``"""
        return f"dp={self.replicas},pp={self.devices}"


@dataclass(frozen=True, slots=True)
class Plans:
    """The best ways, the fastest first, and what to call for the first, as far as it is known."""

    source: str
    device: str
    devices: int
    memory: float
    batch: int
    sizes: dict[str, int]
    tried: int
    found: tuple[Plan, ...]
    commands: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def plan(
    program: Program,
    source: str,
    *,
    devices: int,
    memory: str,
    batch: int,
    shape: str | None = None,
    device: str = "h100",
    progress: Callable[[str], None] = lambda _: None,
) -> Plans:
    """Simulates every way and ranks those that fit.

    Args:
        program: ``requires_grad`` says what trains.
        source: its name in the commands.
        devices: how many there are.
        memory: of each, ``80GB``.
        batch: rows of a whole step.
        shape: sizes of the other dimensions, ``sequence=512``.
        device: ``cpu``, ``a100``, ``h100``, or ``here``: this machine, measured.
        progress: told what is tried.

    Raises:
        UsageError: for numbers below 1, a program without a batch, or where nothing fits.
    """
    signature = program.signature
    if devices < 1 or batch < 1:
        raise UsageError("devices and batch are 1 or more", fix="--devices 8 --batch 64")
    if not signature.dims:
        raise UsageError(f"{source} has a fixed batch", fix="capture it with a dynamic batch")
    hardware, most = find_device(device), parse_bytes(memory)
    rows = signature.dims[0]
    sizes = usual_sizes(signature, **(signature.parse_sizes(shape) if shape else {}))
    cuts = _Cuts(program, sizes, rows, hardware)
    found: list[Plan] = []
    tried = 0
    for pipeline in _divisors(devices):
        progress(f"pipelines of {pipeline} devices")
        for each in _ways(cuts, batch, devices // pipeline, pipeline):
            tried += 1
            if each.peak <= most:
                found.append(each)
    if not found:
        raise UsageError(
            f"no way to train {source} on {devices} devices of {memory} was found",
            fix="take more devices, a shorter sequence, or train less: lora, freeze, int8",
        )
    found.sort(key=lambda p: (p.seconds, p.devices, p.stages))
    del sizes[rows]
    return Plans(source, device, devices, most, batch, sizes, tried, tuple(found[:_SHOWN]),
                 _commands(source, found[0], batch, rows, sizes, device))  # fmt: skip


class _Cuts:
    """The costs of cuts at every microbatch: what they share is worked out once."""

    def __init__(
        self, program: Program, sizes: dict[str, int], rows: str, hardware: Device
    ) -> None:
        self.program, self.sizes, self.rows, self.hardware = program, sizes, rows, hardware
        self._stages: dict[int, tuple[Stage, ...]] = {}
        self._nodes: dict[int, dict[fx.Node, NodeTraining]] = {}

    def costs(self, stages: int, microbatch: int) -> tuple[StageCost, ...]:
        """Of each stage; none where the graph is too small for so many."""
        sizes = {**self.sizes, self.rows: microbatch}
        if stages not in self._stages:
            try:
                chosen = plan_stages(self.program, stages, self.sizes, self.hardware,
                                     of_nodes=self._of_nodes(self.sizes))  # fmt: skip
                self._stages[stages] = cut(self.program, chosen)
            except PreconditionError:
                self._stages[stages] = ()
        return stage_costs(self.program, self._stages[stages], sizes, self.hardware,
                           self._of_nodes(sizes))  # fmt: skip

    def _of_nodes(self, sizes: dict[str, int]) -> dict[fx.Node, NodeTraining]:
        rows = sizes[self.rows]
        if rows not in self._nodes:
            self._nodes[rows] = training_costs(self.program, sizes, self.hardware)
        return self._nodes[rows]


def _ways(cuts: _Cuts, batch: int, replicas: int, devices: int) -> Iterator[Plan]:
    """Every schedule and microbatch of pipelines of ``devices``."""
    if batch % replicas:
        return
    own = batch // replicas
    for microbatch in (size for size in _divisors(own) if size & (size - 1) == 0):
        for schedule in SCHEDULES if devices > 1 else ("1f1b",):
            stages = devices * (_ROUNDS if schedule == "interleaved" else 1)
            costs = cuts.costs(stages, microbatch)
            times = [cost.time_on(cuts.hardware) for cost in costs]
            try:
                if devices > 1:
                    check_microbatches(kind_of(schedule), own // microbatch, devices)
                line = simulate(schedule, times, own // microbatch, devices)
            except UsageError:  # no such number of stages or microbatches
                continue
            yield _plan(schedule, line, costs, replicas, stages, microbatch, cuts.hardware)


def _plan(
    schedule: Schedule, line: Timeline, costs: tuple[StageCost, ...], replicas: int, stages: int,
    microbatch: int, hardware: Device,
) -> Plan:  # fmt: skip
    gradients = max(each.weights for each in costs) * stages // line.devices // 4
    ring = 2 * (replicas - 1) / replicas * gradients / hardware.link
    name = schedule if line.devices > 1 else "none"
    return Plan(name, replicas, line.devices, stages, microbatch, line.microbatches,
                line.seconds + ring, line.bubble, max(line.peak))  # fmt: skip


def _divisors(number: int) -> list[int]:
    return [each for each in range(1, number + 1) if number % each == 0]


def _commands(
    source: str, best: Plan, batch: int, rows: str, sizes: dict[str, int], device: str
) -> tuple[str, ...]:
    """What to call, with the user's data and objective to be filled in."""
    processes, mesh = best.replicas * best.devices, f" --mesh {best.mesh}"
    start = f"torchrun --nproc-per-node {processes} $(which ftc)" if processes > 1 else "ftc"
    given = "--data FILE --objective NAME -o OUT" + mesh * (processes > 1)
    on = "" if device in ("cpu", "here") else " --device cuda"
    if best.stages == 1:
        several = f" --accumulate {best.microbatches}" * (best.microbatches > 1)
        return (f"{start} train {source} {given} --batch {batch // best.microbatches}"
                f"{several}{on}",)  # fmt: skip
    shape = ",".join(f"{name}={size}" for name, size in {rows: best.microbatch, **sizes}.items())
    spec = f'partition{{stages={best.stages},shape="{shape}",device={device}}}'
    return (f"ftc compile {source} --passes '{spec}' -o build/partitioned",
            f"ftc inspect build/partitioned --stages --microbatches {best.microbatches} "
            f"--device {device}",
            f"{start} train build/partitioned {given} --pipeline {best.schedule} --batch {batch} "
            f"--microbatches {best.microbatches}{on}")  # fmt: skip
