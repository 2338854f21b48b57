"""The chapter on analyses, table by table: Tables 13 to 15 and what stands beside them.

Every function takes the frames that `analysis.analyse` makes and `frames.read` reads back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import pandas as pd

from armada_lib import report, stats
from armada_lib.findings import FROZEN, main_arm, number, spread
from armada_lib.frames import Frames


def _arrow(df: pd.DataFrame, digits: int = 2) -> str:
    """ "0.31 → 0.52": undistilled and distilled, means over the seeds that have both."""
    both = df[["undistilled", "distilled"]].dropna()
    if both.empty:
        return "–"
    return " → ".join(number(x, digits) for x in both.mean())


def scenarios(frames: Frames, published: pd.DataFrame) -> pd.DataFrame:
    """Table 13: silhouettes in both scenarios, published and measured, a row a task and arm."""
    df = frames["silhouettes"]
    df = df[(df["labels"] == "gold") & (df["space"] == "hidden") & (df["metric"] == "euclidean")]
    rows = []
    for (task, arm), g in df.groupby(["task", "arm"], sort=False):
        row = {"task": task, "distilled as": arm}
        for k in ("1", "2"):
            own = published[(published["task"] == task) & (published["scenario"] == int(k))]
            said = own.set_index("method")["printed"]
            shown = arm == main_arm(frames) and len(said)
            part = g[g["scenario"] == k]
            row |= {
                f"published scenario {k}": f"{said['undistilled']} → {said['ARMADA']}" if shown else "–",
                f"measured scenario {k}": _arrow(part), f"examples {k}": f"{part['n'].mean():.0f}",
            }  # fmt: skip
        rows.append(row)
    return pd.DataFrame(rows)


def label_choices(frames: Frames) -> pd.DataFrame:
    """The same under every reading of A28, for the main arm: a row a task, space and metric."""
    df = frames["silhouettes"]
    df = df[df["arm"] == main_arm(frames)]
    name = {
        "1": "gold labels, scenario 1",
        "2": "gold labels, scenario 2",
        "1 and 2": "correctness, both",
    }
    rows = []
    for (task, space, metric), g in df.groupby(["task", "space", "metric"], sort=False):
        where = "hidden vectors" if space == "hidden" else "map, first seed"
        row = {"task": task, "space": where, "metric": metric}
        rows.append(row | {label: _arrow(g[g["scenario"] == k]) for k, label in name.items()})
    return pd.DataFrame(rows)


def example_table(frames: Frames) -> pd.DataFrame:
    """Table 14: examples chosen by rule, with their distance to the centroid before and after."""
    df = frames["examples"]
    return df[["task", "scenario", "text", "gold", "prediction", "before", "after", "reduction"]].rename(
        columns={"before": "measured before", "after": "measured after", "reduction": "measured reduction, %"}
    )  # fmt: skip


def _by_arm(df: pd.DataFrame, column: Callable[[pd.DataFrame], Mapping[str, str]]) -> pd.DataFrame:
    """One row a task and arm, its other columns by `column` of the group."""
    rows = [{"task": t, "trained as": a} | dict(column(g))
            for (t, a), g in df.groupby(["task", "arm"], sort=False)]  # fmt: skip
    return pd.DataFrame(rows)


def reduction_table(frames: Frames) -> pd.DataFrame:
    """Median reduction of the distance to the centroid, in %, by group of texts, over seeds."""
    df, groups = frames["distances"], ("scenario 1", "scenario 2", "neither", "all")
    return _by_arm(
        df, lambda g: {f"measured {k}": spread(g[g["group"] == k]["reduction"], 0) for k in groups}
    )


def cluster_table(frames: Frames) -> pd.DataFrame:
    """Purity beside the share that any clustering reaches, for gold and correctness labels (A29)."""
    return _by_arm(frames["clusters"], lambda g: {
        f"measured {what}, {k}": spread(g[g["labels"] == k][what], 2)
        for k in ("gold", "correctness") for what in ("purity", "majority")
    })  # fmt: skip


def alignment_table(frames: Frames) -> pd.DataFrame:
    """Distance and CKA to ARMADA's aligner, before → after training, on evaluation texts.

    The last column is of the sample of training texts, which the aligner may know by heart.
    """
    df = frames["alignment"]
    df = df[df["to"] == "real"]

    def cells(g: pd.DataFrame) -> dict[str, str]:
        at = g.groupby(["split", "when"])[["elementwise", "euclid", "cka", "debiased"]].mean()
        show = lambda c, d, split="held": " → ".join(
            number(at.loc[(split, when), c], d) for when in ("before", "after")
        )
        return {"measured distance": show("elementwise", 1), "measured centroid distance": show("euclid", 1),
                "measured CKA": show("cka", 2), "measured debiased CKA": show("debiased", 2),
                "measured debiased CKA, training": show("debiased", 2, "train")}  # fmt: skip

    return _by_arm(df, cells)


def loss_table(frames: Frames, published: pd.DataFrame) -> pd.DataFrame:
    """Table 15: t of (arm minus trained ARMADA), per step in every seed, and over seeds.

    Per seed: the range over seeds of Welch's t between the steps of two runs. Over seeds: Welch's t
    between the runs' mean losses, one number a run, which are independent. "step to step": how far
    the arm's loss at a step is correlated with the next. An arm is compared with ARMADA of its own
    manifold loss, which it names where it is not the main one.
    """
    runs = frames["losses"].set_index(["task", "arm", "seed"])
    means, correlation = runs["mean"], runs["autocorrelation"]
    rows = []
    for (task, arm, loss), g in frames["steps"].groupby(["task", "arm", "loss"], sort=False):
        own = published[(published["task"] == task) & (published["manifold_loss"] == loss)]
        said = own["t_statistic"].iloc[0] if len(own) and str(arm).startswith(FROZEN) else math.nan
        a, b = means[task][arm], means[task][f"ARMADA {report.LOSS[str(loss)]}"]
        t = stats.welch_t(a, b)
        ends = [number(x, 2, "+") for x in (g["t"].min(), g["t"].max())]
        rows.append({
            "task": task, "minus trained": arm,
            "published t": number(said, 2, "+"),
            "measured t per step": " to ".join(ends if len(g) > 1 else ends[:1]), "largest p": g["p"].max(),
            "step to step": correlation[task][arm].mean(),
            "measured difference": number(t.difference, 4, "+"), "t over seeds": t.t, "p over seeds": t.p,
        })  # fmt: skip
    return pd.DataFrame(rows)


def sensitivity_table(frames: Frames) -> pd.DataFrame:
    """Sensitivity of student and aligner, and what seeds alone would give the student's.

    Last column: variance of its score over seeds without noise, divided by Var(sigma), both unbiased:
    the mean sensitivity of scores that vary with chance and not with sigma.
    """
    df, noisy = frames["sensitivities"], frames["noise"]
    levels = pd.Series(sorted(noisy["sigma"].unique()))

    def cells(g: pd.DataFrame) -> dict[str, str]:
        task, arm = g["task"].iloc[0], g["arm"].iloc[0]
        still = noisy[(noisy["task"] == task) & (noisy["arm"] == arm) & (noisy["sigma"] == 0)
                      & (noisy["head"] == "student")]["score"]  # fmt: skip
        chance = still.var(ddof=1) / levels.var(ddof=1) if len(still) > 1 else math.nan
        return {
            "measured student": spread(g[g["head"] == "student"]["sensitivity"], 2),
            "measured aligner": spread(g[g["head"] == "aligner"]["sensitivity"], 2),
            "seeds alone": "–" if math.isnan(chance) else f"{chance:.2f}",
        }

    return _by_arm(df, cells)
