"""Known answers for the statistics of the study."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats as sps
from statsmodels.stats.multitest import multipletests

from armada_lib import contrasts, evaluation
from armada_lib.contrasts import Contrast

RNG = np.random.default_rng(5)


def resampled(metric: str, predictions: np.ndarray, y: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    """The slow way: repeat each example as often as it was drawn, and ask `evaluation`."""
    out = np.empty((len(drawn), len(predictions)))
    for i, times in enumerate(drawn.astype(int)):
        rows = np.repeat(np.arange(len(y)), times)
        for j, p in enumerate(predictions):
            given = p[rows] if metric == "pearson" else np.eye(4)[p[rows]]
            out[i, j] = evaluation.metric(metric, given, y[rows])
    return out


@pytest.mark.parametrize(
    "metric, classes", [("accuracy", 3), ("mcc", 2), ("mcc", 3), ("pearson", 0)]
)
def test_every_draw_is_scored_as_evaluation_would(metric, classes):
    if metric == "pearson":
        y = RNG.uniform(0, 5, 40)
        said = y + RNG.standard_normal((3, 40)) * np.array([[0.2], [1], [4]]) + 100
    else:
        y, said = RNG.integers(0, classes, 40), RNG.integers(0, classes, (3, 40))
        said[0, :30] = y[:30]
    drawn = contrasts.counts(40, 25)
    got = contrasts.rescored(metric, said, y, drawn)
    np.testing.assert_allclose(got, resampled(metric, said, y, drawn), atol=2e-3)
    whole = contrasts.rescored(metric, said, y, np.ones((1, 40), np.float32))[0]
    whole_slow = resampled(metric, said, y, np.ones((1, 40)))[0]
    np.testing.assert_allclose(whole, whole_slow, atol=1e-3)


@pytest.mark.parametrize("metric", ["mcc", "pearson"])
def test_a_constant_side_scores_zero(metric):
    y = np.array([0, 1, 0, 1])
    drawn = np.array([[1, 1, 1, 1], [2, 0, 2, 0]], np.float32)  # the second: one label alone
    assert contrasts.rescored(metric, [[1, 1, 1, 1]], y, drawn).tolist() == [[0], [0]]
    assert contrasts.rescored(metric, [y], y, drawn).round(3).tolist() == [[100], [0]]


def test_what_does_not_fit_is_named():
    drawn = contrasts.counts(4, 2)
    with pytest.raises(ValueError, match="unknown metric 'f1'; valid: accuracy, mcc, pearson"):
        contrasts.rescored("f1", [[1, 0, 1, 0]], [1, 0, 1, 0], drawn)
    with pytest.raises(ValueError, match="examples differ"):
        contrasts.rescored("mcc", [[1, 0, 1]], [1, 0, 1], drawn)
    with pytest.raises(ValueError, match="2 differences, but draws of shape"):
        contrasts.contrast([1.0, 2.0], np.zeros((5, 3)))
    with pytest.raises(ValueError, match="bound must be above 0"):
        contrasts.tost([1.0, 2.0], 0)


def test_draws_are_the_bootstraps():
    drawn = contrasts.counts(50, 4000)
    assert drawn.shape == (4000, 50) and (drawn.sum(1) == 50).all()
    assert drawn.var() == pytest.approx(1 - 1 / 50, abs=0.02)  # of a multinomial count
    assert (contrasts.counts(50, 3) == contrasts.counts(50, 3)).all()


def test_the_interval_holds_the_noise_of_seeds_and_of_examples():
    seeds = RNG.standard_normal(200) * 3 + 1
    alone = contrasts.contrast(seeds, np.tile(seeds, (20000, 1)))  # examples add nothing
    se = seeds.std() / math.sqrt(200)
    assert alone.low == pytest.approx(alone.mean - 1.96 * se, abs=0.05 * se)
    assert alone.high90 == pytest.approx(alone.mean + 1.645 * se, abs=0.05 * se)
    # all seeds move together with the examples drawn: the interval must grow by that much
    shift = RNG.standard_normal((20000, 1)) * 2 * se
    both = contrasts.contrast(seeds, seeds + shift)
    assert both.high - both.low == pytest.approx((alone.high - alone.low) * math.sqrt(5), rel=0.05)
    same = contrasts.contrast([0.5] * 4, np.full((100, 4), 0.5))
    assert (same.low, same.high, same.mean) == (0.5, 0.5, 0.5) and math.isnan(same.p)


def test_tests_agree_with_scipy():
    d = np.array([0.3, -0.1, 0.5, 0.2, 0.4])
    c = contrasts.contrast(d, bound=0.6)
    assert c.p == pytest.approx(sps.ttest_1samp(d, 0).pvalue) and c.n == 5
    low, high = sps.ttest_1samp(d, 0).confidence_interval()
    assert (c.t_low, c.t_high) == (pytest.approx(low), pytest.approx(high))
    one_sided = [sps.ttest_1samp(d, -0.6, alternative="greater").pvalue,
                 sps.ttest_1samp(d, 0.6, alternative="less").pvalue]  # fmt: skip
    assert c.p_equivalent == pytest.approx(max(one_sided)) and c.p_equivalent < 0.05
    assert math.isnan(c.low) and not c.inside  # no draws: the interval cannot be inside
    assert contrasts.tost([0.2, 0.2], 0.3) == 0 and contrasts.tost([0.4, 0.4], 0.3) == 1
    assert math.isnan(contrasts.tost([0.2], 0.3)) and math.isnan(contrasts.contrast([1.0]).p)


def test_power_is_what_the_protocol_prints():
    # ten pairs of sd 1 find 1 point, five find 1.7: the table of the trial
    assert contrasts.detectable(1.0, 10) == pytest.approx(1.0, abs=0.05)
    assert contrasts.detectable(1.0, 5) == pytest.approx(1.7, abs=0.05)
    assert contrasts.detectable(2.0, 10) == pytest.approx(2 * contrasts.detectable(1.0, 10))
    assert contrasts.detectable(1.0, 10, 0.05 / 3) > contrasts.detectable(1.0, 10)
    rng = np.random.default_rng(0)
    x = rng.normal(contrasts.detectable(1.0, 10), 1.0, (4000, 10))
    assert (sps.ttest_1samp(x, 0, axis=1).pvalue < 0.05).mean() == pytest.approx(0.8, abs=0.02)


def test_holm_by_hand():
    assert contrasts.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert contrasts.holm([0.01, math.nan]) == pytest.approx([0.02, 1.0])
    p = RNG.uniform(size=9)
    np.testing.assert_allclose(contrasts.holm(p.tolist()), multipletests(p, method="holm")[1])
    assert contrasts.holm([]) == []


def made(mean: float, p: float = 0.5, width: float = 1.0, equal: float = 1.0) -> Contrast:
    nan = math.nan
    return Contrast((mean,) * 5, mean, 1.0, mean - width, mean + width, mean - width, mean + width,
                    nan, nan, p, 2.0, equal, nan)  # fmt: skip


FLAT = made(0.0, equal=0.001)


@pytest.mark.parametrize(
    "found, each, whole",
    [
        ([made(3, 0.001), FLAT, FLAT], contrasts.MATTERS, contrasts.MATTERS),
        ([made(-3, 0.001), FLAT, FLAT], contrasts.HARMS, contrasts.HARMS),
        ([made(3, 0.001), made(-3, 0.001), FLAT], contrasts.MATTERS, contrasts.MIXED),
        ([made(3, 0.02), FLAT, FLAT], contrasts.OPEN, contrasts.OPEN),  # Holm: 0.06
        ([made(3, 0.001, width=4), FLAT, FLAT], contrasts.OPEN, contrasts.OPEN),  # interval holds 0
        ([FLAT, FLAT, FLAT], contrasts.SAME, contrasts.NOT),
        ([made(0, width=3, equal=0.001), FLAT, FLAT], contrasts.OPEN, contrasts.OPEN),  # too wide
        # 4 % each: no single statement after Holm, but the joint one
        ([made(0, equal=0.04)] * 3, contrasts.OPEN, contrasts.NOT),
        ([made(0, equal=0.06), FLAT, FLAT], contrasts.OPEN, contrasts.OPEN),
        # different from zero, but too little to matter: the difference is what is said
        ([made(0.5, 0.001, width=0.2, equal=0.001), FLAT, FLAT], contrasts.MATTERS, contrasts.MATTERS),
    ],
)  # fmt: skip
def test_conclusions_follow_the_protocol(found, each, whole):
    primary = dict(zip("abc", found, strict=True))
    assert contrasts.conclude(primary)["a"] == each and contrasts.overall(primary) == whole
