"""The paper's claims recomputed: against an independent computation, by hand, and in the limits."""

from __future__ import annotations

import itertools
import math
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats as sps

from armada_lib import audit, chapter
from armada_lib.aligner import TSAligner
from armada_lib.audit import cells, numbers, procedures, sizes
from armada_lib.audit.reading import Reading
from armada_lib.profiles import ROOT, Unknown

DATA = os.environ.get("ARMADA_DATA")  # before the tests hide it
REFERENCE = pd.read_csv(ROOT / "book/published/recomputed.csv", dtype=str)


@pytest.fixture(scope="module")
def live() -> pd.Series:
    found = pd.concat([audit.values(c) for c in audit.PROCEDURES])
    return found.set_index(["claim", "rule", "quantity"])["value"]


# ------------------------------------------------------------- against a second computation


def test_every_recomputed_value_is_that_of_the_second_computation(live):
    wrong = []
    for r in REFERENCE.itertuples():
        key = (r.claim, r.rule, r.quantity)
        value = live.get(key, math.nan)
        if not numbers.agrees(value, r.value):
            wrong.append((*key, value, r.value))
    assert not wrong


def test_every_procedure_has_a_second_computation():
    assert set(REFERENCE["claim"]) == set(audit.PROCEDURES)
    assert not REFERENCE.duplicated(["claim", "rule", "quantity"]).any()
    assert len(REFERENCE) > 350


def test_every_status_is_the_stated_one():
    stated = audit.claims()["status"]
    assert set(stated) <= {*audit.COMPUTED, *audit.STATED}
    assert {c: audit.status_of(c) for c in stated.index} == stated.to_dict()


def test_every_claim_with_numbers_in_tables_is_recomputed():
    """What has no procedure says itself that it rests on a figure or on words."""
    without = set(audit.claims().index) - set(audit.PROCEDURES)
    assert {audit.claims().loc[c, "status"] for c in without} == {
        "figure only",
        "contradicts itself",
    }
    assert not set(audit.PROCEDURES) - set(audit.claims().index)


def test_an_unknown_claim_is_refused():
    with pytest.raises(Unknown, match="unknown claim 'C7'; did you mean 'C"):
        audit.readings("C7")


# ------------------------------------------------------------- by hand


def test_average_gain_by_hand():
    df = chapter.published(2)
    own = df[df["student"] == "BERT-6L"]
    base = own[own["method"] == "undistilled"].set_index("task")["value"]
    top = own[own["method"] == "ARMADA"].groupby("task")["value"].max()
    found = {r.rule: r for r in audit.readings("C07")}[cells.BEST]
    assert found.answers["gain"] == pytest.approx((top - base).mean())
    t = sps.ttest_rel(top.loc[base.index], base, alternative="greater")
    assert (found.beside["t"], found.beside["p"]) == pytest.approx((t.statistic, t.pvalue))


def test_variance_is_scipys():
    own = cells.cells(12)
    f, p = sps.f_oneway(*(g["gain"] for _, g in own.groupby("teacher")))
    found = {r.rule: r for r in audit.readings("C59")}["all cells"]
    assert (found.beside["F"], found.answers["p"]) == pytest.approx((f, p))


def test_rank_correlation_is_scipys():
    six, ten = chapter.published(6), chapter.published(10)
    a = six[six["teacher"] == "midjourney"].set_index("task")["value"]
    b = ten[ten["model"] == "TS-Aligner"].set_index("task")["value"]
    found = {r.rule: r for r in audit.readings("C39")}["Midjourney"]
    assert found.answers["rho"] == pytest.approx(sps.spearmanr(a, b.loc[a.index]).statistic)


def test_centred_heads_tie_where_printed_numbers_are_equal():
    """Differences of printed numbers carry rounding noise, which would rank equal ones."""
    beside = audit.readings("C38")[0].beside
    assert beside["tasks centred"] == pytest.approx(-0.0396, abs=1e-4)


def test_parameters_are_those_of_the_modules():
    from transformers import BertConfig, BertModel

    plain, affine = TSAligner(1024, 2), TSAligner(1024, 2, projection_bias=True)
    own = dict(plain.named_parameters())
    found = {r.rule: r.answers.get("million") for r in audit.readings("C31")}
    weights = sum(p.numel() for n, p in own.items() if "bias" not in n and p.shape[0] != 2)
    assert found["1024-128-768-768, weights"] == weights / 1e6
    assert found["with biases and two heads"] == sum(p.numel() for p in affine.parameters()) / 1e6
    with torch.device("meta"):
        bert = BertModel(BertConfig())
    assert numbers.bert_weights() == sum(p.numel() for p in bert.parameters()) == 109_482_240


def test_propositions_fail_where_they_must():
    found = sizes.first_proposition(cases=300, seed=1)[0]
    assert found.beside["U of the example"] == pytest.approx(math.sqrt(8))
    assert found.beside["U below its bound"] > 30 and not found.holds
    assert found.beside["E < U"] == found.beside["of these with |a||b| <= 2"] == 0


# ------------------------------------------------------------- what a number can be


@pytest.mark.parametrize(
    "value, printed, expected",
    [(3.3625, "3.4", True), (1.45, "1.5", True), (1.45, "1.4", True), (1.66, "1.6", False),
     (-7.8, "-20", False), (0.0003, "0.00", True), (0.006, "0.00", False), (137.5, "100", False),
     (2.11, ">2", True), (1.26, ">2", False), (0.09, "<0.1", True), (math.nan, "1", False)],
)  # fmt: skip
def test_a_value_prints_as_published(value, printed, expected):
    assert numbers.agrees(value, printed) is expected


@pytest.mark.parametrize(
    "text, expected",
    [("t=3.98, p=0.00", ["3.98", "0.00"]), ("t=1.56, p<0.1", ["1.56", "<0.1"]), ("> 2", [">2"]),
     ("5 of 8", ["5", "8"]), ("-20%", ["-20"]), ("0.8M", ["0.8"]), ("p=7e-5, 5e-3", ["7e-5", "5e-3"]),
     ("SST-2 89.3", ["89.3"]), ("3.3/2.1/1.8", ["3.3", "2.1", "1.8"]), ("best", []), ("+76%", ["+76"])],
)  # fmt: skip
def test_numbers_are_read_from_a_claim(text, expected):
    assert numbers.printed_numbers(text) == expected


def test_attainable_is_a_count_of_examples():
    assert (
        numbers.attainable("75.0", 56) == "rounded" and numbers.attainable("78.6", 56) == "rounded"
    )
    assert numbers.attainable("76.7", 56) == "truncated"  # 43 of 56 is 76.786
    assert numbers.attainable("93.1", 56) == "" and numbers.attainable("62.5", 100) == ""
    assert numbers.attainable("100.0", 56) == numbers.attainable("0.0", 56) == "rounded"
    for n, k in itertools.product((56, 277, 408), (0, 1, 13, 55)):
        assert numbers.attainable(f"{100 * k / n:.1f}", n) == "rounded"
    # a set with a finer step than the printed digit attains every value
    assert all(numbers.attainable(f"{v / 10:.1f}", 1043) for v in range(1001))


def test_attainability_counts_every_printed_value():
    found = audit.attainability(2, 4, 5, 6, 10).set_index("test set")
    assert (found[["rounded", "truncated", "neither"]].sum(axis=1) == found["printed"]).all()
    values = [
        p for t in (2, 5, 6, 10) for p in chapter.published(t).query("task == 'CB'")["printed"]
    ]
    possible = {f"{100 * k / 56:.1f}" for k in range(57)}
    possible |= {f"{math.floor(1000 * k / 56) / 10:.1f}" for k in range(57)}
    assert found.loc["CB, validation", "neither"] == sum(v not in possible for v in values)


@pytest.mark.skipif(not DATA, reason="no real data at hand")
def test_split_sizes_are_those_of_the_files():
    files = {("CoLA", "validation"): "glue/cola", ("MRPC", "validation"): "glue/mrpc",
             ("MRPC", "test"): "glue/mrpc", ("RTE", "validation"): "glue/rte",
             ("CB", "validation"): "super_glue/cb", ("COPA", "validation"): "super_glue/copa",
             ("WiC", "validation"): "super_glue/wic"}  # fmt: skip
    known = audit.splits().set_index(["task", "split"])
    for (task, split), folder in files.items():
        labels = pd.read_parquet(Path(DATA) / folder / f"{split}.parquet")["label"]
        row = known.loc[(task, split)]
        assert (row["n"], row["majority"]) == (len(labels), labels.value_counts().max()), task


# ------------------------------------------------------------- readings


def test_a_status_is_what_its_readings_say():
    yes, no, beside = (
        Reading("a", {"x": 1.0}),
        Reading("b", {"x": 2.0}),
        Reading("c", {}, {"x": 3.0}),
    )
    assert audit.status([yes, beside], ["1"]) == "agrees"
    assert audit.status([yes, no], ["1"]) == "agrees under one reading"
    assert audit.status([no], ["1"]) == "differs"
    assert audit.status([beside], ["1"]) is None and audit.status([yes], []) is None
    assert Reading("d", {"x": 1.0}, {}, holds=False).agrees(["1"]) is False
    both = Reading("e", {"x": 3.0, "y": 1.0})
    assert both.agrees([">2"]) is False and both.agrees(["3", "1"]) is True
    with pytest.raises(ValueError, match="2 answers to"):
        both.agrees(["1", "2", "3"])


def test_a_claim_without_anything_to_compare_needs_a_stated_status(monkeypatch):
    changed = audit.claims().copy()
    changed.loc["C42", "status"] = "agrees"
    monkeypatch.setattr(procedures, "claims", lambda: changed)
    with pytest.raises(ValueError, match="C42: nothing to compare"):
        audit.status_of("C42")


def test_rules_side_by_side_mark_what_prints_as_published():
    table, marks = audit.rules_side_by_side()
    row = table.index[(table["student"] == "LLaMA-7B")][0]
    assert {c for i, c in marks if i == row} == {"cosine"}
    eight = table.index[(table["student"] == "BERT-6L") & (table["tables"] == "2")][0]
    assert {c for i, c in marks if i == eight} == {"best of three", "Euclid"}
    outcome, text = audit.one_rule_for_all()
    assert outcome == "not reproduced"
    assert "BERT-base, Tables 2 and 3: 2.8" in text and "LLaMA-7B" not in text


def test_the_overview_has_every_claim_once():
    found = audit.overview()
    assert list(found["id"]) == list(audit.claims().index)
    assert audit.counts().sum() == len(found)
    assert "3.36" in found.set_index("id").loc["C07", "recomputed"]


# ------------------------------------------------------------- the best of several


@pytest.mark.parametrize(
    "n, exact", [(1, 0.0), (2, 1 / math.sqrt(math.pi)), (3, 1.5 / math.sqrt(math.pi))]
)
def test_expected_maximum_is_the_exact_one(n, exact):
    assert numbers.best_of(n) == pytest.approx(exact, abs=1e-9)


def test_the_best_of_none_is_refused():
    with pytest.raises(ValueError, match="the best of how many"):
        numbers.best_of(0)


def test_spread_is_pooled_over_arms():
    frame = pd.DataFrame({"title": "t", "arm": ["a"] * 3 + ["b"] * 3 + ["c"], "seed": [0, 1, 2] * 2 + [0],
                          "score": [1.0, 2.0, 3.0, 10.0, 10.0, 16.0, 99.0]})  # fmt: skip
    with pytest.MonkeyPatch.context() as m:
        m.setattr(numbers.report, "arms", lambda df: df)
        found = numbers.seed_spread(frame).iloc[0]
        # squares around the arms' own means: 2 and 24, four degrees of freedom; c has one seed
        assert (found["arms"], found["df"]) == (2, 4)
        assert found["sd"] == pytest.approx(math.sqrt(26 / 4))
        with pytest.raises(ValueError, match="three seeds"):
            numbers.seed_spread(frame[frame["seed"] < 2])


def test_simulation_and_closed_form_agree():
    spread = pd.DataFrame({"task": ["a", "b"], "sd": [1.0, 3.0]})
    table, gains = numbers.selection(spread, draws=20_000, seed=3)
    error = gains.std(axis=1) / math.sqrt(20_000)
    assert (np.abs(table["simulated"] - table["closed"]) < 4 * error).all()
    both = table.set_index("reported")["in_sd"]
    assert both.iloc[0] == 0 and both.iloc[-1] == pytest.approx(numbers.best_of(9))
    assert both.iloc[3] == pytest.approx(numbers.best_of(9) - numbers.best_of(3))
    again, _ = numbers.selection(spread, draws=20_000, seed=3)
    assert again.equals(table)
    with pytest.raises(ValueError, match="draws"):
        numbers.selection(spread, draws=0)


def test_spread_of_the_mean_of_three_runs():
    """One loss, means of three runs on both sides: a gain of sd sqrt(2 / 3) around zero."""
    spread = pd.DataFrame({"task": ["a"], "sd": [2.0]})
    _, gains = numbers.selection(spread, draws=20_000, seed=0)
    assert gains[0].std() == pytest.approx(2 * math.sqrt(2 / 3), rel=0.03)


# ------------------------------------------------------------- figures


def test_figures_show_what_they_are_given():
    counts = pd.DataFrame({"agrees": [2, 0], "differs": [1, 4]}, index=["a", "b"])
    figure = audit.statuses(counts, {"agrees": "✔"})
    assert [t.get_text() for t in figure.axes[0].texts] == ["2", "1", "4"]
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["✔ agrees", "differs"]
    with pytest.raises(ValueError, match="nothing to count"):
        audit.statuses(counts * 0, {})
    table, _ = numbers.selection(pd.DataFrame({"task": ["a"], "sd": [1.0]}), draws=100)
    shown = audit.selected(table, {"published": 0.44})
    assert len(shown.axes[0].get_yticklabels()) == len(table)
    assert any(line.get_xdata()[0] == 0.44 for line in shown.axes[0].lines)
