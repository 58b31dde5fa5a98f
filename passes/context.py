"""What a pass may know beyond the program: probes, calibration data, budget, seed, target.

Promises are measured on *probes*: inputs given by the user, or random ones that
the signature makes at sizes other than a typical example's. The outputs of a
program on its probes are computed once (:meth:`Context.outputs`): in a pipeline
the outputs after one pass are the outputs before the next.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, fx

from ftc.graph.cache_inputs import Names, present_of
from ftc.graph.cached import is_cached, states, step_inputs
from ftc.graph.errors import UsageError
from ftc.graph.program import Program
from ftc.graph.signature import Signature
from ftc.graph.target import Target, target

Inputs = Mapping[str, Tensor]
_PROBE_SIZES = ((2, 7, 11, 17), (3, 13, 19, 5))
_FEW, _ROWS, _ELEMENTS = 4, 256, 1 << 18  # of random rows; all inputs together


@dataclass(frozen=True)
class Context:
    """The circumstances of a run.

    Attributes:
        probes: inputs that drift is measured on; empty: two random ones.
        probe_source: where the probes come from, in words, for the report.
        calibration: inputs that data-aware passes learn statistics from, or None.
        max_drift: largest relative drift that is accepted, or None.
        seed: of everything random.
        target: the machine that will run the program.
        shapes: sizes of the dynamic dimensions that it will meet; empty: not known.
        proven: another process runs the same passes on the same program and tests their
            promises: here nothing is run for that, so no weight is read.
    """

    probes: tuple[Inputs, ...] = ()
    probe_source: str = "random inputs"
    calibration: Sequence[Inputs] | None = None
    max_drift: float | None = None
    seed: int = 0
    target: Target = field(default_factory=lambda: target("portable"))
    shapes: tuple[Mapping[str, int], ...] = ()
    proven: bool = False
    _outputs: WeakKeyDictionary[fx.GraphModule, tuple[dict[str, Tensor], ...]] = field(
        default_factory=WeakKeyDictionary, repr=False, compare=False
    )

    @classmethod
    def for_program(cls, program: Program, **fields: Any) -> Context:
        """A context whose probes are random inputs of ``program``, unless ``fields`` has some."""
        fields.setdefault("probes", random_probes(program, fields.get("seed", 0)))
        return cls(**fields)

    def probes_for(self, program: Program) -> tuple[Inputs, ...]:
        """The probes, or random ones where ``program`` takes other inputs than they give.

        Those that are too long for it are cut.
        """
        types = program.signature.input_types
        if self.probes and all(_types(probe) == types for probe in self.probes):
            return tuple(cut_to_limits(probe, program.signature) for probe in self.probes)
        return random_probes(program, self.seed)

    def within(self, program: Program) -> Context:
        """The same circumstances, with calibration inputs no longer than ``program`` takes."""
        if not self.calibration or not program.signature.limits:
            return self
        cut = [cut_to_limits(given, program.signature) for given in self.calibration]
        return replace(self, calibration=cut)  # and the same computed outputs

    def outputs(self, program: Program) -> tuple[dict[str, Tensor], ...]:
        """Outputs of ``program`` on each of its probes, computed once for one module.

        Weights that are written in place afterwards are not noticed: use a new
        context for a program that was trained.
        """
        if program.module not in self._outputs:
            self._outputs[program.module] = tuple(
                run_probe(program, probe) for probe in self.probes_for(program)
            )
        return self._outputs[program.module]

    def adopt(self, before: Program, after: Program) -> None:
        """Says that ``after`` has the arithmetic and the weights of ``before``."""
        if before.module in self._outputs:
            self._outputs[after.module] = self._outputs[before.module]


def _types(inputs: Inputs) -> dict[str, torch.dtype]:
    return {name: tensor.dtype for name, tensor in inputs.items()}


def random_probes(program: Program, seed: int = 0) -> tuple[Inputs, ...]:
    """Two sets of random inputs of different sizes, the same for the same seed."""
    signature = program.signature
    probes = []
    for index, sizes in enumerate(_PROBE_SIZES):
        wanted = dict(zip(signature.dims, sizes, strict=False))
        probes.append(random_probe(program, wanted, seed + index))
    return tuple(probes)


def random_probe(program: Program, sizes: Mapping[str, int], seed: int) -> Inputs:
    """Random inputs of these sizes, or less where ``program`` takes less.

    Keys and values of earlier tokens are what it makes of random tokens: numbers that no token
    has are no inputs that it gets, and rounding is another on them.
    """
    signature = program.signature
    legal = {d: min(n, signature.limits.get(d, n)) for d, n in sizes.items()}
    probe = signature.probe(seed=seed, **legal)
    if not is_cached(signature) or not probe[Names.MASK].shape[1]:
        return probe
    tokens, mask = signature.inputs[0], probe[Names.MASK]
    generator = torch.Generator().manual_seed(seed + 1)
    ids = torch.randint(tokens.low, tokens.high, mask.shape, generator=generator)
    earlier = run_probe(program, step_inputs(signature, ids, mask.long(), {}))
    made = {spec.name: earlier[present_of(spec.name)] for spec in states(signature)}
    return {**probe, **made}


def random_rows(program: Program, seed: int = 0) -> tuple[Inputs, ...]:
    """Random inputs to learn from where there is no calibration data, none of them a probe.

    What is learned from the probes fits them, and drift measured on them then says little.
    """
    signature = program.signature
    names = signature.dims
    fixed = sum(math.prod(d for d in i.shape if isinstance(d, int)) for i in signature.inputs)
    most = max(_FEW, min(_ROWS, _ELEMENTS // max(fixed, 1)))
    wanted = dict(zip(names, (most,) if len(names) == 1 else (8, 32), strict=False))
    return tuple(random_probe(program, wanted, seed + 1000 + index) for index in range(2))


def cut_to_limits(inputs: Inputs, signature: Signature) -> Inputs:
    """Inputs without what lies beyond the largest legal sizes."""
    made = dict(inputs)
    for spec in signature.inputs:
        for axis, dim in enumerate(spec.shape):
            limit = signature.limits.get(dim) if isinstance(dim, str) else None
            if limit is not None and spec.name in made and made[spec.name].shape[axis] > limit:
                made[spec.name] = made[spec.name].narrow(axis, 0, limit)
    return made


def run_probe(program: Program, probe: Inputs) -> dict[str, Tensor]:
    """Outputs of ``program`` on one probe, without gradients, seeded.

    Raises:
        UsageError: when the program does not run on it.
    """
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            return program(probe)
        except (RuntimeError, IndexError, ValueError) as error:
            sizes = ", ".join(f"{name} {list(t.shape)}" for name, t in probe.items())
            raise UsageError(
                f"the program does not run on a probe: {str(error).splitlines()[0]}",
                where=sizes,
                fix="give inputs that it accepts as probes",
            ) from error
