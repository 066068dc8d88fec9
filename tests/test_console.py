"""Progress goes to stderr, and so does whatever a library prints while data is being made."""

from __future__ import annotations

import io
import os
import subprocess

import pytest
from rich.console import Console
from rich.progress import Progress as RichBar

from attncompile import console


def test_lines_where_there_is_no_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    with console.progress() as progress:
        progress.stage("detect", 3)
        progress.advance()
        progress.stage("verify")
        progress.note("[3/4] layers")
    out, err = capfd.readouterr()
    assert out == ""
    assert err.splitlines() == ["detect (3)", "verify", "  [3/4] layers"]


def test_quiet(capfd: pytest.CaptureFixture[str]) -> None:
    with console.progress(quiet=True) as progress:
        progress.stage("detect", 3)
        progress.advance()
        progress.note("x")
    assert capfd.readouterr() == ("", "")


def test_bar_on_a_terminal() -> None:
    out = io.StringIO()
    with RichBar(console=Console(file=out, force_terminal=True, width=100), auto_refresh=False) as bar:
        shown = console.BarProgress(bar)
        shown.advance()  # before any stage: nothing to move
        shown.stage("check sites", 2)
        shown.advance()
        assert [(t.description, t.completed, t.total) for t in bar.tasks] == [("check sites", 1, 2)]
        shown.note("[bold]as it is")
        shown.stage("build")
        assert [(t.description, t.total) for t in bar.tasks] == [("build", None)]
        shown.finish()
        shown.finish()
        assert bar.tasks == []
    assert "[bold]as it is" in out.getvalue()


def test_chatter_goes_to_stderr(capfd: pytest.CaptureFixture[str]) -> None:
    print("before")
    with console.stdout_to_stderr():
        print("python")
        os.write(1, b"native\n")
        subprocess.run(["echo", "child"], check=True)
    print("after")
    out, err = capfd.readouterr()
    assert out.split() == ["before", "after"]
    assert sorted(err.split()) == ["child", "native", "python"]


def test_stdout_comes_back_after_an_error(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="x"), console.stdout_to_stderr():
        raise ValueError("x")
    print("data")
    assert capfd.readouterr().out == "data\n"


def test_width_in_a_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    assert console.data_console().width == 160
    monkeypatch.setenv("COLUMNS", "90")
    assert console.data_console().width == 90


def test_a_closed_reader_is_told_to_the_caller() -> None:
    with pytest.raises(BrokenPipeError):
        console.data_console().on_broken_pipe()
