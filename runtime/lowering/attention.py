"""Scaled dot-product attention.

    y = softmax(scale * q k^T + mask) v,        q, k, v  [batch, heads, length, dim]

One ``Attention`` operator. Heads that were split from ``[batch, length, width]``
by a reshape and a transpose are given to it unsplit, which is its fastest form,
and keys or values that were repeated over groups of heads are given unrepeated.
A row whose mask excludes everything is 0, as in torch.

Keys and values that go on from earlier ones, ``[K_past; K]``, are joined by the operator
itself, which gives both joined as results too: the new ones come to it as they are
computed, with no operator between that splits heads, turns axes or copies. Where past and
present may share a buffer they are written there (:mod:`ftc.runtime.lowering.grouped`).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from onnx_ir import Value

from .coded_states import coded
from .emitter import Emitter
from .grouped import grouped, whole_turn
from .table import Unsupported, lowers

aten = torch.ops.aten

HEADS_FIRST = [0, 2, 1, 3]
_LENGTH = 2
_NEARLY_LOWEST = -1e38


@lowers(aten.scaled_dot_product_attention.default)
def attention(
    e: Emitter, query: Value, key: Value, value: Value, attn_mask: Value | None = None,
    dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None,
    enable_gqa: bool = False,
) -> Value:  # fmt: skip
    if dropout_p > 0:
        raise Unsupported("dropout inside attention (lower the program in eval mode)")
    width = e.dims(query)[-1]
    if scale is None:
        if not isinstance(width, int):
            raise Unsupported("a symbolic head dimension")
        scale = 1 / math.sqrt(width)
    if e.rank(query) != 4 or e.dtype(query) != torch.float32:
        return _plain(e, query, key, value, attn_mask, is_causal, scale)
    key, value = _shared(e, key, value)
    mask = None if attn_mask is None else _mask(e, attn_mask, e.dims(query)[2], e.dims(key)[2])
    how = {"scale": float(scale), "is_causal": int(is_causal)}
    whole = (key, value)
    past: tuple[Value, Value] | None = None
    if not is_causal and (parts := _past_and_new(e, key, value)) is not None:
        past, (key, value) = parts
    elif not is_causal and mask is not None and not e.standard:
        y = _in_codes(e, query, key, value, mask, how)
        if y is not None:
            return y
    operands: list[Value] = [query, key, value]
    unsplit = [m for x in operands if (m := merged(e, x)) is not None]
    if len(unsplit) == 3:
        operands = unsplit
        how |= {"q_num_heads": e.dims(query)[1], "kv_num_heads": e.dims(key)[1]}
    if past:
        y, *present = _cached(e, operands, mask, past, how)
        for joined, made in zip(whole, present, strict=True):
            e.replace(joined, made)
    else:
        y = e.op("Attention", *operands, mask, **how)
    return _split(e, y, query, value) if len(unsplit) == 3 else y


def _split(e: Emitter, y: Value, query: Value, value: Value) -> Value:
    """Attended values ``[batch, length, heads * dim]`` as ``[batch, heads, length, dim]``."""
    batch, heads, length, _ = e.dims(query)
    depth = e.dims(value)[3]
    e.describe(y, e.dtype(query), (batch, length, heads * depth))
    return e.transpose(e.reshape(y, [batch, length, heads, depth]), HEADS_FIRST)


def _in_codes(
    e: Emitter, query: Value, key: Value, value: Value, mask: Value, how: dict[str, Any]
) -> Value | None:
    """Attention over a cache in 8 bits; None where no operator multiplies by the codes."""
    keys, values = coded(e, key), coded(e, value)
    if keys is None or values is None:
        return None
    operands = [m for x in (query, keys.new, values.new) if (m := merged(e, x)) is not None]
    if len(operands) < 3:
        return None
    how = how | {"q_num_heads": e.dims(query)[1], "kv_num_heads": e.dims(keys.new)[1]}
    steps = keys.step, values.step
    found = grouped(e, operands, mask, (keys.past, values.past), how, steps)
    if found is None:
        return None
    y, *present = found
    for joined, made in zip((keys.whole, values.whole), present, strict=True):
        e.replace(joined, made)
    return _split(e, y, query, values.new)


def _cached(
    e: Emitter, operands: list[Value], mask: Value | None, past: tuple[Value, Value],
    how: dict[str, Any],
) -> tuple[Value, Value, Value]:  # fmt: skip
    """Attended values, all keys and all values: written in place where that is legal.

    ``Attention``, which joins them, is given a scale of 1. One query is multiplied by many keys:
    onnxruntime does that in half the time, without packing them first, where there is no
    other factor. So the scale goes into the query.
    """
    if not e.standard and mask is not None and "kv_num_heads" in how:
        found = grouped(e, operands, mask, past, how)
        if found is not None:
            return found
    query, key, value = operands
    query, how = _scaled(e, query, how["scale"]), how | {"scale": 1.0}
    made: tuple[Value, Value, Value] = e.op(
        "Attention", query, key, value, mask, *past, outputs=3, **how
    )
    return made


def _scaled(e: Emitter, query: Value, scale: float) -> Value:
    """``scale * query``; of one that is turned, the cosines and sines are multiplied, once."""
    factor = e.const(scale, e.dtype(query))
    if (turn := whole_turn(query)) is None:
        return e.op("Mul", query, factor, dims=e.dims(query))  # type: ignore[no-any-return]
    x, *waves = turn.inputs
    heads = turn.attributes.get("num_heads")
    longer = [e.op("Mul", wave, factor) for wave in waves]
    turned: Value = e.op("RotaryEmbedding", x, *longer, dims=e.dims(query),
                         num_heads=heads.as_int() if heads is not None else None)  # fmt: skip
    return turned


def _past_and_new(
    e: Emitter, key: Value, value: Value
) -> tuple[tuple[Value, Value], tuple[Value, Value]] | None:
    """``(past keys, past values), (new keys, new values)`` where both are joined of two."""
    pairs = []
    for x in (key, value):
        maker = x.producer()
        if maker is None or maker.op_type != "Concat" or len(maker.inputs) != 2:
            return None
        if maker.attributes["axis"].as_int() != _LENGTH:
            return None
        pairs.append(maker.inputs)
    (past_key, new_key), (past_value, new_value) = pairs
    if e.dims(past_key) != e.dims(past_value) or e.dims(new_key)[2] != e.dims(new_value)[2]:
        return None
    return (past_key, past_value), (new_key, new_value)


def merged(e: Emitter, x: Value) -> Value | None:
    """``[batch, length, heads * dim]`` when ``x`` is that with its heads split off."""
    maker = x.producer()
    if maker is None or maker.op_type != "Transpose":
        return None
    if list(maker.attributes["perm"].as_ints()) != HEADS_FIRST:
        return None
    batch, heads, length, depth = e.dims(x)
    if not isinstance(heads, int) or not isinstance(depth, int):
        return None
    return e.reshape(maker.inputs[0], [batch, length, heads * depth])


def _shared(e: Emitter, key: Value, value: Value) -> tuple[Value, Value]:
    """Keys and values before they were repeated for groups of heads, where both were."""
    own_key, own_value = _unrepeated(e, key), _unrepeated(e, value)
    if own_key is None or own_value is None or e.dims(own_key)[1] != e.dims(own_value)[1]:
        return key, value
    return own_key, own_value


def _unrepeated(e: Emitter, x: Value) -> Value | None:
    """The source of ``reshape(expand(x[:, :, None], [.., groups, ..]))``."""
    maker = x.producer()
    if maker is None or maker.op_type != "Reshape":
        return None
    spread = maker.inputs[0]
    assert spread is not None
    wider = spread.producer()
    if wider is None or wider.op_type != "Expand":
        return None
    source = wider.inputs[0]
    assert source is not None
    before, after = e.dims(source), e.dims(spread)
    if len(after) != 5 or before != (*after[:2], 1, *after[3:]):
        return None
    batch, heads, groups, length, depth = after
    if e.dims(x) != (batch, heads * groups, length, depth):
        return None
    return e.reshape(source, [batch, heads, length, depth])


def _mask(e: Emitter, mask: Value, rows: Any, columns: Any) -> Value:
    """A mask ``[rows, columns]`` or with two dimensions before, which onnxruntime broadcasts."""
    dims = list(e.dims(mask))
    if dims[-2:] != [rows, columns]:
        mask = e.expand(mask, [*dims[:-2], rows, columns])
    if e.dtype(mask) != torch.bool:
        # onnxruntime takes the lowest finite number for -inf; torch only -inf itself.
        finite = e.op("Max", mask, e.const(_NEARLY_LOWEST, e.dtype(mask)), dims=e.dims(mask))
        mask = e.op("Where", e.op("IsInf", mask), mask, finite, dims=e.dims(mask))
    return e.unsqueeze(mask, 0) if len(dims) == 3 else mask


def _plain(
    e: Emitter, query: Value, key: Value, value: Value, mask: Value | None, causal: bool,
    scale: float,
) -> Value:  # fmt: skip
    """The formula in products and a softmax, for any rank and any float type."""
    rank, dtype = e.rank(key), e.dtype(query)
    if rank > 2 and e.dims(query)[-3] != e.dims(key)[-3]:
        raise Unsupported("shared keys in an attention that is not four-dimensional float32")
    swapped = e.transpose(key, [*range(rank - 2), rank - 1, rank - 2])
    scores = e.op("MatMul", e.op("Mul", query, e.const(scale, dtype)), swapped)
    if causal:
        mask = _causal(e, e.dims(query)[-2], e.dims(key)[-2])
    if mask is None:
        weights = e.op("Softmax", scores, axis=-1)
    elif e.dtype(mask) == torch.bool:
        low = e.const(torch.finfo(dtype).min, dtype)
        weights = e.op("Softmax", e.op("Where", mask, scores, low), axis=-1)
        weights = e.op("Where", mask, weights, e.const(0, dtype))
    else:
        weights = e.op("Softmax", e.op("Add", scores, mask), axis=-1)
        weights = e.op("Where", e.op("IsNaN", weights), e.const(0, dtype), weights)
    return e.op("MatMul", weights, value)


def _causal(e: Emitter, rows: Any, columns: Any) -> Value:
    """True where the column is not after the row."""
    zero, one = e.const(0, torch.int64), e.const(1, torch.int64)
    ends = [e.op("Squeeze", e.sizes.value(n), [0]) for n in (rows, columns)]
    row, column = (e.op("Range", zero, end, one) for end in ends)
    return e.op("LessOrEqual", e.unsqueeze(column, 0), e.unsqueeze(row, 1))
