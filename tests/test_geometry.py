"""Statistics of vectors: hand computations, sklearn and scipy, and what each must not change."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cosine as cosine_distance
from sklearn.metrics import silhouette_samples

from armada_lib import geometry, losses
from armada_lib.profiles import ROOT


def blobs(n: int = 30, d: int = 6, gap: float = 3.0, seed: int = 0):
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % 2
    return rng.standard_normal((n, d)) + gap * labels[:, None], labels


def rotation(d: int, seed: int = 1) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((d, d)))[0]


# -- clusters ------------------------------------------------------------------------------------


def test_purity_by_hand():
    clusters = [0, 0, 0, 1, 1, 1, 1, 2]
    labels = [0, 0, 1, 1, 1, 1, 0, 2]
    assert geometry.purity(clusters, labels) == (2 + 3 + 1) / 8
    assert geometry.majority(labels) == 4 / 8
    assert geometry.purity(np.zeros(8), labels) == geometry.majority(labels)
    assert geometry.purity(range(8), labels) == 1.0


def test_purity_is_never_below_the_majority_share():
    rng = np.random.default_rng(0)
    for _ in range(200):
        y, c = rng.integers(0, 3, 20), rng.integers(0, 4, 20)
        assert geometry.majority(y) <= geometry.purity(c, y) <= 1
    with pytest.raises(ValueError, match="one label a vector"):
        geometry.purity([0, 1], [0])


def test_clusters_of_separate_blobs_are_the_blobs():
    x, y = blobs(gap=20)
    assert geometry.purity(geometry.kmeans(x), y) == 1.0
    assert (geometry.kmeans(x, seed=3) == geometry.kmeans(x, seed=3)).all()
    assert len(set(geometry.kmeans(np.ones((5, 3))))) == 1  # a collapsed model has one cluster


def by_hand(x: np.ndarray, y: np.ndarray, distance) -> float:
    """Rousseeuw's definition, point by point."""
    d = np.array([[distance(a, b) for b in x] for a in x])
    found = []
    for i in range(len(x)):
        own = (y == y[i]) & (np.arange(len(x)) != i)
        if not own.any():
            found.append(0.0)
            continue
        a = d[i, own].mean()
        b = min(d[i, y == other].mean() for other in set(y) - {y[i]})
        found.append((b - a) / max(a, b))
    return float(np.mean(found))


@pytest.mark.parametrize(
    "metric, distance",
    [("euclidean", lambda a, b: float(np.linalg.norm(a - b))), ("cosine", cosine_distance)],
)
def test_silhouette_is_rousseeuws(metric, distance):
    x, y = blobs(gap=1.0)
    y = np.where(np.arange(len(y)) == 7, 2, y)  # a label of one example
    assert geometry.silhouette(x, y, metric) == pytest.approx(by_hand(x, y, distance), abs=1e-9)
    assert geometry.silhouette(x, y, metric) == pytest.approx(
        silhouette_samples(x, y, metric=metric).mean()
    )


def test_silhouette_depends_on_the_metric_and_on_two_labels():
    x, y = blobs(gap=2.0)
    x *= np.linspace(0.1, 5, len(x))[:, None]
    assert geometry.silhouette(x, y, "cosine") != pytest.approx(geometry.silhouette(x, y))
    assert math.isnan(geometry.silhouette(x, np.zeros(len(x))))
    assert math.isnan(geometry.silhouette(x[:2], [0, 1]))
    with pytest.raises(ValueError, match="unknown metric 'manhattan'"):
        geometry.silhouette(x, y, "manhattan")
    with pytest.raises(ValueError, match="not finite"):
        geometry.silhouette(np.full((3, 2), np.nan), [0, 1, 1])


def test_centroid_distances_are_scipys():
    x, y = blobs()
    found = geometry.centroid_distances(x, y)
    for label in (0, 1):
        centre = x[y == label].mean(0)
        for i in np.flatnonzero(y == label):
            assert found[i] == pytest.approx(cosine_distance(x[i], centre), abs=1e-12)
    assert geometry.centroid_distances([[1, 0], [0, 1]], [0, 0]) == pytest.approx(1 - 0.5**0.5)
    assert np.isnan(geometry.centroid_distances([[1.0, 0], [-1.0, 0]], [0, 0])).all()
    assert (geometry.centroid_distances(np.tile(x[:1], (4, 1)), [0] * 4) >= 0).all()


# -- pairs of sets -------------------------------------------------------------------------------


def test_gaps_are_the_losses_of_the_paper():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 40, 9))
    found = geometry.gaps(a, b)
    for name in ("elementwise", "euclid", "cosine"):
        loss = losses.MANIFOLD[name](torch.from_numpy(a), torch.from_numpy(b))
        assert found[name] == pytest.approx(float(loss), abs=1e-6)
    assert found["elementwise"] > found["euclid"]
    order = rng.permutation(40)
    permuted = geometry.gaps(a, b[order])
    assert permuted["euclid"] == pytest.approx(found["euclid"])
    assert permuted["elementwise"] != pytest.approx(found["elementwise"])
    assert math.isnan(geometry.gaps(a - a.mean(0) * 0 - a, b)["cosine"])


def test_cka_is_the_ratio_of_norms_of_cross_covariances():
    """Kornblith et al., section 4: ||Y'X||_F^2 / (||X'X||_F ||Y'Y||_F) of centred matrices."""
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((50, 7)), rng.standard_normal((50, 4))
    y[:, 0] += x[:, 0] * 2
    cx, cy = x - x.mean(0), y - y.mean(0)
    norm = np.linalg.norm
    expected = norm(cy.T @ cx) ** 2 / (norm(cx.T @ cx) * norm(cy.T @ cy))
    assert geometry.linear_cka(x, y) == pytest.approx(expected)
    assert 0.1 < expected < 0.9


@pytest.mark.parametrize("debiased", [False, True])
def test_cka_ignores_rotation_scale_and_shift_and_minds_the_rows(debiased):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((60, 8))
    assert geometry.linear_cka(x, x, debiased) == pytest.approx(1)
    assert geometry.linear_cka(x, 1e-4 * x @ rotation(8) + 5, debiased) == pytest.approx(1)
    stretched = x * np.linspace(0.01, 5, 8)
    assert geometry.linear_cka(x, stretched, debiased) < 0.95
    assert geometry.linear_cka(x, x[rng.permutation(60)], debiased) < 0.3
    assert math.isnan(geometry.linear_cka(x, np.ones((60, 3)), debiased))
    with pytest.raises(ValueError, match="60 and 59 rows"):
        geometry.linear_cka(x, x[1:], debiased)


def test_cka_of_unrelated_sets_is_far_above_zero_unless_debiased():
    """The trap of few examples and wide vectors: 40 texts, 384 and 768 dimensions."""
    plain, corrected = [], []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        a, b = rng.standard_normal((40, 384)), rng.standard_normal((40, 768))
        plain.append(geometry.linear_cka(a, b))
        corrected.append(geometry.linear_cka(a, b, debiased=True))
    assert min(plain) > 0.8
    assert abs(np.mean(corrected)) < 0.05


def test_the_unbiased_hsic_is_the_mean_over_four_different_examples():
    """Song et al.: a U-statistic; here by brute force over all quadruples of six examples."""
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((6, 3)), rng.standard_normal((6, 2))
    y[:, 0] += x[:, 0]
    k, m = x @ x.T, y @ y.T
    terms = [k[i, j] * (m[i, j] + m[q, r] - 2 * m[i, q])
             for i, j, q, r in itertools.permutations(range(6), 4)]  # fmt: skip
    assert geometry._unbiased(k, m) / (6 * 3) == pytest.approx(np.mean(terms))


# -- series and maps -----------------------------------------------------------------------------


def test_sensitivity_of_a_line_is_its_slope_squared():
    sigmas = [0, 1, 2, 5]
    assert geometry.sensitivity([7 - 3 * s for s in sigmas], sigmas) == pytest.approx(9)
    assert geometry.sensitivity([5, 5, 5, 5], sigmas) == 0
    # by hand: scores 50, 48, 49, 45 have variance 3.5, sigmas 3.5 (population); either ddof
    assert geometry.sensitivity([50, 48, 49, 45], sigmas) == pytest.approx(3.5 / 3.5)
    ddof = np.var([50, 48, 49, 45], ddof=1) / np.var(sigmas, ddof=1)
    assert geometry.sensitivity([50, 48, 49, 45], sigmas) == pytest.approx(ddof)
    with pytest.raises(ValueError, match="all noise levels are the same"):
        geometry.sensitivity([1, 2], [1, 1])
    with pytest.raises(ValueError, match="a score a level"):
        geometry.sensitivity([1, 2, 3], [0, 1])


def test_autocorrelation_of_known_series():
    assert geometry.autocorrelation([1, -1] * 500) == pytest.approx(-1, abs=0.01)
    assert geometry.autocorrelation(np.arange(2000)) == pytest.approx(1, abs=0.01)
    rng = np.random.default_rng(0)
    series = [0.0]
    for e in rng.standard_normal(5000):
        series.append(0.6 * series[-1] + e)
    assert geometry.autocorrelation(series) == pytest.approx(0.6, abs=0.03)
    assert math.isnan(geometry.autocorrelation([1, 1, 1]))


def test_a_map_keeps_neighbours_and_has_the_same_bits_in_another_process():
    x, y = blobs(60, gap=8)
    found = geometry.tsne(x, seed=1)
    assert found.shape == (60, 2) and geometry.silhouette(found, y) > 0.5
    code = (
        "import sys; sys.path[:0] = ['tests', '.']; from test_geometry import blobs; "
        "from armada_lib import geometry; print(geometry.tsne(blobs(60, gap=8)[0], seed=1).tobytes().hex())"
    )
    env = os.environ | {"OMP_NUM_THREADS": "4"}  # here it is 1
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT, env=env
    )
    assert done.stdout.strip() == found.tobytes().hex()
    assert len(geometry.tsne(x[:5])) == 5
    with pytest.raises(ValueError, match="4 vectors or more"):
        geometry.tsne(x[:3])
