"""Crossed weights and manifold losses: gains, effects, analyses of variance, verdicts (Figures 3-6).

Every function takes the table of `ablation.frame`, or the `cells` of one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from armada_lib import anova, report, stats
from armada_lib.ablation import BASE, SIGN, gap, scores

GRID = ("alpha", "beta", "gamma")

# -- the grid of weights ------------------------------------------------------------------------


def cells(df: pd.DataFrame, within: Mapping[str, Sequence[Any]]) -> pd.DataFrame:
    """Gains over undistilled of the runs whose weights and manifold loss are among `within`.

    Columns: task, seed, alpha, beta, gamma, gain. Runs that differ in the loss alone are averaged.
    The undistilled student itself is the cell in which all weights are 0, if that is asked for: the
    two are the same computation, and its gain is 0. Only tasks and seeds for which every
    combination was run count, so that no level is the mean of other tasks than its neighbour.
    """
    weights = [w for w in GRID if w in within]
    zero = all(0 in within[w] for w in weights)
    mine = df["method"].eq("armada") | (df["method"].eq("undistilled") & zero)
    mine &= df["factor"].isin(("base", "grid", "manifold", *GRID))
    for w in weights:
        mine &= df[w].isin([float(v) for v in within[w]])
    mine &= df["manifold"].isna() | df["manifold"].isin(within["manifold"])
    key = pd.MultiIndex.from_frame(df.loc[mine, ["title", "seed"]], names=["task", "seed"])
    base = scores(df, "undistilled").reindex(key).to_numpy()
    own = df.loc[mine, ["title", "seed", *GRID]].rename(columns={"title": "task"})
    own["gain"] = df.loc[mine, "score"].to_numpy() - base
    by = ["task", "seed"]
    found = own.dropna().groupby([*by, *GRID], sort=False, as_index=False)["gain"].mean()
    size = found.groupby(by)["gain"].transform("size")
    return found[size == size.max()].reset_index(drop=True)


def effect(grid: pd.DataFrame, factor: str, of: float, to: float) -> pd.Series:
    """What setting `factor` to `of` instead of `to` adds, at equal other weights, averaged over
    these: (task, seed) -> points. Of a table of `cells`.
    """
    others = [w for w in GRID if w != factor]
    wide = grid.pivot_table(index=["task", "seed", *others], columns=factor, values="gain")
    if of == to or of not in wide or to not in wide:
        return pd.Series(
            dtype=float, index=pd.MultiIndex.from_arrays([[], []], names=["task", "seed"])
        )
    return (wide[of] - wide[to]).dropna().groupby(["task", "seed"]).mean()


def effects(
    grid: pd.DataFrame,
    levels: Mapping[str, Sequence[Any]],
    factors: Sequence[str],
    down: bool = False,
) -> dict[str, pd.Series]:
    """The `effect` of each factor's highest level instead of its lowest, or the reverse (`down`), named."""
    ends = {f: sorted((min(levels[f]), max(levels[f])), reverse=not down) for f in factors}
    return {
        f"{SIGN[f]} = {of:g} instead of {to:g}": effect(grid, f, of, to)
        for f, (of, to) in ends.items()
    }


def means(grid: pd.DataFrame, factors: Sequence[str]) -> pd.DataFrame:
    """Mean gain at every level of every factor, over tasks and the other weights.

    Columns factor, level, mean, low, high (t interval over seeds, nan with fewer than three).
    """
    rows = []
    for factor in factors:
        for level, g in grid.groupby(factor):
            values, _ = report.by_seed(g.groupby(["task", "seed"])["gain"].mean())
            s = stats.summary(values)
            low, high = (s.low, s.high) if s.n > 2 else (math.nan, math.nan)
            rows.append(
                {"factor": factor, "level": level, "mean": s.mean, "low": low, "high": high}
            )
    return pd.DataFrame(rows)


def grid_table(grid: pd.DataFrame, factors: Sequence[str]) -> pd.DataFrame:
    """A row a combination of weights: the gain by task, and its mean over tasks with its interval."""
    rows = []
    for key, g in grid.groupby(list(factors)):
        values, _ = report.by_seed(g.set_index(["task", "seed"])["gain"])
        own = {SIGN[f]: f"{v:g}" for f, v in zip(factors, key, strict=True)}
        by_task = {t: gap(x["gain"].to_numpy()) for t, x in g.groupby("task", sort=False)}
        rows.append(own | {"mean over tasks": gap(values.to_numpy())} | by_task)
    return pd.DataFrame(rows).fillna("–")


def analyses(grid: pd.DataFrame, factors: Sequence[str], one_run: bool) -> pd.DataFrame:
    """Every way in which "an ANOVA shows that the weights matter" can be meant, from `cells`.

    All cells as if independent, one factor or all with their interactions; the same with tasks and
    seeds as blocks, since all cells of a task and seed share one undistilled student. `one_run`:
    the tasks are test sets of one run, which then count as one number. A weight with one level is
    left out. Columns reading, source, rows, F, p.
    """
    factors = [f for f in factors if grid[f].nunique() > 1]
    if not factors:
        return pd.DataFrame(columns=["reading", "source", "rows", "F", "p"])
    found: list[tuple[str, pd.DataFrame, list[str], list[str]]] = [
        (f"{SIGN[f]} alone, all cells", grid, [f], []) for f in factors
    ]
    found.append(("with interactions, all cells", grid, list(factors), []))
    blocked = grid.assign(block=grid["task"] + grid["seed"].astype(str))
    found.append(("with interactions, task and seed as blocks", blocked, list(factors), ["block"]))
    if one_run:
        mean = grid.groupby(["seed", *factors], as_index=False)["gain"].mean()
        found.append(("one number a run, seeds as blocks", mean, list(factors), ["seed"]))
    rows = []
    for reading, table, by, blocks in found:
        for line in anova.anova(table, "gain", by, blocks=blocks).itertuples():
            if line.source != "residual":
                source = " × ".join(SIGN[s] for s in line.source.split(" x "))
                rows.append({"reading": reading, "source": source, "rows": len(table),
                             "F": line.F, "p": line.p})  # fmt: skip
    return pd.DataFrame(rows)


# -- manifold losses ----------------------------------------------------------------------------


def losses(df: pd.DataFrame) -> pd.DataFrame:
    """The runs of Figures 4 and 6: undistilled, ARMADA with each loss, the base's control."""
    return df[df["factor"].isin(("base", "manifold"))]


def loss_table(
    gains: pd.DataFrame, printed: pd.DataFrame, said: Mapping[str, str], statistic: str
) -> pd.DataFrame:
    """Gain by loss: as the paper's text says it (`said`), from its table (`printed`), and measured.

    `gains`, `printed`: tables of `report.gain_cells` and `report.printed_cells`. `statistic`: "mean"
    or "median", over cells: tasks, teachers and, of measured ones, seeds.
    """
    own, table = (x.groupby("loss")["gain"] for x in (gains, printed))
    names = [m for m in report.LOSS if m in own.groups]
    return pd.DataFrame({
        "loss": [report.LOSS[m] for m in names],
        "published in the text": [said.get(m, "–") for m in names],
        "published in the table": table.agg(statistic).reindex(names).to_numpy(),
        f"measured {statistic}": own.agg(statistic).reindex(names).to_numpy(),
        "measured cells": own.size().reindex(names).to_numpy(),
    })  # fmt: skip


def by_loss(df: pd.DataFrame) -> dict[str, pd.Series]:
    """Scores of ARMADA at the base, by loss: (task, seed) -> score."""
    other = {m: scores(df, "armada", "manifold", report.LOSS[m]) for m in report.LOSS}
    found = {BASE["manifold"]: scores(df, "armada")} | {m: s for m, s in other.items() if len(s)}
    return {m: found[m] for m in report.LOSS if m in found}


# -- verdicts -----------------------------------------------------------------------------------


def judge(differences: Mapping[str, pd.Series], unit: str = "tasks") -> tuple[str, str]:
    """(outcome, sentence) for differences that a claim says are positive, each (task, seed) -> points.

    Reproduced: each mean over tasks has its whole 95 % interval over seeds above zero. Direction
    agrees: each is above zero. Undecided: one was not run, or has fewer than three seeds.
    """
    parts, sure, positive, seeds = [], True, True, []
    for name, series in differences.items():
        values, tasks = report.by_seed(series) if len(series) else (series, 0)
        seeds.append(len(values))
        if not len(values):
            parts.append(f"{name}: not run")
            continue
        s, by_task = stats.summary(values), series.groupby("task").mean()
        sure &= s.low > 0
        positive &= s.mean > 0
        parts.append(f"{name}: {gap(values.to_numpy())} (mean over {tasks} {unit}; above zero on "
                     f"{int((by_task > 0).sum())} of {len(by_task)})")  # fmt: skip
    text = "In points: " + "; ".join(parts) + "."
    if min(seeds, default=0) < 3:
        return (
            "undecided",
            f"{text} {report.too_few(min(seeds, default=0))}",
        )
    return ("reproduced" if sure else "direction agrees" if positive else "not reproduced"), text


def alike(arms: Mapping[str, pd.Series], margin: float = 1.0) -> tuple[str, str]:
    """(outcome, sentence): do all arms, each (task, seed) -> score, lie within `margin` points?

    By the interval of every two arms' difference: all inside the margin is reproduced; else one that
    leaves out zero is not reproduced, and none undecided, as with fewer than three seeds.
    """
    names, parts, inside, apart, fewest = list(arms), [], True, False, math.inf
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            gain = (arms[first] - arms[second]).dropna()
            values, _ = report.by_seed(gain) if len(gain) else (gain, 0)
            parts.append(f"{report.LOSS.get(first, first)} minus {report.LOSS.get(second, second)}: "
                         f"{gap(values.to_numpy())}")  # fmt: skip
            fewest = min(fewest, len(values))
            if len(values) > 2:
                s = stats.summary(values)
                inside &= -margin < s.low and s.high < margin
                apart |= s.low > 0 or s.high < 0
    text = "In points: " + "; ".join(parts) + "."
    if not parts or fewest < 3:
        return "undecided", f"{text} With fewer than three seeds no interval decides anything."
    return ("reproduced" if inside else "not reproduced" if apart else "undecided"), text
