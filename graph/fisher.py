"""What a change of a weight does to a program's outputs, to second order.

For a product ``y = W x`` and a change ``D`` of its weight, with ``g`` the gradient
of the loss at ``y``,

    E (g^T D x)^2  ~  tr(F D G D^T),    G = E x x^T [in, in],   F = E g g^T [out, out]

(the Kronecker approximation of the Fisher matrix: Martens and Grosse, arXiv
1503.05671). The loss is the distance to the program's own outputs, so no labels
are needed: where the outputs are scores, the divergence of the probabilities, whose
Hessian is the covariance of the gradient for an answer drawn from them; where
they are states, the squared relative error, whose Hessian is that of the gradient
along a random direction. So one backward pass gives every product's ``F``, and losses
of different products are in one unit.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn.functional import cross_entropy, linear

from .drift import valid_rows
from .program import Program

Inputs = Mapping[str, Tensor]
_STATES = ("feature-extraction", "module")  # tasks whose outputs are not scores
_RANDOM_RUNS = 4


@dataclass
class Moments:
    """Second moments of each product.

    Attributes:
        inputs: ``G`` by the node that makes the products' input, float32 ``[in, in]``.
        gradients: ``F`` by the product's node, float32 ``[out, out]``; where the product
            has more outputs than inputs its diagonal ``[out]``, which is as good there
            (an elementwise function comes next) and a third of all memory less. A
            product that no gradient reaches is not in it.
    """

    inputs: dict[fx.Node, Tensor] = field(default_factory=dict)
    gradients: dict[fx.Node, Tensor] = field(default_factory=dict)


def moments(
    program: Program, inputs: Sequence[Inputs], nodes: Collection[fx.Node],
    *, random_share: float = 0.0, seed: int = 0,
) -> Moments:  # fmt: skip
    """The moments of ``nodes``, from one forward and backward pass over ``inputs``.

    Args:
        program: is not changed.
        inputs: tensors by input name, one mapping a run; one at least.
        nodes: products ``linear(x, W, b)`` of the program.
        random_share: how much random inputs weigh, in [0, 1): they reach what the
            given ones never use, which other texts may.
        seed: of random inputs and directions.
    """
    found = Moments()
    generator = torch.Generator().manual_seed(seed)
    sizes = [next(iter(given.values())).numel() for given in inputs]
    for given, size in zip(inputs, sizes, strict=True):
        _add(found, program, given, nodes, (1 - random_share) * size / sum(sizes), generator)
    for run in range(_RANDOM_RUNS if random_share else 0):
        given = _random_like(program, inputs[0], seed + run)
        _add(found, program, given, nodes, random_share / _RANDOM_RUNS, generator)
    return found


def _random_like(program: Program, given: Inputs, seed: int) -> dict[str, Tensor]:
    """Random inputs of the sizes of ``given``."""
    sizes = {
        name: size
        for spec in program.signature.inputs
        for name, size in zip(spec.shape, given[spec.name].shape, strict=True)
        if isinstance(name, str)
    }
    return program.signature.probe(seed=seed, **sizes)


def _add(
    found: Moments, program: Program, given: Inputs, nodes: Collection[fx.Node],
    weight: float, generator: torch.Generator,
) -> None:  # fmt: skip
    with torch.enable_grad():
        frozen = _Watched(program.clone(), program, nodes, found, weight)
        outputs = frozen.run(*program.signature.bind(given))
        loss = _loss(program, outputs, given, generator)
        if loss is not None:
            loss.backward()  # type: ignore[no-untyped-call]


def _loss(
    program: Program, outputs: Sequence[Tensor], given: Inputs, generator: torch.Generator
) -> Tensor | None:
    """A scalar whose gradient at the outputs has their Hessian as its covariance."""
    scores = program.signature.task not in _STATES
    total: Tensor | None = None
    for spec, output in zip(program.signature.outputs, outputs, strict=True):
        if not output.requires_grad:
            continue
        valid = valid_rows(spec.shape, given, program.signature)
        rows = output[valid] if valid is not None else output.reshape(-1, output.shape[-1])
        part = _answers(rows, generator) if scores else _direction(rows, generator)
        part = part / max(len(rows), 1) ** 0.5
        total = part if total is None else total + part
    return total


def _answers(scores: Tensor, generator: torch.Generator) -> Tensor:
    """Minus the log-likelihood of an answer drawn from each row of scores."""
    drawn = torch.multinomial(scores.detach().float().softmax(-1), 1, generator=generator)
    lost: Tensor = cross_entropy(scores, drawn[:, 0], reduction="sum")
    return lost


def _direction(states: Tensor, generator: torch.Generator) -> Tensor:
    """Each row along a random direction, relative to the row's length."""
    length = states.detach().norm(dim=-1, keepdim=True)
    random = torch.randn(states.shape, generator=generator, dtype=states.dtype)
    along: Tensor = (states * random / length.clamp_min(1e-12)).sum()
    return along


class _Watched(fx.Interpreter):
    """Runs a program with gradients from its first product on, and adds moments up.

    Hooks know the sums and not the interpreter: a tensor that its own hook holds is
    never freed.
    """

    def __init__(
        self, clone: Program, program: Program, nodes: Collection[fx.Node],
        found: Moments, weight: float,
    ) -> None:  # fmt: skip
        super().__init__(clone.module, garbage_collect_values=True)
        clone.module.requires_grad_(False)
        pairs = zip(program.graph.nodes, clone.graph.nodes, strict=True)
        self._original = {copy: node for node, copy in pairs if node in nodes}
        self._found, self._weight = found, weight
        self._seen: set[fx.Node] = set()

    def run_node(self, n: fx.Node) -> Any:
        """A watched product is computed on an input that has a gradient."""
        node = self._original.get(n)
        if node is None:
            return super().run_node(n)
        args, _ = self.fetch_args_kwargs_from_env(n)
        x = args[0] if args[0].requires_grad else args[0].detach().requires_grad_()
        source: Any = node.args[0]
        if source not in self._seen:
            self._seen.add(source)
            rows = x.detach().flatten(0, -2).float()
            _add_gram(self._found.inputs, source, rows, self._weight / max(len(rows), 1))
        result = linear(x, *args[1:])
        sums, weight = self._found.gradients, self._weight
        diagonal = result.shape[-1] > x.shape[-1]

        def keep(gradient: Tensor) -> None:
            rows = gradient.detach().flatten(0, -2).float()
            if diagonal:
                sums[node] = sums.get(node, 0) + rows.square().sum(0) * weight
            else:
                _add_gram(sums, node, rows, weight)

        result.register_hook(keep)  # type: ignore[no-untyped-call]
        return result


def _add_gram(sums: dict[fx.Node, Tensor], node: fx.Node, rows: Tensor, weight: float) -> None:
    width = rows.shape[1]
    if node not in sums:
        sums[node] = torch.zeros(width, width)
    sums[node].addmm_(rows.T, rows, alpha=weight)
