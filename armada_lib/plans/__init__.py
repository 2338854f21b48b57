"""A chapter's parameters turned into runs, and the committed evidence read back. One file a chapter."""

from __future__ import annotations

from armada_lib.plans.ablation import ABLATION_PARAMETERS, ablated, ablation
from armada_lib.plans.analysis import ANALYSIS_PARAMETERS, analysed, analysis, keep_analysis
from armada_lib.plans.baselines import baselines
from armada_lib.plans.common import Plan, cast, played, several
from armada_lib.plans.evidence import Evidence, committed, folder, keep
from armada_lib.plans.looks import Looks, looks
from armada_lib.plans.method import METHOD_PARAMETERS, Pairs, method
from armada_lib.plans.multimodal import multimodal, posters
from armada_lib.plans.nlu import NLU_PARAMETERS, nlu
from armada_lib.plans.own import YourOwn, your_own
from armada_lib.plans.study import Studied, studied
from armada_lib.plans.tuning import tuning

__all__ = [
    "ABLATION_PARAMETERS", "ANALYSIS_PARAMETERS", "METHOD_PARAMETERS", "NLU_PARAMETERS",
    "Evidence", "Looks", "Pairs", "Plan", "Studied", "YourOwn", "ablated",
    "ablation", "analysed", "analysis", "baselines", "cast", "committed", "folder", "keep", "keep_analysis",
    "looks", "method", "multimodal", "nlu", "played", "posters", "several", "studied", "tuning", "your_own",
]  # fmt: skip
