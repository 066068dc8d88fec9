"""Output files: a folder that appears whole or not at all, and copies that cost neither memory nor, where the file
system can share blocks, disk.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from attncompile.core.errors import AttncompileError, BadArguments, TargetError

MARKERS = ("report.json", "plan.toml", "bundle.json")
"""An existing folder with one of these was written by us and may be replaced."""

_FICLONE = 0x40049409
"""linux/fs.h: share all blocks of one file with another (btrfs, XFS, bcachefs, overlays on them)."""

_CHUNK = 1 << 24


def check_replaceable(out: Path) -> None:
    """Raise ``BadArguments`` unless ``out`` does not exist, is empty, or is a folder that we wrote."""
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        what = "a link" if out.is_symlink() else "a file"
        raise BadArguments(f"cannot write to {out}: it is {what}, not a folder", "name another folder with --out")
    if out.is_dir() and any(out.iterdir()) and not any((out / m).is_file() for m in MARKERS):
        raise BadArguments(
            f"{out} exists, is not empty and was not written by attncompile",
            "name another folder with --out, or empty it",
        )


@contextlib.contextmanager
def atomic_folder(out: Path) -> Iterator[Path]:
    """A new folder beside ``out``, which takes its place when the block ends without an exception.

    Until then ``out`` is as it was; after an exception nothing of the new folder is left. What a run that was killed
    left of its own is removed.

    Raises:
        BadArguments: ``out`` may not be replaced (see ``check_replaceable``), or its parent cannot be written.
    """
    out = Path(os.path.abspath(out))  # noqa: PTH100 - resolve() would follow a link in place of the folder
    check_replaceable(out)
    temporary = out.with_name(f".{out.name}.{secrets.token_hex(4)}.tmp")
    held: int | None = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        held = hold(temporary)
        _remove_abandoned(out)
    except OSError as error:
        raise BadArguments(
            f"cannot write beside {out}: {error.strerror}", "name a folder that can be written with --out"
        ) from None
    try:
        yield temporary
        _put_in_place(temporary, out)
    finally:
        if held is not None:
            os.close(held)
        shutil.rmtree(temporary, ignore_errors=True)


_AGE = 60.0
"""Seconds that an abandoned folder has lain untouched: one that was made this moment may not be held yet."""


def hold(folder: Path) -> int | None:
    """Locks ``folder`` for as long as the descriptor is open, at most as long as this process lives. None where the
    system has no locks for it. Raises ``BlockingIOError`` where somebody else holds it, ``OSError`` where it is none.
    """
    try:
        import fcntl
    except ImportError:  # another system
        return None
    held = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(held)
        if isinstance(error, BlockingIOError):
            raise
        return None
    return held


def _remove_abandoned(out: Path) -> None:
    """Folders that runs for ``out`` worked in when they were killed."""
    name = re.compile(rf"\.{re.escape(out.name)}\.[0-9a-f]{{8}}\.tmp")
    for path in out.parent.iterdir():
        if not name.fullmatch(path.name) or path.is_symlink() or not path.is_dir():
            continue
        with contextlib.suppress(OSError):  # another run may be quicker
            if time.time() - path.stat().st_mtime < _AGE or (held := hold(path)) is None:
                continue
            shutil.rmtree(path, ignore_errors=True)
            os.close(held)


def _put_in_place(temporary: Path, out: Path) -> None:
    check_replaceable(out)  # again: hours may have passed
    # rename() replaces an empty folder, or none, in one step.
    if not out.exists() or not any(out.iterdir()):
        temporary.rename(out)
        return
    old = out.with_name(f".{out.name}.{secrets.token_hex(4)}.old")
    out.rename(old)
    try:
        temporary.rename(out)
    except OSError:
        old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)


def copy_file(source: Path, target: Path) -> str:
    """Copy contents and modification time; returns how: ``reflink`` or ``stream``. Holes of sparse files stay holes.

    ``target`` is complete or is not there: the copy is made under another name and renamed.

    Raises:
        TargetError: the disk is full, or ``target`` cannot be written.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        with source.open("rb") as read, temporary.open("xb") as write:
            how = "reflink" if _reflink(read.fileno(), write.fileno()) else "stream"
            if how == "stream":
                _stream(read.fileno(), write.fileno())
        status = source.stat()
        os.utime(temporary, ns=(status.st_atime_ns, status.st_mtime_ns))
        temporary.replace(target)
    except OSError as error:
        raise cannot_write(error, target, source.stat().st_size) from None
    finally:
        temporary.unlink(missing_ok=True)
    return how


def write_file(target: Path, data: bytes) -> None:
    """Write ``data``; ``target`` holds all of it or what it held before. Raises ``TargetError`` as ``copy_file``."""
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.write_bytes(data)
        temporary.replace(target)
    except OSError as error:
        raise cannot_write(error, target, len(data)) from None
    finally:
        temporary.unlink(missing_ok=True)


def cannot_write(error: OSError, target: Path, size: int | None = None) -> AttncompileError:
    """What to tell the user when writing ``target``, of ``size`` bytes if that is known, ended with ``error``."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        needs = "" if size is None else f" ({size} bytes)"
        return TargetError(f"no space left to write {target.name}{needs}", "free disk space, or use --out elsewhere")
    return TargetError(f"cannot write {target}: {error.strerror or error}", "check the folder's permissions")


def _reflink(read: int, write: int) -> bool:
    try:
        import fcntl

        fcntl.ioctl(write, _FICLONE, read)
    except (ImportError, OSError):  # another system, another file system, or two of them
        return False
    return True


def _stream(read: int, write: int) -> None:
    """Copy the extents that hold data; in the kernel where it can."""
    size = os.fstat(read).st_size
    os.ftruncate(write, size)
    position = 0
    while position < size:
        begin, end = _extent(read, position, size)
        os.lseek(read, begin, os.SEEK_SET)
        os.lseek(write, begin, os.SEEK_SET)
        _copy_range(read, write, end - begin)
        position = end


def _extent(read: int, position: int, size: int) -> tuple[int, int]:
    """The next run of data at or after ``position``; empty at the end if only a hole is left."""
    if not hasattr(os, "SEEK_DATA"):
        return position, size
    try:
        begin = os.lseek(read, position, os.SEEK_DATA)
    except OSError as error:
        if error.errno == errno.ENXIO:  # nothing but a hole
            return size, size
        if error.errno == errno.EINVAL:  # a file system that does not tell
            return position, size
        raise
    return begin, os.lseek(read, begin, os.SEEK_HOLE)


def _copy_range(read: int, write: int, count: int) -> None:
    in_kernel = hasattr(os, "copy_file_range")
    while count > 0:
        if in_kernel:
            try:
                done = os.copy_file_range(read, write, min(count, _CHUNK))
            except OSError as error:
                if error.errno not in (errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM):
                    raise
                in_kernel = False
                continue
        else:
            done = os.write(write, os.read(read, min(count, _CHUNK)))
        if done == 0:
            raise OSError(errno.EIO, "the file became shorter while it was copied")
        count -= done
