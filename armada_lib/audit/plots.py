"""Two figures in the book's look: counts by status, and gains that selection makes out of nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from armada_lib import figures

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HATCHES = ("", "//", "xx", "..", "\\\\", "oo", "--")


def statuses(counts: pd.DataFrame, signs: Mapping[str, str]) -> Figure:
    """Stacked bars: a row of `counts` a bar, a column a status; every part says its number.

    `signs`: what stands before a status in the legend. Parts differ in pattern as well as in colour.
    ValueError if there is nothing to count.
    """
    if not counts.to_numpy().sum():
        raise ValueError("nothing to count")
    figures.style()
    import seaborn as sns
    from matplotlib.figure import Figure

    figure = Figure(figsize=(figures.WIDTH, 1.3 + 0.42 * len(counts)), layout="constrained")
    ax, left = figure.subplots(), np.zeros(len(counts))
    colours = sns.color_palette("colorblind", len(counts.columns))
    for i, status in enumerate(counts.columns):
        n = counts[status].to_numpy()
        ax.barh(counts.index, n, left=left, label=f"{signs.get(status, '')} {status}".strip(),
                color=sns.set_hls_values(colours[i], l=0.72), edgecolor="0.2", linewidth=0.8,
                hatch=HATCHES[i % len(HATCHES)])  # fmt: skip
        for k, (x, wide) in enumerate(zip(left, n, strict=True)):
            if wide:
                ax.text(x + wide / 2, k, str(wide), ha="center", va="center", fontsize=9,
                        bbox={"boxstyle": "round,pad=0.15", "fc": "white", "ec": "none"})  # fmt: skip
        left += n
    ax.invert_yaxis()
    ax.set(xlim=(0, left.max()), xlabel="number of entries")
    sns.despine(ax=ax, left=True)
    figure.legend(loc="outside upper left", ncols=3, frameon=False)
    return figure


def selected(table: pd.DataFrame, published: Mapping[str, float]) -> Figure:
    """Gains that appear without any effect, by what is reported: mean and 95 % of the simulations.

    `table`: that of `numbers.selection`; `published`: average gains to compare with, drawn as lines.
    """
    figures.style()
    import textwrap

    import seaborn as sns
    from matplotlib.figure import Figure

    figure = Figure(figsize=(figures.WIDTH, 1.4 + 0.55 * len(table)), layout="constrained")
    ax, colour = figure.subplots(), sns.color_palette("colorblind")[0]
    for k, r in enumerate(table.itertuples()):
        ax.plot([r.low, r.high], [k, k], color=colour, linewidth=1.8)
        ax.plot(r.simulated, k, "o", color=colour, markersize=7,
                label="simulated mean, 95 % of the simulations" if k == 0 else None)  # fmt: skip
        ax.plot(r.closed, k, "|", color="black", markersize=16, markeredgewidth=1.8,
                label="closed form" if k == 0 else None)  # fmt: skip
    for (name, x), line in zip(published.items(), ("--", ":", "-."), strict=False):
        ax.axvline(x, color="0.25", linestyle=line, linewidth=1.3, label=name)
    ax.axvline(0, color="black", linewidth=1)
    ax.set_yticks(range(len(table)), [textwrap.fill(t, 44) for t in table["reported"]], fontsize=9)
    ax.invert_yaxis()
    ax.set_xlabel("gain over undistilled that would be reported (points), true gain zero")
    ax.grid(axis="x", color="0.9", linewidth=0.8)
    sns.despine(ax=ax, left=True)
    figure.legend(loc="outside upper left", ncols=2, frameon=False)
    return figure
