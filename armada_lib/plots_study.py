"""The forest plot of a study: a row a contrast, a panel a task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from armada_lib.figures import CONTROL_MARKERS, METHOD_MARKERS, WIDTH, safe_colours, style

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

COLUMNS = ("group", "contrast", "title", "mean", "low", "high", "values", "bound")


def forest(df: pd.DataFrame, unit: str = "points", order: Sequence[str] = ()) -> Figure:
    """Means, intervals and every seed of contrasts; a panel a `title`, in the order of the table.

    `df` has a row a contrast and panel: group, contrast, title, mean, low, high, values (one
    difference a seed), bound (nan: none; else shaded, from -bound to bound). Groups are set apart and
    differ in colour and marker; with `order`, the names of all groups, each keeps its own in figures
    that show a part of them. Raises ValueError for a table without rows or columns.
    """
    if missing := [c for c in COLUMNS if c not in df]:
        raise ValueError(f"missing column(s) {missing}; the table has {list(df.columns)}")
    if df.empty:
        raise ValueError("the table has no rows")
    style()
    import seaborn as sns
    from matplotlib.figure import Figure

    lines = list(dict.fromkeys(zip(df["group"], df["contrast"], strict=True)))
    groups, panels = list(dict.fromkeys(df["group"])), list(dict.fromkeys(df["title"]))
    known = [*order, *(g for g in groups if g not in order)]
    place, y = {}, 0.0
    heads = {}
    for group in groups:
        heads[group] = y
        for line in (x for x in lines if x[0] == group):
            y += 1
            place[line] = y
        y += 1.4  # room for the name of the next group
    figure = Figure(figsize=(WIDTH, 1.0 + 0.24 * y), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    colours = safe_colours()
    markers = METHOD_MARKERS + CONTROL_MARKERS
    for ax, title in zip(axes, panels, strict=True):
        rows = df[df["title"] == title]
        if not np.isnan(bound := float(rows["bound"].iloc[0])):
            ax.axvspan(-bound, bound, color="0.93", zorder=0)
        ax.axvline(0, color="black", linewidth=1, zorder=1)
        for r in rows.itertuples():
            i, at = known.index(r.group), place[r.group, r.contrast]
            look: dict[str, Any] = {"color": colours[i % len(colours)]}
            ax.plot(r.values, [at + 0.27] * len(r.values), ".", **look, markersize=4, alpha=0.7,
                    markeredgewidth=0)  # fmt: skip
            ax.plot([r.low, r.high], [at, at], **look, linewidth=1.6)
            ax.plot(r.mean, at, markers[i % len(markers)], **look, markersize=6)
        ax.set(title=title, xlabel=unit)
        ax.grid(axis="x", color="0.9", linewidth=0.8)
    axes[0].set_yticks(list(place.values()), [c for _, c in place])
    axes[0].set_ylim(y - 1.0, -0.7)  # the first contrast on top
    for group, at in heads.items():
        axes[0].annotate(group, (0, at), xycoords=("axes fraction", "data"), xytext=(-4, 0),
                         textcoords="offset points", ha="right", va="center",
                         fontweight="bold", annotation_clip=False)  # fmt: skip
    sns.despine(figure, left=True)
    return figure
