"""Each invariant holds for captured programs, and breaking it is noticed by its own rule."""

from __future__ import annotations

import operator
import time
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn

from ftc.graph import quantized_ops  # noqa: F401  (registers the operators)
from ftc.graph.errors import VerifyError
from ftc.graph.program import Program, attach, detach
from ftc.graph.rewriter import Rewriter
from ftc.graph.rules import RULES
from ftc.graph.shapes import VAL
from ftc.graph.signature import OutputSpec
from ftc.graph.verify import verify
from ftc.tests.tiny import MODELS, tiny

aten = torch.ops.aten
Breaking = Callable[[Program], Program | None]


@pytest.mark.parametrize("model", sorted(MODELS))
def test_a_captured_program_keeps_every_rule(model):
    verify(tiny(model))


def test_a_program_without_fake_values_keeps_the_others():
    program = tiny("bert")
    for node in program.graph.nodes:
        node.meta.pop(VAL, None)
    verify(program)


def _node(program: Program, target=aten.relu.default):
    return next(n for n in program.graph.nodes if n.target is target)


def _kinds(program):
    node = _node(program)
    with program.graph.inserting_after(node):
        program.graph.call_method("abs", (node,))


def _order(program):
    relu = _node(program)
    relu.prepend(relu.next)


def _single_output(program):
    program.graph.erase_node(program.graph.output_node())


def _input_name(program):
    first = replace(program.signature.inputs[0], name="other")
    return replace(program, signature=replace(program.signature, inputs=(first,)))


def _input_dtype(program):
    first = replace(program.signature.inputs[0], dtype=torch.float16)
    return replace(program, signature=replace(program.signature, inputs=(first,)))


def _output_count(program):
    extra = OutputSpec("extra", torch.float32, ("batch", 4))
    outputs = (*program.signature.outputs, extra)
    return replace(program, signature=replace(program.signature, outputs=outputs))


def _output_size(program):
    outputs = (OutputSpec("output", torch.float32, ("batch", 5)),)
    return replace(program, signature=replace(program.signature, outputs=outputs))


def _tensor_gone(program):
    detach(program.module, "hidden.weight")


def _tensor_idle(program):
    attach(program.module, "idle", torch.zeros(3))


def _python_call(program):
    node = _node(program)
    node.target = print


def _in_place(program):
    _node(program).target = aten.relu_.default


def _literal(program):
    node = _node(program)
    node.args = (*node.args, torch.zeros(2))


def _no_provenance(program):
    del _node(program).meta["provenance"]


def _no_fake(program):
    del _node(program).meta[VAL]


def _tensor_type(program):
    detach(program.module, "hidden.weight")
    attach(program.module, "hidden.weight", nn.Parameter(torch.zeros(16, 9)))


def _integer_parameter(program):
    detach(program.module, "hidden.weight")
    weight = nn.Parameter(torch.zeros(16, 8, dtype=torch.int8), requires_grad=False)
    attach(program.module, "hidden.weight", weight)
    for node in program.graph.nodes:
        if node.target == "hidden.weight":
            node.meta[VAL] = node.meta[VAL].to(torch.int8)


def _tie(program):
    return replace(program, ties=(frozenset({"gone", "away"}),))


BREAKING: dict[str, list[Breaking]] = {
    "kinds": [_kinds],
    "order": [_order],
    "single-output": [_single_output],
    "inputs": [_input_name, _input_dtype],
    "outputs": [_output_count, _output_size],
    "tensors-exist": [_tensor_gone],
    "tensors-read": [_tensor_idle],
    "operators": [_python_call],
    "functional": [_in_place],
    "literals": [_literal],
    "provenance": [_no_provenance],
    "fakes": [_no_fake],
    "fakes-of-tensors": [_tensor_type],
    "dtypes": [_integer_parameter],
    "ties": [_tie],
}
CASES = [(rule, how) for rule, ways in BREAKING.items() for how in ways]


@pytest.mark.parametrize(("rule", "break_it"), CASES, ids=[f"{r}-{h.__name__}" for r, h in CASES])
def test_a_broken_rule_is_named_with_a_fix(rule, break_it):
    program = tiny("mlp")
    broken = break_it(program) or program
    with pytest.raises(VerifyError) as caught:
        verify(broken)
    assert caught.value.what.startswith(f"rule {rule}: ")
    assert caught.value.fix
    assert caught.value.exit_code == 1


def test_every_rule_has_a_sentence_and_a_way_to_break_it():
    names = [rule.__name__.replace("_", "-") for rule in RULES]
    assert len(set(names)) == len(names)
    assert set(names) == {*BREAKING, "quantized"}
    for rule in RULES:
        assert rule.__doc__ and rule.__doc__.count("\n") == 0


def test_the_message_shows_node_and_module():
    program = tiny("mlp")
    _in_place(program)
    with pytest.raises(VerifyError) as caught:
        verify(program)
    assert "node relu" in str(caught.value)


def _quantized(**changes) -> Program:
    """A multilayer perceptron with one quantized product, and something wrong with it."""
    program = tiny("mlp")
    rw = Rewriter(program, "test")
    node = _node(program, aten.linear.default)
    out, width = 16, 8
    dtype = changes.get("dtype", torch.int8)
    rw.remove_tensor("hidden.weight")
    with rw.at(node):
        data = rw.add_buffer("w.quantized", torch.ones(out, width, dtype=dtype))
        scale = rw.add_buffer("w.scale", torch.ones(changes.get("scale", (out, 1))))
        zero = None
        if "zero" in changes:
            zero = rw.add_buffer("w.zero_point", torch.zeros(changes["zero"], dtype=torch.int8))
        new = rw.call(torch.ops.ftc.quantized_linear.default, node.args[0], data, scale, zero,
                      node.args[2], 8, 0, "row")  # fmt: skip
        rw.replace(node, new)
    rw.finish()
    bits, groups = changes.get("bits", 8), changes.get("group_size", 0)
    new.args = (*new.args[:5], bits, groups, changes.get("activation", "row"))
    return program


def test_a_quantized_program_keeps_every_rule():
    verify(_quantized())
    verify(_quantized(zero=(16, 1)))
    verify(_quantized(group_size=4, scale=(16, 2)))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"bits": 3}, "bits=3"),
        ({"activation": "column"}, "activation='column'"),
        ({"dtype": torch.int32}, "not 8-bit integers"),
        ({"bits": 4}, "torch.uint8 at bits=4"),
        ({"bits": 4, "dtype": torch.uint8, "group_size": 4}, "a scale that is"),
        ({"group_size": 3}, "group_size=3"),
        ({"group_size": 4}, "a scale that is"),
        ({"scale": (16, 2)}, "a scale that is"),
        ({"zero": (16, 2)}, "a zero point of shape"),
    ],
)
def test_a_quantized_weight_that_does_not_fit(changes, problem):
    with pytest.raises(VerifyError, match="rule quantized") as caught:
        verify(_quantized(**changes))
    assert problem in str(caught.value)


def test_arithmetic_on_sizes_is_allowed():
    targets = {n.target for n in tiny("xlnet").graph.nodes if n.op == "call_function"}
    assert operator.mul in targets


def test_time_is_linear_in_layers():
    seconds = []
    for model in ("llama", "llama-12"):
        program = tiny(model)
        verify(program)
        start = time.process_time()
        for _ in range(5):
            verify(program)
        seconds.append((time.process_time() - start) / 5 / len(program.graph.nodes))
    assert seconds[1] < 3 * seconds[0] + 1e-4
