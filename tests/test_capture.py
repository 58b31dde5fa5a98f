"""Capture: gradients, in-place writes, modes, interfaces and refusals, on hand-written modules."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ftc.graph.capture import capture_module
from ftc.graph.errors import CaptureError, UsageError
from ftc.graph.mode import set_mode


class Guarded(nn.Module):
    """A branch without gradients, with autocast switched off inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = self.a(x)
            with torch.autocast("cpu", enabled=False):
                y = y * torch.tensor([1.0, 2.0, 3.0, 4.0])
        return self.b(x) + y


class Writes(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x + 0
        y += 1
        z = torch.relu_(y)
        return y * z


class Shares(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x + 0
        row = y[0]
        y += 1
        return y + row


class Branches(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


class Casts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.a(x)


class Loops(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        state, states = x[:, 0], []
        for place in range(x.shape[1]):
            state = torch.tanh(state + x[:, place])
            states.append(state)
        return torch.stack(states, 1)


class Depth(nn.Module):
    """Stochastic depth: in train mode a whole branch is left out at random."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.drop = nn.Linear(4, 4), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.drop(self.a(x))
        if self.training:
            y = y * (torch.rand(x.shape[0], 1) < 0.5)
        return x + y


class Dropped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.drop, self.norm = nn.Linear(8, 8), nn.Dropout(0.5), nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        q = self.norm(self.a(x)).view(-1, 2, 4, 1)
        y = nn.functional.scaled_dot_product_attention(
            q, q, q, dropout_p=0.25 if self.training else 0.0
        )
        return {"y": self.drop(y.flatten(1)), "x": x}


def test_what_ran_without_gradients_stays_without() -> None:
    model = Guarded()
    program = capture_module(model, torch.randn(3, 4))
    x = torch.randn(5, 4)
    torch.testing.assert_close(program(x=x)["output"], model(x))
    program(x=x)["output"].sum().backward()
    have = {name: p.grad is not None for name, p in program.module.named_parameters()}
    assert have == {"a.weight": False, "a.bias": False, "b.weight": True, "b.bias": True}


def test_in_place_writes_become_functional() -> None:
    program = capture_module(Writes(), torch.randn(3, 4))
    x = torch.randn(6, 4)
    torch.testing.assert_close(program(x=x)["output"], Writes()(x))
    targets = [n.target for n in program.graph.nodes if n.op == "call_function"]
    assert not any(t._schema.is_mutable for t in targets)


@pytest.mark.parametrize(
    ("model", "words"),
    [(Shares(), "others share"), (Branches(), "control flow"), (Casts(), "autocast")],
)
def test_what_cannot_be_captured_names_its_line(model: nn.Module, words: str) -> None:
    with pytest.raises(CaptureError, match=words) as caught:
        capture_module(model, torch.randn(3, 4))
    assert caught.value.fix
    assert caught.value.where and ".py:" in caught.value.where


def test_a_loop_over_positions_names_its_line_and_its_size() -> None:
    example, dynamic = torch.randn(2, 7, 3), {"x": {0: "batch", 1: "length"}}
    with pytest.raises(CaptureError, match="length = 7") as caught:
        capture_module(Loops(), example, dynamic=dynamic)
    assert "range(x.shape[1])" in caught.value.where
    assert "{'x': {0: 'batch'}}" in caught.value.fix
    program = capture_module(Loops(), example, dynamic={"x": {0: "batch"}})
    x = torch.randn(3, 7, 3)
    torch.testing.assert_close(program(x=x)["output"], Loops()(x))


def test_noise_of_the_train_mode_is_not_kept() -> None:
    torch.manual_seed(0)
    model = Depth()
    program = capture_module(model, torch.randn(4, 4))
    assert "random numbers" in program.notes[0]
    x = torch.randn(6, 4)
    torch.testing.assert_close(program(x=x)["output"], model.eval()(x))
    assert set_mode(program.module, training=True) == 1


def test_train_mode_is_a_rewrite_that_comes_back() -> None:
    torch.manual_seed(0)
    model = Dropped()
    program = capture_module(model, torch.randn(4, 8))
    assert program.signature.output_names == ("y", "x")
    model.eval()
    x = torch.randn(6, 8)
    torch.testing.assert_close(program(x=x)["y"], model(x)["y"])
    text = str(program.graph)
    assert set_mode(program.module, training=True) == 3
    program.module.recompile()
    torch.manual_seed(1)
    dropped = program(x=x)["y"]
    assert (dropped == 0).any()
    set_mode(program.module, training=False)
    assert str(program.graph) == text


def test_the_model_is_left_as_it_was() -> None:
    model = Dropped().eval()
    model.drop.train()
    capture_module(model, torch.randn(4, 8))
    assert not model.training and model.drop.training and not model.a.training


def test_an_example_of_size_one_is_refused() -> None:
    with pytest.raises(UsageError, match="size 1 along 'batch'"):
        capture_module(Writes(), torch.randn(1, 4))


def test_weights_are_shared_and_structure_is_not() -> None:
    model = Guarded()
    program = capture_module(model, torch.randn(3, 4))
    clone = program.clone()
    assert clone.tensor("a.weight").data_ptr() == model.a.weight.data_ptr()
    clone.module.get_parameter("a.weight").requires_grad_(False)
    assert program.module.get_parameter("a.weight").requires_grad
