"""One call of torch.export, and the flat, functional graph that comes out of it.

The module is traced in train mode, where dropout still has its probability (an
eval trace loses it), and non-strictly; the result is unlifted, so parameters
keep their names and gradients flow. :mod:`ftc.graph.capture.normalize` then makes it a
:class:`~ftc.graph.program.Program`'s graph.
"""

from __future__ import annotations

import contextlib
import io
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from ftc.graph.errors import CaptureError
from ftc.graph.mode import draws_in_eval

from .fixed import explain_fixed

Dynamic = Mapping[str, Mapping[int, str]]


def export(
    model: nn.Module, inputs: Mapping[str, Tensor], dynamic: Dynamic, *, strict_dims: bool
) -> tuple[ExportedProgram, list[str]]:
    """Traces ``model(**inputs)``.

    Args:
        model: any module; its training flags are restored afterwards.
        inputs: example tensors by name; dynamic dimensions must be 2 or more.
        dynamic: for each input, the axes that are dynamic and their names.
        strict_dims: refuse to let the model fix a dimension that was to be
            dynamic. Otherwise such a dimension becomes fixed, and a note says so.

    Returns:
        The exported program and notes on what had to be decided.

    Raises:
        CaptureError: with the model's own source line.
    """
    notes: list[str] = []
    modes = {module: module.training for module in model.modules()}
    try:
        model.train()
        try:
            program = _trace(model, inputs, dynamic, strict_dims, notes)
            why = "draws random numbers by itself" if draws_in_eval(program.graph) else ""
        except CaptureError:
            why = "does not trace"
        if why:
            notes.clear()
            model.eval()
            for module in model.modules():
                if isinstance(module, nn.Dropout):
                    module.training = True
            program = _trace(model, inputs, dynamic, strict_dims, notes)
            notes.append(
                f"captured in eval mode, since the train mode {why}: only plain "
                "dropout layers can be switched on again for training"
            )
        return program, notes
    finally:
        for module, mode in modes.items():
            module.training = mode


def _trace(
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    dynamic: Dynamic,
    strict_dims: bool,
    notes: list[str],
) -> ExportedProgram:
    try:
        return _export(model, inputs, dynamic, Dim.DYNAMIC)
    except Exception as error:
        if "specialized" not in str(error):
            raise _explain(error, model) from error
    try:
        program = _export(model, inputs, dynamic, Dim.AUTO)
    except Exception as error:
        raise _explain(error, model) from error
    if strict_dims:
        raise explain_fixed(program, dynamic, lambda file: not _is_machinery(file))
    notes.append("the model fixes a dimension that would be dynamic by default")
    return program


def _export(
    model: nn.Module, inputs: Mapping[str, Tensor], dynamic: Dynamic, kind: Any
) -> ExportedProgram:
    shapes = {name: dict.fromkeys(dynamic.get(name, {}), kind) for name in inputs}
    said = io.StringIO()  # torch prints the graph so far when it fails
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(said):
            warnings.simplefilter("ignore")
            return torch.export.export(
                model,
                (),
                dict(inputs),
                dynamic_shapes=shapes,
                strict=False,
                prefer_deferred_runtime_asserts_over_guards=False,
            )
    except Exception as error:
        error.add_note(said.getvalue())
        raise


_ROOMS = tuple(  # not the root itself: a virtual environment may lie in it
    f"{Path(__file__).resolve().parents[2] / room}/" for room in ("graph", "passes", "runtime")
)


def _explain(error: Exception, model: nn.Module) -> CaptureError:
    """The error with the line of the model's source that caused it and what to change."""
    text = str(error)
    line = _source_line(error, text)
    if "data-dependent" in text or "GuardOnDataDependentSymNode" in type(error).__name__:
        what = "the model's control flow depends on the values of tensors"
        fix = (
            "replace the `if` or `.item()` at that line by torch.where or torch.cond, or "
            "capture the part of the model around it"
        )
    elif "specialized" in text or "Constraints violated" in text:
        what = "the model fixes a dimension that was to be dynamic: " + _first_line(text)
        fix = "leave that dimension out of `dynamic`, or compute with x.shape instead of constants"
    else:
        what = f"{type(model).__name__} does not trace: {_first_line(text)}"
        fix = (
            "torch.export cannot follow that line: change it, or capture the part of the model "
            "around it; `--debug` shows torch's own report"
        )
    return CaptureError(what, where=line, fix=fix)


def _source_line(error: BaseException, text: str) -> str | None:
    """``file.py:12: code`` of the innermost frame that is neither torch's nor ours."""
    import linecache

    frames: list[tuple[str, int]] = []
    chain: BaseException | None = error
    while chain is not None and not frames:
        trace = chain.__traceback__
        while trace is not None:
            frames.append((trace.tb_frame.f_code.co_filename, trace.tb_lineno))
            trace = trace.tb_next
        frames = [f for f in frames if not _is_machinery(f[0])]
        chain = chain.__cause__ or chain.__context__
    if not frames:
        found = re.findall(r'File "([^"]+)", line (\d+)', text)
        frames = [(f, int(n)) for f, n in found if not _is_machinery(f)]
    if not frames:
        return None
    file, number = frames[-1]
    code = linecache.getline(file, number).strip()
    return f"{file}:{number}: {code}" if code else f"{file}:{number}"


def _is_machinery(file: str) -> bool:
    return "/torch/" in file or file.startswith((*_ROOMS, "<"))


def _first_line(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "no message")
