"""What was trained is what ships: onnxruntime computes what each strategy made of each base."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ftc.graph.program import Program
from ftc.graph.sources import capture
from ftc.passes.pipeline import Pipeline
from ftc.runtime.lower import lower
from ftc.runtime.parity import TOLERANCE, parity
from ftc.runtime.session import OnnxSession
from ftc.runtime.training.engine import EngineOptions, OneProcess
from ftc.runtime.training.modules import owned, trainable
from ftc.runtime.training.objectives import Batch, Scene, parse_objective

from .small import decoder

BASES = {"fp32": "", "int8": "int8{min_size=0}", "int4": "int4{group_size=16,min_size=0}"}
STRATEGIES = {
    "full": 'freeze{train="all"}',
    "ffn": 'freeze{train="ffn"}',
    "lora": "lora{rank=2,target=product}",
    "prefix": "prefix{tokens=3}",
    "soft prompt": "prompt{tokens=3}",
    "hard prompt": 'prompt{text="the cat is"}',
    "folded prompt": 'prompt{text="the cat is",fold=true}',
}


# What is in codes does not learn, and this model's feed-forward blocks have no biases.
PAIRS = [(s, b) for b in BASES for s in STRATEGIES if s != "ffn" or b == "fp32"]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Program]:
    """A small causal model in each of ``BASES``."""
    program = capture(decoder(tmp_path_factory.mktemp("ships")))
    return {name: Pipeline.parse(p).run(program).program for name, p in BASES.items()}


@pytest.mark.parametrize(("strategy", "base"), PAIRS)
def test_a_trained_program_ships(bases: dict[str, Program], strategy: str, base: str) -> None:
    start = Pipeline.parse(STRATEGIES[strategy]).run(bases[base]).program
    program = owned(start)
    _train(program)
    learned = trainable(program)
    assert learned and not any(torch.equal(t, start.tensor(n)) for n, t in learned.items())
    sizes = [(2, 8), (1, 1), (3, 17)]
    probes = [program.signature.probe(batch=b, sequence=s) for b, s in sizes]
    drift = parity(program, OnnxSession(lower(program)), probes)  # raises beyond rounding
    assert base != "fp32" or drift.relative <= TOLERANCE


def _train(program: Program, steps: int = 2) -> None:
    scene: Any = Scene(program, None)  # type: ignore[arg-type]
    engine = OneProcess(program, parse_objective("clm"), scene, EngineOptions())
    optimizer = torch.optim.AdamW(engine.parameters().values(), lr=1e-2)
    for step in range(steps):
        inputs = program.signature.probe(seed=step, batch=3, sequence=9)
        targets = inputs["input_ids"].roll(-1, 1)
        engine.gradients([Batch(inputs, {"tokens": targets}, {"loss": 27.0}, 3, 27)])
        optimizer.step()
        optimizer.zero_grad()
    engine.finish()
