"""Procedures for claims about gains over undistilled: averages, counts, tests, analyses of variance."""

from __future__ import annotations

from functools import cache

import pandas as pd

from armada_lib import anova, chapter, report, stats
from armada_lib.audit.cells import (
    BEST,
    EVEN,
    RULES,
    best,
    cells,
    mean_cell,
    of,
    sides,
    t_test,
    without_best_task,
)
from armada_lib.audit.reading import Reading
from armada_lib.report import LOSS

SMALL = ("CoLA", "MRPC", "RTE", "STS-B")  # GLUE-small
GLUE = (*SMALL, "MNLI", "QNLI", "QQP", "SST-2")


def average_gain(student: str, *tables: int, extra: bool = False) -> list[Reading]:
    """Average over the tasks by each rule; `extra` adds other sets of tasks."""
    own = of(cells(*tables), student=student)
    found = []
    for rule, pick in RULES.items():
        chosen = pick(own)
        t = t_test(chosen)
        beside = {"t": t.t, "p": t.p, "tasks": len(chosen)}
        if rule == BEST:
            beside["without its best task"] = without_best_task(chosen)[1]
        found.append(Reading(rule, {"gain": float(chosen["gain"].mean())}, beside))
    if extra:  # other sets of tasks and another unit: not what the claim says, so beside it
        top = best(own)
        sets = {
            "first table": best(of(cells(tables[0]), student=student)),
            "other tables": best(of(cells(*tables[1:]), student=student)),
            "GLUE": top[top["task"].isin(GLUE)],
        }
        means = {name: float(f["gain"].mean()) for name, f in sets.items()}
        means["relative, %"] = 100 * float((top["gain"] / top["undistilled"]).mean())
        found.append(Reading(f"{BEST}, other sets of tasks", {}, means))
    return found


def tasks_up(student: str, table: int) -> list[Reading]:
    """On how many tasks the student improves, by each rule."""
    own = of(cells(table), student=student)
    return [
        Reading(rule, {"tasks up": sides(pick(own)["gain"])["up"], "tasks": own["task"].nunique()})
        for rule, pick in RULES.items()
    ]


def largest_gain(student: str, table: int) -> list[Reading]:
    """The largest gain of a single cell."""
    return [
        Reading("largest cell", {"gain": float(of(cells(table), student=student)["gain"].max())})
    ]


def up_to() -> list[Reading]:
    """ "Up to 3.4": a maximum, as the words say, or the average that has this value."""
    large = cells(2, 3)["gain"].nlargest(2).tolist()
    average = best(of(cells(2), student="BERT-6L"))["gain"].mean()
    return [
        Reading("largest cell", {"gain": large[0]}, {"second largest": large[1]}),
        Reading(f"average, {BEST}", {"gain": float(average)}),
    ]


def consistent(*tables: int, students: tuple[str, ...] = ()) -> list[Reading]:
    """ "Consistent": the average of every student, every best cell, or every cell is a gain."""
    frame = cells(*tables)
    frame = frame[frame["student"].isin(students)] if students else frame
    top = best(frame)
    means = top.groupby("student", sort=False)["gain"].mean()
    every, tops = sides(frame["gain"]), sides(top["gain"])
    split = {
        f"{name} {way}": n for name, g in frame.groupby("student", sort=False)
        for way, n in sides(g["gain"]).items()
    }  # fmt: skip
    return [
        Reading(
            "average of best cells, each student", {}, means.to_dict(), bool((means > 0).all())
        ),
        Reading("every best cell", {}, tops, not tops["down"] and not tops["equal"]),
        Reading("every cell", {}, every | split, not every["down"] and not every["equal"]),
    ]


def cell_counts(*tables: int) -> list[Reading]:
    """How many cells are up, down, equal; average gains and test over all cells and best cells."""
    frame = cells(*tables)
    found = []
    for rule, chosen in (("every cell", frame), (BEST, best(frame))):
        t = t_test(chosen)
        means = chosen.groupby("student", sort=False)["gain"].mean().to_dict()
        beside = {**sides(chosen["gain"]), "mean": t.difference, "t": t.t, "p": t.p, **means}
        found.append(Reading(rule, {}, beside))
    return found


def paired_test(*tables: int, tasks: tuple[str, ...] = ()) -> list[Reading]:
    """The one-sided t test over (student, task) pairs, by each rule; unpaired and stacked beside.

    `tasks`: the tasks that the claim names; all tasks of the tables are then a reading, too.
    """
    every = cells(*tables)
    named = every[every["task"].isin(tasks)] if tasks else every
    found = [_test(rule, pick(named)) for rule, pick in RULES.items()]
    found.append(_test("all cells stacked", named))
    top = best(named)
    welch = stats.welch_t(top["score"], top["undistilled"], "greater")
    found.append(Reading(f"{BEST}, not paired", {"t": welch.t, "p": welch.p}))
    if tasks:
        found.append(_test(f"{BEST}, all tasks", best(every)))
        found += [_test(f"{BEST}, without {s}", top[top["student"] != s])
                  for s in top["student"].unique()]  # fmt: skip
    return found


def _test(rule: str, chosen: pd.DataFrame) -> Reading:
    t = t_test(chosen)
    return Reading(rule, {"t": t.t, "p": t.p}, {"pairs": t.n})


# ------------------------------------------------------------------------------- instruction tuning


def largest_by_task(table: int, tasks: tuple[str, ...]) -> list[Reading]:
    """The best and the mean of the nine cells, for the tasks that the claim names."""
    frame = cells(table)
    chosen = {"best of nine": best(frame), "mean of nine": mean_cell(frame)}
    return [
        Reading(rule, f.set_index("task")["gain"].loc[list(tasks)].to_dict())
        for rule, f in chosen.items()
    ]


def sets_up(table: int, words: bool = False) -> list[Reading]:
    """On how many test sets the student improves: best of nine, mean of nine, or every cell.

    `words`: the claim says "all" and prints no number.
    """
    frame = cells(table)
    tasks = list(frame["task"].unique())
    up = {
        "best of nine": best(frame).set_index("task")["gain"] > EVEN,
        "mean of nine": mean_cell(frame).set_index("task")["gain"] > EVEN,
        "every cell": frame.groupby("task")["gain"].min() > EVEN,
    }
    means = mean_cell(frame).set_index("task")["gain"]
    beside = {
        "best of nine": {},
        "mean of nine": means.to_dict(),
        "every cell": sides(frame["gain"])
        | {f"{t} up": sides(of(frame, task=t)["gain"])["up"] for t in tasks},
    }
    return [
        Reading(rule, {"sets up": int(u.sum()), "sets": len(tasks)}, beside[rule],
                bool(u.all()) if words else None)
        for rule, u in up.items()
    ]  # fmt: skip


def _seqkd() -> pd.DataFrame:
    """Table 11 with SeqKD in the place of the undistilled student."""
    printed = chapter.published(11)
    base = printed[printed["method"] == "SeqKD"].set_index("task")["value"]
    frame = cells(11).copy()
    frame["undistilled"] = base.loc[frame["task"]].to_numpy()
    return frame.assign(gain=frame["score"] - frame["undistilled"])


def over_seqkd(tasks: tuple[str, ...]) -> list[Reading]:
    """Gain over SeqKD on the tasks that the claim names; the others beside."""
    found = []
    for rule, f in (("best of nine", best(_seqkd())), ("mean of nine", mean_cell(_seqkd()))):
        gain = f.set_index("task")["gain"]
        found.append(
            Reading(rule, gain.loc[list(tasks)].to_dict(), gain.drop(list(tasks)).to_dict())
        )
    return found


def seqkd_test() -> list[Reading]:
    """The one-sided paired t test against SeqKD, by what a pair may be."""
    frame = _seqkd()
    groups = {
        "all 45 cells": frame,
        "best of nine": best(frame),
        "best of three losses by modality": best(frame, "task", "teacher"),
        "mean of nine": mean_cell(frame),
        **{f"cells of {t}": of(frame, teacher=t) for t in frame["teacher"].unique()},
    }
    return [Reading(r, {"p": t_test(f).p}, {"pairs": len(f)}) for r, f in groups.items()]


def by_modality(table: int, teachers: tuple[str, ...]) -> list[Reading]:
    """Gain by teacher: best of three losses, mean of all cells, largest cell; others beside."""
    frame = cells(table)
    gains = {
        BEST: best(frame, "task", "teacher").groupby("teacher")["gain"].mean(),
        "mean of 15 cells": frame.groupby("teacher")["gain"].mean(),
        "largest cell": frame.groupby("teacher")["gain"].max(),
    }
    return [
        Reading(rule, g.loc[list(teachers)].to_dict(), g.drop(list(teachers)).to_dict())
        for rule, g in gains.items()
    ]


def by_loss(table: int) -> list[Reading]:
    """Average gain by loss (cosine, element-wise, Euclid): all cells, or the best teacher's."""
    frame = cells(table)
    order = ["cosine", "elementwise", "euclid"]
    gains = {
        "all cells": frame.groupby("loss")["gain"].mean(),
        "best teacher for each task": best(frame, "task", "loss").groupby("loss")["gain"].mean(),
    }
    return [Reading(rule, {LOSS[k]: float(g[k]) for k in order}) for rule, g in gains.items()]


@cache
def _anova(table: int) -> pd.DataFrame:
    return anova.readings(report.printed_cells(chapter.published(table)))


def variance(table: int, factor: str, words: bool = True) -> list[Reading]:
    """Every reading of an analysis of variance by `factor`; in words: p is not below 0.05."""
    found = _anova(table)
    return [
        Reading(r.reading, {"p": r.p}, {"F": r.F}, bool(r.p >= 0.05) if words else None)
        for r in found[found["factor"] == factor].itertuples()
    ]


def medians(student: str, *more: int) -> list[Reading]:
    """Median gain by loss (Euclid, cosine, element-wise) in Table 2, and in more tables with it."""
    found = []
    for tables in ((2,), (2, *more)):
        own = of(cells(*tables), student=student)
        gain = own.groupby("loss")["gain"].median()
        found.append(Reading(f"{own['task'].nunique()} tasks", {}, {
            LOSS[k]: float(gain[k]) for k in ("euclid", "cosine", "elementwise")}))  # fmt: skip
    return found


# ------------------------------------------------------------------------------- what a best-of does


def selected(*tables: int) -> list[Reading]:
    """How far the best of three losses lies above their mean, averaged over student and task."""
    frame = cells(*tables)
    groups = frame.groupby(["student", "task"])["gain"]
    excess, spread = groups.max() - groups.mean(), groups.std()
    return [
        Reading(f"Table {', '.join(map(str, tables))}", {}, {
            "best": float(groups.max().mean()), "best minus mean": float(excess.mean()),
            "sd between losses": float(spread.mean()), "cells": len(excess),
        })
    ]  # fmt: skip


def same_for_all_losses(*tables: int) -> list[Reading]:
    """Tasks on which the three losses print one number, by student and table."""
    found = []
    for number in tables:
        groups = cells(number).groupby(["student", "task"])["score"].nunique() == 1
        same = groups.groupby("student").sum()
        found.append(Reading(f"Table {number}", {}, {str(s): int(n) for s, n in same.items()}))
    return found


def repeated(*tables: int, first: str = "BERT-6L", second: str = "BERT-base") -> list[Reading]:
    """Tasks on which the Euclid rows of two students are equal."""
    found = []
    for number in tables:
        rows = of(cells(number), loss="euclid").pivot(
            index="task", columns="student", values="score"
        )
        found.append(
            Reading(f"Table {number}", {}, {"tasks": int((rows[first] == rows[second]).sum())})
        )
    return found


def gains_of_task(tasks: tuple[str, ...]) -> list[Reading]:
    """Every student's best gain on a task of Table 2; the words hold if all are above zero."""
    found = []
    for task in tasks:
        gain = best(of(cells(2), task=task)).set_index("student")["gain"]
        found.append(Reading(task, {}, gain.to_dict(), bool((gain > EVEN).all())))
    return found
