"""A cache in one buffer: attention writes behind what is there, and gives what the graph gives."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ftc.graph.cached import Names, pad_left, run_in_pieces, states, step_inputs
from ftc.passes.cache import Cache
from ftc.runtime.lower import lower
from ftc.runtime.session import OnnxSession
from ftc.tests.families import captured

ROOM = 16
FAMILIES = ["llama", "qwen3", "gpt2", "gemma2"]


def rows_of(*lengths: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(sum(lengths))
    return [torch.randint(3, 99, (n,), generator=generator) for n in lengths]


@pytest.mark.parametrize("name", FAMILIES)
def test_copied_or_in_one_buffer_it_is_the_graph(name):
    """Rows of 9, 6 and 1 tokens, in pieces of 4, 3, 1 and 1."""
    program = Cache()(captured(name)[1]).program
    model = lower(program, in_place=True)
    grouped = [n for n in model.graph if n.op_type == "GroupQueryAttention"]
    if name == "llama":
        assert len(grouped) == len(states(program.signature)) / 2
    session = OnnxSession(model)
    rows, pieces = rows_of(9, 6, 1), [4, 3, 1, 1]
    with torch.no_grad():
        wanted = run_in_pieces(program, rows, pieces)["logits"]
    got = run_in_pieces(session, rows, pieces, program.signature)["logits"]
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)
    if len(grouped) == len(states(program.signature)) / 2:
        shared = _in_one_buffer(program.signature, session, rows, pieces)
        torch.testing.assert_close(shared, wanted, atol=1e-4, rtol=1e-4)


def _in_one_buffer(signature, session, rows, pieces):
    from onnxruntime import OrtValue

    raw = session._session
    ids, mask = pad_left(rows)
    buffers = {
        spec.name: OrtValue.ortvalue_from_numpy(
            np.full((len(rows), spec.shape[1], ROOM, spec.shape[3]), np.nan, np.float32)
        )
        for spec in states(signature)
    }
    start = 0
    for piece in pieces:
        end = start + piece
        binding = raw.io_binding()
        for name, given in step_inputs(signature, ids[:, start:end], mask[:, :end], {}).items():
            if name not in buffers:
                binding.bind_cpu_input(name, given.contiguous().numpy())
        for number in range(len(buffers) // 2):
            for past, present in zip(Names.past(number), Names.present(number), strict=True):
                binding.bind_ortvalue_input(past, buffers[past])
                binding.bind_ortvalue_output(present, buffers[past])
        binding.bind_output(signature.output_names[0])
        raw.run_with_iobinding(binding)
        start = end
    found = [o for o in binding.get_outputs() if o.shape()[1] == 1 and len(o.shape()) == 3]
    return torch.from_numpy(found[0].numpy())
