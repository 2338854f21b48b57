"""Eqs. 1-5 of the paper and their documented alternatives, as small pure functions.

Shapes: `b` examples, `c` outputs (classes, labels, or 1 for regression), `k` shared width.
Every loss is a 0-d tensor, computed in float32 (or float64 if its inputs are) also when the inputs
are bf16 and under autocast, and leaves stop-gradients to the caller [A10]. Tags such as [A6] name
the places where the paper leaves a choice open; each table below lists the choices. ValueError for
two tensors that are compared and differ in shape, and for tau of 0 or less.

    T  task loss                  TASK_LOSS   loss(outputs, targets)
    Phi                           PHI         phi(outputs)
    D  logit matching (Eq. 2)     SOFT        soft(o_ts, o_s, tau, phi)
    M  manifold (Eqs. 3-5)        MANIFOLD    manifold(p_ts, p_s, centroid)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

# Under the root of every norm: the 2-norm has no gradient at 0, which beta > 0 makes reachable.
# It adds the same coordinate (1e-6) to every difference, so E >= U still holds exactly.
EPS = 1e-12

Item = TypeVar("Item")


def choose(table: Mapping[str, Item], name: str, what: str) -> Item:
    """`table[name]`; ValueError that names the valid choices if there is no such entry."""
    if name not in table:
        raise ValueError(f"unknown {what} {name!r}; choose one of {sorted(table)}")
    return table[name]


def _float(x: Tensor) -> Tensor:
    """At least float32: squares and means of bf16 values lose the digits that are compared."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _pair(a: Tensor, b: Tensor, what: str) -> tuple[Tensor, Tensor]:
    """Both in float32; ValueError if the shapes differ (broadcasting would hide the mistake)."""
    if a.shape != b.shape:
        raise ValueError(f"{what} differ in shape: {tuple(a.shape)} and {tuple(b.shape)}")
    return _float(a), _float(b)


def _norm(x: Tensor) -> Tensor:
    """2-norm over the last dimension, with a finite (zero) gradient at 0."""
    return (x.square().sum(-1) + EPS).sqrt()


# Task losses T: Eq. 1 is L_ts1 = T(y, o_ts); the auxiliary L_ts2 is the same with a_ts. ----------


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy, for classification and for tokens (Eq. 1, first term of Eq. 2).

    `outputs` (..., c) logits, `targets` (...) class numbers; -100 is left out of the mean (and a
    batch of nothing else gives nan). Range [0, inf); the gradient is (softmax - onehot) / count.
    """
    return F.cross_entropy(
        _float(outputs).reshape(-1, outputs.shape[-1]), targets.reshape(-1), ignore_index=-100
    )


def mse(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean squared error, for regression (STS-B) and for reconstruction [A13, A31].

    `outputs` (b, 1) with `targets` (b,), or two equal shapes. Range [0, inf) in squared units of
    the target; the gradient 2 (o - y) / count grows with the error, so raw 0-5 scores are clipped
    early in training.
    """
    if outputs.ndim == targets.ndim + 1 and outputs.shape[-1] == 1:
        outputs = outputs.squeeze(-1)
    o, y = _pair(outputs, targets, "outputs and targets")
    return F.mse_loss(o, y.to(o.dtype))


def bce(outputs: Tensor, targets: Tensor) -> Tensor:
    """Binary cross-entropy, for several labels per example (MM-IMDb) [A32].

    `outputs` (b, c) logits, `targets` (b, c) of 0 and 1; mean over examples and labels. Range
    [0, inf); the gradient is (sigmoid - y) / (b c).
    """
    o, y = _pair(outputs, targets, "outputs and targets")
    return F.binary_cross_entropy_with_logits(o, y.to(o.dtype))


TASK_LOSS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cross_entropy": cross_entropy,
    "mse": mse,
    "bce": bce,
}


# Phi, the output function inside the logit-matching term of Eq. 2. -------------------------------


def softmax(outputs: Tensor) -> Tensor:
    """(b, c) logits -> (b, c) class probabilities (Phi of Eq. 2); goes with `cross_entropy`."""
    return torch.softmax(_float(outputs), -1)


def identity(outputs: Tensor) -> Tensor:
    """(b, c) -> (b, c) unchanged; goes with `mse` [A7]."""
    return _float(outputs)


def sigmoid(outputs: Tensor) -> Tensor:
    """(b, c) logits -> (b, c) probabilities of each label; goes with `bce` [A32]."""
    return torch.sigmoid(_float(outputs))


PHI: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": softmax,
    "identity": identity,
    "sigmoid": sigmoid,
}
TASK_PHI = {"cross_entropy": softmax, "mse": identity, "bce": sigmoid}


# Logit matching D, the second term of Eq. 2. -----------------------------------------------------


def _softened(o_ts: Tensor, o_s: Tensor, tau: float, phi: Callable) -> tuple[Tensor, Tensor]:
    if tau <= 0:
        raise ValueError(f"tau must be positive, got {tau}")
    a, b = _pair(o_ts, o_s, "aligner and student outputs")
    return phi(a / tau), phi(b / tau)


def soft_norm(o_ts: Tensor, o_s: Tensor, tau: float, phi: Callable = softmax) -> Tensor:
    """mean_i || Phi(o_ts,i / tau) - Phi(o_s,i / tau) ||_2 (Eq. 2; the paper's reading of [A6, A7]).

    `o_ts`, `o_s` (b, c). Range [0, sqrt 2] for softmax, [0, sqrt c] for sigmoid, |o_ts - o_s| / tau
    for one regression output. No tau^2 factor. The gradient of example i's norm is at most
    1 / (2 tau) for softmax, 1 / tau for the identity, and does not fade near the optimum.
    """
    a, b = _softened(o_ts, o_s, tau, phi)
    return _norm(a - b).mean()


def soft_squared(o_ts: Tensor, o_s: Tensor, tau: float, phi: Callable = softmax) -> Tensor:
    """mean_i || Phi(o_ts,i / tau) - Phi(o_s,i / tau) ||_2^2 (Eq. 2, squared option of [A6]).

    `o_ts`, `o_s` (b, c). Range [0, 2] for softmax. The gradient fades at the optimum.
    """
    a, b = _softened(o_ts, o_s, tau, phi)
    return (a - b).square().sum(-1).mean()


def soft_frobenius(o_ts: Tensor, o_s: Tensor, tau: float, phi: Callable = softmax) -> Tensor:
    """|| Phi(o_ts / tau) - Phi(o_s / tau) ||_F of the whole batch (Eq. 2, batch option of [A6]).

    `o_ts`, `o_s` (b, c). Range [0, sqrt(2 b)] for softmax: it grows with the batch.
    """
    a, b = _softened(o_ts, o_s, tau, phi)
    return _norm((a - b).flatten())


def soft_kl(o_ts: Tensor, o_s: Tensor, tau: float, phi: Callable = softmax) -> Tensor:
    """tau^2 mean_i KL(Phi(o_ts,i / tau) || Phi(o_s,i / tau)) (option of [A6]; classical KD).

    `o_ts`, `o_s` (b, c). For sigmoid the divergences of the c labels are summed. Range [0, inf).
    The factor tau^2 keeps the gradient comparable between temperatures; as tau grows the loss of
    one example tends to |centred logit difference|^2 / (2 c). ValueError for the identity, whose
    outputs are not a distribution.
    """
    if phi not in (softmax, sigmoid):
        raise ValueError("soft loss 'kl' needs Phi 'softmax' or 'sigmoid'; regression has no KL")
    a, b = _softened(o_ts, o_s, tau, identity)  # in logits: log(Phi) would underflow
    if phi is softmax:
        log_a, log_b = torch.log_softmax(a, -1), torch.log_softmax(b, -1)
        kl = log_a.exp() * (log_a - log_b)
    else:
        on, off = F.logsigmoid(a), F.logsigmoid(-a)
        kl = on.exp() * (on - F.logsigmoid(b)) + off.exp() * (off - F.logsigmoid(-b))
    return tau**2 * kl.sum(-1).mean()


def soft_mse(o_ts: Tensor, o_s: Tensor, tau: float, phi: Callable = softmax) -> Tensor:
    """tau^2 times the mean over b and c of (Phi(o_ts / tau) - Phi(o_s / tau))^2 (released, [A6]).

    `o_ts`, `o_s` (b, c). Equals `soft_squared` tau^2 / c; range [0, 2 tau^2 / c] for softmax. For
    the identity tau cancels: the mean squared error of the outputs, as released for STS-B.
    """
    a, b = _softened(o_ts, o_s, tau, phi)
    return tau**2 * F.mse_loss(b, a)


SOFT: dict[str, Callable[..., Tensor]] = {
    "norm": soft_norm,
    "squared": soft_squared,
    "frobenius": soft_frobenius,
    "kl": soft_kl,
    "mse": soft_mse,
}


def student_output(task: Tensor, soft: Tensor, alpha: float) -> Tensor:
    """Eq. 2: (1 - alpha) T(y, o_s) + alpha D(o_ts, o_s), of its two terms; L_s2 likewise.

    `task` is T, `soft` is D; both and the result are 0-d.
    """
    return (1 - alpha) * task + alpha * soft


# Manifold losses M on the projections, Eqs. 3-5. -------------------------------------------------
# `centroid` maps (b, k) to the mean row (k,). Over several processes it must be the mean over all
# of them: a mean of per-process centroid losses is another loss. Permuting one side's rows inside
# a batch leaves every centroid loss unchanged, and `elementwise` changed.


def mean_row(p: Tensor) -> Tensor:
    """(b, k) -> (k,): the centroid of one process's batch [A9]."""
    return p.mean(0)


Centroid = Callable[[Tensor], Tensor]


def _centroids(p_ts: Tensor, p_s: Tensor, centroid: Centroid) -> tuple[Tensor, Tensor]:
    a, b = _pair(p_ts, p_s, "aligner and student projections")
    return centroid(a), centroid(b)


def cosine(p_ts: Tensor, p_s: Tensor, centroid: Centroid = mean_row) -> Tensor:
    """1 - cos(pbar_ts, pbar_s) (Eq. 3, normalised [A8]; also the released code).

    `p_ts`, `p_s` (b, k). Range [0, 2]; 1 if a centroid is 0. The gradient with respect to `p_s` has
    Frobenius norm sin(theta) / (||pbar_s|| sqrt b): it falls with the length of the centroid.
    """
    a, b = _centroids(p_ts, p_s, centroid)
    return 1 - (a / _norm(a) * (b / _norm(b))).sum()


def cosine_literal(p_ts: Tensor, p_s: Tensor, centroid: Centroid = mean_row) -> Tensor:
    """1 - <pbar_ts, pbar_s> (Eq. 3 as printed [A8]).

    `p_ts`, `p_s` (b, k). Unbounded below: it falls without limit as the student's norm grows, with
    constant gradient norm ||pbar_ts|| / sqrt b.
    """
    a, b = _centroids(p_ts, p_s, centroid)
    return 1 - (a * b).sum()


def euclid(p_ts: Tensor, p_s: Tensor, centroid: Centroid = mean_row) -> Tensor:
    """|| pbar_ts - pbar_s ||_2, not squared (Eq. 4; U in Proposition 1).

    `p_ts`, `p_s` (b, k). Range [0, inf). The gradient with respect to `p_s` has Frobenius norm
    1 / sqrt b wherever the loss is not 0, and equal rows.
    """
    a, b = _centroids(p_ts, p_s, centroid)
    return _norm(a - b)


def elementwise(p_ts: Tensor, p_s: Tensor, centroid: Centroid = mean_row) -> Tensor:
    """mean_i || p_ts,i - p_s,i ||_2, not squared (Eq. 5; E in Proposition 1, E >= U).

    `p_ts`, `p_s` (b, k); `centroid` is not used. Range [0, inf). The gradient with respect to `p_s`
    has Frobenius norm 1 / sqrt b wherever no row difference is 0.
    """
    a, b = _pair(p_ts, p_s, "aligner and student projections")
    return _norm(a - b).mean()


def euclid_squared(p_ts: Tensor, p_s: Tensor, centroid: Centroid = mean_row) -> Tensor:
    """Mean over k of (pbar_ts - pbar_s)^2 = U^2 / k (released form of Eq. 4).

    `p_ts`, `p_s` (b, k). Range [0, inf); the gradient norm 2 U / (k sqrt b) fades at the optimum.
    """
    a, b = _centroids(p_ts, p_s, centroid)
    return F.mse_loss(b, a)


def elementwise_squared(p_ts: Tensor, p_s: Tensor, centroid: Centroid = mean_row) -> Tensor:
    """Mean over b and k of (p_ts - p_s)^2 (released form of Eq. 5).

    `p_ts`, `p_s` (b, k); `centroid` is not used. Range [0, inf). Equals `euclid_squared` plus the
    within-batch scatter of the differences divided by k.
    """
    a, b = _pair(p_ts, p_s, "aligner and student projections")
    return F.mse_loss(b, a)


MANIFOLD: dict[str, Callable[..., Tensor]] = {
    "cosine": cosine,
    "cosine_literal": cosine_literal,
    "euclid": euclid,
    "elementwise": elementwise,
    "euclid_squared": euclid_squared,
    "elementwise_squared": elementwise_squared,
}
