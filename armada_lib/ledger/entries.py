"""The entries of the ledger: read from `book/ledger.yaml` and checked, every one of them."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError, field_validator

from armada_lib import audit, chapter, plans
from armada_lib.ledger.rules import RULES
from armada_lib.profiles import ROOT, check
from armada_lib.settings import Strict

# What the ledger says of an entry, with a sign: colour never carries the meaning alone.
STATUSES = {**chapter.OUTCOMES, "contradicts itself": "≠"}
KINDS = {
    "claim": "headline claims", "table": "tables", "figure": "figures", "proposition": "propositions",
}  # fmt: skip


class Measure(Strict):
    """Which committed runs say something, by which rule. The first evidence that is there counts."""

    rule: str
    evidence: list[str] = Field(min_length=1)
    options: dict[str, Any] = Field(default_factory=dict)

    @field_validator("evidence", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value


class Entry(Strict):
    """One table, figure, proposition or headline claim of the paper.

    It is decided by `measure` (committed runs), by `own` (the paper's own numbers say all there is
    to say), or by `stated` with `why`. `why` also says why it was not attempted where runs are missing.
    """

    id: str = Field(pattern=r"^[a-z][a-z0-9-]*$")
    kind: Literal["claim", "table", "figure", "proposition"]
    title: str
    chapter: str
    claims: list[str] = Field(default_factory=list)
    published: str = ""
    criterion: str = ""
    measure: Measure | None = None
    own: bool = False
    stated: str = ""
    why: str = ""


class Book(Strict):
    """`awaited`: chapters and evidence that may not be there yet, by name."""

    awaited: list[str]
    entries: list[Entry] = Field(min_length=1)


def source() -> Path:
    """Where the entries stand."""
    return ROOT / "book" / "ledger.yaml"


def chapter_file(name: str) -> Path | None:
    """The notebook or page of a chapter, if there is one."""
    found = [ROOT / "book" / f"{name}{end}" for end in (".ipynb", ".md")]
    return next((p for p in found if p.exists()), None)


def evidence_file(names: Sequence[str]) -> Path | None:
    """The first of these files of runs that is committed."""
    found = [plans.folder() / f"{n}.jsonl" for n in names]
    return next((p for p in found if p.exists()), None)


def read(path: Path | None = None) -> Book:
    """All entries, checked; ValueError names the entry and what is wrong with it.

    Checked: known keys, ids used once, kinds, claims, chapters that exist, evidence that exists (or
    is awaited by name), rules and their options, statuses, and that something decides the entry.
    """
    path = path or source()
    raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    try:
        book = Book(**raw)
    except ValidationError as e:
        raise ValueError(f"{path.name}: {e}") from None
    seen: set[str] = set()
    for entry in book.entries:
        try:
            _checked(entry, set(book.awaited), seen)
        except ValueError as e:
            raise ValueError(f"{path.name}, entry {entry.id!r}: {e}") from None
    return book


def _checked(e: Entry, awaited: set[str], seen: set[str]) -> None:
    if e.id in seen:
        raise ValueError("the id is used twice")
    seen.add(e.id)
    for c in e.claims:
        check(c, audit.claims().index, "claim")
    if e.chapter not in awaited and chapter_file(e.chapter) is None:
        names = sorted(p.stem for p in (ROOT / "book").glob("*.ipynb"))
        check(e.chapter, [*names, *awaited], "chapter")
    if [bool(e.measure), e.own, bool(e.stated)].count(True) > 1:
        raise ValueError("only one of measure, own and stated may decide it")
    if e.measure:
        rule = RULES[check(e.measure.rule, RULES, "rule")]
        try:
            inspect.signature(rule.judge).bind("", **e.measure.options)
        except TypeError as wrong:
            raise ValueError(f"rule {e.measure.rule}: {wrong}") from None
        for name in e.measure.evidence:
            if evidence_file([name]) is None and name not in awaited:
                there = sorted(p.stem for p in plans.folder().glob("*.jsonl"))
                check(name, [*there, *awaited], "evidence in book/results")
        if e.criterion:
            raise ValueError("a rule has its own criterion")
        if not e.why:
            raise ValueError("where its runs are missing, it must say why it was not attempted")
    elif e.own:
        if not e.claims:
            raise ValueError("decided by the paper's own numbers, but no claim is named")
    elif e.stated:
        check(e.stated, STATUSES, "status")
        if not (e.why and e.criterion):
            raise ValueError("a stated status needs a criterion, and why")
    elif not e.why:
        raise ValueError("nothing decides it, and it does not say why it was not attempted")


@cache
def book() -> Book:
    """The project's own ledger."""
    return read()
