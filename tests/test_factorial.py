"""Crossed weights: effects by hand, sums of squares by hand, verdicts that follow their criteria."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pytest
from scipy import stats as sps

from armada_lib import ablation, chapter, factorial, report, stats

LEVELS = {"alpha": [0, 0.5], "beta": [0, 0.1], "gamma": [0, 1], "manifold": ["euclid"]}
WEIGHTS = ["alpha", "beta", "gamma"]


def row(task, seed, score, method="armada", loss="euclid", factor="grid", level="", **weights):
    w = dict(alpha=0.5, beta=0.1, gamma=1.0) | weights
    return {"task": task, "suite": task, "title": task, "seed": seed, "method": method, "score": score,
            "manifold": loss if w["beta"] else None, "factor": factor, "level": level, "teacher": "sd14",
            "reading": "paper", "usual_beta": True, "student": "s", "head": "student", **w}  # fmt: skip


def study(seeds=3, noise=0.0, a=-2.0, b=10.0, g=0.5, ab=0.0) -> pd.DataFrame:
    """Undistilled 50 + 3 seed; a cell adds a alpha + b beta + g gamma + ab alpha beta, and noise."""
    rng, rows = np.random.default_rng(0), []
    for task, seed in itertools.product(("CoLA", "RTE"), range(seeds)):
        base = 50 + 3 * seed + (task == "RTE")
        rows.append(
            row(task, seed, base, "undistilled", factor="base", alpha=0.0, beta=0.0, gamma=0.0)
        )
        for w in itertools.product(*(LEVELS[x] for x in WEIGHTS)):
            if any(w):
                x = dict(zip(WEIGHTS, map(float, w), strict=True))
                gain = a * x["alpha"] + b * x["beta"] + g * x["gamma"] + ab * x["alpha"] * x["beta"]
                factor = "base" if w == (0.5, 0.1, 1) else "grid"
                rows.append(row(task, seed, base + gain + noise * rng.normal(), factor=factor, **x))
    return pd.DataFrame(rows)


def test_the_cells_are_gains_and_the_undistilled_student_is_the_cell_of_zeros():
    grid = factorial.cells(study(), LEVELS)
    assert len(grid) == 2 * 3 * 8
    at = grid.set_index(["task", "seed", *WEIGHTS])["gain"]
    assert (at.loc[:, :, 0.0, 0.0, 0.0] == 0).all()
    assert at["RTE", 2, 0.5, 0.1, 1.0] == pytest.approx(-1 + 1 + 0.5)
    # without a level of 0 the undistilled student is no cell
    assert len(factorial.cells(study(), LEVELS | {"gamma": [1]})) == 2 * 3 * 4


def test_only_what_has_every_combination_counts():
    df = study()
    lacking = df[
        ~(
            (df["seed"] == 1)
            & (df["task"] == "RTE")
            & (df["factor"] == "base")
            & (df["method"] == "armada")
        )
    ]
    grid = factorial.cells(lacking, LEVELS)
    assert ("RTE", 1) not in set(zip(grid["task"], grid["seed"], strict=True)) and len(
        grid
    ) == 5 * 8


def test_other_runs_are_no_cells_and_losses_are_averaged():
    more = [row("CoLA", 0, 99.0, factor="detach", level="no"), row("CoLA", 0, 99.0, beta=1.0),
            row("CoLA", 0, 99.0, "shuffled", factor="base"),
            row("CoLA", 0, 99.0, loss="cosine", factor="manifold", level="cosine")]  # fmt: skip
    df = pd.concat([study(), pd.DataFrame(more)])
    pd.testing.assert_frame_equal(factorial.cells(df, LEVELS), factorial.cells(study(), LEVELS))
    both = factorial.cells(df, LEVELS | {"manifold": ["euclid", "cosine"]})
    at = both.set_index(["task", "seed", *WEIGHTS])["gain"]["CoLA", 0, 0.5, 0.1, 1.0]
    assert at == pytest.approx((0.5 + 49.0) / 2)


def test_an_effect_is_the_difference_at_equal_other_weights():
    grid = factorial.cells(study(ab=8.0), LEVELS)
    # a (0.5 - 0) + ab 0.5 (mean of the betas 0 and 0.1)
    want = {"alpha": -1 + 8 * 0.5 * 0.05, "beta": 1 + 8 * 0.1 * 0.25, "gamma": 0.5}
    for factor, (low, high) in {"alpha": (0, 0.5), "beta": (0, 0.1), "gamma": (0, 1)}.items():
        e = factorial.effect(grid, factor, high, low)
        assert len(e) == 6 and e.to_numpy() == pytest.approx(want[factor])
        assert factorial.effect(grid, factor, low, high).to_numpy() == pytest.approx(-want[factor])
    for of, to in ((0.5, 0.5), (0.7, 0)):
        assert factorial.effect(grid, "alpha", of, to).empty
    named = factorial.effects(grid, LEVELS, ["alpha", "beta"], down=True)
    assert list(named) == ["α = 0 instead of 0.5", "β = 0 instead of 0.1"]
    assert named["β = 0 instead of 0.1"].to_numpy() == pytest.approx(-want["beta"])


def test_means_of_levels_have_the_interval_over_seeds():
    grid = factorial.cells(study(noise=1.0), LEVELS)
    m = factorial.means(grid, WEIGHTS).set_index(["factor", "level"])
    one = grid[grid["beta"] == 0.1].groupby("seed")["gain"].mean()  # two tasks, balanced
    s = stats.summary(one)
    assert m.loc[("beta", 0.1), ["mean", "low", "high"]].to_list() == pytest.approx(
        [s.mean, s.low, s.high]
    )
    assert factorial.means(factorial.cells(study(seeds=2), LEVELS), ["beta"])["low"].isna().all()


def test_the_table_of_the_grid_has_a_row_a_combination():
    table = factorial.grid_table(factorial.cells(study(), LEVELS), WEIGHTS)
    assert len(table) == 8 and list(table) == ["α", "β", "γ", "mean over tasks", "CoLA", "RTE"]
    assert table.iloc[0].to_list()[:4] == ["0", "0", "0", "+0.0 [+0.0, +0.0]"]
    last = table.iloc[-1]
    assert (last["α"], last["β"], last["γ"]) == ("0.5", "0.1", "1") and last["CoLA"].startswith(
        "+0.5"
    )


def test_blocks_take_out_what_a_task_and_seed_share():
    """Against the sums of squares of a randomised block design, by hand."""
    grid = factorial.cells(study(noise=0.5), LEVELS)
    found = factorial.analyses(grid, WEIGHTS, one_run=False).set_index(["reading", "source"])
    y = grid["gain"] - grid.groupby(["task", "seed"])["gain"].transform("mean")
    total, between = (y**2).sum(), {}
    grand = lambda by: (grid.assign(y=y).groupby(by)["y"].transform("mean") ** 2).sum()
    for f in WEIGHTS:
        between[f] = grand(f)
    pairs = list(itertools.combinations(WEIGHTS, 2))
    inter = {p: grand(list(p)) - between[p[0]] - between[p[1]] for p in pairs}
    df = len(grid) - 1 - 5 - 3 - 3  # the mean, blocks, weights, pairs
    error = (total - sum(between.values()) - sum(inter.values())) / df
    reading = "with interactions, task and seed as blocks"
    for f, sign in zip(WEIGHTS, "αβγ", strict=True):
        assert found.loc[(reading, sign), "F"] == pytest.approx(between[f] / error)
        assert found.loc[(reading, sign), "p"] == pytest.approx(sps.f.sf(between[f] / error, 1, df))
    assert found.loc[(reading, "α × β"), "F"] == pytest.approx(inter["alpha", "beta"] / error)
    alone = [g["gain"] for _, g in grid.groupby("beta")]
    assert found.loc[("β alone, all cells", "β"), "p"] == pytest.approx(sps.f_oneway(*alone).pvalue)


def test_test_sets_of_one_run_count_as_one_number():
    grid = factorial.cells(
        study(noise=0.5).assign(alpha=0.0), {k: LEVELS[k] for k in ("beta", "gamma", "manifold")}
    )
    found = factorial.analyses(grid, ["beta", "gamma"], one_run=True)
    rows = found.set_index(["reading", "source"])["rows"]
    assert rows["one number a run, seeds as blocks", "β"] == 3 * 4
    assert rows["with interactions, all cells", "β"] == 2 * 3 * 4
    assert factorial.analyses(grid[grid["gamma"] == 1], ["beta", "gamma"], True)[
        "source"
    ].unique().tolist() == ["β"]
    one = grid[(grid["gamma"] == 1) & (grid["beta"] == 0.1)]
    assert factorial.analyses(one, ["beta", "gamma"], True).empty


def losses(euclid=0.0, cosine=0.0, elementwise=0.0, seeds=3, noise=0.2):
    rng, rows = np.random.default_rng(1), []
    for task, seed in itertools.product(("CoLA", "RTE"), range(seeds)):
        rows.append(
            row(task, seed, 50, "undistilled", factor="base", alpha=0.0, beta=0.0, gamma=0.0)
        )
        for m, gain in (("euclid", euclid), ("cosine", cosine), ("elementwise", elementwise)):
            factor, level = ("base", "") if m == "euclid" else ("manifold", report.LOSS[m])
            rows.append(
                row(
                    task, seed, 50 + gain + noise * rng.normal(), loss=m, factor=factor, level=level
                )
            )
    return pd.DataFrame(rows)


def test_medians_stand_beside_the_papers():
    printed = report.printed_cells(chapter.published(2).query("student == 'BERT-base'"))
    df = factorial.losses(
        pd.concat([losses(2.0, 1.0, -1.0, noise=0), study().query("factor == 'grid'")])
    )
    said = {"euclid": "0.36", "elementwise": "−0.05"}
    gains = report.gain_cells(df)
    table = factorial.loss_table(gains, printed, said, "median").set_index("loss")
    assert table["measured median"].to_dict() == {
        "cosine": 1.0,
        "Euclid": 2.0,
        "element-wise": -1.0,
    }
    assert (table["measured cells"] == 6).all()
    # the medians of Table 2, as the audit of the paper has them
    assert table["published in the table"].round(2).to_dict() == {
        "cosine": 0.85, "Euclid": 1.15, "element-wise": 0.85}  # fmt: skip
    assert table["published in the text"].to_list() == ["–", "0.36", "−0.05"]
    cells = report.printed_cells(chapter.published(11))
    mean = factorial.loss_table(gains, cells, {}, "mean")
    assert mean["published in the table"].round(1).to_list() == [0.9, 0.5, 0.5]  # as section 5.2


@pytest.mark.parametrize(
    "df, outcome",
    [(losses(), "reproduced"), (losses(cosine=5.0), "not reproduced"), (losses(noise=5.0), "undecided"),
     (losses(seeds=2), "undecided")],
)  # fmt: skip
def test_equally_effective_needs_the_whole_interval_inside_the_margin(df, outcome):
    arms = factorial.by_loss(df)
    assert list(arms) == ["cosine", "euclid", "elementwise"]
    got, text = factorial.alike(arms)
    assert got == outcome, text
    assert text.count(" minus ") == 3


def test_one_loss_is_like_nothing():
    assert (
        factorial.alike(factorial.by_loss(losses().query("manifold == 'euclid'")))[0] == "undecided"
    )


def series(values: dict) -> pd.Series:
    return pd.Series(values).rename_axis(["task", "seed"])


UP = series({(t, s): 1.0 + 0.1 * s for t in "ab" for s in range(3)})
UNSURE = series({("a", 0): 3.0, ("a", 1): -1.0, ("a", 2): 1.0})


@pytest.mark.parametrize(
    "given, outcome",
    [
        ({"x": UP}, "reproduced"),
        ({"x": UP, "y": UNSURE}, "direction agrees"),
        ({"x": UP, "y": -UP}, "not reproduced"),
        ({"x": UP[UP.index.get_level_values("seed") < 2]}, "undecided"),
        ({"x": UP, "y": UP[:0]}, "undecided"),
        ({}, "undecided"),
    ],
)
def test_the_verdict_on_effects_follows_its_criterion(given, outcome):
    got, text = factorial.judge(given)
    assert got == outcome, text


def test_a_verdict_counts_the_tasks_that_gain():
    mixed = pd.concat([UP, series({("c", s): -0.5 for s in range(3)})])
    text = factorial.judge({"x": mixed}, "test sets")[1]
    assert "mean over 3 test sets; above zero on 2 of 3" in text
    assert "not run" in factorial.judge({"x": UP[:0]})[1]


def test_gaps_are_printed_with_true_minus_signs():
    assert (
        ablation.gap([]) == "–"
        and ablation.gap([-1.25]) == "−1.2"
        and ablation.gap([1, 2]) == "+1.5"
    )
    assert ablation.gap([-1.0, -1.0, -1.3]).startswith("−1.1 [−1.5, −0.7]")
