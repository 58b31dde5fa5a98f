"""Every family: captured from its folder, equal to eager at other shapes, kept by a bundle."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ftc.graph.bundle import load_bundle, save_bundle
from ftc.graph.mode import set_mode
from ftc.graph.program import Program
from ftc.runtime.lower import lower
from ftc.runtime.session import OnnxSession

from .families import FAMILIES, Family, captured

TOLERANCE = 1e-4
SHAPES = (
    {"batch": 1, "sequence": 5, "decoder_sequence": 3},
    {"batch": 3, "sequence": 21, "decoder_sequence": 11},
)


@dataclass(frozen=True)
class Case:
    family: Family
    model: nn.Module
    program: Program


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small lose more by waking threads than they gain."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda f: f.name)
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param, *captured(request.param.name))


def eager(case: Case, inputs: dict[str, Tensor]) -> dict[str, Any]:
    with torch.no_grad():
        result = case.model(**inputs)
    return {"output": result} if isinstance(result, Tensor) else dict(result)


def probes(program: Program) -> list[dict[str, Tensor]]:
    """Inputs at two shapes; alone in a batch and among others of other lengths."""
    dims = program.signature.dims
    return [
        program.signature.probe(seed=i, **{k: v for k, v in shape.items() if k in dims})
        for i, shape in enumerate(SHAPES)
    ]


def distance(name: str, actual: Tensor, expected: Tensor, inputs: dict[str, Tensor]) -> float:
    """Largest difference, padding aside: no model promises anything about that."""
    assert actual.shape == expected.shape, name
    mask = inputs.get("attention_mask")
    if mask is not None and actual.shape[:2] == mask.shape:
        actual, expected = actual[mask.bool()], expected[mask.bool()]
    return float((actual - expected).abs().max())


def test_task_and_dims(case: Case) -> None:
    signature = case.program.signature
    assert signature.task == case.family.task
    expected = ["batch"]
    expected += ["sequence"] * ("input_ids" in signature.input_names)
    expected += ["decoder_sequence"] * (signature.task == "seq2seq-lm")
    assert list(signature.dims) == expected
    for spec in signature.inputs:
        assert spec.shape[0] == "batch"


def test_parity(case: Case) -> None:
    for inputs in probes(case.program):
        expected = eager(case, inputs)
        with torch.no_grad():
            actual = case.program(inputs)
        assert actual
        for name, value in actual.items():
            assert distance(name, value, expected[name], inputs) <= TOLERANCE


def test_bundle_is_exact(case: Case, tmp_path: Path) -> None:
    again = load_bundle(save_bundle(case.program, tmp_path / "bundle"))
    assert again.signature == case.program.signature
    assert set(again.ties) == set(case.program.ties)
    before, after = dict(case.program.tensors()), dict(again.tensors())
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name
        assert type(tensor) is type(after[name]), name
        assert tensor.requires_grad == after[name].requires_grad, name
        assert tensor.stride() == after[name].stride(), name
    for inputs in probes(case.program):
        with torch.no_grad():
            for name, value in case.program(inputs).items():
                assert torch.equal(value, again(inputs)[name]), name


def test_dropout_comes_back(case: Case) -> None:
    """In train mode two calls differ exactly where the model's do; back in eval they do not."""
    program = case.program.clone()
    inputs = probes(program)[1]
    before = {k: v.detach() for k, v in program(inputs).items()}
    statistics = [(b, b.clone()) for b in (*program.module.buffers(), *case.model.buffers())]
    case.model.train()
    expected = random(lambda: eager(case, inputs), before)
    case.model.eval()
    set_mode(program.module, training=True)
    program.module.recompile()
    assert random(lambda: program(inputs), before) == expected
    for buffer, value in statistics:  # a batch norm in train mode moves its own
        buffer.copy_(value)
    set_mode(program.module, training=False)
    program.module.recompile()
    for name, value in program(inputs).items():
        assert torch.equal(value, before[name])


def random(call: Callable[[], dict[str, Any]], names: Iterable[str]) -> bool:
    """Whether two calls with other seeds give other values."""
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        results.append(call())
    return any(not torch.equal(results[0][name], results[1][name]) for name in names)


def test_onnx_parity(case: Case) -> None:
    session = OnnxSession(lower(case.program), threads=1)
    assert session.input_names == case.program.signature.input_names
    assert session.output_names == case.program.signature.output_names
    for inputs in probes(case.program):
        expected = eager(case, inputs)
        for name, value in session.run(inputs).items():
            assert distance(name, value, expected[name], inputs) <= TOLERANCE
