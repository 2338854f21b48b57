"""Figures of one look: white, colour-blind safe, readable at 800 px, byte-stable as SVG.

Functions return a `matplotlib.figure.Figure` and never touch pyplot's list of open figures, so a
notebook shows each of them once. Methods and controls differ in marker and fill, not in colour
alone. matplotlib and seaborn are imported when a figure is drawn. ValueError for a table without
rows, or without a column that is drawn.
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from armada_lib.stats import summary

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 8.0  # inches at 100 dpi
METHOD_MARKERS = "oPXvp*"
CONTROL_MARKERS = "sD^<>d"
STABLE = {"Date": None}  # the date is what differs between two SVG files of one figure


def style() -> None:
    """Set the look of all figures; in a notebook also SVG output. Calling it again is harmless."""
    import matplotlib as mpl
    import seaborn as sns

    sns.set_theme(style="white", palette="colorblind")
    mpl.rcParams.update(
        {
            "svg.hashsalt": "armada",  # element ids from the content, not from a random number
            "figure.facecolor": "white",
            "savefig.facecolor": "white",
            "figure.dpi": 100,
            "font.family": "DejaVu Sans",  # shipped with matplotlib: the same on every machine
            "font.size": 11,
        }
    )
    if "IPython" in sys.modules and sys.modules["IPython"].get_ipython() is not None:
        from matplotlib_inline.backend_inline import set_matplotlib_formats

        set_matplotlib_formats("svg", metadata=STABLE, bbox_inches="tight")


def safe_colours() -> list[Any]:
    """Seaborn's colour-blind safe colours without those that are too pale on white, or like a control."""
    import seaborn as sns

    every = sns.color_palette("colorblind")
    return [every[i] for i in (0, 1, 2, 3, 4, 5, 9)]


def save(figure: Figure, path: str | Path) -> Path:
    """Write `figure` as SVG to `path`; the same figure gives the same bytes.

    ValueError for a path that does not end in .svg.
    """
    path = Path(path)
    if path.suffix != ".svg":
        raise ValueError(f"figures are saved as .svg, got {path.name!r}")
    figure.savefig(path, metadata=STABLE)
    return path


def _need(df: pd.DataFrame, columns: Sequence[str]) -> None:
    missing = [c for c in columns if c not in df.columns]
    if missing:
        raise ValueError(f"missing column(s) {missing}; the table has {list(df.columns)}")
    if df.empty:
        raise ValueError("the table has no rows")


def paired_gains(
    df: pd.DataFrame, value: str = "score", baseline: str = "undistilled"
) -> pd.DataFrame:
    """Rows of `task, method, seed, value` -> `task, method, seed, gain` = method minus baseline.

    Each run is compared with the baseline of the same task and seed. ValueError if a run is there
    twice, or has no baseline.
    """
    _need(df, ["task", "method", "seed", value])
    twice = df[df.duplicated(["task", "method", "seed"])]
    if len(twice):
        rows = twice[["task", "method", "seed"]].drop_duplicates().values.tolist()
        raise ValueError(f"more than one row for {rows}")
    base = df[df["method"] == baseline].set_index(["task", "seed"])[value]
    rest = df[df["method"] != baseline].copy()
    keys = list(zip(rest["task"], rest["seed"], strict=True))
    alone = sorted({k for k in keys if k not in base.index}, key=str)
    if alone:
        raise ValueError(f"no {baseline!r} run for (task, seed) {alone}")
    if rest.empty:
        raise ValueError(f"only {baseline!r} rows: nothing to compare")
    rest["gain"] = rest[value].to_numpy() - base.loc[keys].to_numpy()
    return rest[["task", "method", "seed", "gain"]].reset_index(drop=True)


def gains(
    df: pd.DataFrame,
    controls: Collection[str] = (),
    value: str = "score",
    baseline: str = "undistilled",
    level: float = 0.95,
    unit: str = "points",
) -> Figure:
    """Gain over `baseline` per task: one small point per seed, the mean, its t interval.

    `df` has one row per task, method and seed, with the score in column `value`. Methods are
    filled and coloured; `controls` are hollow, grey, of other shapes, and drawn below them. With
    fewer than three seeds there is a mean and no interval. Tasks and methods keep the order of the table.
    ValueError for missing columns, baselines or controls.
    """
    table = paired_gains(df, value, baseline)
    names = list(dict.fromkeys(table["method"]))
    unknown = sorted(set(controls) - set(names))
    if unknown:
        raise ValueError(f"no rows for the control(s) {unknown}; methods are {names}")
    names = [m for m in names if m not in controls] + [m for m in names if m in controls]
    tasks = list(dict.fromkeys(table["task"]))

    style()
    from matplotlib.figure import Figure

    rows, palette = len(names), safe_colours()
    height = max(2.5, 1.2 + 0.25 * len(tasks) * (rows + 1))
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    ax = figure.subplots()
    for j, name in enumerate(names):
        control = name in controls
        i = j - sum(m not in controls for m in names) if control else j
        marks = CONTROL_MARKERS if control else METHOD_MARKERS
        colour = "0.35" if control else palette[i % len(palette)]
        marker = marks[i % len(marks)]
        look: dict[str, Any] = {"color": colour, "marker": marker, "linestyle": "none"}
        for k, task in enumerate(tasks):
            x = table.loc[(table["task"] == task) & (table["method"] == name), "gain"].to_numpy()
            if not len(x):
                continue
            y = k + 0.8 * ((j + 0.5) / rows - 0.5)
            s = summary(x, level)
            if s.n > 2:  # with two seeds the t interval spans the page and says nothing
                ax.plot([s.low, s.high], [y, y], color=colour, linewidth=1.6)
            if s.n > 1:
                below = y + 0.22 / rows  # where the interval does not hide them
                ax.plot(x, [below] * s.n, **look, markersize=4, alpha=0.6, markeredgewidth=0)
            ax.plot(s.mean, y, **look, markersize=7, markerfacecolor="white" if control else colour)
        ax.plot([], [], **look, markersize=7, markerfacecolor="white" if control else colour,
                label=f"{name} (control)" if control else name)  # fmt: skip
    ax.grid(axis="x", color="0.9", linewidth=0.8)
    ax.axvline(0, color="black", linewidth=1)
    for k in range(1, len(tasks)):
        ax.axhline(k - 0.5, color="0.85", linewidth=0.8)
    ax.set_yticks(range(len(tasks)), tasks)
    ax.set_ylim(len(tasks) - 0.5, -0.5)  # first task on top
    most = table.groupby(["task", "method"])["seed"].count().max()
    shown = {1: "one seed, no interval", 2: "mean of two seeds, no interval"}.get(
        most, f"mean and {level:.0%} interval over seeds"
    )
    ax.set_xlabel(f"gain over {baseline} ({unit}); {shown}")
    # a legend wider than the axes would shrink the whole figure on the page
    across = 4 if max(map(len, ax.get_legend_handles_labels()[1]), default=0) < 22 else 2
    figure.legend(loc="outside upper left", ncols=min(across, rows), frameon=False)
    return figure


def ranks(df: pd.DataFrame, ours: str = "ARMADA") -> Figure:
    """Average rank a method, 1 best, with its bootstrap interval and the critical difference.

    `df` as of `comparison.ranks`. The band begins at the best rank: a rank inside it does not
    differ from the best at 5 %. Methods whose name begins with `ours` are filled.
    """
    _need(df, ["arm", "rank", "low", "high", "n", "critical"])
    style()
    from matplotlib.figure import Figure

    df = df.sort_values("rank", ignore_index=True)
    figure = Figure(figsize=(WIDTH, 1.2 + 0.27 * len(df)), layout="constrained")
    ax = figure.subplots()
    best, width = float(df["rank"].min()), float(df["critical"].iloc[0])
    ax.axvspan(
        best, best + width, color="0.92", linewidth=0, label="within the critical difference"
    )
    for y, r in enumerate(df.itertuples()):
        own = str(r.arm).startswith(ours)
        ax.plot([r.low, r.high], [y, y], color="black", linewidth=1.2)
        ax.plot(
            r.rank, y, "o", markersize=7, color="black", markerfacecolor="C0" if own else "white"
        )
    ax.set_yticks(range(len(df)), df["arm"])
    ax.set_ylim(len(df) - 0.5, -0.5)
    ax.grid(axis="x", color="0.9", linewidth=0.8)
    ax.set_xlim(0.5, len(df) + 0.5)
    n = int(df["n"].iloc[0])
    ax.set_xlabel(
        f"average rank over {n} {'task' if n == 1 else 'tasks'} (1 is best), 95 % bootstrap interval"
    )
    figure.legend(loc="outside upper left", frameon=False)
    return figure


def curve(df: pd.DataFrame, y: str = "loss", x: str = "step", hue: str = "method") -> Figure:
    """A quantity during training: a thin line per seed and the mean over seeds, by `hue`.

    `df` has one row per `x`, `hue` and seed. Line patterns differ as well as colours.
    """
    _need(df, [x, y, hue, "seed"])
    style()
    import seaborn as sns
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(WIDTH, 4.5), layout="constrained")
    ax = figure.subplots()
    look = {"data": df, "x": x, "y": y, "hue": hue, "style": hue}
    look["palette"] = sns.color_palette("colorblind", df[hue].nunique())
    sns.lineplot(
        **look, units="seed", estimator=None, linewidth=0.8, alpha=0.35, legend=False, ax=ax
    )
    sns.lineplot(**look, estimator="mean", errorbar=None, linewidth=2, ax=ax)
    ax.set(xlabel=x, ylabel=y)
    if df[x].dtype.kind in "iu":
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))  # there is no step 2.5
    ax.legend(title=None, frameon=False)
    sns.despine(ax=ax)
    return figure


def gallery(rows: Mapping[str, Sequence[Any]], texts: Sequence[str]) -> Figure:
    """Pictures (PIL) or spectrograms (bands, time): a row a text, a column a teacher.

    Of one teacher they stand side by side, each over its text. An empty place (None) says so.
    ValueError if a teacher has not one entry a text.
    """
    for name, items in rows.items():
        if len(items) != len(texts):
            raise ValueError(f"{name}: {len(items)} pictures for {len(texts)} texts")
    style()
    from matplotlib.figure import Figure

    if len(rows) == 1:
        (items,) = rows.values()
        return _row(items, texts)
    wide = [max((x.width / x.height for x in items if hasattr(x, "height")), default=1.6)
            for items in rows.values()]  # fmt: skip
    figure = Figure(figsize=(WIDTH, 0.5 + 1.05 * len(texts)), layout="constrained")
    axes = figure.subplots(len(texts), len(rows), squeeze=False, width_ratios=wide)
    for j, (name, items) in enumerate(rows.items()):
        axes[0, j].set_title(name, fontsize=11)
        for i, item in enumerate(items):
            _place(axes[i, j], item)
    for i, text in enumerate(texts):
        axes[i, 0].set_ylabel(
            textwrap.fill(text, 22), rotation=0, ha="right", va="center", fontsize=9
        )
    return figure


def _row(items: Sequence[Any], texts: Sequence[str]) -> Figure:
    """A gallery of one teacher: side by side, each over its text."""
    from matplotlib.figure import Figure

    under = [textwrap.fill(text, 88 // len(texts)) for text in texts]
    deep = 0.2 + 0.2 * max(t.count("\n") + 1 for t in under)
    figure = Figure(figsize=(WIDTH, WIDTH / len(texts) + deep), layout="constrained")
    axes = figure.subplots(1, len(texts), squeeze=False)[0]
    for ax, item, text in zip(axes, items, under, strict=True):
        _place(ax, item)
        ax.set_xlabel(text, fontsize=9)
    return figure


def _place(ax: Axes, item: Any) -> None:
    """A picture, a spectrogram, or the word that there is none."""
    ax.set(xticks=[], yticks=[], frame_on=False)
    if item is None:
        ax.text(0.5, 0.5, "refused", ha="center", va="center", transform=ax.transAxes)
    elif hasattr(item, "height"):
        ax.imshow(item)
    else:
        ax.imshow(item, origin="lower", aspect="auto", cmap="viridis")
