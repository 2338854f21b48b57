"""Committed evidence: runs in `book/results/<name>.jsonl`, written and read back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from armada_lib import profiles, report, results
from armada_lib.plans.common import (
    cast,
    digest,
    mentors_of,
    played,
    processor,
    seeds_fact,
    seeds_said,
)
from armada_lib.profiles import check
from armada_lib.results import Result, RunSpec


def folder() -> Path:
    """Where evidence is committed."""
    return profiles.ROOT / "book" / "results"


def keep(found: Sequence[Result], name: str, whole: bool = False) -> Path:
    """Add Results to `book/results/<name>.jsonl`, one line a run; a run already there is replaced.

    `whole`: these are all runs of their tasks, and those that were there before are replaced.
    """
    path = folder() / f"{name}.jsonl"
    old = results.read(path) if path.exists() else []
    again = {r.spec.task for r in found} if whole else set()
    results.export([*(r for r in old if r["spec"].task not in again), *found], path)
    return path


@dataclass(frozen=True)
class Evidence:
    """Committed runs, as records and as the frame of `report.table`."""

    name: str
    records: list[dict[str, Any]]

    @cached_property
    def frame(self) -> pd.DataFrame:
        return report.table(self.records)

    @property
    def teachers(self) -> list[str]:
        """Whose vectors were used, in the profile's order."""
        used = {r["spec"].teacher for r in self.records}
        return [t for t in profiles.load(self.records[0]["spec"].profile).teachers if t in used]

    @cached_property
    def said(self) -> str:
        one: RunSpec = self.records[0]["spec"]
        # by arm: a task's seeds are no seeds of an arm that has run with one of them
        counts = report.arms(self.frame).groupby(["task", "arm"])["seed"].nunique()
        seeds = (
            seeds_said(counts.max())
            if counts.min() == counts.max()
            else f"{counts.min()} to {seeds_said(counts.max())}"
        )
        mentors = mentors_of(r["spec"] for r in self.records)
        p = profiles.load(one.profile)
        *others, last = dict.fromkeys(r["spec"].student for r in self.records)
        who = "; ".join(
            [*(played(p.student(s)) for s in others), cast(p, last, self.teachers, mentors)]
        )
        return f"profile {one.profile}; {who}; {seeds}"

    @property
    def facts(self) -> dict[str, Any]:
        """For a run line: what was run, on what, at which cost."""
        done = [r["spec"] for r in self.records]
        seconds = sum(r["facts"]["seconds"] for r in self.records)
        return {
            "evidence": f"book/results/{self.name}.jsonl",
            "runs": len(done),
            "digest of the runs": digest(done),
            "tasks": list(dict.fromkeys(report.title(s.task) for s in done)),
            **seeds_fact(s.seed for s in done),
            "precision": sorted({s.training.precision for s in done}),
            "processor": sorted({processor(r) for r in self.records}),
            "torch": sorted({r["environment"]["torch"] for r in self.records}),
            "minutes": round(seconds / 60),
        }


def committed(name: str) -> Evidence:
    """Evidence in `book/results/<name>.jsonl`; `profiles.Unknown` lists what there is."""
    check(name, [p.stem for p in folder().glob("*.jsonl")], "evidence in book/results")
    path = folder() / f"{name}.jsonl"
    return _read(path, path.stat().st_mtime_ns)


@cache  # the ledger asks for some files a dozen times
def _read(path: Path, changed: int) -> Evidence:
    return Evidence(path.stem, results.read(path))
