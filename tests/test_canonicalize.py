"""Every form of a product becomes linear; what cannot is left and said."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ftc.graph.drift import measure_drift
from ftc.graph.products import products
from ftc.passes.canonicalize import Canonicalize
from ftc.tests.tiny import custom, tiny

aten = torch.ops.aten
OTHER_FORMS = {
    aten.mm.default, aten.addmm.default, aten.matmul.default, aten.bmm.default,
    aten.einsum.default,
}  # fmt: skip


def weight(*shape):
    return nn.Parameter(torch.randn(*shape) / 4)


class Form(nn.Module):
    """``forward`` is the form under test; ``w [6, 8]``, ``b [6]``, ``x [batch, 5, 8]``."""

    def __init__(self, forward, *shape):
        super().__init__()
        self.w, self.b = weight(*shape or (6, 8)), weight(6)
        self.form = forward

    def forward(self, x):
        return self.form(self, x)


FORMS = {
    "linear": lambda m, x: nn.functional.linear(x, m.w, m.b),
    "matmul-t": lambda m, x: x @ m.w.t(),
    "matmul-T": lambda m, x: x @ m.w.T + m.b,
    "matmul-mT": lambda m, x: m.b + x @ m.w.mT,
    "matmul-permute": lambda m, x: x @ m.w.permute(1, 0),
    "bmm": lambda m, x: torch.bmm(x, m.w.t().unsqueeze(0).expand(x.shape[0], -1, -1)),
    "matmul-unsqueezed": lambda m, x: x @ m.w.t().unsqueeze(0),
    "left": lambda m, x: (m.w @ x.transpose(1, 2)).transpose(1, 2),
    "mm-of-rows": lambda m, x: torch.mm(x[0], m.w.t()),
    "addmm-of-rows": lambda m, x: torch.addmm(m.b, x[0], m.w.t()),
    "einsum": lambda m, x: torch.einsum("bsi,oi->bso", x, m.w),
    "einsum-implicit": lambda m, x: torch.einsum("abi,zi", x, m.w),
    "einsum-ellipsis": lambda m, x: torch.einsum("...i,oi->...o", x, m.w) + m.b,
    "einsum-weight-first": lambda m, x: torch.einsum("oi,bsi->sob", m.w, x),
    "linear-of-transposed": lambda m, x: nn.functional.linear(
        nn.functional.linear(x, m.w), m.w.t()
    ),
}
STORED_ANEW = {
    "matmul": (lambda m, x: x @ m.w, (8, 6)),
    "matmul-bias": (lambda m, x: x @ m.w + m.b, (8, 6)),
    "conv1d": (
        lambda m, x: torch.addmm(m.b, x.view(-1, 8), m.w).view(x.shape[0], x.shape[1], 6),
        (8, 6),
    ),
    "twice": (lambda m, x: (x @ m.w) + (x.flip(1) @ m.w), (8, 6)),
    "heads": (lambda m, x: torch.einsum("bsh,hnd->bsnd", x, m.w), (8, 2, 3)),
    "heads-turned": (lambda m, x: torch.einsum("bsh,hnd->nbds", x, m.w), (8, 2, 3)),
    "merge": (lambda m, x: torch.einsum("bsnd,hnd->bsh", x.view(-1, 5, 4, 2), m.w), (6, 4, 2)),
    "merge-turned": (
        lambda m, x: torch.einsum("bsnd,dhn->hbs", x.view(-1, 5, 4, 2), m.w), (2, 6, 4),
    ),
    "then-viewed": (lambda m, x: torch.einsum("bsh,hnd->nbsd", x, m.w).reshape(2, -1), (8, 2, 3)),
}  # fmt: skip
SAME_STORE = set(FORMS) - {"linear-of-transposed"}


def canonical(module):
    torch.manual_seed(0)
    before = custom(module, x=torch.randn(3, 5, 8))
    return before, Canonicalize()(before)


def check(before, result):
    """Agrees at other sizes, keeps names and storage sizes, and a second run has nothing to do."""
    after = result.program
    probe = before.signature.probe(seed=5, batch=4)
    assert measure_drift(before, after, probe).relative <= 1e-6
    assert {n for n, _ in before.tensors()} == {n for n, _ in after.tensors()}
    assert not OTHER_FORMS & {n.target for n in after.graph.nodes}
    assert Canonicalize()(after).modified == 0


@pytest.mark.parametrize("name", sorted(SAME_STORE))
def test_a_weight_that_is_out_by_in_is_read_as_it_is(name):
    before, result = canonical(Form(FORMS[name]))
    check(before, result)
    assert [p.weight for p in products(result.program)] == ["w"]
    assert result.program.tensor("w").data_ptr() == before.tensor("w").data_ptr()
    assert result.program.tensor("w").shape == (6, 8)


@pytest.mark.parametrize("name", sorted(STORED_ANEW))
def test_another_layout_is_stored_anew(name):
    form, shape = STORED_ANEW[name]
    before, result = canonical(Form(form, *shape))
    check(before, result)
    found = list(products(result.program))
    assert {p.weight for p in found} == {"w"}
    for product in found:
        stored = result.program.tensor("w")
        assert stored.dim() == 2
        assert product.node.meta["val"].shape[-1] == stored.shape[0]
    assert before.tensor("w").shape == shape  # the program before is as it was
    assert any("1 weight stored anew" in note for note in result.record.notes)


def test_products_that_read_each_other_directly():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.v, self.w, self.b = weight(8, 4, 2), weight(8, 8), weight(8)

        def forward(self, x):
            x = torch.addmm(self.b, x.view(-1, 8), self.w).view(-1, 5, 8)
            return torch.einsum("bsi,inh->bsnh", x, self.v)

    before, result = canonical(Two())
    probe = before.signature.probe(batch=4)
    assert measure_drift(before, result.program, probe).relative <= 1e-6
    chain = custom(
        nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)), input=torch.randn(3, 8)
    )
    assert sum(1 for _ in products(Canonicalize()(chain).program)) == 3


def test_a_chain_of_transposed_matrices():
    class Chain(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = weight(8, 7), weight(7, 6), weight(6, 5)

        def forward(self, x):
            return x @ self.a @ self.b @ self.c

    before, result = canonical(Chain())
    check(before, result)
    assert sum(1 for _ in products(result.program)) == 3


@pytest.mark.parametrize("name", ["matmul-T", "matmul-mT", "einsum-ellipsis"])
def test_a_bias_that_is_added_is_taken_in(name):
    _, result = canonical(Form(FORMS[name]))
    assert [p.bias for p in products(result.program)] == ["b"]


def test_a_transposed_matrix_costs_no_memory():
    form, shape = STORED_ANEW["matmul"]
    before, result = canonical(Form(form, *shape))
    assert result.program.tensor("w").data_ptr() == before.tensor("w").data_ptr()


def test_the_views_around_rows_go():
    form, shape = STORED_ANEW["conv1d"]
    _, result = canonical(Form(form, *shape))
    calls = [n.target for n in result.program.graph.nodes if n.op == "call_function"]
    assert aten.view.default not in calls


def test_gradients_are_those_of_the_model():
    form, shape = STORED_ANEW["heads"]
    before, result = canonical(Form(form, *shape))
    probe = before.signature.probe()
    for program in (before, result.program):
        program(probe)["output"].square().sum().backward()
    expected = before.tensor("w").grad.permute(1, 2, 0).reshape(6, 8)
    torch.testing.assert_close(result.program.tensor("w").grad, expected)


LEFT = {
    "experts": (lambda m, x: torch.bmm(x.transpose(0, 1), m.w), (5, 8, 6), "batch dimension"),
    "expert-einsum": (
        lambda m, x: torch.einsum("bsi,sio->bso", x, m.w), (5, 8, 6), "batch dimension",
    ),
    "two-layouts": (lambda m, x: (x @ m.w) @ m.w.t(), (8, 6), "two layouts"),
    "two-einsum-layouts": (
        lambda m, x: torch.einsum("bsi,ino->bsno", x, m.w).flatten(2)
        + torch.einsum("bso,ino->bsni", x[..., :3], m.w).flatten(2)[..., :6],
        (8, 2, 3), "two layouts",
    ),
    "other-reader": (lambda m, x: (x @ m.w) + m.w.sum(), (8, 6), "others read"),
    "vector": (lambda m, x: x @ m.w, (8,), "vector"),
    "scaled": (
        lambda m, x: torch.addmm(m.b, x[0], m.w, alpha=2.0), (8, 6), "scales its summands",
    ),
    "outer": (lambda m, x: torch.einsum("bsi,o->bsio", x, m.w), (6,), "not a product"),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(LEFT))
def test_what_cannot_be_is_left_and_said(name):
    form, shape, reason = LEFT[name]
    before, result = canonical(Form(form, *shape))
    assert any(reason in note and note.startswith("left ") for note in result.record.notes)
    assert torch.equal(result.program.tensor("w"), before.tensor("w"))


def test_an_embedding_that_is_also_the_head_stays_one_tensor():
    before = tiny("gpt2")
    result = Canonicalize()(before)
    assert result.program.ties == before.ties
    heads = [p for p in products(result.program) if p.weight in next(iter(before.ties))]
    assert len(heads) == 1


@pytest.mark.parametrize(("name", "count"), [("gpt2", 9), ("xlnet", 14), ("written", 7)])
def test_families_become_linear(name, count):
    before = tiny(name)
    after = Canonicalize()(before).program
    assert sum(1 for _ in products(after)) == count


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_any_einsum_of_a_value_and_a_weight(data):
    """Random indices: kept, contracted and out, in any order on each side."""
    kept = data.draw(st.sampled_from(["", "s", "st"]))
    inner = data.draw(st.sampled_from(["i", "ij"]))
    outer = data.draw(st.sampled_from(["o", "op"]))
    rest = "".join(data.draw(st.permutations(kept + inner)))
    of_weight = "".join(data.draw(st.permutations(inner + outer)))
    result = "".join(data.draw(st.permutations("b" + kept + outer)))
    sizes = dict(zip("stijop", (3, 2, 4, 5, 6, 7), strict=True))
    first = data.draw(st.booleans())
    equation = f"{of_weight},b{rest}->{result}" if first else f"b{rest},{of_weight}->{result}"

    def form(m, x):
        return torch.einsum(equation, *((m.w, x) if first else (x, m.w)))

    module = Form(form, *(sizes[i] for i in of_weight))
    before = custom(module, x=torch.randn(2, *(sizes[i] for i in rest)))
    check(before, Canonicalize()(before))
