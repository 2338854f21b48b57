"""What committed runs say, by the criteria of the chapters: functions from evidence to `Measured`.

Nothing is run here: each reads `book/results/` and judges what is in it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from armada_lib import (
    audit,
    comparison,
    contrasts,
    diagnosis,
    factorial,
    micro_macro,
    plans,
    report,
)
from armada_lib.methods import TABLE_7, TABLE_8
from armada_lib.plans import study_answer
from armada_lib.profiles import check
from armada_lib.tasks import TASKS


@dataclass(frozen=True)
class Measured:
    """A verdict on committed runs: an outcome of `chapter.OUTCOMES`, in short, in full, by whom."""

    outcome: str
    short: str
    text: str
    said: str
    seeds: str


def _seeds(e: plans.Evidence, df: pd.DataFrame | None = None) -> str:
    """Numbers of seeds of the arms at the usual weights, as in "3" or "1 to 3"."""
    found = report.arms(e.frame if df is None else df)
    usual = found[found["usual_beta"] | (found["method"] != "armada")]
    found = (usual if df is not None else found).groupby(["task", "arm"])["seed"].nunique()
    return f"{found.min()}" if found.min() == found.max() else f"{found.min()} to {found.max()}"


def judged(found: tuple[str, str], short: str, e: plans.Evidence, seeds: str = "") -> Measured:
    """(outcome, sentence) as `Measured`; seeds are counted unless given."""
    return Measured(found[0], short, found[1], e.said, seeds or _seeds(e))


def _gains(df: pd.DataFrame, names: Sequence[str], between: str = "; ") -> str:
    """Each arm of ARMADA over undistilled, in short."""
    scores, found = report.by_arm(df), []
    for name in names:
        x = report.average(scores, name)
        said = report.signed(x["mean"]) + report.interval(x["low"], x["high"])
        found.append(f"{name.removeprefix('ARMADA ')} {said}")
    return between.join(found)


def _chosen(e: plans.Evidence, tasks: Sequence[str] = ()) -> pd.DataFrame:
    """Runs with the first teacher in the paper's reading; of these tasks, or those with three seeds.

    Where no task has three seeds, all of them. `profiles.Unknown` for a task that there is not.
    """
    for task in tasks:
        check(task, TASKS, "task")
    df = e.frame
    df = df[df["teacher"].isna() | (df["teacher"] == e.teachers[0])]
    df = df[df["reading"].isna() | (df["reading"] == "paper")]
    if tasks:
        return df[df["task"].isin(tasks)]
    three = df[df.groupby("task")["seed"].transform("nunique") >= 3]
    return three if len(three) else df


def _losses(df: pd.DataFrame) -> list[str]:
    """ARMADA's arms with a loss at the usual weights."""
    names = report.arms(df)["arm"].unique()
    return [a for a in names if a.startswith("ARMADA") and "(" not in a]


def losses(evidence: str, tasks: Sequence[str] = ()) -> Measured | None:
    """Every loss over undistilled and over the shuffled teacher: `report.judge`."""
    e = plans.committed(evidence)
    df = _chosen(e, tasks)
    names = _losses(df)
    if not names:
        return None
    short = _gains(df, names)
    return judged(report.judge(df, names), short, e, _seeds(e, df))


# a verdict on several metrics is that of the worst
WORST = ("not reproduced", "undecided", "direction agrees", "reproduced")


def f1(evidence: str) -> Measured | None:
    """The same for several labels an example, by micro and by macro F1, each judged alone."""
    e = plans.committed(evidence)
    outcomes, texts, short = [], [], []
    for metric, df in micro_macro.frames(e.records).items():
        names = _losses(df)
        if not names:
            return None
        outcome, text = report.judge(df, names)
        outcomes.append(outcome)
        texts.append(f"{metric}: {text}")
        short.append(f"{metric}: {_gains(df, names, ', ')}")
    return judged((min(outcomes, key=WORST.index), " ".join(texts)), "; ".join(short), e)


def transfer(evidence: str) -> Measured | None:
    """The answer of the study, by the rules of its protocol; None while it has no contrast."""
    page = plans.studied({"study": evidence, "teachers": "auto", "draws": contrasts.DRAWS})
    if not page.primary:
        return None
    short = "; ".join(f"{report.title(t)} {study_answer.signed(c.mean)} [{study_answer.signed(c.low)}, "
                      f"{study_answer.signed(c.high)}]" for t, c in page.primary.items())  # fmt: skip
    seeds = ", ".join(str(c.n) for c in page.primary.values())
    return judged(study_answer.verdict(page), short, plans.committed(evidence), seeds)


def over(evidence: str, against: str) -> Measured | None:
    """Every loss over one other arm, averaged over tasks."""
    e = plans.committed(evidence)
    df = _chosen(e)
    scores = report.by_arm(df)
    gaps = {f"{n} minus {against}": (scores[n] - scores[against]).dropna()
            for n in _losses(df) if against in scores}  # fmt: skip
    if not gaps:
        return None
    return judged(factorial.judge(gaps), means(gaps), e, _seeds(e, df))


def means(gaps: Mapping[str, pd.Series]) -> str:
    """The mean of each difference with its interval, in short."""
    parts = []
    for name, series in gaps.items():
        values = report.by_seed(series)[0] if len(series) else series
        parts.append(f"{name} {factorial.gap(values.to_numpy())}")
    return "; ".join(parts) or "not run"


def aligner_below(evidence: str) -> Measured:
    """The undistilled student's score minus that of the aligner's own output."""
    e = plans.committed(evidence)
    df, keys = _chosen(e), ["task", "seed"]
    plain = df[(df["method"] == "undistilled") & (df["head"] == "student")]
    aligner = df[(df["method"] == "armada") & (df["head"] == "aligner") & df["usual_beta"]]
    gap = plain.groupby(keys)["score"].mean() - aligner.groupby(keys)["score"].mean()
    gaps = {"undistilled minus aligner": gap.dropna()}
    return judged(factorial.judge(gaps), means(gaps), e, _seeds(e, df))


def heads(evidence: str, head: str, claim: str) -> Measured | None:
    """Spearman between output and auxiliary heads, beside the coefficient that the claim prints."""
    e, published = plans.committed(evidence), float(audit.printed(claim)[0])
    r = diagnosis.head_correlation(e.frame, head, f"{head}_aux")
    if math.isnan(r["plain"]):
        return None
    low, high = r["interval"]
    short = f"{r['plain']:.2f} [{low:.2f}, {high:.2f}]".replace("-", "−")
    text = (
        f"Spearman {short} over {r['pairs']} cells of loss and task; {r['centred']:.2f} with the level "
        "of every task removed."
    )
    holds = low <= published <= high
    outcome = "reproduced" if holds else "direction agrees" if r["plain"] > 0 else "not reproduced"
    return judged((outcome, text.replace("-", "−")), short, e)


def _table(e: plans.Evidence, table: int) -> tuple[pd.DataFrame, str, list[str]]:
    """(runs, ARMADA's arm, the baselines' arms) of the methods of Table 7 or 8."""
    methods = {7: TABLE_7, 8: TABLE_8}[table]
    df = e.frame
    own = [m for m in methods.values() if m != "armada"]
    students = df[df["method"].isin(own)]["student"]
    df = df[df["student"].isin(students) & df["method"].isin({*own, "armada", "undistilled"})]
    names = list(report.arms(df)["arm"].unique()) if len(df) else []
    mine = next((a for a in names if a.startswith("ARMADA")), "ARMADA")
    return df, mine, [a for a in names if not a.startswith("ARMADA") and a != "undistilled"]


def equal(evidence: str, table: int) -> Measured | None:
    """ARMADA within one point of the mean of a table's baselines: `comparison.verdict`."""
    e = plans.committed(evidence)
    df, mine, others = _table(e, table)
    if not others:
        return None
    spent = comparison.costs(r for r in e.records if r["key"] in set(df["key"]))
    found = comparison.verdict(df, spent)
    gap = comparison.equally_effective(df, mine, others)[1]
    return judged(found, gap.split(": ")[-1], e, _seeds(e, df))


def ahead(evidence: str, table: int) -> Measured | None:
    """ARMADA minus each baseline of a table, averaged over tasks."""
    e = plans.committed(evidence)
    df, mine, others = _table(e, table)
    if not others:
        return None
    scores = report.by_arm(df)
    gaps = {f"minus {o}": (scores[mine] - scores[o]).dropna() for o in others if mine in scores}
    leads = [report.by_seed(g)[0].mean() for g in gaps.values() if len(g)]
    short = f"ahead of {sum(x > 0 for x in leads)} of {len(leads)} baselines"
    return judged(factorial.judge(gaps), short, e, _seeds(e, df))
