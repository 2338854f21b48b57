"""What runs say without their vectors: training loss with and without a learning aligner, and noise.

Figure 9 with Table 15, and Figures 10 to 12. Frames are tidy: task, seed and arm in every row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from armada_lib import gentasks, geometry, report, stats
from armada_lib.results import Result

# -- training loss (Table 15) ----------------------------------------------------------------------


def task_loss(r: Result) -> np.ndarray:
    """The student's task loss, one value a step, without its weight 1 - alpha."""
    if r.spec.alpha == 1:
        raise ValueError(f"{r.spec.label}: at alpha = 1 the student has no task loss")
    curve = np.asarray(r.curves["task"], np.float64)
    return curve[np.isfinite(curve)] / (1 - r.spec.alpha)


def losses(results: Sequence[Result], names: Mapping[str, str]) -> pd.DataFrame:
    """Mean task loss of every run over its steps, and the steps' lag-one autocorrelation."""
    rows = []
    for r in results:
        if r.spec.key in names and r.spec.task not in gentasks.SUITES:
            curve = task_loss(r)
            rows.append({
                "task": report.title(r.spec.task), "seed": r.spec.seed, "arm": names[r.spec.key],
                "mean": float(curve.mean()), "steps": len(curve),
                "autocorrelation": geometry.autocorrelation(curve),
            })  # fmt: skip
    return pd.DataFrame(rows)


def steps(results: Sequence[Result], names: Mapping[str, str], main: str) -> pd.DataFrame:
    """Table 15 as the paper has it: Welch's t over the steps of two runs, arm minus trained ARMADA.

    Each frozen aligner stands against ARMADA with its own loss, every other arm against the main
    loss. Steps of one run are not independent, so that p says less than it seems to (A26).
    """
    rows = []
    curves = {
        (r.spec.task, r.spec.seed, names[r.spec.key]): (task_loss(r), r.spec)
        for r in results if r.spec.key in names and r.spec.task not in gentasks.SUITES
    }  # fmt: skip
    for (task, seed, arm), (curve, s) in curves.items():
        loss = s.manifold if s.method == "frozen_aligner" and s.manifold else main
        trained = curves.get((task, seed, f"ARMADA {report.LOSS[loss]}"))
        if s.method == "armada" or trained is None:
            continue
        t = stats.welch_t(curve, trained[0])
        rows.append({"task": report.title(task), "seed": seed, "arm": arm, "loss": loss, "t": t.t, "p": t.p,
                     "steps": t.n})  # fmt: skip
    return pd.DataFrame(rows, columns=["task", "seed", "arm", "loss", "t", "p", "steps"])


# -- noise (Figures 10 to 12) ----------------------------------------------------------------------


def noise(results: Sequence[Result], main: str) -> pd.DataFrame:
    """Scores by noise level: task, title, seed, arm (method), head, sigma, score.

    Undistilled students and methods with one loss alone stand at sigma 0. Of students that generate
    a row a test set.
    """
    level = {r.spec.key: r.spec.training.noise for r in results}
    df = report.table(r for r in results if r.spec.manifold in (None, main))
    df = df[df["head"].isin(["student", "aligner"])]
    name = {"undistilled": "undistilled", "armada": "ARMADA", **report.CONTROLS}
    return pd.DataFrame({
        "suite": df["suite"], "task": df["title"], "seed": df["seed"], "arm": df["method"].map(name),
        "head": df["head"], "sigma": df["key"].map(level), "score": df["score"],
    }).reset_index(drop=True)  # fmt: skip


def sensitivities(noisy: pd.DataFrame) -> pd.DataFrame:
    """Var(score) / Var(sigma) of every task, arm, head and seed that was run at all levels."""
    rows, levels = [], sorted(noisy["sigma"].unique())
    keys = ["task", "seed", "arm", "head"]
    for values, g in noisy.groupby(keys, sort=False):
        if len(levels) > 1 and sorted(g["sigma"]) == levels:
            score = geometry.sensitivity(g["score"], g["sigma"])
            rows.append(dict(zip(keys, values, strict=True)) | {"sensitivity": score})
    return pd.DataFrame(rows, columns=[*keys, "sensitivity"])


def models(noisy: pd.DataFrame) -> pd.DataFrame:
    """Figure 10: rows of `noise` of students that classify, with a column `model` (arm and head).

    Undistilled students, and the arms that were run at several levels, with both of their heads.
    """
    df = noisy[~noisy["suite"].isin(gentasks.SUITES)]
    several = df.groupby("arm")["sigma"].transform("nunique") > 1
    df = df[several | (df["arm"] == "undistilled")]
    name = np.where(df["arm"] == "undistilled", df["arm"], df["arm"] + ", " + df["head"])
    return df.assign(model=name)


def gains(noisy: pd.DataFrame) -> pd.DataFrame:
    """Figure 12: score minus the undistilled student's of the same seed, of students that generate.

    Columns task (the test set), seed, model (the arm), sigma, gain.
    """
    df = noisy[noisy["suite"].isin(gentasks.SUITES)]
    base = df[df["arm"] == "undistilled"].set_index(["suite", "task", "seed"])["score"]
    own = df[df["arm"] != "undistilled"]
    keys = list(zip(own["suite"], own["task"], own["seed"], strict=True))
    if alone := sorted({k for k in keys if k not in base.index}):
        raise ValueError(f"no undistilled run for (suite, test set, seed) {alone}")
    gain = own["score"].to_numpy() - base.loc[keys].to_numpy() if keys else []
    return own[["task", "seed", "sigma"]].assign(model=own["arm"], gain=gain).reset_index(drop=True)
