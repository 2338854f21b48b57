"""Runs on several labels an example by both their metrics: tables, gains and heads.

Micro F1 counts all decisions alike, macro F1 all labels: the one is ruled by frequent labels, the
other by rare ones.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pandas as pd

from armada_lib import report
from armada_lib.results import Result

METRICS = {"micro_f1": "micro F1", "macro_f1": "macro F1"}


def frames(found: Iterable[Result | dict[str, Any]]) -> dict[str, pd.DataFrame]:
    """`report.table` of these runs or records by each metric, under the metric's name in words."""
    found = list(found)
    return {said: report.table(found, metric) for metric, said in METRICS.items()}


def both(by_metric: dict[str, pd.DataFrame], published: pd.DataFrame) -> pd.DataFrame:
    """`report.scores` by each metric, one below the other; `published`: Table 9."""
    parts = []
    for metric, said in METRICS.items():
        printed = published[published["metric"] == metric]
        part = report.scores(by_metric[said], printed).drop(columns="task")
        parts.append(part.assign(metric=said))
    out = pd.concat(parts, ignore_index=True)
    return out[["metric", *(c for c in out if c != "metric")]]


def gains(by_metric: dict[str, pd.DataFrame]) -> tuple[pd.DataFrame, list[str]]:
    """(frame for `figures.gains` with a metric in the place of a task, names of the controls)."""
    parts = [report.arms(df).assign(task=said) for said, df in by_metric.items()]
    out = pd.concat(parts, ignore_index=True)
    out["method"] = out["arm"]
    return out, sorted(set(out.loc[out["control"], "arm"]))


def heads(by_metric: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """Scores of every head of the ARMADA runs, mean over losses and seeds: a column a metric."""
    names = {"student": "student", "student_aux": "student, auxiliary",
             "aligner": "aligner", "aligner_aux": "aligner, auxiliary"}  # fmt: skip
    mean = {
        f"measured {said}": df[df["method"] == "armada"].groupby("head")["score"].mean()
        for said, df in by_metric.items()
    }
    out = pd.DataFrame(mean).reindex(
        [h for h in names if h in set(next(iter(mean.values())).index)]
    )
    return out.rename(index=names).rename_axis("head").reset_index()
