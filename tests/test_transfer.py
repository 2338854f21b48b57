"""Proposition 2: counterexamples are what they say, and the bound holds and is reached."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from armada_lib import losses, transfer


def drawn(seed=0, b=6, k=5, c=3):
    rng = np.random.default_rng(seed)
    x, y = rng.standard_normal((2, b, k))
    heads = [(rng.standard_normal((c, k)), rng.standard_normal(c)) for _ in range(2)]
    return x, y, *heads


@pytest.mark.parametrize("shape, nullity", [((2, 7), 5), ((3, 3), 0), ((4, 2), 0)])
def test_the_kernel_is_what_a_matrix_forgets(shape, nullity):
    m = np.random.default_rng(0).standard_normal(shape)
    found = transfer.kernel(m)
    assert found.shape == (nullity, shape[1])
    np.testing.assert_allclose(m @ found.T, 0, atol=1e-12)
    np.testing.assert_allclose(found @ found.T, np.eye(nullity), atol=1e-12)


def test_the_kernel_of_a_matrix_that_lacks_rank():
    m = np.outer([1.0, 2.0], [1.0, 0.0, 1.0])
    assert transfer.kernel(m).shape == (2, 3)


def test_the_collision_keeps_the_assumptions_and_breaks_the_conclusion():
    c = transfer.smallest_collision()
    assert len({tuple(p) for p in c.points.tolist()}) == 2
    assert c.O_ts.any() and c.O_s.any()  # linear and not zero: onto R
    np.testing.assert_array_equal(c.o_ts, c.points @ c.O_ts)
    np.testing.assert_array_equal(c.o_s, c.points @ c.O_s)
    assert len(set(c.o_ts)) != len(set(c.o_s))
    with pytest.raises(ValueError, match="no counterexample among integers up to 0"):
        transfer.smallest_collision(0)


def test_counterexamples_say_what_was_computed():
    found = transfer.counterexamples(0, width=24, student=40).set_index("case")
    numbers = lambda text: [float(x) for x in re.findall(r"-?\d+(?:\.\d+)?", text)]
    head = found.loc["a head from 24 to 2"]
    assert numbers(head["given"]) == [22, 10] and numbers(head["yet"]) == [0]
    wide = found.loc["a student 40 wide"]
    assert numbers(wide["given"]) == [5, 0] and numbers(wide["yet"])[0] > 1
    assert numbers(found.loc["zero loss", "yet"]) == [2, 1, 1]
    order = found.loc["rows in another order"]
    assert numbers(order["given"]) == [0, 0] and min(numbers(order["yet"])) > 0.5
    assert numbers(found.loc["negated logits", "yet"]) == [0]
    assert found.equals(transfer.counterexamples(0, width=24, student=40).set_index("case"))


def test_the_bound_by_hand():
    x, y = np.array([[3.0, 4.0]]), np.array([[0.0, 4.0]])
    W = np.array([[2.0, 0.0], [0.0, 1.0]])
    found = transfer.transfer(x, y, (np.eye(2), [0, 0]), (W, [0, 2]))
    # logits (3, 4) and (0, 6); |W| = 2, E = 3; |W - I| = 1, |p_ts| = 5; |w| = 2
    assert found == pytest.approx((13**0.5, 6, 5, 2))
    assert found.right == pytest.approx(13)


@pytest.mark.parametrize("centroids", [False, True])
def test_the_bound_holds_and_is_reached(centroids):
    for seed in range(50):
        x, y, ts, s = drawn(seed)
        found = transfer.transfer(x, y, ts, s, centroids)
        assert found.left <= found.right
        distance = np.linalg.norm(x @ ts[0].T + ts[1] - y @ s[0].T - s[1], axis=1).mean()
        if not centroids:
            assert found.left == pytest.approx(distance)
        else:
            assert found.left <= distance + 1e-12
    x, y, _, _ = drawn()
    equal = transfer.transfer(x, y, (np.eye(5), np.ones(5)), (np.eye(5), np.ones(5)), centroids)
    assert equal.left == pytest.approx(equal.right) and equal.weights == equal.biases == 0


def test_centroids_bound_the_mean_alone():
    x, _, ts, _ = drawn()
    found = transfer.transfer(x, x[::-1], ts, ts, centroids=True)
    assert found.right < 1e-12
    assert transfer.transfer(x, x[::-1], ts, ts).left > 0.5


@pytest.mark.parametrize("tau", [0.5, 5.0])
def test_matching_is_at_most_the_distance_of_logits_over_two_tau(tau):
    for seed in range(50):
        x, y, ts, s = drawn(seed)
        a, b = x @ ts[0].T + ts[1], y @ s[0].T + s[1]
        D = float(losses.soft_norm(torch.from_numpy(a), torch.from_numpy(b), tau))
        far = transfer.transfer(x, y, ts, s).left
        assert far / (2 * tau) - D > -1e-6


def test_random_bounds_hold_and_come_near():
    found = transfer.random_bounds(300, seed=0)
    ratio = found["left"] / found["right"]
    assert 0.7 < ratio.max() <= 1


def test_an_output_head_through_the_projection():
    rng = np.random.default_rng(0)
    O = rng.standard_normal((2, 4))  # noqa: E741
    tall = np.linalg.qr(rng.standard_normal((6, 4)))[0]  # d = 4, k = 6
    np.testing.assert_allclose(transfer.through(O, tall) @ tall, O, atol=1e-12)
    wide = np.linalg.qr(rng.standard_normal((4, 3)))[0].T  # d = 4, k = 3
    with pytest.raises(ValueError, match="no function of the projection"):
        transfer.through(O, wide)
    inside = rng.standard_normal((2, 3)) @ wide
    np.testing.assert_allclose(transfer.through(inside, wide) @ wide, inside, atol=1e-12)
