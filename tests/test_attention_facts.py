"""What an attention core says of itself, held against what the graph computes, over families."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx

from ftc.graph.program import Program
from ftc.graph.shapes import VAL
from ftc.graph.structure import AttentionCore, find_structure, head_rows
from ftc.passes.pipeline import Pipeline

from .families import captured

ROTARY = {"llama", "qwen2", "qwen3", "gemma2", "olmo2", "mistral", "phi", "gpt-neox", "falcon",
          "falcon-grouped", "modernbert", "mixtral"}  # fmt: skip
CAUSAL = {"gpt2", "opt", "llama", "qwen2", "qwen3", "gemma2", "olmo2", "mistral", "phi",
          "gpt-neox", "bloom", "falcon", "falcon-grouped", "falcon-alibi", "mixtral"}  # fmt: skip
ENCODERS = {"bert", "roberta", "distilbert", "albert", "electra", "mpnet", "modernbert",
            "deberta-v2", "t5-encoder", "vit"}  # fmt: skip
NAMES = sorted(CAUSAL | ENCODERS | {"t5", "swin"})
HEADS = {"llama": (4, 2), "qwen2": (4, 2), "qwen3": (4, 2), "gemma2": (4, 2), "olmo2": (4, 2),
         "mistral": (4, 2), "mixtral": (4, 2), "falcon": (4, 1), "falcon-grouped": (4, 2),
         "swin": (2, 2)}  # fmt: skip
TERMS = {"deberta-v2"}  # scores are sums of several products
MIXED = {"olmo2"}  # a norm over the whole width: every head depends on every row


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def values(program: Program, inputs: dict[str, Tensor]) -> dict[fx.Node, Any]:
    """The value of every node."""
    found: dict[fx.Node, Any] = {}

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            found[n] = super().run_node(n)
            return found[n]

    with torch.no_grad():
        Recorder(program.module).run(*program.signature.bind(inputs))
    return found


def apart(x: Tensor, heads: int) -> Tensor:
    """``[batch, heads, ...]`` where the heads are folded into the batch."""
    return x if x.dim() == 4 else x.unflatten(0, (-1, heads))


def recomputed(core: AttentionCore, value: dict[fx.Node, Any]) -> Tensor:
    """The attended values from the operands, masks and numbers that the core names."""
    sides = (apart(value[n], core.heads) for n in (core.query, core.key, core.value))
    query, key, operand = sides
    if key.shape[-1] != core.head_dim:
        key = key.transpose(-1, -2)
    assert core.scale
    scores = core.scale * query @ key.transpose(-1, -2)
    if core.cap:
        scores = core.cap * torch.tanh(scores / core.cap)
    for node, how in core.masks:
        mask = apart(value[node], core.heads)
        if how in ("keeps", "blocks"):
            scores = scores.masked_fill(~mask if how == "keeps" else mask, float("-inf"))
        else:
            scores = scores + mask if how == "added" else scores - mask
    return scores.softmax(-1).nan_to_num() @ operand


def test_the_facts_are_the_whole_attention(name: str) -> None:
    if name in TERMS:
        pytest.skip("further terms are in its scores")
    program = captured(name)[1]
    found = values(program, program.signature.probe(seed=3))
    cores = find_structure(program).cores
    assert cores
    for core in cores:
        attended = apart(found[core.node], core.heads)
        torch.testing.assert_close(recomputed(core, found), attended, atol=1e-5, rtol=1e-4)


def test_heads_and_turns(name: str) -> None:
    for core in find_structure(captured(name)[1]).cores:
        assert (core.heads, core.kv_heads) == HEADS.get(name, (4, 4))
        assert core.grouped_key.meta[VAL].shape[-3] in (core.kv_heads, core.heads) or (
            core.grouped_key.meta[VAL].dim() == 3
        )
        assert (core.rotary is not None) == (name in ROTARY)
        assert len(core.q) == len(core.k) == len(core.v) == len(core.out) == 1


@pytest.mark.parametrize("name", sorted(CAUSAL | ENCODERS - {"vit"}))
def test_a_causal_core_never_looks_ahead(name: str) -> None:
    """Another last token changes nothing before it where all cores say they are causal."""
    program = captured(name)[1]
    inputs = program.signature.probe(seed=5, batch=1, sequence=7)
    changed = {**inputs, "input_ids": inputs["input_ids"].clone()}
    changed["input_ids"][0, -1] = (changed["input_ids"][0, -1] + 7) % 90
    with torch.no_grad():
        before, after = (next(iter(program(i).values()))[0, :-1] for i in (inputs, changed))
    causal = {core.causal for core in find_structure(program).cores}
    assert causal == {name in CAUSAL}
    assert torch.allclose(before, after, atol=1e-6) == (name in CAUSAL)


def test_an_encoder_decoder_has_three_kinds_of_attention() -> None:
    cores = find_structure(captured("t5")[1]).cores
    assert [core.causal for core in cores] == [False, False, True, False, True, False]
    crossing = [core for core in cores if core.q[0].args[0] is not core.k[0].args[0]]
    assert crossing == [cores[3], cores[5]]


def canonical(name: str) -> Program:
    return Pipeline.parse("canonicalize").run(captured(name)[1]).program.clone()


def test_rows_of_a_head_make_that_head_alone(name: str) -> None:
    if name in MIXED:
        pytest.skip("a norm over all heads mixes them")
    program = canonical(name)
    structure = find_structure(program)
    core = structure.cores[0]
    rows = head_rows(program, core)
    inputs = program.signature.probe(seed=2)
    before = values(program, inputs)
    sides = [(core.q, rows.q, core.query), (core.k, rows.k, core.grouped_key),
             (core.v, rows.v, core.grouped_value)]  # fmt: skip
    for (product,), places, side in sides:
        assert places is not None
        last = len(places) - 1
        weight = program.tensor(structure.products[product].weight)
        kept = weight.detach().clone()
        weight.data[places[last]] *= 1.5
        changed = apart(values(program, inputs)[side] != before[side], core.heads)
        weight.data.copy_(kept)
        touched = changed.any(-1).any(-1).any(0).nonzero().flatten().tolist()
        repeated = changed.shape[1] // len(places)
        assert touched == list(range(last * repeated, (last + 1) * repeated))


def test_columns_of_a_head_take_that_head_alone(name: str) -> None:
    program = canonical(name)
    core = find_structure(program).cores[-1]
    columns = head_rows(program, core).out
    assert columns is not None
    (product,) = core.out
    found = values(program, program.signature.probe(seed=2))
    source = found[product.args[0]].flatten(0, -2)
    attended = found[core.node]
    head = apart(attended, core.heads)[:, 1]
    assert torch.equal(source[:, columns[1]], head.flatten(0, -2))


def test_every_layer_is_found(name: str) -> None:
    """One attention (two in a decoder that has an encoder) and one feed-forward block in each."""
    structure = find_structure(captured(name)[1])
    layers = [(len(x.cores), len(x.feed_forwards)) for x in structure.layers]
    assert layers == ([(1, 1)] * 2 + [(2, 1)] * 2 if name == "t5" else [(1, 1)] * 2)
    assert all(norm.names for norm in structure.norms)


def test_rows_are_none_where_two_products_feed_an_operand() -> None:
    from ftc.tests.tiny import tiny

    core = find_structure(program := tiny("xlnet")).cores[0]
    assert head_rows(program, core).q is None or len(core.q) == 1
