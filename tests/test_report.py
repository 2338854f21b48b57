"""From runs to tables: pairing by seed, the paper's numbers beside the right rows, fair verdicts."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest

from armada_lib import chapter, diagnosis, report, stats


def frame(rows):
    """rows: (task, method, manifold, seed, score)"""
    titles = {"cola": "CoLA", "rte": "RTE", "copa": "COPA"}
    return pd.DataFrame([
        {"profile": "mini", "task": t, "title": titles[t], "student": "bert-6l", "teacher": "sd14", "method": m,
         "manifold": loss, "reading": None if m == "undistilled" else "paper", "alpha": 0.5, "beta": 0.1,
         "gamma": 1.0, "usual_beta": True, "split": "validation", "seed": s, "metric": "accuracy",
         "head": "student", "score": float(score), "collapsed": score == 0, "majority_share": 0.5,
         "evaluation": 10, "seconds": 1.0, "key": "k"}
        for t, m, loss, s, score in rows
    ])  # fmt: skip


def study(
    gain, control=0.0, seeds=(0, 1, 2), noise=0.3, losses=("cosine", "euclid", "elementwise")
):
    rng = np.random.default_rng(0)
    rows = []
    for task in ("cola", "rte"):
        for s in seeds:
            base = 50 + 3 * rng.standard_normal()
            rows.append((task, "undistilled", None, s, base))
            rows += [
                (task, "armada", m, s, base + gain + noise * rng.standard_normal()) for m in losses
            ]
            rows.append(
                (task, "shuffled", "euclid", s, base + control + noise * rng.standard_normal())
            )
    return frame(rows)


LOSSES = ["ARMADA cosine", "ARMADA Euclid", "ARMADA element-wise"]


@pytest.mark.parametrize(
    "df, outcome",
    [
        (study(3.0), "reproduced"),
        (study(3.0, control=3.0), "not reproduced"),
        (study(-1.0), "not reproduced"),
        (study(0.6, noise=1.2, seeds=range(3)), "direction agrees"),
        (study(3.0, seeds=(0, 1)), "undecided"),
        (study(3.0).query("method != 'shuffled'"), "undecided"),
    ],
)
def test_the_verdict_follows_its_criterion(df, outcome):
    got, text = report.judge(df, LOSSES)
    assert got == outcome, text


def test_one_loss_alone_can_refute_what_is_said_of_every_loss_and_not_prove_it():
    outcome, text = report.judge(study(3.0), LOSSES[1:2])
    assert outcome == "undecided" and "Not run: cosine, element-wise" in text
    assert report.judge(study(-1.0), LOSSES[1:2])[0] == "not reproduced"


@pytest.mark.parametrize(
    ("manifold", "said"), [("cosine", "cosine"), ("elementwise", "element-wise")]
)
def test_a_loss_is_judged_beside_the_control_with_the_same_loss(manifold, said):
    own = study(0.0, control=3.0).query("method == 'shuffled'").assign(manifold=manifold)
    df = pd.concat([study(3.0), own])
    assert f"shuffled teacher ({said})" in set(report.arms(df)["arm"])
    outcome, text = report.judge(df, LOSSES)
    assert outcome != "reproduced"
    assert text.count(f"over the shuffled teacher ({said})") == 1
    assert text.count("over the shuffled teacher") == 3


def test_differences_are_paired_by_seed_and_use_shared_seeds_only():
    rows = [("cola", "undistilled", None, s, v) for s, v in ((0, 10), (1, 20), (2, 30))]
    rows += [("cola", "armada", "euclid", s, v) for s, v in ((2, 33), (0, 11), (1, 22), (7, 99))]
    d = report.differences(frame(rows), "ARMADA Euclid").iloc[0]
    want = stats.paired_t([11, 22, 33], [10, 20, 30])
    assert (d["n"], d["mean"]) == (3, pytest.approx(2.0))
    assert (d["low"], d["high"], d["p"]) == pytest.approx((want.low, want.high, want.p))


def test_words_for_few_seeds_and_signs_of_small_numbers():
    assert report.too_few(1) == "With 1 seed no interval decides anything."
    assert report.too_few(2, "test") == "With 2 seeds no test decides anything."
    assert [report.signed(x) for x in (-0.04, 0.04, -0.06)] == ["+0.0", "+0.0", "−0.1"]


def test_one_seed_has_a_mean_and_no_interval():
    df = frame([("cola", "undistilled", None, 0, 10), ("cola", "armada", "euclid", 0, 12)])
    assert math.isnan(report.differences(df, "ARMADA Euclid").iloc[0]["low"])
    assert report.gain_grid(df).iloc[0].to_dict() == {
        "trained as": "ARMADA Euclid", "CoLA": "+2.0", "mean over tasks": "+2.0",
    }  # fmt: skip


def test_the_average_uses_the_same_tasks_for_every_seed():
    rows = [("cola", "undistilled", None, s, 0) for s in (0, 1)] + [
        ("rte", "undistilled", None, 0, 0)
    ]
    rows += [("cola", "armada", "euclid", s, 2 + s) for s in (0, 1)] + [
        ("rte", "armada", "euclid", 0, 100)
    ]
    a = report.average(report.by_arm(frame(rows)), "ARMADA Euclid")
    assert (a["mean"], a["n"], a["tasks"]) == (2.5, 2, 1)


def test_arms_of_two_teachers_are_told_apart():
    df = frame([("cola", "undistilled", None, 0, 50), ("cola", "armada", "euclid", 0, 53),
                ("cola", "armada", "euclid", 0, 51)])  # fmt: skip
    df["teacher"] = [None, "sd14", "speecht5"]
    assert report.arms(df)["arm"].tolist() == [
        "undistilled", "ARMADA Euclid, sd14", "ARMADA Euclid, speecht5"]  # fmt: skip
    cells = report.gain_cells(df)
    assert cells[["task", "loss", "teacher", "gain"]].values.tolist() == [
        ["CoLA", "euclid", "sd14", 3.0], ["CoLA", "euclid", "speecht5", 1.0]]  # fmt: skip


def test_a_run_without_a_manifold_loss_has_an_arm():
    df = frame([("cola", "armada", None, 0, 53), ("cola", "armada", "euclid", 0, 51)])
    df["usual_beta"] = [False, True]
    df.loc[0, "beta"] = 0.0
    assert report.arms(df)["arm"].tolist() == ["ARMADA Euclid", "ARMADA no manifold loss (β = 0)"]


def test_a_baselines_own_teacher_is_no_part_of_its_name():
    rows = [("cola", "armada", "euclid", 0, 53), ("cola", "visualbert", None, 0, 51),
            ("cola", "vid_voken_clip", None, 0, 52)]  # fmt: skip
    df = frame(rows)
    df["teacher"] = ["sd14", "sd14", "blackbox"]
    assert set(report.arms(df)["arm"]) == {"ARMADA Euclid", "VisualBERT", "Vid-Voken w/CLIP"}
    df["teacher"], df["method"] = (
        ["sd14", "sd14", "blackbox"],
        ["armada", "visualbert", "visualbert"],
    )
    assert set(report.arms(df)["arm"]) == {
        "ARMADA Euclid", "VisualBERT, sd14", "VisualBERT, blackbox"}  # fmt: skip


def test_published_cells_are_gains_without_the_average():
    cells = report.printed_cells(chapter.published(4))
    assert len(cells) == 3 * 8 and "average" not in set(cells["task"])
    one = chapter.published(4).set_index(["task", "method", "manifold_loss"])["value"]
    found = cells[(cells["task"] == "AQuA") & (cells["loss"] == "cosine")]["gain"].item()
    expected = one["AQuA", "ARMADA", "cosine"] - one["AQuA", "undistilled", "none"]
    assert found == pytest.approx(expected)


def test_published_numbers_stand_beside_the_right_rows():
    rows = [
        ("cola", "undistilled", None, 0, 10),
        ("cola", "armada", "euclid", 0, 12),
        ("cola", "shuffled", "euclid", 0, 9),
    ]
    out = report.scores(frame(rows), chapter.published(2)).set_index("trained as")
    printed = chapter.published(2).query("student == 'BERT-6L' and task == 'CoLA'")
    base = printed.query("method == 'undistilled'").iloc[0]
    euclid = printed.query("manifold_loss == 'euclid'").iloc[0]
    assert out.loc["undistilled", "published"] == base["printed"]
    assert out.loc["ARMADA Euclid", "published"] == euclid["printed"]
    assert out.loc["ARMADA Euclid", "published gain"] == f"{euclid['value'] - base['value']:+.1f}"
    assert out.loc["shuffled teacher", "published"] == "–"
    assert out.loc["ARMADA Euclid", "measured gain"] == "+2.0"


def test_a_collapsed_run_is_flagged_and_counted_not_dropped():
    rows = [("cola", "undistilled", None, s, 10) for s in (0, 1)] + [
        ("cola", "armada", "euclid", s, v) for s, v in ((0, 0), (1, 12))
    ]
    out = report.scores(frame(rows)).set_index("trained as")
    assert (
        out.loc["ARMADA Euclid", "collapsed"] == "1 of 2" and out.loc["ARMADA Euclid", "seeds"] == 2
    )
    assert out.loc["ARMADA Euclid", "measured"].startswith("6.0")


def test_centred_correlation_removes_the_level_of_the_tasks():
    rows = []
    for task, level in (("cola", 10), ("rte", 50), ("copa", 90)):
        for i, loss in enumerate(("cosine", "euclid", "elementwise")):
            for head, value in (("student", level + i), ("student_aux", level - i)):
                rows.append(frame([(task, "armada", loss, 0, value)]).assign(head=head))
    r = diagnosis.head_correlation(pd.concat(rows), "student", "student_aux")
    assert r["pairs"] == 9 and r["plain"] == pytest.approx(0.8)
    assert r["centred"] == pytest.approx(-1)


def test_heads_of_one_task_are_means_over_losses():
    df = pd.concat(
        [
            frame([("cola", "armada", m, 0, v)]).assign(head="aligner")
            for m, v in (("euclid", 4), ("cosine", 8))
        ]
    )
    row = diagnosis.heads(df, chapter.published(6), chapter.published(10), "sd14").iloc[0]
    assert row["measured aligner"] == 6 and row["published aligner"] == "7.8"


def test_one_beta_is_chosen_for_all_losses_and_collapses_show():
    rows = [frame([("cola", "armada", m, 0, v)]).assign(beta=b) for m, b, v in
            (("cosine", 0.1, 10), ("cosine", 1.0, 12), ("euclid", 0.1, 9), ("euclid", 1.0, 0))]  # fmt: skip
    out = diagnosis.beta_choice(pd.concat(rows))
    assert out[out["chosen"] == "yes"][["loss", "beta"]].values.tolist() == [["all three", "0.1"]]
    assert "0.0 (collapsed)" in out["CoLA"].tolist()


def test_the_aligners_cells_are_tasks_because_no_loss_reaches_it():
    rows = [frame([(task, "armada", loss, 0, value)]).assign(head=head)
            for i, task in enumerate(("cola", "rte", "copa")) for loss in ("cosine", "euclid")
            for head, value in (("aligner", i), ("aligner_aux", -i))]  # fmt: skip
    r = diagnosis.head_correlation(pd.concat(rows), "aligner", "aligner_aux")
    assert r["pairs"] == 3 and r["plain"] == pytest.approx(-1) and math.isnan(r["centred"])
