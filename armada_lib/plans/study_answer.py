"""What the page of a study says: the primary family, the cost, and the answer put together by rule."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path

import pandas as pd

from armada_lib import chapter, contrasts, figures, plots_study, profiles, report, stats
from armada_lib.contrasts import HARMS, MATTERS, MIXED, NOT, OPEN, Contrast
from armada_lib.files import write_text
from armada_lib.plans.common import digest, played, processor, seeds_fact
from armada_lib.plans.study import Studied
from armada_lib.plans.study_design import BARE, GROUPS, OVER, PRIMARY, Pair

HEAD = {
    MATTERS: "The teacher matters at this scale",
    HARMS: "The real teacher does harm at this scale",
    MIXED: "The real teacher helps on one task and harms on another",
    NOT: "The teacher does not matter at this scale",
    OPEN: "It stays undecided whether the teacher matters at this scale",
}
# the claim that is judged: a gain comes from what the teacher knows
OUTCOME = {MATTERS: "reproduced", HARMS: "not reproduced", NOT: "not reproduced",
           MIXED: "undecided", OPEN: "undecided"}  # fmt: skip


def signed(x: float) -> str:
    """Two decimals, or three where two would hide the sign: one example of CoLA is a tenth of a point."""
    return report.signed(x, 2 if abs(x) >= 0.005 else 3)


def _span(c: Contrast) -> str:
    return f"{signed(c.mean)} [{signed(c.low)}, {signed(c.high)}]"


def _listed(found: dict[str, Contrast]) -> str:
    return ", ".join(f"{report.title(t)} {_span(c)}" for t, c in found.items())


def _titles(tasks: Iterable[str]) -> str:
    return " and ".join(map(report.title, tasks))


def _of(p: Studied, group: str, name: str) -> dict[str, Contrast]:
    """A contrast on each primary task where there is one."""
    pair = next((x for x in p.pairs if (x.group, x.name) == (group, name)), None)
    found = {t: p.contrast(pair, t) for t in p.tasks} if pair else {}
    return {t: c for t, c in found.items() if c is not None}


def conclusion(p: Studied) -> str:
    """What is concluded of the whole; undecided while a primary task has fewer than two seeds."""
    return contrasts.overall(p.primary) if len(p.primary) == len(p.tasks) else OPEN


def answer(p: Studied) -> list[str]:
    """Three sentences: does the teacher matter, what else does, can anything be carried over."""
    return [_primary(p), _regularisation(p), _upper(p)]


def _primary(p: Studied) -> str:
    who = profiles.load(p.study.profile).teacher(p.main.teacher)
    if not p.primary:
        return "Nothing can be said yet: no primary task has two seeds of the real and the shuffled teacher."
    each = "; ".join(f"{report.title(t)}: {c}" for t, c in contrasts.conclude(p.primary).items())
    return (
        f"{'Provisional: ' if p.provisional else ''}{HEAD[conclusion(p)]}: with {who.note or who.name}, real "
        f"minus shuffled is {_listed(p.primary)} points ({each})."
    )


def _regularisation(p: Studied) -> str:
    """Do real and shuffled teachers both move the student away from the undistilled one?"""
    name = p.main.teacher
    real, shuffled = _of(p, OVER, f"real {name}"), _of(p, OVER, f"shuffled {name}")
    both = [t for t in real if t in shuffled]
    if not both:
        return "Neither teacher has been compared with the undistilled student yet."
    up = [t for t in both if min(real[t].low, shuffled[t].low) > 0]
    down = [t for t in both if max(real[t].high, shuffled[t].high) < 0]
    parts = []
    if up:
        parts.append(f"on {_titles(up)} both gain")
    if down:
        parts.append(f"on {_titles(down)} both lose")
    said = "; ".join(parts) or "on no task do both differ beyond noise"
    same = conclusion(p) == NOT  # the protocol: if they do not differ, and both do from undistilled
    tail = ", which is regularisation and no transfer" if parts and same else ""
    return (
        f"From the undistilled student, that of the real teacher differs by {_listed(real)} points and that "
        f"of the shuffled teacher by {_listed(shuffled)}: {said}{tail}."
    )


def _upper(p: Studied) -> str:
    """The control that knows the text and has no second modality."""
    teachers = profiles.load(p.study.profile).teachers
    used = dict.fromkeys(x.teacher for x in p.pairs)
    name = next((t for t in used if teachers[t].kind == "text"), None)
    found = _of(p, PRIMARY, name) if name else {}
    found = {t: c for t, c in found.items() if c.n > 1}
    whole = "The text teacher, which knows the text and has no second modality,"
    if not found:
        return f"{whole} has not been run with two seeds yet."
    above = [t for t, c in found.items() if c.low > 0]
    below = [t for t, c in found.items() if c.high < 0]
    parts = [f"does {how} than its shuffled self on {_titles(on)}"
             for how, on in (("better", above), ("worse", below)) if on]  # fmt: skip
    said = " and ".join(parts) or "does not differ from its shuffled self beyond noise"
    matters = conclusion(p) == MATTERS
    if above:
        said += ", so that the method can carry something over here"
        if matters:
            said += (
                "; the real teacher's gain is cross-modal only as far as this does not explain it"
            )
    elif matters:
        said += ", so that text alone does not explain the real teacher's gain"
    elif below:
        said += ", so that no gain is carried over"
    elif all(c.low <= 0 <= c.high for c in p.primary.values()):
        said += " either, so that at this scale the method shows no transfer from any teacher"
    return f"{whole} {said} ({_listed(found)} points)."


def verdict(p: Studied) -> tuple[str, str]:
    """(outcome for `chapter.verdict`, the three sentences)."""
    return OUTCOME[conclusion(p)], " ".join(answer(p))


# -- tables -------------------------------------------------------------------------------------


def family(p: Studied, group: str = PRIMARY) -> pd.DataFrame:
    """The tests of a family, Holm over it: the primary one, or `BY_LOSS` with nine contrasts."""
    pairs: list[Pair] = [x for x in p.pairs if x.group == group]
    if group == PRIMARY:
        pairs = pairs[:1]
    found = [(x, t, p.contrast(x, t, 0.05 / len(p.tasks))) for t in p.tasks for x in pairs]
    rows = [(x, t, c) for x, t, c in found if c is not None]
    adjusted = contrasts.holm([c.p for _, _, c in rows])
    equal = contrasts.holm([c.p_equivalent for _, _, c in rows])
    said = contrasts.conclude(p.primary)
    table = []
    for (x, t, c), holm, tost in zip(rows, adjusted, equal, strict=True):
        row = {"task": report.title(t), "loss": x.name, "seeds": c.n, "difference": signed(c.mean),
               "95 % interval": f"[{signed(c.low)}, {signed(c.high)}]", "p": c.p, "p (Holm)": holm,
               "bound": c.bound, "p equivalent (Holm)": tost, "found with 80 %": c.found,
               "conclusion": said.get(t, OPEN)}  # fmt: skip
        drop = (
            ["loss"]
            if group == PRIMARY
            else ["bound", "p equivalent (Holm)", "found with 80 %", "conclusion"]
        )
        table.append({k: v for k, v in row.items() if k not in drop})
    return pd.DataFrame(table or [{"task": "no two seeds of both arms are there yet"}])


def scores(p: Studied, tasks: Sequence[str]) -> pd.DataFrame:
    """Scores of every arm on these tasks, a row each, a column a task: mean, sd over seeds, seeds.

    The score of a seed is the mean over the arm's losses; a seed that lacks one of them is left out.
    """
    rows: dict[str, dict[str, str]] = {}
    for e, task in itertools.product(p.entries, tasks):
        arms = [a for a in dict.fromkeys(map(e.arm, e.losses)) if (task, a) in p.planned]
        seeds = [[(task, *a, s) for a in arms] for s in p.study.tasks[task].seeds]
        there = [names for names in seeds if names and all(n in p.records for n in names)]
        whole = [[p.records[n]["scores"]["student"] for n in names] for names in there]
        if whole and (e.method == BARE or e.teacher in (p.main.teacher, *p.teachers)):
            mean = stats.summary([sum(x) / len(x) for x in whole])
            rows.setdefault(p.named(e), {})[report.title(task)] = str(mean)
    table = [{"arm": name, **row} for name, row in rows.items()]
    return pd.DataFrame(table or [{"arm": "no cell is there yet"}]).fillna("–")


def secondary(p: Studied) -> pd.DataFrame:
    """The main contrasts on the other tasks for `plots_study.forest`: a row a task, a panel a contrast."""
    who = p.main.teacher
    panels = {(PRIMARY, who): "real − shuffled", (OVER, f"real {who}"): "real − undistilled",
              (OVER, f"shuffled {who}"): "shuffled − undistilled"}  # fmt: skip
    df = p.frame(p.others, [PRIMARY, OVER])
    names = list(zip(df["group"], df["contrast"], strict=True))
    df = df.assign(contrast=df["title"], title=[panels.get(n) for n in names], group="secondary")
    order = {panel: i for i, panel in enumerate(panels.values())}
    return df[df["title"].notna()].sort_values("title", key=lambda x: x.map(order), kind="stable")


def main(p: Studied) -> pd.DataFrame:
    """The contrasts of the primary tasks that matter most: real, shuffled and undistilled, first teacher."""
    who = p.main.teacher
    df = p.frame(p.tasks, [PRIMARY, OVER])
    return df[df["contrast"].isin([who, f"real {who}", f"shuffled {who}"])]


def show_on_front_page(p: Studied) -> Path | None:
    """Save main contrasts and first sentence where the book's introduction looks for them."""
    if p.study.name != "study" or not p.records:
        return None
    folder = profiles.ROOT / "book" / "_static"
    write_text(folder / "study.txt", f"{_primary(p)}\n")
    return figures.save(plots_study.forest(main(p), order=GROUPS), folder / "study.svg")


def summary(p: Studied, tasks: Iterable[str], groups: Iterable[str]) -> pd.DataFrame:
    """Contrasts of these groups, a row each, a column a task: mean, interval, p, seeds."""
    frame = p.frame(list(tasks), list(groups))
    if frame.empty:
        return frame
    tested = lambda r: f"p {'< 0.001' if r.p < 0.001 else f'= {r.p:.3f}'}, " if r.seeds > 1 else ""
    cell = [
        f"{signed(r.mean)} [{signed(r.low)}, {signed(r.high)}], {tested(r)}n = {r.seeds}"
        for r in frame.itertuples()
    ]
    wide = frame.assign(cell=cell).pivot(
        index=["group", "contrast"], columns="title", values="cell"
    )
    order = frame[["group", "contrast"]].drop_duplicates().itertuples(index=False, name=None)
    wide = wide.reindex(index=list(order), columns=list(dict.fromkeys(frame["title"])))
    return wide.fillna("–").reset_index().rename_axis(columns=None)


def cost(p: Studied) -> pd.DataFrame:
    """A row a stage: cells planned and finished, what is missing, core-hours."""
    rows = []
    for stage in p.study.stages:
        planned = [c for c in p.cells if c.stage == stage.name]
        there = [p.records[c.identity] for c in planned if c.identity in p.records]
        lacking = [c for c in planned if c.identity not in p.records]
        tasks = dict.fromkeys(c.task for c in lacking)
        said = ", ".join(f"{report.title(t)} {sum(c.task == t for c in lacking)}" for t in tasks)
        # a run has one thread: it used a core for so long at most
        hours = sum(r["facts"]["seconds"] for r in there) / 3600
        rows.append({"stage": stage.name, "cells": len(planned), "finished": len(there),
                     "core-hours": hours, "missing": said or "none"})  # fmt: skip
    return pd.DataFrame(rows)


def run_line(p: Studied) -> None:
    """Show who plays whom, and how much of the study is there."""
    profile, made = profiles.load(p.study.profile), list(p.records.values())
    hours = sum(r["facts"]["seconds"] for r in made) / 3600
    chapter.run_line({
        "evidence": f"book/results/{p.study.name}.jsonl",
        "profile": f"{profile.name} ({profile.about})",
        "student": played(profile.student(p.study.student or profile.nlu.student)),
        "teacher": [played(profile.teacher(t)) for t in p.seen],
        "cells": f"{len(made):,} of {len(p.cells):,}",
        "digest of the cells": digest(r["spec"] for r in made),
        **seeds_fact(s for t in p.study.tasks.values() for s in t.seeds),
        "precision": sorted({r["spec"].training.precision for r in made}) or None,
        "processor": sorted({processor(r) for r in made}) or None,
        "torch": sorted({r["environment"]["torch"] for r in made}) or None,
        "core-hours": f"{hours:.1f}",
    })  # fmt: skip
