"""A cache in buffers: attention writes behind what is there, and gives what the graph gives."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ftc.graph.cache_inputs import pad_left
from ftc.graph.cached import states
from ftc.graph.program import Program
from ftc.graph.sources import capture
from ftc.passes.cache import Cache
from ftc.passes.pipeline import Pipeline
from ftc.runtime.engine import OnnxEngine
from ftc.runtime.evaluate import negative_log_likelihood
from ftc.runtime.lower import lower, save_onnx
from ftc.runtime.past import HandedOn, InPlace, past_of
from ftc.runtime.session import OnnxSession
from ftc.runtime.spoken import Spoken
from ftc.runtime.torch_engine import TorchEngine
from ftc.tests.families import Family, captured, family

FAMILIES = ["llama", "qwen3", "gpt2", "falcon-grouped", "falcon-alibi", "phi"]


@functools.cache
def cached(name: str) -> tuple[Program, OnnxSession]:
    program = Cache()(captured(name)[1]).program
    return program, OnnxSession(lower(program))


def rows_of(*lengths: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(sum(lengths))
    return [torch.randint(3, 99, (n,), generator=generator) for n in lengths]


def padded(rows):
    return pad_left([row.tolist() for row in rows])


def in_place(name: str) -> InPlace:
    program, session = cached(name)
    return InPlace(Spoken.of(program), session)


def in_pieces(past, rows, pieces):
    """Scores after each piece, of rows that have begun."""
    ids, mask = padded(rows)
    kept, start, found = None, 0, []
    for piece in pieces:
        end = start + piece
        scores, kept = past(ids[:, start:end], mask[:, :end], kept)
        found.append(scores[mask[:, end - 1] == 1].copy())
        start = end
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_every_attention_writes_in_place(name):
    program, session = cached(name)
    model = lower(program)
    grouped = [n for n in model.graph if n.op_type == "GroupQueryAttention"]
    assert len(grouped) == len(states(program.signature)) / 2
    assert session.in_place and not OnnxSession(lower(program, "standard")).in_place


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=4, deadline=None)
@given(data=st.data())
def test_in_buffers_or_handed_on_it_is_the_graph(name, data):
    """Three rows of different length in pieces, past where buffers are copied into longer ones."""
    program, session = cached(name)
    pieces = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=5))
    rows = rows_of(sum(pieces), max(1, sum(pieces) - 3), 1)
    with torch.no_grad():
        wanted = in_pieces(past_of(TorchEngine(program)), rows, pieces)
    handed = in_pieces(HandedOn(Spoken.of(program), session.run_held), rows, pieces)
    buffers = in_pieces(small(in_place(name)), rows, pieces)
    torch.testing.assert_close(handed, wanted, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(buffers, wanted, atol=1e-4, rtol=1e-4)


def small(past: InPlace) -> InPlace:
    """Its buffers get room for two tokens more than they need, of which nothing is known."""
    made = past._make_room

    def make_room(batch: int, total: int, kept: int) -> None:
        past._limit = total + 2
        made(batch, total, kept)
        for buffer in past._buffers.values():
            buffer[:, :, kept:] = np.nan

    past._make_room = make_room  # type: ignore[method-assign]
    return past


@functools.cache
def wide(model: str) -> Program:
    """One with heads that the operator turns: 16 wide."""
    small = {**family("llama").options, "num_attention_heads": 2, "num_key_value_heads": 1}
    with tempfile.TemporaryDirectory() as folder:
        Family(model, model, "causal-lm", small).save(Path(folder))
        return capture(folder)


def without_bias(program: Program, number: int) -> Program:
    """The product of that number, of those with a bias, has none."""
    program = program.clone()
    products = [n for n in program.graph.nodes if str(n.target) == "aten.linear.default"]
    biased = [n for n in products if len(n.args) == 3]
    biased[number].args = biased[number].args[:2]
    return program


PASSES = ["cache", "int8{min_size=0},cache", "int4{min_size=0,group_size=16},cache"]


@pytest.mark.parametrize("passes", PASSES)
def test_products_of_one_input_are_one_where_attention_takes_it(passes):
    """Also where one of them has no bias; tokens in pieces, beside a shorter row."""
    program = Pipeline.parse(passes).run(without_bias(wide("Qwen2ForCausalLM"), 1)).program
    model = lower(program)
    attentions = [n for n in model.graph if n.op_type == "GroupQueryAttention"]
    assert len(attentions) == 2 and not any(n.inputs[1] or n.inputs[2] for n in attentions)
    rows, session = rows_of(9, 5), OnnxSession(model)
    with torch.no_grad():
        wanted = in_pieces(past_of(TorchEngine(program)), rows, [6, 1, 2])
    got = in_pieces(small(InPlace(Spoken.of(program), session)), rows, [6, 1, 2])
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)


def test_products_with_different_groups_stay_apart():
    """Keys in float, queries and values at 4 bits: each is its own operator."""
    names = "*.q_proj.weight | *.v_proj.weight"
    passes = f'int4{{select="{names}",min_size=0,group_size=16}},cache'
    model = lower(Pipeline.parse(passes).run(wide("LlamaForCausalLM")).program)
    attentions = [n for n in model.graph if n.op_type == "GroupQueryAttention"]
    assert attentions and all(n.inputs[1] and n.inputs[2] for n in attentions)


def test_one_product_that_is_split_is_not_split():
    program, _ = cached("gpt2")
    assert "Split" not in [n.op_type for n in lower(program).graph]


def test_nothing_is_copied_between_tokens():
    past = in_place("llama")
    ids, mask = padded(rows_of(5))
    past(ids, mask, None)
    buffers = {name: array.ctypes.data for name, array in past._buffers.items()}
    for length in range(6, 40):
        past(ids[:, :1], np.ones((1, length), np.int64), past)
        now = {name: array.ctypes.data for name, array in past._buffers.items()}
        assert now == buffers


def test_room_ends_where_positions_end():
    past = in_place("gpt2")
    ids, mask = padded(rows_of(50))
    past(ids, mask, None)
    assert past._room == 64
    again = past(ids[:, :3], mask[:, :3], None)[0]  # shorter texts take the buffers as they are
    torch.testing.assert_close(again, in_place("gpt2")(ids[:, :3], mask[:, :3], None)[0])


def test_a_step_that_fails_leaves_the_past(monkeypatch):
    past, other = in_place("llama"), in_place("llama")
    (row,) = rows_of(9)
    ids, mask = row[None].numpy(), np.ones((1, 9), np.int64)
    for each in (past, other):
        each(ids[:, :6], mask[:, :6], None)
    run = past._binding.run

    def interrupted() -> None:
        run()
        raise KeyboardInterrupt

    monkeypatch.setattr(past._binding, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        past(np.full((1, 2), 7), mask[:, :8], past)
    monkeypatch.setattr(past._binding, "run", run)
    wanted = other(ids[:, 6:], mask, other)[0]
    torch.testing.assert_close(past(ids[:, 6:], mask, past)[0], wanted)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_perplexity_through_the_cache_is_that_of_the_whole(name):
    program, _ = cached(name)
    windows = [row.tolist() for row in rows_of(20, 20, 13)]
    whole = negative_log_likelihood(TorchEngine(captured(name)[1]), windows, None)
    through = negative_log_likelihood(TorchEngine(program), windows, None)
    assert through == pytest.approx(whole, rel=1e-5)
    with tempfile.TemporaryDirectory() as folder:
        save_onnx(lower(program), path := Path(folder) / "model.onnx")
        written = negative_log_likelihood(OnnxEngine(program, path, 1), windows, None)
    assert written == pytest.approx(whole, rel=1e-5)
