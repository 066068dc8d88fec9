"""What the user sees: data on stdout, everything else on stderr. ``NO_COLOR`` is honoured (rich reads it itself)."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as _RichBar
    from rich.progress import TaskID

_FILE_WIDTH = 160
"""Columns when stdout is not a terminal: a table in a log or a pipe should not be cut at 80."""


class Progress(Protocol):
    """How a long run tells where it is. ``total`` is the number of ``advance`` calls to come, 0 if unknown."""

    def stage(self, name: str, total: int = 0) -> None:
        """Begin the next stage; ends the one before it."""
        ...

    def advance(self) -> None:
        """One of the stage's steps is done."""
        ...

    def note(self, text: str) -> None:
        """One line that stays on the screen."""
        ...


class SilentProgress:
    """Says nothing: ``--quiet``, tests, and use as a library."""

    def stage(self, name: str, total: int = 0) -> None:
        """Nothing to show."""

    def advance(self) -> None:
        """Nothing to show."""

    def note(self, text: str) -> None:
        """Nothing to show."""


class LineProgress:
    """One plain line a stage on stderr, for logs and pipes where a moving bar would be noise."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def stage(self, name: str, total: int = 0) -> None:
        """Print the stage's name, and the number of its steps where it is known."""
        self._console.print(f"{name} ({total})" if total else name, markup=False, highlight=False)

    def advance(self) -> None:
        """Steps are not printed."""

    def note(self, text: str) -> None:
        """Print ``text`` below the stage."""
        self._console.print(f"  {text}", markup=False, highlight=False)


class BarProgress:
    """A moving bar on a terminal's stderr."""

    def __init__(self, bar: _RichBar) -> None:
        self._bar = bar
        self._task: TaskID | None = None

    def stage(self, name: str, total: int = 0) -> None:
        """Replace the bar by one for ``name``."""
        self.finish()
        self._task = self._bar.add_task(name, total=total or None)

    def advance(self) -> None:
        """Move the bar by one step."""
        if self._task is not None:
            self._bar.advance(self._task)

    def note(self, text: str) -> None:
        """Print ``text`` above the bar."""
        self._bar.console.print(text, markup=False, highlight=False)

    def finish(self) -> None:
        """Take the current stage's bar off the screen."""
        if self._task is not None:
            self._bar.remove_task(self._task)
            self._task = None


def data_console() -> Console:
    """The console for tables on stdout."""
    from rich.console import Console

    class DataConsole(Console):
        def on_broken_pipe(self) -> None:
            # rich would exit with 1, which says that a gate failed; main() knows what to do.
            raise BrokenPipeError

    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else _FILE_WIDTH
    return DataConsole(file=sys.stdout, width=width)


def log_console() -> Console:
    """The console for messages on stderr."""
    from rich.console import Console

    return Console(file=sys.stderr, soft_wrap=True)


@contextlib.contextmanager
def progress(quiet: bool = False) -> Iterator[Progress]:
    """The progress display that fits: none with ``quiet``, a bar on a terminal, else a line a stage."""
    if quiet:
        yield SilentProgress()
        return
    console = log_console()
    if not console.is_terminal:
        yield LineProgress(console)
        return
    from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as RichBar

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with RichBar(*columns, console=console, transient=True) as bar:
        shown = BarProgress(bar)
        yield shown
        shown.finish()


@contextlib.contextmanager
def stdout_to_stderr() -> Iterator[None]:
    """Inside, whatever a library prints on stdout (from Python or from C++) goes to stderr: stdout is data only."""
    sys.stdout.flush()
    with contextlib.redirect_stdout(sys.stderr):
        try:
            saved = os.dup(1)
        except OSError:  # stdout is closed: nothing to protect
            yield
            return
        try:
            os.dup2(2, 1)
            yield
        finally:
            sys.stderr.flush()
            os.dup2(saved, 1)
            os.close(saved)
