"""Analysis of variance against scipy and against sums of squares by hand."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from armada_lib.anova import anova

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


@pytest.mark.parametrize(
    "df, factors, message",
    [(FRAME, ["los"], "missing column.*'los'"), (FRAME, [], "one or two factors"),
     (FRAME[FRAME["teacher"] == "x"], ["teacher"], "fewer than two levels")],
)  # fmt: skip
def test_what_cannot_be_compared_is_refused(df, factors, message):
    with pytest.raises(ValueError, match=message):
        anova(df, "gain", factors)
