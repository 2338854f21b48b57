"""Ranks, costs and the verdict on baselines, against hand counts and known distributions."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from armada_lib import chapter, comparison, report
from armada_lib.methods import MULTIMODAL, TABLE_8

METHODS = {"undistilled": None, "kd": None, "dml": None, "armada": "euclid"}


def frame(score) -> pd.DataFrame:
    """`score(task number, seed, method)` for two tasks and three seeds."""
    titles = {"cola": "CoLA", "rte": "RTE"}
    return pd.DataFrame([
        {"profile": "mini", "task": t, "title": titles[t], "student": "minilm-3l", "teacher": None,
         "method": m, "manifold": loss, "reading": "paper" if loss else None, "usual_beta": True,
         "beta": 0.1, "seed": s, "head": "student", "score": float(score(k, s, m)), "collapsed": False}
        for k, t in enumerate(titles) for s in range(3) for m, loss in METHODS.items()
    ])  # fmt: skip


ORDER = {"undistilled": 0, "armada": 1, "kd": 2, "dml": 3}


def test_ranks_are_averages_over_tasks_first():
    found = comparison.ranks(frame(lambda k, s, m: ORDER[m])).set_index("arm")
    assert found["rank"].to_dict() == {"DML": 1, "KD": 2, "ARMADA Euclid": 3, "undistilled": 4}
    assert (found["low"] == found["rank"]).all() and (found["high"] == found["rank"]).all()
    # Demsar's table: q = 2.569 for four methods; two tasks
    assert found["critical"].iloc[0] == pytest.approx(2.569 * np.sqrt(4 * 5 / 12), abs=2e-3)
    # one task with three seeds against the other with one: each task counts once
    df = frame(lambda k, s, m: ORDER[m] if k == 0 else -ORDER[m])
    df = df[(df["task"] == "cola") | (df["seed"] == 0)]
    assert (comparison.ranks(df)["rank"] == 2.5).all()
    ties = comparison.ranks(frame(lambda k, s, m: 7))
    assert (ties["rank"] == 2.5).all()


def test_what_not_every_arm_ran_is_not_ranked():
    df = frame(lambda k, s, m: ORDER[m])
    part = df[~((df["method"] == "kd") & (df["task"] == "rte"))]
    assert comparison.ranks(part)["n"].tolist() == [1] * 4
    with pytest.raises(ValueError, match="no task was run by every arm"):
        comparison.ranks(df[~((df["method"] == "kd") & (df["seed"] < 3) & (df["task"] == "rte"))]
                         .query("not (method == 'dml' and task == 'cola')"))  # fmt: skip


@pytest.mark.parametrize("gap, noise, outcome", [
    (0.2, 0.1, "reproduced"), (-4.0, 0.1, "not reproduced"), (4.0, 0.1, "not reproduced"),
    (0.0, 9.0, "undecided")])  # fmt: skip
def test_equally_effective_means_an_interval_within_the_margin(gap, noise, outcome):
    wobble = (-noise, 0.0, noise)
    df = frame(lambda k, s, m: 50 + (gap + wobble[s] if m == "armada" else 0))
    got, text = comparison.equally_effective(df, "ARMADA Euclid", ["KD", "DML"])
    assert got == outcome
    assert f"{gap:+.1f}".replace("-", "−") in text and "2 baselines" in text


def test_the_verdict_names_the_arms_and_the_parameters():
    df = frame(lambda k, s, m: 50 + (5 if m == "armada" else 0))
    table = pd.DataFrame(
        {"method": ["KD", "ARMADA"], "added": [9e9, 1.234e6], "share": [0.0, 5.678]}
    )
    want = comparison.equally_effective(df, "ARMADA Euclid", ["DML", "KD"])
    light = " It trains 1.23 million parameters besides the student's, 5.7 % of those."
    assert comparison.verdict(df, table) == (want[0], want[1] + light)
    assert want[0] == "not reproduced" and "2 baselines" in want[1]
    without = comparison.verdict(df.query("method != 'armada'"), table.iloc[:1])
    assert without[0] == "undecided" and "million" not in without[1]


def test_two_seeds_decide_nothing():
    df = frame(lambda k, s, m: 50).query("seed < 2")
    assert comparison.equally_effective(df, "ARMADA Euclid", ["KD"])[0] == "undecided"
    assert comparison.equally_effective(df, "ARMADA cosine", ["KD"])[0] == "undecided"


def test_quoted_and_run_rows_are_apart():
    board = comparison.scoreboard(frame(lambda k, s, m: 50 + s), chapter.published(7))
    assert set(board["row"]) == {"published, quoted", "measured again", "measured, ARMADA"}
    quoted = board[board["row"] == "published, quoted"].set_index("method")
    printed = chapter.published(7).query("method == 'KD'").set_index("task")["printed"]
    assert quoted.loc["KD", "CoLA"] == printed["CoLA"] and quoted.loc["KD", "RTE"] == printed["RTE"]
    assert set(quoted.index) == set(chapter.published(7)["method"])
    own = board[board["row"] != "published, quoted"].set_index("method")
    assert own["row"].to_dict() == {
        "undistilled": "measured again", "KD": "measured again", "DML": "measured again",
        "ARMADA Euclid": "measured, ARMADA",
    }  # fmt: skip
    assert own.loc["KD", "CoLA"] == "51.0 ± 1.0" and own.loc["KD", "mean"] == "51.0"
    assert set(own.index) == {"undistilled", "KD", "DML", "ARMADA Euclid"}
    some = frame(lambda k, s, m: 50 + s).query("method != 'kd' or task != 'cola'")
    board = comparison.scoreboard(some, chapter.published(7))
    own = board[board["row"] == "measured again"].set_index("method")
    assert own.loc["KD", "mean"] == own.loc["KD", "CoLA"] == "–"  # no mean over other tasks
    assert own.loc["DML", "mean"] == "51.0"


def test_costs_are_relative_to_the_undistilled_student_of_the_same_task():
    def run(method, task, step, **facts):
        spec = type("S", (), {"method": method, "task": task})
        base = {
            "steps": 10,
            "train_seconds": 10 * step,
            "branch_parameters": 0,
            "peak_memory": 5.0,
            "student_parameters": 50_000,
        }
        return {"spec": spec, "facts": base | facts}

    found = comparison.costs([
        run("undistilled", "cola", 1.0), run("undistilled", "rte", 4.0),
        run("kd", "cola", 2.0), run("kd", "rte", 8.0),
        run("armada", "cola", 1.5, branch_parameters=100, method_parameters=900),
    ]).set_index("method")  # fmt: skip
    assert found["step"].to_dict() == {"undistilled": 1.0, "KD": 2.0, "ARMADA": 1.5}
    assert found.loc["ARMADA", "added"] == 1000 and found.loc["KD", "runs"] == 2


def test_every_baseline_of_table_7_has_its_printed_name():
    printed = set(chapter.published(7)["method"]) - {"ARMADA"}
    assert printed <= set(report.BASELINES.values())


def test_a_stage_is_part_of_the_cost():
    stage = {"epochs": 3, "train_seconds": 30.0, "parameters": 700, "peak_memory": 9.0}

    def run(method, memory=5.0, **facts):
        spec = type("S", (), {"method": method, "task": "cola"})
        base = {
            "steps": 10,
            "train_seconds": 10.0,
            "branch_parameters": 0,
            "peak_memory": memory,
            "student_parameters": 1000,
        }
        return {"spec": spec, "facts": base | facts}

    runs = [run("undistilled"), run("vilbert", stage=stage), run("vilbert", memory=11.0, stage=stage),
            run("x_adapter", method_parameters=20)]  # fmt: skip
    found = comparison.costs(runs).set_index("method")
    assert found["stage_epochs"].to_dict() == {"undistilled": 0, "ViLBERT": 3, "X-adapter": 0}
    assert found["stage_time"].to_dict() == {"undistilled": 0, "ViLBERT": 3, "X-adapter": 0}
    assert found["added"].to_dict() == {"undistilled": 0, "ViLBERT": 700, "X-adapter": 20}
    assert found["share"].to_dict() == {"undistilled": 0, "ViLBERT": 70, "X-adapter": 2}
    assert found["memory"].to_dict() == {"undistilled": 5, "ViLBERT": 10, "X-adapter": 5}
    assert found["step"].to_dict() == {"undistilled": 1, "ViLBERT": 1, "X-adapter": 1}
    assert "stage_epochs" not in comparison.costs(runs[::3])


def test_every_baseline_of_table_8_has_its_printed_name():
    printed = set(chapter.published(8)["method"])
    assert printed == set(TABLE_8)
    assert {report.BASELINES[m] for m in TABLE_8.values() if m != "armada"} == printed - {"ARMADA"}
    assert set(report.BASELINES) >= set(MULTIMODAL)
    board = comparison.scoreboard(
        frame(lambda k, s, m: 50).assign(title="QQP"), chapter.published(8)
    )
    quoted = board[board["row"] == "published, quoted"].set_index("method")["QQP"]
    assert quoted["Vid-Voken w/CLIP"] == "89.0" and set(quoted.index) == printed
