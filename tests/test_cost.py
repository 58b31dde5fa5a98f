"""Costs are arithmetic on shapes: checked by counting, by scaling, by torch's own counter."""

from __future__ import annotations

import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from ftc.graph import quantized_ops  # noqa: F401  (registers the operators)
from ftc.graph.cost import NodeCost, by_module, cost, formula, operations
from ftc.graph.errors import UsageError
from ftc.graph.quantize import Scheme, choose_qparams, quantize
from ftc.graph.rewriter import Rewriter
from ftc.graph.shapes import VAL
from ftc.graph.structure import find_structure
from ftc.graph.symbols import DimensionNames
from ftc.tests.tiny import WIDTH, custom, tiny

aten = torch.ops.aten
PRODUCTS = ("linear", "addmm", "mm", "bmm", "matmul", "einsum", "conv")


@pytest.mark.parametrize("model", ["bert", "gpt2", "llama", "t5", "cnn", "mlp", "vit"])
def test_parameters_and_bytes_are_counted_once(model):
    program = tiny(model)
    priced = cost(program)
    assert priced.parameters == sum(p.numel() for p in program.module.parameters())
    assert priced.bytes == sum(t.numel() * t.element_size() for _, t in program.tensors())


@pytest.mark.parametrize("model", ["bert", "bert-eager", "gpt2", "llama", "cnn", "xlnet"])
def test_products_agree_with_torch(model):
    """torch counts two operations for each multiply-add, and none of fused attention on a CPU."""
    program = tiny(model)
    priced = cost(program)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        program(program.signature.probe(**priced.sizes))
    ours = sum(
        each.operations for node, each in priced.nodes.items()
        if any(kind in str(node.target) for kind in PRODUCTS)
    )  # fmt: skip
    assert 2 * ours == counter.get_total_flops()


@settings(max_examples=10, deadline=None)
@given(batch=st.integers(1, 64), sequence=st.integers(2, 32))
def test_operations_scale_with_the_inputs(batch, sequence):
    """Linear in the batch up to what has no batch; quadratic at most in the sequence."""
    program = tiny("bert")
    one, many = (cost(program, batch=b, sequence=sequence) for b in (1, batch))
    assert one.operations <= many.operations <= batch * one.operations
    longer = cost(program, batch=batch, sequence=min(2 * sequence, 32))
    assert many.operations <= longer.operations <= 4 * many.operations


def test_a_product_costs_rows_times_weights():
    program = tiny("mlp")
    priced = cost(program, batch=7)
    weights = sum(p.numel() for p in program.module.parameters() if p.dim() == 2)
    linear = [c for n, c in priced.nodes.items() if n.target is aten.linear.default]
    assert sum(c.operations for c in linear) == 7 * weights
    assert priced.sizes == {"batch": 7}


def test_attention_costs_what_its_two_products_cost():
    fused, written = (cost(tiny(m), batch=3, sequence=9) for m in ("bert", "bert-eager"))
    (attention, *_), heads, size = (
        [c for n, c in fused.nodes.items() if "attention" in str(n.target)], 2, WIDTH // 2,
    )  # fmt: skip
    products = [c.operations for n, c in written.nodes.items() if "matmul" in str(n.target)]
    assert attention.operations == products[0] + products[1] == 3 * heads * 2 * 9 * 9 * size


def test_a_quantized_weight_counts_its_codes_and_a_quarter_of_the_bytes():
    program = tiny("bert")
    before = cost(program)
    weights = []
    rw, scheme = Rewriter(program, "test"), Scheme()
    for node, product in find_structure(program).products.items():
        weight = program.tensor(product.weight).detach()
        weights.append(weight)
        scale, zero = choose_qparams(weight, scheme)
        rw.remove_tensor(product.weight)
        with rw.at(node):
            codes = quantize(weight, scale, zero, scheme)
            data = rw.add_buffer(f"{product.weight}.quantized", codes)
            steps = rw.add_buffer(f"{product.weight}.scale", scale)
            args = (node.args[0], data, steps, None, node.args[2], 8, 0, "row")
            rw.replace(node, rw.call(torch.ops.ftc.quantized_linear.default, *args))
    rw.finish()
    after = cost(program)
    assert after.parameters == before.parameters
    assert after.operations == before.operations
    saved = sum(3 * w.numel() - 4 * w.shape[0] for w in weights)
    assert after.bytes == before.bytes - saved


def test_tied_names_and_shared_layers_count_once():
    llama = tiny("llama")
    tied = llama.tensor("lm_head.weight").numel()
    readers = [n for n, c in cost(llama).nodes.items() if c.parameters == tied]
    assert len(readers) == 1
    assert cost(tiny("albert")).parameters < cost(tiny("bert")).parameters


def test_a_view_makes_nothing_and_moving_costs_no_operations():
    for node in tiny("bert").graph.nodes:
        if node.target in (aten.transpose.int, aten.view.default):
            assert node not in cost(tiny("bert")).nodes
    program = tiny("bert")
    for node, each in cost(program).nodes.items():
        if node.target is aten.embedding.default:
            assert each.operations == 0 < each.activation_bytes


def test_modules_share_the_cost_out():
    priced = cost(tiny("bert"))
    for depth in (1, 2, 3):
        total = sum(by_module(priced, depth).values(), NodeCost())
        whole = (priced.parameters, priced.bytes, priced.operations, priced.activation_bytes)
        assert (total.parameters, total.bytes, total.operations, total.activation_bytes) == whole
    layers = by_module(priced, 3)
    assert layers["encoder.layer.0"] == layers["encoder.layer.1"]


def test_a_program_without_fake_values_gets_them():
    program = tiny("bert")
    expected = cost(program)
    for node in program.graph.nodes:
        node.meta.pop(VAL, None)
    again = cost(program)
    assert (again.operations, again.activation_bytes) == (
        expected.operations, expected.activation_bytes,
    )  # fmt: skip


def test_a_symbol_that_no_input_determines_is_named():
    class Pick(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x[x > 0] * 2

    priced = cost(custom(Pick(), x=torch.randn(4, 3)))
    assert len(priced.assumed) == 1
    assert not cost(tiny("bert")).assumed


def test_an_unknown_dimension_is_refused():
    with pytest.raises(UsageError, match="sequnce"):
        cost(tiny("bert"), sequnce=3)


def test_a_new_operator_is_one_line():
    program = tiny("mlp")
    node = next(n for n in program.graph.nodes if n.target is aten.relu.default)
    before = cost(program).nodes[node].operations

    @formula("aten.relu")
    def _relu(node, at):
        return 5 * at.numel(node)

    try:
        assert cost(program).nodes[node].operations == 5 * before
    finally:
        from ftc.graph.cost import _FORMULAS

        del _FORMULAS["aten.relu"]
    assert operations.__doc__


def test_sizes_are_printed_by_name():
    program = tiny("xlnet")
    names = DimensionNames(program)
    texts = {
        names.shape(node.meta[VAL].shape) for node in program.graph.nodes
        if isinstance(node.meta.get(VAL), torch.Tensor)
    }  # fmt: skip
    assert f"[sequence, batch, {WIDTH}]" in texts
    assert f"[2*sequence, batch, {WIDTH}]" in texts


def test_time_is_linear_in_layers():
    cost(tiny("llama-12"))
    seconds = []
    for model in ("llama", "llama-12"):
        program = tiny(model)
        start = time.process_time()
        for _ in range(5):
            cost(program)
        seconds.append((time.process_time() - start) / 5 / len(program.graph.nodes))
    assert seconds[1] < 3 * seconds[0] + 1e-4
