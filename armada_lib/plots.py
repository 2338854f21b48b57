"""Figures of the chapter on analyses, in the look of `figures`: maps, scenarios, noise, before and after.

Every function takes a tidy frame of `analysis.analyse`, shows every raw point, tells groups apart by
marker as well as by colour, and returns a `matplotlib.figure.Figure`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from armada_lib.figures import METHOD_MARKERS, WIDTH, _need, safe_colours, style

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def _panels(count: int, columns: int, height: float) -> tuple[Figure, list[Axes]]:
    """A figure of `count` panels, `columns` a row, `height` inches each; the rest are hidden."""
    style()
    from matplotlib.figure import Figure

    rows = math.ceil(count / columns)
    figure = Figure(figsize=(WIDTH, 0.7 + height * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel().tolist()
    for ax in axes[count:]:
        ax.set_axis_off()
    return figure, axes[:count]


def _looks(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Colour and marker of each name, in the order given; every name keeps its own in all panels.

    The undistilled student is grey and ARMADA comes first, so that they look the same in every figure.
    """
    palette = safe_colours()
    others = [n for n in names if n != "undistilled"]
    others.sort(key=lambda n: not n.startswith("ARMADA"))
    return {"undistilled": {"color": "0.35", "marker": "d"}} | {
        name: {"color": palette[i % len(palette)], "marker": METHOD_MARKERS[i % len(METHOD_MARKERS)]}
        for i, name in enumerate(others)
    }  # fmt: skip


def maps(df: pd.DataFrame) -> Figure:
    """Figure 7: one map a task, a point a text and model. Columns task, model, x, y.

    The models of a task were fitted together; axes have no unit, and only nearness means something.
    """
    _need(df, ["task", "model", "x", "y"])
    tasks, models = list(dict.fromkeys(df["task"])), list(dict.fromkeys(df["model"]))
    figure, axes = _panels(len(tasks), min(2, len(tasks)), 4.2)
    looks = _looks(models)
    for ax, task in zip(axes, tasks, strict=True):
        own = df[df["task"] == task]
        for name in models:
            part = own[own["model"] == name]
            label = name if task == tasks[0] else None
            ax.plot(part["x"], part["y"], linestyle="none", markersize=4.5, alpha=0.65, label=label,
                    markeredgewidth=0, **looks[name])  # fmt: skip
        ax.set(xticks=[], yticks=[], title=f"{task}: {own['text'].nunique()} texts")
    figure.legend(loc="outside upper left", ncols=3, frameon=False, markerscale=1.6)
    return figure


def scenarios(df: pd.DataFrame, models: Sequence[str]) -> Figure:
    """Figure 8: in each model's part of the map, the texts of both scenarios; a row a task.

    Columns task, model, x, y, label, scenario. As in the paper, the larger mark is label 1.
    """
    _need(df, ["task", "model", "x", "y", "label", "scenario"])
    if unknown := sorted(set(models) - set(df["model"])):
        raise ValueError(f"no points of {unknown}; models are {sorted(set(df['model']))}")
    tasks = list(dict.fromkeys(df["task"]))
    figure, axes = _panels(len(tasks) * len(models), len(models), 3.2)
    palette = safe_colours()
    kinds = {
        0: ("neither", {"color": "0.8", "marker": "."}, "0.8"),
        1: ("scenario 1: only ARMADA right", {"color": palette[0], "marker": "o"}, palette[0]),
        2: ("scenario 2: only undistilled right", {"color": palette[1], "marker": "s"}, "none"),
    }
    places = [(t, m) for t in tasks for m in models]
    for ax, (task, model) in zip(axes, places, strict=True):
        own = df[(df["task"] == task) & (df["model"] == model)]
        for kind, (label, look, face) in kinds.items():
            part = own[own["scenario"] == kind]
            for large in (False, True):
                dots = part[(part["label"] > 0) == large]
                ax.plot(dots["x"], dots["y"], linestyle="none", markersize=7.5 if large else 4.5,
                        markerfacecolor=face, **look)  # fmt: skip
            if ax is axes[0]:
                ax.plot(
                    [],
                    [],
                    linestyle="none",
                    markersize=6,
                    markerfacecolor=face,
                    label=label,
                    **look,
                )
        n = [int((own["scenario"] == k).sum()) for k in (1, 2)]
        ax.set(xticks=[], yticks=[], title=f"{task}, {model}: {n[0]} and {n[1]} texts")
        ax.title.set_fontsize(10)
    figure.legend(loc="outside upper left", ncols=3, frameon=False)
    return figure


def levels(
    df: pd.DataFrame, y: str = "score", x: str = "sigma", hue: str = "model", panel: str = "task",
    xlabel: str = "standard deviation σ of the noise", ylabel: str = "score",
) -> Figure:  # fmt: skip
    """Figures 10 and 12: a quantity by noise level; small points are seeds, a line joins the means.

    A group that has one level only (undistilled students see no noise) is a horizontal dashed line.
    """
    _need(df, [x, y, hue, panel])
    names, panels = list(dict.fromkeys(df[hue])), list(dict.fromkeys(df[panel]))
    figure, axes = _panels(len(panels), min(2, len(panels)), 3.2)
    looks = _looks(names)
    for ax, name in zip(axes, panels, strict=True):
        own = df[df[panel] == name]
        for group in names:
            part = own[own[hue] == group]
            if part.empty:
                continue
            mean, look = part.groupby(x)[y].mean(), looks[group]
            label = group if ax is axes[0] else None
            if len(mean) == 1:
                ax.axhline(mean.iloc[0], color=look["color"], linestyle="--", linewidth=1.3)
                ax.plot(part[x], part[y], linestyle="none", markersize=4, alpha=0.6, **look)
                ax.plot([], [], linestyle="--", markersize=5, label=label, **look)
                continue
            ax.plot(mean.index, mean, linewidth=1.6, markersize=6, label=label, **look)
            ax.plot(part[x], part[y], linestyle="none", markersize=4, alpha=0.6, **look)
        ax.set(title=str(name), xticks=sorted(df[x].unique()))
        ax.grid(axis="y", color="0.9", linewidth=0.8)
    figure.supxlabel(xlabel, fontsize=11)
    figure.supylabel(ylabel, fontsize=11)
    figure.legend(loc="outside upper left", ncols=3, frameon=False)
    return figure


def dots(
    df: pd.DataFrame, y: str, hue: str = "model", group: str = "task", xlabel: str = ""
) -> Figure:
    """Figure 11: one point a seed, a bar at the mean, by group (rows) and hue (markers)."""
    _need(df, [y, hue, group])
    names, groups = list(dict.fromkeys(df[hue])), list(dict.fromkeys(df[group]))
    figure, (ax,) = _panels(1, 1, 0.8 + 0.28 * len(groups) * (len(names) + 1))
    looks = _looks(names)
    for j, name in enumerate(names):
        for k, g in enumerate(groups):
            part = df[(df[hue] == name) & (df[group] == g)][y].dropna()
            at = k + 0.8 * ((j + 0.5) / len(names) - 0.5)
            if len(part):
                ax.plot(
                    part, [at] * len(part), linestyle="none", markersize=6, alpha=0.7, **looks[name]
                )
                ax.plot([part.mean()] * 2, [at - 0.3 / len(names), at + 0.3 / len(names)],
                        color=looks[name]["color"], linewidth=2)  # fmt: skip
        ax.plot([], [], linestyle="none", markersize=6, label=name, **looks[name])
    ax.set_yticks(range(len(groups)), [str(g) for g in groups])
    ax.set_ylim(len(groups) - 0.5, -0.5)
    ax.set_xlabel(xlabel or y)
    ax.grid(axis="x", color="0.9", linewidth=0.8)
    figure.legend(loc="outside upper left", ncols=3, frameon=False)
    return figure


def before_after(df: pd.DataFrame, y: str, panel: str = "task", xlabel: str = "") -> Figure:
    """A line an arm and seed from a hollow mark (before training) to a full one (after).

    Columns arm, when ("before", "after"), seed, `panel` and `y`; arms in the order of the table.
    """
    _need(df, ["arm", "when", "seed", panel, y])
    arms, panels = list(dict.fromkeys(df["arm"])), list(dict.fromkeys(df[panel]))
    figure, axes = _panels(len(panels), min(2, len(panels)), 0.8 + 0.32 * len(arms))
    for ax, name in zip(axes, panels, strict=True):
        own = df[df[panel] == name]
        for i, arm in enumerate(arms):
            for (_, seed), g in own[own["arm"] == arm].groupby(["arm", "seed"]):
                at = g.set_index("when")[y]
                colour = "0.35" if not arm.startswith("ARMADA") else "C0"
                place = i + 0.12 * (int(seed) % 5 - 2 * (own["seed"].nunique() > 1))
                ax.plot([at["before"], at["after"]], [place] * 2, color=colour, linewidth=1)
                ax.plot(
                    at["before"],
                    place,
                    marker="o",
                    color=colour,
                    markerfacecolor="white",
                    markersize=5,
                )
                ax.plot(at["after"], place, marker="o", color=colour, markersize=5)
        first = ax is axes[0] or panels.index(name) % 2 == 0
        ax.set_yticks(range(len(arms)), arms if first else [""] * len(arms))
        ax.set_ylim(len(arms) - 0.4, -0.6)
        ax.set_title(str(name))
        ax.grid(axis="x", color="0.9", linewidth=0.8)
    figure.supxlabel(xlabel or y, fontsize=11)
    return figure
