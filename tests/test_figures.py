"""Figures render, show what the table holds, and are the same bytes twice."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from armada_lib import figures, stats

METHODS = ["undistilled", "euclid", "elementwise", "shuffled", "layers only"]
CONTROLS = ["shuffled", "layers only"]


def scores(seeds: int = 5, tasks: tuple[str, ...] = ("CoLA", "STS-B")) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    rows = [(t, m, s, 60 + 2 * METHODS.index(m) + rng.normal())
            for t in tasks for m in METHODS for s in range(seeds)]  # fmt: skip
    return pd.DataFrame(rows, columns=["task", "method", "seed", "score"])


def losses() -> pd.DataFrame:
    rng = np.random.default_rng(0)
    rows = [(m, s, k, 1 / (1 + k) + 0.05 * rng.random())
            for m in METHODS[:3] for s in range(3) for k in range(20)]  # fmt: skip
    return pd.DataFrame(rows, columns=["method", "seed", "step", "loss"])


def lines(figure) -> dict[str, list]:
    """Lines of the legend entry of every method, and all others under ''."""
    out: dict[str, list] = {"": []}
    for line in figure.axes[0].lines:
        label = line.get_label()
        out.setdefault("" if label.startswith("_") else label, []).append(line)
    return out


def test_gains_are_paired_by_task_and_seed():
    df = scores().sample(frac=1, random_state=1)
    gain = figures.paired_gains(df)
    assert "undistilled" not in set(gain["method"])
    for row in gain.itertuples():
        cell = df[(df["task"] == row.task) & (df["seed"] == row.seed)].set_index("method")["score"]
        assert row.gain == pytest.approx(cell[row.method] - cell["undistilled"])
    assert len(gain) == 2 * 4 * 5


def test_the_points_means_and_intervals_of_the_figure_are_those_of_the_table():
    df = scores()
    gain = figures.paired_gains(df)
    drawn = lines(figures.gains(df, CONTROLS))[""]
    for (_, _), cell in gain.groupby(["task", "method"]):
        s = stats.summary(cell["gain"])
        xs = [np.asarray(line.get_xdata(), float).ravel() for line in drawn]
        assert any(len(x) == 5 and np.allclose(sorted(x), sorted(cell["gain"])) for x in xs)
        assert any(len(x) == 1 and np.allclose(x, s.mean) for x in xs)
        assert any(len(x) == 2 and np.allclose(x, [s.low, s.high]) for x in xs)
    assert any(list(line.get_xdata()) == [0, 0] for line in drawn)  # the zero line


def test_controls_differ_by_marker_and_fill():
    legend = {k: v[0] for k, v in lines(figures.gains(scores(), CONTROLS)).items() if k}
    assert list(legend) == ["euclid", "elementwise", "shuffled (control)", "layers only (control)"]
    markers = [line.get_marker() for line in legend.values()]
    assert len(set(markers)) == 4
    hollow = [line.get_markerfacecolor() == "white" for line in legend.values()]
    assert hollow == [False, False, True, True]


def test_one_seed_has_no_interval():
    figure = figures.gains(scores(seeds=1))
    assert "one seed, no interval" in figure.axes[0].get_xlabel()
    drawn = lines(figure)[""]
    assert sum(len(np.ravel(line.get_xdata())) == 1 for line in drawn) == 2 * 4
    widths = [line for line in drawn if len(np.ravel(line.get_xdata())) == 2]
    assert len(widths) == 2  # the zero line and the line between the two tasks


def test_curve_draws_every_seed_and_the_mean():
    df = losses()
    ax = figures.curve(df).axes[0]
    drawn = [line for line in ax.lines if len(line.get_xdata()) == 20]
    assert len(drawn) == 3 * 3 + 3
    mean = df[df["method"] == "euclid"].groupby("step")["loss"].mean()
    assert any(np.allclose(line.get_ydata(), mean) for line in drawn)
    assert [t.get_text() for t in ax.get_legend().get_texts()] == METHODS[:3]
    dashes = {line.get_linestyle() if line.is_dashed() else "-" for line in drawn}
    assert len(dashes) > 1
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("step", "loss")


@pytest.mark.parametrize("draw", [lambda: figures.gains(scores(), CONTROLS),
                                  lambda: figures.curve(losses())])  # fmt: skip
def test_svg_is_byte_stable_white_and_800_pixels_wide(draw, tmp_path: Path):
    first, second = (figures.save(draw(), tmp_path / f"{i}.svg").read_bytes() for i in (0, 1))
    assert first == second
    assert b"dc:date" not in first and b"fill: #ffffff" in first
    assert b'width="576pt"' in first  # 8 inches = 800 px at 100 dpi
    figure = draw()
    figure.savefig(tmp_path / "a.png")
    assert figure.get_size_inches()[0] * figure.dpi == 800


def test_svg_is_byte_stable_between_processes(tmp_path: Path):
    code = (
        "import sys, pandas as pd; from armada_lib import figures;"
        "df = pd.read_csv(sys.argv[1]); figures.save(figures.gains(df), sys.argv[2])"
    )
    scores().to_csv(tmp_path / "scores.csv", index=False)
    root = Path(__file__).resolve().parents[1]
    for i in (0, 1):
        subprocess.run(
            [sys.executable, "-c", code, tmp_path / "scores.csv", tmp_path / f"{i}.svg"],
            check=True, cwd=root, env={**os.environ, "PYTHONHASHSEED": str(i)},
        )  # fmt: skip
    assert (tmp_path / "0.svg").read_bytes() == (tmp_path / "1.svg").read_bytes()


def test_bad_tables_are_refused(tmp_path: Path):
    df = scores()
    for table, options, match in [
        (df.drop(columns="seed"), {}, r"missing column\(s\) \['seed'\]"),
        (df.head(0), {}, "no rows"),
        (pd.concat([df, df.head(1)]), {}, "more than one row"),
        (df.drop(index=0), {}, r"no 'undistilled' run.*'CoLA', 0"),
        (df[df["method"] == "undistilled"], {}, "nothing to compare"),
        (df, {"controls": ["random"]}, r"no rows for the control\(s\) \['random'\]"),
    ]:
        with pytest.raises(ValueError, match=match):
            figures.gains(table, **options)
    with pytest.raises(ValueError, match="missing"):
        figures.curve(losses(), y="accuracy")
    with pytest.raises(ValueError, match=r"\.svg"):
        figures.save(figures.curve(losses()), tmp_path / "x.png")


def test_importing_does_not_load_matplotlib():
    code = "import sys, armada_lib.figures; sys.exit('matplotlib' in sys.modules)"
    root = Path(__file__).resolve().parents[1]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0


def test_ranks_show_the_best_first_ours_filled_and_the_band_of_the_best():
    df = pd.DataFrame({
        "arm": ["KD", "ARMADA cosine", "undistilled"], "rank": [2.0, 1.25, 2.75],
        "low": [1.5, 1.0, 2.0], "high": [2.5, 1.5, 3.0], "n": 4, "critical": 1.2,
    })  # fmt: skip
    figure = figures.ranks(df)
    (ax,) = figure.axes
    assert [t.get_text() for t in ax.get_yticklabels()] == ["ARMADA cosine", "KD", "undistilled"]
    dots = [line for line in ax.lines if line.get_marker() == "o"]
    assert [line.get_markerfacecolor() == "white" for line in dots] == [False, True, True]
    assert [line.get_xdata()[0] for line in dots] == [1.25, 2.0, 2.75]
    band = ax.patches[0]
    assert (band.get_x(), band.get_width()) == (1.25, pytest.approx(1.2))
    with pytest.raises(ValueError, match="missing column"):
        figures.ranks(df.drop(columns="critical"))
