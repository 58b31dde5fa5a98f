"""Rotary embeddings: found by structure, one operator each, the same numbers at every shape."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ftc.graph.capture import capture_module
from ftc.graph.program import Program
from ftc.graph.sources import capture
from ftc.runtime.lower import lower
from ftc.runtime.lowering.rotary import find_rotary
from ftc.runtime.parity import parity
from ftc.runtime.session import OnnxSession
from ftc.tests.families import family


def kinds(program: Program) -> Counter[str]:
    return Counter(node.op_type for node in lower(program).graph)


def agree(program: Program) -> None:
    dims = program.signature.dims
    probes = [
        program.signature.probe(seed=1, **dict.fromkeys(dims, 1)),
        program.signature.probe(seed=2, **{d: 3 + 8 * i for i, d in enumerate(dims)}),
    ]
    assert parity(program, OnnxSession(lower(program)), probes).relative < 1e-5


@pytest.mark.parametrize("name", ["llama", "qwen2", "mistral", "phi"])
def test_two_a_layer_in_every_family_that_has_them(name: str, tmp_path: Path) -> None:
    family(name).save(tmp_path)
    program = capture(str(tmp_path))
    found = kinds(program)
    assert found["RotaryEmbedding"] == 4
    assert found["Neg"] == 0, "something is still written out"
    agree(program)


class Turn(nn.Module):
    """Turns the first ``width`` of 8 channels; ``how`` says what is unusual about it."""

    def __init__(self, width: int = 8, how: str = "") -> None:
        super().__init__()
        self.width, self.how = width, how
        self.register_buffer("steps", 0.5 ** torch.arange(width // 2))

    def forward(self, x: Tensor) -> Tensor:
        place = torch.arange(x.shape[2]).float()[None, :, None] * self.steps
        other = place * 2 if self.how == "two angles" else place
        angle = torch.cat([place, other], -1)
        cos, sin = angle.cos().unsqueeze(1), angle.sin().unsqueeze(1)
        if self.how == "scaled":
            cos, sin = cos * 1.5, sin * 1.5
        part, rest = x[..., : self.width], x[..., self.width :]
        half = self.width // 2
        first, second = part[..., :half], part[..., half:]
        turned = [second, -first] if self.how == "backwards" else [-second, first]
        y = part * cos + torch.cat(turned, -1) * sin
        return torch.cat([y, rest], -1) if self.width < 8 else y


def turn(width: int = 8, how: str = "") -> Program:
    example = torch.randn(2, 3, 5, 8)
    dims = {"x": {0: "batch", 2: "sequence"}}
    return capture_module(Turn(width, how).eval(), {"x": example}, dynamic=dims)


@pytest.mark.parametrize(("width", "how"), [(8, ""), (4, ""), (8, "scaled"), (4, "scaled")])
def test_whole_and_part_of_a_head(width: int, how: str) -> None:
    program = turn(width, how)
    assert [each.width for each in find_rotary(program).values()][-1] == width
    assert kinds(program)["RotaryEmbedding"] == 1
    agree(program)


@pytest.mark.parametrize("how", ["two angles", "backwards"])
def test_what_only_looks_like_one_is_left(how: str) -> None:
    program = turn(8, how)
    assert not find_rotary(program)
    agree(program)
