"""Probes and Results made by hand, for the tests of the analyses."""

from __future__ import annotations

import numpy as np
import pytest

from armada_lib import analysis, geometry
from armada_lib.probes import Probe
from armada_lib.profiles import Training
from armada_lib.results import Result, RunSpec

N = {"cola": 90, "copa": 90, "stsb": 90}  # evaluation examples of the mini tasks
LOSSES = ("cosine", "euclid", "elementwise")
ARMS = [("undistilled", None), *(("armada", m) for m in LOSSES), ("shuffled", "euclid"),
        ("random", "euclid"), ("layers_only", None), *(("frozen_aligner", m) for m in LOSSES)]  # fmt: skip


def spec(method="armada", manifold="euclid", seed=0, task="cola", **training) -> RunSpec:
    vectors = method not in ("undistilled", "layers_only")
    return RunSpec(
        profile="mini", task=task, student="bert-base", method=method, teacher="sd14" if vectors else None,
        manifold=manifold if vectors else None, reading=None if method == "undistilled" else "paper",
        alpha=0.5 if vectors else 0.0, beta=0.1 if vectors else 0.0, gamma=1.0, tau=5.0, seed=seed,
        training=Training(**training), student_id="s", teacher_id="t" if vectors else None, data_id="d",
    )  # fmt: skip


def gold(task="cola") -> np.ndarray:
    return np.random.default_rng(99).integers(0, 2, N[task])


def probe(method="armada", manifold="euclid", seed=0, task="cola", right=None, **arrays) -> Probe:
    """Random vectors with the gold label in them; `right` (n,) bool: what the student answers."""
    rng = np.random.default_rng([seed, len(method), len(manifold or "")])
    per, y = (2 if task == "copa" else 1), gold(task)
    texts = y if per == 1 else (y[:, None] == np.arange(2)).astype(int).reshape(-1)
    right = rng.random(len(y)) < 0.7 if right is None else np.asarray(right)
    said = np.where(right, y, 1 - y)
    found = {}
    for when in ("before", "after"):
        for split in ("held", "train"):
            n = len(texts)
            wide = lambda d, n=n: rng.standard_normal((n, d)).astype(np.float32)
            found |= {f"{when}/{split}/student_hidden": wide(6) + texts[:, None],
                      f"{when}/{split}/student_projection": wide(8),
                      f"{when}/{split}/student": np.eye(2, dtype=np.float32)[said]}  # fmt: skip
            if method not in ("undistilled", "layers_only"):
                found |= {f"{when}/{split}/aligner_hidden": wide(7),
                          f"{when}/{split}/aligner_projection": wide(8)}  # fmt: skip
    found |= {"labels/held": y, "labels/train": y, **arrays}
    return Probe(spec(method, manifold, seed, task), found, per)


def result(
    s: RunSpec, score=50.0, curve=None, heads=("student", "aligner"), **scores: float
) -> Result:
    found = dict.fromkeys(heads, score) | scores
    curves = {"task": np.asarray([1.0, 2.0, 4.0] if curve is None else curve, np.float32)}
    facts = {"behaviour": {"collapsed": False}, "evaluation": 9, "seconds": 1.0}
    outputs = {"student": np.eye(2, dtype=np.float32)}
    env = {"gpu": None, "cpu": "c", "torch": "t"}
    return Result(s, "mcc", found, outputs, np.zeros(2), curves, facts, env)


def everything(seeds=(0, 1), tasks=("cola", "copa")):
    """(probes, results) of every arm, task and seed, with noise on two methods."""
    probes = [probe(m, k, seed, task) for task in tasks for seed in seeds for m, k in ARMS]
    rng = np.random.default_rng(0)
    results = [result(p.spec, 50 + rng.normal(), rng.random(40) + 1) for p in probes]
    for task in tasks:
        for seed in seeds:
            for method in ("armada", "shuffled"):
                for sigma in (1.0, 2.0, 5.0):
                    s = spec(method, "euclid", seed, task, noise=sigma)
                    results.append(result(s, 50 - sigma + rng.normal(), aligner=30 + rng.normal()))
    return probes, results


def numbers(**choice):
    """`analyse` of `everything`, with the first two dimensions in the place of a t-SNE map."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(geometry, "tsne", lambda x: np.asarray(x)[:, :2])
        return analysis.analyse(*everything(**choice), "euclid")
