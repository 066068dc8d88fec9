"""Processes that answer requests: in order, each with its own answer, and ended by the first that fails."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from attncompile.core.processes import ProcessDied, Processes

WORK = """
import os, sys
print("said while it is imported")

def work(request):
    print("said between the answers", flush=True)
    if request == "die":
        sys.stderr.write("out of luck")
        sys.stderr.flush()
        os._exit(7)
    return os.getpid(), os.environ.get("OF_THE_PROCESS"), request
"""


@pytest.fixture
def function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    (tmp_path / "some_work.py").write_text(WORK)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "some_work:work"
    sys.modules.pop("some_work", None)


def test_answers_in_order(function: str, capfd: pytest.CaptureFixture[str]) -> None:
    seen: list[int] = []
    with Processes(function, 2, {"OF_THE_PROCESS": "one"}) as processes:
        first = processes.map(list(range(7)), lambda answer: seen.append(answer[2]) or answer)
        again = processes.map([8], lambda answer: answer[0])
    assert [request for _, _, request in first] == list(range(7)) and sorted(seen) == list(range(7))
    assert {told for _, told, _ in first} == {"one"} and len({pid for pid, _, _ in first}) <= 2
    assert again[0] in {pid for pid, _, _ in first}, "processes are kept between calls"
    assert capfd.readouterr() == ("", "")


def test_nothing_to_do_starts_nothing() -> None:
    with Processes("no_such_module:work", 2) as processes:
        assert processes.map([]) == []


def test_one_that_dies(function: str) -> None:
    luck = pytest.raises(ProcessDied, match=r"ended with 7: .*out of luck")
    with Processes(function, 2) as processes, luck as caught:
        processes.map(["fine", "die"])
    assert (caught.value.request, caught.value.code) == ("die", 7) and caught.value.said.endswith("out of luck")


def test_one_that_died_meanwhile(function: str) -> None:
    """It is noticed by the next request, and closing it says nothing else."""
    with pytest.raises(ProcessDied), Processes(function, 1) as processes:
        ((pid, _, _),) = processes.map(["fine"])
        os.kill(pid, signal.SIGKILL)
        processes.map([b" " * 200_000])


def test_a_function_that_is_not_there() -> None:
    with Processes("no_such_module:work", 1) as processes, pytest.raises(ProcessDied, match="no_such_module"):
        processes.map([1])


def test_what_is_made_of_an_answer_may_end_the_call(function: str) -> None:
    def each(answer: tuple[int, str | None, int]) -> int:
        if answer[2] == 1:
            raise ValueError("no more")
        return answer[2]

    with Processes(function, 1) as processes, pytest.raises(ValueError, match="no more"):
        processes.map([0, 1, 2], each)
