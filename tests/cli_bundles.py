"""A small bundle for the command line, and what a mistake of its user looks like."""

from __future__ import annotations

from pathlib import Path

import pytest

from .conftest import Command, Ran
from .small import encoder

PASSES = "lowrank{ratio=0.5},int8{min_size=16}"


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return encoder(tmp_path_factory.mktemp("masked"))


@pytest.fixture(scope="module")
def bundle(masked: Path, command: Command, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bundles") / "masked"
    ran = command("compile", masked, "--passes", PASSES, "-o", out)
    assert ran.status == 0, ran.err
    return out


def mistake(ran: Ran, *words: str, status: int = 2) -> None:
    """A refusal says what, and how to mend it, on stderr, without a traceback."""
    assert ran.status == status, ran.err
    assert "fix: " in ran.err and "Traceback" not in ran.err and not ran.out
    for word in words:
        assert word in ran.err
