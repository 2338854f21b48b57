"""Procedures for claims about counts, printed averages, baselines and heads."""

from __future__ import annotations

from decimal import ROUND_DOWN, ROUND_HALF_EVEN, ROUND_HALF_UP, Decimal
from functools import partial

import numpy as np
import pandas as pd
from scipy import stats as sps

from armada_lib import chapter, stats
from armada_lib.audit import numbers
from armada_lib.audit.cells import RULES, cells, of
from armada_lib.audit.reading import Reading
from armada_lib.profiles import ROOT
from armada_lib.report import LOSS

PUBLISHED = ROOT / "book" / "published"

# ------------------------------------------------------------------------------- counts


def tasks_of(*tables: int) -> list[Reading]:
    """Number of tasks in these tables."""
    return [Reading("tasks in the tables", {"tasks": cells(*tables)["task"].nunique()})]


def cast() -> list[Reading]:
    """Students and teachers of Tables 2, 4, 5, 11 and 12; a text-to-image teacher is a named one."""
    frame = cells(2, 4, 5, 11, 12)
    teachers = set(frame["teacher"]) - {"text-to-image"}
    answers = {"students": frame["student"].nunique(), "teachers": len(teachers)}
    return [Reading("names in the tables", answers)]


def baselines_named(kind: str, table: int) -> list[Reading]:
    """How many baselines each place of the paper names; all places together for good measure."""
    named = pd.read_csv(PUBLISHED / "baselines_named.csv")
    named = named[named["kind"] == kind]
    rows = set(chapter.published(table)["method"]) - {"ARMADA"}
    found = {f"Table {table}": len(rows)}
    found |= {str(p): len(g) for p, g in named.groupby("place", sort=False)}
    found["any place"] = len(rows | set(named["method"])) if kind == "unimodal" else 0
    return [Reading(rule, {"baselines": n}) for rule, n in found.items() if n]


# ------------------------------------------------------------------------------- printed averages


def _exact(number: int, key: str) -> pd.DataFrame:
    """A table's printed averages beside the exact means of its printed cells, a row a method."""
    df = chapter.published(number)
    rows = []
    for name, g in df.groupby(key, sort=False):
        average = g[g["task"] == "average"]
        if len(average):
            own = [Decimal(p) for p in g.loc[g["task"] != "average", "printed"]]
            mean = sum(own, Decimal(0)) / len(own)
            rows.append({key: name, "printed": average["printed"].iloc[0], "mean": mean})
    return pd.DataFrame(rows)


def averages(number: int, key: str) -> list[Reading]:
    """The averages of a table, each computed from its cells."""
    found = _exact(number, key)
    return [
        Reading("mean of the tasks", {str(r[key]): float(r["mean"]) for _, r in found.iterrows()})
    ]


def averages_printed(number: int) -> list[Reading]:
    """How many averages of a table print as printed, by the rule of rounding; the means beside."""
    found = _exact(number, "method")
    beside = {
        str(r.method): float(r.mean_) for r in found.rename(columns={"mean": "mean_"}).itertuples()
    }
    hows = {"half to even": ROUND_HALF_EVEN, "half up": ROUND_HALF_UP, "cut off": ROUND_DOWN}
    # cutting off is no rounding: shown, but not a reading of a printed average
    out = []
    for name, how in hows.items():
        same = sum(numbers.rounded(r["mean"], r["printed"], how) == Decimal(r["printed"])
                   for _, r in found.iterrows())  # fmt: skip
        counted = {"averages": same}
        out.append(
            Reading(name, {}, counted) if how is ROUND_DOWN else Reading(name, counted, beside)
        )
    return out


def _scores(number: int) -> pd.DataFrame:
    """A table of baselines: a row a task, a column a method, averages left out."""
    df = chapter.published(number)
    return df[df["task"] != "average"].pivot(index="task", columns="method", values="value")


def among_baselines(
    number: int, student: str, tables: tuple[int, ...], margin: float
) -> list[Reading]:
    """Whether ARMADA's printed row lies at most `margin` below the best baseline's average.

    Beside it: both averages, places, tasks won, the paired t test, and single losses' averages.
    """
    table = _scores(number)
    means = table.mean()
    rival = str(means.drop("ARMADA").idxmax())
    t = stats.paired_t(table["ARMADA"], table[rival], "greater")
    order = means.rank(ascending=False)
    lead = float(means["ARMADA"] - means[rival])
    beside = {
        "ARMADA": float(means["ARMADA"]), rival: float(means[rival]), "lead": lead,
        "place": float(order["ARMADA"]), "tasks won": int((table["ARMADA"] > table[rival]).sum()),
        "tasks best of all": int((table["ARMADA"] > table.drop(columns="ARMADA").max(axis=1)).sum()),
        "t": t.t, "p": t.p,
    }  # fmt: skip
    own = of(cells(*tables), student=student)
    own = own[own["task"].isin(table.index)]
    beside |= {rule: float(RULES[rule](own)["score"].mean()) for rule in LOSS.values()}
    return [Reading("the printed row", {}, beside, lead >= -margin)]


def average_over(number: int, student: str, tables: tuple[int, ...]) -> list[Reading]:
    """ARMADA's gain over undistilled on the tasks of a table of baselines, by each rule."""
    own = of(cells(*tables), student=student)
    own = own[own["task"].isin(_scores(number).index)]
    found = {rule: pick(own) for rule, pick in RULES.items()}
    return [
        Reading(r, {"gain": float(f["gain"].mean())}, {"average": float(f["score"].mean())})
        for r, f in found.items()
    ]


def against_baselines() -> list[Reading]:
    """The one-tailed t test over all baselines: against their mean, their best, or one of them."""
    seven, eight = _scores(7), _scores(8)
    own = lambda t: t["ARMADA"]
    mean = lambda t: t.drop(columns="ARMADA").mean(axis=1)
    top = lambda t: t.drop(columns="ARMADA").max(axis=1)
    pairs = {
        "Table 7, mean baseline": (own(seven), mean(seven)),
        "Table 8, mean baseline": (own(eight), mean(eight)),
        "both, mean baseline": (
            pd.concat(map(own, (seven, eight))),
            pd.concat(map(mean, (seven, eight))),
        ),
        "Table 7, best baseline": (own(seven), top(seven)),
        "Table 8, best baseline": (own(eight), top(eight)),
        "Table 7, MetaDistil": (own(seven), seven["MetaDistil"]),
        "Table 8, X-adapter": (own(eight), eight["X-adapter"]),
    }
    found = []
    for rule, (a, b) in pairs.items():
        t = stats.paired_t(a, b, "greater")
        found.append(Reading(rule, {"t": t.t, "p": t.p}, {"pairs": t.n}))
    for rule, tables in {"Table 7": [seven], "Table 8": [eight], "both": [seven, eight]}.items():
        pooled = np.concatenate([t.drop(columns="ARMADA").to_numpy().ravel() for t in tables])
        w = sps.ttest_ind(pd.concat(map(own, tables)), pooled, alternative="greater")
        answers = {"t": float(w.statistic), "p": float(w.pvalue)}
        found.append(Reading(f"{rule}, scores pooled, not paired", answers))
    return found


# ------------------------------------------------------------------------------- heads


def _heads() -> tuple[pd.DataFrame, pd.DataFrame]:
    """(student, aligner) scores of output and auxiliary head: Tables 2 and 6 beside Table 10."""
    ten = chapter.published(10)
    student = of(cells(2), student="BERT-base").rename(columns={"score": "output"})
    own = ten[ten["model"] != "TS-Aligner"].rename(columns={"manifold_loss": "loss"})
    student = student.merge(own[["task", "loss", "value"]], on=["task", "loss"])
    aligner = chapter.published(6).rename(columns={"value": "output"})
    own = ten[ten["model"] == "TS-Aligner"]
    aligner = aligner[["teacher", "task", "output"]].merge(own[["task", "value"]], on="task")
    return (
        student.rename(columns={"value": "auxiliary"}),
        aligner.rename(columns={"value": "auxiliary"}),
    )


rho = partial(stats.spearman, draws=1)  # the interval is not asked for here


def student_heads_correlate() -> list[Reading]:
    """Spearman over (loss, task); beside it, inside a loss and with the level of the tasks removed."""
    student, _ = _heads()
    plain = rho(student["output"], student["auxiliary"])
    level = student.groupby("task")[["output", "auxiliary"]].transform("mean")
    centred = student[["output", "auxiliary"]] - level
    # differences of printed numbers: equal ones must tie
    within = rho(centred["output"].round(6), centred["auxiliary"].round(6))
    beside = {f"inside {LOSS[str(k)]}": rho(g["output"], g["auxiliary"]).rho
              for k, g in student.groupby("loss")}  # fmt: skip
    beside |= {"tasks centred": within.rho, "p, tasks centred": within.p, "pairs": len(student)}
    return [Reading("all losses and tasks", {"rho": plain.rho}, beside)]


def _by_teacher(aligner: pd.DataFrame) -> dict[str, pd.DataFrame]:
    own = {str(t): g for t, g in aligner.groupby("teacher", sort=False)}
    return {"Stable Diffusion": own["stable-diffusion-v1-4"], "Midjourney": own["midjourney"],
            "both teachers": aligner}  # fmt: skip


def aligner_heads_correlate() -> list[Reading]:
    """Spearman between the aligner's heads over tasks, by teacher."""
    return [Reading(name, {"rho": rho(g["output"], g["auxiliary"]).rho}, {"pairs": len(g)})
            for name, g in _by_teacher(_heads()[1]).items()]  # fmt: skip


def student_head_lead() -> list[Reading]:
    """Output minus auxiliary head of the student: mean, by loss, median, best against best."""
    student, _ = _heads()
    gap = student["output"] - student["auxiliary"]
    top = student.groupby("task")[["output", "auxiliary"]].max()
    # the table of auxiliary heads names no teacher: Midjourney's outputs are a reading, too
    auxiliary = student[["task", "loss", "auxiliary"]]
    other = of(cells(5), student="BERT-base").merge(auxiliary, on=["task", "loss"])
    leads = {
        "mean": gap.mean(), "median": gap.median(),
        **{f"mean, {LOSS[str(k)]}": g.mean() for k, g in gap.groupby(student["loss"])},
        "best against best": (top["output"] - top["auxiliary"]).mean(),
        "outputs with Midjourney": (other["score"] - other["auxiliary"]).mean(),
        "relative": 100 * (gap / student["auxiliary"]).mean(),
    }  # fmt: skip
    return [Reading(rule, {"lead": float(v)}) for rule, v in leads.items()]


def aligner_head_lead() -> list[Reading]:
    """Output minus auxiliary head of the aligner, by teacher."""
    return [Reading(name, {"lead": float((g["output"] - g["auxiliary"]).mean())})
            for name, g in _by_teacher(_heads()[1]).items()]  # fmt: skip


def aligner_below() -> list[Reading]:
    """Whether the aligner lies below every undistilled student, by a paired t test over the tasks."""
    found, ps, wins = {}, [], 0
    for teacher, own in chapter.published(6).groupby("teacher"):
        mine = own.set_index("task")["value"]
        base = cells(2).drop_duplicates(["student", "task"])
        for student, g in base.groupby("student", sort=False):
            theirs = g.set_index("task")["undistilled"].loc[mine.index]
            t = stats.paired_t(theirs, mine, "greater")
            found[f"{student} minus aligner, {teacher}"] = t.difference
            ps.append(t.p)
            wins += int((mine > theirs).sum())
    found |= {"largest p": max(ps), "cells with the aligner ahead": wins}
    return [Reading("paired t over tasks, each student and teacher", {}, found, max(ps) < 0.05)]
