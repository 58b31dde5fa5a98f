"""Saving over a bundle: whole at every moment, through full disks and kills."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ftc.graph.bundle import load_bundle, replace_folder, save_bundle
from ftc.graph.errors import UsageError, WriteError
from ftc.graph.program import Program

from .bundles import broken, files, mlp, odd


@pytest.fixture(scope="module")
def program() -> Program:
    return odd()


@pytest.fixture
def bundle(program: Program, tmp_path: Path) -> Path:
    return save_bundle(program, tmp_path / "bundle")


def test_an_output_that_exists_is_refused(program: Program, bundle: Path, tmp_path: Path) -> None:
    before = files(bundle)
    with pytest.raises(UsageError, match="--force"):
        save_bundle(program, bundle)
    other = tmp_path / "photos"
    other.mkdir()
    (other / "cat.jpg").write_text("")
    for force in (False, True):
        with pytest.raises(UsageError, match="not a bundle"):
            save_bundle(program, other, force=force)
    with pytest.raises(UsageError, match="is a file"):
        save_bundle(program, other / "cat.jpg", force=True)
    assert files(bundle) == before
    (tmp_path / "empty").mkdir()
    assert save_bundle(program, tmp_path / "empty")


@pytest.mark.parametrize("exchange", [True, False])
def test_force_replaces(bundle: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool) -> None:
    if not exchange:
        monkeypatch.setattr(replace_folder, "_exchange", lambda *_: False)
    program = mlp()
    save_bundle(program, bundle, force=True)
    assert load_bundle(bundle).signature == program.signature
    assert [p.name for p in bundle.parent.iterdir()] == ["bundle"]


def test_a_death_between_two_renames_is_recovered(bundle: Path) -> None:
    before = files(bundle)
    dead, alive = (f"{replace_folder._prefix(bundle)}{pid}-old" for pid in (2**30, os.getpid()))
    bundle.rename(bundle.with_name(alive))
    broken(bundle, "no bundle")  # a replacement is under way: its maker will finish it
    bundle.with_name(alive).rename(bundle.with_name(dead))
    assert load_bundle(bundle)
    assert files(bundle) == before


def failing_at(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ``count``-th flush, rename or file of a save fails as a full disk does."""
    calls = iter(range(1000))

    def wrap(owner: Any, name: str) -> None:
        original: Callable[..., Any] = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            if next(calls) == count:
                raise OSError(28, "No space left on device", "file")
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    wrap(replace_folder, "_flush_entry")
    wrap(replace_folder, "_exchange")
    wrap(Path, "write_text")
    wrap(sys.modules["ftc.graph.bundle.bundle"], "write_tensors")


@pytest.mark.parametrize("count", range(7))
def test_a_full_disk_leaves_the_old_bundle(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    before = files(bundle)
    with monkeypatch.context() as patch:
        failing_at(count, patch)
        with pytest.raises(WriteError, match="No space left") as caught:
            save_bundle(mlp(), bundle, force=True)
        assert caught.value.fix
    assert files(bundle) == before
    assert [p.name for p in bundle.parent.iterdir()] == ["bundle"]


def test_a_file_size_limit_leaves_the_old_bundle(bundle: Path) -> None:
    before = files(bundle)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(WriteError, match="File too large"):
            save_bundle(mlp(), bundle, force=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert files(bundle) == before


KILLER = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from ftc.graph.bundle import load_bundle, save_bundle
torch.set_num_threads(1)
path = Path(sys.argv[1])
programs = [load_bundle(p) for p in sys.argv[2:]]
random.seed(0)
for _ in range(10):
    child = os.fork()
    if child == 0:
        while True:
            for program in programs:
                save_bundle(program, path, force=True)
    time.sleep(random.uniform(0.01, 0.06))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    load_bundle(path)
    print("whole")
"""


def test_a_kill_leaves_a_whole_bundle(program: Program, bundle: Path, tmp_path: Path) -> None:
    """Ten children that save without end are killed at random moments."""
    sources = [save_bundle(p, tmp_path / f"source{i}") for i, p in enumerate((program, mlp()))]
    ran = subprocess.run(
        [sys.executable, "-c", KILLER, str(bundle), *map(str, sources)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ran.stdout.count("whole") == 10, ran.stderr
    assert files(bundle) in [files(s) for s in sources]
    save_bundle(program, bundle, force=True)
    left = {p.name for p in tmp_path.iterdir()}
    assert left == {"bundle", "source0", "source1"}, "what the dead left is cleaned up"
