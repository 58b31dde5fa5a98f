"""Cleanup: what does nothing goes, repeats are computed once; freeze: who learns."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ftc.graph.drift import measure_drift
from ftc.graph.mode import set_mode
from ftc.passes.cleanup import Cleanup
from ftc.passes.freeze import Freeze
from ftc.tests.tiny import custom, tiny

aten = torch.ops.aten


class Body(nn.Module):
    """``relu`` of the form under test, so that something is left of it."""

    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, x):
        return torch.relu(self.body(torch.relu(x)))


def cleaned(body):
    """``(before, result, operators left between the two relus)`` for ``x [batch, 4, 4]``."""
    before = custom(Body(body), x=torch.randn(3, 4, 4))
    result = Cleanup()(before)
    probe = before.signature.probe(batch=5)
    assert measure_drift(before, result.program, probe).max_abs == 0
    assert Cleanup()(result.program).modified == 0
    calls = [n.target for n in result.program.graph.nodes if n.op == "call_function"]
    return before, result, [c for c in calls if c is not aten.relu.default]


NOTHING = {
    "slice": lambda x: x[:, :, 0:],
    "to": lambda x: x.to(torch.float32),
    "to-device": lambda x: x.to("cpu"),
    "view": lambda x: x.view(-1, 4, 4),
    "reshape": lambda x: x.reshape(x.shape),
    "expand": lambda x: x.expand(-1, 4, 4),
    "permute": lambda x: x.permute(0, 1, 2),
    "transpose": lambda x: x.transpose(1, 1),
    "clone": lambda x: x.clone(),
    "add": lambda x: x + 0,
    "sub": lambda x: x - 0.0,
    "mul": lambda x: x * 1,
    "div": lambda x: x / 1.0,
    "pow": lambda x: x**1,
    "chain": lambda x: (x.transpose(1, 2).transpose(1, 1) * 1 + 0).transpose(1, 2)[:] * 1,
    "no-dropout": lambda x: nn.functional.dropout(x, 0.0),
}
SOMETHING = {
    "slice": lambda x: x.narrow(1, 1, 2),
    "to": lambda x: x.to(torch.float64),
    "permute": lambda x: x.permute(0, 2, 1),
    "transpose": lambda x: x.transpose(1, 2),
    "add": lambda x: x + 1,
    "mul": lambda x: x * 0,
    "rsub": lambda x: 0 - x,
    "dropout": lambda x: nn.functional.dropout(x, 0.5),
    "detach": lambda x: x.detach() + x,
    "reshape": lambda x: x.reshape(-1, 16),
    "integer-division": lambda x: x.to(torch.int64) / 1,
}


@pytest.mark.parametrize("name", sorted(NOTHING))
def test_what_does_nothing_goes(name):
    _, result, left = cleaned(NOTHING[name])
    assert result.modified > 0
    assert set(left) <= {aten.transpose.int}  # the chain transposes, for it to be undone


@pytest.mark.parametrize("name", sorted(SOMETHING))
def test_what_does_something_stays(name):
    before, result, _ = cleaned(SOMETHING[name])
    assert result.modified == 0
    assert result.program.module is before.module


def test_contiguous_stays_where_a_view_needs_it():
    _, result, left = cleaned(lambda x: x.transpose(1, 2).contiguous().unsqueeze(0).view(-1, 16))
    assert aten.contiguous.default in left
    assert result.modified == 0


def test_contiguous_goes_where_only_values_matter():
    _, _, left = cleaned(lambda x: x.transpose(1, 2).contiguous() + 1)
    assert aten.contiguous.default not in left


def test_repeats_are_computed_once():
    _, result, left = cleaned(lambda x: torch.sin(x + 1) * torch.sin(x + 1) + torch.cos(x + 1))
    assert left.count(aten.sin.default) == left.count(aten.cos.default) == 1
    assert left.count(aten.add.Tensor) == 2
    assert any("repeated" in note for note in result.record.notes)


def test_constants_of_another_type_are_another_constant():
    _, _, left = cleaned(lambda x: (x.to(torch.int64) * 2).sum() + (x.to(torch.int64) * 2.0).sum())
    assert left.count(aten.mul.Tensor) == 2


def test_random_values_are_never_shared():
    def body(x):
        return x + torch.rand_like(x) + torch.rand_like(x)

    before = custom(Body(body), x=torch.randn(3, 4, 4))
    after = Cleanup()(before).program
    count = [n.target for n in after.graph.nodes].count(aten.rand_like.default)
    assert count == 2


def test_two_dropouts_stay_two():
    def body(x):
        return nn.functional.dropout(x, 0.5) + nn.functional.dropout(x, 0.5)

    _, _, left = cleaned(body)
    assert left.count(aten.dropout.default) == 2


def test_nodes_of_different_stages_stay_apart():
    program = custom(Body(lambda x: torch.sin(x) + torch.sin(x)), x=torch.randn(3, 4, 4))
    sines = [n for n in program.graph.nodes if n.target is aten.sin.default]
    sines[1].meta["custom"] = {"stage": 1}
    assert Cleanup()(program).modified == 0


def test_dead_code_goes():
    program = custom(Body(lambda x: x + 2), x=torch.randn(3, 4, 4))
    add = next(n for n in program.graph.nodes if n.target is aten.add.Tensor)
    with program.graph.inserting_after(add):
        dead = program.graph.call_function(aten.sin.default, (add,))
        dead.meta = dict(add.meta)
    result = Cleanup()(program)
    assert result.modified == 1
    assert aten.sin.default not in [n.target for n in result.program.graph.nodes]


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "t5", "xlnet", "vit", "cnn"])
def test_families_shrink_and_train_as_before(name):
    """Outputs and, with dropout off, every gradient stay the same."""
    before = tiny(name)
    result = Cleanup()(before)
    nodes = [len(p.graph.nodes) for p in (before, result.program)]
    assert nodes[1] == nodes[0] - result.modified
    probe = before.signature.probe()
    for program in (before, result.program):
        sum(out.float().square().sum() for out in program(probe).values()).backward()
    grads = [dict(p.module.named_parameters()) for p in (before, result.program)]
    for parameter, given in grads[0].items():
        if given.grad is not None:
            torch.testing.assert_close(grads[1][parameter].grad, given.grad)


def test_dropout_can_be_switched_on_again():
    before = tiny("bert")
    after = Cleanup()(before).program
    switched = [set_mode(p.module, training=True) for p in (before, after)]
    assert switched[0] == switched[1] > 0


def test_time_is_linear():
    """Nodes that go grow with the layers, one for one."""
    two, twelve = (Cleanup()(tiny(name)).modified for name in ("llama", "llama-12"))
    per_layer = (twelve - two) / 10
    assert per_layer == int(per_layer)
    assert 0 < two - 2 * per_layer < two


@pytest.mark.parametrize(
    ("train", "expected"), [("all", True), ("none", False), ("product", None), ("bias", None)]
)
def test_freeze_sets_who_learns(train, expected):
    before = tiny("bert")
    flags = {n: p.requires_grad for n, p in before.module.named_parameters()}
    result = Freeze(train=train)(before)
    after = {n: p.requires_grad for n, p in result.program.module.named_parameters()}
    assert {n: p.requires_grad for n, p in before.module.named_parameters()} == flags
    if expected is None:
        assert 0 < sum(after.values()) < len(after)
    else:
        assert set(after.values()) == {expected}
    trained = sum(p.numel() for p in result.program.module.parameters() if p.requires_grad)
    assert f"{trained:,} of" in result.record.notes[0]
    assert Freeze(train=train)(result.program).modified == 0


def test_only_what_learns_gets_a_gradient():
    program = Freeze(train="bias")(tiny("mlp")).program
    program(program.signature.probe())["output"].sum().backward()
    assert {n for n, p in program.module.named_parameters() if p.grad is not None} == {
        "hidden.bias", "out.bias",
    }  # fmt: skip


def test_a_tied_weight_learns_under_either_name():
    program = tiny("llama")
    (tie,) = program.ties
    (read,) = tie & {n for n, _ in program.module.named_parameters()}
    for name in tie:
        frozen = Freeze(train=name)(program).program
        assert [n for n, p in frozen.module.named_parameters() if p.requires_grad] == [read]
