"""Keys and values of earlier tokens, between two runs of a cached program.

Either what a run returns as present is handed to the next as past, or past and present are
one buffer with room for more tokens, and a run writes behind what is there: nothing is
copied then, and a token costs what reading its past costs.

Tokens, masks and scores are arrays: after a run that read all weights nothing is in the
processor's caches, and the first slice of a tensor takes a tenth of a millisecond, of an array
a fiftieth. In onnxruntime neither way takes torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from ftc.graph.cache_inputs import (
    Array,
    Kind,
    Names,
    TokenInput,
    is_state,
    present_of,
    step_arrays,
)

from .engine import Engine, OnnxEngine
from .spoken import Spoken

Run = Callable[[Mapping[str, Any]], Mapping[str, Any]]

_LEAST = 64  # tokens that fit in beyond those that are there
_LINE = 64  # bytes


class Past(Protocol):
    """Runs a cached program, and keeps keys and values where that program finds them again."""

    def __call__(self, ids: Array, mask: Array, past: Any) -> tuple[Array, Any]:
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
            return InPlace(engine.spoken, engine.session)
        return HandedOn(engine.spoken, engine.session.run_held)
    return HandedOn(engine.spoken, _with_tensors(engine))


def _with_tensors(engine: Engine) -> Run:
    """An engine that takes arrays too, and gives scores that can be one."""
    import torch

    types, scores = engine.program.signature.input_types, engine.spoken.scores

    def run(given: Mapping[str, Any]) -> Mapping[str, Any]:
        tensors = {name: torch.tensor(value).to(types[name]) if isinstance(value, np.ndarray)
                   else value for name, value in given.items()}  # fmt: skip
        made = engine(tensors)
        if made[scores].dtype == torch.bfloat16:  # which no array is
            made[scores] = made[scores].float()
        return made

    return run


class HandedOn:
    """What one run returns is what the next is given.

    Args:
        spoken: of a cached program.
        run: outputs by name, of inputs by name: arrays, or what an earlier run returned.
    """

    def __init__(self, spoken: Spoken, run: Run) -> None:
        self._run, self._made, self._inputs = run, spoken.scores, spoken.token_inputs
        self._states = {n: kind for n, kind in spoken.inputs.items() if is_state(n)}

    def __call__(self, ids: Array, mask: Array, past: Any) -> tuple[Array, Any]:
        """One step: see :class:`Past`."""
        given: dict[str, Any] = step_arrays(self._inputs, ids, mask)
        sizes = len(ids), mask.shape[1] - ids.shape[1]
        for name, kind in self._states.items():
            given[name] = past[name] if past else _nothing(kind, *sizes)
        found = self._run(given)
        kept = {name: found[present_of(name)] for name in self._states}
        return found[self._made].numpy(), kept


def _nothing(kind: Kind, batch: int, count: int) -> Array:
    """Keys or values of so many tokens that nobody sees: of none, at the beginning."""
    of, (_, heads, _, dim) = kind
    return np.zeros((batch, heads, count, dim), "float32" if of == "bfloat16" else of)


class InPlace:
    """Buffers of onnxruntime, bound once as past and as present.

    They get a half more than is needed, and are copied into longer ones when they are full:
    a text of ``n`` tokens is copied three times over in all.

    Args:
        spoken: of a cached program.
        session: of its file, which may be written in place.
    """

    def __init__(self, spoken: Spoken, session: Any) -> None:
        self._session, self._limit = session, spoken.most
        self._inputs, self._parts = spoken.token_inputs, _parts(spoken.token_inputs)
        self._states = [name for name in session.input_names if is_state(name)]
        self._made = spoken.scores
        self._binding = session.binding()
        self._buffers: dict[str, Array] = {}
        self._scores: Array = np.empty(0)
        self._batch = self._room = 0

    def __call__(self, ids: Array, mask: Array, past: Any) -> tuple[Array, Any]:
        """One step: see :class:`Past`."""
        batch, total = mask.shape
        if batch != self._batch or total > self._room:
            self._make_room(batch, total, total - ids.shape[1])
        if isinstance(past, Mapping):
            for name, held in past.items():
                self._buffers[name][:, :, : held.shape[2]] = held
        self._binding.inputs(self._given(ids, mask))
        _, length, vocabulary = self._session.output_shapes[self._made]
        shape = (batch, 1 if length == 1 else ids.shape[1], vocabulary)
        if self._scores.shape != shape:
            self._scores = _aligned(shape, self._session.kinds[self._made])
            self._binding.output(self._made, self._scores)
        self._binding.run()
        return self._scores, self

    def _given(self, ids: Array, mask: Array) -> Mapping[str, Array]:
        """What :func:`~ftc.graph.cache_inputs.step_arrays` makes, by views where it can be."""
        if self._parts is None:
            return step_arrays(self._inputs, ids, mask)
        count = mask.shape[1] - ids.shape[1]
        parts = (ids, mask[:, count:], mask[:, :count])
        return dict(zip(self._parts, parts, strict=True))

    def _make_room(self, batch: int, total: int, kept: int) -> None:
        """Longer buffers, with ``kept`` tokens of the old ones in them."""
        room = total + max(_LEAST, total // 2)
        room = room if self._limit is None else max(total, min(room, self._limit))
        for name in self._states:
            _, heads, _, dim = self._session.input_shapes[name]
            old = self._buffers.get(name)
            new = _aligned((batch, heads, room, dim), self._session.kinds[name])
            if old is not None and len(old) == batch:
                new[:, :, :kept] = old[:, :, :kept]
            self._binding.both(name, present_of(name), new)
            self._buffers[name] = new
        self._batch, self._room = batch, room


def _aligned(shape: tuple[int, ...], kind: str) -> Array:
    """An array of unset values that begins where a line of the processor's cache does."""
    size = math.prod(shape) * np.dtype(kind).itemsize
    memory = np.empty(size + _LINE, np.uint8)
    begin = -memory.ctypes.data % _LINE
    return memory[begin : begin + size].view(kind).reshape(shape)


def _parts(tokens: Sequence[TokenInput]) -> tuple[str, str, str] | None:
    """Names of ids, their mask and that of the past, where a program takes these alone."""
    if len(tokens) != 3 or any(spec.kind != "int64" for spec in tokens):
        return None
    masks = [spec.name for spec in tokens[1:] if spec.role == "mask" and spec.name != Names.MASK]
    past = Names.MASK in [spec.name for spec in tokens]
    return (tokens[0].name, masks[0], Names.MASK) if past and len(masks) == 1 else None
