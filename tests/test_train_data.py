"""Rows and their faults by file and line, tables and their cache, the order of the data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ftc.graph.errors import UsageError
from ftc.runtime.training.data.order import Order, generator
from ftc.runtime.training.data.rows import read_rows
from ftc.runtime.training.data.table import Table, cached
from ftc.runtime.training.schedule import SCHEDULES, Schedule

orders = st.builds(
    Order, count=st.integers(1, 60), batch=st.integers(1, 9), accumulate=st.integers(1, 4),
    seed=st.integers(0, 5),
)  # fmt: skip


@given(orders, st.integers(0, 3), st.booleans())
def test_an_epoch_sees_every_example_once(order: Order, epoch: int, bucket: bool) -> None:
    if bucket:
        lengths = torch.randint(1, 9, (order.count,), generator=generator(1))
        order = Order(order.count, order.batch, order.accumulate, order.seed, lengths=lengths)
    steps = order.steps(epoch)
    seen = [index for step in steps for batch in step for index in batch]
    assert sorted(seen) == list(range(order.count))
    assert len(steps) == order.steps_per_epoch
    assert steps == order.steps(epoch)


@given(orders, st.integers(1, 4))
def test_ranks_share_each_batch(order: Order, size: int) -> None:
    step = order.steps(0)[0]
    parts = [index for rank in range(size) for batch in step for index in batch[rank::size]]
    assert sorted(parts) == sorted(index for batch in step for index in batch)


def test_epochs_differ_and_buckets_pad_less() -> None:
    order = Order(64, 8)
    assert order.steps(0) != order.steps(1)
    lengths = torch.randint(1, 50, (64,), generator=generator(2))

    def padding(made: Order) -> int:
        batches = [list(batch) for step in made.steps(0) for batch in step]
        return sum(int((lengths[b].max() - lengths[b]).sum()) for b in batches)

    assert padding(Order(64, 8, lengths=lengths)) < padding(order) / 2


@given(st.sampled_from(SCHEDULES), st.integers(1, 100), st.integers(0, 20))
def test_schedules_rise_to_one_and_never_leave_it(name: str, total: int, warmup: int) -> None:
    made = Schedule(name, total, warmup)
    factors = [made.factor(step) for step in range(total)]
    assert all(0 <= factor <= 1 for factor in factors)
    if warmup < total:
        assert factors[warmup] == 1
    assert all(b <= a for a, b in zip(factors[warmup:], factors[warmup + 1 :], strict=False))


def test_every_format_gives_the_same_rows(tmp_path: Path) -> None:
    import datasets

    rows = [{"text": 'it is "good", really', "label": "pos"}, {"text": "bad", "label": "neg"}]
    made = datasets.Dataset.from_list(rows)
    made.save_to_disk(str(tmp_path / "folder"))
    made.to_parquet(str(tmp_path / "a.parquet"))
    made.to_csv(str(tmp_path / "a.csv"), index=False)
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name in ("folder", "a.parquet", "a.csv", "a.jsonl"):
        assert [dict(row.fields) for row in read_rows(tmp_path / name)] == rows, name


@pytest.mark.parametrize(
    ("name", "content", "place"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": "b', "a.jsonl:2"),
        ("a.jsonl", b'{"text": "a"}\n[1]\n', "a.jsonl:2"),
        ("a.jsonl", b'{"text": "a"}\n\n{"text": "\xff"}\n', "a.jsonl:3"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\\ud800 x"}\n', "a.jsonl:2"),
        ("a.jsonl", b'{"text": "a"}\n{"words": ["a", "\\udc00"]}\n', "a.jsonl:2"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "a", "text": "b"}\n', "a.jsonl:2"),
        ("a.csv", b"\ntext,label,text\nyes,1,no\n", "a.csv:2"),
        ("a.csv", b"text,label\nyes,1\nno\n", "a.csv:3"),
        ("a.csv", b'text,label\n"yes,1\n', "a.csv:2"),
        ("a.txt", b"one\n\ntw\xffo\n", "a.txt:3"),
        ("a.parquet", b"PAR1 but no more", "a.parquet"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, name: str, content: bytes, place: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError) as caught:
        read_rows(tmp_path / name)
    assert place in str(caught.value) and caught.value.fix


def test_characters_in_two_halves_are_whole(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "\\ud83d\\ude00"}')
    (row,) = read_rows(tmp_path / "a.jsonl")
    assert row.text("text") == "\U0001f600"


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.txt"])
def test_an_empty_file_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("\n")
    with pytest.raises(UsageError, match="empty"):
        read_rows(tmp_path / name)


def test_columns_are_renamed_and_missing_ones_named(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("review,stars\nfine,5\n")
    (row,) = read_rows(tmp_path / "a.csv", {"text": "review"})
    assert row.text("text") == "fine"
    with pytest.raises(UsageError, match="stars"):
        read_rows(tmp_path / "a.csv", {"label": "star"})


@given(st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=5), min_size=1, max_size=8))
def test_a_table_keeps_its_rows(rows: list[list[int]]) -> None:
    table = Table.of(({"ids": row} for row in rows), {})
    assert [part.tolist() for part in table.rows("ids", range(len(table)))] == rows
    assert table.columns["ids"].lengths.tolist() == list(map(len, rows))


def test_a_table_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    table = Table.of([{"ids": [1, 2]}, {"ids": [3]}], {"labels": ["a"]})
    calls = []

    def make() -> Table:
        calls.append(1)
        return table

    first, hit = cached(["key"], make)
    again, second = cached(["key"], make)
    assert (hit, second, len(calls)) == (False, True, 1)
    assert again.facts == first.facts and torch.equal(
        again.columns["ids"].values, table.columns["ids"].values
    )
    assert cached(["other"], make)[1] is False


def test_an_error_of_the_compiler_says_what_to_leave_out() -> None:
    from torch._inductor.exc import InductorError

    from ftc.runtime.compiled import compile_errors

    def fail() -> None:
        raise InductorError(RuntimeError("no compiler"), None)

    with pytest.raises(UsageError, match="no compiler") as caught, compile_errors(True):
        fail()
    assert caught.value.fix is not None and "--compile" in caught.value.fix
    with pytest.raises(InductorError), compile_errors(False):
        fail()
