"""Looks inside runs: what each head knows, whether heads agree, gradients, the choice of beta.

Every function takes the frame that `report.table` makes, but `gradients`, which takes Results.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import pandas as pd

from armada_lib import stats, tasks
from armada_lib.report import LOSS, arms, table
from armada_lib.results import Result, fields

LABEL = {"task": "task", "aux_task": "aux. task", "soft": "matching", "aux_soft": "aux. matching",
         "manifold": "manifold"}  # fmt: skip
PUBLISHED_TEACHER = {"sd14": "stable-diffusion-v1-4", "midjourney": "midjourney"}


def heads(df: pd.DataFrame, six: pd.DataFrame, ten: pd.DataFrame, teacher: str) -> pd.DataFrame:
    """Tables 6 and 10: each head's score by task, published and measured (mean over losses, seeds).

    The aligner's heads and the student's auxiliary head, of the runs of method `armada` in the
    paper's reading at the usual beta.
    """
    df = df[(df["method"] == "armada") & (df["reading"] == "paper") & df["usual_beta"]]
    name = PUBLISHED_TEACHER.get(teacher, teacher)
    aligner = six[six["teacher"] == name].set_index("task")["printed"].to_dict()
    aligner_aux = (
        ten[(ten["model"] == "TS-Aligner") & (ten["teacher"] == name)]
        .set_index("task")["printed"]
        .to_dict()
    )
    rows = []
    for task, part in df.groupby("task", sort=False):
        title = tasks.TASKS[str(task)].title
        mean = part.groupby("head")["score"].mean()
        rows.append({
            "task": title,
            "published aligner": aligner.get(title, "–"), "published aligner aux.": aligner_aux.get(title, "–"),
            **{f"measured {label}": mean.get(h, math.nan) for label, h in
               (("aligner", "aligner"), ("aligner aux.", "aligner_aux"), ("student", "student"),
                ("student aux.", "student_aux"))},
        })  # fmt: skip
    return pd.DataFrame(rows)


def head_correlation(df: pd.DataFrame, first: str, second: str) -> dict[str, Any]:
    """Spearman between two heads over the cells (loss, task), plain and with task levels removed.

    The plain value mostly says that tasks differ in level; the centred one asks whether the heads
    agree within a task.
    """
    df = df[(df["method"] == "armada") & df["head"].isin([first, second]) & df["usual_beta"]]
    # no loss of the student reaches the aligner: its runs with three losses are one run
    cells = ["task", "reading"] if first == "aligner" else ["task", "manifold", "reading"]
    wide = df.pivot_table(index=cells, columns="head", values="score").dropna()
    if len(wide) < 3 or first not in wide or second not in wide:
        return {
            "pairs": len(wide),
            "plain": math.nan,
            "centred": math.nan,
            "interval": (math.nan, math.nan),
        }
    plain = stats.spearman(wide[first], wide[second])
    centred = wide - wide.groupby("task").transform("mean")
    spread = min(centred[first].std(), centred[second].std())
    within = stats.spearman(centred[first], centred[second]).rho if spread > 0 else math.nan
    return {
        "pairs": len(wide),
        "plain": plain.rho,
        "centred": within,
        "interval": (plain.low, plain.high),
    }


def correlations(
    found: dict[str, dict[str, Any]], published: dict[str, str] | None = None
) -> pd.DataFrame:
    """`head_correlation` of several models as a table, beside what the paper prints of them."""
    rows = []
    for name, r in found.items():
        low, high = r["interval"]
        rows.append({
            "model": name, "published": (published or {}).get(name, "–"), "measured plain": r["plain"],
            "95 % interval": "–" if math.isnan(low) else f"[{low:.2f}, {high:.2f}]".replace("-", "−"),
            "measured centred": r["centred"], "cells": r["pairs"],
        })  # fmt: skip
    return pd.DataFrame(rows)


def gradients(results: Iterable[Result | dict[str, Any]]) -> pd.DataFrame:
    """Gradient norm of each term on the encoder by arm, first and last epoch, and the scatter.

    `results`: Results, or records of a file of runs (`results.read`).
    """
    rows = []
    for r in results:
        probes = fields(r)["facts"]["diagnostics"]["gradients"]
        name = arms(table([r]))["arm"].iloc[0]
        for when, probe in (("first", probes[0]), ("last", probes[-1])):
            terms = {LABEL[k]: v for k, v in probe["gradient"].items()}
            rows.append(
                {
                    "trained as": name,
                    "epoch": when,
                    **terms,
                    "scatter": probe["scatter"]["hidden"],
                }
            )
    df = pd.DataFrame(rows)
    columns = [c for c in [*LABEL.values(), "scatter"] if c in df]
    return df.groupby(["trained as", "epoch"], sort=False)[columns].mean().reset_index()


def beta_choice(df: pd.DataFrame) -> pd.DataFrame:
    """Score by loss and beta, a column a task, and the mean over tasks; collapsed runs are marked.

    One beta serves all losses, as in the paper: the last rows average over them, and the higher
    mean is the choice.
    """
    found = arms(df)
    rows = []
    for (loss, beta), g in found.groupby(["manifold", "beta"], sort=False):
        cells = {
            r.title: f"{r.score:.1f}" + (" (collapsed)" if r.collapsed else "")
            for r in g.itertuples()
        }
        rows.append(
            {
                "loss": LOSS[loss],
                "beta": f"{beta:g}",
                **cells,
                "mean": g["score"].mean(),
                "chosen": "",
            }
        )
    overall = found.groupby("beta")["score"].mean()
    for beta, mean in overall.items():
        chosen = "yes" if mean == overall.max() else ""
        rows.append({"loss": "all three", "beta": f"{beta:g}", "mean": mean, "chosen": chosen})
    return pd.DataFrame(rows).fillna("–")
