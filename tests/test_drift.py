"""Drift: what counts as different, where, and at which node it began."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ftc.graph.drift import Difference, measure_drift
from ftc.graph.program import Program
from ftc.graph.rewriter import Rewriter
from ftc.graph.trace import locate, trace, worst_jump
from ftc.tests.tiny import custom, tiny

aten = torch.ops.aten


def difference(a, b):
    result = Difference()
    result.add(a, b)
    return result


@given(st.integers(1, 5), st.integers(1, 7), st.integers(0, 99), st.floats(1e-6, 10.0))
def test_it_is_the_norm_of_the_error(rows, width, seed, size):
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    b = a + size * torch.randn(rows, width, generator=generator, dtype=torch.float64)
    found = difference(a, b)
    assert found.relative == pytest.approx(float((a - b).norm() / a.norm()))
    assert found.max_abs == pytest.approx(float((a - b).abs().max()))
    cosines = torch.cosine_similarity(a, b, dim=-1, eps=0.0)
    assert found.cosines / found.rows == pytest.approx(float(cosines.mean()))
    assert found.cosine_min == pytest.approx(min(1.0, float(cosines.min())))


def test_chunks_do_not_show(monkeypatch):
    a, b = torch.randn(2, 40, 50), torch.randn(2, 40, 50)
    whole = difference(a, b)
    monkeypatch.setattr("ftc.graph.drift._CHUNK", 100)
    parts = difference(a, b)
    assert parts.relative == pytest.approx(whole.relative)
    assert parts.cosines == pytest.approx(whole.cosines)
    assert (parts.rows, parts.max_abs) == (whole.rows, whole.max_abs)


def test_equal_infinities_and_nans_agree():
    a = torch.tensor([[1.0, float("inf"), float("nan")]])
    assert difference(a, a.clone()).relative == 0
    for other in ([1.0, 2.0, float("nan")], [1.0, float("inf"), 3.0], [1.0, -float("inf"), 0.0]):
        assert not difference(a, torch.tensor([other])).is_rounding


def test_a_nan_is_never_rounding():
    assert not difference(torch.ones(3, 3), torch.full((3, 3), float("nan"))).is_rounding


def test_one_wrong_element_does_not_hide():
    a = torch.randn(1000, 1000)
    b = a.clone()
    b[3, 4] += 0.005
    found = difference(a, b)
    assert found.relative < 1e-5
    assert not found.is_rounding


def test_zeros_and_nothing():
    assert difference(torch.zeros(2, 3), torch.zeros(2, 3)).is_rounding
    assert difference(torch.zeros(2, 3), torch.ones(2, 3)).relative == float("inf")
    assert difference(torch.zeros(0, 3), torch.zeros(0, 3)).is_rounding
    assert difference(torch.tensor(2.0), torch.tensor(2.0)).is_rounding


def scaled(program: Program, target: object, by: float, at: int = 0) -> Program:
    """A clone in which the ``at``-th call of ``target`` is multiplied by ``by``."""
    clone = program.clone()
    rw = Rewriter(clone, "scaled")
    node = [n for n in clone.graph.nodes if n.target is target][at]
    with rw.at(node):
        same = rw.call(node.target, *node.args, **node.kwargs)
        new = rw.call(aten.mul.Tensor, same, by)
    rw.replace(node, new)
    rw.finish()
    return clone


def test_a_program_does_not_drift_from_its_clone():
    program = tiny("bert")
    drift = measure_drift(program, program.clone(), program.signature.probe())
    assert (drift.relative, drift.max_abs) == (0, 0)
    assert drift.cosine_min == pytest.approx(1)


class Padded(nn.Module):
    """What is at padded positions differs with the parameter; elsewhere nothing does."""

    def __init__(self):
        super().__init__()
        self.noise = nn.Parameter(torch.ones(1))

    def forward(self, x, mask):
        shown = mask.unsqueeze(-1).float()
        return x.unsqueeze(-1) * shown + (1 - shown) * self.noise


def test_padded_positions_do_not_count():
    ids = torch.arange(2, 14).view(2, 6)
    program = custom(Padded(), x=ids, mask=torch.ones_like(ids))
    probe = program.signature.probe(batch=3, sequence=8)
    assert (probe["mask"] == 0).any()
    assert program.signature.inputs[1].role == "mask"
    other = program.clone()
    Rewriter(other, "x").set_tensor("noise", torch.full((1,), 5.0))
    with torch.no_grad():
        assert not torch.equal(*program(probe).values(), *other(probe).values())
    assert measure_drift(program, other, probe).relative == 0


@pytest.mark.parametrize("at", [0, 1])
def test_the_first_node_that_parts_is_found(at):
    program = tiny("llama")
    broken = scaled(program, aten.silu.default, 1.01, at)
    step = locate(program, broken, program.signature.probe())
    silus = [n for n in program.graph.nodes if n.target is aten.silu.default]
    assert step is not None
    assert step.node.name in {user.name for user in silus[at].users}
    assert [n.target for n in step.made] == [aten.silu.default, aten.mul.Tensor]
    assert "made by scaled" in str(step)


def test_nothing_parts_in_a_clone():
    program = tiny("gpt2")
    assert locate(program, program.clone(), program.signature.probe()) is None


def test_the_last_node_is_compared_through_its_output():
    program = tiny("mlp")
    broken = scaled(program, aten.linear.default, 1.1, at=1)
    step = locate(program, broken, program.signature.probe())
    assert step is not None
    assert step.node is broken.graph.output_node().args[0][0]


def test_the_worst_jump_is_the_larger_of_two():
    program = tiny("llama")
    small_then_large = scaled(scaled(program, aten.silu.default, 1.001), aten.silu.default, 2.0, 1)
    probe = program.signature.probe()
    step = worst_jump(program, small_then_large, probe)
    first = locate(program, small_then_large, probe)
    assert step.node is not first.node
    assert step.jump == max(s.jump for s in trace(program, small_then_large, probe))
