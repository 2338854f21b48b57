"""Baselines side by side: what the paper quotes, what was run again, at which cost, in which rank."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import rankdata, studentized_range

from armada_lib import report, stats
from armada_lib.results import Result, fields

NAMES = {"armada": "ARMADA", **report.BASELINES, **report.CONTROLS}


def scoreboard(df: pd.DataFrame, published: pd.DataFrame) -> pd.DataFrame:
    """A row a method as quoted in the paper and one as run here, a column a task, averages last.

    Three kinds of `row`: published (quoted by the paper), measured again (the same methods), and
    measured, ARMADA, with its controls. `df`: the frame of `report.table`; `published`: Table 7 or
    8. Published rows hold what the paper prints for the tasks of this run; it does not say on which
    split. The kinds never mix, and no mean leaves out a task.
    """
    found = report.arms(df)
    titles = list(dict.fromkeys(found["title"]))
    rows = []
    for name, part in published.groupby("method", sort=False):
        values = part.groupby("task")["value"].mean()
        printed = {t: part.loc[part["task"] == t, "printed"].iloc[0] for t in titles if t in values}
        if printed:
            shared = float(values[list(printed)].mean())
            rows.append(
                {"method": name, "row": "published, quoted", **printed, "mean": f"{shared:.1f}"}
            )
    for name in dict.fromkeys(found["arm"]):
        part = found[found["arm"] == name]
        own = part["method"].iloc[0]
        again = own in report.BASELINES or own == "undistilled"
        row: dict[str, Any] = {
            "method": name,
            "row": "measured again" if again else "measured, ARMADA",
        }
        for t, g in part.groupby("title", sort=False):
            s = stats.summary(g["score"])
            spread = f" ± {s.sd:.1f}" if s.n > 1 else ""
            row[str(t)] = f"{s.mean:.1f}".replace("-", "−") + spread
        by_task = part.groupby("title")["score"].mean()
        if len(by_task) == len(titles):  # means over other tasks would not be alike
            row["mean"] = f"{by_task.mean():.1f}".replace("-", "−")
        rows.append(row)
    return pd.DataFrame(rows)[["method", "row", *titles, "mean"]].fillna("–")


def choices(tried: Iterable[Result | dict[str, Any]], settings: Sequence[str]) -> pd.DataFrame:
    """What a grid came to: a row a method, a column a point with its mean score, and the best.

    `tried`: one run a method, task and point of the grid, or their committed records; `settings`: the
    fields that the grid varies.
    """
    rows = []
    for r in tried:
        spec, scores = (fields(r)[part] for part in ("spec", "scores"))
        name = NAMES.get(spec.method, spec.method)
        if spec.method == "armada":
            name += f" {report.LOSS.get(spec.manifold or '', '')}"
        point = ", ".join(f"{f.replace('_', ' ')} {getattr(spec.training, f):g}" for f in settings)
        rows.append({"method": name, "point": point, "score": scores["student"]})
    df = pd.DataFrame(rows)
    table = df.groupby(["method", "point"], sort=False)["score"].mean().unstack()
    table = table.reindex(index=df["method"].unique(), columns=df["point"].unique())
    return table.assign(chosen=table.idxmax(axis=1)).rename_axis(columns=None).reset_index()


def _blocks(df: pd.DataFrame) -> pd.DataFrame:
    """Scores, a row a (task, seed) that every arm has, a column an arm."""
    table = report.arms(df).pivot_table(index=["title", "seed"], columns="arm", values="score")
    return table.dropna()


def ranks(df: pd.DataFrame, draws: int = 2000, seed: int = 0) -> pd.DataFrame:
    """Average rank of every arm (1 = best) over tasks and seeds that all arms share.

    Columns: arm, rank, low, high (95 %, bootstrap over tasks, and over the seeds within each), n
    (tasks), critical: the difference from which two average ranks differ by Nemenyi's test at 5 %
    (Demsar, 2006), tasks being the independent units. ValueError if no task has all arms.
    """
    table = _blocks(df)
    if table.empty:
        raise ValueError("no task was run by every arm with one seed; nothing can be ranked")
    names = list(table.columns)
    per_task = [np.apply_along_axis(rankdata, 1, -g.to_numpy()) for _, g in table.groupby("title")]
    means = np.array([r.mean(0) for r in per_task])
    rng, drawn = np.random.default_rng(seed), []
    for _ in range(draws):
        tasks = rng.integers(len(per_task), size=len(per_task))
        drawn.append(np.mean([
            per_task[t][rng.integers(len(per_task[t]), size=len(per_task[t]))].mean(0) for t in tasks
        ], axis=0))  # fmt: skip
    low, high = np.percentile(drawn, [2.5, 97.5], axis=0)
    k, n = len(names), len(per_task)
    critical = (
        studentized_range.ppf(0.95, k, math.inf) / math.sqrt(2) * math.sqrt(k * (k + 1) / 6 / n)
    )
    out = pd.DataFrame({"arm": names, "rank": means.mean(0), "low": low, "high": high,
                        "n": n, "critical": critical})  # fmt: skip
    return out.sort_values("rank", ignore_index=True)


def rank_table(ranked: pd.DataFrame) -> pd.DataFrame:
    """`ranks` as a page shows it: the interval in one column."""
    ends = zip(ranked["low"], ranked["high"], strict=True)
    return pd.DataFrame({
        "trained as": ranked["arm"], "average rank": ranked["rank"],
        "95 % interval": [f"[{low:.1f}, {high:.1f}]" for low, high in ends],
        "tasks": ranked["n"], "critical difference": ranked["critical"],
    })  # fmt: skip


COST_HEADS = {
    "added": "added parameters", "share": "share, %", "step": "step, × undistilled",
    "memory": "memory, MB", "stage_epochs": "stage, epochs", "stage_time": "stage, × fine-tuning",
}  # fmt: skip


def costs(results: Iterable[Result | dict[str, Any]]) -> pd.DataFrame:
    """What a method costs besides the student: means over its runs, a row a method.

    Columns: method; added parameters that are trained (heads, aligner, a second network), and their
    share of the student's own in %; seconds a step, as a multiple of the undistilled student's on
    the same task; peak memory in MB above what the process held before the run; runs. Where some
    methods have a stage of pre-training, which is made once a task: its epochs, and its seconds as
    a multiple of the fine-tuning of one run; added parameters and memory are then the larger of
    both.
    """
    rows = []
    for r in results:
        spec, facts = (fields(r)[part] for part in ("spec", "facts"))
        if not facts.get("steps"):
            continue
        stage = facts.get("stage", {})
        added = facts["branch_parameters"] + facts.get("method_parameters", 0)
        added = max(added, stage.get("parameters", 0))
        peaks = [m for m in (facts.get("peak_memory"), stage.get("peak_memory")) if m is not None]
        rows.append({
            "method": NAMES.get(spec.method, spec.method),
            "task": spec.task,
            "added": added, "share": 100 * added / facts["student_parameters"],
            "step": facts["train_seconds"] / facts["steps"], "memory": max(peaks, default=math.nan),
            "stage_epochs": stage.get("epochs", 0),
            "stage_time": stage.get("train_seconds", 0.0) / max(facts["train_seconds"], 1e-9),
        })  # fmt: skip
    table = pd.DataFrame(rows)
    base = table[table["method"] == "undistilled"].groupby("task")["step"].median()
    table["step"] = table["step"] / table["task"].map(base)
    found = table.groupby("method", sort=False).agg(
        added=("added", "mean"), share=("share", "mean"), step=("step", "median"),
        memory=("memory", "median"),
        stage_epochs=("stage_epochs", "mean"), stage_time=("stage_time", "median"),
        runs=("task", "size"),
    )  # fmt: skip
    if not found["stage_epochs"].any():
        found = found.drop(columns=["stage_epochs", "stage_time"])
    return found.reset_index()


def equally_effective(
    df: pd.DataFrame, arm: str, others: Iterable[str], margin: float = 1.0
) -> tuple[str, str]:
    """(outcome, sentence): is `arm` within `margin` points of the mean of the other arms?

    By the interval of its difference averaged over tasks, one number a seed: inside the margin is
    equally effective, outside it is not; three seeds at least, else undecided.
    """
    table = _blocks(df)
    others = [o for o in others if o in table]
    if arm not in table or not others:
        return "undecided", f"{arm} and the baselines were not run on the same tasks and seeds."
    gap = (table[arm] - table[others].mean(axis=1)).groupby("seed").mean()
    s = stats.summary(gap)
    text = f"{arm} minus the mean of {len(others)} baselines, in points: {s.mean:+.1f}".replace(
        "-", "−"
    )
    if s.n < 3:
        return "undecided", f"{text}. {report.too_few(s.n)}"
    text += f"{report.interval(s.low, s.high)}, {s.n} seeds."
    if -margin < s.low and s.high < margin:
        return "reproduced", text
    return ("not reproduced" if s.high < -margin or s.low > margin else "undecided"), text


def verdict(df: pd.DataFrame, table: pd.DataFrame) -> tuple[str, str]:
    """`equally_effective` of ARMADA beside all baselines that were run, and what it trains for that.

    `table`: the costs of the same runs. The first arm of ARMADA counts, should there be several.
    """
    names = list(report.arms(df)["arm"].unique())
    own = next((a for a in names if a.startswith("ARMADA")), "ARMADA")
    others = [a for a in names if a in report.BASELINES.values()]
    outcome, text = equally_effective(df, own, others)
    light = table[table["method"] == "ARMADA"]
    for added, share in zip(light["added"], light["share"], strict=True):
        text += f" It trains {added / 1e6:.2f} million parameters besides the student's, {share:.1f} % of those."
    return outcome, text
