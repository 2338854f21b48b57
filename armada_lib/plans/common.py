"""What every chapter's plan needs: parameters read and checked, and the `Plan` that comes out."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from armada_lib import chapter, gentasks, profiles, report
from armada_lib.methods import METHODS, TABLE_7, TABLE_8
from armada_lib.profiles import Profile, StudentSpec, TeacherSpec, check
from armada_lib.results import RunSpec, RunStore


def several(
    value: Any, otherwise: Sequence[Any], valid: Iterable[str] | None = None, what: str = ""
) -> list[Any]:
    """ "auto" -> the profile's list; "a,b" or [a, b] -> that list, each name checked."""
    if isinstance(value, str):
        value = (
            otherwise
            if value == "auto"
            else [v.strip(" \"'") for v in value.strip("[]").split(",") if v.strip()]
        )
    items = list(value) if isinstance(value, list | tuple) else [value]
    if not items:
        raise ValueError(f"{what}: nothing is chosen")
    return items if valid is None else [check(v, valid, what) for v in items]


def played(spec: StudentSpec | TeacherSpec) -> str:
    """What stands behind a name: "BERT-6L (66M) played by MiniLM-L6, 22.7M parameters"."""
    name = spec.stands_for or spec.name
    return f"{name} played by {spec.note}" if spec.note else f"{name} ({spec.checkpoint})"


def cast(
    profile: Profile, student: str, teachers: Iterable[str], mentors: Iterable[str] = ()
) -> str:
    """Who plays whom in a run: student, and teachers and mentors if there are any."""
    who = [played(profile.student(student)), *(played(profile.teacher(t)) for t in teachers)]
    return "; ".join([*who, *(f"mentor {played(profile.student(m))}" for m in mentors)])


def mentors_of(found: Iterable[RunSpec]) -> list[str]:
    """The language models that some of these runs learn from."""
    return list(dict.fromkeys(s.mentor for s in found if s.mentor))


def seeds_said(n: int) -> str:
    """ "1 seed", "3 seeds"."""
    return f"{n} seed" if n == 1 else f"{n} seeds"


def seeds_fact(seeds: Iterable[int]) -> dict[str, list[int]]:
    """The entry of a run line: "seed 0", "seeds 0, 1"."""
    found = sorted(set(seeds))
    return {"seed" if len(found) == 1 else "seeds": found}


def digest(found: Iterable[RunSpec]) -> str:
    """Eight digits over the keys of runs: pages that show the same ones show the same runs."""
    return hashlib.sha256("".join(sorted(s.key for s in found)).encode()).hexdigest()[:8]


@dataclass(frozen=True)
class Plan:
    """What a chapter will run: validated names and the complete specs."""

    profile: str
    teachers: list[str]
    students: list[str]
    specs: list[RunSpec]

    @property
    def mentors(self) -> list[str]:
        """The language models that some methods learn from."""
        return mentors_of(self.specs)

    @property
    def said(self) -> str:
        p = profiles.load(self.profile)
        who = " | ".join(cast(p, s, self.teachers, self.mentors) for s in self.students)
        return f"profile {self.profile}; {who}; {seeds_said(len({s.seed for s in self.specs}))}"

    @property
    def absent(self) -> list[str]:
        """Test sets of the paper whose data are not here."""
        data = profiles.load(self.profile).data
        suites = dict.fromkeys(s.task for s in self.specs if s.task in gentasks.SUITES)
        return [
            report.title(t) for suite in suites for t in gentasks.TASKS[suite].tests
            if t not in gentasks.available(suite, data)
        ]  # fmt: skip

    def run_line(self, store: RunStore | None = None) -> None:
        """Show what will run and how much of it is stored already."""
        store = store or RunStore()
        p, stored = profiles.load(self.profile), sum(s in store for s in self.specs)
        chapter.run_line({
            "profile": f"{self.profile} ({p.about})",
            "student": [played(p.student(s)) for s in self.students],
            "teacher": [played(p.teacher(t)) for t in self.teachers],
            "mentor": [played(p.student(m)) for m in self.mentors] or None,
            "tasks": list(dict.fromkeys(report.title(s.task) for s in self.specs)),
            "test sets not at hand": self.absent or None,
            **seeds_fact(s.seed for s in self.specs),
            "precision": sorted({s.training.precision for s in self.specs}),
            "runs": f"{len(self.specs)}, {stored} stored" if stored else len(self.specs),
            "digest of the runs": digest(self.specs),
        })  # fmt: skip

    def published(self, number: int) -> pd.DataFrame:
        """Table `number` of the paper, with Table 3 for the large GLUE tasks."""
        frames = [chapter.published(number)] + ([chapter.published(3)] if number == 2 else [])
        return pd.concat(frames, ignore_index=True)


def processor(record: dict[str, Any]) -> str:
    """What computed a record of `results.read`, and whether its bf16 was that of `autocast`."""
    about = record["environment"]
    bf16 = record["spec"].training.precision == "bf16" and not about["gpu"]
    # earlier records do not say it: theirs had the instructions
    without = bf16 and not about.get("bf16", True)
    return (about["gpu"] or about["cpu"]) + (" (bf16 from fp32 products)" if without else "")


def profile_of(got: dict[str, Any]) -> tuple[str, Profile]:
    """(name, profile) of a chapter\'s parameters; "auto" is the machine\'s default."""
    name = profiles.default() if got["profile"] == "auto" else got["profile"]
    return name, profiles.load(name)


def methods_of(value: Any, usual: Sequence[str]) -> list[str]:
    """The chosen methods, with `undistilled` among them; a name of Table 7 or 8 means its method."""
    printed = TABLE_7 | TABLE_8
    chosen = [check(printed.get(m, m), METHODS, "method") for m in several(value, usual)]
    # a gain needs what it is a gain over
    return chosen if "undistilled" in chosen else ["undistilled", *chosen]


def seeds_of(value: Any, usual: Sequence[int]) -> list[int]:
    """The chosen seeds; ValueError if one is no whole number of 0 or more."""
    seeds = several(value, usual)
    if bad := [s for s in seeds if not str(s).isdigit()]:
        raise ValueError(f"seeds must be whole numbers of 0 or more, such as 0,1,2; got {bad}")
    return [int(s) for s in seeds]
