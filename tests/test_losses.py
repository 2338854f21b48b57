"""Eqs. 1-5 and their alternatives against numpy written from the equations; their invariants."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from armada_lib import losses

RNG = np.random.default_rng(7)
O_TS, O_S = RNG.normal(0, 3, (6, 3)), RNG.normal(0, 3, (6, 3))
P_TS, P_S = RNG.normal(0.3, 1, (6, 5)), RNG.normal(-0.1, 2, (6, 5))
PHIS = {
    "softmax": lambda z: np.exp(z) / np.exp(z).sum(-1, keepdims=True),
    "sigmoid": lambda z: 1 / (1 + np.exp(-z)),
    "identity": lambda z: z,
}
TAUS = (0.5, 1.0, 5.0)


def t(x: np.ndarray, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.tensor(x, dtype=dtype)


def batch(seed: int, b: int, k: int, scale: float = 1.0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return scale * torch.randn(b, k, generator=g, dtype=torch.float64)


def norm(x: np.ndarray) -> np.ndarray:
    return np.sqrt((x**2).sum(-1))


# Values ------------------------------------------------------------------------------------------


def test_cross_entropy_is_the_mean_of_minus_log_probability():
    y = np.array([0, 2, 1, 1, 0, 2])
    p = PHIS["softmax"](O_S)
    expected = -np.log(p[np.arange(6), y]).mean()
    assert losses.cross_entropy(t(O_S), torch.tensor(y)).item() == pytest.approx(expected)


def test_cross_entropy_of_tokens_leaves_out_the_ignored_ones():
    logits, y = RNG.normal(size=(2, 4, 7)), np.array([[-100, 3, 6, -100], [0, -100, 1, 5]])
    p = PHIS["softmax"](logits)
    kept = [-np.log(p[i, j, y[i, j]]) for i in range(2) for j in range(4) if y[i, j] >= 0]
    assert losses.cross_entropy(t(logits), torch.tensor(y)).item() == pytest.approx(np.mean(kept))


def test_mse_takes_a_column_of_outputs_and_refuses_to_broadcast():
    o, y = RNG.normal(size=(6, 1)), RNG.normal(size=6)
    expected = ((o[:, 0] - y) ** 2).mean()
    assert losses.mse(t(o), t(y)).item() == pytest.approx(expected)
    assert losses.mse(t(o), t(y[:, None])).item() == pytest.approx(expected)
    assert losses.mse(t(O_S), t(O_TS)).item() == pytest.approx(((O_S - O_TS) ** 2).mean())
    with pytest.raises(ValueError, match="differ in shape"):
        losses.mse(t(y), t(o))


def test_bce_is_the_mean_over_examples_and_labels():
    y = (RNG.random((6, 3)) > 0.5).astype(int)
    p = PHIS["sigmoid"](O_S)
    expected = -(y * np.log(p) + (1 - y) * np.log(1 - p)).mean()
    assert losses.bce(t(O_S), torch.tensor(y)).item() == pytest.approx(expected)


def kl(a: np.ndarray, b: np.ndarray, phi: str) -> float:
    if phi == "softmax":
        return (a * np.log(a / b)).sum(-1).mean()
    return (a * np.log(a / b) + (1 - a) * np.log((1 - a) / (1 - b))).sum(-1).mean()


SOFT = {
    "norm": lambda a, b, tau, phi: norm(a - b).mean(),
    "squared": lambda a, b, tau, phi: (norm(a - b) ** 2).mean(),
    "frobenius": lambda a, b, tau, phi: math.sqrt(((a - b) ** 2).sum()),
    "kl": lambda a, b, tau, phi: tau**2 * kl(a, b, phi),
    "mse": lambda a, b, tau, phi: tau**2 * ((a - b) ** 2).mean(),
}


@pytest.mark.parametrize("tau", TAUS)
@pytest.mark.parametrize("phi", PHIS)
@pytest.mark.parametrize("name", SOFT)
def test_soft_losses(name: str, phi: str, tau: float):
    if (name, phi) == ("kl", "identity"):
        with pytest.raises(ValueError, match="regression"):
            losses.soft_kl(t(O_TS), t(O_S), tau, losses.identity)
        return
    expected = SOFT[name](PHIS[phi](O_TS / tau), PHIS[phi](O_S / tau), tau, phi)
    got = losses.SOFT[name](t(O_TS), t(O_S), tau, losses.PHI[phi])
    assert got.item() == pytest.approx(expected, rel=1e-9)


def cos(a: np.ndarray, b: np.ndarray) -> float:
    return float((a * b).sum() / math.sqrt((a**2).sum() * (b**2).sum()))


A, B = P_TS.mean(0), P_S.mean(0)
MANIFOLD = {
    "cosine": 1 - cos(A, B),
    "cosine_literal": 1 - float((A * B).sum()),
    "euclid": float(norm(A - B)),
    "elementwise": float(norm(P_TS - P_S).mean()),
    "euclid_squared": float(((A - B) ** 2).mean()),
    "elementwise_squared": float(((P_TS - P_S) ** 2).mean()),
}


@pytest.mark.parametrize("name", MANIFOLD)
def test_manifold_losses(name: str):
    got = losses.MANIFOLD[name](t(P_TS), t(P_S)).item()
    assert got == pytest.approx(MANIFOLD[name], rel=1e-9)


def test_the_tables_hold_exactly_what_is_checked_here():
    assert set(losses.SOFT) == set(SOFT)
    assert set(losses.MANIFOLD) == set(MANIFOLD)
    assert set(losses.PHI) == set(PHIS)
    assert set(losses.TASK_LOSS) == set(losses.TASK_PHI) == {"cross_entropy", "mse", "bce"}


def test_eq_2_mixes_its_two_terms():
    task, soft = torch.tensor(2.0), torch.tensor(0.25)
    assert losses.student_output(task, soft, 0.5).item() == 1.125
    assert losses.student_output(task, soft, 0.0).item() == 2.0


def test_squared_forms_agree_with_each_other():
    """mse = squared tau^2 / c, euclid^2 = k euclid_squared, and the exact split of the scatter."""
    soft = losses.soft_mse(t(O_TS), t(O_S), 5.0) / losses.soft_squared(t(O_TS), t(O_S), 5.0)
    assert soft.item() == pytest.approx(25 / 3)
    u = losses.euclid(t(P_TS), t(P_S)).item()
    assert u**2 == pytest.approx(5 * losses.euclid_squared(t(P_TS), t(P_S)).item())
    d = P_TS - P_S
    scatter = (norm(d - d.mean(0)) ** 2).mean()
    per_example = 5 * losses.elementwise_squared(t(P_TS), t(P_S)).item()
    assert per_example == pytest.approx(u**2 + scatter)


def test_soft_mse_of_a_regression_is_the_mse_of_the_outputs():
    got = losses.soft_mse(t(O_TS[:, :1]), t(O_S[:, :1]), 5.0, losses.identity).item()
    assert got == pytest.approx(((O_TS[:, 0] - O_S[:, 0]) ** 2).mean())


def test_soft_norm_of_a_regression_is_the_absolute_difference_over_tau():
    got = losses.soft_norm(t(O_TS[:, :1]), t(O_S[:, :1]), 5.0, losses.identity).item()
    assert got == pytest.approx(np.abs(O_TS[:, 0] - O_S[:, 0]).mean() / 5)


def test_an_aligner_margin_of_one_against_a_uniform_student():
    got = losses.soft_norm(t([[1.0, 0.0]]), t([[0.0, 0.0]]), 5.0).item()
    assert got == pytest.approx(0.0705, abs=1e-4)


# Names and shapes --------------------------------------------------------------------------------


def test_choose_names_the_valid_choices():
    assert losses.choose(losses.MANIFOLD, "euclid", "manifold loss") is losses.euclid
    with pytest.raises(ValueError, match=r"unknown manifold loss 'euclidean'.*elementwise"):
        losses.choose(losses.MANIFOLD, "euclidean", "manifold loss")


@pytest.mark.parametrize("name", losses.MANIFOLD)
def test_manifold_losses_refuse_other_shapes(name: str):
    with pytest.raises(ValueError, match=r"\(6, 5\) and \(6, 3\)"):
        losses.MANIFOLD[name](t(P_TS), t(O_S))
    with pytest.raises(ValueError, match="differ in shape"):
        losses.MANIFOLD[name](t(P_TS), t(P_S[:1]))  # would broadcast


@pytest.mark.parametrize("name", losses.SOFT)
def test_soft_losses_refuse_other_shapes_and_temperatures(name: str):
    with pytest.raises(ValueError, match="differ in shape"):
        losses.SOFT[name](t(O_TS), t(O_S[:1]), 5.0, losses.softmax)
    with pytest.raises(ValueError, match="tau"):
        losses.SOFT[name](t(O_TS), t(O_S), 0.0, losses.softmax)


# Precision ---------------------------------------------------------------------------------------


def everything() -> dict:
    """Every loss as a function of two (b, n) tensors."""
    table = {f"soft {k}": (lambda a, b, f=f: f(a, b, 5.0, losses.softmax))
             for k, f in losses.SOFT.items()}  # fmt: skip
    table |= {f"manifold {k}": f for k, f in losses.MANIFOLD.items()}
    table["cross_entropy"] = lambda a, b: losses.cross_entropy(b, a.argmax(-1))
    table["mse"] = lambda a, b: losses.mse(b, a)
    table["bce"] = lambda a, b: losses.bce(b, (a > 0))
    return table


EVERYTHING = everything()


@pytest.mark.parametrize("name", EVERYTHING)
def test_bf16_inputs_are_computed_in_float32(name: str):
    a, b = batch(0, 64, 33).bfloat16(), batch(1, 64, 33).bfloat16().requires_grad_()
    loss = EVERYTHING[name](a, b)
    assert loss.dtype == torch.float32 and loss.ndim == 0
    exact = EVERYTHING[name](a.double(), b.detach().double()).item()
    assert loss.item() == pytest.approx(exact, rel=1e-5)  # bf16 arithmetic is off by 1e-3
    loss.backward()
    assert b.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("name", EVERYTHING)
def test_autocast_does_not_reach_into_the_losses(name: str):
    a, b = batch(0, 16, 33).float(), batch(1, 16, 33).float()
    plain = EVERYTHING[name](a, b)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(EVERYTHING[name](a, b), plain)


# Identities and invariants of the projections ----------------------------------------------------

SIZES = {"seed": st.integers(0, 10**6), "b": st.integers(1, 8), "k": st.integers(1, 64)}
SCALES = {"s": st.floats(-3, 2).map(math.exp), "r": st.floats(-3, 2).map(math.exp)}


@settings(max_examples=60, deadline=None)
@given(**SIZES, **SCALES)
def test_proposition_1_corrected(seed: int, b: int, k: int, s: float, r: float):
    """E >= U, U^2 = (|a| - |b|)^2 + 2 m C, U >= sqrt(2 m C), and U >= m sqrt C only if m <= 2."""
    p_ts, p_s = batch(seed, b, k, s), batch(seed + 1, b, k, r)
    e = losses.elementwise(p_ts, p_s).item()
    u = losses.euclid(p_ts, p_s).item()
    c = max(0.0, losses.cosine(p_ts, p_s).item())
    na, nb = p_ts.mean(0).norm().item(), p_s.mean(0).norm().item()
    m = na * nb
    assert e >= u * (1 - 1e-12)
    # The constant under the root adds 1e-12 to U^2 and, relatively, 1e-12 / |a|^2 to cos.
    slack = 2e-12 * (1 + m) * (1 + 1 / na**2 + 1 / nb**2)
    assert u**2 == pytest.approx((na - nb) ** 2 + 2 * m * c, rel=1e-9, abs=slack)
    assert u**2 >= 2 * m * c * (1 - 1e-9) - slack
    if m <= 2:
        assert u**2 >= m**2 * c * (1 - 1e-9) - slack
    assert 0 <= c <= 2 + 1e-9


@pytest.mark.parametrize(
    ("a", "b", "u", "c", "bound"),
    [((2, 0), (0, 2), math.sqrt(8), 1, 4), ((10, 0), (0, 10), math.sqrt(200), 1, 100)],
)
def test_counterexamples_to_proposition_1_as_printed(a, b, u, c, bound):
    a, b = t(np.array([a], float)), t(np.array([b], float))
    assert losses.euclid(a, b).item() == pytest.approx(u)
    assert losses.cosine(a, b).item() == pytest.approx(c)
    m = (a.norm() * b.norm()).item()
    assert bound == pytest.approx(m * math.sqrt(c)) and bound > u


def test_the_literal_cosine_has_no_lower_bound():
    a = t(np.array([[2.0, 0.0]]))
    assert losses.cosine_literal(a, t(np.array([[1.0, 0.0]]))).item() == pytest.approx(-1)
    assert losses.cosine_literal(a, t(np.array([[500.0, 0.0]]))).item() == pytest.approx(-999)


def test_zero_loss_of_the_centroids_without_equal_sets():
    p_ts, p_s = t(np.array([[2.0], [4.0]])), t(np.array([[3.0], [3.0]]))
    assert losses.euclid(p_ts, p_s).item() <= 1e-6
    assert losses.cosine(p_ts, p_s).item() == pytest.approx(0, abs=1e-9)
    assert losses.elementwise(p_ts, p_s).item() == pytest.approx(1)


CENTROID = ("cosine", "cosine_literal", "euclid", "euclid_squared")
PER_EXAMPLE = ("elementwise", "elementwise_squared")


@pytest.mark.parametrize("name", losses.MANIFOLD)
def test_permutations(name: str):
    assert set(CENTROID) | set(PER_EXAMPLE) == set(losses.MANIFOLD)
    loss, order = losses.MANIFOLD[name], torch.tensor([3, 0, 5, 1, 2, 4])
    p_ts, p_s = t(P_TS), t(P_S)
    before = loss(p_ts, p_s).item()
    assert loss(p_ts[order], p_s[order]).item() == pytest.approx(before, rel=1e-12)
    one_side = loss(p_ts[order], p_s).item()
    if name in CENTROID:
        assert one_side == pytest.approx(before, rel=1e-12)
    else:
        assert abs(one_side - before) > 1e-3


@pytest.mark.parametrize("name", losses.MANIFOLD)
def test_the_centroid_is_the_callers(name: str):
    """With the mean over two processes, each half gives the centroid loss of the whole batch."""
    halves = [(t(P_TS[i]), t(P_S[i])) for i in (slice(0, 2), slice(2, 6))]
    whole = {id(a): t(P_TS).mean(0) for a, _ in halves} | {id(b): t(P_S).mean(0) for _, b in halves}
    seen = []

    def everywhere(p: torch.Tensor) -> torch.Tensor:
        seen.append(p)
        return whole[id(p)]

    got = [losses.MANIFOLD[name](a, b, everywhere).item() for a, b in halves]
    if name in CENTROID:
        assert got == pytest.approx([MANIFOLD[name]] * 2, rel=1e-9) and len(seen) == 4
    else:
        assert (2 * got[0] + 4 * got[1]) / 6 == pytest.approx(MANIFOLD[name]) and not seen


# Gradients ---------------------------------------------------------------------------------------


def grad(loss, p_ts: torch.Tensor, p_s: torch.Tensor) -> torch.Tensor:
    p_s = p_s.clone().requires_grad_()
    return torch.autograd.grad(loss(p_ts, p_s), p_s)[0]


@pytest.mark.parametrize("b", [1, 8, 32])
@pytest.mark.parametrize("scale", [0.05, 1.0, 10.0])
def test_gradient_norms_on_the_projections(b: int, scale: float):
    """1 / sqrt b for E and U at any distance; sin(theta) / (|pbar_s| sqrt b) for the cosine."""
    p_ts, p_s = batch(0, b, 768, scale), batch(1, b, 768, scale)
    for loss in (losses.elementwise, losses.euclid):
        assert grad(loss, p_ts, p_s).norm().item() == pytest.approx(1 / math.sqrt(b), rel=1e-9)
    a, c = p_ts.mean(0).numpy(), p_s.mean(0).numpy()
    expected = math.sqrt(1 - cos(a, c) ** 2) / (norm(c) * math.sqrt(b))
    assert grad(losses.cosine, p_ts, p_s).norm().item() == pytest.approx(expected, rel=1e-6)
    literal = norm(a) / math.sqrt(b)
    assert grad(losses.cosine_literal, p_ts, p_s).norm().item() == pytest.approx(literal)
    u = norm(a - c)
    squared = 2 * u / (768 * math.sqrt(b))
    assert grad(losses.euclid_squared, p_ts, p_s).norm().item() == pytest.approx(squared)


def test_the_gradient_points_towards_the_aligner():
    for name in ("cosine", "euclid", "elementwise", "euclid_squared", "elementwise_squared"):
        loss, p_ts, p_s = losses.MANIFOLD[name], t(P_TS), t(P_S)
        moved = p_s - 1e-3 * grad(loss, p_ts, p_s)
        assert loss(p_ts, moved) < loss(p_ts, p_s), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", sorted(set(EVERYTHING) - {"cross_entropy", "bce"}))
def test_identical_inputs_give_zero_and_a_finite_gradient(name: str, dtype: torch.dtype):
    a = batch(0, 6, 5).to(dtype)
    b = a.clone().requires_grad_()
    loss = EVERYTHING[name](a, b)
    (g,) = torch.autograd.grad(loss, b)
    assert torch.isfinite(g).all()
    if name != "manifold cosine_literal":
        assert loss.item() == pytest.approx(0, abs=2e-6)
        assert g.abs().max().item() <= 1e-6


def test_zero_centroids_have_a_finite_gradient():
    zero = torch.zeros(4, 3)
    assert losses.cosine(zero, zero).item() == 1
    assert torch.isfinite(grad(losses.cosine, zero + 1, zero)).all()


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    b=st.integers(1, 8),
    c=st.integers(2, 6),
    spread=st.floats(0.01, 100),
    tau=st.sampled_from([0.5, 1.0, 5.0, 20.0]),
)
def test_range_and_gradient_of_the_logit_term(seed: int, b: int, c: int, spread: float, tau: float):
    o_ts, o_s = batch(seed, b, c, spread), batch(seed + 1, b, c, spread).requires_grad_()
    d = losses.soft_norm(o_ts, o_s, tau)
    assert 0 <= d.item() <= math.sqrt(2) + 1e-9
    (g,) = torch.autograd.grad(d, o_s)
    assert (b * g.norm(dim=1)).max().item() <= 1 / (2 * tau) + 1e-9
    distance = (o_ts - o_s).norm(dim=1).mean().item()
    assert d.item() <= distance / (2 * tau) + 1e-6  # softmax(z / tau) is 1 / (2 tau)-Lipschitz


def test_the_bounds_of_the_logit_term_are_attained():
    far = losses.soft_norm(t([[1e4, -1e4]]), t([[-1e4, 1e4]]), 5.0).item()
    assert far == pytest.approx(math.sqrt(2))
    o_s = torch.zeros(1, 2, dtype=torch.float64, requires_grad=True)
    (g,) = torch.autograd.grad(losses.soft_norm(t([[0.01, -0.01]]), o_s, 5.0), o_s)
    assert g.norm().item() == pytest.approx(0.1, rel=1e-4)


def test_a_low_temperature_compares_decisions():
    disagree = (O_TS.argmax(-1) != O_S.argmax(-1)).mean()
    assert 0 < disagree < 1
    d = losses.soft_norm(t(O_TS), t(O_S), 1e-3).item()
    assert d == pytest.approx(math.sqrt(2) * disagree, abs=1e-5)


def test_a_high_temperature_compares_centred_logits():
    """tau D -> mean |z| / c and KL -> mean |z|^2 / (2 c), z the centred difference of logits."""
    z = O_TS - O_S
    z -= z.mean(-1, keepdims=True)
    d = losses.soft_norm(t(O_TS), t(O_S), 1e3).item()
    assert 1e3 * d == pytest.approx(norm(z).mean() / 3, rel=1e-2)
    kl_loss = losses.soft_kl(t(O_TS), t(O_S), 1e3).item()
    assert kl_loss == pytest.approx((norm(z) ** 2).mean() / 6, rel=1e-2)


def test_soft_kl_survives_extreme_logits():
    o_s = torch.tensor([[-300.0, 300.0]], requires_grad=True)
    for phi in (losses.softmax, losses.sigmoid):
        loss = losses.soft_kl(torch.tensor([[300.0, -300.0]]), o_s, 1.0, phi)
        (g,) = torch.autograd.grad(loss, o_s)
        assert torch.isfinite(loss) and torch.isfinite(g).all() and loss > 100


def test_closeness_of_projections_bounds_the_auxiliary_logits():
    """mean |a_s - a_ts| <= |W_s| E + |W_s - W_ts| mean |p_ts| + |w_s - w_ts|; U gives no bound."""
    for seed in range(50):
        p_ts, p_s = batch(seed, 16, 12, 2.0), batch(seed + 1000, 16, 12)
        w_ts, w_s = batch(seed + 2000, 3, 12), batch(seed + 3000, 3, 12)
        v_ts, v_s = batch(seed + 4000, 1, 3), batch(seed + 5000, 1, 3)
        left = ((p_s @ w_s.T + v_s) - (p_ts @ w_ts.T + v_ts)).norm(dim=1).mean()
        right = torch.linalg.matrix_norm(w_s, 2) * losses.elementwise(p_ts, p_s)
        right += torch.linalg.matrix_norm(w_s - w_ts, 2) * p_ts.norm(dim=1).mean()
        right += (v_s - v_ts).norm()
        assert left <= right
        reversed_rows = p_ts.flip(0)
        assert losses.euclid(p_ts, reversed_rows) < 2e-6
        assert ((p_ts - reversed_rows) @ w_ts.T).norm(dim=1).mean() > 1
