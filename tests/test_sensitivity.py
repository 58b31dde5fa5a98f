"""Sensitivity: one weight at a time, and it finds the weight that hurts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ftc.graph.errors import UsageError
from ftc.passes.base import Context
from ftc.passes.cleanup import Cleanup
from ftc.passes.int8 import Int8
from ftc.passes.lowrank import LowRank
from ftc.runtime.sensitivity import draw, measure_sensitivity

from .tiny import custom


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
