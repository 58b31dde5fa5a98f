"""Runs of several processes: they stop, die and go on at another mesh, and end where one does."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from ftc.graph.bundle import load_bundle, save_bundle
from ftc.graph.errors import UsageError
from ftc.graph.sources import capture
from ftc.runtime.training.data.table import cache_folder
from ftc.runtime.training.engines import Mesh, World

from .processes import spread
from .small import encoder
from .spread import staged, still, trained
from .training import prose

STEPS = 10


@pytest.fixture(scope="module")
def call(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A call of a small run that has two stages."""
    place = tmp_path_factory.mktemp("scale")
    program = capture(encoder(place / "model"))
    save_bundle(staged(still(program), 2), place / "program")
    data = prose(place / "p.txt")
    return {
        "program": str(place / "program"), "data": str(data), "objective": "mlm", "steps": STEPS,
        "batch": 6, "length": 24, "learning_rate": 1e-3, "eval": "0.2", "evaluate_every": STEPS,
        "timeout": 20.0, "save_every": 2, "microbatches": 2,
    }  # fmt: skip


@pytest.fixture(scope="module")
def alone(call: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """The bundle and the losses of one process."""
    out = tmp_path_factory.mktemp("alone") / "out"
    return out, spread(1, trained, {**call, "out": str(out)})[0]


def _same(one: Path, other: Path) -> None:
    expected = dict(load_bundle(one).tensors())
    for name, tensor in load_bundle(other).tensors():
        assert (tensor - expected[name]).abs().max() <= 2e-5, name
    assert {p.name for p in one.iterdir()} == {p.name for p in other.iterdir()}
    assert (one / "graph.json").read_bytes() == (other / "graph.json").read_bytes()


def test_a_run_goes_on_at_any_mesh(call: dict[str, Any], alone: Any, tmp_path: Path) -> None:
    """Two steps each of dp, pp, tp and fsdp, then one process: as if it had been one all the time.

    Every mesh is left by the death of a process, in the step behind a checkpoint.
    """
    values = {**call, "out": str(tmp_path / "out")}
    for done, mesh in ((2, "dp=2"), (4, "pp=2"), (6, "tp=2"), (8, "fsdp=3")):
        count, begin = int(mesh[-1]), time.monotonic()
        found = spread(count, trained, {**values, "mesh": mesh}, done > 2, done, dies=1)
        assert time.monotonic() - begin < 60
        assert all("a process of the run died" in each for each in found if each), mesh
    found = spread(1, trained, values, True)[0]
    expected = alone[1]
    assert found[1] == pytest.approx(expected[1], abs=1e-6)
    assert found[2]["loss"] == pytest.approx(expected[2]["loss"], abs=1e-6)
    _same(alone[0], tmp_path / "out")
    assert not (tmp_path / "out.run").exists()


@pytest.mark.parametrize("mesh", ["pp=2", "tp=2"])
def test_every_mesh_writes_the_same_bundle(
    mesh: str, call: Any, alone: Any, tmp_path: Path
) -> None:
    found = spread(2, trained, {**call, "out": str(tmp_path / "out"), "mesh": mesh})
    assert found[0][2]["loss"] == pytest.approx(alone[1][2]["loss"], abs=1e-5)
    _same(alone[0], tmp_path / "out")


@pytest.mark.parametrize("learns", ["layer[0] & attention", "layer[1] & ffn"])
def test_a_stage_may_learn_nothing(learns: str, call: Any, tmp_path: Path) -> None:
    values = {**call, "steps": 2, "passes": f'freeze{{train="{learns}"}}', "clip": 1e-3}
    one = spread(1, trained, {**values, "out": str(tmp_path / "one")})[0]
    two = spread(2, trained, {**values, "out": str(tmp_path / "two"), "mesh": "pp=2"})[0]
    assert one[0] != one[1] == pytest.approx(two[1], abs=1e-5)
    _same(tmp_path / "one", tmp_path / "two")


def test_one_process_makes_what_the_others_read(call: Any, tmp_path: Path) -> None:
    """A teacher, and a program that is only measured: captured once, and left nowhere."""
    values = {**call, "steps": 2}
    for more in (
        {"objective": "distillation", "out": str(tmp_path / "out"), "passes": "lowrank{ratio=0.5}"},
        {"steps": 0},
    ):
        expected = spread(1, trained, {**values, **more, "out": str(tmp_path / "one")})[0]
        for found in spread(2, trained, {**values, **more, "mesh": "dp=2"}):
            assert not isinstance(found, str), found
            assert found[2]["loss"] == pytest.approx(expected[2]["loss"], rel=1e-5)
    assert not any(cache_folder().with_name("programs").iterdir())


@pytest.mark.parametrize(
    ("started", "mesh", "what", "fix"),
    [
        (1, "dp=2", "2 processes, and 1 was started", ["torchrun --nproc-per-node 2 …"]),
        (2, "dp=1", "1 process, and 2 were started", ["--mesh dp=2"]),
        (2, "pp=3", "3 processes, and 2 were", ["--mesh dp=2", "torchrun --nproc-per-node 3 …"]),
    ],
)
def test_another_number_of_processes_is_refused(
    started: int, mesh: str, what: str, fix: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(started))
    with pytest.raises(UsageError, match=what) as caught:
        World(Mesh.parse(mesh), torch.device("cpu"))
    assert caught.value.fix == " or ".join(fix)
