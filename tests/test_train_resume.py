"""A run that is killed at any moment goes on to the very bits of one that was not."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ftc.graph.bundle import save_bundle
from ftc.graph.errors import BundleError, UsageError
from ftc.graph.sources import capture
from ftc.runtime.training.checkpoint import State, load_checkpoint, save_checkpoint
from ftc.runtime.training.run import train
from ftc.runtime.training.trainer import Interrupted, Trainer

from .processes import CONTEXT, process
from .small import encoder
from .training import config, sentences

KILLS, STEPS = 10, 100
STAGES = ["weights.safetensors", "optimizer.safetensors", "flush", "before", "after"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A bundle with dropout, and labelled sentences."""
    path = tmp_path_factory.mktemp("resume")
    encoder(path / "model", "BertForSequenceClassification", num_labels=2)
    save_bundle(capture(path / "model"), path / "program")
    sentences(path / "data.jsonl")
    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(path)
    yield path
    os.environ.pop("XDG_CACHE_HOME")
    if before:
        os.environ["XDG_CACHE_HOME"] = before


def _config(folder: Path, out: str, **more: Any) -> Any:
    options = {"steps": STEPS, "save_every": 1, "accumulate": 2, "batch": 4, **more}
    return config(folder / "program", folder / "data.jsonl", "sequence-classification",
                  folder / out, **options)  # fmt: skip


def _child(given: Any, started: Any, stage: str | None) -> None:
    torch.set_num_threads(1)
    if stage is not None:
        _kill_at(stage)
    step = Trainer._step

    def first(self: Trainer, batches: Any) -> None:
        started.set()
        step(self, batches)

    Trainer._step = first  # type: ignore[method-assign]
    train(given, resume=True)


def _kill_at(stage: str) -> None:
    """Has this process kill itself in the middle of its third checkpoint."""
    from ftc.graph.bundle import replace_folder
    from ftc.runtime.training import checkpoint

    seen = []

    def die(*_: Any) -> None:
        seen.append(1)
        if len(seen) == 3:
            os.kill(os.getpid(), signal.SIGKILL)

    def wrap(function: Callable[..., Any], first: Callable[..., None],
             last: Callable[..., None] = lambda *_: None) -> Callable[..., Any]:  # fmt: skip
        def wrapped(*args: Any) -> Any:
            first(*args)
            result = function(*args)
            last(*args)
            return result

        return wrapped

    if stage.endswith(".safetensors"):
        checkpoint.write_tensors = wrap(  # type: ignore[assignment]
            checkpoint.write_tensors, lambda path, _: die() if path.name == stage else None
        )
    elif stage == "flush":
        replace_folder._flush = wrap(replace_folder._flush, die)
    else:
        order = (die,) if stage == "before" else (lambda *_: None, die)
        replace_folder._put = wrap(replace_folder._put, *order)


def _start(given: Any, stage: str | None = None) -> Any:
    started = CONTEXT.Event()
    child = process(_child, given, started, stage)
    child.start()
    assert started.wait(60)
    return child


def _weights(folder: Path, out: str) -> bytes:
    return (folder / out / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def uninterrupted(folder: Path) -> bytes:
    torch.set_num_threads(1)
    train(_config(folder, "whole", save_every=1000))
    return _weights(folder, "whole")


def test_killed_at_random_moments(folder: Path, uninterrupted: bytes) -> None:
    dice, last = random.Random(7), folder / "killed.run/checkpoints/last/state.json"
    reached = [0]
    for _ in range(KILLS):
        process = _start(_config(folder, "killed"))
        time.sleep(dice.uniform(0.0, 0.1))
        process.kill()
        process.join()
        if last.exists():
            reached.append(json.loads(last.read_text())["state"]["step"])
    assert reached == sorted(reached), "a step that was saved is not lost"
    assert reached[-1] > 0
    assert not (folder / "killed").exists(), "killed too late: there was nothing to go on with"
    report = train(_config(folder, "killed"), resume=True)
    assert report.steps == STEPS
    assert _weights(folder, "killed") == uninterrupted
    lines = [json.loads(x) for x in (folder / "killed/metrics.jsonl").read_text().splitlines()]
    whole = [json.loads(x) for x in (folder / "whole/metrics.jsonl").read_text().splitlines()]
    assert [(x["step"], x["loss"]) for x in lines] == [(x["step"], x["loss"]) for x in whole]
    assert not list(folder.glob("*.run"))


@pytest.mark.parametrize("stage", STAGES)
def test_killed_while_saving(folder: Path, uninterrupted: bytes, stage: str) -> None:
    out = stage.split(".")[0]
    process = _start(_config(folder, out), stage)
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    train(_config(folder, out), resume=True)
    assert _weights(folder, out) == uninterrupted


def test_an_interrupt_saves_first(
    folder: Path, uninterrupted: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Trainer._step

    def interrupted(self: Trainer, batches: Any) -> None:
        step(self, batches)
        if self.state.step == 17:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Trainer, "_step", interrupted)
    given = _config(folder, "stopped", save_every=1000)
    with pytest.raises(Interrupted):
        train(given)
    monkeypatch.undo()
    report = train(given, resume=True)
    assert any("after step 17" in note for note in report.notes)
    assert _weights(folder, "stopped") == uninterrupted


def test_a_run_that_has_ended_is_done(folder: Path, uninterrupted: bytes) -> None:
    """A script that starts again with ``--resume`` until it is done ends; other options do not."""
    report = train(_config(folder, "whole"), resume=True)
    assert report.steps == report.planned and "has ended" in report.notes[-1]
    assert _weights(folder, "whole") == uninterrupted
    with pytest.raises(UsageError, match=r"learning_rate=0\.001"):
        train(_config(folder, "whole", learning_rate=2e-3), resume=True)


def test_a_run_that_is_there_is_not_overwritten(folder: Path) -> None:
    (folder / "there.run").mkdir()
    (folder / "there.run" / "data.json").write_text("{}")
    with pytest.raises(UsageError, match="did not end"):
        train(_config(folder, "there"))
    (folder / "bad.jsonl").write_text('{"text": "a cat", "label": null}\n')
    with pytest.raises(UsageError, match=r"bad\.jsonl"):
        train(replace(_config(folder, "there"), data=str(folder / "bad.jsonl")), force=True)
    assert (folder / "there.run" / "data.json").exists()


def test_other_options_and_other_data_are_refused(folder: Path, tmp_path: Path) -> None:
    process = _start(_config(folder, "other"), "before")
    process.join(60)
    with pytest.raises(UsageError, match=r"learning_rate=0\.001"):
        train(_config(folder, "other", learning_rate=2e-3), resume=True)
    data = (folder / "data.jsonl").read_text()
    try:
        sentences(folder / "data.jsonl", seed=1)
        with pytest.raises(UsageError, match="data has changed"):
            train(_config(folder, "other"), resume=True)
    finally:
        (folder / "data.jsonl").write_text(data)


class _Small:
    """An engine of two weights, as far as checkpoints ask."""

    main, process = True, 0

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.weights = {"a": torch.nn.Parameter(torch.randn(3, 2)),
                        "b": torch.nn.Parameter(torch.randn(4))}  # fmt: skip

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        return self.weights

    def buffers(self) -> dict[str, torch.Tensor]:
        return {}

    def whole(self, name: str, part: torch.Tensor) -> torch.Tensor:
        return part

    part = whole

    def collect(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return dict(tensors)

    def each(self, own: Any) -> list[Any]:
        return [own]

    def agree(self, mine: bool) -> bool:
        return mine

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self.weights)

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        sum((w * torch.rand_like(w)).sum() for w in self.weights.values()).backward()
        optimizer.step()
        optimizer.zero_grad()


def test_a_checkpoint_holds_weights_optimizer_and_generators(tmp_path: Path) -> None:
    first, second = _Small(), _Small()
    optimizers = [torch.optim.AdamW(e.weights.values(), lr=0.1, fused=True) for e in
                  (first, second)]  # fmt: skip
    first.step(optimizers[0])
    save_checkpoint(tmp_path / "c", State(step=1, best=0.25), first, optimizers[0])
    assert {p.suffix for p in (tmp_path / "c").iterdir()} == {".json", ".safetensors"}
    first.step(optimizers[0])
    assert load_checkpoint(tmp_path / "c", second, optimizers[1]) == State(step=1, best=0.25)
    second.step(optimizers[1])
    for name, weight in first.weights.items():
        assert torch.equal(weight, second.weights[name])


@pytest.mark.parametrize("name", ["weights.safetensors", "optimizer.safetensors", "state.json"])
def test_a_damaged_checkpoint_is_refused(tmp_path: Path, name: str) -> None:
    engine = _Small()
    optimizer = torch.optim.AdamW(engine.weights.values(), fused=True)
    engine.step(optimizer)
    save_checkpoint(tmp_path / "c", State(), engine, optimizer)
    content = bytearray((tmp_path / "c" / name).read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "c" / name).write_bytes(content[:-1])
    with pytest.raises(BundleError, match="damaged"):
        load_checkpoint(tmp_path / "c", engine, optimizer)
