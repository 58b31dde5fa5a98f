"""Awq: exact, and worth it before weights are rounded to 4 bits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ftc.graph.capture import capture_module
from ftc.graph.errors import UsageError
from ftc.graph.program import Program
from ftc.graph.quantize import Scheme
from ftc.passes.awq import best_scale
from ftc.passes.base import Context
from ftc.passes.pipeline import Pipeline

SCHEME = Scheme(4, 16, symmetric=False)


class Normed(nn.Module):
    """A norm with a few loud channels, before two products."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(64)
        self.a, self.b = nn.Linear(64, 48), nn.Linear(64, 48)
        with torch.no_grad():
            self.norm.weight[::16] *= 20

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return self.a(y) + torch.relu(self.b(y))


@pytest.fixture(scope="module")
def normed() -> Program:
    torch.manual_seed(0)
    return capture_module(Normed(), {"x": torch.randn(4, 6, 64)})


def drift(program: Program, spec: str) -> float:
    torch.manual_seed(1)
    ctx = Context(calibration=tuple({"x": torch.randn(4, 6, 64)} for _ in range(3)))
    found = Pipeline.parse(spec).run(program, ctx).drift
    assert found is not None
    return found.relative


def test_rounding_to_nearest_gains_from_it(normed: Program) -> None:
    int4 = "int4{min_size=1,group_size=16,activation=none,method=rtn}"
    assert drift(normed, f"awq{{group_size=16}},{int4}") < 0.95 * drift(normed, int4)


def test_no_scale_is_better_than_none_where_channels_are_alike() -> None:
    torch.manual_seed(0)
    weight = torch.randint(-8, 8, (24, 64)).float()
    weight[:, 0::16], weight[:, 1::16] = -8, 7  # on its grid: nothing is lost as it is
    assert best_scale([weight], torch.rand(64) + 0.1, torch.eye(64), SCHEME, 20) is None


def test_the_scale_found_loses_less_on_the_data() -> None:
    torch.manual_seed(0)
    x = torch.randn(256, 64) * torch.logspace(-1, 1, 64)
    weight = torch.randn(24, 64)
    scale = best_scale([weight], x.abs().mean(0), x.T @ x / 256, SCHEME, 20)
    assert scale is not None and bool((scale > 0).all())
    more = scale[x.abs().mean(0).argmax()] / scale[x.abs().mean(0).argmin()]
    assert more > 1  # loud channels get the finer weights


def test_weights_on_a_grid_stay_there() -> None:
    torch.manual_seed(0)
    model = Normed()
    for product in (model.a, model.b):
        codes = torch.randint(0, 16, (48, 4, 16)).float()
        codes[..., 0], codes[..., 1] = 0, 15
        product.weight.data = ((codes - 7) * 0.125).flatten(1)
    program = capture_module(model, {"x": torch.randn(4, 6, 64)})
    done = Pipeline.parse("awq{group_size=16}").run(program, Context())
    assert any("on a 4-bit grid already" in note for note in done.records[-1].notes)
    assert torch.equal(done.program.tensor("a.weight"), model.a.weight)


def test_no_steps_change_nothing(normed: Program) -> None:
    done = Pipeline.parse("awq{steps=0}").run(normed, Context())
    assert torch.equal(done.program.tensor("norm.weight"), normed.tensor("norm.weight"))


def test_counts_below_their_least_are_refused() -> None:
    with pytest.raises(UsageError, match="counts") as caught:
        Pipeline.parse("awq{steps=-1}")
    assert caught.value.fix
