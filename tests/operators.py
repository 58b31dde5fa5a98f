"""Operators by family, as functions of four tensors: what the lowering is tested on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Operator = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class Family(nn.Module):
    """Many operators on ``x, y [batch, 4, 6]``, ``i`` int and ``m`` bool ``[batch, 4]``."""

    def __init__(self, operators: dict[str, Operator]) -> None:
        super().__init__()
        self.operators = operators

    def forward(self, x: Tensor, y: Tensor, i: Tensor, m: Tensor) -> dict[str, Tensor]:
        return {name: operator(x, y, i, m) for name, operator in self.operators.items()}


def inputs(batch: int) -> dict[str, Tensor]:
    torch.manual_seed(batch)
    return {
        "x": torch.randn(batch, 4, 6),
        "y": torch.randn(batch, 4, 6),
        "i": torch.randint(0, 4, (batch, 4)),
        "m": torch.rand(batch, 4) > 0.4,
    }


def named(module: Any, names: str, change: Callable[[Tensor], Tensor] = lambda x: x) -> dict:
    """One-argument functions of ``module`` by name."""
    return {n: (lambda x, y, i, m, n=n: getattr(module, n)(change(x))) for n in names.split()}


def heads(x: Tensor) -> Tensor:
    return x.reshape(-1, 4, 2, 3).transpose(1, 2)


def attend(x: Tensor, y: Tensor, mask: Tensor | None = None, **how: Any) -> Tensor:
    return F.scaled_dot_product_attention(heads(x), heads(y), heads(x + 1), mask, **how)


def repeated(x: Tensor) -> Tensor:
    return heads(x)[:, :1, None].expand(-1, -1, 2, -1, -1).reshape(-1, 2, 4, 3)


def additive(m: Tensor, low: float) -> Tensor:
    """A float mask in which whole rows are excluded."""
    allowed = m[:, None, :, None] & m[:, None, None, :]
    return torch.zeros(1, 1, 4, 4).masked_fill(~allowed, low)


torch.manual_seed(0)
KERNEL, KERNEL2 = torch.randn(5, 4, 3), torch.randn(4, 2, 3, 3)
LOWEST = torch.finfo(torch.float32).min

FAMILIES: dict[str, dict[str, Operator]] = {
    "unary": {
        **named(torch, "abs neg exp sin cos tan sinh cosh asinh tanh sigmoid erf floor ceil sign"),
        **named(torch, "round reciprocal expm1 square isnan isinf relu atan"),
        **named(torch, "log sqrt rsqrt log1p log2 log10", lambda x: x.abs() + 0.1),
        **named(torch, "asin acos atanh", lambda x: x.clamp(-0.9, 0.9)),
    },
    "activations": {
        **named(F, "silu gelu softplus leaky_relu elu selu celu hardsigmoid hardswish hardtanh"),
        **named(F, "relu6 mish logsigmoid softsign tanhshrink softshrink glu"),
        "gelu_tanh": lambda x, y, i, m: F.gelu(x, approximate="tanh"),
        "softplus_beta": lambda x, y, i, m: F.softplus(x, beta=2),
        "prelu": lambda x, y, i, m: F.prelu(x, y[0, :, 0]),
    },
    "arithmetic": {
        "add_alpha": lambda x, y, i, m: torch.add(x, y, alpha=2),
        "add_mixed": lambda x, y, i, m: i + x[:, :, 0],
        "add_bool": lambda x, y, i, m: m + m,
        "bool_and_int": lambda x, y, i, m: m + i,
        "rsub": lambda x, y, i, m: 1.0 - i,
        "mul_bool": lambda x, y, i, m: m * m,
        "mul_mixed": lambda x, y, i, m: m * x[:, :, 0],
        "div": lambda x, y, i, m: x / y,
        "div_int": lambda x, y, i, m: i / 3,
        "floor_int": lambda x, y, i, m: (i - 2) // 3,
        "floor_float": lambda x, y, i, m: x // y,
        "trunc_int": lambda x, y, i, m: torch.div(i - 2, 3, rounding_mode="trunc"),
        "trunc_float": lambda x, y, i, m: torch.div(x, y, rounding_mode="trunc"),
        "remainder_int": lambda x, y, i, m: (i - 2) % 3,
        "remainder": lambda x, y, i, m: x % 0.7,
        "fmod": lambda x, y, i, m: torch.fmod(x, 0.7),
        "cube": lambda x, y, i, m: x**3,
        "root": lambda x, y, i, m: x.abs() ** 0.5,
        "pow": lambda x, y, i, m: torch.pow(x.abs(), y),
        "power_of_two": lambda x, y, i, m: 2**i,
        "maximum": lambda x, y, i, m: torch.maximum(x, y),
        "minimum_int": lambda x, y, i, m: torch.minimum(i, i.flip(0)),
        "clamp": lambda x, y, i, m: x.clamp(-0.5, 0.5),
        "clamp_int": lambda x, y, i, m: i.clamp(1, 2),
        "clamp_tensor": lambda x, y, i, m: torch.clamp(x, min=y),
        "lerp": lambda x, y, i, m: torch.lerp(x, y, 0.3),
        "addcmul": lambda x, y, i, m: torch.addcmul(x, x, y, value=0.5),
        "by_size": lambda x, y, i, m: x / (x.shape[0] // 2 + 1) * (x.shape[0] % 2 + 2),
    },
    "logic": {
        "gt": lambda x, y, i, m: x > y,
        "ge": lambda x, y, i, m: i >= 2,
        "lt_mixed": lambda x, y, i, m: i < 1.5,
        "ne": lambda x, y, i, m: i != 2,
        "eq_bool": lambda x, y, i, m: m == m.flip(0),
        "gt_bool": lambda x, y, i, m: m > m.flip(0),
        "and": lambda x, y, i, m: m & (i > 1),
        "xor": lambda x, y, i, m: m ^ (i > 1),
        "not": lambda x, y, i, m: ~m,
        "logical_and": lambda x, y, i, m: torch.logical_and(x, i[..., None]),
        "bits": lambda x, y, i, m: (~i & 1) | 4,
        "where": lambda x, y, i, m: torch.where(m[..., None], x, y),
        "where_scalar": lambda x, y, i, m: torch.where(m[..., None], x, 0.0),
        "where_bool": lambda x, y, i, m: torch.where(m, i > 1, i < 1),
        "where_int": lambda x, y, i, m: torch.where(m, i, 1),
        "masked_fill": lambda x, y, i, m: x.masked_fill(m[..., None], float("-inf")),
        "masked_fill_int": lambda x, y, i, m: i.masked_fill(m, 7),
    },
    "shapes": {
        "view": lambda x, y, i, m: x.view(x.shape[0], -1),
        "rows": lambda x, y, i, m: x.reshape(-1, 6),
        "unflatten": lambda x, y, i, m: x.unflatten(2, (2, 3)),
        "permute": lambda x, y, i, m: x.permute(2, 0, 1),
        "movedim": lambda x, y, i, m: x.movedim(0, 2),
        "expand": lambda x, y, i, m: x[None, :, :1].expand(2, -1, 5, -1),
        "repeat": lambda x, y, i, m: x.repeat(2, 2, 1, 3),
        "interleave": lambda x, y, i, m: x.repeat_interleave(2, 1),
        "slice": lambda x, y, i, m: x[:, -3:-1, ::2],
        "select": lambda x, y, i, m: x[0, :, -1],
        "split": lambda x, y, i, m: x.split(4, 2)[1],
        "split_sizes": lambda x, y, i, m: x.split([1, 5], -1)[1],
        "chunk": lambda x, y, i, m: x.chunk(2, -1)[1],
        "unbind": lambda x, y, i, m: x.unbind(1)[2],
        "cat": lambda x, y, i, m: torch.cat([x[:, :, 0], i], 1),
        "stack": lambda x, y, i, m: torch.stack([x, y], -1),
        "flip": lambda x, y, i, m: x.flip(0, 2),
        "roll": lambda x, y, i, m: x.roll((1, -2), (0, 2)),
        "pad": lambda x, y, i, m: F.pad(x, (1, 2, 0, 1), value=3.0),
        "pad_bool": lambda x, y, i, m: F.pad(m, (1, 0), value=True),
        "crop": lambda x, y, i, m: F.pad(x, (0, -1)),
        "reflect": lambda x, y, i, m: F.pad(x, (1, 2), mode="reflect"),
        "unfold": lambda x, y, i, m: x.unfold(2, 3, 2),
        "pixel_shuffle": lambda x, y, i, m: F.pixel_shuffle(x.reshape(-1, 4, 2, 3), 2),
    },
    "constants": {
        "arange": lambda x, y, i, m: torch.arange(1, x.shape[0] + 3, 2),
        "arange_float": lambda x, y, i, m: torch.arange(x.shape[0], dtype=torch.float32) * 0.5,
        "full": lambda x, y, i, m: torch.full((x.shape[0], 2), 3.0),
        "zeros_like": lambda x, y, i, m: torch.zeros_like(x),
        "new_ones": lambda x, y, i, m: x.new_ones(x.shape[0], 2),
        "eye": lambda x, y, i, m: torch.eye(x.shape[0]),
        "literal": lambda x, y, i, m: torch.tensor([1.0, 2.0]) + x[:, :1, :2],
        "linspace": lambda x, y, i, m: torch.linspace(0, 1, 5) + x[:, :1, :5],
        "triangle": lambda x, y, i, m: torch.ones(x.shape[0], x.shape[0]).bool().triu(1),
        "tril": lambda x, y, i, m: x.tril(-1),
        "to_int": lambda x, y, i, m: x.to(torch.int64),
        "to_double": lambda x, y, i, m: x.double() * 2,
        "to_bool": lambda x, y, i, m: i.bool(),
    },
    "reductions": {
        "sum": lambda x, y, i, m: x.sum(),
        "sum_keep": lambda x, y, i, m: x.sum((0, 2), keepdim=True),
        "sum_bool": lambda x, y, i, m: m.sum(1),
        "mean": lambda x, y, i, m: x.mean((1, 2)),
        "prod": lambda x, y, i, m: x.prod(1),
        "amax": lambda x, y, i, m: x.amax(1),
        "max": lambda x, y, i, m: x.max(),
        "max_index": lambda x, y, i, m: x.max(1)[1],
        "min_value": lambda x, y, i, m: x.min(-1, keepdim=True)[0],
        "argmax_all": lambda x, y, i, m: x.argmax(),
        "argmin": lambda x, y, i, m: x.argmin(1, keepdim=True),
        "any": lambda x, y, i, m: m.any(1),
        "all": lambda x, y, i, m: m.all(),
        "var": lambda x, y, i, m: x.var(-1),
        "var_biased": lambda x, y, i, m: x.var(1, unbiased=False),
        "var_batch": lambda x, y, i, m: x.var(0),
        "std": lambda x, y, i, m: x.std((1, 2)),
        "logsumexp": lambda x, y, i, m: x.logsumexp(-1),
        "norm": lambda x, y, i, m: x.norm(dim=-1),
        "norm_inf": lambda x, y, i, m: torch.linalg.vector_norm(x, float("inf"), dim=-1),
        "normalize": lambda x, y, i, m: F.normalize(x, dim=-1),
        "cosine": lambda x, y, i, m: F.cosine_similarity(x, y, -1),
        "cumsum_bool": lambda x, y, i, m: m.cumsum(1),
        "topk": lambda x, y, i, m: x.topk(2, 1)[0],
        "topk_index": lambda x, y, i, m: x.topk(2, -1)[1],
        "sort": lambda x, y, i, m: x.sort(0, descending=True)[1],
    },
    "norms": {
        "softmax": lambda x, y, i, m: x.softmax(1),
        "log_softmax": lambda x, y, i, m: x.log_softmax(-1),
        "layer_norm": lambda x, y, i, m: F.layer_norm(x, (6,)),
        "layer_norm_of_sum": lambda x, y, i, m: F.layer_norm(x + y, (4, 6), y[0], y[1]),
        "rms_norm": lambda x, y, i, m: F.rms_norm(x, (6,), y[0, 0]),
        "group_norm": lambda x, y, i, m: F.group_norm(x, 2, y[0, :, 0], y[0, :, 1]),
        "instance_norm": lambda x, y, i, m: F.instance_norm(x),
        "batch_norm": lambda x, y, i, m: F.batch_norm(x, y[0, :, 0], y[0, :, 1].abs()),
    },
    "indexing": {
        "embedding": lambda x, y, i, m: F.embedding(i, y[0]),
        "index_select": lambda x, y, i, m: x.index_select(1, i[0]),
        "gather": lambda x, y, i, m: x.gather(1, i[..., None].expand(-1, -1, 6)),
        "one": lambda x, y, i, m: x[:, i[0]],
        "leading": lambda x, y, i, m: x[torch.arange(x.shape[0])[:, None], i],
        "adjacent": lambda x, y, i, m: x[:, i, i],
        "apart": lambda x, y, i, m: x[i[:, 0] % 2, :, i[:, 1]],
        "negative": lambda x, y, i, m: x[torch.arange(x.shape[0]), -1 - i[:, 0]],
        "one_hot": lambda x, y, i, m: F.one_hot(i, 4),
        "scatter": lambda x, y, i, m: x.scatter(1, i[..., None].expand(-1, -1, 6), y),
        "scatter_value": lambda x, y, i, m: x.scatter(2, i[..., None], 1.5),
        "index_put": lambda x, y, i, m: x.index_put((i[:2, 0] % 2, i[:2, 1] * 0 + 1), y[:1, 0]),
        "index_put_mask": lambda x, y, i, m: x.index_put((m,), torch.tensor(2.0)),
        "index_fill": lambda x, y, i, m: x.index_fill(1, torch.tensor([0, 2]), 1.0),
        "index_add": lambda x, y, i, m: x.index_add(1, torch.tensor([0, 2]), y[:, :2]),
        "slice_scatter": lambda x, y, i, m: torch.slice_scatter(x, y[:, :2], 1, 1, 3),
        "bucketize": lambda x, y, i, m: torch.bucketize(x, torch.tensor([-1.0, 0.0, 1.0])),
    },
    "selection": {
        "mask": lambda x, y, i, m: x[m],
        "masked_select": lambda x, y, i, m: x.masked_select(m[..., None]),
        "nonzero": lambda x, y, i, m: m.nonzero(),
    },
    "products": {
        "matmul": lambda x, y, i, m: x[:, None] @ y.mT[:, None],
        "mv": lambda x, y, i, m: torch.mv(x[:, 0], y[0, 0]),
        "addmm": lambda x, y, i, m: torch.addmm(x[0, 0], x[:, 0], y[0].T @ x[0], beta=0.5, alpha=2),
        "einsum": lambda x, y, i, m: torch.einsum("bij,bkj->bik", x, y),
        "einsum_permute": lambda x, y, i, m: torch.einsum("bij->jbi", x),
        "conv": lambda x, y, i, m: F.conv1d(x, KERNEL, padding=1),
        "conv_same": lambda x, y, i, m: F.conv1d(x, KERNEL, padding="same", dilation=2),
        "conv_groups": lambda x, y, i, m: F.conv1d(x, KERNEL[:4, :2], groups=2, stride=2),
        "conv_no_batch": lambda x, y, i, m: F.conv1d(x[0], KERNEL),
        "conv2d": lambda x, y, i, m: F.conv2d(x.reshape(-1, 2, 3, 4), KERNEL2, padding=1),
        "transposed": lambda x, y, i, m: F.conv_transpose2d(x.reshape(-1, 4, 2, 3), KERNEL2),
        "max_pool": lambda x, y, i, m: F.max_pool2d(x, (2, 3), stride=(2, 1)),
        "max_pool_ceil": lambda x, y, i, m: F.max_pool2d(x[:, None], 3, 2, 1, ceil_mode=True),
        "avg_pool": lambda x, y, i, m: F.avg_pool1d(x, 3, stride=1, padding=1),
        "adaptive": lambda x, y, i, m: F.adaptive_avg_pool1d(x, 3),
        "global": lambda x, y, i, m: F.adaptive_avg_pool2d(x[:, None], 1),
        "nearest": lambda x, y, i, m: F.interpolate(x[:, None], scale_factor=2),
        "bilinear": lambda x, y, i, m: F.interpolate(x[:, None], size=(7, 9), mode="bilinear"),
        "bicubic": lambda x, y, i, m: F.interpolate(x[:, None], size=(8, 12), mode="bicubic"),
    },
    "attention": {
        "plain": lambda x, y, i, m: attend(x, y),
        "scaled": lambda x, y, i, m: attend(x, y, scale=0.3),
        "keys": lambda x, y, i, m: attend(x, y, m[:, None, None, :]),
        "whole_rows_masked": lambda x, y, i, m: attend(
            x, y, m[:, None, :, None] & m[:, None, None, :]
        ),
        "bias": lambda x, y, i, m: attend(x, y, x[:, None, :, :4]),
        "bias_by_head": lambda x, y, i, m: attend(x, y, torch.stack([x[0, :, :4], y[0, :, :4]])),
        "rows_of_infinity": lambda x, y, i, m: attend(x, y, additive(m, float("-inf"))),
        "rows_of_lowest": lambda x, y, i, m: attend(x, y, additive(m, LOWEST)),
        "causal": lambda x, y, i, m: attend(x, y, is_causal=True),
        "causal_wide": lambda x, y, i, m: F.scaled_dot_product_attention(
            heads(x)[:, :, :2], heads(y), heads(x), is_causal=True
        ),
        "shared_heads": lambda x, y, i, m: F.scaled_dot_product_attention(
            heads(x), heads(y)[:, :1], heads(x)[:, :1], m[:, None, None, :], enable_gqa=True
        ),
        "repeated_heads": lambda x, y, i, m: F.scaled_dot_product_attention(
            heads(x), repeated(y), repeated(x + 1)
        ),
        "narrow_values": lambda x, y, i, m: F.scaled_dot_product_attention(
            heads(x), heads(y), heads(x)[..., :2]
        ),
        "three": lambda x, y, i, m: F.scaled_dot_product_attention(x, y, x + 1, m[:, None, :]),
        "three_causal": lambda x, y, i, m: F.scaled_dot_product_attention(x, y, x, is_causal=True),
        "double": lambda x, y, i, m: F.scaled_dot_product_attention(
            heads(x).double(), heads(y).double(), heads(x).double()
        ),
    },
}
