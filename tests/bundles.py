"""What tests of bundles share: a program that is hard to save, and how a folder is compared."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ftc.graph.bundle import load_bundle
from ftc.graph.capture import capture_module
from ftc.graph.errors import BundleError
from ftc.graph.program import Program

from .families import Mlp


class Odd(nn.Module):
    """What makes saving hard: a tie, a transposed weight, scalars, infinities, a strided buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 8)
        self.head = nn.Linear(8, 20, bias=False)
        self.head.weight = self.table.weight
        self.mix = nn.Parameter(torch.randn(6, 8).t())
        self.frozen = nn.Parameter(torch.randn(8), requires_grad=False)
        self.register_buffer("scale", torch.tensor(2.0))
        self.register_buffer("every", torch.randn(16)[::2])
        self.register_buffer("keep", torch.rand(6) > 0.5)
        self.drop = nn.Dropout(0.5)

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        x = self.table(ids) * self.frozen + self.every
        y = (x @ self.mix).masked_fill(~self.keep, -math.inf).softmax(-1)
        q = x.unsqueeze(1)
        z = nn.functional.scaled_dot_product_attention(q, q, q, dropout_p=0.1 * self.training)
        return {"mixed": y, "logits": self.head(self.drop(z.squeeze(1))) * self.scale}


def odd() -> Program:
    torch.manual_seed(0)
    dims = {"ids": {0: "batch", 1: "sequence"}}
    return capture_module(Odd(), {"ids": torch.randint(0, 20, (2, 5))}, dynamic=dims)


def mlp(seed: int = 0) -> Program:
    torch.manual_seed(seed)
    return capture_module(Mlp(), torch.randn(2, 12))


def files(folder: Path) -> dict[str, bytes]:
    return {
        p.relative_to(folder).as_posix(): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


def hashes(folder: Path) -> str:
    return hashlib.sha256(repr(files(folder)).encode()).hexdigest()


def broken(bundle: Path, *words: str) -> None:
    with pytest.raises(BundleError) as caught:
        load_bundle(bundle)
    for word in words:
        assert word in str(caught.value)
