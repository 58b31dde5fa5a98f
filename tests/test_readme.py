"""README and docs: every command runs, every Python block runs, every link and pass exists."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ftc.cli import ftc as cli
from ftc.graph.bundle import save_bundle
from ftc.graph.sources import capture
from ftc.passes import registry
from ftc.runtime.commands import NAMES

from .conftest import Command

ROOT = Path(__file__).resolve().parents[1]
PAGES = ["README.md", *(f"docs/{p.name}" for p in sorted((ROOT / "docs").glob("*.md")))]
OWN_TESTS = {"docs/writing_passes.md"}  # its blocks run in test_writing_passes.py
BLOCK = re.compile(r"^```(sh|python)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(page: str) -> list[tuple[str, str]]:
    return BLOCK.findall((ROOT / page).read_text())


def commands(page: str) -> list[str]:
    return [
        line for kind, body in blocks(page) if kind == "sh" for line in body.splitlines() if line
    ]


@pytest.mark.parametrize("page", [p for p in PAGES if p not in OWN_TESTS])
def test_the_page_runs(
    page: str, command: Command, minilm: Path, compiled_minilm: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    """In order, in an empty folder with the examples and the bundles that other pages made."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "examples", "examples")
    (tmp_path / "build").mkdir()
    text = (ROOT / page).read_text()
    made = {"build/minilm": compiled_minilm}
    places = {"MINILM": minilm}
    if "SMOLLM2" in text or "smollm2" in text:
        made["build/smollm2"] = request.getfixturevalue("compiled_smollm2")
        places["SMOLLM2"] = request.getfixturevalue("smollm2")
    if "build/mlp" in text:
        save_bundle(capture("examples.mlp:model"), "build/mlp")
    for name, source in made.items():
        shutil.copytree(source, name, copy_function=os.link)
    names: dict[str, object] = {}
    for kind, body in blocks(page):
        if kind == "python":
            exec(compile(body, page, "exec"), names)
            continue
        for line in filter(None, body.splitlines()):
            _run(line, command, places, tmp_path)


def _run(line: str, command: Command, places: dict[str, Path], folder: Path) -> None:
    words = [str(places.get(word, word)) for word in shlex.split(line)]
    if words[0] == "make":
        subprocess.run([*words, "--dry-run"], cwd=ROOT, check=True, capture_output=True)
        return
    assert words[0] == "ftc", line
    if words in _fixtures(places):
        return  # a fixture ran just that
    if "-o" in words and "--force" not in words:  # what an earlier page makes
        shutil.rmtree(folder / words[words.index("-o") + 1], ignore_errors=True)
    ran = command(*words[1:])
    assert ran.status == 0, f"{line}\n{ran.err}"


def _fixtures(places: dict[str, Path]) -> list[list[str]]:
    """The command lines of the bundles that conftest compiles."""
    lines = {"MINILM": "lowrank,int8 -o build/minilm", "SMOLLM2": "int8 -o build/smollm2"}
    return [["ftc", "compile", str(places[name]), "--passes", *rest.split()]
            for name, rest in lines.items() if name in places]  # fmt: skip


def test_every_command_is_documented() -> None:
    written = {shlex.split(c)[1] for page in PAGES for c in commands(page) if c.startswith("ftc ")}
    assert written >= set(NAMES) - {"export"} and "export" in _all_text()


def test_every_option_is_documented() -> None:
    """Options that are on one command only; those of every command are in the README."""
    text = _all_text()
    for name in NAMES:
        for parameter in cli.get_command(None, name).params:
            assert any(option in text for option in parameter.opts if option[0] == "-") or (
                parameter.param_type_name == "argument"
            ), f"{name} {parameter.name}"


def _all_text() -> str:
    return "\n".join((ROOT / page).read_text() for page in PAGES)


def test_the_table_of_passes_is_the_registrys() -> None:
    rows = re.findall(r"^\| `([\w-]+)` \| (\w+) \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    known = [(n, registry.get(n).effect.value) for n in registry.names()]
    built_in = [
        pair for pair in known if registry.get(pair[0]).__module__.startswith("ftc.passes.")
    ]
    assert rows == built_in


@pytest.mark.parametrize("page", [*PAGES, "bench/README.md", "CHANGELOG.md"])
def test_links_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", (ROOT / page).read_text()):
        assert ((ROOT / page).parent / target).exists(), target


def test_bench_scripts_show_their_help() -> None:
    files = sorted((ROOT / "bench").glob("*.py"))
    for script in (f for f in files if "__main__" in f.read_text()):
        done = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True)
        assert done.returncode == 0 and "usage" in done.stdout
        assert script.name in (ROOT / "bench/README.md").read_text()
