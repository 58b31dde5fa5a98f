"""What a compilation measures drift on and calibrates with.

Real text where the model takes text and brought a tokenizer, and always random
inputs of another shape too.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from ftc.graph.errors import UsageError
from ftc.graph.program import Program
from ftc.graph.sources.tokenizer import tokenizer
from ftc.graph.target import Target
from ftc.passes.context import Context, random_probe, random_probes

from .shape_ranges import parse_ranges
from .tensors import KINDS, read_tensors
from .text import calibration, read_text, takes_text, text_probe

_RANDOM_SIZES = (3, 5, 7, 11)  # few tokens: every step of a pipeline is run on them


def check_measuring(calib: str | None, max_drift: float | None) -> None:
    """Refuses what needs no model to be wrong; call it before the work starts.

    Raises:
        UsageError: for calibration data that cannot be read, or a budget that is no number
            of 0 or more.
    """
    if max_drift is not None and not 0 <= max_drift < math.inf:
        raise UsageError(
            f"a relative error of at most {max_drift:g} cannot be held to",
            fix="give a number of 0 or more: --max-drift 0.1",
        )
    if calib is not None and Path(calib).suffix in KINDS:
        read_tensors(Path(calib))
    elif calib is not None:
        read_text(calib)


def make_context(
    program: Program, calib: str | None, target: Target, shapes: str | None,
    max_drift: float | None, seed: int,
) -> Context:  # fmt: skip
    """Probes and calibration data, from what the user gave or from Python's documentation.

    Raises:
        UsageError: for calibration data or shapes that do not fit the program.
    """
    fixed: dict[str, Any] = {"target": target, "shapes": parse_ranges(shapes, program.signature),
                             "max_drift": max_drift, "seed": seed}  # fmt: skip
    sizes = dict(zip(program.signature.dims, _RANDOM_SIZES, strict=False))
    other = random_probe(program, sizes, seed)
    if calib is not None and Path(calib).suffix in KINDS:
        given = read_tensors(Path(calib), program.signature)
        return Context(
            probes=(given, other),
            calibration=(given,),
            probe_source=f"{Path(calib).name} and random inputs",
            **fixed,
        )
    found = tokenizer(program) if takes_text(program.signature) else None
    if found is None:
        if calib is not None:
            raise UsageError(
                "calibration with text needs a tokenizer, and this model has none",
                fix="give tensors: --calib FILE.npz",
            )
        probes = random_probes(program, seed)
        return Context(probes=probes, probe_source="random inputs", **fixed)
    text = read_text(calib)
    probe = text_probe(program, text, found)
    count, longest = probe["input_ids"].shape
    words = f"{count} rows of up to {longest} tokens of {text.source}, and random tokens"
    return Context(
        probes=(probe, other),
        probe_source=words,
        calibration=calibration(program, text, found),
        **fixed,
    )
