"""Engines of several processes: gradients of every mesh and schedule are those of one process."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ftc.graph.bundle import save_bundle
from ftc.graph.errors import UsageError
from ftc.passes.pipeline import Pipeline
from ftc.runtime.training.engines import Mesh
from ftc.runtime.training.engines.deferred import Deferred
from ftc.runtime.training.engines.schedules import (
    SCHEDULES,
    check_microbatches,
    check_options,
    kind_of,
    owners,
)

from .processes import spread
from .spread import Gradients, one, spread_gradients, still
from .tiny import custom, tiny

MESHES = [
    "dp=2", "fsdp=3", "dp=2,fsdp=2", "pp=2/gpipe", "pp=4/1f1b", "pp=2/interleaved",
    "pp=2/looped-bfs", "pp=2/zero-bubble", "pp=4/zbv", "pp=2/dualpipev",
    "pp=2,dp=2/1f1b", "pp=2,fsdp=2/1f1b",
    "tp=2", "tp=2,dp=2", "tp=2,fsdp=2", "tp=2,pp=2/1f1b",
]  # fmt: skip
PROGRAMS = {
    "llama": "", "t5": "", "unet": "", "gpt2": "",
    "llama-frozen front": 'freeze{train="layer[1] & ffn"}',
    "llama-int8 base": "int8,lora{rank=4}",
}  # fmt: skip
ALL_PROGRAMS = {"fsdp=3", "pp=2/interleaved", "tp=2"}
FEW = ("llama", "unet", "llama-frozen front")
Made = Mapping[str, tuple[Path, dict[str, float], Gradients]]


class UNet(nn.Module):
    """Down, across and up again, with a skip from each level to the same level."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.norm = nn.GroupNorm(2, 8)
        self.c, self.d = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(16, 8, 3, padding=1)
        self.e = nn.Conv2d(16, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        first = torch.relu(self.a(x))
        second = torch.relu(self.norm(self.b(nn.functional.avg_pool2d(first, 2))))
        low = torch.tanh(self.c(nn.functional.avg_pool2d(second, 2)))
        up = nn.functional.interpolate(low, scale_factor=2.0)
        up = torch.relu(self.d(torch.cat([up, second], 1)))
        up = nn.functional.interpolate(up, scale_factor=2.0)
        return self.e(torch.cat([up, first], 1))


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Bundles, and what one process computes of each."""
    found = {}
    torch.manual_seed(0)
    for name, passes in PROGRAMS.items():
        family = name.partition("-")[0]
        program = custom(UNet(), x=torch.randn(2, 3, 8, 8)) if family == "unet" else tiny(family)
        program = Pipeline.parse(passes).run(program).program if passes else program
        folder = tmp_path_factory.mktemp("programs") / family
        save_bundle(still(program), folder)
        found[name] = (folder, *one(folder))
    return found


@pytest.mark.parametrize("case", MESHES)
def test_gradients_are_those_of_one_process(case: str, programs: Made) -> None:
    mesh, _, schedule = case.partition("/")
    chosen = PROGRAMS if case in ALL_PROGRAMS else FEW
    _compare({n: programs[n] for n in chosen if n != "unet" or "tp" not in mesh}, mesh, schedule)


@pytest.mark.parametrize("case", ["dp=2", "fsdp=2", "tp=2", "pp=2/1f1b", "pp=2/zero-bubble"])
def test_layers_may_be_computed_again(case: str, programs: Made) -> None:
    mesh, _, schedule = case.partition("/")
    _compare({"llama": programs["llama"]}, mesh, schedule, gradient_checkpointing=True)


def _compare(programs: Made, mesh: str, schedule: str, **options: bool) -> None:
    folders = [folder for folder, _, _ in programs.values()]
    count, schedule = Mesh.parse(mesh).size, schedule or "1f1b"
    results = spread(count, spread_gradients, folders, mesh, schedule, options)
    for i, (name, (_, losses, gradients)) in enumerate(programs.items()):
        _check(name, [result[i] for result in results], losses, gradients)


def test_gradients_of_weights_wait() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    module = custom(model, input=torch.randn(2, 4)).module
    deferred, x = Deferred(), torch.randn(3, 4, requires_grad=True)
    expected = torch.autograd.grad(module(x)[0].square().sum(), [x, *module.parameters()])
    deferred.defer(module)
    for _ in range(2):
        module(x)[0].square().sum().backward()
    names = [name for name, _ in module.named_parameters()]
    waits = [p.grad is None for p in module.parameters()]
    assert waits == [name.endswith("weight") for name in names]
    deferred.take()()
    for found, wanted in zip([x, *module.parameters()], expected, strict=True):
        torch.testing.assert_close(found.grad, 2 * wanted)


def _check(name: str, results: list, losses: dict[str, float], expected: Gradients) -> None:
    norm = torch.stack([g.double().norm() for g in expected.values()]).norm().item()
    for found, _, length, (means, sums) in results:
        assert found == pytest.approx(losses, rel=1e-6), name
        assert length == pytest.approx(norm, rel=1e-6), name
        assert means == pytest.approx(losses, rel=1e-5) and sums == {"seen": 16.0}, name
    gradients = results[0][1]
    for key, gradient in expected.items():
        own = torch.from_numpy(gradients.pop(key))
        # a bias of keys adds the same to all scores of a query, so its gradient is zero up to
        # rounding (BERT, GPT-2): that is compared with the norm of all gradients
        worst = (own - gradient).norm() / max(gradient.norm().item(), 1e-4 * norm)
        assert worst <= 1e-6, f"{name} {key}: {worst}"
    assert all(not rest.any() for rest in gradients.values()), name


@pytest.mark.parametrize(
    ("text", "fix"), [("dp=0", "dp=2"), ("pd=2", "dp"), ("dp", "dp=2"), ("dp=2,dp=2", "once")]
)
def test_a_mesh_that_says_nothing_is_refused(text: str, fix: str) -> None:
    with pytest.raises(UsageError) as caught:
        Mesh.parse(text)
    assert fix in str(caught.value.fix)
    assert str(Mesh.parse("pp=2, dp=3")) == "pp=2,dp=3"


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_stage_has_one_process(name: str) -> None:
    kind = kind_of(name)
    where = owners(kind, 3)
    assert sorted(where) == sorted(list(range(3)) * kind.stages)
    check_microbatches(kind, 6, 3)
    if kind.least:
        with pytest.raises(UsageError, match="microbatches"):
            check_microbatches(kind, 2, 3)
    check_options(name, sharded=False, compiled=False)
    for more in ({"sharded": True, "compiled": False}, {"sharded": False, "compiled": True}):
        with (
            pytest.raises(UsageError, match=f"--pipeline {name} does not go")
            if kind.splits
            else nullcontext()
        ):
            check_options(name, **more)
