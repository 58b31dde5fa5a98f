"""Where something may be written: refused before the work, explained after it."""

from __future__ import annotations

import errno
import json
from pathlib import Path

from ftc.graph.errors import UsageError, WriteError

from .replace_folder import recover

HEAD = "ftc.json"
_FIXES = {
    errno.ENOSPC: "free some space, or choose another place",
    errno.EDQUOT: "free some of your quota, or choose another place",
    errno.EFBIG: "allow larger files (ulimit -f), or choose another place",
    errno.EACCES: "choose a place that you may write to",
    errno.EPERM: "choose a place that you may write to",
    errno.EROFS: "choose a place that you may write to",
}


def is_bundle(path: Path) -> bool:
    """Whether ``path`` is a bundle, or was one when a replacement of it was interrupted."""
    recover(path)
    return (path / HEAD).is_file()


def check_output(path: Path, *, force: bool) -> None:
    """Refuses a place that may not be written to; call it before the work starts.

    Raises:
        UsageError: when ``path`` is a file or in one, a folder that is no bundle, a bundle
            without ``force``, or one with a file that ftc did not write.
    """
    check_parents(path)
    if path.is_dir() and not is_bundle(path) and any(path.iterdir()):
        raise UsageError(f"{path} exists and is not a bundle", fix="choose another output folder")
    if path.exists() and not path.is_dir():
        raise UsageError(f"{path} is a file", fix="choose another output folder")
    if is_bundle(path) and not force:
        raise UsageError(f"{path} exists", fix="use --force to replace it")
    if is_bundle(path) and (foreign := _foreign_file(path)):
        raise UsageError(
            f"{foreign} is not a part of the bundle, and would be deleted with it",
            fix="move it, or choose another output folder",
        )


def check_parents(path: Path) -> None:
    """Refuses a place within a file.

    Raises:
        UsageError: naming the file.
    """
    there = next((parent for parent in path.parents if parent.exists()), None)
    if there is not None and not there.is_dir():
        raise UsageError(f"{there} is a file, not a folder", fix="choose another place")


def cannot_write(error: OSError, target: Path) -> WriteError:
    """What the system said when ``target`` was written, and what helps; it is as it was."""
    otherwise = "choose another place"
    return WriteError(
        f"cannot write {error.filename or target}: {error.strerror or error}",
        where=f"saving {target}; nothing there has changed",
        fix=_FIXES.get(error.errno or 0, otherwise),
    )


def _foreign_file(bundle: Path) -> str | None:
    """A file in a bundle that its head does not list."""
    try:
        listed = set(json.loads((bundle / HEAD).read_text(encoding="utf-8"))["files"])
    except (OSError, ValueError, LookupError, TypeError):
        listed = set()  # a damaged head vouches for nothing
    found = (p.relative_to(bundle).as_posix() for p in sorted(bundle.rglob("*")) if not p.is_dir())
    return next((f"{bundle / name}" for name in found if name not in listed | {HEAD}), None)
