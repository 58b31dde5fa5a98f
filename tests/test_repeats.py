"""Layers that are traced once: the graph is that of a whole trace, or the whole model is traced."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ftc.graph.capture import module as capturing
from ftc.graph.capture.alike import alike_layers
from ftc.graph.printer import fingerprint
from ftc.graph.program import Program
from ftc.graph.provenance import provenance
from ftc.graph.sources import capture

from .families import family

COUNTS = ("num_hidden_layers", "n_layer", "num_layers")


@pytest.fixture
def copied(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each capture copied layers."""
    found: list[bool] = []
    by_copies = capturing._captured_once_each

    def spy(*args: Any, **kwargs: Any) -> Program | None:
        program = by_copies(*args, **kwargs)
        found.append(program is not None)
        return program

    monkeypatch.setattr(capturing, "_captured_once_each", spy)
    return found


def whole(monkeypatch: pytest.MonkeyPatch, make: Callable[[], Program]) -> Program:
    with monkeypatch.context() as patch:
        patch.setattr(capturing, "_captured_once_each", lambda *_, **__: None)
        return make()


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert-tokens", "t5-encoder"])
def test_the_graph_is_that_of_a_whole_trace(
    name: str, tmp_path: Path, copied: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = family(name)
    layers = {key: 5 if key in kind.options else None for key in COUNTS}
    options = {**kind.options, **{k: v for k, v in layers.items() if v}}
    dataclasses.replace(kind, options=options).save(tmp_path)
    program = capture(str(tmp_path))
    assert copied == [True]
    expected = whole(monkeypatch, lambda: capture(str(tmp_path)))
    assert fingerprint(program) == fingerprint(expected)
    assert [provenance(n) for n in program.graph.nodes] == [
        provenance(n) for n in expected.graph.nodes
    ]
    assert [n for n, _ in program.tensors()] == [n for n, _ in expected.tensors()]


class Layer(nn.Module):
    """``x + tanh(W x)``, and what a test adds."""

    def __init__(self, number: int, says: Any = None) -> None:
        super().__init__()
        self.number, self.says = number, says
        self.linear = nn.Linear(8, 8)
        self.shared: nn.Module | None = None

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.linear(x))
        return x + (y if self.shared is None else self.shared(y))


class Numbered(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / (1 + self.number)


class Told(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu() if self.says.kinds[self.number] else super().forward(x)


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.steps = nn.ModuleList(Layer(i) for i in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for step in self.steps:
            x = step(x)
        return x


class Stack(nn.Module):
    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Reading(Stack):
    """Gives its layers a tensor past their arguments."""

    def forward(self, x: Tensor) -> Tensor:
        doubled = x * 2
        for layer in self.layers:
            layer.says.now = doubled
            x = layer(x)
        return x


class Hearing(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.says.now


def check(model: nn.Module, copied: list[bool], wanted: list[bool]) -> Program:
    torch.manual_seed(0)
    model.eval()
    program = capture(model, examples=torch.randn(2, 8))
    assert copied == wanted
    x = torch.randn(5, 8)
    with torch.no_grad():
        torch.testing.assert_close(program({"x": x})["output"], model(x))
    assert not any("ftc::" in str(n.target) for n in program.graph.nodes)
    assert all("forward" not in vars(module) for module in model.modules())
    return program


def test_layers_keep_their_own_weights(copied: list[bool]) -> None:
    model = Stack([Layer(i) for i in range(6)])
    program = check(model, copied, [True])
    names = {name for name, _ in program.tensors()}
    assert names == {name for name, _ in model.named_parameters()}
    assert all(parameter.requires_grad for parameter in program.module.parameters())


def test_lists_inside_layers_are_copied_with_them(copied: list[bool]) -> None:
    check(Stack([Nested() for _ in range(4)]), copied, [True])


def test_a_layer_that_computes_with_its_number_is_noticed(copied: list[bool]) -> None:
    check(Stack([Numbered(i) for i in range(4)]), copied, [False])


def test_a_list_with_an_entry_a_layer_makes_kinds(copied: list[bool]) -> None:
    says = SimpleNamespace(kinds=[0, 1, 0, 1, 0, 1, 1])
    model = Stack([Told(i, says) for i in range(7)])
    assert [list(kind) for kind in alike_layers(model)] == [
        [f"layers.{i}" for i in (0, 2, 4)],
        [f"layers.{i}" for i in (1, 3, 5, 6)],
    ]
    check(model, copied, [True])


def test_what_is_read_past_the_arguments_is_noticed(copied: list[bool]) -> None:
    check(Reading([Hearing(i, SimpleNamespace()) for i in range(4)]), copied, [False])


@pytest.mark.parametrize("difference", ["shape", "attribute", "hook", "frozen", "tie", "class"])
def test_layers_that_differ_are_not_alike(difference: str) -> None:
    layers: list[Any] = [Layer(i) for i in range(3)]
    if difference == "shape":
        layers[1].linear = nn.Linear(8, 8, bias=False)
    elif difference == "attribute":
        layers[1].says = "other"
    elif difference == "hook":
        layers[1].register_forward_hook(lambda *_: None)
    elif difference == "frozen":
        layers[1].linear.weight.requires_grad_(False)
    elif difference == "tie":
        layers[1].linear.weight = layers[2].linear.weight
    else:
        layers[1] = Numbered(1)
    assert list(alike_layers(Stack(layers))) == []


def test_a_layer_with_a_module_of_others_is_alone() -> None:
    layers = [Layer(i) for i in range(3)]
    for layer in layers:
        layer.shared = layers[0].linear
    assert list(alike_layers(Stack(layers))) == []


class Rows(nn.Module):
    """Layers that are alike, and as many dynamic dimensions as inputs."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(layers))

    def forward(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        for layer in self.layers:
            first, second = layer(first), layer(second)
        return first, second


def test_dimensions_may_have_any_name(copied: list[bool]) -> None:
    torch.manual_seed(0)
    model = Rows(4).eval()
    examples = {"first": torch.randn(2, 8), "second": torch.randn(3, 8)}
    dims = {"first": {0: "rows"}, "second": {0: "others"}}
    program = capture(model, examples=examples, dynamic=dims)
    assert copied and program.signature.dims == ("rows", "others")
    given = {"first": torch.randn(5, 8), "second": torch.randn(7, 8)}
    for expected, found in zip(model(**given), program(given).values(), strict=True):
        torch.testing.assert_close(found, expected)
