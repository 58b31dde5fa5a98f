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

A product with fewer outputs than inputs needs ``G`` only as ``W G W^T [out, out]``,
which is the second moment of its outputs (:func:`ftc.graph.spectrum.spectrum`): of a
product that narrows to a third, a ninth of the memory and of the work.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from .drift import valid_rows
from .matrices import input_level, input_rows, is_gather, output_rows, source
from .observe import observe
from .pieces import Inputs, pieces, positions, random_like, sampled, windows
from .program import Program

_Add = Callable[[float, Tensor], None]
_STATES = ("feature-extraction", "module")  # tasks whose outputs are not scores
_RANDOM_RUNS = 4
_DRAWN_AT_ONCE = 16  # rows of scores
_AT_ONCE = 48  # tokens of a run: its activations and scores are all that is kept
_BACKWARD = 4096  # tokens that are run backward


@dataclass
class Moments:
    """Second moments of each product.

    Attributes:
        inputs: ``G`` by :func:`ftc.graph.matrices.source`, float32 ``[in, in]``.
        outputs: ``W G W^T`` by the product's node, float32 ``[out, out]``, where it was
            asked for in place of ``G``.
        levels: mean of the diagonal of ``G`` by that key, where ``outputs`` were asked for.
        shares: of each row of a table that is looked up, by the gather's node, float32
            ``[vocabulary]``.
        gradients: ``F`` by the product's node, float32 ``[out, out]``; where the product
            has more outputs than inputs its diagonal ``[out]``, which is as good there
            (an elementwise function comes next) and a third of all memory less. Of a
            gather ``[width, width]``. A product that no gradient reaches is not in it.
    """

    inputs: dict[fx.Node, Tensor] = field(default_factory=dict)
    outputs: dict[fx.Node, Tensor] = field(default_factory=dict)
    levels: dict[fx.Node, float] = field(default_factory=dict)
    shares: dict[fx.Node, Tensor] = field(default_factory=dict)
    gradients: dict[fx.Node, Tensor] = field(default_factory=dict)


def moments(
    program: Program, inputs: Sequence[Inputs], nodes: Collection[fx.Node],
    *, by_outputs: Collection[fx.Node] = (), gradients: bool = True, random_share: float = 0.0,
    seed: int = 0,
) -> Moments:  # fmt: skip
    """The moments of ``nodes``, from one pass over ``inputs``.

    Args:
        program: is not changed.
        inputs: tensors by input name, one mapping a run; one at least.
        nodes: products ``linear(x, W, b)``, convolutions and gathers of the program
            (:mod:`ftc.graph.matrices`).
        by_outputs: those of ``nodes`` that have ``W G W^T`` in place of ``G``.
        gradients: whether to find ``F``, which takes a backward pass.
        random_share: how much random inputs weigh, in [0, 1): they reach what the
            given ones never use, which other texts may.
        seed: of random inputs and directions.
    """
    found = Moments()
    generator = torch.Generator().manual_seed(seed)
    parts = _parts(program, inputs, 1 - random_share, gradients)
    if random_share:
        like = partial(random_like, program.signature, parts[0].given)
        random = [like(seed + run) for run in range(_RANDOM_RUNS)]
        parts += _parts(program, random, random_share, gradients)
    copy = program.clone()
    copy.module.requires_grad_(False)
    sums = _Sums(found, program, nodes, by_outputs)
    for part in parts:
        if not part.gradients:  # up to the last product
            observe(program, [part.given], sums.watch(part.inputs))
            continue
        with torch.enable_grad():
            watched = _Watched(copy, program, nodes, sums, part)
            outputs = watched.run(*program.signature.bind(part.given))
        _backward(program, outputs, part.given, generator)
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
    """Runs that weigh ``share`` together; evenly spread windows of them run backward."""
    signature = program.signature
    split = pieces(signature, inputs, _AT_ONCE)
    cut = [window for given in split for window in windows(signature, given, _AT_ONCE)]
    back = sampled(signature, cut, _BACKWARD) if gradients else []
    size, learned = (sum(positions(signature, given) for given in runs) for runs in (split, back))
    whole = {id(given) for given in split}
    both = whole & {id(given) for given in back}

    def part(given: Inputs, forward: bool, backward: bool) -> _Part:
        own = share * positions(signature, given)
        return _Part(given, own / size * forward, own / learned if backward else 0.0)

    made = [part(given, True, id(given) in both) for given in split]
    return made + [part(given, False, True) for given in back if id(given) not in both]


class _Sums:
    """Adds up what values of a run say about the products' inputs."""

    def __init__(
        self, found: Moments, program: Program, nodes: Collection[fx.Node],
        by_outputs: Collection[fx.Node],
    ) -> None:  # fmt: skip
        self._found, self.gradients = found, found.gradients
        self._biases = {node: _bias(program, node) for node in by_outputs}
        self._adds: dict[Any, dict[Any, _Add]] = defaultdict(dict)  # by what is watched
        for node in nodes:
            x, key = node.args[0], source(node)
            if is_gather(node):
                self._adds[node.args[1]][node] = partial(self._add_share, program, node)
            elif node in self._biases:
                self._adds[x].setdefault(("level", key), partial(self._add_level, node))
                # a product's value may be the input of another, which is added too
                self._adds[node]["output", node] = partial(self._add_output, node)
            else:  # shared by the products that read it
                self._adds[x][key] = partial(self._add_input, node)

    def watch(self, weight: float) -> dict[fx.Node, Callable[[Tensor], None]]:
        """A callback for each watched node of a run that weighs ``weight``."""
        return {node: partial(self.add, node, weight) for node in self._adds}

    def add(self, node: fx.Node, weight: float, value: Tensor) -> None:
        """Adds the rows of one value, if it is watched."""
        for add in self._adds.get(node, {}).values():
            add(weight, value.detach())

    def _add_input(self, node: fx.Node, weight: float, value: Tensor) -> None:
        rows = input_rows(node, value).float()
        _add_gram(self._found.inputs, source(node), rows, weight / max(len(rows), 1))

    def _add_level(self, node: fx.Node, weight: float, value: Tensor) -> None:
        levels, key = self._found.levels, source(node)
        levels[key] = levels.get(key, 0.0) + weight * input_level(node, value)

    def _add_output(self, node: fx.Node, weight: float, value: Tensor) -> None:
        rows, bias = output_rows(node, value).float(), self._biases[node]
        rows = rows if bias is None else rows - bias
        _add_gram(self._found.outputs, node, rows, weight / max(len(rows), 1))

    def _add_share(self, program: Program, node: fx.Node, weight: float, value: Tensor) -> None:
        table: Any = node.args[0]
        count = torch.bincount(value.flatten(), minlength=len(program.tensor(str(table.target))))
        shares = self._found.shares
        shares[node] = shares.get(node, 0) + count * (weight / max(value.numel(), 1))


def _bias(program: Program, node: fx.Node) -> Tensor | None:
    bias: Any = node.args[2] if len(node.args) > 2 else None
    return None if bias is None else program.tensor(str(bias.target)).detach()


def _backward(
    program: Program, outputs: Sequence[Tensor], given: Inputs, generator: torch.Generator
) -> None:
    """Runs gradients back whose covariance is the Hessian at the outputs."""
    scores = program.signature.task not in _STATES
    reached, gradients = [], []
    for spec, output in zip(program.signature.outputs, outputs, strict=True):
        if not output.requires_grad:
            continue
        rows = output.detach().reshape(-1, output.shape[-1])
        gradient = _answers(rows, generator) if scores else _direction(rows, generator)
        gradient = gradient.reshape(output.shape)
        valid = valid_rows(spec.shape, given, program.signature)
        if valid is not None:
            gradient[~valid] = 0
        count = len(rows) if valid is None else int(valid.sum())
        reached.append(output)
        gradients.append(gradient.div_(max(count, 1) ** 0.5))
    if reached:
        torch.autograd.backward(reached, gradients)


def _answers(scores: Tensor, generator: torch.Generator) -> Tensor:
    """Gradients of minus the log-likelihood of an answer drawn from each row of scores."""
    chances = scores.softmax(-1)
    for start in range(0, len(chances), _DRAWN_AT_ONCE):
        some = chances[start : start + _DRAWN_AT_ONCE]
        drawn = torch.multinomial(some.float(), 1, generator=generator)
        some.scatter_add_(1, drawn, -torch.ones_like(drawn, dtype=some.dtype))
    return chances


def _direction(states: Tensor, generator: torch.Generator) -> Tensor:
    """Each row along a random direction, relative to the row's length."""
    length = states.norm(dim=-1, keepdim=True)
    random = torch.randn(states.shape, generator=generator, dtype=states.dtype)
    return random.div_(length.clamp_min(1e-12))


class _Watched(fx.Interpreter):
    """Runs a program with gradients from its first product on, and adds moments up.

    Hooks know the sums and not the interpreter: a tensor that its own hook holds is
    never freed.
    """

    def __init__(
        self, clone: Program, program: Program, nodes: Collection[fx.Node], sums: _Sums,
        part: _Part,
    ) -> None:  # fmt: skip
        super().__init__(clone.module, garbage_collect_values=True)
        pairs = zip(program.graph.nodes, clone.graph.nodes, strict=True)
        self._original = {copy: node for node, copy in pairs}
        self._nodes, self._sums, self._part = nodes, sums, part

    def run_node(self, n: fx.Node) -> Any:
        """What is watched is added up."""
        node = self._original[n]
        result = self._product(n, node) if node in self._nodes else super().run_node(n)
        if self._part.inputs:
            self._sums.add(node, self._part.inputs, result)
        return result

    def _product(self, n: fx.Node, node: fx.Node) -> Tensor:
        """A product is computed on an input that has a gradient, a gather gets one."""
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        target: Any = n.target
        if is_gather(n):
            result: Tensor = target(*args, **kwargs).requires_grad_()
            diagonal = False
        else:
            x = args[0] if args[0].requires_grad else args[0].detach().requires_grad_()
            result = target(x, *args[1:], **kwargs)
            diagonal = len(args[1]) > args[1][0].numel()
        sums, weight = self._sums.gradients, self._part.gradients

        def keep(gradient: Tensor) -> None:
            rows = output_rows(node, gradient.detach()).float()
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
