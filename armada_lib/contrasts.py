"""Contrasts of a study: paired differences over seeds, with intervals over seeds and examples.

A contrast is a mean of differences d_s, one a seed, of two arms that share task and seed. Its t test
takes the test set as given; its bootstrap interval draws seeds and examples. Every arm and seed of a
task is scored on the same examples, so one draw of examples serves them all: `counts` makes it,
`rescored` scores runs on every draw at once, and differences of its columns go to `contrast`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from armada_lib import stats

DRAWS = 10_000
METRICS = ("accuracy", "mcc", "pearson")


@dataclass(frozen=True)
class Contrast:
    """Mean difference over `n` seeds, in points.

    `low`, `high`: 95 % bootstrap interval over seeds and examples, `low90`, `high90` the 90 % one;
    nan where examples were not drawn. `t_low`, `t_high`: 95 % t interval over seeds. `p`: paired t
    test, two-sided. `p_equivalent`: TOST against `bound`, nan without one. `found`: the smallest true
    difference that such a t test at `level` finds with a power of 80 %, given `sd`.
    """

    values: tuple[float, ...]
    mean: float
    sd: float
    low: float
    high: float
    low90: float
    high90: float
    t_low: float
    t_high: float
    p: float
    bound: float
    p_equivalent: float
    found: float

    @property
    def n(self) -> int:
        return len(self.values)

    @property
    def inside(self) -> bool:
        """Whether the 90 % bootstrap interval lies within the bounds."""
        return -self.bound < self.low90 and self.high90 < self.bound


def counts(n: int, draws: int = DRAWS, seed: int = 0) -> np.ndarray:
    """How often each of `n` examples is in each of `draws` resamples: (draws, n) float32.

    ValueError unless both are 1 or more.
    """
    if n < 1 or draws < 1:
        raise ValueError(f"resampling needs examples and draws, got {n} and {draws}")
    rng, found = np.random.default_rng([seed, n]), np.empty((draws, n), np.float32)
    for row in found:  # a third of the time of numpy's multinomial
        row[:] = np.bincount(rng.integers(n, size=n), minlength=n)
    return found


def rescored(
    metric: str, predictions: ArrayLike, labels: ArrayLike, drawn: np.ndarray
) -> np.ndarray:
    """The metric × 100 of every run on every draw: (draws, runs).

    predictions (runs, n): classes, or scores for `pearson`; labels (n,); drawn (draws, n) from
    `counts`. As in `evaluation.metric`, MCC and Pearson of a constant side are 0. Raises ValueError
    for an unknown metric and for shapes that do not fit.
    """
    x, y = np.atleast_2d(np.asarray(predictions, dtype=float)), np.asarray(labels, dtype=float)
    if x.shape[1] != len(y) or drawn.shape[1] != len(y):
        raise ValueError(
            f"{len(y)} labels, but predictions {x.shape} and draws {drawn.shape}: examples differ"
        )
    n = float(len(y))
    # the columns of `f` are numbers of examples; a draw's sum of them is one product of matrices
    total = lambda f: (drawn @ np.ascontiguousarray(f.T, dtype=np.float32)).astype(float)
    if metric == "accuracy":
        return 100 * total(x == y) / n
    if metric == "mcc":  # over any number of classes
        classes = np.unique([*np.unique(x), *np.unique(y)])
        said = np.stack([total(x == k) for k in classes])
        true = np.stack([total((y == k)[None]) for k in classes])
        above = total(x == y) * n - (said * true).sum(0)
        below = (n**2 - (said**2).sum(0)) * (n**2 - (true**2).sum(0))
        return 100 * _ratio(above, np.sqrt(np.maximum(below, 0)))
    if metric == "pearson":
        x, y = x - x.mean(1, keepdims=True), y - y.mean()  # else float32 sums lose digits
        mean_x, mean_y = total(x) / n, total(y[None]) / n
        above = total(x * y) / n - mean_x * mean_y
        spread = lambda f, mean: np.maximum(total(f**2) / n - mean**2, 0)
        return 100 * _ratio(above, np.sqrt(spread(x, mean_x) * spread(y[None], mean_y)))
    raise ValueError(f"unknown metric {metric!r}; valid: {', '.join(METRICS)}")


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    return np.divide(above, below, out=np.zeros(above.shape), where=below > 1e-9)


def contrast(
    values: ArrayLike,
    drawn: np.ndarray | None = None,
    bound: float | None = None,
    level: float = 0.05,
    seed: int = 0,
) -> Contrast:
    """The contrast of differences `values` (seeds,), one a seed.

    drawn (draws, seeds): the same differences on every draw of examples. With one seed there is no
    test, and the interval is over examples alone. Raises ValueError for shapes that do not fit.
    """
    d, nan = np.asarray(values, dtype=float), math.nan
    test = stats.paired_t(d, np.zeros(len(d)))
    sd = float(d.std(ddof=1)) if len(d) > 1 else nan
    (low, high), (low90, high90) = (nan, nan), (nan, nan)
    if drawn is not None:
        if drawn.ndim != 2 or drawn.shape[1] != len(d):
            raise ValueError(f"{len(d)} differences, but draws of shape {drawn.shape}")
        means = resample(drawn, seed)
        (low, high), (low90, high90) = (
            np.quantile(means, [a / 2, 1 - a / 2]).tolist() for a in (0.05, 0.1)
        )
    return Contrast(
        tuple(d.tolist()), float(d.mean()), sd, low, high, low90, high90, test.low, test.high,
        test.p, nan if bound is None else bound, nan if bound is None else tost(d, bound),
        detectable(sd, len(d), level),
    )  # fmt: skip


def resample(drawn: np.ndarray, seed: int = 0) -> np.ndarray:
    """Mean difference of each draw of examples (draws, seeds), over a draw of seeds: (draws,)."""
    draws, s = drawn.shape
    times = np.random.default_rng([seed, s, 1]).multinomial(s, np.full(s, 1 / s), size=draws)
    return (times * drawn).sum(1) / s


def tost(values: ArrayLike, bound: float) -> float:
    """p of two one-sided t tests that the mean of `values` (n,) lies within -bound and bound.

    TOST (Schuirmann, 1987). nan with one value; with no spread it is 0 or 1, as the mean lies
    inside or outside. ValueError unless `bound`, in the unit of `values`, is above 0.
    """
    d = np.asarray(values, dtype=float)
    if not bound > 0:
        raise ValueError(f"an equivalence bound must be above 0, got {bound}")
    if len(d) < 2:
        return math.nan
    if np.ptp(d) <= 1e-12 * np.abs(d).max():
        return float(abs(d.mean()) >= bound)
    from statsmodels.stats.weightstats import DescrStatsW

    return float(DescrStatsW(d).ttost_mean(-bound, bound)[0])


def detectable(sd: float, n: int, level: float = 0.05, power: float = 0.8) -> float:
    """The smallest true mean that a two-sided t test of `n` pairs finds with this power."""
    if n < 2 or not sd > 0:
        return math.nan
    from statsmodels.stats.power import TTestPower

    return float(TTestPower().solve_power(nobs=n, alpha=level, power=power)) * sd


def holm(p: Sequence[float]) -> list[float]:
    """Holm's adjusted p values; a test that could not be made (nan) counts as one with p = 1."""
    x = np.asarray(p, dtype=float)
    return [float(v) for v in stats.holm(np.where(np.isnan(x), 1.0, x))]


# -- what is concluded, by the rules of book/protocol.md ------------------------------------------

MATTERS, HARMS = "the teacher matters", "the real teacher harms"
SAME, OPEN, MIXED = "no difference that matters", "undecided", "mixed"
NOT = "the teacher does not matter"


def direction(c: Contrast, p: float) -> int:
    """1 or -1 if the contrast lies on that side of zero, by `p` < 5 %, mean and interval; else 0."""
    if p < 0.05 and c.mean > 0 and c.low > 0:
        return 1
    return -1 if p < 0.05 and c.mean < 0 and c.high < 0 else 0


def conclude(primary: dict[str, Contrast]) -> dict[str, str]:
    """For each task of the primary family what is concluded of it; Holm over the family, level 5 %."""
    found = list(primary.values())
    differs, equal = holm([c.p for c in found]), holm([c.p_equivalent for c in found])
    said = {}
    for (task, c), p, q in zip(primary.items(), differs, equal, strict=True):
        none = SAME if q < 0.05 and c.inside else OPEN
        said[task] = {1: MATTERS, -1: HARMS, 0: none}[direction(c, p)]
    return said


def overall(primary: dict[str, Contrast]) -> str:
    """What is concluded from all primary tasks together."""
    said = set(conclude(primary).values())
    if MATTERS in said or HARMS in said:
        return MIXED if {MATTERS, HARMS} <= said else MATTERS if MATTERS in said else HARMS
    # the joint statement is an intersection of tests: each at 5 % needs no correction
    return NOT if all(c.p_equivalent < 0.05 and c.inside for c in primary.values()) else OPEN
