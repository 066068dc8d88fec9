"""Verification: exactness of one site, fidelity of the whole model, and the inputs for both.

The face of ``attncompile.verification``.
"""

from __future__ import annotations

from attncompile.verification.cases import Case, cases
from attncompile.verification.facts_reference import FORMS as FACTS_FORMS
from attncompile.verification.facts_reference import FactsReference, ordinary
from attncompile.verification.inputs import (
    InputSpec,
    check_feed,
    input_specs,
    load_inputs,
    make_inputs,
    padded_feeds,
)
from attncompile.verification.judge import CaseCheck, compare_output, compare_patterns
from attncompile.verification.next_token import next_token
from attncompile.verification.reference import largest_intermediate
from attncompile.verification.retype import TO_TWIN, convert_feed, retype, uses_bfloat16
from attncompile.verification.runners import Baseline, RewrittenFailed
from attncompile.verification.site import MEMORY_CAP, SiteCheck, check_site
from attncompile.verification.whole import (
    ModelComparison,
    OutputComparison,
    compare_models,
    exact_budget,
)

__all__ = [
    "FACTS_FORMS",
    "MEMORY_CAP",
    "TO_TWIN",
    "Baseline",
    "Case",
    "CaseCheck",
    "FactsReference",
    "InputSpec",
    "ModelComparison",
    "OutputComparison",
    "RewrittenFailed",
    "SiteCheck",
    "cases",
    "check_feed",
    "check_site",
    "compare_models",
    "compare_output",
    "compare_patterns",
    "convert_feed",
    "exact_budget",
    "input_specs",
    "largest_intermediate",
    "load_inputs",
    "make_inputs",
    "next_token",
    "ordinary",
    "padded_feeds",
    "retype",
    "uses_bfloat16",
]  # fmt: skip
