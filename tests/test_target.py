"""Targets: what is right where, what a kernel costs, and which one is chosen."""

from __future__ import annotations

import math
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftc.graph.errors import UsageError
from ftc.graph.target import CostTable, Kernel, Point, Target, features, names, target, with_table
from ftc.graph.target_tables import shipped

TABLED = ("portable", "avx2", "avx512-vnni")
kernels: tuple[Kernel, ...] = get_args(Kernel)
sizes = st.integers(1, 4096)


@pytest.mark.parametrize("name", names())
def test_every_name_is_a_target_whose_float_is_right(name: str) -> None:
    found = target(name)
    assert found.name == name
    assert "float" in found.kernels
    assert set(found.kernels) <= set(kernels)


def test_portable_assumes_nothing() -> None:
    portable = target("portable")
    assert not portable.features
    assert not portable.wide


def test_eight_bits_only_where_products_do_not_saturate() -> None:
    for name in names():
        found = target(name)
        saturates = not found.features & {"avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm"}
        if "integer" in found.kernels:
            assert found.wide != saturates


def test_a_misspelt_target_names_the_nearest() -> None:
    with pytest.raises(UsageError, match="native"):
        target("nativ")


def test_this_machine_says_what_it_is() -> None:
    assert target("native").features == features()
    assert target("native").words


@pytest.mark.parametrize("name", TABLED)
def test_a_shipped_table_says_where_it_is_from(name: str) -> None:
    table = target(name).table
    assert table is not None
    assert not table.measured
    assert "not measured on your machine" in table.origin


def test_nothing_is_made_up_where_nobody_measured() -> None:
    assert shipped("arm-dotprod") is None
    assert shipped("cuda") is None
    choice = target("arm-dotprod").choose([(1, 64, 64)])
    assert (choice.kernel, choice.speed) == ("integer", None)
    assert "never measured" in choice.reason and "--target native" in choice.reason


@given(st.sampled_from(TABLED), st.sampled_from(kernels), sizes, sizes, sizes)
def test_costs_are_positive_and_grow(name: str, kernel: Kernel, r: int, i: int, o: int) -> None:
    table = target(name).table
    assert table is not None
    base = table.seconds(kernel, r, i, o)
    assert base > 0
    for more in ((2 * r, i, o), (r, 2 * i, o), (r, i, 2 * o)):
        assert table.seconds(kernel, *more) >= base * (1 - 1e-9)


def test_costs_are_lines_between_points_and_proportional_beyond() -> None:
    table = CostTable("made up", False, {"float": (Point(2, 1.0, 0.0), Point(4, 3.0, 1.0))})
    assert table.seconds("float", 1, 1, 1) == 1.0
    assert table.seconds("float", 3, 1, 1) == pytest.approx(2.5)
    assert table.seconds("float", 8, 1, 1) == 8.0


@pytest.mark.parametrize("name", TABLED)
def test_a_table_survives_json(name: str) -> None:
    table = target(name).table
    assert table is not None
    assert CostTable.from_dict(table.to_dict()) == table


@pytest.mark.parametrize("bad", [{}, {"origin": "", "measured": 1, "points": {}}, {"points": 3}])
def test_what_is_no_table_is_refused(bad: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="table"):
        CostTable.from_dict(bad)


def made_up(**seconds: float) -> Target:
    points = {kernel: (Point(1, each, 0.0),) for kernel, each in seconds.items()}
    return with_table(target("portable"), CostTable("made up", False, points))


def test_the_fastest_is_chosen_and_its_gain_said() -> None:
    choice = made_up(integer=2.0, blocked=1.0, float=4.0).choose([(1, 8, 8)])
    assert choice.kernel == "blocked"
    assert choice.speed == pytest.approx(4.0)


def test_float_has_to_be_worth_its_bytes() -> None:
    assert made_up(integer=1.0, float=0.95).choose([(1, 8, 8)]).kernel == "integer"
    assert made_up(integer=1.0, float=0.8).choose([(1, 8, 8)]).kernel == "float"


def test_only_kernels_with_a_form_are_chosen() -> None:
    costs = made_up(integer=2.0, blocked=1.0, float=4.0)
    assert costs.choose([(1, 8, 8)], ("integer", "float")).kernel == "integer"
    assert costs.choose([(1, 8, 8)], ()).kernel == "float"


def test_rows_decide_on_a_machine_without_vnni() -> None:
    avx2 = target("avx2")
    able: tuple[Kernel, ...] = ("integer", "blocked", "float")
    assert avx2.choose([(128, 768, 768)], able).kernel == "integer"
    assert avx2.choose([(1, 768, 768)], ("blocked", "float")).kernel == "blocked"
    assert avx2.choose([(128, 768, 768)], ("blocked", "float")).kernel == "float"


@given(st.lists(st.tuples(sizes, sizes, sizes), min_size=1, max_size=4))
def test_no_other_kernel_is_faster_over_the_shapes(work: list[tuple[int, int, int]]) -> None:
    vnni = target("avx512-vnni")
    assert vnni.table is not None
    table, able = vnni.table, ("integer", "blocked")
    choice = vnni.choose(work, able)
    logs = {k: sum(math.log(table.seconds(k, *each)) for each in work) for k in able}
    assert logs[choice.kernel] == min(logs.values())
