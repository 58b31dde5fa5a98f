"""Keys and values of earlier tokens, between two runs of a cached program.

Either what a run returns as present is handed to the next as past, or past and present are
one buffer with room for more tokens, and a run writes behind what is there: nothing is
copied then, and a token costs what reading its past costs.

Tokens and masks are arrays: after a run that read all weights nothing is in the processor's
caches, and the first slice of a tensor takes a tenth of a millisecond, of an array a fiftieth.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ftc.graph.cached import Names, present_of, states, step_inputs, token_limit
from ftc.graph.program import Program
from ftc.graph.signature import InputSpec

from .engine import Engine, OnnxEngine

Ids = np.ndarray[Any, np.dtype[np.int64]]

_LEAST = 64  # tokens that fit in beyond those that are there


class Past(Protocol):
    """Runs a cached program, and keeps keys and values where that program finds them again."""

    def __call__(self, ids: Ids, mask: Ids, past: Any) -> tuple[Tensor, Any]:
        """One step.

        Args:
            ids: of the new tokens, int64 ``[batch, new]``.
            mask: of past and new tokens, int64 ``[batch, past + new]``.
            past: what the step before returned; at the beginning of texts None, or the keys and
                values ``[batch, kv_heads, past, dim]`` of what they begin behind, by input.

        Returns:
            The program's first output, which the next step may overwrite, and what that
            takes. A step that does not return leaves the past of the one before as it was.
        """
        ...


def past_of(engine: Engine) -> Past:
    """How an engine keeps the past of its cached program."""
    if isinstance(engine, OnnxEngine):
        if engine.session.in_place:
            return InPlace(engine.program, engine.session)
        return HandedOn(engine.program, engine.session.run_held)
    return HandedOn(engine.program, engine)


class HandedOn:
    """What one run returns is what the next is given.

    Args:
        program: a cached one.
        run: outputs by name, of inputs by name.
    """

    def __init__(self, program: Program, run: Callable[[Mapping[str, Any]], Mapping[str, Any]]):
        self._signature, self._run = program.signature, run

    def __call__(self, ids: Ids, mask: Ids, past: Any) -> tuple[Tensor, Any]:
        """One step: see :class:`Past`."""
        given = torch.from_numpy(ids), torch.from_numpy(mask)
        found = self._run(step_inputs(self._signature, *given, past or {}))
        scores = found[self._signature.output_names[0]]
        scores = scores if isinstance(scores, Tensor) else torch.from_numpy(scores.numpy())
        return scores, {s.name: found[present_of(s.name)] for s in states(self._signature)}


class InPlace:
    """Buffers of onnxruntime, bound once as past and as present.

    They get a half more than is needed, and are copied into longer ones when they are full:
    a text of ``n`` tokens is copied three times over in all.

    Args:
        program: a cached one.
        session: of its file, which may be written in place.
    """

    def __init__(self, program: Program, session: Any) -> None:
        self._states = states(program.signature)
        tokens = tuple(s for s in program.signature.inputs if s not in self._states)
        self._signature = replace(program.signature, inputs=tokens)
        self._parts = _parts(tokens)
        self._limit = token_limit(program.signature)
        self._binding = session.binding()
        self._buffers: dict[str, np.ndarray[Any, Any]] = {}
        self._scores = torch.empty(0)
        self._batch = self._room = 0

    def __call__(self, ids: Ids, mask: Ids, past: Any) -> tuple[Tensor, Any]:
        """One step: see :class:`Past`."""
        batch, total = mask.shape
        if batch != self._batch or total > self._room:
            self._make_room(batch, total, total - ids.shape[1])
        if isinstance(past, Mapping):
            for name, held in past.items():
                self._buffers[name][:, :, : held.shape[2]] = held.numpy()
        self._binding.inputs(self._given(ids, mask))
        scores = self._signature.outputs[0]
        shape = (batch, ids.shape[1] if scores.shape[1] != 1 else 1, int(scores.shape[2]))
        if self._scores.shape != shape:
            self._scores = torch.empty(shape, dtype=scores.dtype)
            self._binding.output(scores.name, self._scores.numpy())
        self._binding.run()
        return self._scores, self

    def _given(self, ids: Ids, mask: Ids) -> Mapping[str, np.ndarray[Any, Any]]:
        """What :func:`~ftc.graph.cached.step_inputs` makes of these, by views where it can be."""
        if self._parts is not None:
            count = mask.shape[1] - ids.shape[1]
            parts = (ids, mask[:, count:], mask[:, :count])
            return dict(zip(self._parts, parts, strict=True))
        given = torch.from_numpy(ids), torch.from_numpy(mask)
        return {n: t.numpy() for n, t in step_inputs(self._signature, *given, {}).items()}

    def _make_room(self, batch: int, total: int, kept: int) -> None:
        """Longer buffers, with ``kept`` tokens of the old ones in them."""
        room = total + max(_LEAST, total // 2)
        room = room if self._limit is None else max(total, min(room, self._limit))
        for spec in self._states:
            old = self._buffers.get(spec.name)
            sizes: Any = (batch, spec.shape[1], room, spec.shape[3])
            new = torch.empty(sizes, dtype=spec.dtype).numpy()
            if old is not None and len(old) == batch:
                new[:, :, :kept] = old[:, :, :kept]
            self._binding.both(spec.name, present_of(spec.name), new)
            self._buffers[spec.name] = new
        self._batch, self._room = batch, room


def _parts(tokens: Sequence[InputSpec]) -> tuple[str, str, str] | None:
    """Names of ids, their mask and that of the past, where a program takes these alone."""
    if len(tokens) != 3 or any(spec.dtype != torch.int64 for spec in tokens):
        return None
    masks = [spec.name for spec in tokens[1:] if spec.role == "mask" and spec.name != Names.MASK]
    past = Names.MASK in [spec.name for spec in tokens]
    return (tokens[0].name, masks[0], Names.MASK) if past and len(masks) == 1 else None
