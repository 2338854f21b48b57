"""Tests and intervals against hand computation, scipy and simulation."""

from __future__ import annotations

import math
from dataclasses import FrozenInstanceError

import numpy as np
import pytest
from scipy import stats as sps

from armada_lib import stats

A, B = [71.0, 73.5, 70.2, 74.1, 72.0], [70.1, 72.0, 70.5, 72.2, 71.1]


# Means -------------------------------------------------------------------------------------------


def test_summary_by_hand():
    s = stats.summary([1.0, 2.0, 3.0, 4.0])
    assert (s.mean, s.n, s.note) == (2.5, 4, "")
    assert s.sd == pytest.approx(math.sqrt(5 / 3))
    assert s.high - s.mean == pytest.approx(3.182446 * math.sqrt(5 / 3) / 2)  # t(0.975, 3)
    assert s.low == pytest.approx(2 * s.mean - s.high)
    assert str(s) == "2.50 ± 1.29 (n = 4)"
    with pytest.raises(FrozenInstanceError):
        s.mean = 3.0


def test_one_value_has_no_spread_and_says_so():
    s = stats.summary([70.0])
    assert s.mean == 70 and s.n == 1
    assert all(math.isnan(x) for x in (s.sd, s.low, s.high))
    assert "no spread" in s.note
    assert str(s) == "70.00 (n = 1)"
    t = stats.paired_t([70.0], [69.0])
    assert t.difference == 1 and math.isnan(t.p) and math.isnan(t.low) and "one pair" in t.note
    w = stats.welch_t([70.0], [69.0, 68.0])
    assert w.difference == 1.5 and math.isnan(w.p) and "one value" in w.note


@pytest.mark.parametrize("bad", [[], [1.0, math.nan], [1.0, math.inf], [[1.0]]])
def test_bad_values_are_refused(bad: list):
    for call in (stats.summary, lambda x: stats.paired_t(x, x), lambda x: stats.spearman(x, x)):
        with pytest.raises(ValueError, match=r"non-empty|not finite at \[1\]"):
            call(bad)


def test_level_and_alternative_are_checked():
    with pytest.raises(ValueError, match="level"):
        stats.summary(A, level=95)
    with pytest.raises(ValueError, match=r"'larger'.*greater"):
        stats.welch_t(A, B, "larger")


# t tests -----------------------------------------------------------------------------------------


def test_paired_t_by_hand():
    d = np.array(A) - np.array(B)
    t = d.mean() / (d.std(ddof=1) / math.sqrt(5))
    r = stats.paired_t(A, B)
    assert (r.t, r.df, r.n) == (pytest.approx(t), 4, 5)
    assert r.difference == pytest.approx(d.mean()) and r.difference > 0
    assert r.p == pytest.approx(2 * sps.t.sf(t, 4))
    half = sps.t.ppf(0.975, 4) * d.std(ddof=1) / math.sqrt(5)
    assert (r.low, r.high) == (pytest.approx(d.mean() - half), pytest.approx(d.mean() + half))


def test_one_sided_paired_t():
    both, up = stats.paired_t(A, B), stats.paired_t(A, B, "greater")
    assert up.p == pytest.approx(both.p / 2)
    assert up.high == math.inf and up.low > both.low
    assert stats.paired_t(A, B, "less").p == pytest.approx(1 - up.p)


def test_equal_differences_have_no_t():
    same = stats.paired_t(A, A)
    assert (same.difference, same.low, same.high) == (0, 0, 0)
    assert math.isnan(same.p) and "same in every pair" in same.note
    shifted = stats.paired_t([x + 0.1 for x in A], A)  # equal but for rounding
    assert shifted.difference == pytest.approx(0.1) and math.isnan(shifted.t)


def test_welch_t_by_hand():
    a, b = np.array(A), np.array([60.0, 75.0, 70.0])
    va, vb = a.var(ddof=1) / 5, b.var(ddof=1) / 3
    df = (va + vb) ** 2 / (va**2 / 4 + vb**2 / 2)
    t = (a.mean() - b.mean()) / math.sqrt(va + vb)
    r = stats.welch_t(a, b)
    assert (r.t, r.df, r.n) == (pytest.approx(t), pytest.approx(df), 8)
    assert r.p == pytest.approx(2 * sps.t.sf(abs(t), df))
    assert r.low == pytest.approx(r.difference - sps.t.ppf(0.975, df) * math.sqrt(va + vb))
    assert math.isnan(stats.welch_t([1.0, 1.0], [2.0, 2.0]).p)


def test_paired_difference_pairs_by_seed_not_by_position():
    first = {2: 71.0, 0: 70.0, 1: 75.0}
    second = {0: 69.0, 1: 74.5, 2: 70.5}
    r = stats.paired_difference(first, second)
    assert r == stats.paired_t([70.0, 75.0, 71.0], [69.0, 74.5, 70.5])
    assert r != stats.paired_t(list(first.values()), list(second.values()))
    with pytest.raises(ValueError, match=r"only in the first \[2\], only in the second \[\]"):
        stats.paired_difference(first, {0: 1.0, 1: 1.0})
    with pytest.raises(ValueError, match="equal lengths, got 3 and 2"):
        stats.paired_t([1.0, 2.0, 3.0], [1.0, 2.0])


def test_intervals_cover_and_p_values_keep_their_size():
    """1,000 experiments of five seeds; binomial noise of 95 % is 0.7 points, of 5 % the same."""
    rng = np.random.default_rng(3)
    covered, paired, welch = [], [], []
    for _ in range(1000):
        a, b = rng.normal(70, 2, 5), rng.normal(70, 1, 5)
        s = stats.summary(a)
        covered.append(s.low <= 70 <= s.high)
        paired.append(stats.paired_t(a, b).p < 0.05)
        welch.append(stats.welch_t(a, b).p < 0.05)
    assert np.mean(covered) == pytest.approx(0.95, abs=0.025)
    assert np.mean(paired) == pytest.approx(0.05, abs=0.025)
    assert np.mean(welch) == pytest.approx(0.05, abs=0.025)


# Bootstrap ---------------------------------------------------------------------------------------


def test_bootstrap_of_a_mean_is_near_the_normal_interval():
    x = np.random.default_rng(0).normal(5, 2, 400)
    r = stats.bootstrap(x)
    half = 1.96 * x.std(ddof=1) / 20
    assert r.estimate == pytest.approx(x.mean())
    assert (r.low, r.high) == (
        pytest.approx(x.mean() - half, abs=0.04), pytest.approx(x.mean() + half, abs=0.04)
    )  # fmt: skip
    assert stats.bootstrap(x) == r != stats.bootstrap(x, seed=1)
    assert stats.bootstrap(x, np.median).estimate == np.median(x)


def test_two_levels_add_their_variances():
    """Scores = seed effect (sd 3) + example effect (sd 1): 12 seeds, 60 examples."""
    rng = np.random.default_rng(1)
    seeds, examples = rng.normal(0, 3, (12, 1)), rng.normal(0, 1, (1, 60))
    x = 50 + seeds + examples
    width = {
        over: (r := stats.bootstrap(x, over=over.split("+"))).high - r.low
        for over in ("seeds", "examples", "seeds+examples")
    }
    to_sd = 2 * 1.96
    assert width["seeds"] / to_sd == pytest.approx(seeds.std() / math.sqrt(12), rel=0.08)
    assert width["examples"] / to_sd == pytest.approx(examples.std() / math.sqrt(60), rel=0.08)
    both = math.hypot(width["seeds"], width["examples"])
    assert width["seeds+examples"] == pytest.approx(both, rel=0.08)


def test_a_metric_of_predictions_and_labels():
    rng = np.random.default_rng(2)
    y = rng.integers(0, 2, 200)
    predictions = np.where(rng.random((3, 200)) < 0.8, y, 1 - y)

    def accuracy(p: np.ndarray, labels: np.ndarray) -> float:
        return float((p == labels).mean())

    r = stats.bootstrap(predictions, accuracy, y, draws=500)
    assert r.estimate == pytest.approx((predictions == y).mean())
    assert 0.7 < r.low < r.estimate < r.high < 0.9
    assert r.low == stats.bootstrap((predictions == y).astype(float), draws=500).low
    # two methods on one set: stacked, their difference is paired and so narrower than either
    other = np.where(rng.random((3, 200)) < 0.05, 1 - predictions, predictions)
    pairs = np.stack([predictions, other], -1)
    gain = stats.bootstrap(
        pairs, lambda p, labels: accuracy(p[:, 0], labels) - accuracy(p[:, 1], labels), y, draws=500
    )
    assert gain.estimate == pytest.approx(r.estimate - (other == y).mean())
    assert gain.high - gain.low < 0.7 * (r.high - r.low)


def test_one_seed_varies_only_by_examples():
    x = np.random.default_rng(4).random((1, 50))
    both, examples = stats.bootstrap(x), stats.bootstrap(x, over=["examples"])
    assert 0 < examples.high - examples.low == pytest.approx(both.high - both.low, rel=0.1)
    alone = stats.bootstrap(x, over=["seeds"])
    assert alone.low == alone.high == pytest.approx(x.mean())


def test_undefined_resamples_are_counted():
    def metric(v: np.ndarray) -> float:
        return math.nan if np.ptp(v) == 0 else float(v.mean())

    r = stats.bootstrap([0.0, 1.0], metric, draws=400)
    assert r.undefined == pytest.approx(200, abs=40)
    assert (r.low, r.high) == (0.5, 0.5)
    r = stats.bootstrap([1.0, 1.0], metric, draws=10)
    assert r.undefined == 10 and math.isnan(r.low)


def test_bootstrap_errors():
    for bad, match in [
        ({"values": []}, "needs values"),
        ({"values": np.ones((2, 0))}, "needs values"),
        ({"values": np.ones((2, 3)), "labels": [0, 1]}, "3 examples but 2 labels"),
        ({"values": [1.0, 2.0], "labels": [0, 1]}, "labels need"),
        ({"values": [1.0], "over": ["tasks"]}, "examples"),
        ({"values": [1.0], "draws": 0}, "draws"),
    ]:
        with pytest.raises(ValueError, match=match):
            stats.bootstrap(**bad)


# McNemar, Holm, Spearman -------------------------------------------------------------------------


def test_mcnemar_by_hand():
    first = [1] * 10 + [1] * 8 + [0] * 2 + [0] * 5
    second = [1] * 10 + [0] * 8 + [1] * 2 + [0] * 5
    r = stats.mcnemar(first, second)
    assert (r.only_first, r.only_second, r.n, r.difference) == (8, 2, 25, 0.24)
    assert r.p_exact == pytest.approx(2 * (1 + 10 + 45) / 1024)
    assert r.p_exact == pytest.approx(sps.binomtest(2, 10).pvalue)
    assert r.p_mid == pytest.approx((2 * (1 + 10) + 45) / 1024)
    swapped = stats.mcnemar(second, first)
    assert (swapped.p_exact, swapped.difference) == (r.p_exact, -0.24)


def test_mcnemar_without_a_winner():
    assert stats.mcnemar([1, 0, 1], [1, 0, 1]).p_exact == 1
    even = stats.mcnemar([1, 0, 1, 0], [0, 1, 0, 1])
    assert (even.p_exact, even.p_mid, even.difference) == (1, 1, 0)


def test_mcnemar_refuses_labels_and_other_lengths():
    with pytest.raises(ValueError, match="not labels"):
        stats.mcnemar([0, 2], [1, 0])
    with pytest.raises(ValueError, match="equally long"):
        stats.mcnemar([0, 1], [1])


def test_mid_p_is_less_conservative_and_still_holds_its_size():
    rng = np.random.default_rng(5)
    p = [(r.p_exact, r.p_mid) for r in
         (stats.mcnemar(*(rng.random((2, 100)) < 0.8)) for _ in range(800))]  # fmt: skip
    exact, mid = (np.array(p) < 0.05).mean(0)
    assert exact < mid < 0.075
    assert exact <= 0.05


def test_holm_by_hand():
    assert stats.holm([0.01, 0.04, 0.03, 0.005]).tolist() == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert stats.holm([0.6, 0.7]).tolist() == [1.0, 1.0]
    assert stats.holm([]).tolist() == []
    with_nan = stats.holm([0.01, math.nan, 0.02])
    assert with_nan[[0, 2]].tolist() == pytest.approx([0.03, 0.04]) and math.isnan(with_nan[1])
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        stats.holm([0.1, 1.2])


def test_spearman_equals_scipy_and_brackets_its_estimate():
    rng = np.random.default_rng(6)
    a = rng.integers(0, 8, 40).astype(float)  # with ties
    b = a + rng.normal(0, 2, 40)
    r = stats.spearman(a, b, draws=500)
    expected = sps.spearmanr(a, b)
    assert (r.rho, r.p, r.n) == (
        pytest.approx(expected.statistic), pytest.approx(expected.pvalue), 40
    )  # fmt: skip
    assert r.low < r.rho < r.high
    rho = lambda pairs: sps.spearmanr(pairs[:, 0], pairs[:, 1]).statistic
    span = stats.bootstrap(np.stack([a, b], -1)[None], rho, over=["examples"], draws=500)
    assert (r.low, r.high) == (pytest.approx(span.low), pytest.approx(span.high))
    assert stats.spearman([1, 2, 3, 4], [1, 4, 9, 16], draws=50).rho == pytest.approx(1)


def test_spearman_without_ranks_says_so():
    for a, b in (([1.0, 2.0], [1.0, 2.0]), ([1.0, 1.0, 1.0], [1.0, 2.0, 3.0])):
        r = stats.spearman(a, b)
        assert math.isnan(r.rho) and "no rank correlation" in r.note
    with pytest.raises(ValueError, match="equal lengths"):
        stats.spearman([1.0, 2.0, 3.0], [1.0])
