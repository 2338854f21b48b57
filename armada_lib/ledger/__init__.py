"""Each table, figure, proposition and headline claim of the paper, and what became of it."""

from __future__ import annotations

from armada_lib.ledger.entries import KINDS, STATUSES, Entry, book, read, source
from armada_lib.ledger.judges import Measured
from armada_lib.ledger.rules import RULES, Rule
from armada_lib.ledger.table import (
    counts,
    facts,
    frame,
    measured,
    page,
    show_on_front_page,
    status,
    summary,
    trail,
    write,
)

__all__ = [
    "KINDS", "RULES", "STATUSES", "Entry", "Measured", "Rule", "book", "counts", "facts", "frame",
    "measured", "page", "read", "show_on_front_page", "source", "status", "summary", "trail", "write",
]  # fmt: skip
