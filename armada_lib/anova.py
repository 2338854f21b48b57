"""Analysis of variance, by statsmodels: does a score differ between losses, teachers, or both?"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import pandas as pd


def anova(
    df: pd.DataFrame,
    outcome: str,
    factors: Sequence[str],
    interaction: bool = True,
    blocks: Sequence[str] = (),
) -> pd.DataFrame:
    """One-, two- or three-way, of `outcome` by the columns `factors` (type II).

    By default with the interaction of every two factors, left out where no cell holds two rows.
    `blocks`: columns whose levels may differ in mean and are no factor (randomised blocks).
    Columns: source, df, F, p; blocks have no row. F and p are nan where nothing is left to compare
    with. ValueError for missing columns, no row, or a factor with one level.
    """
    from statsmodels.formula.api import ols
    from statsmodels.stats.anova import anova_lm

    if not 1 <= len(factors) <= 3:
        raise ValueError(f"one to three factors, got {list(factors)}")
    if missing := [c for c in (outcome, *factors, *blocks) if c not in df.columns]:
        raise ValueError(f"missing column(s) {missing}; the table has {list(df.columns)}")
    keys, apart = list("abc"[: len(factors)]), [f"d{i}" for i in range(len(blocks))]
    table = df[[outcome, *factors, *blocks]].dropna().set_axis(["y", *keys, *apart], axis=1)
    for name, column in zip(factors, keys, strict=True):
        if table[column].nunique() < 2:
            raise ValueError(f"{name} has fewer than two levels: {sorted(set(table[column]))}")
    names = {f"C({k})": name for k, name in zip(keys, factors, strict=True)}
    names |= {f"{a}:{b}": f"{names[a]} x {names[b]}" for a, b in itertools.combinations(names, 2)}
    repeated = interaction and table.groupby(keys).size().min() > 1
    formula = f"y ~ ({' + '.join(f'C({k})' for k in keys)}){'**2' if repeated else ''}"
    formula += "".join(f" + C({d})" for d in apart if table[d].nunique() > 1)
    model = ols(formula, table).fit()
    if model.df_resid < 1:
        return pd.DataFrame({"source": list(factors), "df": math.nan, "F": math.nan, "p": math.nan})
    found = anova_lm(model, typ=2).drop([f"C({d})" for d in apart], errors="ignore")
    found = found.rename(index=names | {"Residual": "residual"}).reset_index(names="source")
    return found.rename(columns={"PR(>F)": "p"})[["source", "df", "F", "p"]]


def readings(cells: pd.DataFrame) -> pd.DataFrame:
    """Every way in which the paper's "ANOVA between losses" or "modalities" can be meant.

    `cells`: rows of task, loss, teacher, gain (several a cell: seeds). For each factor with two
    levels or more: one-way over all cells; one-way over the best of the other factor for each task;
    with tasks as a second factor (blocks); and both factors with their interaction.
    Columns: factor, reading, rows, F, p. The best of several is no independent sample: printed
    because the paper's own number is reproduced by it.
    """
    rows, mean = [], cells.groupby(["task", "loss", "teacher"], as_index=False)["gain"].mean()
    factors = [f for f in ("loss", "teacher") if cells[f].nunique() > 1]
    for factor in factors:
        other = "teacher" if factor == "loss" else "loss"
        found = {"all cells": (cells, [factor])}
        if other in factors:
            best = mean.groupby(["task", factor], as_index=False)["gain"].max()
            found[f"best {other} for each task"] = (best, [factor])
        if cells["task"].nunique() > 1:
            found["all cells, tasks as blocks"] = (cells, [factor, "task"])
        if other in factors:
            found[f"all cells, with {other} and interaction"] = (cells, [factor, other])
        for reading, (table, by) in found.items():
            line = (
                anova(table, "gain", by, interaction="task" not in by)
                .set_index("source")
                .loc[factor]
            )
            rows.append({
                "factor": factor, "reading": reading, "rows": len(table),
                "F": line["F"], "p": line["p"],
            })  # fmt: skip
    return pd.DataFrame(rows, columns=["factor", "reading", "rows", "F", "p"])
