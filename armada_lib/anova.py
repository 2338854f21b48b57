"""Analysis of variance, by statsmodels: does a score differ between losses, teachers, or both?"""

from __future__ import annotations

import math
from collections.abc import Sequence

import pandas as pd


def anova(df: pd.DataFrame, outcome: str, factors: Sequence[str]) -> pd.DataFrame:
    """One-way, or two-way with interaction, of `outcome` by the columns `factors` (type II).

    Columns: source, df, F, p. The interaction is left out where no cell holds two rows. F and p are
    nan where nothing is left to compare with. ValueError for missing columns, no row, or a factor
    with one level.
    """
    from statsmodels.formula.api import ols
    from statsmodels.stats.anova import anova_lm

    if not 1 <= len(factors) <= 2:
        raise ValueError(f"one or two factors, got {list(factors)}")
    if missing := [c for c in (outcome, *factors) if c not in df.columns]:
        raise ValueError(f"missing column(s) {missing}; the table has {list(df.columns)}")
    table = df[[outcome, *factors]].dropna().set_axis(["y", *"ab"[: len(factors)]], axis=1)
    for name, column in zip(factors, "ab", strict=False):
        if table[column].nunique() < 2:
            raise ValueError(f"{name} has fewer than two levels: {sorted(set(table[column]))}")
    names = dict(zip(("C(a)", "C(b)"), factors, strict=False)) | {
        "C(a):C(b)": " x ".join(factors),
        "Residual": "residual",
    }
    repeated = len(factors) == 2 and table.groupby(["a", "b"]).size().min() > 1
    formula = "y ~ C(a)" if len(factors) == 1 else f"y ~ C(a) {'*' if repeated else '+'} C(b)"
    model = ols(formula, table).fit()
    if model.df_resid < 1:
        return pd.DataFrame({"source": list(factors), "df": math.nan, "F": math.nan, "p": math.nan})
    found = anova_lm(model, typ=2).rename(index=names).reset_index(names="source")
    return found.rename(columns={"PR(>F)": "p"})[["source", "df", "F", "p"]]
