"""Sensitivity: one weight at a time, and it finds the weight that hurts."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ftc.graph.errors import UsageError
from ftc.passes.base import Context
from ftc.passes.cleanup import Cleanup
from ftc.passes.int8 import Int8
from ftc.passes.lowrank import LowRank
from ftc.passes.pipeline import Pipeline
from ftc.runtime.sensitivity import draw, inspect_sensitivity, measure_sensitivity, passes_for

from .conftest import Command
from .small import decoder
from .tiny import custom, tiny


class OneHurts(nn.Module):
    """Two products; the second one's rows hold one large and many small weights."""

    def __init__(self) -> None:
        super().__init__()
        self.calm, self.wild = nn.Linear(48, 48), nn.Linear(48, 48)
        with torch.no_grad():
            self.wild.weight[:, 0] = 60.0
            self.calm.weight[0] = 0.0
            self.calm.bias[0] = 0.0

    def forward(self, x: Tensor) -> Tensor:
        return self.wild(torch.tanh(self.calm(x)))


def _found(*passes: object) -> list[object]:
    torch.manual_seed(0)
    program = custom(OneHurts(), x=torch.randn(4, 48))
    return measure_sensitivity(program, passes, Context.for_program(program))  # type: ignore


def test_the_weight_that_hurts_is_the_one_with_an_outlier() -> None:
    drift = {s.weight: s.drift for s in _found(Int8(activation="none"))}
    assert drift["wild.weight"] > 3 * drift["calm.weight"] > 0


def test_each_pass_is_asked_about_each_weight() -> None:
    found = _found(Int8(), LowRank(ratio=0.5))
    assert [(s.spec, s.weight) for s in found] == [
        ("int8", "calm.weight"), ("int8", "wild.weight"),
        ("lowrank{ratio=0.5}", "calm.weight"), ("lowrank{ratio=0.5}", "wild.weight"),
    ]  # fmt: skip
    assert all(s.saved > 0 for s in found)


def test_a_pass_without_a_selector_is_refused() -> None:
    with pytest.raises(UsageError, match="select"):
        _found(Cleanup())


def test_a_picture_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    draw(_found(Int8()), tmp_path / "s.png")
    assert (tmp_path / "s.png").stat().st_size > 1000
    assert [p.name for p in tmp_path.iterdir()] == ["s.png"]


def test_bits_are_passes_and_others_are_refused() -> None:
    assert [p.name for p in passes_for("8,4")] == ["int8", "int4"]
    assert passes_for("4, 4") == passes_for("4")
    for wrong in ("5", "", "8,", "8.0"):
        with pytest.raises(UsageError, match="bits"):
            passes_for(wrong)


def test_what_is_quantized_already_is_refused() -> None:
    done = Pipeline((Int8(min_size=16),)).run(tiny("bert")).program
    with pytest.raises(UsageError, match="quantized already"):
        inspect_sensitivity(done, "m", passes_for("8"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return decoder(tmp_path_factory.mktemp("model"))


def test_the_command_asks_about_a_selection(model: Path, tmp_path: Path, command: Command) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "p.png"
    call = ("inspect", model, "--sensitivity", "--select", "ffn", "--calib", "the cat sits . " * 9)
    ran = command(*call, "--picture", picture, "--json")
    drifts = [each["drift"] for each in ran.data["found"]]
    assert drifts == sorted(drifts, reverse=True) and len(drifts) == 2 * 2 * 3
    assert {each["spec"].partition("{")[0] for each in ran.data["found"]} == {"int8", "int4"}
    assert all("mlp" in each["weight"] for each in ran.data["found"])
    assert "the given text" in ran.data["inputs"] and picture.stat().st_size > 1000
    rows = [line.split() for line in command(*call, "--bits", 8).out.splitlines() if "mlp" in line]
    shown = [float(row[1]) for row in rows if row[0].startswith("model")]
    assert len(shown) == 6 and shown == sorted(shown, reverse=True)


def test_its_advice_leaves_the_worst_weight_out(
    model: Path, tmp_path: Path, command: Command
) -> None:
    out = command("inspect", model, "--sensitivity", "--bits", 8).out
    worst = next(line.split()[0] for line in out.splitlines() if line.startswith("model."))
    passes = shlex.split(out.splitlines()[-1])[1]
    ran = command("compile", model, "--passes", passes, "-o", tmp_path / "out")
    assert ran.status == 0, ran.err
    kinds = command("inspect", tmp_path / "out", "--select", "all", "--json").data["weights"]
    assert next(each["dtype"] for each in kinds if each["name"] == worst) == "float32"
    assert sum(each["dtype"] == "int8" for each in kinds) == len(re.findall(r"\nmodel\.", out)) - 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--bits", "4"], "--sensitivity --bits"),
        (["--sensitivity", "--layers"], "leave out --layers"),
        (["--sensitivity", "--bits", "16"], "known: 4, 8"),
        (["--sensitivity", "--picture", "s.txt"], ".png"),
        (["--sensitivity", "--picture", "no/such/s.png"], "mkdir"),
        (["--sensitivity", "--select", "fnn"], "did you mean"),
    ],
)
def test_mistakes_are_refused_before_they_cost_time(
    model: Path, arguments: list[str], words: str, command: Command
) -> None:
    ran = command("inspect", model, *arguments)
    assert ran.status == 2 and words in ran.err and "fix:" in ran.err
