"""Figures of the chapter on ablations: main effects with their raw points, and one change a row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from armada_lib.figures import CONTROL_MARKERS, METHOD_MARKERS, WIDTH, safe_colours, style
from armada_lib.stats import summary

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


def main_effects(
    cells: pd.DataFrame, means: pd.DataFrame, factors: Mapping[str, str], unit: str = "points"
) -> Figure:
    """A panel a factor: every run's gain by level, a mark a task, and the mean with its interval.

    `cells`: rows of task, gain and a column a factor. `means`: rows of factor, level, mean, low,
    high (nan: no interval). `factors`: the panels' titles by column. ValueError for a factor that
    the tables do not have.
    """
    if missing := [f for f in factors if f not in cells or f not in set(means["factor"])]:
        raise ValueError(f"no column or no means for {missing}; the table has {list(cells)}")
    style()
    import seaborn as sns
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, 4.0), layout="constrained")
    axes = figure.subplots(1, len(factors), sharey=True, squeeze=False)[0]
    tasks, colours = list(dict.fromkeys(cells["task"])), safe_colours()
    for ax, (factor, title) in zip(axes, factors.items(), strict=True):
        levels = sorted(set(cells[factor]))
        for i, task in enumerate(tasks):
            look = {
                "color": colours[i % len(colours)],
                "marker": METHOD_MARKERS[i % len(METHOD_MARKERS)],
            }
            for x, level in enumerate(levels):
                y = cells.loc[(cells["task"] == task) & (cells[factor] == level), "gain"].to_numpy()
                # a column a task, spread a little, so that no point hides another
                at = x + 0.6 * ((i + 0.5) / len(tasks) - 0.5) + _spread(len(y), 0.3 / len(tasks))
                ax.plot(at, y, **look, linestyle="none", markersize=4.5, alpha=0.7,
                        markeredgewidth=0, label=task if ax is axes[0] and x == 0 else None)  # fmt: skip
        for x, level in enumerate(levels):
            m = means[(means["factor"] == factor) & (means["level"] == level)].iloc[0]
            ax.plot([x - 0.4, x + 0.4], [m["mean"]] * 2, color="black", linewidth=2)
            if not np.isnan(m["low"]):
                ax.plot([x + 0.4] * 2, [m["low"], m["high"]], color="black", linewidth=1.6)
        ax.axhline(0, color="0.5", linewidth=1, zorder=0)
        ax.set(title=title, xlim=(-0.6, len(levels) - 0.4))
        ax.set_xticks(range(len(levels)), [f"{level:g}" for level in levels])
    axes[0].set_ylabel(f"gain over undistilled ({unit})")
    figure.legend(loc="outside upper left", ncols=min(6, len(tasks)), frameon=False)
    sns.despine(figure)
    return figure


def _spread(n: int, width: float) -> np.ndarray:
    return np.linspace(-width / 2, width / 2, n) if n > 1 else np.zeros(n)


def one_factor(
    df: pd.DataFrame, names: Mapping[tuple[str, str], str], others: Mapping[str, str]
) -> Figure:
    """A row a change: differences in points, a small mark a seed, the mean, its interval.

    `df`: rows of factor, level, other, seed, gain. `names`: the rows' names by (factor, level), in
    order. `others`: what the differences are with, by entry of `other`: the first is filled, the
    rest hollow. Intervals from three seeds on. ValueError if no row is left.
    """
    style()
    from matplotlib.figure import Figure

    known = np.array([k in names for k in zip(df["factor"], df["level"], strict=True)], dtype=bool)
    df = df[df["other"].isin(others) & known]
    if df.empty:
        raise ValueError(f"no difference for any of {list(names.values())}")
    figure = Figure(figsize=(WIDTH, 1.4 + 0.42 * len(names)), layout="constrained")
    ax, colours = figure.subplots(), safe_colours()
    for j, (other, said) in enumerate(others.items()):
        colour = colours[0] if j == 0 else "0.35"
        look: dict[str, Any] = {"color": colour, "linestyle": "none",
                "marker": METHOD_MARKERS[0] if j == 0 else CONTROL_MARKERS[j - 1]}  # fmt: skip
        fill = colour if j == 0 else "white"
        for y, key in enumerate(names):
            own = df[(df["other"] == other) & (df["factor"] == key[0]) & (df["level"] == key[1])]
            x, row = own["gain"].to_numpy(), y + 0.5 * ((j + 0.5) / len(others) - 0.5)
            if not len(x):
                continue
            s = summary(x)
            if s.n > 2:
                ax.plot([s.low, s.high], [row, row], color=colour, linewidth=1.6)
            if s.n > 1:
                ax.plot(x, [row + 0.1] * s.n, **look, markersize=4, alpha=0.6, markeredgewidth=0)
            ax.plot(s.mean, row, **look, markersize=7, markerfacecolor=fill)
        ax.plot([], [], **look, markersize=7, markerfacecolor=fill, label=said)
    ax.axvline(0, color="black", linewidth=1)
    ax.grid(axis="x", color="0.9", linewidth=0.8)
    ax.set_yticks(range(len(names)), list(names.values()))
    ax.set_ylim(len(names) - 0.5, -0.5)  # first row on top
    ax.set_xlabel(_shown(df))
    figure.legend(loc="outside upper left", ncols=min(3, len(others)), frameon=False)
    return figure


def _shown(df: pd.DataFrame) -> str:
    most = df.groupby(["factor", "level", "other"])["seed"].count().max()
    shown = {1: "one seed, no interval", 2: "mean of two seeds, no interval"}
    return f"difference in points, mean over tasks\n{shown.get(most, 'mean and 95% interval over seeds')}"
