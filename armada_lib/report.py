"""From the tidy table of runs to what a page shows: arms, scores beside the paper's, gains, heads.

An *arm* is one line of a comparison: undistilled, ARMADA with one loss in one reading, a control.
Every function takes the frame that `table` makes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import pandas as pd

from armada_lib import profiles, stats, tasks
from armada_lib.results import Result

LOSS = {"cosine": "cosine", "euclid": "Euclid", "elementwise": "element-wise"}
CONTROLS = {
    "shuffled": "shuffled teacher",
    "random": "random teacher",
    "layers_only": "added layers only",
    "frozen_aligner": "frozen aligner",
}
LABEL = {"task": "task", "aux_task": "aux. task", "soft": "matching", "aux_soft": "aux. matching",
         "manifold": "manifold"}  # fmt: skip
STUDENT = {"bert-6l": "BERT-6L", "bert-base": "BERT-base", "deberta-v2-xxlarge": "DeBERTa-v2-xxlarge",
           "opt-1.3b": "OPT-1.3B"}  # fmt: skip
PUBLISHED_TEACHER = {"sd14": "stable-diffusion-v1-4", "midjourney": "midjourney"}


def table(results: Iterable[Result | dict[str, Any]]) -> pd.DataFrame:
    """One row per run and head, tidy, from Results or from the records of a committed file."""
    rows = []
    for r in results:
        if isinstance(r, Result):
            r = {"spec": r.spec, "metric": r.metric, "scores": r.scores, "facts": r.facts}
        s, facts = r["spec"], r["facts"]
        usual = profiles.load(s.profile).armada[s.reading].of(s.manifold) if s.manifold else s.beta
        base = {
            "profile": s.profile, "task": s.task, "title": tasks.TASKS[s.task].title, "student": s.student,
            "teacher": s.teacher, "method": s.method, "manifold": s.manifold, "reading": s.reading,
            "alpha": s.alpha, "beta": s.beta, "gamma": s.gamma, "usual_beta": s.beta == usual,
            "split": s.training.split, "seed": s.seed, "metric": r["metric"],
        }  # fmt: skip
        for head, score in r["scores"].items():
            rows.append(base | {
                "head": head, "score": score, "collapsed": facts["behaviour"]["collapsed"],
                "majority_share": facts["behaviour"].get("majority_share"), "evaluation": facts["evaluation"],
                "seconds": facts["seconds"], "key": s.key,
            })  # fmt: skip
    return pd.DataFrame(rows)


def arm(row: Any) -> str:
    """The name of a run's arm: method, loss, reading if not the paper's, beta if not the usual."""
    if row.method == "undistilled":
        return "undistilled"
    name = (
        CONTROLS.get(row.method)
        or f"ARMADA {LOSS[row.manifold] if row.manifold else 'no manifold loss'}"
    )
    extra = ["released"] if row.reading == "released" else []
    extra += [] if row.usual_beta else [f"β = {row.beta:g}"]
    return f"{name} ({', '.join(extra)})" if extra else name


def arms(df: pd.DataFrame, head: str = "student") -> pd.DataFrame:
    """One row a run of that head, with its `arm`, in the order: undistilled, ARMADA, controls."""
    df = df[df["head"] == head].copy()
    df["arm"] = [arm(r) for r in df.itertuples()]
    rank = {"undistilled": 0, "armada": 1}
    df["control"] = [m in CONTROLS for m in df["method"]]
    df["rank"] = [rank.get(m, 2) for m in df["method"]]
    order = {t: i for i, t in enumerate(tasks.TASKS)}
    df["place"] = df["task"].map(order)
    keys = ["place", "rank", "reading", "usual_beta", "arm", "seed"]
    return df.sort_values(keys, ascending=[True, True, True, False, True, True]).drop(
        columns=["rank", "place"]
    )


def _signed(x: float) -> str:
    return f"{x:+.1f}".replace("-", "−")


def interval(low: float, high: float) -> str:
    """ " [low, high]" with true minus signs, or nothing where there is none."""
    return "" if math.isnan(low) else f" [{_signed(low)}, {_signed(high)}]"


def differences(df: pd.DataFrame, of: str, against: str = "undistilled") -> pd.DataFrame:
    """Per task: mean paired difference over the seeds that both arms have, with its t interval.

    Columns task, title, n, mean, low, high, p (the last three nan with fewer than three seeds).
    """
    rows = []
    for task, part in arms(df).groupby("task", sort=False):
        score = {a: dict(zip(g["seed"], g["score"], strict=True)) for a, g in part.groupby("arm")}
        shared = sorted(set(score.get(of, {})) & set(score.get(against, {})))
        if not shared:
            continue
        first, second = ({s: score[a][s] for s in shared} for a in (of, against))
        t = stats.paired_difference(first, second)
        # two seeds have an interval in name only: it spans a hundred points
        low, high, p = (t.low, t.high, t.p) if len(shared) > 2 else (math.nan,) * 3
        rows.append({"task": task, "title": part["title"].iloc[0], "n": len(shared), "mean": t.difference,
                     "low": low, "high": high, "p": p})  # fmt: skip
    return pd.DataFrame(rows, columns=["task", "title", "n", "mean", "low", "high", "p"])


def scores(df: pd.DataFrame, published: pd.DataFrame | None = None) -> pd.DataFrame:
    """Published beside measured, one row per task and arm, with the gain over undistilled."""
    rows = []
    found = arms(df)
    gains = {
        a: differences(df, a).set_index("task") for a in found["arm"].unique() if a != "undistilled"
    }
    for (task, name), g in found.groupby(["task", "arm"], sort=False):
        r, s = g.iloc[0], stats.summary(g["score"])
        printed, gain = _printed(published, r), ""
        if name in gains and task in gains[name].index:
            d = gains[name].loc[task]
            gain = _signed(d["mean"]) + interval(d["low"], d["high"])
        spread = "" if s.n == 1 else f" ± {s.sd:.1f}"
        share = g["collapsed"].mean()
        rows.append({
            "task": r["title"], "trained as": name,
            "published": printed[0], "published gain": printed[1],
            "measured": f"{s.mean:.1f}{spread}".replace("-", "−"), "seeds": s.n,
            "measured gain": gain, "collapsed": f"{int(g['collapsed'].sum())} of {s.n}" if share else "",
        })  # fmt: skip
    out = pd.DataFrame(rows)
    if not out["collapsed"].any():
        out = out.drop(columns="collapsed")
    return out if published is not None else out.drop(columns=["published", "published gain"])


def _printed(published: pd.DataFrame | None, r: pd.Series) -> tuple[str, str]:
    """(score, gain) the paper prints for this student, task and loss with this teacher, or dashes."""
    if published is None or r["method"] not in ("undistilled", "armada"):
        return "–", "–"
    rows = published[
        (published["student"] == STUDENT.get(r["student"])) & (published["task"] == r["title"])
    ]
    base = rows[rows["method"] == "undistilled"]
    if r["method"] == "undistilled":
        return (base["printed"].iloc[0], "") if len(base) else ("–", "")
    hit = rows[rows["manifold_loss"] == r["manifold"]]
    if not len(hit) or not len(base):
        return "–", "–"
    return hit["printed"].iloc[0], _signed(hit["value"].iloc[0] - base["value"].iloc[0])


def gain_grid(df: pd.DataFrame) -> pd.DataFrame:
    """Gains over undistilled: a row an arm, a column a task, and the mean over tasks."""
    found = arms(df)
    names = list(dict.fromkeys(found.sort_values(["control"], kind="stable")["arm"]))
    rows = []
    for name in names:
        if name == "undistilled":
            continue
        d = differences(df, name)
        row = {"trained as": name}
        for x in d.itertuples():
            row[x.title] = _signed(x.mean) + interval(x.low, x.high)
        a = average(df, name)
        row["mean over tasks"] = _signed(a["mean"]) + interval(a["low"], a["high"])
        rows.append(row)
    out = pd.DataFrame(rows)
    titles = [t.title for t in tasks.TASKS.values() if t.title in out.columns]
    return out[["trained as", *titles, "mean over tasks"]].fillna("–")


def average(df: pd.DataFrame, of: str, against: str = "undistilled") -> dict[str, float]:
    """Difference averaged over the tasks: one number a seed, then mean and t interval over seeds.

    Only tasks on which every shared seed was run count, so that all seeds average the same tasks.
    """
    table = arms(df).pivot_table(index=["task", "seed"], columns="arm", values="score")
    if of not in table or against not in table:
        return {"mean": math.nan, "low": math.nan, "high": math.nan, "n": 0, "tasks": 0}
    gain = (table[of] - table[against]).dropna().unstack("seed")
    whole = gain.dropna()
    if not len(whole):  # no task has every seed: use the seed that most tasks share
        whole = gain[[gain.notna().sum().idxmax()]].dropna()
    s = stats.summary(whole.mean())
    low, high = (s.low, s.high) if s.n > 2 else (math.nan, math.nan)
    return {"mean": s.mean, "low": low, "high": high, "n": s.n, "tasks": len(whole)}


def judge(
    df: pd.DataFrame, names: Sequence[str], control: str = "shuffled teacher"
) -> tuple[str, str]:
    """(outcome, sentence) by the chapter's criterion, for the arms in `names`.

    Reproduced: for every named arm the mean gain over tasks is above zero with its whole interval,
    over undistilled and over the control. Direction agrees: every mean is above zero over both.
    Undecided: fewer than three seeds. Otherwise not reproduced.
    """
    parts, sure, positive, seeds = [], True, True, []
    for name in names:
        over, beside = average(df, name), average(df, name, control)
        if not beside["n"]:
            return "undecided", f"No run of the {control} stands beside {name}."
        for x in (over, beside):
            sure &= x["low"] > 0
            positive &= x["mean"] > 0
            seeds.append(x["n"])
        parts.append(
            f"{name}: {_signed(over['mean'])}{interval(over['low'], over['high'])} over undistilled, "
            f"{_signed(beside['mean'])}{interval(beside['low'], beside['high'])} over the {control}"
        )
    text = "Mean over tasks, in points: " + "; ".join(parts) + "."
    if not seeds or min(seeds) < 3:
        return (
            "undecided",
            f"{text} With {min(seeds, default=0)} seed(s) no interval decides anything.",
        )
    return ("reproduced" if sure else "direction agrees" if positive else "not reproduced"), text


def heads(df: pd.DataFrame, six: pd.DataFrame, ten: pd.DataFrame, teacher: str) -> pd.DataFrame:
    """Tables 6 and 10: each head's score by task, published and measured (mean over losses, seeds).

    The aligner's heads and the student's auxiliary head, of the runs of method `armada` in the
    paper's reading at the usual beta.
    """
    df = df[(df["method"] == "armada") & (df["reading"] == "paper") & df["usual_beta"]]
    name = PUBLISHED_TEACHER.get(teacher, teacher)
    aligner = six[six["teacher"] == name].set_index("task")["printed"].to_dict()
    aligner_aux = (
        ten[(ten["model"] == "TS-Aligner") & (ten["teacher"] == name)]
        .set_index("task")["printed"]
        .to_dict()
    )
    rows = []
    for task, part in df.groupby("task", sort=False):
        title = tasks.TASKS[str(task)].title
        mean = part.groupby("head")["score"].mean()
        rows.append({
            "task": title,
            "published aligner": aligner.get(title, "–"), "published aligner aux.": aligner_aux.get(title, "–"),
            **{f"measured {label}": mean.get(h, math.nan) for label, h in
               (("aligner", "aligner"), ("aligner aux.", "aligner_aux"), ("student", "student"),
                ("student aux.", "student_aux"))},
        })  # fmt: skip
    return pd.DataFrame(rows)


def head_correlation(df: pd.DataFrame, first: str, second: str) -> dict[str, Any]:
    """Spearman between two heads over the cells (loss, task), plain and with task levels removed.

    The plain value mostly says that tasks differ in level; the centred one asks whether the heads
    agree within a task.
    """
    df = df[(df["method"] == "armada") & df["head"].isin([first, second]) & df["usual_beta"]]
    # no loss of the student reaches the aligner: its runs with three losses are one run
    cells = ["task", "reading"] if first == "aligner" else ["task", "manifold", "reading"]
    wide = df.pivot_table(index=cells, columns="head", values="score").dropna()
    if len(wide) < 3 or first not in wide or second not in wide:
        return {
            "pairs": len(wide),
            "plain": math.nan,
            "centred": math.nan,
            "interval": (math.nan, math.nan),
        }
    plain = stats.spearman(wide[first], wide[second])
    centred = wide - wide.groupby("task").transform("mean")
    spread = min(centred[first].std(), centred[second].std())
    within = stats.spearman(centred[first], centred[second]).rho if spread > 0 else math.nan
    return {
        "pairs": len(wide),
        "plain": plain.rho,
        "centred": within,
        "interval": (plain.low, plain.high),
    }


def correlations(
    found: dict[str, dict[str, Any]], published: dict[str, str] | None = None
) -> pd.DataFrame:
    """`head_correlation` of several models as a table, beside what the paper prints of them."""
    rows = []
    for name, r in found.items():
        low, high = r["interval"]
        rows.append({
            "model": name, "published": (published or {}).get(name, "–"), "measured plain": r["plain"],
            "95 % interval": "–" if math.isnan(low) else f"[{low:.2f}, {high:.2f}]".replace("-", "−"),
            "measured centred": r["centred"], "cells": r["pairs"],
        })  # fmt: skip
    return pd.DataFrame(rows)


def gradients(results: Iterable[Result]) -> pd.DataFrame:
    """Gradient norm of each term on the encoder by arm, first and last epoch, and the scatter."""
    rows = []
    for r in results:
        probes = r.facts["diagnostics"]["gradients"]
        name = arms(table([r]))["arm"].iloc[0]
        for when, probe in (("first", probes[0]), ("last", probes[-1])):
            terms = {LABEL[k]: v for k, v in probe["gradient"].items()}
            rows.append(
                {
                    "trained as": name,
                    "epoch": when,
                    **terms,
                    "scatter": probe["scatter"]["hidden"],
                }
            )
    df = pd.DataFrame(rows)
    columns = [c for c in [*LABEL.values(), "scatter"] if c in df]
    return df.groupby(["trained as", "epoch"], sort=False)[columns].mean().reset_index()


def beta_choice(df: pd.DataFrame) -> pd.DataFrame:
    """Score by loss and beta, a column a task, and the mean over tasks; collapsed runs are marked.

    One beta serves all losses, as in the paper: the last rows average over them, and the higher
    mean is the choice.
    """
    found = arms(df)
    rows = []
    for (loss, beta), g in found.groupby(["manifold", "beta"], sort=False):
        cells = {
            r.title: f"{r.score:.1f}" + (" (collapsed)" if r.collapsed else "")
            for r in g.itertuples()
        }
        rows.append(
            {
                "loss": LOSS[loss],
                "beta": f"{beta:g}",
                **cells,
                "mean": g["score"].mean(),
                "chosen": "",
            }
        )
    overall = found.groupby("beta")["score"].mean()
    for beta, mean in overall.items():
        chosen = "yes" if mean == overall.max() else ""
        rows.append({"loss": "all three", "beta": f"{beta:g}", "mean": mean, "chosen": chosen})
    return pd.DataFrame(rows).fillna("–")
