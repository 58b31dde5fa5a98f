"""Narrow: rows that nobody reads are left out, and nothing else changes, noise included."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, fx, nn

from ftc.graph.mode import set_mode
from ftc.graph.narrow import narrow
from ftc.graph.program import Program, build_module
from ftc.graph.shapes import shape
from ftc.passes.pipeline import Pipeline
from ftc.runtime.training.modules import in_mode
from ftc.tests.tiny import custom

aten = torch.ops.aten
WIDTH = 8


class Block(nn.Module):
    """Attention, then a feed-forward block with dropout, then a read of rows."""

    def __init__(self, read: str) -> None:
        super().__init__()
        self.read = read
        self.table, self.q = nn.Embedding(20, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.norm, self.drop = nn.LayerNorm(WIDTH), nn.Dropout(0.4)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.drop(self.table(ids))
        q = self.q(x).unsqueeze(1)
        x = x + self.drop(nn.functional.scaled_dot_product_attention(q, q, q).squeeze(1))
        y = self.norm(x + self.drop(self.down(nn.functional.gelu(self.up(x)))))
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-5)
        if self.read == "first":
            return y[:, 0].tanh()
        if self.read == "all but two":
            return y[:, 2:]
        if self.read == "last shown":
            last = (ids != 0).sum(1) - 1
            return y[torch.arange(ids.shape[0]), last]
        if self.read == "sums":
            return y.cumsum(1)[:, 0]
        return y[:, 0] + y.sum(1)


def program_of(read: str) -> Program:
    torch.manual_seed(0)
    return custom(Block(read), ids=torch.arange(1, 13).view(2, 6))


def plain(program: Program, training: bool) -> Program:
    """The program in a mode, all rows computed."""
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(program.graph, copied))
    module = build_module(dict(program.tensors()), graph)
    set_mode(module, training=training)
    return replace(program, module=module)


def rows_of_products(program: Program) -> list[int]:
    """The rank of what each product with a feed-forward weight yields."""
    return [len(shape(n)) for n in program.graph.nodes if n.target is aten.linear.default
            and str(n.args[1]).startswith(("up", "down"))]  # fmt: skip


READS = ["first", "all but two", "last shown"]
PROMPT = "prompt{tokens=3}"


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("read", "passes"), [*((r, "") for r in READS), ("first", PROMPT)])
def test_outputs_and_gradients_are_those_of_all_rows(
    read: str, passes: str, training: bool
) -> None:
    program = Pipeline.parse(passes).run(program_of(read)).program
    ids = torch.randint(1, 20, (3, 5))
    found = []
    for each in (plain(program, training), in_mode(program, training=training)):
        torch.manual_seed(7)
        output = each.module(ids)[0]
        output.square().sum().backward()
        parameters = [p for p in program.module.parameters() if p.grad is not None]
        found.append([output, *(p.grad for p in parameters), torch.rand(1)])
        for parameter in parameters:
            parameter.grad = None
    for whole, narrowed in zip(*found, strict=True):
        torch.testing.assert_close(narrowed, whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("passes", ["", PROMPT])
def test_the_feed_forward_block_runs_over_the_rows_that_are_read(passes: str) -> None:
    program = Pipeline.parse(passes).run(program_of("first")).program
    assert rows_of_products(program) == [3, 3]
    assert rows_of_products(in_mode(program, training=True)) == [2, 2]
    assert rows_of_products(program) == [3, 3], "the program itself stays"


@pytest.mark.parametrize("read", ["sums", "all"])
def test_a_read_stops_where_other_rows_matter(read: str) -> None:
    """At a sum over rows, and at a value that is read whole as well."""
    program = program_of(read)
    ids = torch.randint(1, 20, (3, 6))
    assert rows_of_products(in_mode(program, training=False)) == [3, 3]
    whole, narrowed = (p.module(ids)[0] for p in (program, in_mode(program, training=False)))
    torch.testing.assert_close(narrowed, whole)


@pytest.mark.parametrize("passes", ["lora{target=ffn}", "int8{min_size=0}"])
def test_adapters_and_codes_are_narrowed_too(passes: str) -> None:
    program = Pipeline.parse(passes).run(program_of("first")).program
    narrowed = narrow(plain(program, False))
    ids = torch.randint(1, 20, (3, 5))
    torch.testing.assert_close(narrowed.module(ids)[0], program.module(ids)[0])
    products = [n for n in narrowed.graph.nodes if "linear" in str(n.target)]
    assert sum(len(shape(n)) == 2 for n in products) >= 2
