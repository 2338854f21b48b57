"""Proposition 1: known distances, exact optima, gradients; and that each check can fail."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pytest
import torch

from armada_lib import losses, propositions
from armada_lib.propositions import distances


def rows(*vectors) -> np.ndarray:
    return np.array(vectors, np.float64)


@pytest.mark.parametrize(
    "a, b, U, C, m, printed, corrected",
    [
        ((2, 0), (0, 2), 8**0.5, 1, 4, 4, 8**0.5),
        ((10, 0), (0, 10), 200**0.5, 1, 100, 100, 200**0.5),
        ((1, 0), (1, 0), 0, 0, 1, 0, 0),
        ((0.1, 0), (0, 0.1), 0.02**0.5, 1, 0.01, 0.01, 0.02**0.5),
        ((3, 0), (-1, 0), 4, 2, 3, 3 * 2**0.5, 12**0.5),
    ],
)
def test_distances_of_one_example(a, b, U, C, m, printed, corrected):
    d = distances([a], [b])
    assert (d.E, d.U, d.C, d.m) == pytest.approx((U, U, C, m))
    assert (d.printed, d.corrected) == pytest.approx((printed, corrected))
    assert d.holds == (printed < U - 1e-9)
    assert d.literal == pytest.approx(1 - np.dot(a, b))
    assert d.difference == pytest.approx(np.linalg.norm(a) - np.linalg.norm(b))


def test_distances_are_the_losses():
    rng = np.random.default_rng(0)
    for _ in range(20):
        x, y = rng.standard_normal((2, 5, 7))
        d = distances(x, y)
        p, q = torch.from_numpy(x), torch.from_numpy(y)
        for name, value in (("elementwise", d.E), ("euclid", d.U), ("cosine", d.C),
                            ("cosine_literal", d.literal)):  # fmt: skip
            assert float(losses.MANIFOLD[name](p, q)) == pytest.approx(value, abs=1e-9)


def test_the_cosine_of_nearly_parallel_centroids_keeps_its_digits():
    angle = 1e-6
    d = distances([[1.0, 0.0]], [[np.cos(angle), np.sin(angle)]])
    np.testing.assert_allclose(d.C, angle**2 / 2, rtol=1e-6)


def test_a_zero_centroid_has_no_cosine_and_shapes_must_agree():
    d = distances([[0.0, 0.0]], [[1.0, 0.0]])
    assert np.isnan(d.C) and d.U == 1
    third = np.array([[0.1, 0.2], [0.2, -0.3], [-0.3, 0.1]])  # their sum is not exactly zero
    assert third.mean(0).any() and np.isnan(distances(third, third + 1).C)
    for pair in ((np.zeros((2, 3)), np.zeros((3, 3))), (np.zeros(3), np.zeros(3))):
        with pytest.raises(ValueError, match="two batches of one shape"):
            distances(*pair)


def test_the_search_finds_what_is_false_and_nothing_else():
    found = propositions.random_batches(2000, seed=1)
    count = propositions.violations(found).set_index("statement")["violated"]
    assert count["U > m √C, as printed"] == count["the same, where m > 2"] > 100
    assert count["the same, where m ≤ 2"] == 0
    for true in ("E ≥ U", "U ≥ √(2 m C), corrected", "U² = (|a| − |b|)² + 2 m C"):
        assert count[true] == 0
    assert count["U > m √C, C as Eq. 3 is printed"] > 100
    assert count["the same: the root is undefined"] == (found["literal"] < 0).sum() > 100
    pd.testing.assert_frame_equal(found, propositions.random_batches(2000, seed=1))
    assert not found.equals(propositions.random_batches(2000, seed=2))


def test_violations_of_made_up_rows_are_counted():
    d = distances([(2, 0)], [(0, 2)])._asdict() | {"printed": 4.0, "corrected": 8**0.5}
    good = pd.DataFrame([d])
    count = lambda **change: propositions.violations(good.assign(**change)).set_index("statement")
    assert count().loc["U > m √C, as printed", "worst"] == pytest.approx(8**0.5 / 4)
    assert count(E=2.0).loc["E ≥ U", "violated"] == 1
    assert count(corrected=3.0).loc["U ≥ √(2 m C), corrected", "violated"] == 1
    assert count(difference=0.1).loc["U² = (|a| − |b|)² + 2 m C", "violated"] == 1


def test_the_shortest_integers_that_violate_it():
    a, b = propositions.smallest_counterexample()
    d = distances([a], [b])
    assert not d.holds and {tuple(a), tuple(b)} == {(0, 2), (1, 1)}
    assert d.U / d.printed == pytest.approx(0.5 / (1 - 0.5**0.5) ** 0.5)
    with pytest.raises(ValueError, match="no counterexample among integers up to 1"):
        propositions.smallest_counterexample(1)  # there m is at most 2


def test_batches_are_cut_in_order():
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((2, 7, 3))
    found = propositions.batched(x, y, 3)
    assert len(found) == 2
    assert found["U"][1] == pytest.approx(distances(x[3:6], y[3:6]).U)
    assert found["printed"][0] == pytest.approx(distances(x[:3], y[:3]).printed)
    with pytest.raises(ValueError, match="7 rows do not fill a batch of 8"):
        propositions.batched(x, y, 8)


def test_optima_known_by_hand():
    found = propositions.optima([[[5, -2], [-2, 1]]], [[0, -4]], [0.5])
    np.testing.assert_allclose(found.x_E, [[0.25, -3.25]])
    np.testing.assert_allclose(found.x_U, [[0.75, -2.25]])


def test_nothing_nearby_is_better_than_an_optimum():
    rng = np.random.default_rng(0)
    n = 200
    root = rng.standard_normal((n, 2, 2))
    Q = root @ root.transpose(0, 2, 1) + 0.1 * np.eye(2)
    c, beta = rng.standard_normal((n, 2)), np.exp(rng.uniform(-2, 3, n))
    found = propositions.optima(Q, c, beta)
    kinks = 0
    for which, best in enumerate(found):
        at = lambda x, w=which: (0.5 * np.einsum("ni,nij,nj->n", x - c, Q, x - c)
                                 + beta * propositions.spread(x)[w])  # fmt: skip
        kinks += (np.abs(propositions.spread(best)[which]) < 1e-12).sum()
        for scale, _ in itertools.product((1.0, 0.1, 1e-3), range(40)):
            other = best + scale * rng.standard_normal((n, 2))
            assert (at(other) >= at(best) - 1e-9).all()
    assert kinks > 20  # the lines where the losses are not smooth occur


def test_elementwise_may_end_farther_but_never_scatters_more():
    ends = propositions.random_optima(5000, seed=0)
    assert (ends["E_at_xE"] > ends["E_at_xU"] + 1e-9).sum() > 20
    scatter = ends["E_at_xE"] - ends["U_at_xE"] - (ends["E_at_xU"] - ends["U_at_xU"])
    assert (scatter <= 1e-9).all()


@pytest.mark.parametrize("size", [1, 2, 3, 6])
def test_the_mean_over_all_batches(size):
    d = np.random.default_rng(0).standard_normal((6, 3)) + 1
    every = [d[list(i)].mean(0) for i in itertools.combinations(range(6), size)]
    expected = np.mean([v @ v for v in every])
    assert propositions.many_batches(d, size) == pytest.approx(expected)


def test_a_batch_is_no_larger_than_the_data():
    with pytest.raises(ValueError, match="a batch of 4 cannot be drawn from 3"):
        propositions.many_batches(np.zeros((3, 2)), 4)


def test_gradients_that_fade_and_that_do_not():
    b = 8
    names = ["elementwise", "euclid", "cosine", "elementwise_squared", "euclid_squared"]
    found = propositions.gradient_norms(names, [1e-2, 1.0], examples=b, width=32)
    wide = found.pivot(index="distance", columns="loss", values="norm")
    shared = found.pivot(index="distance", columns="loss", values="shared")
    for name in ("elementwise", "euclid"):
        np.testing.assert_allclose(wide[name], b**-0.5, rtol=1e-6)
    np.testing.assert_allclose(shared["euclid"], 1, rtol=1e-6)
    assert (shared["elementwise"] < 1).all()
    for name in ("elementwise_squared", "euclid_squared"):
        assert wide[name][1.0] / wide[name][1e-2] == pytest.approx(100)
    # sqrt(mean d^2) is the distance itself, since all rows are equally far
    np.testing.assert_allclose(wide["elementwise_squared"], 2 * wide.index / (32 * b**0.5))
    assert wide["cosine"][1e-2] < 0.03 * wide["cosine"][1.0]


def test_the_gradient_of_the_cosine_is_the_sine_over_the_length():
    rng = np.random.default_rng(3)
    x, y = rng.standard_normal((2, 5, 6))
    p = torch.from_numpy(y).requires_grad_()
    (grad,) = torch.autograd.grad(losses.cosine(torch.from_numpy(x), p), p)
    a, b = x.mean(0), y.mean(0)
    sine = np.sqrt(1 - (a @ b / np.linalg.norm(a) / np.linalg.norm(b)) ** 2)
    assert float(grad.norm()) == pytest.approx(sine / np.linalg.norm(b) / 5**0.5)


def test_matching_gradients():
    found = propositions.matching_gradients(["norm", "squared", "kl"], [1e-3, 1e-2], tau=4.0)
    wide = found.pivot(index="distance", columns="loss", values="norm")
    np.testing.assert_allclose(wide["norm"], 1 / 8, rtol=1e-4)  # the largest there is, 1 / (2 tau)
    for name in ("squared", "kl"):
        assert wide[name][1e-2] / wide[name][1e-3] == pytest.approx(10, rel=1e-3)
    with pytest.raises(ValueError, match="unknown soft loss 'nrom'"):
        propositions.matching_gradients(["nrom"], [1.0])


def test_batches_to_move():
    still, swapped = (propositions.plane_batch((1, 0.5), (0, 2), swapped=s) for s in (False, True))
    for p_ts, p_s in (still, swapped):
        np.testing.assert_allclose(p_ts.mean(0), (1, 0.5), atol=1e-12)
        np.testing.assert_allclose(p_s.mean(0), (0, 2), atol=1e-12)
    a, b = distances(*still), distances(*swapped)
    np.testing.assert_allclose((a.E, b.U, b.C), (a.U, a.U, a.C))
    assert b.E - a.E > 0.01
