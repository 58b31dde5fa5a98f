"""Attention that writes new keys and values behind the earlier ones, where these lie.

onnxruntime's ``GroupQueryAttention`` is the ``Attention`` of a cached program with one
more freedom: where past and present are bound to one buffer, with room for more tokens,
nothing is copied. What is read of the buffer is what ``past_mask`` and the new tokens say,
so one graph runs both ways; the model's metadata say that it may
(:data:`~ftc.graph.cached.IN_PLACE`).

It hides later keys by itself. A cached program's masks do too (the pass ``cache`` refuses
any other), so the whole mask comes as ``attention_bias``, ``-inf`` where nothing is seen;
a row that may see nothing is 0, as in torch. Rows padded on the left are rows of full
length to it: ``seqlens_k`` is one number for all, and ``query_seqlens``, without which a
batch of several new tokens behind a past is refused, that of the new tokens.

It turns queries and keys itself where all rows have the same positions. Its tables are
looked up at ``past`` and the positions after it, so those of the new tokens are put behind
``past`` rows of nothing. Queries, keys and values that one product can compute come to it in
one piece (:mod:`ftc.runtime.lowering.joined`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir import Value

from ftc.graph.cache_inputs import Names, present_of
from ftc.graph.cached import states
from ftc.graph.signature import Signature

from .emitter import Emitter
from .joined import joined

_DOMAIN, _OPERATOR = "com.microsoft", "GroupQueryAttention"
_LOWEST = -1e38
_CODES = {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL", "kv_cache_bit_width": 8}
_WIDTHS, _TURNED = 8, 16  # onnxruntime refuses heads whose width is no multiple


def grouped(
    e: Emitter, operands: list[Value], mask: Value, past: tuple[Value, Value],
    how: Mapping[str, Any], steps: tuple[Value, Value] | None = None,
) -> tuple[Value, Value, Value] | None:  # fmt: skip
    """Attended values ``[batch, length, heads * dim]`` and the joined keys and values.

    None where the operator does not take these: heads of another width, a past that is not
    the program's own input.

    Args:
        operands: queries, new keys and new values ``[batch, length, heads * dim]``.
        mask: ``[length, all]`` or ``[batch or 1, heads or 1, length, all]``, bool or what is added.
        past: keys and values ``[batch, kv_heads, past, dim]``.
        how: attributes of ``Attention``: the scale and the numbers of heads.
        steps: of keys and values whose past is in codes of 8 bits, ``[kv_heads, 1, dim]``.
    """
    if any(x.producer() is not None or e.dims(x)[3] % _WIDTHS for x in past):
        return None
    if e.dims(past[0]) != e.dims(past[1]):
        return None
    query, key, value = operands
    batch, length, _ = e.dims(query)
    total = e.dims(mask)[-1]
    last = e.op("Sub", e.sizes.value(total), e.const([1], torch.int64))
    ends, news = (
        e.cast(e.op("Expand", x, e.sizes.shape_value([batch])), torch.int32)
        for x in (last, e.sizes.value(length))
    )
    count = e.cast(e.scalar(total), torch.int32)
    waves: tuple[Value | None, ...] = (None, None)
    _, _, before, width = e.dims(past[0])
    turned = _turned(e, query, key, before) if width % _TURNED == 0 else None
    if turned is not None:
        query, key, waves = turned
    packed = joined(e, (query, key, value))
    given = (query, key, value) if packed is None else (packed, None, None)
    kinds = e.dtype(query), e.dtype(past[0]), e.dtype(past[1])
    made: tuple[Value, Value, Value] = e.op(
        _OPERATOR, *given, *past, ends, count, *waves, None, _bias(e, mask),
        None, *(steps or (None, None)), None, None, news, outputs=3, dtype=kinds, domain=_DOMAIN,
        scale=how["scale"], num_heads=how["q_num_heads"], kv_num_heads=how["kv_num_heads"],
        do_rotary=1 if turned is not None else None, **(_CODES if steps else {}),
    )  # fmt: skip
    return made


def _bias(e: Emitter, mask: Value) -> Value:
    """What is added to the scores, ``[batch or 1, heads or 1, length, all]``.

    ``-inf`` over one key in all is no number in onnxruntime: such a token, which is padding,
    sees itself.
    """
    if e.rank(mask) == 2:
        mask = e.reshape(mask, [1, 1, *e.dims(mask)])
    lowest, never = (e.const(x, torch.float32) for x in (_LOWEST, -torch.inf))
    alone = e.op("Equal", e.sizes.value(e.dims(mask)[-1]), e.const([1], torch.int64))
    hidden = e.op("Where", alone, lowest, never, dtype=torch.float32, dims=(1,))
    if e.dtype(mask) != torch.bool:
        return e.op("Max", mask, hidden, dims=e.dims(mask))  # type: ignore[no-any-return]
    seen = e.const(0.0, torch.float32)
    bias: Value = e.op("Where", mask, seen, hidden, dtype=torch.float32, dims=e.dims(mask))
    return bias


def _turned(
    e: Emitter, query: Value, key: Value, past: Any
) -> tuple[Value, Value, tuple[Value, Value]] | None:
    """Queries and keys before they were turned, and the tables; None where rows differ in theirs.

    The tables are ``[past + length, dim / 2]``, of which the first ``past`` rows are not read.
    """
    turns = whole_turn(query), whole_turn(key)
    if turns[0] is None or turns[1] is None or turns[0].inputs[1:] != turns[1].inputs[1:]:
        return None
    front = e.op("Concat", e.sizes.value(past), e.const([0, 0, 0], torch.int64), axis=0)
    tables: list[Value] = []
    for wave in turns[0].inputs[1:]:
        assert wave is not None
        spread = wave.producer()
        own = spread.inputs[0] if spread is not None and spread.op_type == "Expand" else None
        if own is None or e.dims(own)[0] != 1:
            return None
        tables.append(e.op("Pad", e.reshape(own, e.dims(own)[1:]), front))
    q, k = turns[0].inputs[0], turns[1].inputs[0]
    assert q is not None and k is not None
    return q, k, (tables[0], tables[1])


def whole_turn(x: Value) -> ir.Node | None:
    """The rotary embedding that made ``x``, where it turned every channel of a head."""
    maker = x.producer()
    if maker is None or maker.op_type != "RotaryEmbedding":
        return None
    return None if "rotary_embedding_dim" in maker.attributes else maker


def writes_in_place(signature: Signature, inputs: list[Value], outputs: list[Value]) -> bool:
    """Whether all keys and values of a cache may lie in buffers, past and present one.

    That is so where each is read and written by the operator alone, and the length of the
    past is that of a mask, not of the buffers.
    """
    given, made = ({v.name: v for v in values} for values in (inputs, outputs))
    for spec in states(signature):
        past, maker = given[spec.name], made[present_of(spec.name)].producer()
        if maker is None or maker.op_type != _OPERATOR or list(past.consumers()) != [maker]:
            return False
    return Names.MASK in signature.input_names and bool(states(signature))
