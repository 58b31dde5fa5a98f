"""Smooth: exact, structural, and worth it before int8."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ftc.graph.capture import capture_module
from ftc.graph.errors import UsageError
from ftc.graph.program import Program
from ftc.passes.base import Context
from ftc.passes.channels import find_groups
from ftc.passes.pipeline import Pipeline
from ftc.passes.smooth import Smooth

from .tiny import WIDTH
from .tiny import tiny as program


class Outliers(nn.Module):
    """A norm whose gain makes some channels fifty times larger, before two products."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(32)
        self.a, self.b = nn.Linear(32, 48), nn.Linear(32, 48)
        self.out = nn.Linear(48, 8)
        with torch.no_grad():
            self.norm.weight[::8] *= 50
            self.a.weight[:, ::8] /= 50
            self.b.weight[:, ::8] /= 50

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return self.out(torch.relu(self.a(y)) * torch.relu(self.b(y)))


def _outliers() -> Program:
    torch.manual_seed(0)
    return capture_module(Outliers(), torch.randn(4, 6, 32))


def _run(text: str, given: Program) -> Program:
    return Pipeline.parse(text).run(given, Context.for_program(given)).program


def test_finds_norms_gates_and_values_by_structure() -> None:
    canonical = _run("cleanup,canonicalize", program("llama"))
    sources = {s for group in find_groups(canonical) for s in group.sources}
    layer = "model.layers.0."
    assert {layer + "input_layernorm.weight", layer + "post_attention_layernorm.weight",
            layer + "mlp.up_proj.weight", layer + "self_attn.v_proj.weight"} <= sources  # fmt: skip
    assert not any("embed" in s or "lm_head" in s for s in sources)


def test_a_norm_that_the_residual_reads_too_is_left_alone() -> None:
    canonical = _run("cleanup,canonicalize", program("bert"))
    sources = {s for group in find_groups(canonical) for s in group.sources}
    assert not any("LayerNorm" in s for s in sources)


@pytest.mark.parametrize("name", ["llama", "bert", "gpt2", "cohere"])
def test_outputs_stay_and_weights_move(name: str) -> None:
    given = program(name)
    smooth = _run("smooth", given)
    record = smooth.history[-1]
    assert record.drift is not None and record.drift.relative < 1e-5
    assert record.modified > 0


def test_a_second_run_finds_nothing_to_do() -> None:
    once = _run("smooth", _outliers())
    assert _run("smooth", once).history[-1].modified == 0


def test_int8_gains_from_it() -> None:
    given = _outliers()
    with_smooth, without = (
        _run("smooth,int8{min_size=1}", given),
        _run("smooth{alpha=none},int8{min_size=1}", given),
    )
    probe = given.signature.probe(seed=5, batch=16)
    want = given(probe)["output"].detach()

    def error(p: Program) -> float:
        return float((p(probe)["output"].detach() - want).norm() / want.norm())

    assert error(with_smooth) < 0.5 * error(without)


def test_a_channel_the_data_never_used_is_not_bet_on() -> None:
    """The first channel of a ReLU is asleep on the probes, and awake later."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8))
    with torch.no_grad():
        model[0].weight[0], model[0].bias[0] = 0.0, -0.1
        model[0].weight[0, 0] = 1.0
    program = capture_module(model, {"input": torch.randn(4, 32)})
    asleep = {"input": torch.randn(8, 32).clamp(max=0.0)}
    context = Context(probes=(asleep,), probe_source="one channel asleep")
    small = Pipeline.parse("int8{min_size=1}").run(program, context).program
    awake = {"input": torch.randn(8, 32).abs()}
    with torch.no_grad():
        want, got = program(awake)["output"], small(awake)["output"]
    assert (got - want).norm() < 0.05 * want.norm()


def test_alpha_out_of_range_is_refused() -> None:
    with pytest.raises(UsageError, match="alpha lies in"):
        Smooth(alpha=1.5)


def test_grouped_heads_share_one_scale() -> None:
    canonical = _run("cleanup,canonicalize", program("llama"))
    groups = [g for g in find_groups(canonical) if g.repeat is not None]
    assert groups and all(g.repeat[0] == 2 * g.repeat[1] for g in groups)  # type: ignore[index]
    assert all(g.repeat[0] * g.repeat[2] == WIDTH for g in groups)  # type: ignore[index]
