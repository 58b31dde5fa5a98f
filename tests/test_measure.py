"""Timing, numbers for people, shapes to measure at, text for probes."""

from __future__ import annotations

import io
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ftc.graph.errors import UsageError
from ftc.runtime.bench import Latency, usual_shapes
from ftc.runtime.console import count, duration, megabytes, small, spread, stdout
from ftc.runtime.examples import read_examples
from ftc.runtime.measure import Timing, interleaved, machine, noise, ratio
from ftc.runtime.render_latency import render_latencies
from ftc.runtime.text import default_text, pad, read_text, takes_text
from ftc.tests.tiny import tiny


def test_runs_are_interleaved_and_their_order_turns() -> None:
    called: list[str] = []
    runs = {name: (lambda name=name: called.append(name)) for name in "abc"}
    times = interleaved(runs, seconds=0, least=4, most=9)
    assert called[:3] == ["a", "b", "c"]  # the warm-up
    rounds = [called[i : i + 3] for i in range(3, len(called), 3)]
    assert rounds == [["a", "b", "c"], ["b", "c", "a"], ["c", "a", "b"], ["a", "b", "c"]]
    assert {len(t.samples) for t in times.values()} == {4}


def test_enough_rounds_are_enough() -> None:
    assert len(interleaved({"a": lambda: None}, seconds=60, most=7)["a"].samples) == 7


def test_a_ratio_sees_through_noise_that_hits_both() -> None:
    """Ten times slower in half of the rounds, in both."""
    noise = [1, 10, 1, 10, 1, 10, 10]
    a, b = (Timing(tuple(each * n for n in noise)) for each in (3.0, 2.0))
    assert ratio(a, b) == pytest.approx(1.5)
    slow = interleaved(
        {"a": lambda: time.sleep(0.004), "b": lambda: time.sleep(0.002)}, seconds=0.1
    )
    assert ratio(slow["a"], slow["b"]) > 1.2


@pytest.mark.parametrize(
    ("a", "b", "why"),
    [
        ([3.0, 3.1, 3.0, 3.1, 3.0], [1.0, 1.0, 1.1, 1.0, 1.0], ""),
        ([3.0, 3.1, 3.0], [1.0, 1.0, 1.0], ""),
        ([1.0, 1.2, 1.1, 1.0, 1.2], [1.1, 1.0, 1.2, 1.1, 1.0], "overlap"),
        ([3.0, 30.0, 3.0, 30.0, 30.0], [1.0, 1.0, 1.0, 1.0, 1.0], "3 and 30"),
        ([1.0, 90.0, 90.0, 90.0, 90.0], [0.1, 3.0, 3.0, 3.0, 3.0], "as the fastest"),
    ],
)
def test_a_ratio_to_be_doubted_says_why(a: list[float], b: list[float], why: str) -> None:
    found = noise(Timing(tuple(a)), Timing(tuple(b)))
    assert why in found and bool(found) == bool(why)
    assert bool(noise(Timing(tuple(b)), Timing(tuple(a)))) == bool(why)  # whichever is first


@pytest.mark.parametrize("noisy", [True, False])
def test_a_table_marks_what_is_to_be_doubted(noisy: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout", out := io.StringIO())
    other = Timing((1.0, 9.0, 1.0, 9.0) if noisy else (1.0, 1.0, 1.0, 1.0))
    latency = Latency({"batch": 2}, Timing((3.0, 3.0, 3.0, 3.0)), other, 3.0)
    render_latencies([latency], ("a", "b"), ("original", "result"), stdout())
    assert ("noisy 3.00× faster" in out.getvalue()) == noisy
    assert ("noisy at batch=2: the quartiles" in out.getvalue()) == noisy
    assert bool(latency.to_dict()["noise"]) == noisy


@given(st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=30))
def test_quartiles_enclose_the_median(samples: list[float]) -> None:
    timing = Timing(tuple(samples))
    low, high = timing.quartiles
    assert min(samples) <= low <= timing.median * (1 + 1e-9)
    assert timing.median * (1 - 1e-9) <= high <= max(samples)


def test_the_machine_says_what_it_is() -> None:
    known = machine()
    assert known["processor"] and known["cores"] >= 1 and known["torch"].startswith("2.")


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (count(22_713_216), "22.7 M"), (count(22_000_000), "22.0 M"), (count(384), "384"),
        (count(None), ""), (count(999_600), "1.00 M"), (megabytes(90_868_608), "90.9"),
        (megabytes(4_100), "0.0041"), (duration(1.25), "1.25 s"), (duration(0.0034), "3.40 ms"),
        (duration(5.6e-5), "56.0 us"), (small(0), "0"), (small(1.23e-7), "1.2e-07"),
        (small(0.0931), "0.0931"), (spread(0.0925, 0.0894, 0.1), "92.5 ms (89.4–100)"),
    ],
)  # fmt: skip
def test_numbers_for_people(text: str, wanted: str) -> None:
    assert text == wanted


def test_shapes_to_measure_at_grow_with_what_is_allowed() -> None:
    program = tiny("bert")
    little, much = (usual_shapes(program, most=most) for most in (1, 1e12))
    tokens = [s["batch"] * s["sequence"] for s in (*little, *much)]
    assert tokens == sorted(tokens) and len(much) == 2
    limited = replace(program, signature=replace(program.signature, limits={"sequence": 20}))
    assert all(s["sequence"] <= 20 for s in usual_shapes(limited, most=1e12))
    (fixed,) = {len(usual_shapes(tiny("mlp"))[0])}
    assert fixed == 1  # a batch and nothing else


def test_shapes_as_text() -> None:
    signature = tiny("bert").signature
    assert signature.parse_sizes("batch=2, sequence=8") == {"batch": 2, "sequence": 8}
    for wrong in ("2x8", "batch=", "rows=2", "batch=-1", "batch=0"):
        with pytest.raises(UsageError) as caught:
            signature.parse_sizes(wrong)
        assert caught.value.fix


def test_padding_is_masked() -> None:
    signature = tiny("bert").signature
    assert takes_text(signature) and not takes_text(tiny("mlp").signature)

    class Tokenizer:
        pad_token_id = 7

    made = pad([[1, 2, 3], [4]], signature, Tokenizer())
    assert made["input_ids"].tolist() == [[1, 2, 3], [4, 7, 7]]
    assert made["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert all(t.dtype == torch.int64 for t in made.values())


def test_the_default_text_is_prose() -> None:
    paragraphs = default_text().paragraphs
    assert len(paragraphs) > 50
    assert all(p[0].isupper() and p[-1] in ".!?" and "::" not in p for p in paragraphs)


def test_text_is_a_file_or_itself(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("one\ntwo\n\nthree\n")
    assert read_text(str(file)).paragraphs == ("one two", "three")
    assert read_text("not a file, but a text.").paragraphs == ("not a file, but a text.",)
    assert read_text("x" * 5000).paragraphs  # too long for the name of a file
    for missing in (str(tmp_path / "b.txt"), "no/such"):
        with pytest.raises(UsageError, match="there is no file"):
            read_text(missing)
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="is not text"):
        read_text(str(file))
    file.write_text(" \n")
    with pytest.raises(UsageError, match="holds no text"):
        read_text(str(file))


def test_examples_know_their_place(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("one\n\ntwo\nlines\n\nthree\n")
    assert [(e.text, e.place.rpartition(":")[2]) for e in read_examples(file)] == [
        ("one", "1"), ("two lines", "3"), ("three", "6")]  # fmt: skip
    rows = tmp_path / "a.jsonl"
    rows.write_text('{"text": "a", "label": 1}\n\n{"text": "b"}\n')
    assert [(e.label, e.place.rpartition(":")[2]) for e in read_examples(rows)] == [
        (1, "1"), (None, "3")]  # fmt: skip
    for bad in ('{"text": ""}', "[1]", '{"text": "a", "label": [1]}', "{", '{"text": 3}'):
        rows.write_text(f'{{"text": "a"}}\n{bad}\n')
        with pytest.raises(UsageError) as caught:
            read_examples(rows)
        assert "a.jsonl:2" in (caught.value.where or "")
