"""Each claim of the paper and the procedure that recomputes it; the tables that the page shows."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pandas as pd

from armada_lib.audit import gains, numbers, sizes, tables
from armada_lib.audit.cells import BEST, RULES, best, cells, of, t_test, without_best_task
from armada_lib.audit.reading import COMPUTED, STATED, Reading, status
from armada_lib.profiles import ROOT, check

LARGE = ("DeBERTa-v2-xxlarge", "OPT-1.3B", "LLaMA-7B", "LLaMA-3.2-3B", "LLaMA-3.1-8B")
DECIMALS = 2

# A claim without an entry rests on a figure or on words alone.
PROCEDURES: dict[str, Callable[[], list[Reading]]] = {
    "C01": partial(tables.tasks_of, 2, 3),
    "C02": partial(tables.tasks_of, 4),
    "C03": partial(tables.tasks_of, 11, 12),
    "C04": tables.cast,
    "C05": partial(tables.baselines_named, "unimodal", 7),
    "C06": partial(tables.baselines_named, "multimodal", 8),
    "C07": partial(gains.average_gain, "BERT-6L", 2),
    "C08": partial(gains.average_gain, "BERT-6L", 2, 3, extra=True),
    "C09": partial(gains.average_gain, "BERT-base", 2, 3, extra=True),
    "C10": partial(gains.average_gain, "DeBERTa-v2-xxlarge", 2),
    "C11": partial(gains.average_gain, "OPT-1.3B", 2),
    "C12": partial(gains.average_gain, "BERT-6L", 5),
    "C13": partial(gains.average_gain, "BERT-base", 5),
    "C14": partial(gains.average_gain, "LLaMA-7B", 4),
    "C15": partial(gains.tasks_up, "LLaMA-7B", 4),
    "C16": partial(gains.largest_gain, "LLaMA-7B", 4),
    "C17": gains.up_to,
    "C18": partial(gains.consistent, 2, 4, 11, 12, students=LARGE),
    "C19": partial(gains.paired_test, 2, tasks=gains.SMALL),
    "C20": partial(gains.paired_test, 3),
    "C21": partial(gains.paired_test, 4),
    "C22": partial(gains.consistent, 2),
    "C23": partial(gains.cell_counts, 3),
    "C24": partial(gains.cell_counts, 5),
    "C25": partial(tables.averages, 4, "manifold_loss"),
    "C26": tables.aligner_below,
    "C27": partial(tables.averages_printed, 7),
    "C28": partial(tables.average_over, 7, "BERT-6L", (2, 3)),
    "C29": partial(tables.among_baselines, 7, "BERT-6L", (2, 3), 0.0),
    "C30": sizes.mentor_over_aligner,
    "C31": sizes.aligner_parameters,
    "C32": sizes.parameter_share,
    "C34": partial(tables.averages_printed, 8),
    "C35": partial(tables.among_baselines, 8, "BERT-base", (3,), 1.0),
    "C36": tables.against_baselines,
    "C37": sizes.multimodal,
    "C38": tables.student_heads_correlate,
    "C39": tables.aligner_heads_correlate,
    "C40": tables.student_head_lead,
    "C41": tables.aligner_head_lead,
    "C45": partial(gains.medians, "BERT-base", 3),
    "C46": partial(gains.largest_by_task, 11, ("Dolly", "UNI", "SNI")),
    "C47": partial(gains.sets_up, 11, words=True),
    "C48": partial(gains.over_seqkd, ("Dolly", "SelfInst", "UNI")),
    "C49": partial(gains.by_modality, 11, ("text-to-audio", "text-to-image")),
    "C50": partial(gains.variance, 11, "teacher"),
    "C51": gains.seqkd_test,
    "C54": partial(gains.by_loss, 11),
    "C55": partial(gains.variance, 11, "loss", words=False),
    "C56": partial(gains.sets_up, 12),
    "C57": partial(gains.largest_by_task, 12, ("SelfInst", "Vicuna")),
    "C58": partial(gains.by_modality, 12, ("text-to-video", "text-to-audio", "text-to-image")),
    "C59": partial(gains.variance, 12, "teacher"),
    "C60": partial(sizes.silhouette, 1),
    "C61": sizes.weak_reference,
    "C62": partial(sizes.silhouette, 2),
    "C63": sizes.reductions,
    "C66": sizes.trained_aligner,
    "C68": sizes.smallest_spread,
    "C69": sizes.latent_sizes,
    "C72": partial(gains.gains_of_task, ("CoLA", "STS-B")),
    "C74": partial(gains.repeated, 2, 5),
    "C75": partial(gains.same_for_all_losses, 2, 3),
    "C76": lambda: gains.selected(2) + gains.selected(5),
    "C77": sizes.out_of_reach,
    "P1": sizes.first_proposition,
    "P2": sizes.second_proposition,
}


@cache
def claims() -> pd.DataFrame:
    """`book/published/claims.csv` by id: location, claim, published, status, comment."""
    path = ROOT / "book/published/claims.csv"
    return pd.read_csv(path, dtype=str, keep_default_na=False).set_index("id")


@cache
def readings(claim: str) -> tuple[Reading, ...]:
    """A claim recomputed by every rule that it leaves open; empty if nothing can be recomputed.

    `profiles.Unknown` for a claim that is not in `book/published/claims.csv`.
    """
    check(claim, claims().index, "claim")
    return tuple(PROCEDURES[claim]()) if claim in PROCEDURES else ()


def printed(claim: str) -> list[str]:
    """The numbers of a claim as the paper prints them."""
    return numbers.printed_numbers(
        str(claims().loc[check(claim, claims().index, "claim"), "published"])
    )


def status_of(claim: str) -> str:
    """What the paper's own numbers say of a claim: a word of `COMPUTED`, or of `STATED`.

    Computed from the readings wherever they compare with the claim; else as the data state it.
    `settings.Unknown` for no claim of theirs; ValueError if there is neither.
    """
    stated = str(claims().loc[check(claim, claims().index, "claim"), "status"])
    if stated in STATED:
        return stated
    found = status(readings(claim), printed(claim))
    if found is None:
        raise ValueError(f"claim {claim}: nothing to compare, and no status of {list(STATED)}")
    return found


def values(claim: str) -> pd.DataFrame:
    """Every recomputed number of a claim: claim, rule, quantity, value, agrees (None: beside)."""
    rows = []
    for r in readings(claim):
        verdict = r.agrees(printed(claim)) if status_of(claim) in COMPUTED else None
        for quantity, value in r.answers.items():
            rows.append((claim, r.rule, quantity, float(value), verdict))
        for quantity, value in r.beside.items():
            rows.append((claim, r.rule, quantity, float(value), None))
    return pd.DataFrame(rows, columns=["claim", "rule", "quantity", "value", "agrees"])


def _number(x: float) -> str:
    if math.isnan(x):
        return "–"
    if float(x).is_integer():
        return f"{x:.0f}".replace("-", "−")
    return (f"{x:.{DECIMALS}f}" if abs(x) >= 0.05 else f"{x:.2g}").replace("-", "−")


def _quantity(name: str, x: float) -> str:
    """A number with its name, or with its unit behind it."""
    unit = {"million": " million", "percent": " %", "ratio": " times"}.get(name)
    return f"{_number(x)}{unit}" if unit else f"{name} {_number(x)}"


def said(claim: str, most: int = 3) -> str:
    """A claim's recomputed numbers in a few words: those of the rules that agree, else of all.

    `most`: rules, or numbers of a remark, that are written out; how many more there are is said.
    """
    found = readings(claim)
    verdicts = [r.agrees(printed(claim)) for r in found] if status_of(claim) in COMPUTED else []
    compared = [r for r in found if r.answers or r.holds is not None]
    chosen = [r for r, v in zip(found, verdicts, strict=False) if v] or compared or list(found)
    parts = []
    for r in chosen:
        if r.answers:
            parts.append(f"{', '.join(_number(v) for v in r.answers.values())} ({r.rule})")
        elif r.holds is not None:
            seen = ", ".join(_quantity(k, v) for k, v in list(r.beside.items())[:2])
            parts.append(f"{'so' if r.holds else 'not so'}: {r.rule}{f' ({seen})' if seen else ''}")
        else:
            parts += [f"{_quantity(k, v)} ({r.rule})" for k, v in r.beside.items()]
    more = f"; {len(parts) - most} more" if len(parts) > most else ""
    return "; ".join(parts[:most]) + more or "–"


def overview() -> pd.DataFrame:
    """All claims, a row each: id, where, claim, published, recomputed, status, note."""
    rows = []
    for i, c in claims().iterrows():
        rows.append({
            "id": i, "where": c["location"], "claim": c["claim"], "published": c["published"],
            "recomputed": said(str(i)), "status": status_of(str(i)), "note": c["comment"],
        })  # fmt: skip
    return pd.DataFrame(rows)


def counts() -> pd.Series:
    """How many claims have each status, in the order of the words."""
    found = overview()["status"].value_counts()
    return found.reindex([w for w in (*COMPUTED, *STATED) if w in found])


# ------------------------------------------------------------------------------- tables of the page

# the averages that the paper prints: claim, student, tables
AVERAGES = (
    ("C07", "BERT-6L", (2,)), ("C08", "BERT-6L", (2, 3)), ("", "BERT-base", (2,)),
    ("C09", "BERT-base", (2, 3)), ("C10", "DeBERTa-v2-xxlarge", (2,)), ("C11", "OPT-1.3B", (2,)),
    ("C12", "BERT-6L", (5,)), ("C13", "BERT-base", (5,)), ("", "DeBERTa-v2-xxlarge", (5,)),
    ("", "OPT-1.3B", (5,)), ("C14", "LLaMA-7B", (4,)), ("", "LLaMA-3.2-3B", (11,)),
    ("", "LLaMA-3.1-8B", (12,)),
)  # fmt: skip


def rules_side_by_side() -> tuple[pd.DataFrame, set[tuple[int, str]]]:
    """(table, marks): the average gain by each rule; marked are cells that print as published.

    A row a student and its tables: published, best of three losses (of nine cells where there are
    three teachers), each loss, all cells, largest cell, the best without its best task, p of the best.
    """
    rows: list[dict[str, Any]] = []
    marks: set[tuple[int, str]] = set()
    short = {BEST: "best of three"}
    for claim, student, numbered in AVERAGES:
        own = of(cells(*numbered), student=student)
        top = best(own)
        t, (task, rest) = t_test(top), without_best_task(top)
        averages = {short.get(r, r): float(pick(own)["gain"].mean()) for r, pick in RULES.items()}
        averages |= {"all cells": float(own["gain"].mean()), "largest": float(own["gain"].max())}
        said = printed(claim)[0] if claim else "–"
        for column, value in averages.items():
            if claim and numbers.agrees(value, said):
                marks.add((len(rows), column))
        rows.append({
            "student": student, "tables": " and ".join(map(str, numbered)),
            "tasks": top["task"].nunique(), "published": said, **averages,
            "best without": f"{rest:.{DECIMALS}f}".replace("-", "−") + f" ({task})", "p of the best": t.p,
        })  # fmt: skip
    return pd.DataFrame(rows), marks


def tests() -> pd.DataFrame:
    """Every significance test that the paper prints, by every rule: claim, published, rule, t, p, …"""
    parts = []
    for claim in ("C19", "C20", "C21", "C36", "C51", "C55"):
        found = values(claim)
        wide = found.pivot_table(index="rule", columns="quantity", values="value", sort=False)
        verdict = found.dropna(subset="agrees").groupby("rule")["agrees"].first()
        c = claims().loc[claim]
        wide = wide.reindex(columns=["t", "F", "p", "pairs"]).reset_index()
        wide.insert(0, "published", str(c["published"]))
        wide.insert(0, "test", str(c["claim"]))
        wide["prints so"] = ["yes" if verdict.get(r) else "" for r in wide["rule"]]
        parts.append(wide)
    return pd.concat(parts, ignore_index=True)


def detail(*ids: str, most: int = 6) -> pd.DataFrame:
    """Claims with every reading: id, claim, published, rule, recomputed, agrees; each named once.

    `most`: numbers of a reading that are written out.
    """
    rows = []
    for claim in ids:
        c = claims().loc[check(claim, claims().index, "claim")]
        first = {"id": claim, "claim": c["claim"], "published": c["published"]}
        for r in readings(claim):
            ok = r.agrees(printed(claim)) if status_of(claim) in COMPUTED else None
            parts = [_quantity(k, v) for k, v in (r.answers or r.beside).items()]
            more = f", {len(parts) - most} more" if len(parts) > most else ""
            text = ", ".join(parts[:most]) + more
            mark = {True: "yes", False: "no", None: ""}[ok]
            rows.append({**first, "rule": r.rule, "recomputed": text or "–", "agrees": mark})
            first = dict.fromkeys(first, "")
    return pd.DataFrame(rows)


def excess() -> pd.DataFrame:
    """Best of three losses over their mean in Tables 2 and 5, beside what equal losses would show.

    Columns: table, cells (student and task), best (its gain), excess, sd (between the losses of a
    cell, mean), by chance (`best_of(3)` sd). In points.
    """
    rows = []
    for r in readings("C76"):
        own = r.beside
        rows.append({
            "table": r.rule, "cells": int(own["cells"]), "best": own["best"],
            "excess": own["best minus mean"], "sd": own["sd between losses"],
            "by chance": numbers.best_of(3) * own["sd between losses"],
        })  # fmt: skip
    return pd.DataFrame(rows)


def one_rule_for_all() -> tuple[str, str]:
    """(outcome, sentence): does one rule give every average gain that the paper prints?

    Reproduced if a rule prints all of them as published. Direction agrees if each is printed by
    some rule, a different one for some. Otherwise not reproduced.
    """
    table, marks = rules_side_by_side()
    rows = [i for i, p in enumerate(table["published"]) if p != "–"]
    rules = [c for c in table if {c} & {"best of three", "all cells", *RULES}]
    hits = {rule: [i for i in rows if (i, rule) in marks] for rule in rules}
    covered = set().union(*hits.values())
    name = lambda i: f"{table.loc[i, 'student']}, Tables {table.loc[i, 'tables']}"
    missing = "; ".join(f"{name(i)}: {table.loc[i, 'published']}" for i in rows if i not in covered)
    text = "Averages printed as published, by rule: " + ", ".join(
        f"{rule} {len(h)}" for rule, h in hits.items()
    ) + f", of {len(rows)}."  # fmt: skip
    if missing:
        text += f" By no rule: {missing}."
    whole = any(len(h) == len(rows) for h in hits.values())
    return ("reproduced" if whole else "not reproduced" if missing else "direction agrees"), text
