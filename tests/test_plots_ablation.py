"""Figures of the ablations show the numbers of their tables."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from armada_lib import figures, plots_ablation, stats

RNG = np.random.default_rng(2)
CELLS = pd.DataFrame(
    [{"task": t, "seed": s, "alpha": a, "beta": b, "gain": RNG.normal()}
     for t in ("CoLA", "RTE") for s in range(3) for a in (0.0, 0.5) for b in (0.0, 0.1)]
)  # fmt: skip
MEANS = pd.DataFrame(
    [{"factor": f, "level": v, "mean": g["gain"].mean(), "low": g["gain"].mean() - 1,
      "high": np.nan if f == "beta" else g["gain"].mean() + 1}
     for f in ("alpha", "beta") for v, g in CELLS.groupby(f)]
)  # fmt: skip
MEANS.loc[MEANS["factor"] == "beta", "low"] = np.nan
GAPS = pd.DataFrame(
    [{"factor": f, "level": v, "other": o, "seed": s, "gain": RNG.normal(), "tasks": 2}
     for f, v in (("base", ""), ("detach", "no")) for o in ("base", "shuffled") for s in range(3)
     if (f, o) != ("base", "base")]
)  # fmt: skip


def points(ax) -> list[np.ndarray]:
    return [
        np.asarray(line.get_ydata(), float) for line in ax.lines if line.get_linestyle() == "None"
    ]


def test_every_run_is_a_point_of_every_panel_and_the_means_are_those_of_the_table():
    figure = plots_ablation.main_effects(CELLS, MEANS, {"alpha": "α", "beta": "β"})
    for ax, factor in zip(figure.axes, ("alpha", "beta"), strict=True):
        drawn = np.concatenate(points(ax))
        assert sorted(drawn) == pytest.approx(sorted(CELLS["gain"]))
        assert [t.get_text() for t in ax.get_xticklabels()] == [
            f"{v:g}" for v in sorted(set(CELLS[factor]))
        ]
        bars = [line for line in ax.lines if line.get_color() == "black"]
        levels = [line.get_ydata()[0] for line in bars if np.ptp(line.get_xdata()) > 0]
        assert levels == pytest.approx(MEANS.loc[MEANS["factor"] == factor, "mean"].to_list())
        spans = [list(line.get_ydata()) for line in bars if np.ptp(line.get_xdata()) == 0]
        own = MEANS[(MEANS["factor"] == factor)].dropna()[["low", "high"]].to_numpy().tolist()
        assert spans == own  # no interval where there is none
    assert figure.legends[0].get_texts()[0].get_text() == "CoLA"


def test_points_of_one_level_do_not_hide_each_other():
    ax = plots_ablation.main_effects(CELLS, MEANS, {"alpha": "α"}).axes[0]
    x = np.concatenate([line.get_xdata() for line in ax.lines if line.get_linestyle() == "None"])
    assert len(set(np.round(x, 6))) == len(CELLS)


def test_a_factor_without_a_column_is_refused():
    with pytest.raises(ValueError, match="no column or no means for .'gamma'."):
        plots_ablation.main_effects(CELLS, MEANS, {"gamma": "γ"})


def test_changes_show_seeds_means_and_intervals_and_controls_are_hollow():
    names = {("base", ""): "the base", ("detach", "no"): "stop-gradient: no"}
    figure = plots_ablation.one_factor(
        GAPS, names, {"base": "minus base", "shuffled": "minus shuffled"}
    )
    ax = figure.axes[0]
    assert [t.get_text() for t in ax.get_yticklabels()] == list(names.values())
    lines = [np.asarray(line.get_xdata(), float) for line in ax.lines]
    for _, g in GAPS.groupby(["factor", "level", "other"]):
        s = stats.summary(g["gain"])
        for want in (g["gain"].to_list(), [s.mean], [s.low, s.high]):
            assert any(len(x) == len(want) and np.allclose(x, want) for x in lines)
    hollow = {line.get_label(): line.get_markerfacecolor() == "white" for line in ax.lines}
    assert not hollow["minus base"] and hollow["minus shuffled"]
    assert "95% interval" in ax.get_xlabel()
    one = plots_ablation.one_factor(GAPS[GAPS["seed"] == 0], names, {"base": "minus base"})
    assert "one seed, no interval" in one.axes[0].get_xlabel()
    with pytest.raises(ValueError, match="no difference for any of"):
        plots_ablation.one_factor(GAPS, {("tau", "1"): "τ"}, {"base": "b"})


def test_the_same_figure_has_the_same_bytes(tmp_path):
    draw = lambda: plots_ablation.main_effects(CELLS, MEANS, {"alpha": "α", "beta": "β"})
    a, b = (figures.save(draw(), tmp_path / f"{n}.svg").read_bytes() for n in "ab")
    assert a == b
