"""Int4: grids that are kept, ranges that are searched, rounding whose errors cancel."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from ftc.graph.capture import capture_module
from ftc.graph.errors import UsageError
from ftc.graph.gptq import Curvature, compensate, output_error
from ftc.graph.grids import keep_grid
from ftc.graph.products import products
from ftc.graph.program import Program
from ftc.graph.quantize import Scheme
from ftc.graph.ranges import round_to, search_range
from ftc.graph.side_by_side import side_by_side
from ftc.passes.base import Context
from ftc.passes.pipeline import Pipeline
from ftc.passes.rounding import Rounding, to_nearest
from ftc.runtime.lower import lower
from ftc.runtime.parity import parity
from ftc.runtime.session import OnnxSession
from ftc.tests.tiny import custom

GROUPS = Scheme(4, 16, symmetric=False)


def correlated(rows: int, width: int, seed: int = 0) -> Tensor:
    """Inputs of a low-dimensional subspace, a little noise, and a mean that is not 0."""
    torch.manual_seed(seed)
    return (
        torch.randn(rows, 6) @ torch.randn(6, width) + 0.1 * torch.randn(rows, width)
    ) + torch.linspace(-1, 1, width)


def on_grid(out: int, groups: int, *, whole: bool) -> Tensor:
    """A weight as Q4_1 has it; with zero points that are whole numbers, or any."""
    codes = torch.randint(0, 16, (out, groups, 16)).float()
    codes[..., 0], codes[..., 1] = 0, 15
    steps = torch.rand(out, groups, 1).half().float() * 0.1 + 0.05
    low = -steps * torch.randint(0, 16, steps.shape) if whole else -torch.rand(steps.shape) * steps
    return (codes * steps + low).flatten(1)


@given(st.integers(0, 1000), st.booleans())
def test_a_grid_is_recovered(seed: int, whole: bool) -> None:
    torch.manual_seed(seed)
    weight, x = on_grid(8, 4, whole=whole), torch.randn(5, 64)
    kept = keep_grid(weight, GROUPS)
    assert kept is not None
    assert (kept.extra == 0) == whole
    means = x.unflatten(-1, (4, 16)).mean(-1)
    wide = torch.cat((x, means, torch.zeros(5, kept.extra - 4)), 1) if kept.extra else x
    want = x @ weight.T
    tolerance = 5e-3 if kept.extra else 1e-6  # remainders are rounded, to a sixtieth of a step
    assert (wide @ kept.coded.weight().T - want).norm() <= tolerance * want.norm()


def test_a_weight_off_the_grid_is_not_taken_for_one_on_it() -> None:
    torch.manual_seed(0)
    weight = on_grid(8, 4, whole=True)
    assert keep_grid(torch.randn(8, 64), GROUPS) is None
    weight[3, 20] += 0.01
    assert keep_grid(weight, GROUPS) is None


def test_a_symmetric_grid_has_its_zero_in_the_middle() -> None:
    torch.manual_seed(0)
    symmetric = Scheme(4, 16, symmetric=True)
    codes = torch.randint(-8, 8, (6, 2, 16)).float()
    codes[..., 0], codes[..., 1] = -8, 7
    weight = (codes * 0.25).flatten(1)
    kept = keep_grid(weight, symmetric)
    assert kept is not None and kept.coded.zero_point is None and kept.extra == 0
    assert torch.equal(kept.coded.weight(), weight)
    assert keep_grid(on_grid(6, 2, whole=False), symmetric) is None


@given(st.integers(0, 1000), st.booleans())
def test_a_searched_range_loses_less_than_the_whole_range(seed: int, symmetric: bool) -> None:
    torch.manual_seed(seed)
    scheme = Scheme(4, 16, symmetric=symmetric)
    groups = torch.randn(200, 64)  # of as many, the largest is worth clipping
    importance = torch.rand(64)

    def lost(shrink: tuple[float, ...]) -> float:
        scale, zero = search_range(groups, importance, scheme, shrink)
        back = round_to(groups, scale, zero, scheme) * scale.unsqueeze(-1)
        return float(((back - groups).square() * importance).sum())

    assert lost((1.0, 0.9, 0.8, 0.7)) < lost((1.0,))


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_group_of_one_value_is_exact(symmetric: bool) -> None:
    values = torch.tensor([0.0, 0.5, -3.0]).unsqueeze(1).expand(3, 16).contiguous()
    scheme = Scheme(4, 16, symmetric=symmetric)
    scale, zero = search_range(values, torch.ones(16), scheme)
    back = round_to(values, scale, zero, scheme) * scale.unsqueeze(-1)
    assert (back - values).abs().max() < 1e-2


@pytest.mark.parametrize("seed", range(3))
def test_compensated_rounding_keeps_outputs_better_than_nearest(seed: int) -> None:
    x = correlated(256, 64, seed)
    weight = torch.randn(24, 64)
    gram = x.T @ x / len(x)
    nearest = to_nearest(weight, GROUPS).coded.weight()
    made = compensate(weight, Curvature.of(gram, GROUPS.group_size), GROUPS).weight()
    assert output_error(weight, made, gram) < 0.7 * output_error(weight, nearest, gram)


def test_output_error_is_that_of_the_outputs() -> None:
    x, weight = correlated(256, 32), torch.randn(8, 32)
    other = weight + 0.1 * torch.randn(8, 32)
    want = (x @ (weight - other).T).norm() / (x @ weight.T).norm()
    assert output_error(weight, other, x.T @ x / len(x)) == pytest.approx(float(want), rel=1e-3)


class Chain(nn.Module):
    """Products one behind the other, without biases and with them, and one read twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 64, bias=False), nn.Linear(64, 64)
        self.shared = nn.Linear(64, 64, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.second(torch.relu(self.first(x))))
        return self.shared(torch.relu(self.shared(x)))


@pytest.fixture(scope="module")
def chain() -> Program:
    torch.manual_seed(0)
    return capture_module(Chain(), {"x": correlated(8, 64)}, dynamic={"x": {0: "batch"}})


def data(entries: int = 3) -> tuple[dict[str, Tensor], ...]:
    return tuple({"x": correlated(64, 64, seed)} for seed in range(entries))


def run(program: Program, spec: str) -> Any:
    ctx = Context(probes=data(1), calibration=data())
    return Pipeline.parse(spec).run(program, ctx)


def test_visits_follow_the_program_and_see_both_inputs(chain: Program) -> None:
    nodes = [p.node for p in products(chain)][:2]
    seen = []

    def visit(node: Any, x: list[Tensor], other: list[Tensor]) -> tuple[Tensor, Tensor]:
        seen.append((node, all(a is b for a, b in zip(x, other, strict=True))))
        weight = chain.tensor(str(node.args[1].target)).detach()
        return weight * 2, torch.zeros(len(weight))

    with torch.no_grad():
        side_by_side(chain, data(2), nodes, visit, {})
    assert seen == [(nodes[0], True), (nodes[1], False)]


def test_mean_outputs_stay_where_they_were(chain: Program) -> None:
    ctx_data = data()
    readers = {p.weight: [p.node] for p in products(chain) if "shared" not in p.weight}
    rounded = Rounding(chain, ctx_data, GROUPS)(readers)
    assert {name: each.bias is not None for name, each in rounded.items()} == {
        "first.weight": True, "second.weight": True,
    }  # fmt: skip
    first = rounded["first.weight"]
    x = torch.cat([each["x"] for each in ctx_data])
    want = x @ chain.tensor("first.weight").detach().T
    got = x @ first.coded.weight().T + first.bias
    torch.testing.assert_close(got.mean(0), want.mean(0), atol=1e-4, rtol=1e-4)


def test_rounding_with_data_beats_nearest_in_the_output(chain: Program) -> None:
    drifts = {
        method: run(chain, f"int4{{method={method},min_size=1,activation=none}}").drift.relative
        for method in ("gptq", "rtn")
    }
    assert drifts["gptq"] < 0.7 * drifts["rtn"]


@pytest.mark.parametrize("group_size", [16, 32, 64])
@pytest.mark.parametrize("activation", ["block", "none"])
def test_lowered_faithfully(chain: Program, group_size: int, activation: str) -> None:
    program = run(chain, f"int4{{group_size={group_size},activation={activation},min_size=1}}")
    probes = [chain.signature.probe(seed=n, batch=n) for n in (1, 3)]
    assert parity(program.program, OnnxSession(lower(program.program)), probes).relative < 1e-4


def test_kept_grids_are_said_and_lowered() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 48, bias=False), nn.ReLU(), nn.Linear(48, 16))
    model[0].weight.data, model[2].weight.data = (
        on_grid(48, 4, whole=False), on_grid(16, 3, whole=True),
    )  # fmt: skip
    program = custom(model, input=torch.randn(3, 64))
    done = Pipeline.parse("int4{min_size=1,group_size=16,activation=none}").run(program)
    (note,) = (n for n in done.records[-1].notes if n.startswith("kept"))
    assert f"2 weights ({48 * 64 + 16 * 48:,} elements)" in note
    assert "1 with columns for their zero points" in note
    assert done.drift is not None and done.drift.relative < 5e-3
    probe = program.signature.probe(seed=1)
    assert parity(done.program, OnnxSession(lower(done.program)), [probe]).relative < 1e-4


def test_a_weight_beyond_the_error_goes_to_the_fallback(chain: Program) -> None:
    done = run(chain, "int4{max_error=0.0001,fallback=int8,min_size=1}")
    bits = {node.args[5] for node in done.program.graph.nodes if "linear" in str(node.target)}
    assert bits == {8}
    assert any("4 bits do not suit them" in note for note in done.records[-1].notes)
    done = run(chain, "int4{max_error=0.0001,min_size=1}")
    assert done.records[-1].modified == 0


@pytest.mark.parametrize(
    "bad", ["group_size=7", "min_size=-5", "max_error=-1", "max_error=0.1,method=rtn"]
)
def test_options_without_a_meaning_are_refused(bad: str) -> None:
    with pytest.raises(UsageError, match="int4") as caught:
        Pipeline.parse(f"int4{{{bad}}}")
    assert caught.value.fix
