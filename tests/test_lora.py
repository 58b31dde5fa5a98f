"""LoRA: nothing changes at first, only adapters learn, and the adapted graph is the one that ships.

What holds of every pass is in test_contract.py.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ftc.graph.adapters import adapter_parameters, lora_adapters
from ftc.graph.bundle import load_bundle, save_bundle
from ftc.graph.drift import measure_drift
from ftc.graph.errors import FtcError, PreconditionError, UsageError
from ftc.graph.mode import set_mode
from ftc.graph.program import Program
from ftc.graph.structure import find_structure
from ftc.passes.lora import Lora
from ftc.passes.pipeline import Pipeline
from ftc.passes.text import parse_pass
from ftc.runtime.lower import lower
from ftc.runtime.parity import parity
from ftc.runtime.session import OnnxSession
from ftc.tests.tiny import Cnn, custom, tiny

aten = torch.ops.aten
BASES = {  # passes before the adapters
    "float": "canonicalize",
    "lowrank": "lowrank{rank=3}",
    "int8": "int8{min_size=0}",
    "int4": "int4{min_size=0,group_size=16,activation=none}",
}


def run(passes: str, model: str) -> Program:
    return Pipeline.parse(passes).run(tiny(model)).program


def randomize(program: Program, seed: int = 0) -> Program:
    """A copy whose adapters are as if they had been trained."""
    program = program.clone()
    generator = torch.Generator().manual_seed(seed)
    for name in adapter_parameters(program):
        tensor = program.tensor(name)
        tensor.data = torch.randn(tensor.shape, generator=generator) / 4
    return program


def drift(a: Program, b: Program) -> float:
    return measure_drift(a, b, a.signature.probe(seed=5)).relative


@pytest.mark.parametrize("model", ["bert", "llama", "gpt2", "albert", "xlnet", "t5", "vit"])
def test_nothing_changes_at_first_and_everything_can_afterwards(model: str) -> None:
    before = run("canonicalize", model)
    after = Lora(target="product", dropout=0.1, also="none")(before).program
    assert drift(before, after) < 1e-9  # XLNet's products take another path for other strides
    assert drift(before, randomize(after)) > 1e-3


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("model", ["bert", "llama"])
def test_gradients_reach_the_adapters_alone(base: str, model: str) -> None:
    program = randomize(run(f"{BASES[base]},lora{{rank=4,target=attention|ffn}}", model))
    program.module.zero_grad()
    outputs = program(program.signature.probe())
    next(iter(outputs.values())).square().mean().backward()
    reached = {n for n, p in program.module.named_parameters() if p.grad is not None}
    assert reached == set(adapter_parameters(program))
    # the pooler's position is one of many, and a key's bias-like part cancels in the softmax
    assert all(program.tensor(n).grad.abs().sum() > 0 for n in reached)


@settings(max_examples=25, deadline=None)
@given(
    rank=st.integers(1, 20),
    alpha=st.floats(0.01, 1e4, allow_subnormal=False),
    dropout=st.floats(0, 0.99),
)
def test_it_computes_the_paper_s_equation(rank: int, alpha: float, dropout: float) -> None:
    given_pass = Lora(rank, alpha, dropout, "product")
    assert parse_pass(given_pass.spec) == given_pass
    before = tiny("mlp")
    program = randomize(Pipeline((given_pass,)).run(before).program)
    scale, h = alpha / rank, before.signature.probe()["x"]
    x = h
    for name in ("hidden", "out"):
        w, b = before.tensor(f"{name}.weight"), before.tensor(f"{name}.bias")
        a, up = (program.tensor(f"{name}.weight_lora_{which}") for which in "AB")
        h = h @ w.T + b + scale * (h @ a.T) @ up.T
        h = torch.relu(h) if name == "hidden" else h
    torch.testing.assert_close(
        next(iter(program(x=x).values())), h, rtol=1e-4, atol=1e-4 * max(1, scale)
    )


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("model", ["bert", "llama", "gpt2"])
def test_the_adapted_graph_ships(base: str, model: str, tmp_path: Path) -> None:
    """Saved, loaded and lowered with trained adapters: the outputs stay what they are."""
    program = randomize(run(f"{BASES[base]},lora{{rank=4,dropout=0.1}}", model))
    again = load_bundle(save_bundle(program, tmp_path / "bundle"))
    assert drift(program, again) == 0
    trained = {n for n, p in again.module.named_parameters() if p.requires_grad}
    assert trained == set(adapter_parameters(program))
    assert [a.weight for a in lora_adapters(again)] == [a.weight for a in lora_adapters(program)]
    parity(again, OnnxSession(lower(again)), [again.signature.probe(seed=i) for i in range(2)])


@pytest.mark.parametrize("base", ["float", "int8"])
def test_an_adapter_is_four_small_steps(base: str) -> None:
    """Two thin products, the factor between them, and one addition; nothing else is wide."""
    before = run(BASES[base], "bert")
    after = Pipeline.parse("lora{target=ffn}").run(before).program
    kinds = [
        Counter(str(n.target) for n in p.graph.nodes if n.op == "call_function")
        for p in (before, after)
    ]
    count = len(lora_adapters(after))
    added = {"aten.linear.default": 2, "aten.mul.Tensor": 1, "aten.add.Tensor": 1}
    assert count == 4
    assert kinds[1] - kinds[0] == Counter({k: v * count for k, v in added.items()})
    for each in lora_adapters(after):
        (thin,) = (n for n in after.graph.nodes if n.target is aten.mul.Tensor and _feeds(n, each))
        assert thin.meta["val"].shape[-1] == 8


def test_no_factor_where_it_is_1() -> None:
    with_it, without = (run(f"lora{{rank=4,alpha={alpha}}}", "bert") for alpha in (8, 4))
    assert all(a.scale == 1 for a in lora_adapters(without))
    muls = [sum(n.target is aten.mul.Tensor for n in p.graph.nodes) for p in (with_it, without)]
    assert muls[0] - muls[1] == len(lora_adapters(with_it))


def _feeds(node: Any, adapter: Any) -> bool:
    return any(adapter.total in user.users for user in node.users)


def test_adapters_of_one_input_share_its_dropout_which_the_mode_switches() -> None:
    program = randomize(run("lora{dropout=0.5}", "bert"))
    plain = randomize(run("lora", "bert"))
    assert drift(plain, program) == 0
    (q, k, v) = lora_adapters(program)[:3]
    assert q.dropout == k.dropout == v.dropout == 0.5
    dropouts = [
        n for n in program.graph.nodes if n.target is aten.dropout.default and n.args[1] == 0.5
    ]
    assert len(dropouts) == 2 * 2  # for each layer: what q, k and v read, and what the output reads
    set_mode(program.module, training=True)
    program.module.recompile()
    assert drift(plain, program) > 1e-3
    set_mode(program.module, training=False)
    program.module.recompile()
    assert drift(plain, program) == 0


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("model", ["bert", "llama", "gpt2"])
def test_blocks_are_still_found(base: str, model: str) -> None:
    before = run(BASES[base], model)
    after = Pipeline.parse("lora{target=product,dropout=0.1}").run(before).program
    old, new = find_structure(before), find_structure(after)
    adapters = new.roles["adapter"]
    assert adapters == set(adapter_parameters(after))
    for role in ("attention", "ffn", "norm", "embedding", "head", "product", "bias"):
        assert new.roles[role] - adapters == old.roles[role], role
    assert len(new.layers) == len(old.layers)
    for core, layer in zip(old.cores, new.layers, strict=True):
        assert core.names < layer.names
    for one, other in zip(old.cores, new.cores, strict=True):
        assert (one.heads, one.kv_heads, one.head_dim) == (
            other.heads, other.kv_heads, other.head_dim,
        )  # fmt: skip
    assert len(old.feed_forwards) == len(new.feed_forwards)


def test_passes_that_shrink_products_leave_adapters_alone() -> None:
    """QPiSSA's order: the adapter takes the large part, the rest is quantized."""
    program = run("lora{init=pissa,rank=4,target=attention|ffn},int8{min_size=0}", "bert")
    held = dict(program.tensors())
    assert all(name in held for name in adapter_parameters(program))
    assert len(adapter_parameters(program)) == 2 * 12
    assert drift(tiny("bert"), program) < 0.05


def test_the_same_adapter_again_is_the_one_that_is_there() -> None:
    once = run("lora{target=ffn}", "bert")
    again = Pipeline.parse("lora{target=ffn}").run(once)
    assert again.records[-1].modified == 0
    more = Pipeline.parse("lora{target=ffn|attention}").run(once).program
    assert len(lora_adapters(more)) == 12
    assert all(more.tensor(n).requires_grad for n in adapter_parameters(more))
    with pytest.raises(PreconditionError, match="has an adapter already") as caught:
        Pipeline.parse("lora{target=ffn,rank=2}").run(once)
    assert "merge" in str(caught.value.fix)


@pytest.mark.parametrize(
    ("spec", "model", "words"),
    [
        ("lora{target=norm}", "bert", ("norm", "attention (8)", "ffn (4)")),
        ("lora{target=encoder.layr.*}", "bert", ("matches no weight", "encoder.layer")),
        ("lora", "mlp", ("attention", "product (2)")),
        ("lora{target=*embed*}", "bert", ("none of the", "product (13)")),
    ],
)
def test_a_target_that_means_no_product_is_refused(
    spec: str, model: str, words: tuple[str, ...]
) -> None:
    with pytest.raises(UsageError) as caught:
        Pipeline.parse(spec).run(tiny(model))
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "options",
    ["rank=0", "rank=-1", "alpha=0", "alpha=inf", "alpha=nan", "dropout=1", "dropout=-0.1"],
)
def test_impossible_options_are_refused(options: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_pass(f"lora{{{options}}}")
    assert caught.value.fix


def test_experts_are_left_and_said() -> None:
    result = Pipeline.parse("lora{target=product}").run(tiny("mixtral"))
    assert any("experts" in note for note in result.records[-1].notes)


@pytest.mark.parametrize("alpha", [4, 12])
def test_a_convolution_has_an_adapter_too(alpha: int) -> None:
    torch.manual_seed(0)
    program = custom(Cnn(), x=torch.randn(2, 3, 8, 8))
    after = Pipeline.parse(f"lora{{target=product,rank=4,alpha={alpha}}}").run(program).program
    assert drift(program, after) == 0
    after = randomize(after)
    assert len(lora_adapters(after)) == 3
    merged = program.clone()
    with torch.no_grad():
        for each in lora_adapters(after):
            a, b = after.tensor(each.a), after.tensor(each.b)
            delta = (b.flatten(1) @ a.flatten(1)).view_as(program.tensor(each.weight))
            weight = program.tensor(each.weight) + alpha / 4 * delta
            merged.tensor(each.weight).data = weight
    assert drift(merged, after) < 1e-5
    parity(after, OnnxSession(lower(after)), [after.signature.probe(seed=1)])


def test_int4_s_extra_columns_are_not_adapted() -> None:
    """Codes that keep a grid of fractional zero points read means of groups behind their input."""
    torch.manual_seed(0)
    layer = nn.Linear(64, 48)
    codes = torch.randint(0, 16, (48, 4, 16)).float()
    codes[..., 0], codes[..., 1] = 0, 15
    steps = torch.rand(48, 4, 1).half().float() + 0.5
    layer.weight.data = (codes * steps - torch.rand(48, 4, 1).half().float()).flatten(1)
    program = custom(nn.Sequential(layer), input=torch.randn(3, 64))
    program = Pipeline.parse("int4{min_size=0,group_size=16,activation=none}").run(program).program
    assert program.tensor("0.weight.quantized").shape[1] * 2 > 64
    after = Pipeline.parse("lora{target=product}").run(program).program
    assert after.tensor("0.weight_lora_A").shape == (8, 64)


def test_grouped_convolutions_are_left() -> None:
    model = nn.Sequential(nn.Conv1d(4, 8, 3, groups=2), nn.Conv1d(8, 6, 1))
    result = Pipeline.parse("lora{target=conv}").run(custom(model, input=torch.randn(2, 4, 9)))
    assert [a.weight for a in lora_adapters(result.program)] == ["1.weight"]
    assert any("grouped" in note for note in result.records[-1].notes)


def test_a_tied_head_has_an_adapter_that_the_table_does_not_see() -> None:
    before = run("canonicalize", "llama")
    after = randomize(Lora(target="head")(before).program)
    (adapter,) = lora_adapters(after)
    assert adapter.weight in find_structure(after).roles["embedding"]
    assert drift(before, after) > 1e-3
    with pytest.raises(PreconditionError, match="reads"):
        Lora(target="head", init="pissa")(before)


# PiSSA


@pytest.mark.parametrize("model", ["bert", "llama", "gpt2", "albert"])
@pytest.mark.parametrize("base", ["float", "lowrank"])
def test_pissa_moves_the_largest_singular_values(model: str, base: str) -> None:
    before = run(BASES[base], model)
    after = Lora(rank=2, alpha=6, init="pissa")(before).program
    assert drift(before, after) < 1e-5
    assert lora_adapters(after)
    for each in lora_adapters(after):
        moved = 3 * after.tensor(each.b).double() @ after.tensor(each.a).double()
        whole, left = (_weight(p, each.weight).double() for p in (before, after))
        values = torch.linalg.svdvals(whole)
        assert torch.allclose(torch.linalg.svdvals(moved)[:2], values[:2], atol=1e-5)
        assert torch.allclose(torch.linalg.svdvals(left)[:-2], values[2:], atol=1e-5)
        assert torch.allclose(moved + left, whole, atol=1e-6)


def _weight(program: Program, name: str) -> torch.Tensor:
    held = dict(program.tensors())
    if name in held:
        return held[name].detach()
    return (held[f"{name}.B"] @ held[f"{name}.A"]).detach()


@pytest.mark.parametrize(
    ("passes", "words"),
    [
        ("int8{min_size=0},lora{init=pissa}", "lora{init=pissa},int8{min_size=0}"),
        ("lora{init=pissa,rank=17}", "rank <= 16"),
        ("lowrank{rank=3},lora{init=pissa,rank=3}", "rank < 3"),
    ],
)
def test_pissa_says_what_it_cannot(passes: str, words: str) -> None:
    with pytest.raises(FtcError) as caught:
        run(passes, "bert")
    assert words in str(caught.value.fix)


# What else trains


def test_the_head_of_a_classifier_trains_too(tmp_path: Path) -> None:
    from ftc.graph.sources import capture
    from ftc.tests.small import encoder

    program = capture(encoder(tmp_path, "BertForSequenceClassification", num_labels=3))
    result = Pipeline.parse("lora{rank=2}").run(program)
    assert _others(result.program) == {"classifier.weight", "classifier.bias"}
    assert any("classifier" in note for note in result.records[-1].notes)
    assert not _others(Pipeline.parse("lora{also=none}").run(program).program)
    whole = Pipeline.parse("lora{target=product}").run(program).program
    assert "classifier.weight" not in {a.weight for a in lora_adapters(whole)}
    norms = Pipeline.parse("lora{also=norm}").run(program).program
    assert _others(norms) == find_structure(program).roles["norm"]


def _others(program: Program) -> set[str]:
    trained = {n for n, p in program.module.named_parameters() if p.requires_grad}
    return trained - set(adapter_parameters(program))
