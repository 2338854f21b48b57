"""What the numbers come to: contrasts with controls, counts, the verdict, and the tables of a page."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from looked import numbers
from scipy.stats import t as student_t
from scipy.stats import ttest_ind

from armada_lib import analysis, analysis_tables, chapter, findings

ARMADA, SHUFFLED, RANDOM = "ARMADA Euclid", "shuffled teacher", "random teacher"


@pytest.fixture(scope="module")
def found():
    return numbers()


def invented(monkeypatch, gap: float, seeds: int = 3, noise: float = 0.01):
    """Measures in which ARMADA differs from every other arm by `gap` in the claimed direction."""
    rng, rows = np.random.default_rng(0), []
    for name, m in findings.MEASURES.items():
        for arm in (ARMADA, "undistilled", "frozen aligner", SHUFFLED, RANDOM):
            for task in ("CoLA", "COPA"):
                for seed in range(seeds):
                    value = noise * rng.normal() + (m.sign * gap if arm == ARMADA else 0)
                    rows.append((task, seed, arm, name, value))
    df = pd.DataFrame(rows, columns=["task", "seed", "arm", "measure", "value"])
    monkeypatch.setattr(findings, "measures", lambda frames: df)
    return {"about": pd.DataFrame([{"main": "euclid"}])}, df


@pytest.mark.parametrize(
    "gap, seeds, noise, outcome",
    [(1, 3, 0.01, "reproduced"), (1, 3, 3.0, "direction agrees"), (-1, 3, 0.01, "not reproduced"),
     (1, 2, 0.01, "undecided")],
)  # fmt: skip
def test_the_verdict_follows_its_criterion(monkeypatch, gap, seeds, noise, outcome):
    if outcome == "direction agrees":  # noise that leaves means and not intervals on that side
        gap = 4.0
    frames, _ = invented(monkeypatch, gap, seeds, noise)
    said, text = findings.judge(frames)
    assert said == outcome, text
    assert all(m.about in text for m in findings.MEASURES.values())


def test_one_control_that_gets_as_far_is_enough_for_no(monkeypatch):
    frames, df = invented(monkeypatch, 1.0)
    own = (df["measure"] == "purity") & (df["arm"] == ARMADA)
    df.loc[(df["measure"] == "purity") & (df["arm"] == SHUFFLED), "value"] = (
        df.loc[own, "value"].to_numpy() + 0.5
    )
    assert findings.judge(frames)[0] == "not reproduced"
    df.drop(df[df["arm"] == RANDOM].index, inplace=True)  # a control that was not run
    assert findings.judge(frames)[0] == "undecided"


def test_a_contrast_is_the_mean_over_tasks_with_its_t_interval_over_seeds(monkeypatch):
    frames, df = invented(monkeypatch, 1.0, noise=0.5)
    row = findings.contrasts(frames).query("measure == 'loss' and against == 'frozen aligner'")
    wide = df[df["measure"] == "loss"].pivot_table(
        index=["seed", "task"], columns="arm", values="value"
    )
    each = (wide[ARMADA] - wide["frozen aligner"]).groupby("seed").mean()
    half = student_t.ppf(0.975, 2) * each.std(ddof=1) / math.sqrt(3)
    assert row["mean"].item() == pytest.approx(each.mean())
    assert row["low"].item() == pytest.approx(each.mean() - half)
    assert (row["seeds"].item(), row["tasks"].item()) == (3, 2)


def test_a_change_of_the_undistilled_student_is_that_of_its_next_seed(found):
    df = findings.measures(found)
    assert analysis.AGAIN not in set(df["arm"])
    s = found["silhouettes"].query(
        "arm == @analysis.AGAIN and scenario == '1' and space == 'hidden' and metric == 'euclidean'"
    )
    own = df.query("arm == 'undistilled' and measure == 'scenario 1'").sort_values(["task", "seed"])
    s = s.assign(change=s["distilled"] - s["undistilled"]).sort_values(["task", "seed"])
    assert own["value"].tolist() == pytest.approx(s["change"].tolist())
    sensitive = df.query("measure == 'sensitivity'")
    assert set(sensitive["arm"]) == {ARMADA, SHUFFLED}


def test_the_board_has_every_arm_and_averages_tasks_before_seeds(found):
    board = findings.board(found).set_index("trained as")
    assert {ARMADA, SHUFFLED, RANDOM, "added layers only", "frozen aligner"} <= set(board.index)
    c = found["clusters"].query("labels == 'gold' and arm == @ARMADA")
    each = (c["purity"] - c["majority"]).groupby(c["seed"]).mean()
    assert board.loc[ARMADA, "purity"] == f"{each.mean():.3f} ± {each.std(ddof=1):.3f}"
    others = findings.board(found, findings.OTHERS).set_index("trained as")
    assert list(others.index) == list(board.index) and not set(others) & set(board)
    assert others.loc["added layers only", "sensitivity"] == "–"


def test_numbers_have_true_signs():
    assert findings.number(-0.001, 2) == "0.00" and findings.number(-1.25, 1) == "−1.2"
    assert findings.number(0.5, 1, "+") == "+0.5" and findings.number(math.nan, 1) == "–"
    assert findings.spread(pd.Series([1.0, 3.0]), 1) == "2.0 ± 1.4"
    assert findings.spread(pd.Series([1.0, math.nan]), 1) == "1.0"


def test_the_tally_counts_what_the_paper_says(found):
    tally = findings.tally(found).set_index("statement")
    a = found["alignment"].query("when == 'after' and split == 'held' and to == 'real'")
    near = a.pivot_table(index=["task", "seed"], columns="arm", values="elementwise")
    losses = [c for c in near if c.startswith("ARMADA")]
    best = (near[losses].idxmin(axis=1) == "ARMADA element-wise").sum()
    first = tally.iloc[0]
    assert first["measured"] == f"{best} of 4" and len(losses) == 3
    t = found["steps"][found["steps"]["arm"].str.startswith("frozen")]
    up = (t.groupby(["task", "arm"])["t"].mean() > 0).sum()
    row = tally.loc["higher training loss with the frozen aligner than with the trained aligner"]
    assert row.to_dict() == {"published": "21 of 24", "measured": f"{up} of 6"}


# -- tables ----------------------------------------------------------------------------------------


def test_published_and_measured_silhouettes_stand_apart(found):
    table = analysis_tables.scenarios(found, chapter.published(13)).set_index(
        ["task", "distilled as"]
    )
    assert table.loc[("CoLA", ARMADA), "published scenario 1"] == "0.31 → 0.52"
    assert table.loc[("COPA", ARMADA), "published scenario 2"] == "0.59 → 0.38"
    assert (table.drop(index=ARMADA, level=1)["published scenario 1"] == "–").all()
    own = found["silhouettes"].query(
        "task == 'COPA' and arm == @SHUFFLED and scenario == '2' and space == 'hidden' "
        "and metric == 'euclidean'"
    )
    shown = f"{own['undistilled'].mean():.2f} → {own['distilled'].mean():.2f}".replace("-", "−")
    assert table.loc[("COPA", SHUFFLED), "measured scenario 2"] == shown


def test_every_reading_of_the_silhouette_is_shown(found):
    table = analysis_tables.label_choices(found)
    assert len(table) == 2 * 3 and set(table["metric"]) == {"euclidean", "cosine"}
    assert {"gold labels, scenario 1", "gold labels, scenario 2", "correctness, both"} <= set(table)
    assert (table["space"] == "map, first seed").sum() == 2


def test_losses_are_tested_over_steps_and_over_seeds(found):
    table = analysis_tables.loss_table(found, chapter.published(15)).set_index(
        ["task", "minus trained"]
    )
    assert table.loc[("CoLA", "frozen aligner"), "published t"] == "+6.54"
    assert table.loc[("CoLA", "frozen aligner (cosine)"), "published t"] == "+6.75"
    assert table.loc[("CoLA", SHUFFLED), "published t"] == "–"
    m = found["losses"].query("task == 'CoLA'").set_index("arm")["mean"]
    expected = ttest_ind(m[SHUFFLED], m[ARMADA], equal_var=False)
    assert table.loc[("CoLA", SHUFFLED), "t over seeds"] == pytest.approx(expected.statistic)
    steps = found["steps"].query("task == 'CoLA' and arm == @SHUFFLED")["t"]
    span = f"{steps.min():+.2f} to {steps.max():+.2f}".replace("-", "−")
    assert table.loc[("CoLA", SHUFFLED), "measured t per step"] == span


def test_sensitivity_stands_beside_what_seeds_alone_give(found):
    table = analysis_tables.sensitivity_table(found).set_index(["task", "trained as"])
    still = found["noise"].query(
        "task == 'CoLA' and arm == 'ARMADA' and sigma == 0 and head == 'student'"
    )["score"]
    assert len(still) == 2
    chance = np.var(still, ddof=1) / np.var([0, 1, 2, 5], ddof=1)
    assert table.loc[("CoLA", "ARMADA"), "seeds alone"] == f"{chance:.2f}"
    draws = np.random.default_rng(0).normal(size=(20000, 4))  # scores that sigma does not move
    mean = (draws.var(axis=1) / np.var([0, 1, 2, 5])).mean()
    assert mean == pytest.approx(1 / np.var([0, 1, 2, 5], ddof=1), rel=0.02)


@pytest.mark.parametrize(
    "name", ["example_table", "reduction_table", "cluster_table", "alignment_table"]
)
def test_the_other_tables_have_every_task(found, name):
    table = getattr(analysis_tables, name)(found)
    assert set(table["task"]) == {"CoLA", "COPA"}
    if name == "alignment_table":
        row = table.set_index(["task", "trained as"]).loc[("CoLA", "undistilled")]
        a = found["alignment"].query(
            "task == 'CoLA' and arm == 'undistilled' and to == 'real' and split == 'held'"
        )
        cka = a.groupby("when")["cka"].mean()
        assert row["measured CKA"] == f"{cka['before']:.2f} → {cka['after']:.2f}"
