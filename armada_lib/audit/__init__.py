"""The paper's claims recomputed from its own printed numbers. Nothing here is measured by training."""

from __future__ import annotations

from armada_lib.audit.numbers import (
    attainability,
    attainable,
    best_of,
    seed_spread,
    selection,
    splits,
)
from armada_lib.audit.plots import selected, statuses
from armada_lib.audit.procedures import (
    PROCEDURES,
    claims,
    counts,
    detail,
    excess,
    one_rule_for_all,
    overview,
    printed,
    readings,
    rules_side_by_side,
    said,
    status_of,
    tests,
    values,
)
from armada_lib.audit.reading import COMPUTED, STATED, Reading, status

__all__ = [
    "COMPUTED", "PROCEDURES", "STATED", "Reading", "attainability", "attainable", "best_of", "claims",
    "counts", "detail", "excess", "one_rule_for_all", "overview", "printed", "readings",
    "rules_side_by_side", "said", "seed_spread",
    "selected", "selection", "splits", "status", "status_of", "statuses", "tests", "values",
]  # fmt: skip
