"""Dependencies point one way: core <- passes, plugins, targets <- the rest; models and tools are never imported."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ALLOWED = {
    "attncompile/core": {"core"},
    "passes": {"core", "passes"},
    "plugins": {"core", "plugins"},
    "attncompile/runtime": {"core", "runtime"},
    "attncompile/targets": {"core", "targets", "runtime", "__version__"},  # what they write is what the runtime reads
    "attncompile/kernels": {"core", "kernels", "__version__"},  # mechanisms' kernels come in as values
    "models": {"core", "measure", "metrics", "models", "passes"},  # truth against detection; scores on a provider
}
HEAVY = {"torch", "triton", "tensorrt", "tensorrt_rtx", "transformers", "diffusers"}


def imported(path: Path) -> set[str]:
    """Dotted names that a file imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{a.name}" for a in node.names}
    return names


@pytest.mark.parametrize("folder", ALLOWED)
def test_layers(folder: str) -> None:
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    for path in files:
        ours = {n.split(".")[1] for n in imported(path) if n.startswith("attncompile.") and n.count(".")}
        assert ours <= ALLOWED[folder], f"{path.relative_to(ROOT)} imports {ours - ALLOWED[folder]}"


def test_the_compiler_never_imports_models_or_heavy_packages_at_the_top() -> None:
    files = [*(ROOT / "attncompile").glob("*.py"), *(ROOT / "attncompile" / "kernels").glob("*.py")]
    for path in sorted(files):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        top = {
            name.split(".")[0]
            for node in tree.body
            if isinstance(node, ast.Import | ast.ImportFrom)
            for name in ([a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""])
        }
        assert not top & HEAVY, path
        assert not any(n.startswith("attncompile.models") for n in imported(path)), path
