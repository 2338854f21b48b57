"""From the tidy table of runs to what a page shows: arms, scores beside the paper's, gains, heads.

An *arm* is one line of a comparison: undistilled, ARMADA with one loss in one reading, a control.
Every function takes the frame that `table` makes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import pandas as pd

from armada_lib import gentasks, profiles, stats, tasks
from armada_lib.methods import TABLE_7, TABLE_8
from armada_lib.results import Result, fields

LOSS = {"cosine": "cosine", "euclid": "Euclid", "elementwise": "element-wise"}
CONTROLS = {
    "shuffled": "shuffled teacher",
    "random": "random teacher",
    "constant": "constant teacher",
    "layers_only": "added layers only",
    "frozen_aligner": "frozen aligner",
}
BASELINES = {m: name for name, m in {**TABLE_7, **TABLE_8}.items() if m != "armada"} | {
    "pkd_last": "PKD, last layers", "sftn_mentor": "mentor of SFTN", "seqkd": "SeqKD",
    "vidlankd_resnet": "VidLanKD w/ResNet", "vidlankd_clip": "VidLanKD w/CLIP",
    "x_adapter_pictures": "X-adapter, V-expert",
}  # fmt: skip
STUDENT = {"bert-6l": "BERT-6L", "bert-base": "BERT-base", "deberta-v2-xxlarge": "DeBERTa-v2-xxlarge",
           "opt-1.3b": "OPT-1.3B", "llama-7b": "LLaMA-7B", "llama-3.2-3b": "LLaMA-3.2-3B",
           "llama-3.1-8b": "LLaMA-3.1-8B"}  # fmt: skip
# as the tables of one teacher write it; those of several say text-to-image, -video, -audio
TEACHER = {"sd14": "stable-diffusion-v1-4", "midjourney": "midjourney",
           "posters": "resnet50-imagenet-poster"}  # fmt: skip


def title(task: str) -> str:
    """A task's or a test set's name as the paper writes it; one's own task is called what it is."""
    known = tasks.TASKS.get(task) or gentasks.TASKS.get(task)
    return known.title if known else task


def table(results: Iterable[Result | dict[str, Any]], metric: str | None = None) -> pd.DataFrame:
    """One row per run and head, tidy, from Results or from the records of a committed file.

    `metric`: the task's own (None) or another that its runs have. Raises ValueError if one has not.
    """
    rows = []
    for r in results:
        r = fields(r)
        s, facts = r["spec"], r["facts"]
        known = {r["metric"]: r["scores"], **facts.get("also", {})}
        name = metric or r["metric"]
        if name not in known:
            raise ValueError(f"{s.label} has no {name}; its metrics are {', '.join(known)}")
        own = profiles.load(s.profile).armada[s.reading] if s.manifold else None
        usual = own.of(s.manifold, s.task) if own else s.beta
        base = {
            "profile": s.profile, "suite": s.task, "task": s.task, "student": s.student,
            "teacher": s.teacher, "method": s.method, "manifold": s.manifold, "reading": s.reading,
            "alpha": s.alpha, "beta": s.beta, "gamma": s.gamma, "usual_beta": s.beta == usual,
            "split": s.training.split, "seed": s.seed, "metric": name,
        }  # fmt: skip
        for head, score in known[name].items():
            if s.task in gentasks.SUITES:  # a row a test set; their mean is no score of its own
                if head == "student":
                    continue
                base, head = base | {"task": head}, "student"
            behaviour, asked = facts["behaviour"], facts.get("tests", {})
            rows.append(base | {
                "title": title(base["task"]), "head": head, "score": score,
                "collapsed": behaviour["collapsed"], "majority_share": behaviour.get("majority_share"),
                "evaluation": asked.get(base["task"], facts["evaluation"]),
                "seconds": facts["seconds"], "key": s.key,
            })  # fmt: skip
    return pd.DataFrame(rows)


def arm(row: Any) -> str:
    """The name of a run's arm: method, loss, reading if not the paper's, beta if not the usual.

    A control's loss is Euclid unless it is named.
    """
    if row.method != "armada" and row.method not in CONTROLS:
        return BASELINES.get(row.method, row.method)
    name = CONTROLS.get(row.method) or f"ARMADA {LOSS.get(row.manifold, 'no manifold loss')}"
    named = row.method in CONTROLS and row.manifold in ("cosine", "elementwise")
    extra = [LOSS[row.manifold]] if named else []
    extra += ["released"] if row.reading == "released" else []
    extra += [] if row.usual_beta else [f"β = {row.beta:g}"]
    return f"{name} ({', '.join(extra)})" if extra else name


def arms(df: pd.DataFrame, head: str = "student") -> pd.DataFrame:
    """One row a run of that head, with its `arm`, in the order: undistilled, ARMADA, controls."""
    df = df[df["head"] == head].copy()
    # a baseline may read a teacher of its own, which tells nobody apart
    count = df.groupby("method")["teacher"].nunique()
    several = df[~df["method"].isin(BASELINES)]["teacher"].dropna().nunique() > 1
    named = lambda r: count[r.method] > 1 if r.method in BASELINES else several
    whose = lambda r: f", {r.teacher}" if pd.notna(r.teacher) and named(r) else ""
    df["arm"] = [arm(r) + whose(r) for r in df.itertuples()]
    rank = {"undistilled": 0, "armada": 1}
    df["control"] = [m in CONTROLS for m in df["method"]]
    df["rank"] = [rank.get(m, 2) for m in df["method"]]
    order = {t: i for i, t in enumerate((*tasks.TASKS, *gentasks.TASKS))}
    df["place"] = df["task"].map(order).fillna(len(order))  # one's own tasks come last
    keys = ["place", "rank", "reading", "usual_beta", "arm", "seed"]
    return df.sort_values(keys, ascending=[True, True, True, False, True, True]).drop(
        columns=["rank", "place"]
    )


def signed(x: float, digits: int = 1) -> str:
    """ "+1.2", "−0.3": with a true minus sign, which nought never has."""
    return f"{x:+z.{digits}f}".replace("-", "−")


def too_few(seeds: int, what: str = "interval") -> str:
    """What a verdict says where there are fewer than three seeds."""
    return f"With {seeds} seed{'' if seeds == 1 else 's'} no {what} decides anything."


def interval(low: float, high: float) -> str:
    """ " [low, high]" with true minus signs, or nothing where there is none."""
    return "" if math.isnan(low) else f" [{signed(low)}, {signed(high)}]"


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
        printed, gain = _printed(published, r), "–"
        if name in gains and task in gains[name].index:
            d = gains[name].loc[task]
            gain = signed(d["mean"]) + interval(d["low"], d["high"])
        spread = "" if s.n == 1 else f" ± {s.sd:.1f}"
        rows.append({
            "task": r["title"], "trained as": name,
            "published": printed[0], "published gain": printed[1],
            "measured": f"{s.mean:.1f}{spread}".replace("-", "−"), "seeds": s.n,
            "measured gain": gain, "collapsed": f"{int(g['collapsed'].sum())} of {s.n}",
        })  # fmt: skip
    out = pd.DataFrame(rows)
    if not found["collapsed"].any():
        out = out.drop(columns="collapsed")
    return out if published is not None else out.drop(columns=["published", "published gain"])


def _printed(published: pd.DataFrame | None, r: pd.Series) -> tuple[str, str]:
    """(score, gain) the paper prints for this student, task and loss with this teacher, or dashes."""
    if published is None or r["method"] not in ("undistilled", "armada", *BASELINES):
        return "–", "–"
    rows = published[
        (published["student"] == STUDENT.get(r["student"])) & (published["task"] == r["title"])
    ]
    base = rows[rows["method"] == "undistilled"]
    if r["method"] == "undistilled":
        return (base["printed"].iloc[0] if len(base) else "–"), "–"
    if r["method"] in BASELINES:
        own = rows[rows["method"] == BASELINES[r["method"]]]
        gain = (
            signed(own["value"].iloc[0] - base["value"].iloc[0]) if len(own) and len(base) else "–"
        )
        return (own["printed"].iloc[0] if len(own) else "–"), gain
    kind = profiles.load(r["profile"]).teacher(r["teacher"]).kind
    named = rows["teacher"].isin([TEACHER.get(r["teacher"]), f"text-to-{kind}"])
    hit = rows[named & (rows["manifold_loss"] == r["manifold"])]
    if not len(hit) or not len(base):
        return "–", "–"
    return hit["printed"].iloc[0], signed(hit["value"].iloc[0] - base["value"].iloc[0])


def gain_cells(df: pd.DataFrame) -> pd.DataFrame:
    """Gains of the ARMADA runs over undistilled with the same seed: task, loss, teacher, gain."""
    found = arms(df)
    base = found[found["method"] == "undistilled"].set_index(["title", "seed"])["score"]
    own = found[found["method"] == "armada"]
    own = own[[k in base.index for k in zip(own["title"], own["seed"], strict=True)]]
    gain = own["score"].to_numpy() - base.loc[list(zip(own["title"], own["seed"], strict=True))]
    return pd.DataFrame({
        "task": own["title"], "loss": own["manifold"], "teacher": own["teacher"],
        "gain": gain.to_numpy(),
    }).reset_index(drop=True)  # fmt: skip


def printed_cells(published: pd.DataFrame) -> pd.DataFrame:
    """The same from a table of the paper: task, loss, teacher, gain."""
    published = published[published["task"] != "average"]
    base = published[published["method"] == "undistilled"].set_index("task")["value"]
    own = published[published["method"] == "ARMADA"]
    return pd.DataFrame({
        "task": own["task"], "loss": own["manifold_loss"], "teacher": own["teacher"],
        "gain": own["value"].to_numpy() - base.loc[own["task"]].to_numpy(),
    }).reset_index(drop=True)  # fmt: skip


def gain_grid(df: pd.DataFrame) -> pd.DataFrame:
    """Gains over undistilled: a row an arm; the mean over tasks, then a column a task."""
    found, scores = arms(df), by_arm(df)
    names = list(dict.fromkeys(found.sort_values(["control"], kind="stable")["arm"]))
    rows = []
    for name in names:
        if name == "undistilled":
            continue
        d = differences(df, name)
        row = {"trained as": name}
        for x in d.itertuples():
            row[x.title] = signed(x.mean) + interval(x.low, x.high)
        a = average(scores, name)
        row["mean over tasks"] = signed(a["mean"]) + interval(a["low"], a["high"])
        rows.append(row)
    out = pd.DataFrame(rows)
    titles = [t for t in found["title"].unique() if t in out.columns]
    return out[["trained as", "mean over tasks", *titles]].fillna("–")


def by_arm(df: pd.DataFrame) -> pd.DataFrame:
    """Scores of the students with a row a task and seed, and a column an arm."""
    return arms(df).pivot_table(index=["task", "seed"], columns="arm", values="score")


def average(scores: pd.DataFrame, of: str, against: str = "undistilled") -> dict[str, float]:
    """Difference in `by_arm` over the tasks: one number a seed, then mean and t interval over seeds."""
    if of not in scores or against not in scores:
        return {"mean": math.nan, "low": math.nan, "high": math.nan, "n": 0, "tasks": 0}
    values, n = by_seed(scores[of] - scores[against])
    s = stats.summary(values)
    low, high = (s.low, s.high) if s.n > 2 else (math.nan, math.nan)
    return {"mean": s.mean, "low": low, "high": high, "n": s.n, "tasks": n}


def by_seed(gain: pd.Series) -> tuple[pd.Series, int]:
    """(mean over tasks for each seed, number of tasks) of differences indexed by task and seed.

    Only tasks on which every shared seed was run count, so that all seeds average the same tasks.
    """
    wide = gain.dropna().unstack("seed")
    whole = wide.dropna()
    if len(wide) and not len(whole):  # no task has every seed: use the seed that most tasks share
        whole = wide[[wide.notna().sum().idxmax()]].dropna()
    return whole.mean(), len(whole)


def judge(
    df: pd.DataFrame, names: Sequence[str], control: str = "shuffled teacher"
) -> tuple[str, str]:
    """(outcome, sentence) by the chapter's criterion, for the arms in `names`.

    The control of an arm is the one with its manifold loss where that was run, else `control`.

    Reproduced: for every named arm the mean gain over tasks is above zero with its whole interval,
    over undistilled and over the control. Direction agrees: every mean is above zero over both.
    Undecided: fewer than three seeds, or every mean above zero and a manifold loss that was not run.
    Otherwise not reproduced.
    """
    parts, sure, positive, seeds, scores = [], True, True, [], by_arm(df)
    for name in names:
        own = next((f"{control} ({said})" for said in LOSS.values() if said in name), control)
        beside_it = own if own in scores else control
        over, beside = average(scores, name), average(scores, name, beside_it)
        if not beside["n"]:
            return "undecided", f"No run of the {control} stands beside {name}."
        for x in (over, beside):
            sure &= x["low"] > 0
            positive &= x["mean"] > 0
            seeds.append(x["n"])
        parts.append(
            f"{name}: {signed(over['mean'])}{interval(over['low'], over['high'])} over undistilled, "
            f"{signed(beside['mean'])}{interval(beside['low'], beside['high'])} over the {beside_it}"
        )
    over_what = "Mean over tasks, in points: " if df["task"].nunique() > 1 else "In points: "
    text = over_what + "; ".join(parts) + "."
    if not seeds or min(seeds) < 3:
        return (
            "undecided",
            f"{text} {too_few(int(min(seeds, default=0)))}",
        )
    missing = [said for said in LOSS.values() if not any(said in name for name in names)]
    if positive and missing:
        return "undecided", f"{text} Not run: {', '.join(missing)}; every loss is asked for."
    return ("reproduced" if sure else "direction agrees" if positive else "not reproduced"), text
