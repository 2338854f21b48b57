"""Pictures of the propositions: orderings, gradients, bounds, and two batches that a reader moves.

Functions return a `matplotlib.figure.Figure` in the book's style. `explorer` is live where a
front-end can move its sliders, and a still picture everywhere else.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from armada_lib import figures, propositions
from armada_lib.transfer import Bound

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ALIGNER, STUDENT, MEASURED, GREY = "#0173b2", "#de8f05", "#b03a2e", "0.35"
LABEL = {
    "elementwise": "element-wise, E", "euclid": "Euclid, U", "cosine": "cosine, C",
    "elementwise_squared": "element-wise, squared", "euclid_squared": "Euclid, squared",
    "norm": "norm, as in Eq. 2", "squared": "norm squared", "kl": "KL × τ²",
    "mse": "mean square × τ²",
}  # fmt: skip
MARKS = "os^Dv"


def _axes(height: float, columns: int = 1, **layout: Any) -> tuple[Figure, Any]:
    figures.style()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(figures.WIDTH, height), layout="constrained")
    return figure, figure.subplots(1, columns, **layout)


def ordering(found: pd.DataFrame, shown: int = 1500) -> Figure:
    """U / (m sqrt C) against m for the first `shown` rows of `propositions.random_batches`."""
    figure, ax = _axes(4.2)
    some = found.iloc[:shown]
    ratio = some["U"] / some["printed"]
    fails = ratio < 1 - propositions.ROUNDING
    hollow = {"markerfacecolor": "none", "color": ALIGNER, "markersize": 4, "alpha": 0.7}
    full = {"color": STUDENT, "markersize": 5, "alpha": 0.8, "markeredgewidth": 0}
    ax.plot(some["m"][~fails], ratio[~fails], "o", label="holds as printed", **hollow)
    ax.plot(some["m"][fails], ratio[fails], "^", label="printed inequality is violated", **full)
    line = np.geomspace(some["m"].min(), some["m"].max(), 100)
    ax.plot(line, np.ones_like(line), color="black", linewidth=1.2, label="printed bound")
    ax.plot(line, np.sqrt(2 / line), "--", color="black", linewidth=1.8,
            label="corrected bound, √(2/m)")  # fmt: skip
    ax.axvline(2, color="0.6", linewidth=1, linestyle=":")
    ax.text(2.15, ratio.max(), "m = 2", fontsize=9, color=GREY, va="top")
    ax.set(xscale="log", yscale="log", xlabel="m = product of the lengths of the two centroids",
           ylabel="U / (m √C)")  # fmt: skip
    figure.legend(loc="outside upper left", ncols=4, frameon=False, fontsize=9.5)
    return figure


def gradients(manifold: pd.DataFrame, matching: pd.DataFrame) -> Figure:
    """Gradient norms of `propositions.gradient_norms` and `matching_gradients` by distance."""
    figure, axes = _axes(4.2, 2)
    parts = ((manifold, "projections", "mean distance E to the aligner's projections"),
             (matching, "logits", "distance of the logits"))  # fmt: skip
    for ax, (frame, what, where) in zip(axes, parts, strict=True):
        names = list(dict.fromkeys(frame["loss"]))
        for i, name in enumerate(names):
            part = frame[frame["loss"] == name]
            fades = name not in ("euclid", "elementwise", "norm")
            face = "white" if fades else None
            ax.plot(part["distance"], part["norm"], linestyle="--" if fades else "-",
                    marker=MARKS[i], markerfacecolor=face, color=f"C{i}", markersize=9 if i == 0 else 6,
                    linewidth=4 if i == 0 else 1.6, alpha=0.5 if i == 0 else 1,
                    label=LABEL[name])  # fmt: skip
        ax.set(xscale="log", yscale="log", xlabel=where, ylabel=f"gradient norm on the {what}")
        ax.legend(frameon=False, fontsize=9, loc="lower right")
    return figure


def bounds(rows: Mapping[str, Bound]) -> Figure:
    """The terms of each `transfer.Bound` as one bar, and what was measured as a mark."""
    figure, ax = _axes(1.3 + 0.42 * len(rows))
    parts = (("projections", "0.45", ""), ("weights", "0.75", "//"), ("biases", "0.9", ".."))
    at = np.arange(len(rows))
    left = np.zeros(len(rows))
    for name, colour, hatch in parts:
        width = np.array([getattr(b, name) for b in rows.values()])
        ax.barh(at, width, left=left, height=0.55, color=colour, hatch=hatch, edgecolor="0.3",
                linewidth=0.6, label=f"bound: {name}")  # fmt: skip
        left += width
    ax.plot([b.left for b in rows.values()], at, "D", color=MEASURED, markersize=8,
            markeredgecolor="white", label="measured distance")  # fmt: skip
    ax.set_yticks(at, list(rows))
    ax.invert_yaxis()
    ax.set_xlabel("distance of auxiliary logits, mean over held-out examples")
    figure.legend(loc="outside upper left", ncols=4, frameon=False, fontsize=9.5)
    return figure


def planes(
    batches: Mapping[str, tuple[np.ndarray, np.ndarray]], reach: float | None = None
) -> Figure:
    """Two batches in the plane, (p_ts, p_s) by title, with their centroids and the three losses.

    `reach` fixes the scale, so that pictures of several calls compare: axes from -reach to reach,
    bars to twice that.
    """
    figures.style()
    from matplotlib.figure import Figure

    n = len(batches)
    wide = figures.WIDTH if n > 2 else 3.6 * n
    figure = Figure(figsize=(wide, 3.9 if n > 2 else 4.6), layout="constrained")
    grid = figure.subplots(2, n, squeeze=False, height_ratios=[2.3, 1])
    every = np.concatenate([*(v for pair in batches.values() for v in pair), np.zeros((1, 2))])
    low, high = every.min() - 0.25, every.max() + 0.25
    found = [propositions.distances(*pair) for pair in batches.values()]
    longest = max(1.0, *(d.E for d in found), *(0 if np.isnan(d.C) else d.C for d in found))
    if reach:
        low, high, longest = -reach, reach, 2 * reach
    for j, (title, (p_ts, p_s)) in enumerate(batches.items()):
        ax, bars = grid[:, j]
        for x, y in zip(p_ts, p_s, strict=True):
            ax.plot(*zip(x, y, strict=True), color="0.75", linewidth=0.9, zorder=1)
        for p, colour, marker, name in (
            (p_ts, ALIGNER, "s", "aligner"),
            (p_s, STUDENT, "o", "student"),
        ):
            ax.plot(*p.T, marker, color=colour, markersize=4, markeredgewidth=0, zorder=2)
            ax.annotate("", p.mean(0), (0, 0), zorder=3,
                        arrowprops={"arrowstyle": "-|>", "color": colour, "linewidth": 1.4})  # fmt: skip
            ax.plot(*p.mean(0), marker, color=colour, markersize=9, markeredgecolor="black",
                    zorder=4, label=name)  # fmt: skip
        ax.plot(
            *zip(p_ts.mean(0), p_s.mean(0), strict=True), color="black", linewidth=1.6, zorder=3
        )
        ax.plot(0, 0, "+", color="black", markersize=8)
        ax.set(xlim=(low, high), ylim=(low, high), aspect="equal", xticks=[], yticks=[])
        ax.set_title(title, fontsize=9.5)
        values = [found[j].E, found[j].U, found[j].C]
        bars.barh(range(3), np.nan_to_num(values), color=["0.35", "0.6", "0.85"], edgecolor="0.3",
                  linewidth=0.6)  # fmt: skip
        for i, v in enumerate(values):
            said = "undefined" if np.isnan(v) else f"{v:.2f}"
            bars.text((0 if np.isnan(v) else v) + 0.03 * longest, i, said, va="center", fontsize=9)
        bars.set(xlim=(0, 1.32 * longest), xticks=[], ylim=(2.6, -0.6))
        bars.set_yticks(range(3), ["E", "U", "C"] if j == 0 else [""] * 3, fontsize=10)
        for side in ("top", "right", "bottom"):
            bars.spines[side].set_visible(False)
    handles, names = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper left", ncols=2, frameon=False, fontsize=9.5)
    return figure


STILL: dict[str, dict[str, Any]] = {
    "apart": {"a": (1.6, 0.3), "b": (0.3, 1.6)},
    "U = C = 0: rows swapped": {"a": (1.2, 1.2), "b": (1.2, 1.2), "swapped": True},
    "C = 0: another length": {"a": (0.6, 0.45), "b": (1.6, 1.2)},
    "C > U: short centroids": {"a": (0.25, 0.0), "b": (0.0, 0.25), "scatter": 0.15},
}


def live() -> bool:
    """Is this a kernel of JupyterLab, Notebook or VS Code, with ipywidgets at hand?

    The first two name the session in the kernel's environment, the third leaves a variable. The
    book's build and papermill do neither: a widget's state in a page would need a network.
    """
    if "IPython" not in sys.modules or importlib.util.find_spec("ipywidgets") is None:
        return False
    shell = sys.modules["IPython"].get_ipython()
    names = getattr(shell, "user_ns", {})
    return "JPY_SESSION_NAME" in os.environ or "__vsc_ipynb_file__" in names


def explorer() -> Any:
    """Sliders that move the two centroids, where there is a front-end (`live`); else four stills."""
    if not live():
        return planes({title: propositions.plane_batch(**how) for title, how in STILL.items()})
    import ipywidgets
    from IPython.display import display

    def draw(ax: float, ay: float, sx: float, sy: float, scatter: float, swapped: bool) -> None:
        display(planes({"": propositions.plane_batch((ax, ay), (sx, sy), scatter, swapped)}, 2.8))

    def slider(value: float, text: str, low: float = -2.0) -> Any:
        return ipywidgets.FloatSlider(value, min=low, max=2.0, step=0.05, description=text,
                                      continuous_update=False)  # fmt: skip

    moved = {
        "ax": slider(1.6, "aligner x"), "ay": slider(0.3, "aligner y"),
        "sx": slider(0.3, "student x"), "sy": slider(1.6, "student y"),
        "scatter": slider(0.5, "scatter", 0.0),
        "swapped": ipywidgets.Checkbox(False, description="swap the student's rows"),
    }  # fmt: skip
    shown = ipywidgets.interactive_output(draw, moved)
    return ipywidgets.HBox([ipywidgets.VBox(list(moved.values())), shown])
