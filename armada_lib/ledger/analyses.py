"""Verdicts on committed runs for the chapters on ablations and on analyses."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pandas as pd

from armada_lib import dynamics, factorial, findings, plans, report
from armada_lib.ablation import against
from armada_lib.frames import Frames
from armada_lib.ledger.judges import Measured, judged, means
from armada_lib.plans.ablation import Ablated


def _half(evidence: str, generates: bool) -> Ablated | None:
    return plans.ablated(evidence)[generates]


def weights(
    evidence: str, up: Sequence[str] = (), down: Sequence[str] = (), generates: bool = False
) -> Measured | None:
    """The highest value of each weight in `up`, the lowest of those in `down`, at equal others.

    A gain from beta is a teacher's only if the base gains over the shuffled teacher, too.
    """
    half = _half(evidence, generates)
    if half is None:
        return None
    grid = factorial.cells(half.frame, half.levels)
    gaps = factorial.effects(grid, half.levels, list(up))
    gaps |= factorial.effects(grid, half.levels, list(down), down=True)
    if "beta" in up:
        gaps["base minus shuffled teacher"] = against(half.frame, "base", "", "shuffled")
    found = factorial.judge(gaps, unit="test sets" if generates else "tasks")
    return judged(found, means(gaps), half)


def best_loss(evidence: str, loss: str = "euclid") -> Measured | None:
    """One manifold loss minus each other."""
    half = _half(evidence, False)
    arms = factorial.by_loss(half.frame) if half else {}
    if half is None or loss not in arms:
        return None
    name = lambda m: f"{report.LOSS[loss]} minus {report.LOSS[m]}"
    gaps = {name(m): (arms[loss] - arms[m]).dropna() for m in arms if m != loss}
    return judged(factorial.judge(gaps), means(gaps), half)


def alike(evidence: str) -> Measured | None:
    """Every two losses within one point, of students that generate."""
    half = _half(evidence, True)
    if half is None:
        return None
    found = factorial.alike(factorial.by_loss(half.frame))
    return judged(found, found[1].removeprefix("In points: "), half)


# ------------------------------------------------------------------------------- analyses


def measure(evidence: str, name: str) -> Measured | None:
    """One measure of the chapter on analyses, over what it is claimed over and over the controls."""
    there = plans.analysed(evidence)
    if there is None:
        return None
    e, frames = there
    found = findings.contrasts(frames)
    found = found[found["measure"] == name]
    if found.empty:
        raise ValueError(f"unknown measure {name!r}; measures are {', '.join(findings.MEASURES)}")
    ends = found["low"].where(found["claimed"] > 0, -found["high"])
    sure, agrees = ends > 0, found["mean"] * found["claimed"] > 0
    shown = findings.contrast_table(found)
    short = "; ".join(
        f"{r['measured difference']} over {'' if r['ARMADA minus'] == 'undistilled' else 'the '}"
        f"{r['ARMADA minus']}"
        for _, r in shown.iterrows()
    )
    seeds = f"{found['seeds'].min()}"
    if found["mean"].isna().any() or found["seeds"].min() < 3:
        outcome = "undecided"
    else:
        outcome = (
            "reproduced" if sure.all() else "direction agrees" if agrees.all() else "not reproduced"
        )
    return judged((outcome, f"{findings.MEASURES[name].about}: {short}."), short, e, seeds)


def _analysed(
    evidence: str, name: str, gap: Callable[[Frames], pd.Series | None]
) -> Measured | None:
    """A difference that the numbers of the analyses give, (task, seed) -> points, judged."""
    there = plans.analysed(evidence)
    series = gap(there[1]) if there else None
    if there is None or series is None or series.dropna().empty:
        return None
    found = {name: series.dropna()}
    return judged(factorial.judge(found), means(found), there[0])


def frozen_below(evidence: str) -> Measured | None:
    """Undistilled minus frozen aligner, in score."""

    def gap(frames: Frames) -> pd.Series | None:
        wide = frames["scores"].pivot_table(index=["task", "seed"], columns="arm", values="score")
        pair = ("undistilled", findings.FROZEN)
        return wide[pair[0]] - wide[pair[1]] if set(pair) <= set(wide) else None

    return _analysed(evidence, f"undistilled minus {findings.FROZEN}", gap)


def robust(evidence: str) -> Measured | None:
    """Sensitivity to noise of the distilled student minus that of its aligner."""

    def gap(frames: Frames) -> pd.Series | None:
        n = frames["sensitivities"]
        n = n[(n["arm"] == "ARMADA") & n["task"].isin(frames["scores"]["task"])]
        wide = n.pivot_table(index=["task", "seed"], columns="head", values="sensitivity")
        return wide["student"] - wide["aligner"] if {"student", "aligner"} <= set(wide) else None

    return _analysed(evidence, "student minus aligner", gap)


def noise_hurts(evidence: str) -> Measured | None:
    """Gain of a student that generates without noise, minus its gain with the most noise."""

    def gap(frames: Frames) -> pd.Series | None:
        g = dynamics.gains(frames["noise"])
        g = g[g["model"] == "ARMADA"]
        wide = g.pivot_table(index=["task", "seed"], columns="sigma", values="gain")
        return wide.iloc[:, 0] - wide.iloc[:, -1] if wide.shape[1] > 1 else None

    return _analysed(evidence, "no noise minus most noise", gap)
