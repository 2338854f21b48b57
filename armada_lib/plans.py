"""A chapter's parameters turned into runs, and the committed evidence read back."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from armada_lib import chapter, gentasks, profiles, report, results, specs, views
from armada_lib import tasks as task_table
from armada_lib.methods import METHODS
from armada_lib.profiles import MANIFOLDS, READINGS, Profile, StudentSpec, TeacherSpec, check
from armada_lib.results import Result, RunSpec, RunStore

NLU_PARAMETERS = (
    "profile", "teacher", "student", "tasks", "methods", "manifold", "reading", "seeds",
    "alpha", "beta", "gamma", "tau", "workers", "keep",
)  # fmt: skip


LOOKED_AT = ("cola", "stsb", "mnli", "qqp", "copa")  # tasks with short sentences


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


def _mentors(found: Iterable[RunSpec]) -> list[str]:
    """The language models that some of these runs learn from."""
    return list(dict.fromkeys(s.mentor for s in found if s.mentor))


def _seeds(n: int) -> str:
    return f"{n} seed" if n == 1 else f"{n} seeds"


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
        return _mentors(self.specs)

    @property
    def said(self) -> str:
        p = profiles.load(self.profile)
        who = " | ".join(cast(p, s, self.teachers, self.mentors) for s in self.students)
        return f"profile {self.profile}; {who}; {_seeds(len({s.seed for s in self.specs}))}"

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
            "seeds": sorted({s.seed for s in self.specs}),
            "precision": sorted({s.training.precision for s in self.specs}),
            "runs": f"{len(self.specs)}, {stored} stored" if stored else len(self.specs),
        })  # fmt: skip

    def published(self, number: int) -> pd.DataFrame:
        """Table `number` of the paper, with Table 3 for the large GLUE tasks."""
        frames = [chapter.published(number)] + ([chapter.published(3)] if number == 2 else [])
        return pd.concat(frames, ignore_index=True)


def _profile(got: dict[str, Any]) -> tuple[str, Profile]:
    name = profiles.default() if got["profile"] == "auto" else got["profile"]
    return name, profiles.load(name)


def _methods(value: Any, usual: Sequence[str]) -> list[str]:
    chosen = several(value, usual, METHODS, "method")
    # a gain needs what it is a gain over
    return chosen if "undistilled" in chosen else ["undistilled", *chosen]


def _numbers(value: Any, usual: Sequence[int]) -> list[int]:
    seeds = several(value, usual)
    if bad := [s for s in seeds if not str(s).isdigit()]:
        raise ValueError(f"seeds must be whole numbers of 0 or more, such as 0,1,2; got {bad}")
    return [int(s) for s in seeds]


def nlu(ns: dict[str, Any]) -> Plan:
    """Check the NLU chapter's parameters and make its specs; nothing is computed yet.

    Raises one clear error for an unknown parameter or name, a weight out of range, data or
    checkpoints that are missing, and a store that cannot be written to.
    """
    got = chapter.params(ns, NLU_PARAMETERS)
    name, p = _profile(got)
    p.teacher(got["teacher"])
    students = several(got["student"], [p.nlu.student], p.students, f"student (profile {name})")
    wanted = several(got["tasks"], p.nlu.tasks, task_table.TASKS, "task")
    methods = _methods(got["methods"], p.nlu.methods)
    manifolds = several(got["manifold"], p.nlu.manifolds, MANIFOLDS, "manifold loss")
    readings = several(got["reading"], p.nlu.readings, READINGS, "reading")
    seeds = _numbers(got["seeds"], p.nlu.seeds)
    weights = {k: got[k] for k in ("alpha", "beta", "gamma", "tau")}
    RunStore().check()
    planned = [
        s for student in students
        for s in specs.grid(name, wanted, methods, manifolds, readings, seeds,
                           student=student, teacher=got["teacher"], **weights)
    ]  # fmt: skip
    return Plan(name, [got["teacher"]], students, planned)


TUNING_PARAMETERS = (
    "profile", "teachers", "student", "suites", "methods", "manifold", "seeds", "protocol",
    "train_size", "test_size", "beta", "gamma", "workers", "keep",
)  # fmt: skip


def tuning(ns: dict[str, Any], block: str) -> Plan:
    """Check the parameters of a chapter on students that generate and make its specs.

    `block`: "reasoning" or "instruction", the part of the profile that says what "auto" means.
    """
    got = chapter.params(ns, TUNING_PARAMETERS)
    name, p = _profile(got)
    usual = getattr(p, block)
    if usual is None:
        raise ValueError(f"profile {name!r} has no block {block!r}")
    able = [n for n, s in p.students.items() if s.lora]
    student = several(got["student"], [usual.student], able, f"student that generates ({name})")[0]
    teachers = several(got["teachers"], usual.teachers, p.teachers, f"teacher (profile {name})")
    suites = [s for s in gentasks.SUITES if block.startswith(gentasks.TASKS[s].group)]
    chosen = several(got["suites"], usual.suites, suites, f"suite of {block}")
    methods = _methods(got["methods"], usual.methods)
    manifolds = several(got["manifold"], usual.manifolds, MANIFOLDS, "manifold loss")
    seeds = _numbers(got["seeds"], usual.seeds)
    RunStore().check()
    given = {k: got[k] for k in ("protocol", "train_size", "test_size", "beta", "gamma")}
    found = {
        s.key: s for teacher in teachers
        for s in specs.grid(name, chosen, methods, manifolds, ("paper",), seeds,
                            student=student, teacher=teacher, **given)
    }  # fmt: skip
    return Plan(name, teachers, [student], list(found.values()))


BASELINE_PARAMETERS = (
    "profile", "teacher", "student", "mentor", "tasks", "methods", "manifold", "seeds", "workers", "keep",
)  # fmt: skip


def baselines(ns: dict[str, Any]) -> Plan:
    """Check the parameters of the chapter on baselines and make its specs: one student, one budget."""
    got = chapter.params(ns, BASELINE_PARAMETERS)
    name, p = _profile(got)
    block = specs.baselines(p)
    student = several(got["student"], [block.student], p.students, f"student (profile {name})")[0]
    mentor = several(got["mentor"], [block.mentor], p.students, f"mentor (profile {name})")[0]
    wanted = several(got["tasks"], block.tasks, task_table.TASKS, "task")
    methods = _methods(got["methods"], block.methods)
    manifold = check(got["manifold"], MANIFOLDS, "manifold loss")
    seeds = _numbers(got["seeds"], block.seeds)
    p.teacher(got["teacher"])
    RunStore().check()
    found: dict[str, RunSpec] = {}
    for task, seed, method in itertools.product(wanted, seeds, methods):
        s = specs.spec(name, task, method, student, got["teacher"], manifold, seed=seed,
                       mentor=mentor)  # fmt: skip
        found.setdefault(s.key, s)
    return Plan(name, [got["teacher"]], [student], list(found.values()))


TEACHER_PARAMETERS = ("profile", "teachers", "tasks", "workers")


@dataclass(frozen=True)
class Looks:
    """What the page on teachers shows: whose work, and for which sentences."""

    profile: str
    teachers: list[str]
    texts: list[str]

    @property
    def visible(self) -> list[str]:
        """The teachers that make something to look at."""
        p = profiles.load(self.profile)
        return [t for t in self.teachers if p.teacher(t).kind in views.SHOW]

    def run_line(self) -> None:
        """Show who plays whom."""
        p = profiles.load(self.profile)
        chapter.run_line({
            "profile": f"{self.profile} ({p.about})",
            **{t: played(p.teacher(t)) for t in self.teachers},
        })  # fmt: skip


def looks(ns: dict[str, Any]) -> Looks:
    """Check the parameters of the page on teachers; nothing is computed yet."""
    got = chapter.params(ns, TEACHER_PARAMETERS)
    name, p = _profile(got)
    chosen = several(got["teachers"], list(p.teachers), p.teachers, f"teacher (profile {name})")
    wanted = several(got["tasks"], LOOKED_AT, task_table.TASKS, "task")
    RunStore().check()
    return Looks(name, chosen, views.sentences(name, wanted))


# -- committed evidence ------------------------------------------------------------------------


def folder() -> Path:
    """Where evidence is committed."""
    return profiles.ROOT / "book" / "results"


def keep(found: Iterable[Result], name: str) -> Path:
    """Add Results to `book/results/<name>.jsonl`, one line a run; a run already there is replaced."""
    path = folder() / f"{name}.jsonl"
    old = {r["key"]: r for r in results.read(path)} if path.exists() else {}
    results.export([*old.values(), *found], path)
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

    @property
    def said(self) -> str:
        one: RunSpec = self.records[0]["spec"]
        # by arm: a task's seeds are no seeds of an arm that has run with one of them
        counts = report.arms(self.frame).groupby(["task", "arm"])["seed"].nunique()
        seeds = (
            _seeds(counts.max())
            if counts.min() == counts.max()
            else f"{counts.min()} to {_seeds(counts.max())}"
        )
        mentors = _mentors(r["spec"] for r in self.records)
        who = cast(profiles.load(one.profile), one.student, self.teachers, mentors)
        return f"profile {one.profile}; {who}; {seeds}"

    @property
    def facts(self) -> dict[str, Any]:
        """For a run line: what was run, on what, at which cost."""
        done = [r["spec"] for r in self.records]
        seconds = sum(r["facts"]["seconds"] for r in self.records)
        return {
            "evidence": f"book/results/{self.name}.jsonl",
            "runs": len(done),
            "tasks": list(dict.fromkeys(report.title(s.task) for s in done)),
            "seeds": sorted({s.seed for s in done}),
            "precision": sorted({s.training.precision for s in done}),
            "processor": sorted(
                {r["environment"]["gpu"] or r["environment"]["cpu"] for r in self.records}
            ),
            "torch": sorted({r["environment"]["torch"] for r in self.records}),
            "minutes": round(seconds / 60),
        }


def committed(name: str) -> Evidence:
    """Evidence in `book/results/<name>.jsonl`; `profiles.Unknown` lists what there is."""
    check(name, [p.stem for p in folder().glob("*.jsonl")], "evidence in book/results")
    return Evidence(name, results.read(folder() / f"{name}.jsonl"))
