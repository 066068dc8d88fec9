"""The documentation says what the source does: codes, links, verbs and options."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.main import get_command

from attncompile.cli import VERBS, app

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])


def _constants(node: ast.expr) -> Iterator[str]:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    elif isinstance(node, ast.IfExp):
        yield from _constants(node.body)
        yield from _constants(node.orelse)


def codes_of(text: str) -> set[str]:
    """The codes that this source gives to refusals and near misses."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            place = {"Unsupported": 0, "NearMiss": 3}.get(node.func.id)
            if place is not None and len(node.args) > place:
                found |= set(_constants(node.args[place]))
        elif isinstance(node, ast.ClassDef) and any(ast.unparse(b) == "Unsupported" for b in node.bases):
            # A subclass has its code in its own constructor: super().__init__("code", reason).
            for call in ast.walk(node):
                if isinstance(call, ast.Call) and ast.unparse(call.func) == "super().__init__" and call.args:
                    found |= set(_constants(call.args[0]))
    return found


def test_codes_are_read_from_source() -> None:
    text = 'raise Unsupported("one" if x else "two", "why")\nNearMiss(a, b, c, "three")\nUnsupported(code, "why")'
    text += '\nclass Own(Unsupported):\n    def __init__(self):\n        super().__init__("four", "why")'
    assert codes_of(text) == {"one", "two", "three", "four"}


def test_every_code_of_a_refusal_is_documented() -> None:
    source = set().union(*(codes_of(p.read_text()) for p in (ROOT / "passes").rglob("*.py")))
    assert len(source) > 50
    rows = re.findall(r"^\| `([a-z-]+)` \| (.+) \| (.+) \|$", (ROOT / "docs" / "forms.md").read_text(), re.MULTILINE)
    documented = [code for code, _, _ in rows]
    assert len(documented) == len(set(documented)), "a code has two rows"
    assert not source - set(documented), "write a row for these in docs/forms.md"
    assert not set(documented) - source, "no source gives these codes: take their rows out of docs/forms.md"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_and_paths_exist(page: Path) -> None:
    text = page.read_text()
    links = [x for x in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in x]
    named = re.findall(r"`((?:docs|tools|tests|passes|plugins|models|attncompile)/[\w/.-]*)`", text)
    for link in links:
        assert (page.parent / link).exists(), link
    for path in named:
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_commands_are_known(page: Path) -> None:
    group = get_command(app)
    for line in re.findall(r"^(?:\$ )?attncompile (.+?)(?:\s{2,}#.*)?$", page.read_text(), re.MULTILINE):
        verb, *rest = line.split()
        words = rest if verb in VERBS else [verb, *rest]
        command = group.commands[verb if verb in VERBS else "compile"]
        known = {o for p in command.params for o in (*p.opts, *p.secondary_opts)} | {"--help"}
        for word in words:
            if word.startswith("-"):
                assert word in known, line
