"""A chapter's parameters turned into runs, and the committed evidence read back. One file a chapter."""

from __future__ import annotations

from armada_lib.plans.baselines import baselines
from armada_lib.plans.common import Plan, cast, played, several
from armada_lib.plans.evidence import Evidence, committed, folder, keep
from armada_lib.plans.looks import Looks, looks
from armada_lib.plans.nlu import NLU_PARAMETERS, nlu
from armada_lib.plans.tuning import tuning

__all__ = [
    "NLU_PARAMETERS", "Evidence", "Looks", "Plan", "baselines", "cast", "committed", "folder", "keep",
    "looks", "nlu", "played", "several", "tuning",
]  # fmt: skip
