"""Every family of translations against torch, at sizes other than the example's.

One module computes a whole family, so that one capture serves all of it; each
operator is one output and one assertion.
"""

from __future__ import annotations

import pytest
import torch

from ftc.graph.capture import capture_module
from ftc.runtime.lower import decomposed, lower
from ftc.runtime.session import OnnxSession
from ftc.tests.operators import FAMILIES, Family, inputs


@pytest.mark.parametrize("family", FAMILIES)
def test_translations_agree_with_torch(family: str) -> None:
    module = Family(FAMILIES[family])
    example = inputs(3)
    program = capture_module(module, example, dynamic={n: {0: "batch"} for n in example})
    session = OnnxSession(lower(program))
    for batch in (5, 2):
        given = inputs(batch)
        expected = module(**given)
        found = session({n: given[n] for n in program.signature.input_names})
        assert set(found) == set(expected)
        for name, value in expected.items():
            torch.testing.assert_close(
                found[name],
                value,
                atol=2e-5,
                rtol=1e-4,
                equal_nan=True,
                msg=lambda t, n=name: f"{n}: {t}",
            )


def test_an_operator_without_translation_is_decomposed_and_said() -> None:
    module = Family({"lerp": FAMILIES["arithmetic"]["lerp"]})
    example = inputs(3)
    program = capture_module(module, example, dynamic={n: {0: "batch"} for n in example})
    model = lower(program)
    assert decomposed(model) == ("aten.lerp.Scalar",)
    given = {n: inputs(7)[n] for n in program.signature.input_names}
    torch.testing.assert_close(OnnxSession(model)(given)["lerp"], program(given)["lerp"])
