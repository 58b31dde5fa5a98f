"""The norm of gradients is that of float64, whatever the number and size of tensors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ftc.runtime.training.norm import scale_down, squared_norm


@given(
    st.lists(st.lists(st.integers(0, 70), min_size=0, max_size=3), max_size=5), st.integers(0, 9)
)
def test_squares_are_those_of_float64(shapes: list[list[int]], seed: int) -> None:
    made = torch.Generator().manual_seed(seed)
    gradients = [torch.randn(shape, generator=made) for shape in shapes]
    expected = sum((float(g.double().square().sum()) for g in gradients), 0.0)
    assert float(squared_norm(gradients)) == pytest.approx(expected, rel=1e-6)


def test_a_large_table_loses_nothing() -> None:
    table = torch.randn(30_000, 384, generator=torch.Generator().manual_seed(0))
    exact = float(table.double().square().sum())
    assert float(squared_norm([table])) == pytest.approx(exact, rel=1e-6)
    assert float(squared_norm([table.T])) == pytest.approx(exact, rel=1e-6)


@given(st.floats(0.01, 100), st.floats(0.01, 100))
def test_only_what_is_larger_is_scaled(size: float, most: float) -> None:
    gradient = torch.full((4,), size / 2)
    scale_down([gradient], size, most)
    assert float(gradient.norm()) == pytest.approx(min(size, most), rel=2e-4)
