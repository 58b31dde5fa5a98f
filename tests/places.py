"""What tests of sources share: how a refusal must read, and when two programs are one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ftc.graph.errors import FtcError, SourceError


def refused(call: Any, *words: str, kind: type[FtcError] = SourceError) -> FtcError:
    """The error of ``call``, which must speak of ``words``, and say what to do."""
    with pytest.raises(kind) as caught:
        call()
    for word in words:
        assert word in str(caught.value)
    assert caught.value.fix
    return caught.value


def same(a: Any, b: Any) -> bool:
    """Whether two programs have one signature and one set of tensors."""
    left, right = dict(a.tensors()), dict(b.tensors())
    return (
        a.signature == b.signature
        and left.keys() == right.keys()
        and all(torch.equal(left[k], right[k]) for k in left)
    )
