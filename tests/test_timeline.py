"""Timelines: the bubbles that the papers give, orders without a deadlock, plans that fit."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftc.graph.errors import UsageError
from ftc.graph.stage_plan import parse_bytes
from ftc.graph.timeline import SCHEDULES, Schedule, StageTime, refuse, simulate
from ftc.passes.partition import Partition
from ftc.runtime.plan import plan
from ftc.runtime.stage_report import draw_timelines, report_stages, timelines
from ftc.runtime.training.config import TrainConfig

from .small import encoder
from .tiny import tiny

_times = st.floats(0.1, 5.0)


def _even(count: int, **more: Any) -> list[StageTime]:
    return [StageTime(1.0, 2.0, 1.0, **more)] * count


@pytest.mark.parametrize(("devices", "microbatches"), [(1, 3), (2, 4), (4, 8), (8, 32)])
def test_bubbles_are_those_of_the_papers(devices: int, microbatches: int) -> None:
    """(d - 1) / (m + d - 1), a v-th of it over v stages a device, and a third without weights."""
    idle = devices - 1
    even = idle / (microbatches + idle)
    for schedule in ("gpipe", "1f1b"):
        assert simulate(schedule, _even(devices), microbatches).bubble == pytest.approx(even)
    halves = simulate("interleaved", _even(2 * devices), microbatches, devices)
    assert halves.bubble == pytest.approx(idle / (2 * microbatches + idle))
    zero = simulate("zero-bubble", _even(devices), microbatches)
    assert zero.seconds == pytest.approx(3 * microbatches + idle)


def test_1f1b_keeps_as_many_microbatches_as_stages_follow() -> None:
    assert simulate("gpipe", _even(4, saved=10, held=5), 8).peak == (85,) * 4
    assert simulate("1f1b", _even(4, saved=10, held=5), 8).peak == (45, 35, 25, 15)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(SCHEDULES), st.integers(1, 4), st.integers(1, 3), st.integers(1, 9),
       st.data())  # fmt: skip
def test_every_piece_of_work_is_done_once_and_after_what_it_needs(
    schedule: Schedule, devices: int, local: int, microbatches: int, data: st.DataObject
) -> None:
    stages = [StageTime(data.draw(_times), b := data.draw(_times), b / 2, send=0.25)
              for _ in range(devices * local)]  # fmt: skip
    try:
        refuse(schedule, len(stages), microbatches, devices)
    except UsageError as error:
        assert error.fix
        return
    line = simulate(schedule, stages, microbatches, devices)
    ends = {(s.kind, s.stage, s.microbatch): s.end for s in line.spans}
    kinds = 3 if schedule == "zero-bubble" else 2
    assert len(ends) == len(line.spans) == kinds * len(stages) * microbatches
    for span in line.spans:
        if span.kind == "forward" and span.stage:
            assert span.start >= ends["forward", span.stage - 1, span.microbatch] + 0.25
        if span.kind == "backward" and span.stage < len(stages) - 1:
            assert span.start >= ends["backward", span.stage + 1, span.microbatch] + 0.25
        if span.kind != "forward":
            assert span.start >= ends["forward", span.stage, span.microbatch]
    busy = [sum(s.end - s.start for s in line.spans if s.device == d) for d in range(devices)]
    assert line.seconds >= max(busy) - 1e-9 and 0 <= line.bubble < 1
    for device in range(devices):
        own = [s for s in line.spans if s.device == device]
        assert all(a.end <= b.start + 1e-9 for a, b in itertools.pairwise(own))


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(SCHEDULES), st.integers(2, 4), st.integers(1, 4), st.integers(1, 5),
       st.data())  # fmt: skip
def test_devices_on_shared_cores_take_what_their_work_takes(
    schedule: Schedule, devices: int, rounds: int, cores: int, data: st.DataObject
) -> None:
    """One core does all work one after another; several take no less than their share of it."""
    stages = [StageTime(data.draw(_times), b := data.draw(_times), b / 2) for _ in range(devices)]
    own = simulate(schedule, stages, rounds * devices)
    shared = simulate(schedule, stages, rounds * devices, cores=cores)
    work = rounds * devices * sum(each.forward + each.backward for each in stages)
    assert {(s.kind, s.stage, s.microbatch) for s in own.spans} == {
        (s.kind, s.stage, s.microbatch) for s in shared.spans}  # fmt: skip
    assert shared.seconds >= max(own.seconds, work / cores) * (1 - 1e-9)
    if cores == 1:
        assert shared.seconds == pytest.approx(work)
    if cores >= devices:
        assert shared == own


def test_the_report_and_the_picture_of_a_program(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    program = Partition(stages=4)(tiny("gpt2")).program
    report = report_stages(program, "m", shape="batch=2", microbatches=4, device="cpu")
    assert report.sizes["batch"] == 2 and len(report.stages) == 4
    assert report.shared == {"lm_head.weight": (0, 3)}
    assert {line.schedule for line in report.timelines} == set(SCHEDULES)
    draw_timelines(report.timelines, tmp_path / "t.png")
    assert (tmp_path / "t.png").stat().st_size > 5000


def test_a_program_without_stages_says_how_to_get_some() -> None:
    with pytest.raises(UsageError, match="no stages") as caught:
        report_stages(tiny("bert"), "m", shape=None, microbatches=None, device="cpu")
    assert "partition{stages=4}" in str(caught.value.fix)


def test_no_schedule_runs_no_microbatch() -> None:
    with pytest.raises(UsageError):
        timelines(_even(2), 0)


def test_plans_fit_and_the_fastest_comes_first() -> None:
    program = tiny("llama-12")
    plans = plan(program, "m", devices=4, memory="100MB", batch=16, device="cpu")
    assert [p.seconds for p in plans.found] == sorted(p.seconds for p in plans.found)
    for each in plans.found:
        assert each.replicas * each.devices == 4 and each.peak <= parse_bytes("100MB")
        assert each.microbatch * each.microbatches * each.replicas == 16
    tight = plan(program, "m", devices=4, memory="9MB", batch=16, device="cpu")
    assert tight.found[0].seconds >= plans.found[0].seconds
    assert all(each.peak <= 9e6 for each in tight.found)


@pytest.mark.parametrize("devices", [1, 2, 4])
def test_training_takes_what_is_planned(devices: int) -> None:
    """Every way that is shown, and the command for the first as it is printed."""
    plans = plan(tiny("bert"), "m", devices=devices, memory="1GB", batch=8, device="cpu")
    given = {"program": "m", "data": "FILE", "objective": "mlm", "out": "OUT", "batch": 8}
    for each in plans.found:
        ways = {"mesh": each.mesh}
        if each.devices > 1:
            ways |= {"pipeline": each.schedule, "microbatches": each.microbatches}
        TrainConfig.of(given | ways)
    words = plans.commands[-1].split()
    assert ("torchrun" in words) == (devices > 1) == ("--mesh" in words)
    options = dict(itertools.pairwise(words))
    rows = int(options["--batch"]) * int(options.get("--accumulate", 1))
    assert rows == 8 and ("--microbatches" in options) == (plans.found[0].stages > 1)


@pytest.mark.parametrize(
    "options", [{"devices": 0}, {"batch": 0}, {"memory": "1kB"}, {"memory": "lots"},
                {"device": "toaster"}, {"shape": "sequence"}]
)  # fmt: skip
def test_wrong_plans_are_refused(options: dict[str, Any]) -> None:
    given = {"devices": 2, "batch": 4, "memory": "1GB", **options}
    with pytest.raises(UsageError) as caught:
        plan(tiny("bert"), "m", **given)
    assert caught.value.fix


def test_the_commands(command: Any, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    model, out = encoder(tmp_path / "m"), tmp_path / "b"
    command("compile", model, "--passes", "partition{stages=2}", "-o", out)
    picture = tmp_path / "t.png"
    shown = command("inspect", out, "--stages", "--microbatches", 4, "--picture", picture).out
    assert "2 stages" in shown and "zero-bubble" in shown and picture.exists()
    found = command("inspect", out, "--stages", "--json").data
    assert len(found["stages"]) == 2 and "spans" not in found["timelines"][0]
    assert "mesh of dp=" in command("plan", model, "--devices", 2, "--memory", "1GB").out
    wrong = command("inspect", out, "--microbatches", 4)
    assert wrong.status == 2 and "--stages --microbatches" in wrong.err
