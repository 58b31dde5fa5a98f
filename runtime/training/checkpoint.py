"""Checkpoints: a run at a step, whole, on disk, without a pickle.

======================  ====================================================
``weights.safetensors``    what learns, and running statistics, by name
``optimizer.safetensors``  the optimizer's state, ``<parameter>/<key>``
``random.safetensors``     the states of torch's generators
``state.json``             where the run is, and the hashes of the other files
======================  ====================================================

The folder is written under another name, flushed and exchanged with the last
one in one step, so a process that is killed at any moment leaves a whole
checkpoint behind. Tensors are whole and under the program's names, whatever
engine wrote them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ftc.graph.bundle.replace_folder import recover, write_folder
from ftc.graph.bundle.tensor_file import write_tensors
from ftc.graph.errors import BundleError

from .engine import Engine

FORMAT = 1
_WEIGHTS, _OPTIMIZER, _RANDOM = "weights.safetensors", "optimizer.safetensors", "random.safetensors"
_STATE = "state.json"


@dataclass
class State:
    """Where a run is.

    Attributes:
        step: steps that are done; with the seed it says which data comes next.
        examples, tokens: seen so far.
        seconds: that steps took so far.
        best: the best value of the metric so far; None before the first evaluation.
        best_step: where it was.
        waited: evaluations since then.
        stopped: True once early stopping ended the run.
    """

    step: int = 0
    examples: int = 0
    tokens: int = 0
    seconds: float = 0.0
    best: float | None = None
    best_step: int = 0
    waited: int = 0
    stopped: bool = False


def save_checkpoint(
    path: Path, state: State, engine: Engine, optimizer: torch.optim.Optimizer
) -> None:
    """Writes a checkpoint; every process calls it, the main one writes.

    Args:
        path: the folder; one that is there is replaced in one step.
    """
    weights = engine.collect({name: p.detach() for name, p in engine.parameters().items()})
    weights |= engine.collect(engine.buffers())
    files = {_WEIGHTS: weights, _OPTIMIZER: _optimizer_tensors(engine, optimizer),
             _RANDOM: _random_states(engine)}  # fmt: skip
    if engine.main:
        write_folder(path.resolve(), lambda folder: _fill(folder, state, files))
    engine.agree(False)  # it is there, for every process


def has_checkpoint(path: Path) -> bool:
    """Whether a whole checkpoint stands at ``path``."""
    recover(path.resolve())
    return (path / _STATE).is_file()


def load_checkpoint(path: Path, engine: Engine, optimizer: torch.optim.Optimizer) -> State:
    """Puts a run back where it was: weights, optimizer, generators.

    Raises:
        BundleError: for a damaged checkpoint, or one of another program.
    """
    state = _read_state(path)
    load_weights(path, engine)
    _load_optimizer(_read(path, _OPTIMIZER), engine, optimizer)
    _set_random_states(_read(path, _RANDOM), engine.process)
    return state


def load_weights(path: Path, engine: Engine) -> None:
    """The weights and running statistics of a checkpoint.

    Raises:
        BundleError: for a damaged checkpoint, or one of another program.
    """
    stored = _read(path, _WEIGHTS)
    targets = {**engine.parameters(), **engine.buffers()}
    if odd := targets.keys() - stored.keys() or engine.names ^ stored.keys():
        odd = min(odd)
        raise BundleError(f"{path} belongs to another program: {odd}", fix="start again: --force")
    with torch.no_grad():
        for name, target in targets.items():
            target.copy_(engine.part(name, stored[name]))


def _fill(folder: Path, state: State, files: Mapping[str, Mapping[str, Tensor]]) -> None:
    hashes = {name: write_tensors(folder / name, tensors) for name, tensors in files.items()}
    content = {"format": FORMAT, "state": asdict(state), "files": hashes,
               "threads": torch.get_num_threads()}  # fmt: skip
    (folder / _STATE).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _read_state(path: Path) -> State:
    """The state, once every file has the hash that it names."""
    try:
        content = json.loads((path / _STATE).read_text(encoding="utf-8"))
        if content["format"] > FORMAT:
            raise BundleError(f"{path} was written by a later ftc", fix="use that one")
        for name, expected in content["files"].items():
            with (path / name).open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != expected:
                    raise _damaged(path, f"{name} has another hash")
        return State(**content["state"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(path, str(error)) from None


def _damaged(path: Path, why: str) -> BundleError:
    return BundleError(f"the checkpoint {path} is damaged: {why}", fix="start again: --force")


def _read(path: Path, name: str) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path / name)
    except (SafetensorError, OSError) as error:
        raise _damaged(path, str(error)) from None


def _optimizer_tensors(engine: Engine, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, parameter in engine.parameters().items():
        for key, value in optimizer.state[parameter].items():
            tensor = value if isinstance(value, Tensor) else torch.tensor(value)
            found[f"{name}/{key}"] = tensor
    return engine.collect(found)


def _load_optimizer(
    stored: Mapping[str, Tensor], engine: Engine, optimizer: torch.optim.Optimizer
) -> None:
    for name, parameter in engine.parameters().items():
        state: dict[str, Any] = {}
        for key in (k for k in stored if k.rpartition("/")[0] == name):
            tensor = stored[key]
            if tensor.dim():
                tensor = torch.empty_like(parameter).copy_(engine.part(name, tensor))
            else:
                tensor = tensor.clone()
            state[key.rpartition("/")[2]] = tensor
        if state:
            optimizer.state[parameter] = state


def _random_states(engine: Engine) -> dict[str, Tensor]:
    """The states of the generators of each process: ``cpu``, ``1/cpu``, …"""
    own = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        own |= {f"cuda.{i}": s for i, s in enumerate(torch.cuda.get_rng_state_all())}
    every = enumerate(engine.each(own))
    return {f"{_mine(i)}{key}": state for i, states in every for key, state in states.items()}


def _set_random_states(stored: Mapping[str, Tensor], process: int) -> None:
    """Those of this process; one that was not there before begins at a place of its own."""
    mine = _mine(process)
    if f"{mine}cpu" not in stored:
        digest = hashlib.sha256(stored["cpu"].numpy().tobytes() + bytes([process % 256])).digest()
        torch.manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        return
    torch.set_rng_state(stored[f"{mine}cpu"].clone())
    for i in range(torch.cuda.device_count()):
        if (state := stored.get(f"{mine}cuda.{i}")) is not None:
            torch.cuda.set_rng_state(state.clone(), i)


def _mine(process: int) -> str:
    return f"{process}/" if process else ""
