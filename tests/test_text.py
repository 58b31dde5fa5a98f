"""The text form: both ways, and every mistake with a caret under it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftc.graph.errors import UsageError, nearest
from ftc.passes import registry
from ftc.passes.base import Effect, Pass
from ftc.passes.text import format_pass, parse_pass, parse_passes


@dataclass(frozen=True)
class Sample(Pass):
    """A pass with an option of every type.

    Options:
        count, ratio: two numbers,
            the second with a point.
        mode: one of three words.
    """

    name: ClassVar[str] = "sample"
    effect: ClassVar[Effect] = Effect.EXACT

    count: int = 3
    ratio: float = 0.5
    flag: bool = False
    on: bool = True
    choice: str = "product | embedding"
    mode: Literal["row", "tensor", "none"] = "row"
    rank: int | None = None
    scale: float | None = 1.0
    label: str | None = None

    def __post_init__(self) -> None:
        if self.count < 0:
            raise UsageError(f"sample{{count={self.count}}}: count is 0 or more", fix="count=0")

    def rewrite(self, rw, ctx):
        """Does nothing."""


def lookup(name: str) -> type[Pass]:
    if name != "sample":
        raise UsageError(f"no pass is called {name!r}", fix=nearest(name, ["sample"]))
    return Sample


words = st.text(max_size=20) | st.sampled_from(
    ["none", "true", "ffn|attention-head", "a b", '"', "'", "\\", "}", "{,}", "x=1", "1", ""]
)
finite = st.floats(allow_nan=False, allow_infinity=False)
samples = st.builds(
    Sample,
    count=st.integers(min_value=0),
    ratio=finite,
    flag=st.booleans(),
    on=st.booleans(),
    choice=words,
    mode=st.sampled_from(["row", "tensor", "none"]),
    rank=st.none() | st.integers(),
    scale=st.none() | finite,
    label=st.none() | words,
)


@given(samples)
def test_a_pass_is_its_text(sample):
    assert parse_pass(format_pass(sample), lookup) == sample


@given(st.lists(samples, min_size=1, max_size=3))
def test_a_pipeline_is_its_text(passes):
    text = ",".join(map(str, passes))
    assert parse_passes(text, lookup) == tuple(passes)


@pytest.mark.parametrize("name", registry.names())
def test_defaults_are_left_out(name):
    assert str(registry.get(name)()) == name


def test_only_what_differs_is_printed_in_field_order():
    assert str(Sample(mode="none", count=4)) == "sample{count=4,mode=none}"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("sample", Sample()),
        (" sample { count=4  ratio=1 } ", Sample(count=4, ratio=1.0)),
        ("sample{count=4,ratio=1e-3,}", Sample(count=4, ratio=1e-3)),
        ("sample{flag}", Sample(flag=True)),
        ("sample{flag on=false}", Sample(flag=True, on=False)),
        ("sample{choice=ffn|attention-head}", Sample(choice="ffn|attention-head")),
        ("sample{choice='a, {b}'}", Sample(choice="a, {b}")),
        ('sample{label="none"}', Sample(label="none")),
        ("sample{label=none scale=none}", Sample(label=None, scale=None)),
        ("sample{mode=none}", Sample(mode="none")),
    ],
)
def test_forms_that_are_read(text, expected):
    assert parse_pass(text, lookup) == expected


@pytest.mark.parametrize(
    ("text", "caret", "says"),
    [
        ("", 0, "a pass is wanted"),
        ("sample,", 7, "a pass is wanted"),
        ("sample,,sample", 7, "a pass is wanted"),
        ("sample{}}", 8, "joined by commas"),
        ("sample sample", 7, "joined by commas"),
        ("sampel{count=1}", 0, "did you mean sample?"),
        ("sample{coutn=1}", 7, "did you mean count"),
        ("sample{count=x}", 13, "count takes an integer"),
        ("sample{count=1.5}", 13, "count takes an integer"),
        ("sample{count=}", 13, "count takes an integer"),
        ("sample{count}", 7, "has no value"),
        ("sample{flag=yes}", 12, "true or false"),
        ("sample{rank=x}", 12, "an integer or none"),
        ("sample{mode=rwo}", 12, "did you mean row?"),
        ("sample{count=1,count=2}", 15, "given twice"),
        ("sample{count=1", 6, "never closed"),
        ("sample{choice='a}", 14, "never closed"),
        ("sample{choice=a | b}", 16, "quotes around"),
        ("sample{{count=1}}", 7, "an option is wanted"),
        ("sample,sample{count=-1}", 7, "count is 0 or more"),
    ],
)
def test_mistakes_are_shown(text, caret, says):
    with pytest.raises(UsageError) as caught:
        parse_passes(text, lookup)
    shown, marker = str(caught.value.where).split("\n")
    assert shown == text
    assert marker == "  " + " " * caret + "^"
    assert says in str(caught.value)


def test_one_pass_is_one():
    with pytest.raises(UsageError, match="one pass"):
        parse_pass("sample,sample", lookup)


def test_description_reads_the_docstring():
    described = registry.describe(Sample)
    options = {option.name: option for option in described.options}
    assert described.summary == "A pass with an option of every type."
    assert options["count"].help == options["ratio"].help
    assert options["ratio"].help == "two numbers, the second with a point."
    assert options["mode"].type == "row, tensor or none"
    assert options["rank"].default == "none"
    assert options["flag"].default == "false"


@pytest.mark.parametrize("name", registry.names())
def test_every_option_of_every_pass_is_described(name):
    described = registry.describe(registry.get(name))
    assert described.summary.endswith(".")
    for option in described.options:
        assert option.help, f"{name}: {option.name} has no help"
