"""What a partitioned program's stages cost, and the timelines of the schedules that run them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ftc.graph.cut import Stage, cut, shared_parameters
from ftc.graph.errors import UsageError
from ftc.graph.program import Program
from ftc.graph.stage_plan import StageCost, stage_costs
from ftc.graph.timeline import SCHEDULES, Span, StageTime, Timeline, refuse, simulate
from ftc.graph.training_cost import find_device, usual_sizes

from .pictures import figure_class, save_picture

_COLOURS = {"forward": "#3b6ea5", "backward": "#d1803f", "weights": "#7a9e5b"}
_NUMBERED = 200  # spans of a timeline that are few enough to be numbered


@dataclass(frozen=True, slots=True)
class StageReport:
    """The stages of a program.

    Attributes:
        source: what was read.
        device: what the costs hold for.
        sizes: of a microbatch.
        microbatches: of a step.
        stages: the cost of each.
        crossing: names of what each sends to the next.
        shared: parameters that several stages read, and which.
        timelines: of every schedule that can run them.
    """

    source: str
    device: str
    sizes: dict[str, int]
    microbatches: int
    stages: tuple[StageCost, ...]
    crossing: tuple[tuple[str, ...], ...]
    shared: dict[str, tuple[int, ...]]
    timelines: tuple[Timeline, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; timelines without their spans."""
        found = asdict(self)
        for timeline in found["timelines"]:
            del timeline["spans"]
        return found


def report_stages(
    program: Program, source: str, *, shape: str | None, microbatches: int | None, device: str,
    cores: int | None = None,
) -> StageReport:  # fmt: skip
    """The stages that ``partition`` left in ``program``.

    Args:
        program: annotated.
        source: its name in the report.
        shape: sizes of a microbatch, ``batch=8,sequence=128``.
        microbatches: of a step; twice the stages by default.
        device: ``cpu``, ``a100``, ``h100``, or ``here``: this machine, measured.
        cores: that devices share, where they are processes on one machine.

    Raises:
        UsageError: for a program without stages, a wrong shape, an unknown device.
    """
    hardware = find_device(device)
    stages = cut(program)
    if len(stages) < 2:
        raise UsageError(f"{source} has no stages",
                         fix=f"ftc compile {source} --passes 'partition{{stages=4}}'")  # fmt: skip
    signature = program.signature
    sizes = usual_sizes(signature, **(signature.parse_sizes(shape) if shape else {}))
    costs = stage_costs(program, stages, sizes, hardware)
    count = 2 * len(stages) if microbatches is None else microbatches
    times = [cost.time_on(hardware) for cost in costs]
    return StageReport(source, device, sizes, count, costs, _crossing(stages),
                       shared_parameters(stages), timelines(times, count, cores))  # fmt: skip


def timelines(
    stages: Sequence[StageTime], microbatches: int, cores: int | None = None
) -> tuple[Timeline, ...]:
    """A timeline of every schedule that can run these stages.

    Args:
        stages: measured or predicted times; interleaved runs two on each device, on two or
            more devices.
        microbatches: 1 or more.
        cores: that devices share; by default each has its own.

    Raises:
        UsageError: where no schedule can.
    """
    found, refused = [], None
    for schedule in SCHEDULES:
        devices = len(stages)
        if schedule == "interleaved":
            if devices < 4 or devices % 2:
                continue
            devices //= 2
        try:
            refuse(schedule, len(stages), microbatches, devices)
        except UsageError as error:
            refused = error
        else:
            found.append(simulate(schedule, stages, microbatches, devices, cores=cores))
    if refused is not None and not found:
        raise refused
    return tuple(found)


def draw_timelines(found: Sequence[Timeline], path: Path) -> None:
    """Writes a picture: one row of bars a device, one panel a schedule, on one scale of time.

    Raises:
        UsageError: without matplotlib.
        WriteError: when the disk is full; an old picture stays.
    """
    height = sum(0.9 + 0.35 * each.devices for each in found)
    figure = figure_class()(figsize=(11, height), layout="constrained")
    heights = [0.9 + 0.35 * each.devices for each in found]
    axes = figure.subplots(len(found), squeeze=False, sharex=True, height_ratios=heights)[:, 0]
    for axis, each in zip(axes, found, strict=True):
        for span in each.spans:
            _draw(axis, span, numbered=len(each.spans) <= _NUMBERED)
        axis.set_yticks(range(each.devices))
        axis.invert_yaxis()
        axis.set_ylabel("device")
        axis.set_title(
            f"{each.schedule}: {each.devices} devices, {each.microbatches} microbatches, "
            f"{each.seconds * 1e3:.4g} ms, bubble {each.bubble:.0%}", fontsize=9, loc="left"
        )  # fmt: skip
    axes[-1].set_xlabel("milliseconds")
    for kind, colour in _COLOURS.items():
        axes[-1].barh([0], [0], color=colour, label=kind)
    figure.legend(loc="outside lower center", ncols=len(_COLOURS), frameon=False)
    save_picture(figure, path)


def _draw(axis: Any, span: Span, *, numbered: bool) -> None:
    width = (span.end - span.start) * 1e3
    axis.barh(span.device, width, left=span.start * 1e3, height=0.85, edgecolor="white",
              linewidth=0.4, color=_COLOURS[span.kind])  # fmt: skip
    if numbered:
        axis.text(span.start * 1e3 + width / 2, span.device, str(span.microbatch), fontsize=6,
                  ha="center", va="center", color="white", clip_on=True)  # fmt: skip


def _crossing(stages: Sequence[Stage]) -> tuple[tuple[str, ...], ...]:
    return tuple(stage.sent for stage in stages)
