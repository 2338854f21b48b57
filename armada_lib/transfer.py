"""Proposition 2 of the paper put to the test: what close projections say about outputs.

As stated, homeomorphic projections give homeomorphic outputs: `counterexamples` shows where that
fails. `transfer` is the statement that holds instead, with numbers in it. All in float64; searches
draw from `seed` alone.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from armada_lib.propositions import distances

Array = np.ndarray


def kernel(matrix: ArrayLike) -> Array:
    """Orthonormal basis of {x : matrix x = 0}, one vector a row: (nullity, columns).

    `matrix` (rows, columns). Points that differ by one of them have one image, where the proof of
    Proposition 2 takes two.
    """
    m = np.asarray(matrix, np.float64)
    _, s, vt = np.linalg.svd(m)
    rank = int((s > s.max(initial=0) * max(m.shape) * np.finfo(np.float64).eps).sum())
    return vt[rank:]


class Collision(NamedTuple):
    """Equal projection sets, two linear heads onto R, output sets of different size."""

    points: Array  # (n, 2), of aligner and student alike
    O_ts: Array  # (2,)
    O_s: Array
    o_ts: Array  # (n,) outputs
    o_s: Array


def smallest_collision(limit: int = 1) -> Collision:
    """The first counterexample to Proposition 2 among integers up to `limit`.

    Two points of the plane, P_ts = P_s = I, f = the identity; all pairs of non-zero heads are tried.
    ValueError if there is none.
    """
    points = [np.array(p) for p in itertools.product(range(limit + 1), repeat=2)]
    heads = [np.array(h) for h in itertools.product(range(limit + 1), repeat=2) if any(h)]
    for (p, q), O_ts, O_s in itertools.product(itertools.combinations(points, 2), heads, heads):
        x = np.stack([p, q])
        if len(set(x @ O_ts)) != len(set(x @ O_s)):
            return Collision(x, O_ts, O_s, x @ O_ts, x @ O_s)
    raise ValueError(f"no counterexample among integers up to {limit}")


def counterexamples(
    seed: int, width: int = 768, student: int = 1536, outputs: int = 2
) -> pd.DataFrame:
    """Where the assumption of Proposition 2 holds and its conclusion, or its use, does not.

    Columns `case`, `given`, `yet`, with the numbers found. Random parts are drawn from `seed`.
    """
    rng = np.random.default_rng(seed)
    tiny = lambda x: "0" if abs(x) < 1e-9 else f"{x:.2f}"
    c = smallest_collision()
    listed = lambda v: "{" + ", ".join(f"{x:g}" for x in sorted(set(v.tolist()))) + "}"
    rows = [(
        "linear heads, two points",
        f"both projection sets are {{{', '.join(str(tuple(p.tolist())) for p in c.points)}}}; heads "
        f"{tuple(c.O_ts.tolist())} and {tuple(c.O_s.tolist())} map onto R",
        f"outputs {listed(c.o_ts)} and {listed(c.o_s)}: {len(set(c.o_ts))} points and {len(set(c.o_s))}",
    )]  # fmt: skip
    head = rng.standard_normal((outputs, width))
    blind = kernel(head)
    v = 10 * blind[0]
    rows.append((
        f"a head from {width} to {outputs}",
        f"its kernel has {len(blind)} dimensions; two points are {tiny(np.linalg.norm(v))} apart",
        f"their logits differ by {tiny(np.linalg.norm(head @ v))}",
    ))  # fmt: skip
    P = np.linalg.qr(rng.standard_normal((student, width)))[0].T
    wide, u = rng.standard_normal((outputs, student)), 5 * kernel(P)[0]
    rows.append((
        f"a student {student} wide",
        f"two hidden vectors, {tiny(np.linalg.norm(u))} apart, have projections that differ by "
        f"{tiny(np.linalg.norm(P @ u))}",
        f"their logits differ by {tiny(np.linalg.norm(wide @ u))}",
    ))  # fmt: skip
    two, one = np.array([[2.0], [4.0]]), np.array([[3.0], [3.0]])
    d = distances(two, one)
    rows.append((
        "zero loss", f"projections {listed(two[:, 0])} and {listed(one[:, 0])}: U = {tiny(d.U)}, "
        f"C = {tiny(d.C)}", f"they have 2 points and 1, and E = {tiny(d.E)}",
    ))  # fmt: skip
    x, W = rng.standard_normal((16, width)), rng.standard_normal((outputs, width)) / np.sqrt(width)
    d, far = distances(x, x[::-1]), np.linalg.norm((x - x[::-1]) @ W.T, axis=1).mean()
    rows.append((
        "rows in another order", f"aligner's rows reversed, equal heads: U = {tiny(d.U)}, C = {tiny(d.C)}",
        f"logits differ by {tiny(far)} on average, E = {tiny(d.E)}",
    ))  # fmt: skip
    o = x @ W.T
    agree = float((o.argmax(1) == (-o).argmax(1)).mean())
    rows.append((
        "negated logits", "o ↦ −o is a homeomorphism, and linear",
        f"the two agree on {agree:.0%} of the predicted classes",
    ))  # fmt: skip
    return pd.DataFrame(rows, columns=["case", "given", "yet"])


class Bound(NamedTuple):
    """|a_s - a_ts| <= projections + weights + biases, for logits a = W p + w."""

    left: float  # mean distance of the logits, or distance of the mean logits
    projections: float  # |W_s| E, or |W_s| U
    weights: float  # |W_s - W_ts| mean |p_ts|, or |W_s - W_ts| |mean p_ts|
    biases: float  # |w_s - w_ts|

    @property
    def right(self) -> float:
        return self.projections + self.weights + self.biases


def transfer(
    p_ts: ArrayLike, p_s: ArrayLike, head_ts: tuple[ArrayLike, ArrayLike],
    head_s: tuple[ArrayLike, ArrayLike], centroids: bool = False,
) -> Bound:  # fmt: skip
    """What a small manifold loss says about the logits: mean_i |a_s,i - a_ts,i| and its bound.

    `p_ts`, `p_s` (b, k); `head_ts`, `head_s` (W (c, k), w (c,)); matrix norms are spectral. From
    a_s - a_ts = W_s (p_s - p_ts) + (W_s - W_ts) p_ts + (w_s - w_ts). With `centroids` the same of
    the batch means, which is all that Eqs. 3 and 4 give.
    """
    (W_ts, w_ts), (W_s, w_s) = ((np.asarray(v, np.float64) for v in h) for h in (head_ts, head_s))
    x, y = np.asarray(p_ts, np.float64), np.asarray(p_s, np.float64)
    if centroids:
        x, y = x.mean(0, keepdims=True), y.mean(0, keepdims=True)
    length = lambda v: float(np.linalg.norm(v, axis=1).mean())
    return Bound(
        length(y @ W_s.T + w_s - x @ W_ts.T - w_ts),
        float(np.linalg.norm(W_s, 2)) * length(y - x),
        float(np.linalg.norm(W_s - W_ts, 2)) * length(x),
        float(np.linalg.norm(w_s - w_ts)),
    )


def through(head: ArrayLike, projection: ArrayLike) -> Array:
    """The output head as a map of the projection: W (c, k) with W P = head, so that `transfer` applies.

    `head` (c, d), `projection` (k, d) semi-orthogonal. For d <= k always head P'. ValueError if
    d > k and the head reads directions that the projection drops.
    """
    W, P = np.asarray(head, np.float64), np.asarray(projection, np.float64)
    found = W @ P.T
    lost = float(np.linalg.norm(found @ P - W)) / max(float(np.linalg.norm(W)), 1e-30)
    if lost > 1e-3:
        raise ValueError(
            f"the output head is no function of the projection: {lost:.0%} of it lies in directions "
            f"that a {P.shape[0]} x {P.shape[1]} projection drops"
        )
    return found


def random_bounds(cases: int, seed: int) -> pd.DataFrame:
    """`transfer` on random batches and heads: 1 to 16 examples, 1 to 5 outputs; rows `left`, `right`."""
    rng, rows = np.random.default_rng(seed), []
    for _ in range(cases):
        b, k, c = (int(rng.integers(low, high)) for low, high in ((1, 17), (2, 65), (1, 6)))
        x = rng.standard_normal((b, k))
        y = x + np.exp(rng.uniform(-4, 1)) * rng.standard_normal((b, k))
        W, w = rng.standard_normal((c, k)), rng.standard_normal(c)
        near = np.exp(rng.uniform(-6, 1, 2))
        V, v = W + near[0] * rng.standard_normal((c, k)), w + near[1] * rng.standard_normal(c)
        bound = transfer(x, y, (W, w), (V, v))
        rows.append((bound.left, bound.right))
    return pd.DataFrame(rows, columns=["left", "right"])
