"""Attention that writes new keys and values behind the earlier ones, where these lie.

onnxruntime's ``GroupQueryAttention`` is the ``Attention`` of a cached program with one
more freedom: where past and present are bound to one buffer, as long as the longest text,
nothing is copied. What is read of the buffer is what ``past_mask`` and the new tokens say,
so one graph runs both ways.

It hides later keys by itself. A cached program's masks do too (the pass ``cache`` refuses
any other), so the whole mask comes as ``attention_bias``, ``-inf`` where nothing is seen;
a row that may see nothing is 0, as in torch. Rows padded on the left are rows of full
length to it: ``seqlens_k`` is one number for all, and ``query_seqlens``, without which a
batch of several new tokens behind a past is refused, that of the new tokens.
"""

from __future__ import annotations

import torch
from onnx_ir import Value

from .emitter import Emitter

_DOMAIN = "com.microsoft"
_WIDTHS = 8  # onnxruntime refuses heads that are no multiple of it


def grouped(
    e: Emitter, operands: list[Value], mask: Value, past: tuple[Value, ...], heads: int,
    kv_heads: int, width: int, scale: float,
) -> tuple[Value, Value, Value] | None:  # fmt: skip
    """Attended values ``[batch, length, heads * width]`` and the joined keys and values.

    None where the operator does not take these: heads of another width, a past that is not
    the program's own input.

    Args:
        operands: queries, new keys and new values ``[batch, length, heads * width]``.
        mask: ``[batch or 1, heads or 1, length, all]``, bool or what is added.
    """
    if any(x.producer() is not None for x in past) or width % _WIDTHS:
        return None
    batch, length, _ = e.dims(operands[0])
    total = e.dims(mask)[3]
    bias = mask
    if e.dtype(mask) == torch.bool:
        zero, never = (e.const(x, torch.float32) for x in (0.0, -torch.inf))
        bias = e.op("Where", mask, zero, never, dtype=torch.float32, dims=e.dims(mask))
    last = e.op("Sub", e.sizes.value(total), e.const([1], torch.int64))
    ends, news = (
        e.cast(e.op("Expand", x, e.sizes.shape_value([batch])), torch.int32)
        for x in (last, e.sizes.value(length))
    )
    count = e.cast(e.scalar(total), torch.int32)
    made: tuple[Value, Value, Value] = e.op(
        "GroupQueryAttention", *operands, *past, ends, count, None, None, None, bias,
        None, None, None, None, None, news, outputs=3, domain=_DOMAIN,
        num_heads=heads, kv_num_heads=kv_heads, scale=scale,
    )  # fmt: skip
    return made
