"""Static activations of ``int8``: learned from calibration data, one step an input."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ftc.graph import quantized_ops
from ftc.graph.bundle import load_bundle, save_bundle
from ftc.graph.capture import capture_module
from ftc.graph.cost import argument, operator_name
from ftc.graph.errors import PreconditionError
from ftc.graph.program import Program
from ftc.passes.base import Context
from ftc.passes.pipeline import Pipeline
from ftc.runtime.lower import lower

SPEC = "int8{activation=static,min_size=1}"


class Pair(nn.Module):
    """Two products of one input, and one of their sum."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.out = nn.Linear(32, 48), nn.Linear(32, 48), nn.Linear(48, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.one(x) + self.two(x))


@pytest.fixture(scope="module")
def pair() -> Program:
    torch.manual_seed(0)
    dims = {"x": {0: "rows"}}
    return capture_module(Pair().eval(), {"x": torch.randn(3, 32)}, dynamic=dims)


def static(program: Program, *rows: Tensor) -> Program:
    """``program`` with steps learned from ``rows``."""
    data = [{"x": each} for each in rows]
    spec = f"smooth{{alpha=none}},rotate{{gain=none}},{SPEC}"
    return Pipeline.parse(spec).run(program, Context.for_program(program, calibration=data)).program


def steps(program: Program) -> list[float]:
    """Every step, in the order of the products."""
    nodes = [n for n in program.graph.nodes if operator_name(n) == "ftc.quantized_linear"]
    return [float(program.tensor(str(argument(n, "step").target))) for n in nodes]


def test_steps_cover_the_calibration_data(pair: Program) -> None:
    rows = torch.randn(40, 32)
    one, two, _ = steps(static(pair, rows[:20], rows[20:]))
    assert one == two == pytest.approx(float(rows.abs().max()) / 127)
    larger, _, _ = steps(static(pair, 3 * rows))
    assert larger == pytest.approx(3 * one)


def test_products_of_one_input_share_a_step_and_its_codes(pair: Program) -> None:
    program = static(pair, torch.randn(40, 32))
    assert sum(name.endswith(".step") for name, _ in program.tensors()) == 2
    kinds = [node.op_type for node in lower(program).graph]
    assert kinds.count("QuantizeLinear") == 2
    assert kinds.count("MatMulIntegerToFloat") == 3
    assert not {"ReduceMax", "Reciprocal", "DynamicQuantizeLinear"} & set(kinds)


def test_one_row_in_a_thousand_is_clipped_and_ruins_no_other(pair: Program) -> None:
    rows = torch.randn(2000, 32)
    usual = steps(static(pair, rows))[0]
    rows[7] *= 1000
    assert steps(static(pair, rows))[0] < 1.5 * usual


def test_without_calibration_data_it_is_refused(pair: Program) -> None:
    with pytest.raises(PreconditionError, match="calibration data") as caught:
        Pipeline.parse(SPEC).run(pair, Context.for_program(pair))
    assert "--calib" in caught.value.fix


def test_what_is_beyond_a_step_is_clipped() -> None:
    data, scale = torch.tensor([[100, 0]], dtype=torch.int8), torch.tensor([[0.5]])
    x = torch.tensor([[0.26, 0.0], [9000.0, 1.0], [-9000.0, 1.0]], requires_grad=True)
    call = quantized_ops.quantized_linear
    y = call(x, data, scale, None, None, 8, 0, "static", torch.tensor(0.25))
    assert y.flatten().tolist() == [12.5, 127 * 12.5, -128 * 12.5]
    y.sum().backward()
    assert torch.equal(x.grad, torch.tensor([[50.0, 0.0]]).expand(3, 2))


def test_a_bundle_keeps_steps(pair: Program, tmp_path) -> None:
    program = static(pair, torch.randn(40, 32))
    save_bundle(program, tmp_path / "bundle")
    again = load_bundle(tmp_path / "bundle")
    x = {"x": torch.randn(5, 32)}
    for name, value in program(x).items():
        assert torch.equal(again(x)[name], value)
