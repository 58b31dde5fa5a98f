"""A program as one ONNX file a stage: run one after another, here or each on a machine of its own.

``stages.json`` beside the files says what goes where::

    {"format": 1, "inputs": [...], "outputs": [...],
     "stages": [{"file": "stage-0.onnx", "sha256": "…", "inputs": ["input_ids"], "receives": [],
                 "relays": [], "sends": ["add_9"], "outputs": []}, …]}

A stage is called with the program's inputs that it names and what it receives, all
by name; what it relays passes by its file. That is the whole protocol: a server of
one stage needs onnxruntime, its file and its entry.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ftc.graph.errors import BundleError, UsageError, nearest

from .session import OnnxSession

MANIFEST = "stages.json"
FORMAT = 1
_FILE = re.compile(r"stage-\d{1,4}\.onnx(\.data)?")


@dataclass(frozen=True, slots=True)
class StageEntry:
    """One stage in the manifest.

    Attributes:
        file: name of the ONNX file, in the manifest's folder.
        sha256: of that file.
        inputs: the program's inputs that it takes.
        receives: what it reads of what the stage before sends or relays.
        relays: what it hands on to the stage behind as it is.
        sends: what it makes for the stage behind.
        outputs: the program's outputs that it yields.
    """

    file: str
    sha256: str
    inputs: tuple[str, ...]
    receives: tuple[str, ...]
    relays: tuple[str, ...]
    sends: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Manifest:
    """What ``stages.json`` holds: the program's interface, its stages, and further files."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    stages: tuple[StageEntry, ...]
    files: tuple[str, ...] = ()

    def write(self, folder: Path) -> None:
        """Writes the file into ``folder``."""
        text = json.dumps({"format": FORMAT, **asdict(self)}, indent=1)
        (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a folder of stages.

    Raises:
        BundleError: where it is missing, malformed, or stages do not fit together.
    """
    path = folder / MANIFEST
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise BundleError(f"format {content['format']!r} of stages is not known",
                              where=str(path), fix="install the ftc that wrote it")  # fmt: skip
        stages = tuple(_entry(each) for each in content["stages"])
        found = Manifest(_names(content["inputs"]), _names(content["outputs"]), stages,
                         _names(content["files"]))  # fmt: skip
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise BundleError(
            f"no stages can be read: {type(error).__name__}: {error}",
            where=str(path),
            fix="ftc export PROGRAM --stages -o FOLDER",
        ) from None
    _check(found, path)
    return found


class StagedModel:
    """Every stage of a folder in onnxruntime, run in order in this process.

    Args:
        folder: what ``ftc export --stages`` wrote.
        threads: how many one operator may use; by default onnxruntime decides.

    Attributes:
        manifest: inputs, outputs and what goes between.

    Raises:
        BundleError: for a manifest or a file that is not what was written.
        SourceError: when onnxruntime refuses a file.
    """

    def __init__(self, folder: str | os.PathLike[str], threads: int | None = None) -> None:
        place = Path(folder)
        self.manifest = read_manifest(place)
        self._sessions = []
        for stage in self.manifest.stages:
            path = place / stage.file
            if not path.is_file() or file_hash(path) != stage.sha256:
                raise BundleError(f"{path} is not the file that was written",
                                  fix="export the program again")  # fmt: skip
            session = OnnxSession(path, threads=threads)
            self._sessions.append(session)
            wanted = {*stage.inputs, *stage.receives}, {*stage.sends, *stage.outputs}
            if wanted != (set(session.input_names), set(session.output_names)):
                raise BundleError(f"{path} has other inputs and outputs than {MANIFEST} says",
                                  fix="export the program again")  # fmt: skip

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Outputs by name, in the program's order.

        Raises:
            UsageError: for a missing or unknown input, or one that a stage does not run on.
        """
        known = self.manifest.inputs
        for name in inputs:
            if name not in known:
                raise UsageError(f"unknown input {name!r}", fix=nearest(name, known))
        if missing := [name for name in known if name not in inputs]:
            raise UsageError(f"missing input {missing[0]!r}", fix=f"inputs: {', '.join(known)}")
        outputs: dict[str, Tensor] = {}
        passed: dict[str, Tensor] = {}
        for stage, session in zip(self.manifest.stages, self._sessions, strict=True):
            given = {name: inputs[name] for name in stage.inputs}
            made = session({**given, **{name: passed[name] for name in stage.receives}})
            passed = {name: passed[name] for name in stage.relays} | {
                name: made[name] for name in stage.sends
            }
            outputs.update((name, made[name]) for name in stage.outputs)
        return {name: outputs[name] for name in self.manifest.outputs}


def file_hash(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _entry(content: Any) -> StageEntry:
    lists = ("inputs", "receives", "relays", "sends", "outputs")
    return StageEntry(content["file"], content["sha256"], *(_names(content[key]) for key in lists))


def _names(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise TypeError("a list of names is wanted")
    return tuple(value)


def _check(found: Manifest, path: Path) -> None:
    """Raises BundleError where a stage needs what nobody gives it."""
    before: frozenset[str] = frozenset()
    given: list[str] = []
    for stage in found.stages:
        if not _FILE.fullmatch(str(stage.file)):
            raise BundleError(f"{str(stage.file)[:80]!r} is no name for a stage", where=str(path))
        if not before >= {*stage.receives, *stage.relays} or not (
            set(stage.inputs) <= set(found.inputs)
        ):
            raise BundleError(f"{stage.file} needs what nobody gives it", where=str(path))
        before = frozenset((*stage.sends, *stage.relays))
        given += stage.outputs
    if before or sorted(given) != sorted(found.outputs):
        raise BundleError("the stages do not yield the program's outputs", where=str(path))
