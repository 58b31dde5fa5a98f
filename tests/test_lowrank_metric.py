"""lowrank: what a cut is judged by, and the statistics of it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ftc.graph import fisher
from ftc.graph.fisher import moments
from ftc.graph.observe import observe
from ftc.graph.pieces import pieces, positions, windows
from ftc.graph.products import products
from ftc.graph.spectrum import damped_outputs, damped_root, spectrum
from ftc.passes.pipeline import Pipeline
from ftc.tests.tiny import canonical, custom, data, tiny


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 9), st.integers(2, 9), st.data())
def test_no_weight_of_the_rank_is_better_in_the_metric(out, width, drawn):
    """Neither the plain truncation nor a neighbour of the best one."""
    torch.manual_seed(out * 10 + width)
    rank = drawn.draw(st.integers(1, min(out, width)))
    weight = torch.randn(out, width, dtype=torch.float64)
    left, right = (
        damped_root(x @ x.T, 0.01) for x in (torch.randn(out, 12), torch.randn(width, 9))
    )

    def loss(a: torch.Tensor, b: torch.Tensor) -> float:
        return float((left.T @ (weight - b @ a) @ right).square().sum())

    found = spectrum(weight, left, right)
    a, b = found.factors(rank)
    best = loss(a, b)
    assert best == pytest.approx(float(found.tails[rank]), abs=1e-5, rel=1e-4)
    assert best <= loss(*spectrum(weight).factors(rank)) + 1e-5
    assert best <= loss(a + 0.01 * torch.randn_like(a), b) + 1e-5


@pytest.mark.parametrize("left", [None, torch.rand(4, dtype=torch.float64) + 1])
def test_a_product_that_narrows_is_judged_by_its_outputs(left):
    """As by its inputs, damped alike; and inputs of zeros are the identity there too."""
    torch.manual_seed(0)
    weight, x = torch.randn(4, 7, dtype=torch.float64), torch.randn(7, 30, dtype=torch.float64)
    for gram in (x @ x.T, torch.zeros(7, 7, dtype=torch.float64)):
        level = float(gram.diagonal().mean())
        outputs = damped_outputs(weight @ gram @ weight.T, level, weight, 0.1)
        by_outputs = spectrum(weight, left, outputs=outputs)
        by_inputs = spectrum(weight, left, damped_root(gram, 0.1))
        torch.testing.assert_close(by_outputs.tails, by_inputs.tails)
        (a, b), (c, d) = by_outputs.factors(2), by_inputs.factors(2)
        torch.testing.assert_close(b @ a, d @ c, rtol=1e-5, atol=1e-5)


def test_a_singular_gram_is_damped_and_zeros_are_the_identity():
    row = torch.randn(1, 6)
    assert torch.linalg.cond(damped_root(row.T @ row, 1e-3)) < 1e4
    assert torch.equal(damped_root(torch.zeros(4, 4), 0.1), torch.eye(4, dtype=torch.float64))


def test_moments_predict_the_error_of_a_linear_program():
    """Of one product the second order is all there is: the squared relative error."""
    torch.manual_seed(0)
    model = nn.Linear(6, 5)
    model.bias.data += 20  # outputs of one length: the metric's halves are independent
    program = custom(model, input=torch.randn(4, 6))
    program = Pipeline.parse("canonicalize").run(program).program
    (product,) = products(program)
    inputs = [program.signature.probe(seed=1, batch=4000)]
    found = moments(program, inputs, [product.node])
    change = 0.01 * torch.randn(5, 6)
    f, g = found.gradients[product.node], found.inputs[product.x]
    predicted = torch.trace(f @ change @ g @ change.T)
    before = program(inputs[0])["output"].detach()
    moved = inputs[0]["input"] @ change.T
    actual = (moved.square().sum(1) / before.square().sum(1)).mean()
    assert float(predicted) == pytest.approx(float(actual), rel=0.1)


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2"])
def test_moments_change_nothing_and_reach_every_product(name):
    program = canonical(name)
    before = {n: (t.clone(), t.requires_grad) for n, t in program.tensors()}
    nodes = [product.node for product in products(program)]
    found = moments(program, data(program), nodes, random_share=0.3)
    again = moments(program, data(program), nodes, random_share=0.3)
    assert all(torch.equal(found.gradients[n], again.gradients[n]) for n in nodes)
    for tensor_name, tensor in program.tensors():
        assert torch.equal(tensor, before[tensor_name][0])
        assert tensor.requires_grad == before[tensor_name][1] and tensor.grad is None


def test_inputs_in_pieces_have_the_moments_of_the_whole(monkeypatch):
    """And only a part of them is run backward."""
    program = canonical("llama")
    nodes = [product.node for product in products(program)]
    given = data(program)
    whole = moments(program, given, nodes, gradients=False)
    assert not whole.gradients
    monkeypatch.setattr(fisher, "_AT_ONCE", 24)
    monkeypatch.setattr(fisher, "_BACKWARD", 60)
    split = moments(program, given, nodes)
    assert set(split.gradients) == set(nodes)
    for node, gram in whole.inputs.items():
        torch.testing.assert_close(split.inputs[node], gram, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["bert", "llama", "mlp"])
def test_moments_of_outputs_are_what_the_inputs_moments_make_of_them(name):
    """Of outputs without their bias, run backward or not."""
    program = canonical(name)
    found = {product.node: product for product in products(program)}
    given = data(program)
    whole = moments(program, given, found, gradients=False)
    thin = moments(program, given, found, by_outputs=found)
    assert not thin.inputs and set(thin.outputs) == set(found)
    for node, product in found.items():
        weight, gram = program.tensor(product.weight).detach(), whole.inputs[product.x]
        torch.testing.assert_close(thin.outputs[node], weight @ gram @ weight.T,
                                   rtol=1e-3, atol=1e-5)  # fmt: skip
        assert thin.levels[product.x] == pytest.approx(float(gram.diagonal().mean()), rel=1e-4)


def test_pieces_hold_every_row_once():
    signature = tiny("bert").signature
    given = signature.probe(seed=1, batch=7, sequence=5)
    parts = pieces(signature, [given, given], 10)
    assert [len(part["input_ids"]) for part in parts] == [2, 2, 2, 1] * 2
    assert torch.equal(torch.cat([p["input_ids"] for p in parts[:4]]), given["input_ids"])
    assert positions(signature, given) == 35
    assert len(pieces(signature, [given], 1)) == 7  # one row at least


def test_windows_hold_every_token_once_but_none_that_a_mask_hides():
    signature = tiny("bert").signature
    given = {**signature.probe(seed=1, batch=2, sequence=8)}
    given["attention_mask"] = torch.ones(2, 8, dtype=torch.int64)
    assert windows(signature, given, 8)[0] is given
    cut = windows(signature, given, 3)
    assert torch.equal(torch.cat([w["input_ids"] for w in cut], 1), given["input_ids"])
    given["attention_mask"][1, 5:] = 0
    assert [w["input_ids"].shape[1] for w in windows(signature, given, 3)] == [3, 3]


def test_nothing_is_computed_behind_the_last_watched_node():
    program = canonical("llama")
    first, *_ = products(program)
    ran: list[str] = []
    seen = torch.fx.Interpreter.run_node
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.fx.Interpreter, "run_node",
                      lambda self, n: (ran.append(n.name), seen(self, n))[1])  # fmt: skip
        observe(program, data(program, 1), {first.node: lambda value: None})
    assert ran[-1] == first.node.name and len(ran) < len(program.graph.nodes)
