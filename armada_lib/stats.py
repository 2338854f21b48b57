"""Means, intervals and tests for scores of several seeds. numpy and scipy only.

Differences are always first minus second: `paired_difference(distilled, undistilled)` is a gain.
Units are those of the scores. With one value there is no spread: standard deviation, interval and
p are nan and `note` says why, so that a table can show the run without pretending to an interval.
Empty input, values that are not finite, a level outside (0, 1) and an unknown alternative raise
ValueError.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats as sps

ALTERNATIVES = ("two-sided", "greater", "less")
LEVELS = ("seeds", "examples")


@dataclass(frozen=True)
class Summary:
    """Mean, sample standard deviation (ddof = 1) and t interval of the mean."""

    mean: float
    sd: float
    n: int
    low: float
    high: float
    note: str = ""

    def __str__(self) -> str:
        spread = f" ± {self.sd:.2f}" if self.n > 1 else ""
        return f"{self.mean:.2f}{spread} (n = {self.n})"


@dataclass(frozen=True)
class TTest:
    """A t test: difference of the means (first minus second), its interval, t, df and p."""

    name: str
    difference: float
    low: float
    high: float
    t: float
    df: float
    p: float
    n: int
    note: str = ""


@dataclass(frozen=True)
class Interval:
    """A bootstrap percentile interval; `undefined` counts resamples whose metric was nan."""

    estimate: float
    low: float
    high: float
    level: float
    draws: int
    undefined: int


@dataclass(frozen=True)
class McNemar:
    """Two classifiers on the same n examples; `difference` of accuracies as a fraction."""

    only_first: int
    only_second: int
    n: int
    difference: float
    p_exact: float
    p_mid: float


@dataclass(frozen=True)
class Correlation:
    """Rank correlation, its two-sided p and bootstrap interval over the n pairs."""

    rho: float
    p: float
    low: float
    high: float
    n: int
    note: str = ""


def _vector(values: ArrayLike, what: str) -> np.ndarray:
    x = np.asarray(values, dtype=float)
    if x.ndim != 1 or x.size == 0:
        raise ValueError(f"{what}: expected a non-empty list of numbers, got shape {x.shape}")
    if not np.isfinite(x).all():
        raise ValueError(f"{what}: not finite at {np.flatnonzero(~np.isfinite(x)).tolist()}")
    return x


def _check(level: float, alternative: str = "two-sided") -> None:
    if not 0 < level < 1:
        raise ValueError(f"level must be between 0 and 1, got {level}")
    if alternative not in ALTERNATIVES:
        raise ValueError(f"unknown alternative {alternative!r}; choose one of {ALTERNATIVES}")


def _no_spread(x: np.ndarray) -> bool:
    """Equal up to rounding: a t test would divide rounding errors by rounding errors."""
    return bool(np.ptp(x) <= 1e-12 * np.abs(x).max())


def summary(values: ArrayLike, level: float = 0.95) -> Summary:
    """Mean, standard deviation and t interval (Student, 1908) of `values` (n,), one per seed."""
    _check(level)
    x = _vector(values, "values")
    if len(x) == 1:
        nan = math.nan
        return Summary(float(x[0]), nan, 1, nan, nan, "one value: no spread, no interval")
    sd = float(x.std(ddof=1))
    half = float(sps.t.ppf((1 + level) / 2, len(x) - 1)) * sd / math.sqrt(len(x))
    return Summary(float(x.mean()), sd, len(x), float(x.mean()) - half, float(x.mean()) + half)


def _test(name: str, r: Any, mean: float, n: int, level: float) -> TTest:
    """scipy's result as ours."""
    ci, p = r.confidence_interval(level), float(r.pvalue)
    return TTest(name, mean, float(ci.low), float(ci.high), float(r.statistic), float(r.df), p, n)


def paired_t(
    first: ArrayLike, second: ArrayLike, alternative: str = "two-sided", level: float = 0.95
) -> TTest:
    """Paired t test (Student, 1908) of `first` (n,) against `second` (n,), pair by pair.

    `alternative` "greater" means that first is greater; the interval is then one-sided too (high
    is inf). With one pair, or equal differences in all pairs, t and p are nan and `note` says so.
    ValueError for unequal lengths.
    """
    _check(level, alternative)
    a, b = _vector(first, "first"), _vector(second, "second")
    if len(a) != len(b):
        raise ValueError(f"a paired test needs equal lengths, got {len(a)} and {len(b)}")
    d, n, nan = a - b, len(a), math.nan
    mean = float(d.mean())
    if n == 1:
        return TTest("paired t", mean, nan, nan, nan, 0, nan, 1, "one pair: no test, no interval")
    if _no_spread(d):
        note = "the difference is the same in every pair: t is undefined"
        return TTest("paired t", mean, mean, mean, nan, n - 1, nan, n, note)
    return _test("paired t", sps.ttest_1samp(d, 0.0, alternative=alternative), mean, n, level)


def welch_t(
    first: ArrayLike, second: ArrayLike, alternative: str = "two-sided", level: float = 0.95
) -> TTest:
    """Welch's t test (Welch, 1947) of independent samples, `first` (n,) and `second` (m,).

    `n` of the result is n + m.
    Steps of one run are autocorrelated: give one mean per seed, or read p as a lower bound [A26].
    """
    _check(level, alternative)
    a, b = _vector(first, "first"), _vector(second, "second")
    n, nan, mean = len(a) + len(b), math.nan, float(a.mean() - b.mean())
    if min(len(a), len(b)) == 1:
        return TTest("Welch t", mean, nan, nan, nan, nan, nan, n, "one value in a group: no test")
    if _no_spread(a) and _no_spread(b):
        note = "no spread in either group: t is undefined"
        return TTest("Welch t", mean, mean, mean, nan, nan, nan, n, note)
    r = sps.ttest_ind(a, b, equal_var=False, alternative=alternative)
    return _test("Welch t", r, mean, n, level)


def paired_difference(
    first: Mapping[int, float],
    second: Mapping[int, float],
    alternative: str = "two-sided",
    level: float = 0.95,
) -> TTest:
    """`paired_t` of two methods' scores by seed; ValueError if their seeds are not the same."""
    if set(first) != set(second):
        raise ValueError(
            f"seeds do not match: only in the first {sorted(set(first) - set(second))}, "
            f"only in the second {sorted(set(second) - set(first))}"
        )
    seeds = sorted(first)
    return paired_t([first[s] for s in seeds], [second[s] for s in seeds], alternative, level)


def bootstrap(
    values: ArrayLike,
    metric: Callable[..., float] = np.mean,
    labels: ArrayLike | None = None,
    *,
    over: Collection[str] = LEVELS,
    draws: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Percentile interval by resampling (Efron and Tibshirani, 1993).

    `values` (n,): one number per seed (or pair, or cell); the metric of each resample.
    `values` (seeds, examples, ...): predictions, or anything per example, of every seed on the
    same examples. The metric is called on the examples of one seed, `metric(v)` with v (n, ...) or
    `metric(v, labels)` with `labels` (n,), and averaged over seeds. `over` names what is resampled:
    seeds, examples, or both; one draw of examples serves all seeds, as they share the test set.
    Stack two methods' predictions in the last axis for the interval of their difference.

    With five seeds a percentile interval is too narrow (`summary` has the t interval); with one
    seed, only examples vary. ValueError for an unknown level name or labels of another length.
    """
    _check(level)
    x = np.asarray(values)
    if x.ndim == 0 or 0 in x.shape[:2]:
        raise ValueError(f"bootstrap needs values (n,) or (seeds, examples, ...), got {x.shape}")
    if not set(over) <= set(LEVELS) or not over:
        raise ValueError(f"over={over!r}: choose from {LEVELS}")
    if draws < 1:
        raise ValueError(f"draws must be >= 1, got {draws}")
    if x.ndim == 1:
        if labels is not None:
            raise ValueError("labels need values per seed and example: (seeds, examples)")
        x, over = x[None], ("examples",)  # one level: the entries themselves
    s, n = x.shape[:2]
    y = None if labels is None else np.asarray(labels)
    if y is not None and len(y) != n:
        raise ValueError(f"{n} examples but {len(y)} labels")

    def score(row: np.ndarray, pick: Any) -> float:
        return float(metric(row[pick]) if y is None else metric(row[pick], y[pick]))

    rng = np.random.default_rng(seed)
    everything = slice(None)
    full = [score(row, everything) for row in x]
    found = np.empty(draws)
    for i in range(draws):
        # rows as counts, so that the metric is called once for a seed drawn twice
        times = rng.multinomial(s, np.full(s, 1 / s)) if "seeds" in over else np.ones(s)
        scores = full
        if "examples" in over:
            pick = rng.integers(n, size=n)
            scores = [score(x[r], pick) if times[r] else 0.0 for r in range(s)]
        found[i] = np.dot(times, scores) / s
    defined = found[~np.isnan(found)]
    low, high = _percentiles(defined, level)
    return Interval(float(np.mean(full)), low, high, level, draws, draws - len(defined))


def _percentiles(found: np.ndarray, level: float) -> tuple[float, float]:
    """The ends of the middle `level` of what resamples gave; nan where they gave nothing."""
    if not len(found):
        return math.nan, math.nan
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2]).tolist()
    return low, high


def mcnemar(first: ArrayLike, second: ArrayLike) -> McNemar:
    """McNemar's test (McNemar, 1947) from `first`, `second` (n,): was each example answered right?

    Of the examples on which they disagree, half would be won by either under the null hypothesis.
    Two-sided exact binomial p (never too small) and mid-p (closer to its nominal size). ValueError
    for unequal lengths, and for anything but 0 and 1.
    """
    a, b = np.asarray(first), np.asarray(second)
    if a.ndim != 1 or a.shape != b.shape or a.size == 0:
        raise ValueError(f"expected two equally long lists, got {a.shape} and {b.shape}")
    if not (np.isin(a, (0, 1)).all() and np.isin(b, (0, 1)).all()):
        raise ValueError("expected correct (1) or wrong (0) per example, not labels or scores")
    a, b = a.astype(bool), b.astype(bool)
    won, lost = int((a & ~b).sum()), int((~a & b).sum())
    tail = 2 * float(sps.binom.cdf(min(won, lost), won + lost, 0.5))
    half = float(sps.binom.pmf(min(won, lost), won + lost, 0.5))
    gap = (won - lost) / len(a)
    return McNemar(won, lost, len(a), gap, min(1.0, tail), min(1.0, tail - half))


def holm(p: ArrayLike) -> np.ndarray:
    """Holm's adjusted p values (n,) (Holm, 1979), valid under any dependence, in the order given.

    nan (a test that could not be made) stays nan but counts in n, which errs on the safe side.
    ValueError for values outside [0, 1].
    """
    x = np.asarray(p, dtype=float)
    if x.ndim != 1 or ((x < 0) | (x > 1)).any():
        raise ValueError(f"expected a list of p values in [0, 1], got {x.tolist()}")
    order = np.argsort(x, kind="stable")  # nan last
    scaled = x[order] * (len(x) - np.arange(len(x)))
    adjusted = np.empty_like(x)
    adjusted[order] = np.minimum(np.maximum.accumulate(scaled), 1.0)
    return adjusted


def spearman(
    first: ArrayLike, second: ArrayLike, *, draws: int = 2000, level: float = 0.95, seed: int = 0
) -> Correlation:
    """Rank correlation (Spearman, 1904) of `first` (n,) and `second` (n,), ties at their mean rank.

    rho is nan, with a note, for fewer than three pairs or a constant side. ValueError for unequal
    lengths.
    """
    _check(level)
    a, b = _vector(first, "first"), _vector(second, "second")
    if len(a) != len(b):
        raise ValueError(f"expected equal lengths, got {len(a)} and {len(b)}")
    if len(a) < 3 or np.ptp(a) == 0 or np.ptp(b) == 0:
        nan = math.nan
        note = "fewer than three pairs, or a constant side: no rank correlation"
        return Correlation(nan, nan, nan, nan, len(a), note)

    def ranks(x: np.ndarray) -> np.ndarray:  # all resamples at once: ranking one by one is slow
        of = sps.rankdata(x[picks], axis=1)
        return of - of.mean(1, keepdims=True)

    rng = np.random.default_rng(seed)
    picks = np.stack([rng.integers(len(a), size=len(a)) for _ in range(draws)])
    x, y = ranks(a), ranks(b)
    norm = np.sqrt((x**2).sum(1) * (y**2).sum(1))
    found = (x * y).sum(1)[norm > 0] / norm[norm > 0]  # undefined where one value is repeated
    low, high = _percentiles(found, level)
    r = sps.spearmanr(a, b)
    return Correlation(float(r.statistic), float(r.pvalue), low, high, len(a))
