"""An output folder appears whole or not at all; copies keep holes and cost no memory."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from attncompile.core import folder
from attncompile.core.errors import BadArguments, TargetError
from attncompile.core.folder import atomic_folder, copy_file, write_file
from attncompile.search import arrays

GIB = 1 << 30


def _names(path: Path) -> list[str]:
    return sorted(p.name for p in path.iterdir())


def test_new_folder_appears_at_the_end(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with atomic_folder(out) as inside:
        (inside / "report.json").write_text("{}")
        assert not out.exists()
        assert inside.parent == out.parent, "a rename must not cross file systems"
    assert _names(out) == ["report.json"]
    assert _names(out.parent) == ["out"]


def test_nothing_is_left_after_an_exception(tmp_path: Path) -> None:
    with pytest.raises(KeyError), atomic_folder(tmp_path / "out") as inside:
        (inside / "model.onnx").write_text("half")
        raise KeyError
    assert _names(tmp_path) == []


def test_our_old_folder_is_replaced_whole(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "report.json").write_text("old")
    (out / "stale.engine").write_text("old")
    with atomic_folder(out) as inside:
        (inside / "report.json").write_text("new")
        assert (out / "report.json").read_text() == "old"
    assert _names(out) == ["report.json"]
    assert (out / "report.json").read_text() == "new"
    assert _names(tmp_path) == ["out"]


def test_our_old_folder_survives_an_exception(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "plan.toml").write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic_folder(out) as inside:
        (inside / "plan.toml").write_text("new")
        raise KeyboardInterrupt
    assert (out / "plan.toml").read_text() == "old"
    assert _names(tmp_path) == ["out"]


def test_what_killed_runs_left_is_removed_by_the_next(tmp_path: Path) -> None:
    """By a run for the same output, once it is old; not what another run works in, nor what has another name."""
    code = "import sys, os\nfrom attncompile.core.folder import atomic_folder\n"
    code += "with atomic_folder(__import__('pathlib').Path(sys.argv[1])) as f:\n    print(f.name, flush=True)\n"
    code += "    sys.stdin.read() or os.kill(os.getpid(), 9)"
    root = str(Path(__file__).parents[2])
    started = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "out")], stdin=subprocess.PIPE, text=True,
                         stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": root})
        for _ in range(2)
    ]  # fmt: skip
    names = []
    for process in started:
        assert process.stdout is not None
        names.append(process.stdout.readline().strip())
    others = [".out.12345678.old", ".out.x.tmp", ".outer.12345678.tmp", ".out.1234567g.tmp"]
    for name in others:
        (tmp_path / name).mkdir()
    started[0].communicate()
    assert started[0].returncode == -9 and set(names) <= set(_names(tmp_path))
    for name in _names(tmp_path):
        os.utime(tmp_path / name, (0, 0))
    (tmp_path / ".out.00000000.tmp").mkdir()  # made this moment: a run that has not locked it yet
    with atomic_folder(tmp_path / "out") as inside:
        (inside / "report.json").write_text("{}")
    assert _names(tmp_path) == sorted([names[1], ".out.00000000.tmp", "out", *others])
    started[1].communicate("go on")
    assert started[1].returncode == 0 and names[1] not in _names(tmp_path)


def test_foreign_folder_file_and_link_are_refused(tmp_path: Path) -> None:
    foreign = tmp_path / "thesis"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("years of work")
    file = tmp_path / "file"
    file.write_text("x")
    link = tmp_path / "link"
    link.symlink_to(foreign)
    for out in (foreign, file, link):
        with pytest.raises(BadArguments) as error, atomic_folder(out):
            pytest.fail("must be refused before any work")
        assert str(out) in error.value.message
        assert error.value.hint
    assert (foreign / "thesis.tex").read_text() == "years of work"
    assert _names(tmp_path) == ["file", "link", "thesis"]


def test_a_folder_filled_meanwhile_is_not_destroyed(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(BadArguments), atomic_folder(out):
        out.mkdir()
        (out / "precious").write_text("x")
    assert _names(out) == ["precious"]


def test_empty_folder_is_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with atomic_folder(out) as inside:
        (inside / "a").write_text("a")
    assert _names(out) == ["a"]


@pytest.mark.parametrize("kernel", [True, False], ids=["copy_file_range", "read-write"])
def test_sparse_copy_keeps_contents_and_holes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernel: bool) -> None:
    monkeypatch.setattr(folder, "_reflink", lambda *_: False)
    if not kernel:
        monkeypatch.delattr(os, "copy_file_range")
    source, target = tmp_path / "source", tmp_path / "sub" / "target"
    size = 300 * (1 << 20) + 17
    pieces = {0: b"begin", 123_456_789: b"middle" * 1000, size - 3: b"end"}
    with source.open("wb") as file:
        file.truncate(size)
        for offset, data in pieces.items():
            file.seek(offset)
            file.write(data)
    assert copy_file(source, target) == "stream"
    assert target.stat().st_size == size
    assert target.stat().st_mtime_ns == source.stat().st_mtime_ns
    with target.open("rb") as file:
        for offset, data in pieces.items():
            file.seek(offset)
            assert file.read(len(data)) == data
        file.seek(10)
        assert file.read(1 << 20) == bytes(1 << 20)
    assert target.stat().st_blocks * 512 < 4 << 20, "holes became zeros on disk"


def test_copy_leaves_no_part_of_a_file_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "source").write_bytes(b"x" * 1000)

    def fails(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(folder, "_reflink", lambda *_: False)
    monkeypatch.setattr(folder, "_stream", fails)
    with pytest.raises(folder.TargetError, match="no space left"):
        copy_file(tmp_path / "source", tmp_path / "target")
    assert _names(tmp_path) == ["source"]


def test_thirteen_gigabytes_in_little_memory(tmp_path: Path) -> None:
    code = """
        import sys
        from pathlib import Path
        from attncompile.core import folder
        folder._reflink = lambda *_: False

        def most():  # not getrusage: a child begins with its parent's maximum there
            lines = Path("/proc/self/status").read_text().splitlines()
            return int(next(x for x in lines if x.startswith("VmHWM:")).split()[1])

        before = most()
        folder.copy_file(Path(sys.argv[1]), Path(sys.argv[2]))
        print(most() - before)
    """
    source, target = tmp_path / "weights", tmp_path / "copy"
    with source.open("wb") as file:
        file.truncate(13 * GIB)
        file.seek(12 * GIB)
        file.write(b"w" * 5_000_000)
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(source), str(target)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(done.stdout) < 64 << 10, "kilobytes"
    assert target.stat().st_size == 13 * GIB
    assert target.stat().st_blocks * 512 < 16 << 20
    with target.open("rb") as file:
        file.seek(12 * GIB + 4_999_999)
        assert file.read(2) == b"w\0"


def test_a_full_disk_is_said_with_the_file_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a file that is new, one that was there, and arrays."""

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def begun(path: Path, *_: object) -> None:
        path.touch()
        full()

    (tmp_path / "old").write_bytes(b"x")
    monkeypatch.setattr(Path, "write_bytes", full)
    for name in ("new", "old"):
        with pytest.raises(TargetError, match=rf"no space left to write {name} \(3 bytes\)") as error:
            write_file(tmp_path / name, b"abc")
        assert "--out" in error.value.hint
    monkeypatch.setattr(np, "savez", begun)
    with pytest.raises(TargetError, match=r"no space left to write maps\.npz"):
        arrays.save(tmp_path / "maps.npz", {"x": np.ones(2)})
    assert _names(tmp_path) == ["old"]
