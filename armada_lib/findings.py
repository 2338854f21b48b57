"""What the numbers of `analysis` come to: every measure for every arm, contrasts, counts, the verdict.

Every function takes the frames that `analysis.analyse` makes and `frames.read` reads back.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import pandas as pd

from armada_lib import report, stats
from armada_lib.analysis import AGAIN, UNDISTILLED
from armada_lib.frames import Frames


class Measure(NamedTuple):
    """`sign`: the direction that the paper claims; `over`: the arm that it claims it over."""

    short: str
    about: str
    sign: int
    over: str
    digits: int = 3


FROZEN = "frozen aligner"
MEASURES = {
    "alignment": Measure("CKA", "debiased CKA with ARMADA's aligner", 1, UNDISTILLED),
    "scenario 1": Measure("scenario 1", "change of the silhouette in scenario 1", 1, UNDISTILLED),
    "scenario 2": Measure("scenario 2", "change of the silhouette in scenario 2", -1, UNDISTILLED),
    "purity": Measure("purity", "purity above the majority share", 1, UNDISTILLED),
    "loss": Measure("training loss", "mean training loss", -1, FROZEN, 5),
}
# shown on the board, without a claim of their own in this chapter
OTHERS = {
    "gap": Measure("distance", "mean distance of projections to ARMADA's aligner", 0, UNDISTILLED, 2),
    "reduction": Measure("reduction, %", "median reduction of the distance to the centroid", 0, UNDISTILLED, 0),
    "sensitivity": Measure("sensitivity", "sensitivity of the student to noise", 0, UNDISTILLED, 2),
    "score": Measure("score", "score on the evaluation split", 0, UNDISTILLED, 1),
}  # fmt: skip
CONTROLS = ("shuffled teacher", "random teacher")


def main_arm(frames: Frames) -> str:
    """ARMADA with the manifold loss that the controls use."""
    return f"ARMADA {report.LOSS[str(frames['about']['main'].iloc[0])]}"


def measures(frames: Frames) -> pd.DataFrame:
    """Every measure by task, seed and arm, long: task, seed, arm, measure, value.

    A change over the undistilled student has a value for that student, too: what its next seed
    changes, where there is one.
    """
    a, s, d, c = (frames[k] for k in ("alignment", "silhouettes", "distances", "clusters"))
    a = a[(a["when"] == "after") & (a["split"] == "held") & (a["to"] == "real")]
    s = s[(s["labels"] == "gold") & (s["space"] == "hidden") & (s["metric"] == "euclidean")]
    s = s.assign(change=s["distilled"] - s["undistilled"])
    n = frames["sensitivities"]
    n = n[n["task"].isin(frames["scores"]["task"])]  # not those of students that generate
    found = {
        "alignment": (a, "debiased"), "gap": (a, "elementwise"),
        "scenario 1": (s[s["scenario"] == "1"], "change"),
        "scenario 2": (s[s["scenario"] == "2"], "change"),
        "purity": (c[c["labels"] == "gold"].assign(above=lambda x: x["purity"] - x["majority"]), "above"),
        "reduction": (d[d["group"] == "all"], "reduction"),
        "loss": (frames["losses"], "mean"), "score": (frames["scores"], "score"),
        "sensitivity": (n[n["head"] == "student"].replace({"arm": {"ARMADA": main_arm(frames)}}), "sensitivity"),
    }  # fmt: skip
    parts = [
        df[["task", "seed", "arm"]].assign(measure=name, value=df[column])
        for name, (df, column) in found.items() if len(df)
    ]  # fmt: skip
    return pd.concat(parts, ignore_index=True).replace({"arm": {AGAIN: UNDISTILLED}})


def number(x: float, digits: int, sign: str = "") -> str:
    """A true minus, no minus before zero, and a dash for what is missing; `sign` "+" shows both."""
    if math.isnan(x):
        return "–"
    return f"{x:{sign}z.{digits}f}".replace("-", "−")


def spread(values: pd.Series, digits: int) -> str:
    """Mean over seeds, with its standard deviation where there are several."""
    x = values.dropna()
    if not len(x):
        return "–"
    s = stats.summary(x)
    return number(s.mean, digits) + (f" ± {s.sd:.{digits}f}" if s.n > 1 else "")


def board(frames: Frames, shown: Mapping[str, Measure] = MEASURES) -> pd.DataFrame:
    """A row an arm, a column a measure of `shown`: means over tasks, then mean ± sd over seeds."""
    found, rows = measures(frames), []
    for arm in frames["scores"]["arm"].unique():
        own, row = found[found["arm"] == arm], {"trained as": arm}
        for name, m in shown.items():
            values = own[own["measure"] == name].set_index(["task", "seed"])["value"].dropna()
            row[m.short] = spread(report.by_seed(values)[0], m.digits) if len(values) else "–"
        rows.append(row)
    return pd.DataFrame(rows)


def contrasts(frames: Frames) -> pd.DataFrame:
    """ARMADA's main arm minus what it is claimed over and minus the controls, a row each.

    Columns measure, claimed (sign), against, mean, low, high (95 % t interval over seeds, nan below
    three), seeds, tasks. The mean over tasks is taken first.
    """
    found, main, rows = measures(frames), main_arm(frames), []
    for name, m in MEASURES.items():
        wide = found[found["measure"] == name].pivot_table(
            index=["task", "seed"], columns="arm", values="value"
        )
        for other in (m.over, *CONTROLS):
            values, count = pd.Series(dtype=float), 0
            if main in wide and other in wide:
                values, count = report.by_seed(wide[main] - wide[other])
            mean, low, high = math.nan, math.nan, math.nan
            if len(values):
                s = stats.summary(values)
                mean, low, high = s.mean, *((s.low, s.high) if s.n > 2 else (math.nan, math.nan))
            rows.append({"measure": name, "claimed": m.sign, "against": other, "mean": mean, "low": low,
                         "high": high, "seeds": len(values), "tasks": count})  # fmt: skip
    return pd.DataFrame(rows)


def contrast_table(found: pd.DataFrame) -> pd.DataFrame:
    """`contrasts` for a page."""
    rows = []
    for r in found.itertuples():
        m = MEASURES[str(r.measure)]
        low, high = (number(x, m.digits, "+") for x in (r.low, r.high))
        span = "" if math.isnan(r.low) else f" [{low}, {high}]"
        rows.append({
            "measure": m.about, "claimed": "higher" if m.sign > 0 else "lower", "ARMADA minus": r.against,
            "measured difference": number(r.mean, m.digits, "+") + span,
            "seeds": r.seeds, "tasks": r.tasks,
        })  # fmt: skip
    return pd.DataFrame(rows)


CRITERION = (
    "each of the five measures moves as claimed, over the undistilled student (the training loss: over "
    "the frozen aligner), over the shuffled and over the random teacher, each difference averaged over "
    "tasks and with a 95 % interval over three seeds or more on the claimed side of zero"
)


def judge(frames: Frames) -> tuple[str, str]:
    """(outcome, sentence) by `CRITERION`. Direction agrees: every mean is on the claimed side."""
    found = contrasts(frames)
    ends = found["low"].where(found["claimed"] > 0, -found["high"])
    sure, agrees = ends > 0, found["mean"] * found["claimed"] > 0
    parts = []
    for name, rows in found.groupby("measure", sort=False):
        seen = [
            f"{r.against} {'yes' if sure[r.Index] else 'mean only' if agrees[r.Index] else 'no'}"
            for r in rows.itertuples()
        ]
        parts.append(f"{MEASURES[str(name)].about} (over: {', '.join(seen)})")
    text = "Moves as claimed: " + "; ".join(parts) + "."
    lacking = found["mean"].isna()
    if lacking.any() or found["seeds"].min() < 3:
        few = int(found["seeds"].min())
        return (
            "undecided",
            f"{text} With as few seeds as {few} for a difference nothing is decided.",
        )
    return (
        "reproduced" if sure.all() else "direction agrees" if agrees.all() else "not reproduced"
    ), text


# -- what can be counted ---------------------------------------------------------------------------


def tally(frames: Frames) -> pd.DataFrame:
    """The paper's statements that can be counted: statement, published, measured."""
    a, s, n = frames["alignment"], frames["scores"], frames["sensitivities"]
    a = a[(a["when"] == "after") & (a["split"] == "held") & (a["to"] == "real")]
    gap = a.pivot_table(index=["task", "seed"], columns="arm", values="elementwise")
    losses = [c for c in gap if str(c).startswith("ARMADA")]
    of = lambda x: f"{int(x.sum())} of {len(x)}" if len(x) else "–"
    rows = [
        ("element-wise student nearest to the aligner of all losses (tasks and seeds)", "by eye, Figure 7",
         of(gap[losses].idxmin(axis=1) == "ARMADA element-wise") if losses else "–"),
        ("undistilled student furthest from it", "by eye, Figure 7",
         of(gap[[UNDISTILLED, *losses]].idxmax(axis=1) == UNDISTILLED) if losses else "–"),
    ]  # fmt: skip
    main = main_arm(frames)
    for control in CONTROLS:
        if control in gap:
            rows.append((f"student of the {control} as near to ARMADA's aligner as ARMADA's own, or nearer",
                         "–", of(gap[control] <= gap[main])))  # fmt: skip
    mean = s.pivot_table(index="task", columns="arm", values="score")
    if FROZEN in mean:
        rows.append(("frozen aligner below no distillation (tasks)", "6 of 8",
                     of(mean[FROZEN] < mean[UNDISTILLED])))  # fmt: skip
    t = frames["steps"].groupby(["task", "arm", "loss"])["t"].mean().reset_index()
    for arm, said in ((FROZEN, "21 of 24"), *((c, "–") for c in CONTROLS)):
        own = t[t["arm"].str.startswith(arm)]["t"] > 0
        if len(own):
            rows.append(
                (
                    f"higher training loss with the {arm} than with the trained aligner",
                    said,
                    of(own),
                )
            )
    wide = n[n["arm"] == "ARMADA"].pivot_table(index="task", columns="head", values="sensitivity")
    if {"aligner", "student"} <= set(wide):
        wide = wide.dropna()
        rows.append(("aligner less sensitive to noise than the student (tasks)", "CoLA, MRPC, RTE",
                     of(wide["aligner"] < wide["student"])))  # fmt: skip
    return pd.DataFrame(rows, columns=["statement", "published", "measured"])
