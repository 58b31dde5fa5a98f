"""What needs no model to be wrong is refused before one is captured."""

from __future__ import annotations

import gc
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from ftc.graph.capture import capture_module
from ftc.graph.errors import CaptureError, UsageError
from ftc.graph.quantized_ops import quantized_linear
from ftc.runtime.compile import compile_model
from ftc.runtime.tensors import read_tensors
from ftc.runtime.text import read_text

from .conftest import Command
from .tiny import tiny

NO_MODEL = "ftc.tests.small:no_such_factory"  # the error would be another if it were looked for


def refused(command: Command, out: Path, *options: object, words: str) -> None:
    """An error that says ``words`` and a fix, and leaves nothing behind."""
    ran = command("compile", NO_MODEL, "-o", out, *options)
    assert ran.status == 2 and words in ran.err and "fix: " in ran.err, ran.err
    assert not out.exists()


def test_calibration_data_is_read_before_capture(tmp_path: Path, command: Command) -> None:
    folder, rows = tmp_path / "texts", tmp_path / "rows.jsonl"
    folder.mkdir()
    rows.write_text('{"text": "a"}\n{"txt": "b"}\n')
    (noise := tmp_path / "noise.npz").write_bytes(bytes(range(100)))
    for calib, words in (
        (folder, f"{folder} is a folder"),
        (tmp_path / "none.txt", "there is no file"),
        (tmp_path / "none.npz", "there is no file"),
        (rows, f"{rows}:2"),
        (noise, f"{noise} is no .npz file"),
        ("", "no text is given"),
    ):
        refused(command, tmp_path / "out", "--passes", "int8", "--calib", calib, words=words)


@pytest.mark.parametrize(
    ("sizes", "value", "words"),
    [
        (((2, 8), (2, 9)), 9, "sequence is 8 in 'input_ids' and 9 in 'attention_mask'"),
        (((0, 8), (0, 8)), 9, "'input_ids' is empty"),
        (((2, 8), (2, 8)), 10**6, "input_ids holds 1000000"),
    ],
)
def test_tensors_that_do_not_fit_name_the_file(
    sizes: tuple[tuple[int, int], ...], value: int, words: str, tmp_path: Path
) -> None:
    ids, mask = sizes
    path = tmp_path / "given.npz"
    given = {"input_ids": np.full(ids, value), "attention_mask": np.ones(mask, dtype=np.int64)}
    signature = tiny("bert").signature
    np.savez(path, **{name: given[name] for name in signature.input_names})
    with pytest.raises(UsageError) as told:
        read_tensors(path, signature)
    assert words in told.value.what and told.value.where == str(path) and told.value.fix


def test_rows_of_jsonl_are_texts(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "one  two", "label": 1}\n\n{"text": "three"}\n')
    assert read_text(str(rows)).paragraphs == ("one two", "three")


@pytest.mark.parametrize("budget", ["-1", "nan", "inf"])
def test_a_budget_is_a_number_of_0_or_more(budget: str, tmp_path: Path, command: Command) -> None:
    refused(command, tmp_path / "out", "--passes", "int8", "--max-drift", budget, words=budget)


def test_no_passes_are_refused_on_the_command_line_only(tmp_path: Path, command: Command) -> None:
    refused(command, tmp_path / "out", "--passes", " ", words="no passes")
    report = compile_model("ftc.tests.small:mlp", "", tmp_path / "out")
    assert [step.name for step in report.steps] == ["original", "cleanup", "onnx"]


class Chooses(nn.Module):
    """Control flow that depends on values."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Not traceable."""
        return x * 2 if x.sum() > 0 else x


def test_a_failed_capture_prints_nothing_of_its_own(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(CaptureError, match="control flow") as caught:
        capture_module(Chooses(), torch.ones(3, 4))
    assert capfd.readouterr().err == ""
    report = "\n".join(getattr(caught.value.__cause__, "__notes__", ()))
    assert "aten.sum" in report  # what --debug shows


def test_collections_are_as_they_were_after_a_compile(tmp_path: Path) -> None:
    before = gc.isenabled(), gc.get_freeze_count()
    with pytest.raises(UsageError):
        compile_model(NO_MODEL, "int8", tmp_path, max_drift=-1.0)
    compile_model("ftc.tests.small:mlp", "cleanup", tmp_path / "out")
    assert (gc.isenabled(), gc.get_freeze_count()) == before


@pytest.mark.parametrize("outputs", [3, 1 << 11])
def test_integer_products_in_blocks_are_the_product(outputs: int) -> None:
    torch.manual_seed(0)
    x, data = torch.randn(2, 5, 200), torch.randint(-64, 65, (outputs, 200), dtype=torch.int8)
    scale = torch.rand(outputs, 1) + 0.5
    y = quantized_linear(x, data, scale, None, None, 8, 0, "row")
    expected = x.double() @ (data.double() * scale.double()).T
    assert y.shape == expected.shape
    assert float((y - expected).norm() / expected.norm()) < 0.02
