"""Errors of torch.compile, which needs a C++ compiler that knows this processor."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ftc.graph.errors import UsageError

_COMPILER = ("torch._inductor", "torch._dynamo")


@contextmanager
def compile_errors(asked: bool) -> Iterator[None]:
    """Says of an error of torch.compile that it is one, and what to leave out.

    Args:
        asked: whether anything is compiled here; other errors pass as they are.

    Raises:
        UsageError: in place of the compiler's error, with its first line.
    """
    try:
        yield
    except Exception as error:
        if not asked or not type(error).__module__.startswith(_COMPILER):
            raise
        said = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        raise UsageError(
            f"torch.compile cannot compile this program on this machine: {said}",
            fix="leave --compile out, or install another C++ compiler; --debug shows its output",
        ) from error
