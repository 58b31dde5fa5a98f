"""One ONNX file a stage: in a row they compute what the program does, at any size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ftc.graph.bundle import save_bundle
from ftc.graph.errors import BundleError, UsageError
from ftc.graph.program import Program
from ftc.passes.pipeline import Pipeline
from ftc.runtime.export_stages import export_stages
from ftc.runtime.staged import MANIFEST, StagedModel

from .families import captured
from .test_cut import _unet
from .tiny import tiny


def _program(name: str) -> Program:
    if name == "unet":
        return _unet().clone()
    return captured(name)[1].clone() if name == "t5" else tiny(name)


def _saved(name: str, spec: str, folder: Path) -> tuple[Program, Path]:
    program = Pipeline.parse(spec).run(_program(name)).program
    return program, save_bundle(program, folder / "bundle")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Program, Path, Path]:
    folder = tmp_path_factory.mktemp("staged")
    program, bundle = _saved("gpt2", "partition{stages=2}", folder)
    export_stages(str(bundle), folder / "out")
    return program, bundle, folder / "out"


@pytest.mark.parametrize(("name", "spec"), [
    ("bert", "partition{stages=3}"), ("llama", "int8,partition{stages=2}"),
    ("t5", "partition{stages=3}"), ("unet", "partition{stages=4}"),
    ("xlnet", "partition{stages=2}"),
])  # fmt: skip
def test_stages_in_onnxruntime_are_the_program(name: str, spec: str, tmp_path: Path) -> None:
    program, bundle = _saved(name, spec, tmp_path)
    found = export_stages(str(bundle), tmp_path / "out")
    model = StagedModel(tmp_path / "out")
    assert len(model.manifest.stages) == int(spec[-2])
    probe = program.signature.probe(seed=5, batch=3)
    expected = program(probe)
    outputs = model(probe)
    assert outputs.keys() == expected.keys()
    for key, value in expected.items():
        error = torch.linalg.norm(outputs[key] - value) / torch.linalg.norm(value)
        assert error <= max(2 * found.drift.relative, 1e-4), key


def test_files_of_its_own_are_replaced_and_no_others(
    exported: tuple[Program, Path, Path],
) -> None:
    _, bundle, out = exported
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    assert set(before) == {"stage-0.onnx", "stage-1.onnx", MANIFEST}
    with pytest.raises(UsageError, match="--force"):
        export_stages(str(bundle), out)
    export_stages(str(bundle), out, force=True)
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before
    (out / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"notes\.txt"):
        export_stages(str(bundle), out, force=True)
    (out / "notes.txt").unlink()


@pytest.mark.parametrize("name", ["bert", "mlp"])
def test_a_program_without_stages_is_refused(name: str, tmp_path: Path) -> None:
    bundle = save_bundle(tiny(name), tmp_path / "b")
    with pytest.raises(UsageError, match="no stages"):
        export_stages(str(bundle), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def _forge(content: dict[str, Any], change: str) -> None:
    first, last = content["stages"][0], content["stages"][-1]
    if change == "path":
        first["file"] = "../stage-0.onnx"
    elif change == "hash":
        first["sha256"] = "0" * 64
    elif change == "received":
        last["receives"] = []
    elif change == "output":
        last["outputs"] = []
    elif change == "input":
        first["inputs"].append("secret")
    elif change == "type":
        content["stages"] = 3
    else:
        content["format"] = 2


@pytest.mark.parametrize("change", ["path", "hash", "received", "output", "input", "type", "later"])
def test_a_forged_manifest_is_refused(
    change: str, exported: tuple[Program, Path, Path], tmp_path: Path
) -> None:
    for file in exported[2].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    content = json.loads((tmp_path / MANIFEST).read_text())
    _forge(content, change)
    (tmp_path / MANIFEST).write_text(json.dumps(content))
    with pytest.raises(BundleError):
        StagedModel(tmp_path)


def test_inputs_are_asked_for_by_name(exported: tuple[Program, Path, Path]) -> None:
    program, _, out = exported
    model = StagedModel(out)
    probe = program.signature.probe()
    with pytest.raises(UsageError, match="missing input"):
        model({"input_ids": probe["input_ids"]})
    with pytest.raises(UsageError, match="did you mean"):
        model({**probe, "input_idz": probe["input_ids"]})


def test_the_command(command: Any, exported: tuple[Program, Path, Path], tmp_path: Path) -> None:
    ran = command("export", exported[1], "--stages", "-o", tmp_path / "s", "--json")
    assert ran.status == 0 and (tmp_path / "s" / MANIFEST).is_file()
    assert ran.data["drift"]["relative"] < 1e-4
