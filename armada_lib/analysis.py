"""The analyses of the paper's discussion (Figures 7 to 12, Tables 13 to 15) as tidy tables of numbers.

`analyse` turns probes and Results into one frame an analysis; every row says task, seed and arm, so
that controls go through the same computation as ARMADA. What a page shows of them is in `findings`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from armada_lib import dynamics, gentasks, geometry, report
from armada_lib.frames import Frames
from armada_lib.probes import Probe, sample
from armada_lib.results import Result
from armada_lib.run_data import examples as examples_of

UNDISTILLED, AGAIN = "undistilled", "undistilled, another seed"
MOST = 300  # texts of a map, chosen as `probes.sample` chooses
SPACES = (("hidden", "euclidean"), ("hidden", "cosine"), ("map", "euclidean"))


@dataclass(frozen=True)
class Cell:
    """One task and seed: the probe of every arm, and the name of ARMADA's arm that is compared."""

    task: str
    seed: int
    arms: dict[str, Probe]
    main: str


def arms(results: Iterable[Result], main: str) -> pd.DataFrame:
    """`report.arms` of runs without noise: one row a run, with its `arm` and `key`.

    A control's name carries its manifold loss where that is not the main one.
    """
    df = report.arms(report.table(r for r in results if not r.spec.training.noise))
    own = lambda r: "" if r.manifold in (None, main) else f" ({report.LOSS[r.manifold]})"
    df["arm"] = [
        report.CONTROLS[r.method] + own(r) if r.control and pd.notna(r.manifold) else r.arm
        for r in df.itertuples()
    ]
    return df


def cells(probes: Sequence[Probe], names: Mapping[str, str], main: str) -> list[Cell]:
    """Probes by task and seed. `names`: the arm of each key; `main`: the manifold loss compared.

    Raises ValueError for a task and seed without an undistilled student or the main arm.
    """
    found: dict[tuple[str, int], dict[str, Probe]] = {}
    for p in probes:
        found.setdefault((p.spec.task, p.spec.seed), {})[names[p.spec.key]] = p
    arm = f"ARMADA {report.LOSS[main]}"
    for (task, seed), own in found.items():
        if missing := {UNDISTILLED, arm} - set(own):
            raise ValueError(f"{task}, seed {seed}: no probe of {', '.join(sorted(missing))}")
    return [Cell(task, seed, own, arm) for (task, seed), own in found.items()]


def _at(cell: Cell, arm: str, **more: Any) -> dict[str, Any]:
    return {"task": report.title(cell.task), "seed": cell.seed, "arm": arm, **more}


# -- student and aligner (Figure 7) --------------------------------------------------------------


def alignment(cell: Cell) -> list[dict[str, Any]]:
    """How near each student is to an aligner, before and after training, on both splits.

    `to` "own": the aligner that taught it; "real": ARMADA's, which reads the texts' true vectors, so
    that students without an aligner and controls can be compared. Distances are between projections
    (`geometry.gaps`), `cka` and `debiased` between hidden vectors.
    """
    rows, real = [], cell.arms[cell.main]
    for arm, p in cell.arms.items():
        for when in ("before", "after"):
            for split in ("held", "train"):
                for to, of in (("own", p), ("real", real)):
                    hidden = of.get("aligner_hidden", split, when)
                    towards = of.get("aligner_projection", split, when)
                    mine = p.get("student_hidden", split, when)
                    moved = p.get("student_projection", split, when)
                    if hidden is None or towards is None or mine is None or moved is None:
                        continue
                    rows.append(_at(
                        cell, arm, when=when, split=split, to=to, **geometry.gaps(moved, towards),
                        cka=geometry.linear_cka(mine, hidden),
                        debiased=geometry.linear_cka(mine, hidden, debiased=True),
                    ))  # fmt: skip
    return rows


def joint_map(cell: Cell) -> pd.DataFrame:
    """One t-SNE map of the projections of the undistilled student, ARMADA's and the aligner (A27).

    A row a text and model: task, model, text (number), x, y, label, and the example's `scenario`
    (1: the main arm is right and undistilled wrong, 2: the reverse, 0: neither).
    """
    shown = [UNDISTILLED, *(a for a in cell.arms if a.startswith("ARMADA"))]
    first = cell.arms[UNDISTILLED]
    rows = sample(len(first.labels()), MOST // first.per_example)
    texts = (rows[:, None] * first.per_example + np.arange(first.per_example)).reshape(-1)
    parts = {a: cell.arms[a].get("student_projection") for a in shown}
    parts["aligner"] = cell.arms[cell.main].get("aligner_projection")
    drawn = geometry.tsne(np.concatenate([x[texts] for x in parts.values() if x is not None]))
    drawn = drawn.round(2)  # as much as a page or a committed file shows
    which = _scenarios(first, cell.arms[cell.main])
    where = np.zeros(len(first.labels()), dtype=np.int64)
    where[which["1"]], where[which["2"]] = 1, 2
    n = len(texts)
    return pd.DataFrame({
        "task": report.title(cell.task),
        "model": np.repeat(list(parts), n), "text": np.tile(texts, len(parts)),
        "x": drawn[:, 0], "y": drawn[:, 1], "label": np.tile(first.text_labels()[texts], len(parts)),
        "scenario": np.tile(where.repeat(first.per_example)[texts], len(parts)),
    })  # fmt: skip


# -- scenarios (Figure 8, Tables 13 and 14) --------------------------------------------------------


def _scenarios(plain: Probe, other: Probe) -> dict[str, np.ndarray]:
    """Examples (n,) bool: 1 the other is right and the undistilled student wrong, 2 the reverse."""
    a, b = plain.right, other.right
    return {"1": b & ~a, "2": a & ~b, "1 and 2": a != b}


def _others(cell: Cell, every: Sequence[Cell]) -> dict[str, Probe]:
    """What is compared with the undistilled student; among it that student with the next seed."""
    found = {a: p for a, p in cell.arms.items() if a != UNDISTILLED}
    same = sorted((c for c in every if c.task == cell.task), key=lambda c: c.seed)
    if len(same) > 1:
        after = same[(same.index(cell) + 1) % len(same)]
        found[AGAIN] = after.arms[UNDISTILLED]
    return found


def silhouettes(
    cell: Cell, every: Sequence[Cell], drawn: pd.DataFrame | None = None
) -> list[dict[str, Any]]:
    """Table 13 under every label choice of A28: rows of n, undistilled, distilled (silhouettes).

    `labels` gold: within a scenario. correctness: over both scenarios together, because within one
    every student is right or wrong throughout. `space` map: the plane of `drawn` (`joint_map`).
    """
    rows, plain = [], cell.arms[UNDISTILLED]
    per, gold = plain.per_example, plain.text_labels()
    for arm, p in _others(cell, every).items():
        for scenario, chosen in _scenarios(plain, p).items():
            pick = chosen.repeat(per)
            for space, metric in SPACES:
                found = []
                for name, q in ((UNDISTILLED, plain), (arm, p)):
                    label = gold if scenario != "1 and 2" else q.right.repeat(per).astype(np.int64)
                    x, keep = _space(q, name, space, drawn, pick)
                    found.append(
                        geometry.silhouette(x, label[keep], metric) if len(x) else math.nan
                    )
                if np.isnan(found).all() and space == "map":
                    continue
                rows.append(_at(
                    cell, arm, scenario=scenario, space=space, metric=metric, n=int(chosen.sum()),
                    labels="correctness" if scenario == "1 and 2" else "gold",
                    undistilled=found[0], distilled=found[1],
                ))  # fmt: skip
    return rows


def _space(
    p: Probe, name: str, space: str, drawn: pd.DataFrame | None, pick: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(vectors, numbers of their texts) of the picked texts, in that space; none if it has none."""
    if space == "hidden":
        x = p.get("student_hidden")
        assert x is not None
        return x[pick], np.flatnonzero(pick)
    if drawn is None:
        return np.empty((0, 2)), np.empty(0, dtype=np.int64)
    own = drawn[(drawn["model"] == name) & pick[drawn["text"]]]
    return own[["x", "y"]].to_numpy(), own["text"].to_numpy()


def _to_centroids(p: Probe) -> np.ndarray:
    """Cosine distance (texts,) to the centroid of the texts with the same gold label."""
    x = p.get("student_hidden")
    assert x is not None
    return geometry.centroid_distances(x, p.text_labels())


def distances(cell: Cell, every: Sequence[Cell]) -> list[dict[str, Any]]:
    """Table 14 without choosing examples: medians of the distance and of its reduction in %."""
    rows, plain = [], cell.arms[UNDISTILLED]
    before, per = _to_centroids(plain), plain.per_example
    for arm, p in _others(cell, every).items():
        after, which = _to_centroids(p), _scenarios(plain, p)
        groups = {"scenario 1": which["1"], "scenario 2": which["2"], "neither": ~which["1 and 2"],
                  "all": np.ones(len(p.labels()), bool)}  # fmt: skip
        with np.errstate(invalid="ignore", divide="ignore"):
            reduction = np.where(before > 0, 100 * (1 - after / before), math.nan)
        for group, chosen in groups.items():
            pick = chosen.repeat(per)
            rows.append(_at(
                cell, arm, group=group, n=int(chosen.sum()), before=_median(before[pick]),
                after=_median(after[pick]), reduction=_median(reduction[pick]),
            ))  # fmt: skip
    return rows


def _median(x: np.ndarray) -> float:
    """Of what is finite; nan if nothing is."""
    return float(np.nanmedian(x)) if np.isfinite(x).any() else math.nan


def examples(cell: Cell) -> list[dict[str, Any]]:
    """Table 14: in each scenario the first example of each gold label, by rule and not by eye."""
    plain, other = cell.arms[UNDISTILLED], cell.arms[cell.main]
    held, rows = examples_of(other.spec)[1], []
    before, after = _to_centroids(plain), _to_centroids(other)
    said = np.asarray(other.arrays["after/held/student"]).argmax(-1)
    which = _scenarios(plain, other)
    for scenario in ("1", "2"):
        for label in np.unique(other.labels()):
            for i in np.flatnonzero(which[scenario] & (other.labels() == label))[:1]:
                text = i * other.per_example + (label if other.per_example > 1 else 0)
                rows.append(_at(
                    cell, cell.main, scenario=scenario, text=held.teacher_texts[text],
                    gold=int(label), prediction=int(said[i]), before=float(before[text]),
                    after=float(after[text]),
                    reduction=100 * (1 - float(after[text] / before[text])) if before[text] else math.nan,
                ))  # fmt: skip
    return rows


def clusters(cell: Cell) -> list[dict[str, Any]]:
    """Purity of two k-means clusters beside the majority share, with gold and correctness labels (A29)."""
    rows = []
    for arm, p in cell.arms.items():
        x = p.get("student_hidden")
        assert x is not None
        found = geometry.kmeans(x, 2)
        right = p.right.repeat(p.per_example).astype(np.int64)
        for labels, y in (("gold", p.text_labels()), ("correctness", right)):
            rows.append(_at(cell, arm, labels=labels, n=len(y), purity=geometry.purity(found, y),
                            majority=geometry.majority(y)))  # fmt: skip
    return rows


# -- all of it -------------------------------------------------------------------------------------


def analyse(probes: Sequence[Probe], results: Sequence[Result], main: str) -> Frames:
    """Every analysis as a frame, by name. Maps are drawn of the first seed of each task.

    In one thread, so that the same store gives the same bits whatever the machine is told to use.
    """
    with geometry.one_thread():
        return _analyse(probes, results, main)


def _analyse(probes: Sequence[Probe], results: Sequence[Result], main: str) -> Frames:
    named = arms(results, main)
    found = named[~named["suite"].isin(gentasks.SUITES)]
    names = dict(zip(found["key"], found["arm"], strict=True))
    every = cells(probes, names, main)
    first: dict[str, Cell] = {}
    for c in every:
        first.setdefault(c.task, c)
    maps = {task: joint_map(c) for task, c in first.items()}
    noisy = dynamics.noise(results, main)
    join = lambda rows: pd.DataFrame([row for part in rows for row in part])
    return {
        "about": pd.DataFrame([{"main": main}]),
        "scores": found[["title", "seed", "arm", "control", "score"]].rename(
            columns={"title": "task"}).reset_index(drop=True),
        "maps": pd.concat(maps.values(), ignore_index=True),
        "alignment": join(alignment(c) for c in every),
        "silhouettes": join(
            silhouettes(c, every, maps[c.task] if first[c.task] is c else None) for c in every
        ),
        "distances": join(distances(c, every) for c in every),
        "examples": join(examples(c) for c in first.values()),
        "clusters": join(clusters(c) for c in every),
        "losses": dynamics.losses(results, names),
        "steps": dynamics.steps(results, names, main),
        "noise": noisy,
        "sensitivities": dynamics.sensitivities(noisy),
    }  # fmt: skip
