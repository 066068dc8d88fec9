"""What is installed: the modules behind the links, under attncompile/ and nowhere else."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_string
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LINKS = ("passes", "plugins", "models")
BARE = {"passes", "plugins", "models", "tools", "tests"}


def sources() -> set[str]:
    """Every Python module that must be installed, as a path under attncompile/."""
    own = {path.relative_to(ROOT).as_posix() for path in (ROOT / "attncompile").rglob("*.py") if not _cached(path)}
    for link in LINKS:
        own |= {f"attncompile/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / link).rglob("*.py")}
    return own


def _cached(path: Path) -> bool:
    return "__pycache__" in path.parts


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the sdist, built from a copy: a build leaves files beside its sources."""
    copy = tmp_path_factory.mktemp("copy")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", ":!.venv"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    )  # fmt: skip
    for name in filter(None, listed.stdout.split("\0")):
        source, target = ROOT / name, copy / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_symlink():
            target.symlink_to(source.readlink())
        elif source.exists():
            target.write_bytes(source.read_bytes())
    out = tmp_path_factory.mktemp("dist")
    done = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(copy)],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return out


@pytest.fixture(scope="module")
def wheel(built: Path) -> zipfile.ZipFile:
    (path,) = built.glob("*.whl")
    return zipfile.ZipFile(path)


def test_wheel_holds_every_module_under_attncompile(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    expected = sources()
    assert {f"attncompile/{link}/__init__.py" for link in LINKS} <= expected
    assert expected - names == set()


def test_wheel_has_one_top_level_package(wheel: zipfile.ZipFile) -> None:
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"attncompile"}
    (listed,) = [name for name in wheel.namelist() if name.endswith("top_level.txt")]
    assert wheel.read(listed).decode().split() == ["attncompile"]


def test_wheel_holds_the_data(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    assert "attncompile/py.typed" in names
    for pattern in ("attncompile/**/*.toml", "attncompile/**/*.json", "plugins/**/*.md"):
        wanted = [path.relative_to(ROOT).as_posix() for path in ROOT.glob(pattern)]
        wanted = [name if name.startswith("attncompile/") else f"attncompile/{name}" for name in wanted]
        assert set(wanted) <= names
    assert "attncompile/policies/exact.toml" in names
    assert "attncompile/policies/sparse.toml" in names
    assert "attncompile/policies/linear.toml" in names


def test_wheel_holds_the_library_for_onnx_runtime(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    names = set(wheel.namelist())
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "attncompile/runtime/csrc").iterdir()}
    assert sources and sources <= names
    library = "attncompile/runtime/libattncompile_ort.so"
    if shutil.which("g++") is None:
        assert library not in names
        return
    (path,) = [name for name in names if name.endswith(".dist-info/WHEEL")]
    assert "Tag: py3-none-linux" in wheel.read(path).decode()
    assert wheel.read(library)[:4] == b"\x7fELF"
    # Unpacked, it is the one that is found, and nothing is compiled.
    wheel.extractall(tmp_path)
    environment = {
        **os.environ,
        "PYTHONPATH": str(tmp_path),
        "CXX": "no-such-compiler",
        "ATTNCOMPILE_CACHE": "/nowhere",
    }
    code = "from attncompile.runtime import library; print(library())"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    assert done.stdout.strip() == str(tmp_path / library), done.stderr


@pytest.mark.slow
def test_a_wheel_without_a_compiler(built: Path, tmp_path: Path) -> None:
    """Is pure Python, and says so when the library is needed."""
    (source,) = built.glob("*.tar.gz")
    environment = {**os.environ, "CXX": "no-such-compiler"}
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path)]
    done = subprocess.run([*command, str(source)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    (path,) = tmp_path.glob("*.whl")
    assert path.name.endswith("py3-none-any.whl")
    wheel = zipfile.ZipFile(path)
    assert not [name for name in wheel.namelist() if name.endswith(".so")]
    wheel.extractall(tmp_path / "installed")
    environment |= {"PYTHONPATH": str(tmp_path / "installed"), "ATTNCOMPILE_CACHE": str(tmp_path / "cache")}
    code = "from attncompile.runtime import library; library()"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, env=environment)
    assert "MissingDependency: the library for ONNX Runtime cannot be compiled: there is no C++ compiler" in done.stderr


def test_wheel_leaves_out_the_zoos_graphs(wheel: zipfile.ZipFile) -> None:
    names = wheel.namelist()
    assert "attncompile/models/zoo/graphs.py" in names
    assert not [
        n
        for n in names
        if n.endswith(".gz") or n.startswith(("attncompile/models/zoo/graphs/", "attncompile/models/zoo/truth/"))
    ]


def test_wheel_leaves_out_trained_weights(built: Path, wheel: zipfile.ZipFile) -> None:
    assert "attncompile/models/trained/export.py" in wheel.namelist()
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = [*wheel.namelist(), *archive.getnames()]
    assert not [name for name in names if name.endswith((".onnx", ".safetensors", ".xz"))]


def test_wheel_metadata(wheel: zipfile.ZipFile) -> None:
    (name,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    metadata = message_from_string(wheel.read(name).decode())
    assert metadata["Name"] == "attncompile"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"
    base = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    heavy = ("torch", "triton", "tensorrt", "transformers", "diffusers")
    assert base
    assert not [line for line in base if line.startswith(heavy)]
    (scripts,) = [name for name in wheel.namelist() if name.endswith("entry_points.txt")]
    assert "attncompile = attncompile.cli:main" in wheel.read(scripts).decode()


def test_sdist_holds_the_modules_as_files(built: Path) -> None:
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        members = {member.name.split("/", 1)[1]: member for member in archive.getmembers() if "/" in member.name}
    assert sources() - set(members) == set()
    assert all(members[name].isfile() or members[name].islnk() for name in sources())
    assert not [name for name in members if name.split("/")[0] in BARE]


def test_links_are_committed() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "-s", "--", *(f"attncompile/{link}" for link in LINKS)],
        cwd=ROOT, check=True, capture_output=True, text=True,
    ).stdout.splitlines()  # fmt: skip
    modes = {line.split("\t")[1]: line.split()[0] for line in listed}
    assert modes == {f"attncompile/{link}": "120000" for link in LINKS}
    for link in LINKS:
        assert (ROOT / "attncompile" / link).readlink() == Path("..") / link


def test_bare_imports_are_banned_by_lint(tmp_path: Path) -> None:
    for name in (*LINKS, "tools"):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", "check", "--config", str(ROOT / "pyproject.toml"), "-"],
            input=f'"""A module."""\n\nimport {name}.something\n\n__all__ = ["{name}"]\n',
            cwd=tmp_path, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 1
        assert "TID251" in done.stdout


@pytest.mark.parametrize(
    "module",
    [
        "attncompile.passes.detect",
        "attncompile.models",
        "attncompile.cli",
        "attncompile.pipeline",
        "attncompile.kernel_bundle",
        "attncompile.kernels.launcher",
        "attncompile.runtime.session",
        "attncompile.targets.onnxruntime_cuda",
    ],
)
def test_import_needs_no_heavy_package(module: str) -> None:
    """The heavy packages are made unimportable, so that an import hidden in a try block is found as well."""
    code = (
        "import sys\n"
        "heavy = ('torch', 'triton', 'tensorrt', 'tensorrt_rtx', 'transformers', 'diffusers', 'onnxscript')\n"
        "for name in heavy: sys.modules[name] = None\n"
        f"import {module}\n"
        "assert sys.modules['torch'] is None\n"
        f"print({module}.__name__)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == module
