"""Launches that TensorRT would make, in Triton's interpreter instead of on a GPU, in a process of its own:
``python -m tests.kernels.tensorrt.interpreted`` reads a JSON list of ``Job``s and prints what is wrong with each.

Triton decides when it is imported whether it interprets, so that no other test may have imported it.
"""

from __future__ import annotations

import json
import os
import sys
import warnings

os.environ["TRITON_INTERPRET"] = "1"

from attncompile.kernels import build, calls
from attncompile.plugins import kernels
from tests.conformance import launch
from tests.conformance.interpret import mend
from tests.kernels.tensorrt import results
from tests.kernels.tensorrt.interpreted_job import Job
from tests.kernels.tensorrt.samples import SAMPLES


def interpret(job: Job) -> str:
    """What is wrong with the outputs; empty if nothing is. The kernel's parameters get the launch's by their places."""
    sample = next(s for s in (*SAMPLES, *results.LARGE) if s.name == job.sample)
    call = calls.find(sample.model(), kernels(), "float32")[0].call
    assert call is not None
    programs = kernels()[call.op].programs(build.general(kernels(), call), 80)
    made = next(p for p in programs if p.tactic == job.tactic)
    given = results.inputs(sample, call, job.sizes)
    got = {name: results.poisoned(kind, shape) for name, (kind, shape) in job.outputs.items()}
    values = [*(given[n] for n in job.inputs), *job.numbers, *got.values()]
    launch.call(made, {a.name: x for a, x in zip(made.arguments, values, strict=True)}, job.grid)
    return "; ".join(results.problems(sample, call, job.sizes, given, got))


if __name__ == "__main__":
    mend()
    warnings.simplefilter("ignore")
    for job in (Job(**x) for x in json.load(sys.stdin)):
        print(json.dumps({**job.to_json(), "wrong": interpret(job)}), flush=True)
