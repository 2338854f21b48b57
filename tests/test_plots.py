"""Figures of the analyses: every raw point is there, and the bytes are the same twice."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from armada_lib import figures, plots


def points() -> pd.DataFrame:
    rng = np.random.default_rng(0)
    rows = [
        (task, model, i, *rng.random(2), i % 2, i % 3)
        for task in ("CoLA", "COPA") for model in ("undistilled", "ARMADA Euclid", "aligner")
        for i in range(30)
    ]  # fmt: skip
    return pd.DataFrame(rows, columns=["task", "model", "text", "x", "y", "label", "scenario"])


def noisy() -> pd.DataFrame:
    rng = np.random.default_rng(0)
    rows = [(t, m, s, x, rng.random()) for t in ("CoLA", "COPA") for m in ("student", "aligner")
            for s in range(3) for x in (0.0, 1.0, 2.0, 5.0)]  # fmt: skip
    rows += [(t, "undistilled", s, 0.0, 0.5 + 0.1 * s) for t in ("CoLA", "COPA") for s in range(3)]
    return pd.DataFrame(rows, columns=["task", "model", "seed", "sigma", "score"])


def moved() -> pd.DataFrame:
    rows = [("CoLA", a, s, w, s + (w == "after")) for a in ("undistilled", "ARMADA Euclid")
            for s in range(2) for w in ("before", "after")]  # fmt: skip
    return pd.DataFrame(rows, columns=["task", "arm", "seed", "when", "cka"])


def drawn(ax) -> set[tuple[float, float]]:
    """Every point of the lines that have a marker."""
    found = set()
    for line in ax.lines:
        if line.get_marker() not in (None, "None", ""):
            found |= set(zip(np.ravel(line.get_xdata()), np.ravel(line.get_ydata()), strict=True))
    return found


def test_a_map_has_every_point_and_a_marker_a_model():
    df = points()
    figure = plots.maps(df)
    for ax, task in zip(figure.axes, ("CoLA", "COPA"), strict=True):
        own = df[df["task"] == task]
        assert set(zip(own["x"], own["y"], strict=True)) <= drawn(ax)
        assert ax.get_title() == f"{task}: 30 texts"
        assert len({line.get_marker() for line in ax.lines}) == 3


def test_scenarios_have_their_own_marks_and_counts():
    df = points()
    figure = plots.scenarios(df, ["undistilled", "ARMADA Euclid"])
    assert len(figure.axes) == 4
    own = df[(df["task"] == "COPA") & (df["model"] == "ARMADA Euclid")]
    ax = figure.axes[3]
    assert ax.get_title() == "COPA, ARMADA Euclid: 10 and 10 texts"
    assert set(zip(own["x"], own["y"], strict=True)) <= drawn(ax)
    squares = [line for line in ax.lines if line.get_marker() == "s" and len(line.get_xdata())]
    at = {x for line in squares for x in line.get_xdata()}
    assert at == set(own[own["scenario"] == 2]["x"])
    sizes = {line.get_markersize() for line in squares}
    assert len(sizes) == 2  # the two labels
    with pytest.raises(ValueError, match="no points of"):
        plots.scenarios(df, ["undistilled", "ARMADA cosine"])


def test_noise_levels_show_seeds_means_and_the_undisturbed_student():
    df = noisy()
    figure = plots.levels(df)
    ax, own = figure.axes[0], df[df["task"] == "CoLA"]
    assert set(zip(own["sigma"], own["score"], strict=True)) <= drawn(ax)
    mean = own[own["model"] == "aligner"].groupby("sigma")["score"].mean()
    assert any(len(x.get_ydata()) == 4 and np.allclose(x.get_ydata(), mean) for x in ax.lines)
    assert any(x.get_linestyle() == "--" and set(x.get_ydata()) == {0.6} for x in ax.lines)
    assert [t.get_text() for t in figure.legends[0].get_texts()] == [
        "student",
        "aligner",
        "undistilled",
    ]
    assert list(ax.get_xticks()) == [0, 1, 2, 5]


def test_dots_and_moves_show_every_seed():
    df = noisy().rename(columns={"score": "sensitivity"})
    ax = plots.dots(df, "sensitivity").axes[0]
    assert set(df["sensitivity"]) <= {x for x, _ in drawn(ax)}
    assert [t.get_text() for t in ax.get_yticklabels()] == ["CoLA", "COPA"]
    ax = plots.before_after(moved(), "cka").axes[0]
    hollow = {x for line in ax.lines if line.get_markerfacecolor() == "white"
              for x in np.ravel(line.get_xdata())}  # fmt: skip
    assert hollow == {0, 1} and {x for x, _ in drawn(ax)} == {0, 1, 2}
    assert [t.get_text() for t in ax.get_yticklabels()] == ["undistilled", "ARMADA Euclid"]


@pytest.mark.parametrize(
    "draw",
    [lambda: plots.maps(points()), lambda: plots.scenarios(points(), ["undistilled"]),
     lambda: plots.levels(noisy()), lambda: plots.dots(noisy(), "score"),
     lambda: plots.before_after(moved(), "cka")],
)  # fmt: skip
def test_figures_are_the_same_bytes_twice_and_800_pixels_wide(draw, tmp_path):
    first, second = (figures.save(draw(), tmp_path / f"{i}.svg").read_bytes() for i in (0, 1))
    assert first == second and b'width="576pt"' in first
    with pytest.raises(ValueError, match="missing column"):
        plots.maps(pd.DataFrame({"task": [1]}))
