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

``F`` needs less data than ``G``: what matters at an output is the same for most texts.
So of long calibration data only a part, spread over the whole, is run backward; the
rest runs forward, up to the last product.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn.functional import cross_entropy, linear

from .drift import valid_rows
from .observe import observe
from .pieces import Inputs, dynamic_sizes, pieces, positions, shortened
from .program import Program

_STATES = ("feature-extraction", "module")  # tasks whose outputs are not scores
_RANDOM_RUNS = 4
_AT_ONCE = 128  # tokens of a run: its activations and scores are all that is kept
_BACKWARD = 4096  # tokens that are run backward


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
    *, gradients: bool = True, random_share: float = 0.0, seed: int = 0,
) -> Moments:  # fmt: skip
    """The moments of ``nodes``, from one pass over ``inputs``.

    Args:
        program: is not changed.
        inputs: tensors by input name, one mapping a run; one at least.
        nodes: products ``linear(x, W, b)`` of the program.
        gradients: whether to find ``F``, which takes a backward pass.
        random_share: how much random inputs weigh, in [0, 1): they reach what the
            given ones never use, which other texts may.
        seed: of random inputs and directions.
    """
    found = Moments()
    generator = torch.Generator().manual_seed(seed)
    parts = _parts(program, inputs, 1 - random_share, gradients)
    if random_share:
        random = [_random_like(program, parts[0].given, seed + run) for run in range(_RANDOM_RUNS)]
        parts += _parts(program, random, random_share, gradients)
    copy = program.clone()
    copy.module.requires_grad_(False)
    for part in parts:
        if part.gradients:
            with torch.enable_grad():
                outputs = _Watched(copy, program, nodes, found, part).run(
                    *program.signature.bind(part.given)
                )
                loss = _loss(program, outputs, part.given, generator)
                if loss is not None:
                    loss.backward()  # type: ignore[no-untyped-call]
        else:
            _add_inputs(found, program, part, nodes)
    return found


@dataclass(frozen=True)
class _Part:
    """Inputs of one run, and how much they weigh in each moment; 0: not in it."""

    given: Inputs
    inputs: float
    gradients: float


def _parts(
    program: Program, inputs: Sequence[Inputs], share: float, gradients: bool
) -> list[_Part]:
    """Runs that weigh ``share`` together; evenly spread ones of them also run backward."""
    signature = program.signature
    split = pieces(signature, inputs, _AT_ONCE)
    length = sum(positions(signature, given) for given in split)
    step = math.ceil(length / _BACKWARD) if gradients else len(split) + 1
    back = [gradients and index % step == 0 for index in range(len(split))]
    split = [shortened(signature, given, _AT_ONCE) if its else given
             for given, its in zip(split, back, strict=True)]  # fmt: skip
    sizes = [positions(signature, given) for given in split]
    learned = sum(size for size, its in zip(sizes, back, strict=True) if its)
    return [
        _Part(given, share * size / sum(sizes), share * size / learned if its else 0.0)
        for given, size, its in zip(split, sizes, back, strict=True)
    ]


def _random_like(program: Program, given: Inputs, seed: int) -> dict[str, Tensor]:
    """Random inputs of the sizes of ``given``."""
    sizes = dynamic_sizes(program.signature, given)
    return program.signature.probe(seed=seed, **sizes)


def _add_inputs(found: Moments, program: Program, part: _Part, nodes: Collection[fx.Node]) -> None:
    """A run forward."""
    sources: list[Any] = list(dict.fromkeys(node.args[0] for node in nodes))

    def watch(source: fx.Node) -> Callable[[Tensor], None]:
        def add(value: Tensor) -> None:
            rows = value.flatten(0, -2).float()
            _add_gram(found.inputs, source, rows, part.inputs / max(len(rows), 1))

        return add

    observe(program, [part.given], {source: watch(source) for source in sources})


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
        found: Moments, part: _Part,
    ) -> None:  # fmt: skip
        super().__init__(clone.module, garbage_collect_values=True)
        pairs = zip(program.graph.nodes, clone.graph.nodes, strict=True)
        self._original = {copy: node for node, copy in pairs if node in nodes}
        self._found, self._part = found, part
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
            _add_gram(self._found.inputs, source, rows, self._part.inputs / max(len(rows), 1))
        result = linear(x, *args[1:])
        sums, weight = self._found.gradients, self._part.gradients
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
