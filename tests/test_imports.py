"""The rooms: imports go one way, files stay small, the root stays clean."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("graph", "passes", "runtime", "cli")
SOURCES = sorted(p for room in ROOMS[:3] for p in (ROOT / room).rglob("*.py"))
SOURCES += [p for p in (ROOT / "cli.py",) if p.exists()]
LONGEST = 300


def _imports(path: Path) -> Iterator[str]:
    """Absolute names of the modules that a file imports, at the top or inside functions."""
    package = ["ftc", *path.relative_to(ROOT).parent.parts]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = [*base, *(node.module.split(".") if node.module else [])]
            yield ".".join(module)
            yield from (".".join([*module, alias.name]) for alias in node.names)


def _room(path: Path) -> int:
    return ROOMS.index(path.relative_to(ROOT).parts[0].removesuffix(".py"))


def _id(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", SOURCES, ids=_id)
def test_imports_go_one_way(path):
    later = {f"ftc.{room}" for room in ROOMS[_room(path) + 1 :]}
    for name in _imports(path):
        assert not any(name == room or name.startswith(room + ".") for room in later), name


@pytest.mark.parametrize("path", [*SOURCES, *sorted((ROOT / "tests").glob("*.py"))], ids=_id)
def test_nothing_imports_a_bare_room(path):
    """From the root, ``import graph`` would load a second copy of ``ftc.graph``."""
    assert not {name.split(".")[0] for name in _imports(path)} & set(ROOMS)


@pytest.mark.parametrize("path", SOURCES, ids=_id)
def test_files_stay_readable(path):
    text = path.read_text()
    assert len(text.splitlines()) <= LONGEST
    if text.strip():
        assert ast.get_docstring(ast.parse(text)), "a file opens by saying what it is for"


def test_who_names_an_operator_of_ftc_registers_it() -> None:
    """Whichever module is imported first: each in a fork of a process that has torch alone."""
    paths = [p for p in SOURCES if "torch.ops.ftc" in p.read_text()]
    modules = [".".join(["ftc", *p.relative_to(ROOT).with_suffix("").parts]) for p in paths]
    script = (
        "import importlib, os, sys, torch\n"
        "for name in sys.argv[1:]:\n"
        "    if not os.fork():\n"
        "        importlib.import_module(name)\n"
        "        os._exit(0)\n"
        "    if os.wait()[1]:\n"
        "        sys.exit(f'{name} cannot be imported first')\n"
    )
    found = subprocess.run([sys.executable, "-c", script, *modules], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr


def test_the_root_holds_no_other_module():
    """Everything beside the rooms would be installed as part of ``ftc``."""
    assert {p.name for p in ROOT.glob("*.py")} <= {"__init__.py", "__main__.py", "cli.py"}


def test_relative_and_nested_imports_are_seen():
    names = set(_imports(ROOT / "graph" / "structure" / "structure.py"))
    assert {"ftc.graph.structure.flow", "ftc.graph.structure.flow.Flow"} <= names
