"""Analysis of variance against scipy and against sums of squares by hand."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from armada_lib import chapter, report
from armada_lib.anova import anova, readings

RNG = np.random.default_rng(3)
FRAME = pd.DataFrame(
    [{"loss": a, "teacher": b, "gain": k + 2 * (b == "y") + e}
     for k, a in enumerate("rst") for b in "xy" for e in RNG.normal(size=4)]
)  # fmt: skip


def test_one_way_is_scipys():
    found = anova(FRAME, "gain", ["loss"]).set_index("source")
    f, p = stats.f_oneway(*(g["gain"] for _, g in FRAME.groupby("loss")))
    assert found.loc["loss", "F"] == pytest.approx(f) and found.loc["loss", "p"] == pytest.approx(p)
    assert found.loc["residual", "df"] == len(FRAME) - 3


def test_two_way_is_its_sums_of_squares():
    found = anova(FRAME, "gain", ["loss", "teacher"]).set_index("source")
    y, mean = FRAME["gain"], FRAME["gain"].mean()
    cells = FRAME.groupby(["loss", "teacher"])["gain"]
    within = (cells.transform("mean") - y).pow(2).sum() / (len(FRAME) - 6)
    for factor, levels in (("loss", 3), ("teacher", 2)):
        between = (FRAME.groupby(factor)["gain"].transform("mean") - mean).pow(2).sum()
        f = between / (levels - 1) / within  # the design is balanced: all types of squares agree
        assert found.loc[factor, "F"] == pytest.approx(f)
        assert found.loc[factor, "p"] == pytest.approx(stats.f.sf(f, levels - 1, len(FRAME) - 6))
    assert "loss x teacher" in found.index


def test_without_repeats_there_is_no_interaction():
    one = FRAME.groupby(["loss", "teacher"], as_index=False).first()
    assert anova(one, "gain", ["loss", "teacher"])["source"].tolist() == [
        "loss",
        "teacher",
        "residual",
    ]
    single = one[one["teacher"] == "x"]
    assert anova(single, "gain", ["loss"])["F"].isna().all()


def test_every_reading_of_the_papers_own_cells():
    """The p-values that the paper prints or implies, recomputed from Table 11."""
    cells = report.printed_cells(chapter.published(11))
    found = readings(cells).set_index(["factor", "reading"])
    group = lambda df, by: [g["gain"] for _, g in df.groupby(by)]
    best = lambda by: cells.groupby(["task", by], as_index=False)["gain"].max()
    for factor, other in (("loss", "teacher"), ("teacher", "loss")):
        all_cells = stats.f_oneway(*group(cells, factor))
        assert found.loc[(factor, "all cells"), "p"] == pytest.approx(all_cells.pvalue)
        of_best = stats.f_oneway(*group(best(factor), factor))
        row = found.loc[(factor, f"best {other} for each task")]
        assert row["p"] == pytest.approx(of_best.pvalue) and row["rows"] == 15
    assert found.loc[("loss", "best teacher for each task"), "p"] == pytest.approx(0.52, abs=5e-3)
    # tasks as blocks: the same squares between losses, less noise
    y = cells["gain"] - cells.groupby("task")["gain"].transform("mean")
    between = 15 * (cells.assign(y=y).groupby("loss")["y"].mean() ** 2).sum()
    f = between / 2 / (((y**2).sum() - between) / (45 - 3 - 4))
    assert found.loc[("loss", "all cells, tasks as blocks"), "F"] == pytest.approx(f)


def test_readings_of_one_teacher_compare_losses_alone():
    one = readings(report.printed_cells(chapter.published(4)))
    assert set(one["factor"]) == {"loss"} and len(one) == 2
    assert readings(one.assign(task="a", loss="b", teacher="c", gain=1.0)).empty


@pytest.mark.parametrize(
    "df, factors, message",
    [(FRAME, ["los"], "missing column.*'los'"), (FRAME, [], "one to three factors"),
     (FRAME[FRAME["teacher"] == "x"], ["teacher"], "fewer than two levels")],
)  # fmt: skip
def test_what_cannot_be_compared_is_refused(df, factors, message):
    with pytest.raises(ValueError, match=message):
        anova(df, "gain", factors)
