"""The answer to "can this be done?": never a bare bool, always with a reason."""

from __future__ import annotations

from dataclasses import dataclass

from attncompile.core.errors import Unsupported


@dataclass(frozen=True, slots=True)
class Verdict:
    """``ok`` with a machine-readable ``code`` and a ``reason`` for people; ``hint`` says what would change it."""

    ok: bool
    code: str
    reason: str
    hint: str = ""

    def __bool__(self) -> bool:
        raise TypeError("use Verdict.ok: a Verdict carries a reason and is never a bool")

    @staticmethod
    def yes(reason: str = "", code: str = "ok") -> Verdict:
        return Verdict(True, code, reason)

    @staticmethod
    def no(code: str, reason: str, hint: str = "") -> Verdict:
        return Verdict(False, code, reason, hint)

    @staticmethod
    def of(error: Unsupported) -> Verdict:
        return Verdict(False, error.code, error.message, error.hint)
