"""Prefixes and soft prompts in the layout that PEFT keeps them in.

PEFT stores one tensor ``prompt_embeddings``. Of a soft prompt it is the embeddings
``[tokens, dim]``; of a prefix it is, for each token, the key and the value of every
layer in turn:

    [tokens, layers * 2 * kv_heads * head_dim]

which :func:`prefix_to_peft` and :func:`prefix_from_peft` make and read, exactly. Layers
are attention cores in the order of the graph.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .adapters import PREFIX_KEY, PREFIX_VALUE, SOFT_PROMPT
from .errors import UsageError
from .program import Program


def prefix_names(program: Program) -> tuple[str, ...]:
    """Names of the prefix's parameters: key and value of each core, in graph order."""
    cores = dict.fromkeys(name.removesuffix(PREFIX_KEY) for name in _read(program, PREFIX_KEY))
    return tuple(core + suffix for core in cores for suffix in (PREFIX_KEY, PREFIX_VALUE))


def prefix_to_peft(program: Program) -> Tensor:
    """The prefix of a program as ``[tokens, layers * 2 * kv_heads * head_dim]``.

    Raises:
        UsageError: for a program without a prefix, or whose cores differ in shape.
    """
    states = [program.tensor(name).detach() for name in prefix_names(program)]
    if not states:
        raise UsageError("the program has no prefix", fix="run prefix first")
    if len({state.shape for state in states}) > 1:
        raise UsageError(
            "PEFT's layout has one number of heads and one head size, and this model has several",
            fix="save the prefix in ftc's own format",
        )
    return torch.stack(states).permute(2, 0, 1, 3).flatten(1)


def prefix_from_peft(program: Program, flat: Tensor) -> dict[str, Tensor]:
    """Tensors for the parameters of a program's prefix, by name.

    Args:
        program: with a prefix of as many tokens.
        flat: ``[tokens, layers * 2 * kv_heads * head_dim]``.

    Raises:
        UsageError: for a tensor of another size.
    """
    names = prefix_names(program)
    shapes = {tuple(program.tensor(name).shape) for name in names}
    if (
        len(shapes) != 1
        or flat.shape != (_tokens(shapes), flat.shape[-1])
        or (flat.shape[-1] * flat.shape[0] != sum(program.tensor(n).numel() for n in names))
    ):
        raise UsageError(
            f"prompt_embeddings {list(flat.shape)} do not fit {len(names)} keys and values of "
            f"{' or '.join(str(list(shape)) for shape in sorted(shapes)) or 'no prefix'}",
            fix="run prefix{tokens=...} with the adapter's number of tokens on its own model",
        )
    ((heads, tokens, dim),) = shapes
    states = flat.view(tokens, len(names), heads, dim).permute(1, 2, 0, 3)
    return {name: state.contiguous() for name, state in zip(names, states, strict=True)}


def prompt_name(program: Program) -> str:
    """Name of the parameter ``[tokens, dim]`` of a soft prompt, which PEFT stores as it is.

    Raises:
        UsageError: for a program without one.
    """
    name = next(_read(program, SOFT_PROMPT), None)
    if name is None:
        raise UsageError("the program has no soft prompt", fix="run prompt first")
    return name


def _tokens(shapes: set[tuple[int, ...]]) -> int:
    return next(iter(shapes))[1]


def _read(program: Program, suffix: str) -> Iterator[str]:
    """Names with a suffix, in the order in which the graph computes with them."""
    for node in program.graph.nodes:
        for used in node.all_input_nodes:
            if used.op == "get_attr" and str(used.target).endswith(suffix):
                yield str(used.target)
