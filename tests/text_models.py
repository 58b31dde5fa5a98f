"""Small random text models with a tokenizer, captured once a session from their folders."""

from __future__ import annotations

import functools
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ftc.graph.program import Program
from ftc.graph.sources import capture

from .families import FAMILIES
from .small import decoder

TEXT = "the cat sits on the mat ."
"""Seven tokens of the tokenizer that every model here has."""
_KEPT = tempfile.TemporaryDirectory(prefix="ftc-text-models-")


@functools.cache
def _assets() -> Path:
    return decoder(Path(_KEPT.name) / "tokenizer")


@functools.cache
def text_model(name: str) -> tuple[nn.Module, Program]:
    """The family ``name`` of tests/families.py: in transformers, and captured."""
    family = next(f for f in FAMILIES if f.name == name)
    folder = Path(_KEPT.name) / name
    model = family.save(folder)
    return model, replace(capture(folder), assets=_assets())


def text_ids() -> Tensor:
    """The ids of :data:`TEXT`."""
    from ftc.graph.sources.tokenizer import tokenizer

    found = tokenizer(_assets())
    return torch.tensor(found(TEXT, add_special_tokens=False)["input_ids"])


def with_text(program: Program, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Outputs with :data:`TEXT` in front of every row, of the caller's tokens alone."""
    count = len(text_ids())
    front = {"input_ids": text_ids(), "attention_mask": torch.ones(count, dtype=torch.int64)}
    joined = dict(inputs)
    for name in inputs.keys() & {"input_ids", "attention_mask", "token_type_ids"}:
        row = front.get(name, torch.zeros(count, dtype=torch.int64))
        joined[name] = torch.cat([row.expand(len(inputs[name]), -1), inputs[name]], 1)
    with torch.no_grad():
        outputs = program(joined)
    return {
        spec.name: outputs[spec.name][:, count:] if "sequence" in spec.shape else outputs[spec.name]
        for spec in program.signature.outputs
    }


def assert_same(
    wanted: dict[str, Tensor], got: dict[str, Tensor], mask: Tensor, tolerance: float = 1e-5
) -> None:
    """Outputs agree wherever ``mask`` shows a token."""
    assert wanted.keys() == got.keys()
    for name, expected in wanted.items():
        found = got[name]
        assert found.shape == expected.shape
        if expected.shape[:2] == mask.shape:
            expected, found = expected[mask.bool()], found[mask.bool()]
        torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)
