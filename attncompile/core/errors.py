"""Errors that a user can act on. Every one carries a hint; the CLI prints two lines and never a traceback."""

from __future__ import annotations


class AttncompileError(Exception):
    """Something could not be done. ``exit_code`` is what the CLI returns (2: could not run, 1: a gate failed)."""

    exit_code = 2

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class BadModel(AttncompileError):
    """The input file is not a model that can be compiled (not ONNX, truncated, missing data, invalid graph)."""


class BadArguments(AttncompileError):
    """The command line, a policy file or a plan file asks for something that cannot be."""


class MissingDependency(AttncompileError):
    """An optional package is needed for what was asked."""


class TargetError(AttncompileError):
    """A target refused the model or failed to build it."""


class KernelError(AttncompileError):
    """A kernel could not be compiled, loaded or launched, or a bundle of kernels cannot be read."""


class GateFailed(AttncompileError):
    """The work was done and a check failed: parity, budget, ``--require-sites`` or ``--strict``."""

    exit_code = 1


class Unsupported(AttncompileError):
    """Raised deep inside a matcher or a mechanism for a case it does not handle. It becomes a ``Verdict``;
    every other exception is a bug and propagates.
    """

    def __init__(self, code: str, reason: str, hint: str = "") -> None:
        super().__init__(reason, hint)
        self.code = code
