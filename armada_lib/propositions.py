"""Proposition 1 of the paper put to the test: what orders the three manifold losses, and what does not.

Plain functions of arrays, in float64 and without the eps that `losses` puts under its roots. With
projections p_ts, p_s (b, k), their batch means a and b, and m = |a| |b|:

    E = mean_i |p_ts,i - p_s,i| (Eq. 5)    U = |a - b| (Eq. 4)    C = 1 - cos(a, b) (Eq. 3)

Searches draw from `seed` alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from numpy.typing import ArrayLike

from armada_lib import losses

Array = np.ndarray
ROUNDING = 1e-9  # relative: what counts as a violation is larger


class Distances(NamedTuple):
    """The three losses of one batch. `C` is nan where a centroid is zero, up to rounding."""

    E: float
    U: float
    C: float
    m: float  # |a| |b|
    difference: float  # |a| - |b|
    literal: float  # 1 - a.b, Eq. 3 as printed

    @property
    def printed(self) -> float:
        """m sqrt(C), what Proposition 1 puts below U."""
        return float(self.m * np.sqrt(self.C))

    @property
    def holds(self) -> bool:
        """U > m sqrt(C), beyond rounding."""
        return self.U - self.printed > ROUNDING * self.printed

    @property
    def corrected(self) -> float:
        """sqrt(2 m C), what is below U."""
        return float(np.sqrt(2 * self.m * self.C))


def distances(p_ts: ArrayLike, p_s: ArrayLike) -> Distances:
    """E, U, C (Eqs. 5, 4, 3), m of one batch; `p_ts`, `p_s` (b, k), else ValueError."""
    x, y = np.asarray(p_ts, np.float64), np.asarray(p_s, np.float64)
    if x.ndim != 2 or x.shape != y.shape:
        raise ValueError(f"two batches of one shape (b, k) are needed, got {x.shape} and {y.shape}")
    a, b = x.mean(0), y.mean(0)
    # a sum of rows that cancel is not zero in floating point, and its direction means nothing
    length = lambda mean, rows: (
        np.linalg.norm(mean) * (np.abs(mean).max() > 1e-14 * np.abs(rows).max())
    )
    long, short = length(a, x), length(b, y)
    m = long * short
    # 1 - cos cancels for nearly parallel centroids; half the squared chord does not
    c = 0.5 * np.sum((a / long - b / short) ** 2) if m else np.nan
    each = np.linalg.norm(x - y, axis=1).mean()
    found = (each, np.linalg.norm(a - b), c, m, long - short, 1 - a @ b)
    return Distances(*(float(v) for v in found))


def batched(p_ts: ArrayLike, p_s: ArrayLike, size: int) -> pd.DataFrame:
    """`distances` of every batch of `size` rows in order, with `printed` and `corrected`.

    `p_ts`, `p_s` (n, k). Rows that do not fill a batch are left out. ValueError if there is no
    whole batch.
    """
    x, y = np.asarray(p_ts, np.float64), np.asarray(p_s, np.float64)
    starts = range(0, len(x) - size + 1, size)
    found = [distances(x[i : i + size], y[i : i + size]) for i in starts]
    if not found:
        raise ValueError(f"{len(x)} rows do not fill a batch of {size}")
    extra = pd.DataFrame(
        {"printed": [d.printed for d in found], "corrected": [d.corrected for d in found]}
    )
    return pd.concat([pd.DataFrame(found), extra], axis=1)


# Proposition 1 ------------------------------------------------------------------------------------


def random_batches(cases: int, seed: int) -> pd.DataFrame:
    """`cases` random batches: 1 to 8 examples, 2 to 64 dimensions, scales e^-3 to e^2 for each side.

    One row a batch: `examples`, `width`, its `distances`, and `printed`, `corrected`.
    """
    rng, rows = np.random.default_rng(seed), []
    for _ in range(cases):
        b, k = int(rng.integers(1, 9)), int(rng.integers(2, 65))
        scale = np.exp(rng.uniform(-3, 2, 2))
        offset = rng.standard_normal((2, k)) * rng.uniform(0, 1)
        x, y = scale[:, None, None] * (rng.standard_normal((2, b, k)) + offset[:, None])
        d = distances(x, y)
        rows.append((b, k, *d, d.printed, d.corrected))
    return pd.DataFrame(
        rows, columns=["examples", "width", *Distances._fields, "printed", "corrected"]
    )


def violations(found: pd.DataFrame) -> pd.DataFrame:
    """How often each form of Proposition 1 fails on the rows of `random_batches`.

    Columns: `statement`, `cases` it applies to, `violated` (beyond rounding), `worst`: the smallest
    ratio of left to right side, for the identity the largest relative error.
    """
    E, U, C, m = (found[c].to_numpy() for c in ("E", "U", "C", "m"))
    literal = found["literal"].to_numpy()
    identity = found["difference"].to_numpy() ** 2 + 2 * m * C
    error = np.abs(U**2 - identity) / np.maximum(U**2, identity)
    rows = []

    def count(statement: str, left: Array, right: Array, where: Array) -> None:
        ratio = left[where] / right[where]
        bad = int((ratio < 1 - ROUNDING).sum())
        rows.append(
            (statement, int(where.sum()), bad, float(ratio.min()) if len(ratio) else np.nan)
        )

    every, defined = np.full(len(U), True), literal >= 0
    count("E ≥ U", E, U, every)
    count("U > m √C, as printed", U, found["printed"].to_numpy(), every)
    count("the same, where m ≤ 2", U, found["printed"].to_numpy(), m <= 2)
    count("the same, where m > 2", U, found["printed"].to_numpy(), m > 2)
    count("U ≥ √(2 m C), corrected", U, found["corrected"].to_numpy(), every)
    rows.append((
        "U² = (|a| − |b|)² + 2 m C", len(U), int((error > ROUNDING).sum()), float(error.max()),
    ))  # fmt: skip
    root = m * np.sqrt(np.where(defined, literal, 0))
    count("U > m √C, C as Eq. 3 is printed", U, root, defined)
    rows.append(("the same: the root is undefined", len(U), int((~defined).sum()), np.nan))
    return pd.DataFrame(rows, columns=["statement", "cases", "violated", "worst"])


def smallest_counterexample(limit: int = 4) -> tuple[Array, Array]:
    """The shortest integer centroids a, b (2,) with U < m sqrt(C), E = U: a batch of one.

    Against Proposition 1. Searched in order of |a|^2 + |b|^2 over entries from 0 to `limit`.
    ValueError if there is none.
    """
    entries = range(limit + 1)
    points = [np.array(p, np.float64) for p in itertools.product(entries, entries) if any(p)]
    both = sorted(itertools.product(points, points), key=lambda p: p[0] @ p[0] + p[1] @ p[1])
    for a, b in both:
        d = distances(a[None], b[None])
        if d.C > 0 and d.U / d.printed < 1 - ROUNDING:
            return a, b
    raise ValueError(f"no counterexample among integers up to {limit}")


def many_batches(d: ArrayLike, size: int) -> float:
    """Mean of U^2 (Eq. 4) over all batches of `size` of the n differences `d` (n, k).

    Drawn without replacement: |mean d|^2 + (variance of d / size) (n - size) / (n - 1). ValueError
    unless 1 <= size <= n.
    """
    x = np.asarray(d, np.float64)
    n, mean = len(x), x.mean(0)
    if not 1 <= size <= n:
        raise ValueError(f"a batch of {size} cannot be drawn from {n} examples")
    variance = np.sum((x - mean) ** 2) / n
    return float(mean @ mean + variance / size * (n - size) / max(n - 1, 1))


class Optima(NamedTuple):
    """Minimisers (n, 2) of f + beta E and of f + beta U for two scalar examples, teacher at 0."""

    x_E: Array
    x_U: Array


def spread(x: Array) -> tuple[Array, Array]:
    """E and U (n,), Eqs. 5 and 4, of two scalar examples x (n, 2) whose teacher is 0."""
    return np.abs(x).mean(1), np.abs(x.mean(1))


def optima(Q: ArrayLike, c: ArrayLike, beta: ArrayLike) -> Optima:
    """Exact minimisers of f + beta E and f + beta U, f(x) = (x - c)' Q (x - c) / 2.

    `Q` (n, 2, 2) symmetric positive definite, `c` (n, 2), `beta` (n,). Both objectives are smooth
    but on a few lines, so the minimiser is among the stationary points of each piece. For what
    Proposition 1 calls the highest regularisation.
    """
    Q, c, beta = (np.asarray(v, np.float64) for v in (Q, c, beta))
    centre, inverse = np.einsum("nij,nj->ni", Q, c), np.linalg.inv(Q)

    def value(x: Array, which: int) -> Array:
        d = x - c
        return 0.5 * np.einsum("ni,nij,nj->n", d, Q, d) + beta * spread(x)[which]

    def inside(signs: Sequence[float]) -> Array:
        pull = 0.5 * beta[:, None] * np.asarray(signs, np.float64)
        return c - np.einsum("nij,nj->ni", inverse, pull)

    def along(v: Sequence[float], pull: float) -> Array:
        """Stationary point on the line through 0 with direction v, where the loss has slope `pull`."""
        d = np.asarray(v, np.float64)
        t = (centre @ d - beta * pull) / np.einsum("i,nij,j->n", d, Q, d)
        return t[:, None] * d

    def best(candidates: list[Array], which: int) -> Array:
        values = np.stack([value(x, which) for x in candidates])
        return np.stack(candidates)[values.argmin(0), np.arange(len(c))]

    pairs = list(itertools.product((-1.0, 1.0), repeat=2))
    axes = [along(v, 0.5 * s) for v in ((1.0, 0.0), (0.0, 1.0)) for s in (-1, 1)]
    return Optima(
        best([*(inside(s) for s in pairs), *axes, np.zeros_like(c)], 0),
        best([inside((-1, -1)), inside((1, 1)), along((1.0, -1.0), 0)], 1),
    )


def random_optima(cases: int, seed: int) -> pd.DataFrame:
    """`optima` of random convex problems: does E leave its student closer to the teacher than U?

    One row a problem: `E_at_xE`, `U_at_xE`, `E_at_xU`, `U_at_xU`.
    """
    rng = np.random.default_rng(seed)
    root = rng.standard_normal((cases, 2, 2))
    Q = root @ root.transpose(0, 2, 1) + 0.05 * np.eye(2)
    x = optima(Q, 3 * rng.standard_normal((cases, 2)), np.exp(rng.uniform(-2, 2, cases)))
    columns = dict(zip(("E_at_xE", "U_at_xE"), spread(x.x_E), strict=True))
    return pd.DataFrame(columns | dict(zip(("E_at_xU", "U_at_xU"), spread(x.x_U), strict=True)))


def gradient_norms(
    names: Sequence[str], at: Sequence[float], examples: int = 16, width: int = 768, seed: int = 0
) -> pd.DataFrame:
    """Frobenius norm of each loss's gradient with respect to p_s, as p_s approaches p_ts.

    Teacher rows have length about sqrt(width); the student's are `at` away from them, half of it
    in a direction that the rows share. Columns `loss`, `distance` (= E), `norm`, and `shared`: the
    norm of the gradient with respect to a bias that all rows share. `names` are of
    `losses.MANIFOLD` (Eqs. 3-5), else ValueError.
    """
    rng, rows = np.random.default_rng(seed), []
    teacher = rng.standard_normal((examples, width)) + 0.5 * rng.standard_normal(width)
    away = rng.standard_normal((examples, width)) + rng.standard_normal(width)
    away /= np.linalg.norm(away, axis=1, keepdims=True)
    p_ts = torch.from_numpy(teacher)
    for name in names:
        loss = losses.choose(losses.MANIFOLD, name, "manifold loss")
        for t in at:
            p_s = torch.from_numpy(teacher + t * away).requires_grad_()
            (grad,) = torch.autograd.grad(loss(p_ts, p_s), p_s)
            rows.append((name, float(t), float(grad.norm()), float(grad.sum(0).norm())))
    return pd.DataFrame(rows, columns=["loss", "distance", "norm", "shared"])


def matching_gradients(
    names: Sequence[str], at: Sequence[float], tau: float = 5.0, outputs: int = 2
) -> pd.DataFrame:
    """The same for logit matching (Eq. 2): one example, the student's first logit `at` too low.

    Columns `loss`, `distance` (of the logits), `norm` of the gradient with respect to them. `names`
    are of `losses.SOFT`, else ValueError.
    """
    rows = []
    for name in names:
        loss = losses.choose(losses.SOFT, name, "soft loss")
        for t in at:
            o_ts = torch.zeros(1, outputs, dtype=torch.float64)
            o_s = o_ts.clone()
            o_s[0, 0] = -t
            (grad,) = torch.autograd.grad(loss(o_ts, o_s.requires_grad_(), tau), o_s)
            rows.append((name, float(t), float(grad.norm())))
    return pd.DataFrame(rows, columns=["loss", "distance", "norm"])


# What a reader may move ---------------------------------------------------------------------------


def plane_batch(
    a: Sequence[float], b: Sequence[float], scatter: float = 0.5, swapped: bool = False
) -> tuple[Array, Array]:
    """Five rows of the plane for each side, with centroids exactly a and b: (5, 2), (5, 2).

    Both scatter alike around their centroid (E = U, Eqs. 5 and 4); `swapped` gives the student's
    rows to other examples, which no centroid shows (E > U).
    """
    turn = 2 * np.pi * np.arange(5) / 5
    offsets = scatter * np.stack([np.cos(turn), np.sin(turn)], 1)
    own = np.roll(offsets, 2, axis=0) if swapped else offsets
    return np.asarray(a, np.float64) + offsets, np.asarray(b, np.float64) + own
