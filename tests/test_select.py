"""Selectors: set algebra, precedence, and what a wrong one is told."""

from __future__ import annotations

import functools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftc.graph.errors import UsageError
from ftc.graph.program import Program
from ftc.graph.select import ATOMS, check_selector, select
from ftc.graph.structure import Structure, find_structure
from ftc.tests.tiny import LAYERS, tiny


@functools.cache
def _bert() -> tuple[Program, Structure]:
    program = tiny("bert")
    return program, find_structure(program)


def chosen(text: str) -> frozenset[str]:
    """The selection, empty where it is refused for matching nothing."""
    try:
        return select(text, *_bert())
    except UsageError as error:
        assert "matches no weight" in error.what, error
        return frozenset()


ATOM = st.sampled_from(
    ["all", "ffn", "attention", "embedding", "norm", "head", "bias", "product", "layer[0]",
     "layer[0:2]", "layer[-1]", "encoder.layer.0.*", "*.weight", "'*.bias'", "*[qk]*y.weight"]
)  # fmt: skip
EXPRESSION = st.recursive(
    ATOM,
    lambda inner: st.builds(
        "({} {} {})".format, inner, st.sampled_from(["|", "&", "-"]), inner
    ),
    max_leaves=6,
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(a=EXPRESSION, b=EXPRESSION, c=EXPRESSION)
def test_selectors_are_a_set_algebra(a, b, c):
    sets = {name: chosen(text) for name, text in (("a", a), ("b", b), ("c", c))}
    whole = _bert()[1].parameters
    assert chosen(f"{a} | {b}") == sets["a"] | sets["b"] == chosen(f"{b} | {a}")
    assert chosen(f"{a} & {b}") == sets["a"] & sets["b"] == chosen(f"{b} & {a}")
    assert chosen(f"{a} - {b}") == sets["a"] - sets["b"]
    assert chosen(f"{a} - {b} - {c}") == (sets["a"] - sets["b"]) - sets["c"]
    assert chosen(f"{a} - {b} | {c}") == (sets["a"] - sets["b"]) | sets["c"]
    assert chosen(f"{a} | {b} & {c}") == sets["a"] | (sets["b"] & sets["c"])
    assert chosen(f"all - ({a} | {b})") == chosen(f"(all - {a}) & (all - {b})")
    assert sets["a"] <= whole


def test_roles_are_what_structure_says():
    structure = _bert()[1]
    for role, names in structure.roles.items():
        assert chosen(role) == names
    assert chosen("all") == structure.parameters


def test_layers_count_from_either_end():
    assert chosen("layer[0:]") == chosen(f"layer[0:{LAYERS}]") == chosen("layer[:]")
    assert chosen("layer[0]") == chosen("layer[:1]") == chosen(f"layer[-{LAYERS}]")
    assert chosen("layer[0]").isdisjoint(chosen("layer[-1]"))


def test_globs_and_quotes():
    names = chosen("encoder.layer.[0-1].output.dense.*")
    assert len(names) == 2 * LAYERS
    assert chosen('"encoder.layer.[0-1].output.dense.*"') == names
    assert chosen("encoder.layer.?.output.dense.weight") == {n for n in names if "weight" in n}


def test_a_tied_weight_goes_by_any_of_its_names():
    program = tiny("llama")
    (tied,) = program.ties
    assert len({select(name, program) for name in tied}) == 1


def test_minus_inside_a_name_is_a_character():
    with pytest.raises(UsageError, match=r"'q-proj\.weight' matches no weight"):
        select("q-proj.weight", *_bert())
    with pytest.raises(UsageError, match="expected an operator"):
        select("product -head", *_bert())


@pytest.mark.parametrize("text", ["product - head", "product -(head)", "product - 'pooler*'"])
def test_minus_with_a_space_is_an_operator(text):
    assert chosen(text) == chosen("product") - chosen("pooler.*")


@pytest.mark.parametrize(
    ("text", "caret"),
    [
        ("", 0),
        ("ffn |", 5),
        ("ffn | | norm", 6),
        ("(ffn & norm", 0),
        ("ffn norm", 4),
        ("ffn )", 4),
        ("ffn & layer[x]", 6),
        ("layer[]", 0),
        ('ffn | "open', 6),
    ],
)
def test_a_wrong_selector_is_shown_with_a_caret(text, caret):
    with pytest.raises(UsageError) as caught:
        select(text, *_bert())
    assert caught.value.where is not None
    shown, mark = caught.value.where.split("\n")
    assert shown == text
    assert mark.index("^") == caret + 2  # under the text as the error indents it
    assert caught.value.fix


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("atention", "attention"),
        ("encoder.layer.0.output.dense.wieght", "encoder.layer.0.output.dense.weight"),
        ("conv", "ffn (8)"),
        ("ffn & norm", "norm (10)"),
        ("layer[7]", "layer[0] to layer[1]"),
    ],
)
def test_what_matches_nothing_is_told_what_would(text, hint):
    with pytest.raises(UsageError) as caught:
        select(text, *_bert())
    assert hint in str(caught.value)


def test_a_program_without_blocks_says_so():
    with pytest.raises(UsageError, match="no repeated block"):
        select("layer[0]", tiny("mlp"))


def test_atoms_are_all_known():
    structure = _bert()[1]
    assert set(ATOMS) == {"all", "layer", *structure.roles}


@pytest.mark.parametrize("text", ["ffn |", "", "(ffn", "layer[x]", "layer[]", '"ffn', "| ffn"])
def test_syntax_is_checked_without_a_program(text):
    with pytest.raises(UsageError, match="does not parse") as caught:
        check_selector(text)
    assert "^" in caught.value.where


@pytest.mark.parametrize(
    "text", ["ffn | attention - head", "layer[0:4] & *.weight", "no.such.name"]
)
def test_what_parses_needs_a_program_to_be_wrong(text):
    check_selector(text)
