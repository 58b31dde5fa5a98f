"""Patterns: what matches, what does not, and why not."""

from __future__ import annotations

import pytest
import torch
from torch import fx

from ftc.graph.structure.match import (
    Match,
    Miss,
    any_,
    capture,
    commutative,
    const,
    find,
    match,
    op,
    skipping,
    sole,
    tensor,
)

aten = torch.ops.aten


@pytest.fixture
def graph() -> dict[str, fx.Node]:
    """``out = relu((x * x + 1) * w)``, with a cast on the way."""
    g = fx.Graph()
    x = g.placeholder("x")
    w = g.get_attr("w")
    square = g.call_function(aten.mul.Tensor, (x, x))
    shifted = g.call_function(aten.add.Tensor, (square, 1))
    cast = g.call_function(aten.to.dtype, (shifted, torch.float32))
    scaled = g.call_function(aten.mul.Tensor, (cast, w))
    out = g.call_function(aten.relu.default, (scaled,))
    g.output((out, square))
    return {n.name: n for n in g.nodes} | {"square": square, "scaled": scaled, "out": out}


def test_captures_and_nodes_of_a_match(graph):
    pattern = op("aten.relu", op("aten.mul", capture("y"), tensor("weight")))
    found = match(pattern, graph["out"])
    assert isinstance(found, Match)
    assert found["weight"] is graph["w"]
    assert found["y"].target is aten.to.dtype
    assert found.nodes == (graph["out"], graph["scaled"])
    assert found.get("missing", 7) == 7


def test_commutative_tries_both_orders_and_a_plain_operator_one(graph):
    weighted = (tensor("weight"), any_)
    assert not match(op("aten.mul", *weighted), graph["scaled"])
    assert match(commutative("aten.mul", *weighted), graph["scaled"])


def test_a_name_captured_twice_is_one_value(graph):
    twice = op("aten.mul", capture("x"), capture("x"))
    assert match(twice, graph["square"])
    missed = match(twice, graph["scaled"])
    assert isinstance(missed, Miss)
    assert "here and" in missed.reason


def test_backtracking_undoes_captures(graph):
    """The first alternative binds ``x`` to the wrong side before it fails."""
    inner = op("aten.add", capture("square"), const(1))
    pattern = commutative("aten.mul", capture("w", tensor()), skipping("aten.to", inner))
    found = match(pattern, graph["scaled"])
    assert isinstance(found, Match)
    assert found["w"] is graph["w"]
    assert found["square"] is graph["square"]


def test_skipping_passes_none_or_many(graph):
    shifted = op("aten.add", any_, const(1))
    cast = graph["scaled"].args[0]
    assert match(skipping("aten.to", shifted), cast)
    assert match(skipping("aten.to", shifted), cast.args[0])
    assert not match(shifted, cast)


def test_alternatives_and_overloads(graph):
    either = op("aten.gelu", any_) | op("aten.relu", any_)
    assert match(either, graph["out"])
    assert match(op("aten.relu.default", any_), graph["out"])
    assert not match(op("aten.mul.Scalar", any_, any_), graph["square"])


def test_sole_refuses_a_value_with_other_readers(graph):
    pattern = op("aten.add", sole(op("aten.mul", any_, any_)), const(1))
    missed = match(pattern, graph["scaled"].args[0].args[0])
    assert isinstance(missed, Miss)
    assert "2 readers" in missed.reason


def test_options_are_found_by_name_with_their_default(graph):
    shifted = graph["scaled"].args[0].args[0]
    assert match(op("aten.add", alpha=const(1)), shifted)
    assert not match(op("aten.add", alpha=const(2)), shifted)


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        (op("aten.gelu", any_), "calls aten.relu where aten.gelu was expected"),
        (op("aten.relu", op("aten.mul", op("aten.neg", any_), any_)), "aten.neg was expected"),
        (op("aten.relu", const(1)), "computed where a constant was expected"),
        (op("aten.relu", any_, any_), "has only 1 arguments"),
    ],
)
def test_a_miss_says_why(graph, pattern, reason):
    missed = match(pattern, graph["out"])
    assert isinstance(missed, Miss)
    assert not missed
    assert reason in missed.reason
    assert missed.node is not None and f"node {missed.node.name}" in str(missed)


def test_the_miss_that_got_furthest_is_kept(graph):
    near = op(
        "aten.relu", op("aten.mul", skipping("aten.to", op("aten.add", any_, const(2))), any_)
    )
    missed = match(op("aten.gelu", any_) | near | op("aten.tanh", any_), graph["out"])
    assert isinstance(missed, Miss)
    assert missed.reason == "the constant is 1, not 2"


def test_numbers_are_not_booleans():
    assert match(const(1), 1.0)
    assert not match(const(1), True)


def test_find_yields_every_place(graph):
    nodes = list(graph["out"].graph.nodes)
    places = [node for node, _ in find(op("aten.mul", any_, any_), nodes)]
    assert places == [graph["square"], graph["scaled"]]
