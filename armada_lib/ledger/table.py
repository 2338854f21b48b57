"""The ledger as a table: each entry judged from the paper's own numbers and from committed runs."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from armada_lib import audit, figures, plans
from armada_lib.files import write_text
from armada_lib.ledger.entries import (
    KINDS,
    STATUSES,
    Entry,
    book,
    chapter_file,
    evidence_file,
)
from armada_lib.ledger.judges import Measured
from armada_lib.ledger.rules import RULES
from armada_lib.profiles import ROOT

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OWN = (
    "the paper's own tables give what is printed by every rule that its words leave open "
    "(direction agrees: by some of them; contradicts itself: by none)"
)
PROOF = "no counterexample, and a proof that holds"
BY_OWN = {
    "agrees": "reproduced", "agrees under one reading": "direction agrees",
    "differs": "contradicts itself", "contradicts itself": "contradicts itself",
    "false": "not reproduced",
}  # fmt: skip
# worst first: several claims are no better than the worst of them
ORDER = ("contradicts itself", "not reproduced", "direction agrees", "reproduced")


def by_own_numbers(e: Entry) -> str | None:
    """What the paper's own numbers say of an entry's claims; None if nothing can be computed."""
    found = {BY_OWN[s] for c in e.claims if (s := audit.status_of(c)) in BY_OWN}
    return next((s for s in ORDER if s in found), None)


def measured(e: Entry) -> Measured | None:
    """The verdict on committed runs; None where there are none."""
    if e.measure is None or (path := evidence_file(e.measure.evidence)) is None:
        return None
    return RULES[e.measure.rule].judge(path.stem, **e.measure.options)


def criterion(e: Entry) -> str:
    """What was to be met."""
    if e.measure:
        return RULES[e.measure.rule].criterion
    if e.criterion:
        return e.criterion
    return PROOF if e.kind == "proposition" else OWN if e.own else "–"


def status(e: Entry, found: Measured | None) -> tuple[str, str]:
    """(status, why: it was not attempted, or it is as stated) of an entry.

    A headline claim or proposition that the paper's own numbers contradict, or that is false, is
    so whatever is measured. Else committed runs decide; else, if the entry says so, the paper's own
    numbers; else what is stated, once its chapter is there.
    """
    own = by_own_numbers(e)
    decisive = ("contradicts itself", "not reproduced")
    if e.kind in ("claim", "proposition") and own in decisive:
        return own, ""
    if found:
        return found.outcome, ""
    if e.own:
        return (own, "") if own else ("not attempted", "rests on what is not printed")
    if e.stated:
        there = chapter_file(e.chapter) is not None
        return (e.stated, e.why) if there else ("not attempted", "its chapter is not there yet")
    return "not attempted", e.why


def _published(e: Entry) -> str:
    if e.published:
        return e.published
    claims = audit.claims()
    said = [
        f"{claims.loc[c, 'published']} ({c})" for c in e.claims if claims.loc[c, "published"] != "–"
    ]
    return "; ".join(said) or "–"


def _recomputed(e: Entry) -> str:
    if len(e.claims) == 1:
        claim, word = e.claims[0], audit.status_of(e.claims[0])
        if word in audit.STATED and word != "remark":
            comment = audit.claims().loc[claim, "comment"]
            return f"{word}: {comment}" if comment else word
        return f"{audit.said(claim)}: {word}"
    groups: dict[str, list[str]] = {}
    for c in e.claims:
        groups.setdefault(audit.status_of(c), []).append(c)
    return "; ".join(f"{s}: {', '.join(ids)}" for s, ids in groups.items()) or "–"


@cache
def frame() -> pd.DataFrame:
    """A row an entry, in the order of the kinds and of `book/ledger.yaml`; all columns are text.

    id, kind, entry, chapter, claims, criterion, published, recomputed, own_numbers (what these
    say), measured, verdict (in full), outcome, profile, cast, seeds, evidence, sign and status, why
    (it was not attempted, or is as stated).
    """
    rows = []
    for kind in KINDS:
        for e in (e for e in book().entries if e.kind == kind):
            found = measured(e)
            outcome, why = status(e, found)
            path = evidence_file(e.measure.evidence) if e.measure and found else None
            rows.append({
                "id": e.id, "kind": e.kind, "entry": e.title,
                "chapter": e.chapter if chapter_file(e.chapter) else "", "claims": " ".join(e.claims),
                "criterion": criterion(e), "published": _published(e), "recomputed": _recomputed(e),
                "own_numbers": by_own_numbers(e) or "",
                "measured": found.short if found else "", "verdict": found.text if found else "",
                "outcome": found.outcome if found else "",
                "profile": _profile(path) if path else "", "cast": found.said if found else "",
                "seeds": found.seeds if found else "",
                "evidence": path.relative_to(ROOT).as_posix() if path else "",
                "sign": STATUSES[outcome], "status": outcome, "why": why,
            })  # fmt: skip
    return pd.DataFrame(rows)


def _profile(path: Path) -> str:
    return json.loads(path.open(encoding="utf-8").readline())["spec"]["profile"]


def write(path: Path | None = None) -> Path:
    """The ledger as CSV, `book/ledger.csv` unless named; left alone if nothing has changed."""
    path = path or ROOT / "book" / "ledger.csv"
    text = frame().to_csv(index=False)
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        write_text(path, text)
    return path


# ------------------------------------------------------------------------------- the page


def counts() -> pd.DataFrame:
    """How many entries of each kind (rows) have each status (columns)."""
    df = frame()
    found = pd.crosstab(df["kind"], df["status"])
    found = found.reindex(index=list(KINDS), columns=list(STATUSES), fill_value=0)
    return found.loc[:, found.sum() > 0].rename(index=KINDS)


def summary() -> Figure:
    """The figure that sums the ledger up: entries by kind and status."""
    return audit.statuses(counts(), STATUSES)


def show_on_front_page() -> Path:
    """Save the summary where the book's introduction looks for it."""
    return figures.save(summary(), ROOT / "book" / "_static" / "ledger.svg")


def _link(text: str, target: Path | None) -> str:
    """A Markdown link relative to `book/`, which the book, Jupyter and code hosts all follow."""
    return f"[{text}]({target.relative_to(ROOT / 'book').as_posix()})" if target else text


def page(kind: str, statuses: list[str]) -> pd.DataFrame:
    """What the page shows of a kind: entry, published, recomputed, measured, status (with reason)."""
    df = frame()
    df = df[(df["kind"] == kind) & df["status"].isin(statuses)]
    rows = []
    for r in df.itertuples():
        measured = f"{r.measured} ({r.profile}, seeds: {r.seeds})" if r.measured else "–"
        said = f"{r.sign} {r.status}" + (f": {r.why}" if r.why else "")
        rows.append({
            "status": said, "entry": _link(r.entry, chapter_file(r.chapter) if r.chapter else None),
            "published": r.published, "recomputed": r.recomputed, "measured": measured,
        })  # fmt: skip
    return pd.DataFrame(rows, columns=["status", "entry", "published", "recomputed", "measured"])


def trail(statuses: list[str]) -> pd.DataFrame:
    """How each entry was judged: entry, criterion, verdict, measured with, evidence (links)."""
    df = frame()
    df = df[df["status"].isin(statuses)]
    rows = []
    for r in df.itertuples():
        files = [ROOT / r.evidence] if r.evidence else []
        if files and (numbers := files[0].with_suffix(".json")).exists():
            files.append(numbers)
        rows.append({
            "entry": r.entry, "criterion": r.criterion,
            "verdict": f"{r.outcome}. {r.verdict}" if r.verdict else "–",
            "measured with": r.cast or "–",
            "evidence": ", ".join(_link(f.name, f) for f in files) or "–",
        })  # fmt: skip
    return pd.DataFrame(
        rows, columns=["entry", "criterion", "verdict", "measured with", "evidence"]
    )


def facts() -> dict[str, object]:
    """For a run line: how much the ledger rests on."""
    df = frame()
    files = sorted(set(df["evidence"]) - {""})
    runs = sum(len(plans.committed(Path(f).stem).records) for f in files)
    return {
        "entries": len(df), "claims recomputed": len(audit.PROCEDURES),
        "committed runs": f"{runs} in {len(files)} files of book/results",
    }  # fmt: skip
