"""Modules, factories, archives, bundles, and what is none of them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ftc.graph.bundle import save_bundle
from ftc.graph.errors import CaptureError, UsageError
from ftc.graph.sources import capture

from .families import FAMILIES, Mlp
from .places import refused, same

BERT = next(f for f in FAMILIES if f.name == "bert")


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bert")
    BERT.save(folder)
    return folder


def make_mlp() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return Mlp(), torch.randn(2, 12)


def test_modules_need_examples() -> None:
    refused(lambda: capture(Mlp()), "example", kind=UsageError)


FACTORY = """
import torch
from torch import nn

def good():
    torch.manual_seed(0)
    return nn.Linear(3, 4), {"input": torch.randn(2, 3)}

def bare():
    return nn.Linear(3, 4)

def bad():
    raise OSError("no such weights")

def odd():
    return 7

class maker:
    make = staticmethod(good)

number = 3
"""


@pytest.fixture
def factory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"factory_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    return name


def test_factories(factory: str) -> None:
    program = capture(f"{factory}:good")
    assert program.signature.input_names == ("input",)
    assert program.signature.dims == ("batch",)
    assert same(program, capture(f"{factory}:maker.make"))
    assert capture(f"{factory}:bare", examples=torch.randn(2, 3)).signature == program.signature


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("god", ["god", "good"]),
        ("bad", ["OSError", "no such weights", ".py:13"]),
        ("odd", ["int", "nn.Module"]),
        ("number", ["number", "callable"]),
    ],
)
def test_wrong_factories(factory: str, name: str, words: list[str]) -> None:
    refused(lambda: capture(f"{factory}:{name}"), *words)


def test_a_factory_without_examples(factory: str) -> None:
    refused(lambda: capture(f"{factory}:bare"), "example", kind=UsageError)


def test_an_unknown_module() -> None:
    refused(lambda: capture("no_such_package.models:make"), "no_such_package")


def test_a_factory_whose_module_is_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_factory.py").write_text("x = 1 / 0\n")
    monkeypatch.chdir(tmp_path)
    refused(lambda: capture("broken_factory:make"), "ZeroDivisionError", "broken_factory.py:1")


def test_archives_only_with_trust(tmp_path: Path) -> None:
    model, x = make_mlp()
    batch = torch.export.Dim("batch")
    exported = torch.export.export(model.eval(), (x,), dynamic_shapes=({0: batch},))
    path = tmp_path / "model.pt2"
    torch.export.save(exported, path)
    refused(lambda: capture(path), "--trust", "code")
    program = capture(path, trust=True)
    assert program.signature.dims == ("batch",)
    other = torch.randn(5, 12)
    with torch.no_grad():
        torch.testing.assert_close(program(x=other)["output"], model(other))
    path.write_bytes(b"PK nothing")
    refused(lambda: capture(path, trust=True), "model.pt2")


def test_bundles_are_sources(tmp_path: Path) -> None:
    model, x = make_mlp()
    program = capture(model, examples=x)
    path = save_bundle(program, tmp_path / "bundle")
    assert same(capture(path), program)
    assert same(capture(str(path), task="module"), program)
    refused(lambda: capture(path, task="causal-lm"), "module", kind=UsageError)


@pytest.mark.parametrize("name", ["model.onnx", "model.safetensors", "config.json", "notes.txt"])
def test_other_files(tmp_path: Path, name: str) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / name).write_text("{}")
    refused(lambda: capture(tmp_path / "sub" / name), *(["sub"] if "config" not in name else []))


def test_an_empty_folder_and_one_too_far_up(bert: Path, tmp_path: Path) -> None:
    refused(lambda: capture(tmp_path), "no model")
    shutil.copytree(bert, tmp_path / "inner")
    refused(lambda: capture(tmp_path), "inner")


class Branch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return x + 1
        return x - 1


def test_a_model_that_does_not_trace_shows_its_line() -> None:
    error = refused(
        lambda: capture(Branch(), examples=torch.ones(2, 3)), "torch.where", kind=CaptureError
    )
    assert error.where and "if x.sum() > 0" in error.where
