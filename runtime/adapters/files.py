"""Adapters in ftc's own format: what was trained, without the model it was trained on.

===================== ======================================================
adapters.json         format, the passes that made the adapters, the passes
                      of the base, a sketch of its weights, a hash
adapters.safetensors  the adapters, and whatever else was trained
===================== ======================================================

Loading runs the passes on the base and puts the tensors in. A base with other
weights is refused.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ftc.graph.adapters import adapter_kind
from ftc.graph.errors import BundleError, PreconditionError, UsageError
from ftc.graph.program import PassRecord, Program, attach, detach
from ftc.graph.provenance import provenance
from ftc.graph.words import listed
from ftc.passes.pipeline import Pipeline
from ftc.passes.registry import names

from .base import differing, sketch_base
from .folder import read_head, read_tensors, write

FORMAT = 1
HEAD, TENSORS = "adapters.json", "adapters.safetensors"


def save_adapters(program: Program, folder: str | Path, *, force: bool = False) -> Path:
    """Writes the adapters of ``program``, and all else that trains in it, as a folder.

    Args:
        program: with adapters, or a part of its parameters trained.
        folder: must not exist, or hold adapters and ``force`` be given.
        force: replace adapters that are there.

    Raises:
        UsageError: when nothing or everything was trained, or the folder is not free.
    """
    trained = trained_parts(program)
    count = sum(1 for _ in program.module.parameters())
    if not trained:
        raise UsageError(
            "nothing was added or trained: there are no adapters", fix="run lora first"
        )
    if len(trained) == count:
        raise UsageError("every parameter trains: that is a model", fix="save it as a bundle")
    made, before = _history(program, trained)

    def describe(digest: str) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "task": program.signature.task,
            "passes": [record.spec for record in made],
            "sha256": digest,
            "base": {
                "passes": [record.spec for record in before],
                "tensors": sketch_base(program, trained),
            },
        }

    return write(folder, HEAD, TENSORS, trained, describe, force=force)


def load_adapters(program: Program, folder: str | Path) -> Program:
    """``program`` with the adapters of a folder.

    Args:
        program: the base, or that with the same adapters already; it is not changed.
        folder: what :func:`save_adapters` wrote.

    Raises:
        BundleError: for a folder that is damaged, forged, or of a later format.
        PreconditionError: when the base is another one.
    """
    place, head = read_head(folder, HEAD)
    try:
        number, specs, digest = int(head["format"]), list(head["passes"]), str(head["sha256"])
        base, known = list(head["base"]["passes"]), dict(head["base"]["tensors"])
    except (KeyError, TypeError, ValueError) as error:
        raise BundleError(f"{place / HEAD} is malformed: {error!r}", fix="copy it again") from None
    if number > FORMAT:
        raise BundleError(
            f"{place} is of format {number}; this ftc reads up to {FORMAT}",
            fix="pip install -U ftc",
        )
    file = place / TENSORS
    tensors = read_tensors(file)
    if hashlib.sha256(file.read_bytes()).hexdigest() != digest:
        raise BundleError(f"{file} does not have the hash that {HEAD} says", fix="copy it again")
    if not tensors.keys() <= {name for name, _ in program.module.named_parameters()}:
        program = Pipeline.parse(",".join(specs)).run(program).program
    if odd := differing(program, tensors, known):
        raise PreconditionError(
            "these adapters were trained on another base: its weights differ",
            where=listed(odd),
            fix="load them on the model and passes they were trained on: "
            + (",".join(base) or "no passes"),
        )
    return put(program, tensors)


def trained_parts(program: Program) -> dict[str, Tensor]:
    """Parameters of adapters, and those that train, by name."""
    return {
        name: parameter.detach()
        for name, parameter in program.module.named_parameters()
        if adapter_kind(name) or parameter.requires_grad
    }


def makers(program: Program, made_for: Mapping[str, Tensor]) -> set[str]:
    """Text forms of the passes that made the parameters ``made_for``."""
    readers = (n for n in program.graph.nodes if n.op == "get_attr" and str(n.target) in made_for)
    return {made for n in readers if (made := provenance(n).made_by) != "capture"}


def put(program: Program, tensors: Mapping[str, Tensor]) -> Program:
    """A clone of ``program`` with other values, that train, for some of its parameters.

    Raises:
        PreconditionError: for a tensor that has no parameter of its shape.
    """
    program = program.clone()
    held = dict(program.module.named_parameters())
    for name, tensor in tensors.items():
        old = held.get(name)
        if old is None or old.shape != tensor.shape:
            has = "no such parameter" if old is None else f"one of {tuple(old.shape)}"
            raise PreconditionError(
                f"{name} {tuple(tensor.shape)} does not fit: the program has {has}",
                fix="load the adapters on the model that they were trained on",
            )
        detach(program.module, name)
        attach(program.module, name, nn.Parameter(tensor.to(old.dtype).clone()))
    program.module.recompile()
    return program


def _history(
    program: Program, trained: Mapping[str, Tensor]
) -> tuple[list[PassRecord], list[PassRecord]]:
    """The passes from the first that made an adapter on, and those before it."""
    specs = makers(program, trained)
    passes = set(names())  # what else is in a history, a training, cannot be run again
    done = [r for r in program.history
            if r.modified and r.effect != "annotation" and r.name in passes]  # fmt: skip
    first = next((i for i, r in enumerate(done) if r.spec in specs), len(done))
    return done[first:], done[:first]
