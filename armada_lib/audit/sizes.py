"""Procedures for claims about parameters, sizes, vectors and examples, and the two propositions."""

from __future__ import annotations

import math

import numpy as np

from armada_lib import chapter, propositions
from armada_lib.audit import numbers
from armada_lib.audit.cells import cells, of, sides
from armada_lib.audit.reading import Reading
from armada_lib.report import LOSS

# ------------------------------------------------------------------------------- parameters, sizes

ALIGNER = ((1024, 128), (128, 768), (768, 768))
WIDTHS = {"BERT": 768, "DeBERTa": 1536, "OPT": 2048, "LLaMA-3B": 3072, "LLaMA-7B, 8B": 4096}


def _aligner_sizes() -> dict[str, int]:
    heads = ((768, 2), (768, 2))
    return {
        "1024-128-768-768, weights": numbers.weights(*ALIGNER),
        "with biases and two heads": numbers.weights(*ALIGNER, *heads, biases=True),
        "one layer 1024-768": numbers.weights((1024, 768)),
        "128-768-768, as in Table 1": numbers.weights((128, 768), (768, 768)),
        "video, input 262144": numbers.weights((262_144, 128), *ALIGNER[1:]),
    }


def aligner_parameters() -> list[Reading]:
    """Millions of weights of the aligner, by what its shapes may be; the student's share beside."""
    added = {f"added to the student, {s}": numbers.weights((d, d), (d, 768)) / 1e6
             for s, d in WIDTHS.items()}  # fmt: skip
    found = [Reading(r, {"million": n / 1e6}) for r, n in _aligner_sizes().items()]
    return [*found, Reading("what 0.8M leaves out", {}, added)]


def parameter_share() -> list[Reading]:
    """The aligner's parameters in % of BERT-base's."""
    size, bert = _aligner_sizes(), numbers.bert_weights()
    shares = {
        "printed 0.8M of 110M": 0.8 / 110,
        "weights of printed 110M": size["1024-128-768-768, weights"] / 110e6,
        "exact counts": size["with biases and two heads"] / bert,
    }
    return [Reading(r, {"percent": 100 * v}) for r, v in shares.items()]


def mentor_over_aligner() -> list[Reading]:
    """BERT-base's parameters over the aligner's; "100x" is read as an order of magnitude."""
    ratios = {"printed": 110 / 0.8, "weights": 110e6 / numbers.weights(*ALIGNER)}
    return [Reading(r, {"ratio": v}, {}, round(math.log10(v)) == 2) for r, v in ratios.items()]


def latent_sizes() -> list[Reading]:
    """Widths of the image and the video vector; what other latents would have."""
    beside = {"4 × 32 × 32": 4 * 32 * 32, "64 frames × 4 × 32 × 32": 64 * 4 * 32 * 32}
    return [Reading("as described", {"image": 32 * 32, "video": 512 * 512}, beside)]


def smallest_spread() -> list[Reading]:
    """The smallest standard deviation but zero of three runs: one of them differs by one example.

    As a fraction, the scale on which 0.0001 is largest; beside it, in points, one example and the
    standard error at BERT-base's own accuracy.
    """
    sizes = numbers.splits().set_index("task")["n"]
    base = of(cells(2), student="BERT-base").groupby("task")["undistilled"].first() / 100
    found = []
    for task in ("CB", "COPA", "RTE"):
        n, q = int(sizes[task]), float(base[task])
        error = 100 * math.sqrt(q * (1 - q) / n)
        beside = {"one example, points": 100 / n, "standard error, points": error}
        found.append(Reading(task, {"sd": 1 / n / math.sqrt(3)}, beside))
    return found


def weak_reference() -> list[Reading]:
    """BERT-base undistilled minus BERT-6L undistilled in Table 3."""
    base = cells(3).drop_duplicates(["student", "task"])
    gap = base.pivot(index="task", columns="student", values="undistilled")
    return [Reading("BERT-base minus BERT-6L", {}, (gap["BERT-base"] - gap["BERT-6L"]).to_dict())]


def out_of_reach() -> list[Reading]:
    """How many printed accuracies no single run can give, by test set."""
    found = numbers.attainability(2, 4, 5, 6, 10)
    beside = dict(zip(found["test set"], found["neither"], strict=True))
    return [Reading("neither rounded nor truncated", {}, beside)]


# ------------------------------------------------------------------------------- vectors, examples


def multimodal() -> list[Reading]:
    """Gains on MM-IMDb, (macro, micro): the best loss for each, and every loss."""
    df = chapter.published(9).pivot(index="manifold_loss", columns="metric", values="value")
    gain = df.drop("none") - df.loc["none"]
    pairs = {"best loss for each": gain.max(), **{LOSS[str(k)]: r for k, r in gain.iterrows()}}
    return [Reading(rule, {"macro": float(g["macro_f1"]), "micro": float(g["micro_f1"])})
            for rule, g in pairs.items()]  # fmt: skip


def silhouette(scenario: int) -> list[Reading]:
    """Change of the silhouette in %: mean of both tasks, pooled means, and each task beside."""
    df = chapter.published(13)
    wide = df[df["scenario"] == scenario].pivot(index="task", columns="method", values="value")
    change = 100 * (wide["ARMADA"] / wide["undistilled"] - 1)
    pooled = 100 * (wide["ARMADA"].sum() / wide["undistilled"].sum() - 1)
    return [
        Reading("mean of the tasks", {"percent": float(change.mean())}, change.to_dict()),
        Reading("means of both tasks", {"percent": float(pooled)}),
    ]


def reductions() -> list[Reading]:
    """Whether each printed reduction lies in the range that the rounded distances leave."""
    df = chapter.published(14)
    value = 100 * (1 - df["distance_after"] / df["distance_before"])
    half = 0.0005
    low = 100 * (1 - (df["distance_after"] + half) / (df["distance_before"] - half))
    high = 100 * (1 - (df["distance_after"] - half) / (df["distance_before"] + half))
    printed = df["printed_reduction_percent"]
    fits = bool(((printed + 0.5 >= low) & (printed - 0.5 <= high)).all())
    names = [f"example {i}" for i in df["example"]]
    beside = {n: float(v) for n, v in zip(names, value, strict=True)}
    beside |= {f"{n}, low": float(v) for n, v in zip(names, low, strict=True)}
    beside |= {f"{n}, high": float(v) for n, v in zip(names, high, strict=True)}
    return [Reading("range of the rounded distances", {}, beside, fits)]


def trained_aligner() -> list[Reading]:
    """Table 15: cells with a positive t at p below 0.05; tasks on which all three losses have one."""
    df = chapter.published(15)
    clear = (df["t_statistic"] > 0) & (df["p_value"] < 0.05)
    count = {
        "positive": sides(df["t_statistic"])["up"],
        "positive, p < 0.05": int(clear.sum()),
        "cells": len(df),
    }
    tasks = clear.groupby(df["task"]).sum()
    whole = {"tasks clear in all": int((tasks == 3).sum()), "tasks": len(tasks)}
    return [
        Reading("most cells", {}, count, bool(clear.mean() > 0.5)),
        Reading("every cell", {}, whole, bool(clear.all())),
    ]


# ------------------------------------------------------------------------------- propositions


def first_proposition(cases: int = 2000, seed: int = 0) -> list[Reading]:
    """E >= U > |a| |b| sqrt(C), on the example a = (2, 0), b = (0, 2) and on random batches.

    E, U, C: the element-wise, Euclid and (normalised) cosine loss; a, b: the two centroids.
    """
    example = propositions.distances([[2.0, 0.0]], [[0.0, 2.0]])
    found = propositions.random_batches(cases, seed)
    slack = 1 - propositions.ROUNDING
    first = found["E"] < found["U"] * slack
    second = found["U"] < found["printed"] * slack
    beside = {
        "U of the example": example.U, "its bound": example.printed, "E < U": int(first.sum()),
        "U below its bound": int(second.sum()), "random batches": len(found),
        "of these with |a||b| <= 2": int((second & (found["m"] <= 2)).sum()),
    }  # fmt: skip
    holds = not first.any() and not second.any() and example.printed < example.U
    return [Reading("search for counterexamples", {}, beside, holds)]


def second_proposition() -> list[Reading]:
    """Two equal projection sets in the plane, linear heads onto R: outputs of two points and of one."""
    points = np.array([[0.0, 0.0], [0.0, 1.0]])  # of aligner and student alike
    heads = {"aligner's outputs": np.array([0.0, 1.0]), "student's outputs": np.array([1.0, 0.0])}
    beside = {name: len(set(points @ head)) for name, head in heads.items()}
    return [Reading("counterexample in the plane", {}, beside, len(set(beside.values())) == 1)]
