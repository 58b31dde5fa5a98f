"""Products of one row at 4 bits, alone: ftc's beside onnxruntime's own MatMulNBits.

The products of SmolLM2, apart from everything between them, so that nothing but
their kernels and what prepares their inputs is measured. Products that share an input
share one here; every weight is read once a run, so that they come from memory as they
do when text is generated. The head is timed alone.

    python bench/products.py [--rows 1] [--seconds 5] [--json FILE]

Ratios are times as fast as MatMulNBits at accuracy level 4, interleaved, one thread.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from models import smollm2
from quantize_routes import open_session, quantize_blocks
from tell import say
from torch import Tensor, nn

from ftc.graph.capture import capture_module
from ftc.graph.products import products
from ftc.graph.program import Program
from ftc.graph.sources import capture
from ftc.passes.pipeline import Pipeline
from ftc.runtime.lower import lower
from ftc.runtime.lowering.file import save_onnx
from ftc.runtime.measure import interleaved, machine, noise, ratio

OURS = ("int4", "int4{keep=false}")
THEIRS = "MatMulNBits 4"


class Products(nn.Module):
    """Products by some weights; those of one group read one input, ``x0``, ``x1``, ..."""

    def __init__(self, groups: Sequence[Sequence[Tensor]]) -> None:
        super().__init__()
        self.groups = nn.ModuleList(nn.ModuleList(map(_linear, group)) for group in groups)

        def forward(**xs: Tensor) -> list[Tensor]:
            pairs = zip(xs.values(), self.groups, strict=True)
            return [product(x) for x, group in pairs for product in group]

        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD  # torch.export has no dynamic ``**xs``
        named = [inspect.Parameter(f"x{i}", kind) for i in range(len(groups))]
        forward.__signature__ = inspect.Signature(named)  # type: ignore[attr-defined]
        self.forward = forward


def _linear(weight: Tensor) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    made.weight = nn.Parameter(weight)
    return made


def groups(program: Program) -> tuple[list[list[Tensor]], list[list[Tensor]]]:
    """Weights by shared input, those that something else reads too (the head) apart."""
    layers: dict[Any, list[Tensor]] = {}
    heads: dict[Any, list[Tensor]] = {}
    for each in products(program):
        shared = len(each.node.args[1].users) > 1  # type: ignore[union-attr]
        weight = program.tensor(each.weight).detach()
        (heads if shared else layers).setdefault(each.x, []).append(weight)
    return list(layers.values()), list(heads.values())


def captured(given: Sequence[Sequence[Tensor]]) -> Program:
    """The products of ``given`` as a program, with as many rows as one likes."""
    xs = {f"x{i}": torch.randn(2, group[0].shape[1]) for i, group in enumerate(given)}
    return capture_module(Products(given).eval(), xs, dynamic={name: {0: "rows"} for name in xs})


def session(path: Path, rows: int) -> Callable[[], object]:
    """A run of the file on random rows."""
    made = open_session(path)
    draw = np.random.default_rng(0).standard_normal
    feed = {i.name: draw((rows, i.shape[1])).astype(np.float32) for i in made.get_inputs()}
    return partial(made.run, None, feed)


def measure(name: str, given: list[list[Tensor]], options: Any, scratch: Path) -> dict[str, Any]:
    """Times of one set of products."""
    program = captured(given)
    save_onnx(lower(program), path := scratch / f"{name}.onnx")
    quantize_blocks(path, path, 4)
    runs = {THEIRS: session(path, options.rows)}
    for spec in OURS:
        say(f"{name}: {spec}")
        save_onnx(lower(Pipeline.parse(spec).run(program).program), path)
        runs[spec] = session(path, options.rows)
    times = interleaved(runs, seconds=options.seconds, most=10_000)
    return {
        label: {**timing.to_dict(), "speed": ratio(times[THEIRS], timing),
                "noise": noise(times[THEIRS], timing) if label != THEIRS else ""}
        for label, timing in times.items()
    }  # fmt: skip


def main() -> None:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    program = capture(str(smollm2()), task="causal-lm")
    layers, heads = groups(Pipeline.parse("canonicalize").run(program).program)
    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name, given in (("layers", layers), ("head", heads)):
            found[name] = measure(name, given, options, Path(scratch))
    for name, rows in found.items():
        print(f"{name}, {options.rows} row(s)")
        for label, row in rows.items():
            noisy = f"  noisy: {row['noise']}" if row["noise"] else ""
            print(f"  {label:20} {row['median'] * 1e6:9.0f} us  {row['speed']:.3f}x{noisy}")
    if options.json:
        options.json.write_text(json.dumps({"machine": machine(), **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
