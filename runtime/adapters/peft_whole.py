"""Modules that were trained whole beside adapters, in the form that PEFT keeps them in.

They stand by their own names behind PEFT's prefix: ``base_model.model.`` beside
low-rank adapters, ``base_model.`` beside prefixes and soft prompts. Biases that train
alone stand by their names too, below ``base_layer`` in an adapted module. A classifier of
PEFT's always has its head in the folder, trained or not.
"""

from __future__ import annotations

from collections.abc import Mapping, Set

import torch
from torch import Tensor

from ftc.graph.adapters import adapter_kind
from ftc.graph.errors import UsageError
from ftc.graph.program import Program
from ftc.graph.structure import find_structure

from .files import makers, trained_parts

BIAS = ".bias"
_CLASSIFIERS = ("sequence-classification", "token-classification")


def lone_biases(program: Program) -> frozenset[str]:
    """Biases that train besides adapters where the weight of their module does not."""
    trained = trained_parts(program)
    named = {name for name, _ in program.module.named_parameters()}
    return frozenset(
        name for name in trained if name.endswith(BIAS) and not adapter_kind(name)
        and (weight := f"{name.removesuffix(BIAS)}.weight") in named and weight not in trained
    )  # fmt: skip


def whole_to_peft(program: Program, *, without: Set[str] = frozenset()) -> dict[str, Tensor]:
    """Parameters that train besides adapters, with the rest of their modules, by their own names.

    Args:
        program: with adapters.
        without: names to leave out.

    Raises:
        UsageError: for what a pass has added, which PEFT's model has no place for.
    """
    trained = {n: t for n, t in trained_parts(program).items()
               if n not in without and not adapter_kind(n)}  # fmt: skip
    _refuse_added(program, trained)
    modules = {name.rpartition(".")[0] for name in trained}
    return {
        name: parameter.detach()
        for name, parameter in program.module.named_parameters()
        if name.rpartition(".")[0] in modules and not adapter_kind(name)
    }


def head_to_peft(program: Program) -> dict[str, Tensor]:
    """A classifier's head by its own names, trained or not; nothing of other models.

    Raises:
        UsageError: for a head that a pass has added, which PEFT's model has no place for.
    """
    if program.signature.task not in _CLASSIFIERS:
        return {}
    names = find_structure(program).roles["head"]
    head = {n: p.detach() for n, p in program.module.named_parameters() if n in names}
    _refuse_added(program, head)
    return head


def whole_from_peft(program: Program, whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What was trained whole, by the names that the graph reads.

    PEFT also stores some weights that were not trained (embeddings beside an adapted
    head), and with ``bias="all"`` those of a saved module twice, before and after.
    """
    held = dict(program.module.named_parameters())
    found = {}
    for stored, tensor in whole.items():
        if ".original_module." in stored:
            continue
        name = stored.replace(".modules_to_save.", ".")
        own = next(iter(program.with_ties({name}) & held.keys()), name)
        if own not in held or not torch.equal(held[own].detach(), tensor.to(held[own].dtype)):
            found[own] = tensor
    return found


def _refuse_added(program: Program, names: Mapping[str, Tensor]) -> None:
    if made := sorted(makers(program, names)):
        raise UsageError(
            f"PEFT's model has no place for what {made[0]} added: {', '.join(sorted(names))}",
            fix="save it in ftc's own format: save_adapters",
        )
