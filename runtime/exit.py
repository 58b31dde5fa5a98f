"""How a command line ends: exit status, and errors in one form.

======  =====================================================
0       done
1       a promise or a budget was broken, or the machine failed (a full disk)
2       the call was wrong
70      a bug in ftc
130     interrupted
141     nobody reads the output any more
======  =====================================================

A user's mistake never shows a traceback; ``--debug`` shows every one, and what
libraries have to say, which is silenced otherwise.
"""

from __future__ import annotations

import ctypes
import gc
import json
import logging
import os
import sys
import warnings
from collections.abc import Mapping, Sequence

import click

from ftc.graph.errors import FtcError, UsageError

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_NEW_OBJECTS = 50_000
FAILED, BUG, INTERRUPTED, CLOSED_PIPE = 1, 70, 130, 141
_ENVIRONMENT = {
    # Threads that spin while they wait make torch 30 times slower where cores are shared.
    "OMP_WAIT_POLICY": "PASSIVE",
    # Huge pages for torch's large tensors: a fifth of a compile was the kernel's page faults.
    "THP_MEM_ALLOC_ENABLE": "1",
}
_QUIET = {
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}


def run_command(group: click.Group, arguments: Sequence[str]) -> int:
    """Runs one command line and prints errors for people.

    Returns:
        The exit status.
    """
    debug = "--debug" in arguments
    if sys.stdout is None:  # closed by who called
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    _set(_ENVIRONMENT)
    _return_freed_memory()
    # What imports make stays, and by default it is looked at again every 700 objects.
    gc.set_threshold(_NEW_OBJECTS, *gc.get_threshold()[1:])
    if not debug:
        _silence()
    try:
        # Not group.main, which has answers of its own to a closed pipe and an interrupt.
        with group.make_context("ftc", list(arguments)) as context:
            group.invoke(context)
        sys.stdout.flush()
    except KeyboardInterrupt as stop:
        return _interrupted(told=type(stop) is not KeyboardInterrupt)
    except click.exceptions.Exit as done:
        return done.exit_code
    except Exception as error:
        if _was_interrupted(error):
            return _interrupted()
        if debug:
            raise
        return _failed(error, as_json="--json" in arguments)
    return 0


def _interrupted(told: bool = False) -> int:
    """Says so, unless a command's own kind of interrupt has told more already."""
    if not told:
        click.echo("interrupted; no result was written", err=True)
    return INTERRUPTED


def _was_interrupted(error: BaseException | None) -> bool:
    """Whether an interrupt came where a library made another error of it: within an import."""
    while error is not None:
        if isinstance(error, KeyboardInterrupt):
            return True
        error = error.__cause__ or error.__context__
    return False


def _failed(error: Exception, *, as_json: bool) -> int:
    """Prints an error in its form; the exit status."""
    if isinstance(error, click.Abort):
        return INTERRUPTED
    if isinstance(error, BrokenPipeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return CLOSED_PIPE
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        click.echo(error.format_message(), err=True)
        return error.exit_code
    if isinstance(error, click.ClickException):
        error = _from_click(error)
    if isinstance(error, FtcError):
        _print(error, as_json=as_json)
        return error.exit_code
    if isinstance(error, (OSError, MemoryError)):
        click.echo(f"{type(error).__name__}: {error}", err=True)
        return FAILED
    click.echo(
        f"this is a bug in ftc: {type(error).__name__}: {error}\n"
        "  fix: run the same with --debug and report the traceback",
        err=True,
    )
    return BUG


def _print(error: FtcError, *, as_json: bool) -> None:
    if as_json:
        parts = {"what": error.what, "where": error.where, "fix": error.fix}
        click.echo(json.dumps({"error": {"kind": type(error).__name__, **parts}}, indent=1))
    else:
        from .console import print_error

        print_error(error)


def _from_click(error: click.ClickException) -> UsageError:
    """A mistake that click found, in ftc's form."""
    context = getattr(error, "ctx", None)
    message = " ".join(error.format_message().split()).rstrip(".")
    fix = f"{context.command_path} --help" if context else "ftc --help"
    return UsageError(message, fix=fix)


def _silence() -> None:
    """Nothing that libraries have to say reaches the terminal."""
    _set(_QUIET)
    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)


def _set(variables: Mapping[str, str]) -> None:
    """Environment variables for libraries not imported yet; what the user set stays."""
    for name, value in variables.items():
        os.environ.setdefault(name, value)


def _return_freed_memory() -> None:
    """Has the C library give every large freed block back at once, where it is glibc.

    It raises the threshold for that to 32 MB as blocks are freed, and most
    weights are smaller: hundreds of megabytes would stay with the process. Lower
    ones make the kernel clear the same pages again and again.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return  # another C library: it has no such thresholds
    mallopt(_MMAP_THRESHOLD, 8 << 20)
    mallopt(_TRIM_THRESHOLD, 64 << 20)
