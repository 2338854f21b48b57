"""What the paper's discussion measures on sets of vectors. Pure functions of arrays, in float64.

`x` (n, d) holds one vector a row; `labels` (n,) are whole numbers. Where a quantity has no value (one
label only, too few rows, no spread) it is nan, never a number that looks like one. ValueError for
vectors that are not (n, d) or not finite, and for labels that are not one a vector. Whatever
sklearn computes runs in one thread: sums over several are not the same bits twice.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

METRICS = ("euclidean", "cosine")


@cache
def _controller() -> Any:
    import sklearn.cluster
    import sklearn.manifold
    import sklearn.metrics  # noqa: F401  (it controls libraries that are loaded)
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController()  # made once: looking for libraries takes longer than a silhouette


def one_thread() -> AbstractContextManager[Any]:
    """A context in which numpy and sklearn compute in one thread."""
    return _controller().limit(limits=1)


def _rows(x: ArrayLike, what: str = "vectors") -> np.ndarray:
    """(n, d) float64, finite; ValueError otherwise."""
    found = np.asarray(x, np.float64)
    if found.ndim != 2 or not len(found):
        raise ValueError(f"{what}: expected (n, d) with n of 1 or more, got {found.shape}")
    if not np.isfinite(found).all():
        raise ValueError(f"{what}: {int((~np.isfinite(found)).sum())} numbers are not finite")
    return found


def _labels(labels: ArrayLike, n: int) -> np.ndarray:
    found = np.asarray(labels)
    if found.shape != (n,):
        raise ValueError(f"expected one label a vector, {n}, got {found.shape}")
    return found


# -- clusters ------------------------------------------------------------------------------------


def purity(clusters: ArrayLike, labels: ArrayLike) -> float:
    """(1/N) sum_k max_y |{i: cluster k, label y}| (section 6): from `majority(labels)` to 1.

    `clusters`, `labels` (n,); ValueError for n = 0.
    """
    c = np.asarray(clusters)
    y = _labels(labels, len(c))
    if not len(c):
        raise ValueError("purity needs at least one example")
    best = [np.unique(y[c == k], return_counts=True)[1].max() for k in np.unique(c)]
    return float(sum(best) / len(c))


def majority(labels: ArrayLike) -> float:
    """Share of the largest class of `labels` (n,): no clusters have a lower `purity`."""
    counts = np.unique(np.asarray(labels), return_counts=True)[1]
    return float(counts.max() / counts.sum())


def kmeans(x: ArrayLike, k: int = 2, seed: int = 0) -> np.ndarray:
    """Clusters (n,) of `x` (n, d), by the best of ten starts; the paper's section 6 uses K = 2."""
    from sklearn.cluster import KMeans

    rows = _rows(x)
    if len(np.unique(rows, axis=0)) < k:  # a collapsed model: sklearn would warn and go on
        return np.zeros(len(rows), dtype=np.int64)
    with one_thread():
        return KMeans(k, n_init=10, random_state=seed).fit_predict(rows)


def silhouette(x: ArrayLike, labels: ArrayLike, metric: str = "euclidean") -> float:
    """Mean silhouette (Rousseeuw, 1987) in [-1, 1]; nan unless 2 to n - 1 labels occur.

    `x` (n, d), `labels` (n,). `metric`: "euclidean" or "cosine" (A28), else ValueError. The cosine
    of a vector of zeros is taken as 0.
    """
    from sklearn.metrics import silhouette_score

    if metric not in METRICS:
        raise ValueError(f"unknown metric {metric!r}; choose one of {METRICS}")
    rows = _rows(x)
    y = _labels(labels, len(rows))
    if not 2 <= len(np.unique(y)) <= len(rows) - 1:
        return math.nan
    with one_thread():
        return float(silhouette_score(rows, y, metric=metric))


def centroid_distances(x: ArrayLike, labels: ArrayLike) -> np.ndarray:
    """Cosine distance (n,), in [0, 2], of each vector to the centroid of its own label (A30).

    nan where the vector or the centroid is zero, and has no direction.
    """
    rows = _rows(x)
    y = _labels(labels, len(rows))
    out = np.empty(len(rows))
    for label in np.unique(y):
        own = y == label
        centre = rows[own].mean(0)
        norms = np.linalg.norm(rows[own], axis=1) * np.linalg.norm(centre)
        with np.errstate(invalid="ignore", divide="ignore"):
            out[own] = np.where(norms > 0, 1 - rows[own] @ centre / norms, math.nan)
    return np.maximum(out, 0.0)  # of rounding; nan stays


# -- two sets of vectors of the same examples ------------------------------------------------------


def gaps(first: ArrayLike, second: ArrayLike) -> dict[str, float]:
    """The three manifold distances (Eqs. 3-5) over all rows at once, not over batches.

    `elementwise` mean ||a_i - b_i||, `euclid` ||mean a - mean b||, `cosine` 1 - cos(mean a, mean b)
    for a in `first`, b in `second`, (n, d) each. ValueError if they differ in shape.
    """
    a, b = _rows(first, "first"), _rows(second, "second")
    if a.shape != b.shape:
        raise ValueError(f"the two sets differ in shape: {a.shape} and {b.shape}")
    p, q = a.mean(0), b.mean(0)
    lengths = float(np.linalg.norm(p) * np.linalg.norm(q))
    return {
        "elementwise": float(np.linalg.norm(a - b, axis=1).mean()),
        "euclid": float(np.linalg.norm(p - q)),
        "cosine": 1 - float(p @ q) / lengths if lengths else math.nan,
    }


def linear_cka(first: ArrayLike, second: ArrayLike, debiased: bool = False) -> float:
    """Linear CKA (Kornblith et al., 2019): 1 for equal up to rotation and scale.

    `first` (n, d), `second` (n, e); ValueError for unequal n. Plain CKA is biased upwards where n
    is not far above d and e: sets that share nothing look alike. `debiased` uses the unbiased HSIC
    of Song et al. (2012), which is about 0 for them, may be negative, and needs n > 3. nan where a
    set has no spread.
    """
    a, b = _rows(first, "first"), _rows(second, "second")
    if len(a) != len(b):
        raise ValueError(f"expected the same examples, got {len(a)} and {len(b)} rows")
    a, b = a - a.mean(0), b - b.mean(0)
    scale = max(np.abs(a).max(), 1e-300), max(np.abs(b).max(), 1e-300)
    k, m = (a / scale[0]) @ (a / scale[0]).T, (b / scale[1]) @ (b / scale[1]).T
    hsic = _unbiased if debiased else lambda u, v: float((u * v).sum())
    if debiased and len(a) < 4:
        return math.nan
    own = hsic(k, k), hsic(m, m)
    return hsic(k, m) / math.sqrt(own[0] * own[1]) if min(own) > 1e-12 else math.nan


def _unbiased(k: np.ndarray, m: np.ndarray) -> float:
    """The unbiased estimate of HSIC, times n (n - 3), from two Gram matrices (n, n)."""
    n = len(k)
    k, m = (g - np.diag(np.diag(g)) for g in (k, m))
    return float(
        (k * m).sum()
        + k.sum() * m.sum() / ((n - 1) * (n - 2))
        - 2 * (k.sum(0) @ m.sum(0)) / (n - 2)
    )


# -- series --------------------------------------------------------------------------------------


def sensitivity(scores: ArrayLike, sigmas: ArrayLike) -> float:
    """Var(score) / Var(sigma) over the noise levels (section 6), in points squared a unit (A25).

    `scores`, `sigmas` (n,). The same degrees of freedom above and below, so that their choice does
    not matter. ValueError for fewer than two levels, or equal ones.
    """
    y, x = np.asarray(scores, np.float64), np.asarray(sigmas, np.float64)
    if y.shape != x.shape or y.ndim != 1 or len(y) < 2:
        raise ValueError(f"expected a score a level, two levels or more; got {y.shape}, {x.shape}")
    if not np.ptp(x):
        raise ValueError("all noise levels are the same: their variance is 0")
    return float(y.var() / x.var())


def autocorrelation(values: ArrayLike) -> float:
    """Correlation of a series (n,) with itself one step later (A26).

    nan without spread or below 3 values.
    """
    x = np.asarray(values, np.float64)
    if len(x) < 3 or not np.ptp(x):
        return math.nan
    x = x - x.mean()
    return float((x[1:] * x[:-1]).sum() / (x * x).sum())


# -- maps ----------------------------------------------------------------------------------------


def tsne(x: ArrayLike, seed: int = 0, perplexity: float = 30.0) -> np.ndarray:
    """t-SNE (n, d) -> (n, 2) (A27); the same bits for the same input on one kind of processor.

    To show several models in one map, stack their vectors: only points fitted together can be
    compared. With few rows the perplexity is a third of them. ValueError for fewer than 4 rows.
    """
    from sklearn.manifold import TSNE

    rows = _rows(x)
    if len(rows) < 4:
        raise ValueError(f"t-SNE needs 4 vectors or more, got {len(rows)}")
    with one_thread():
        fit = TSNE(2, perplexity=min(perplexity, (len(rows) - 1) / 3), init="pca",
                   random_state=seed, n_jobs=1)  # fmt: skip
        return fit.fit_transform(rows.astype(np.float32)).astype(np.float64)
