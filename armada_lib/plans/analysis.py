"""The chapter on analyses: probed runs, runs with noise, and the numbers that are committed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from armada_lib import frames as frame_files
from armada_lib import gentasks, guard, profiles, run_data, specs
from armada_lib.analysis import analyse
from armada_lib.blocks import Analysis
from armada_lib.frames import Frames
from armada_lib.plans import evidence
from armada_lib.plans.common import (
    Plan,
    cast,
    played,
    profile_of,
    seeds_of,
    seeds_said,
    several,
)
from armada_lib.probes import Probe
from armada_lib.profiles import MANIFOLDS
from armada_lib.results import Result, RunSpec, RunStore

ANALYSIS_PARAMETERS = (
    "profile", "teacher", "student", "tasks", "manifold", "seeds", "workers", "keep",
)  # fmt: skip
LOSSES = ("armada", "frozen_aligner")  # methods run with every manifold loss


@dataclass(frozen=True)
class AnalysisPlan(Plan):
    """`probed`: the specs whose vectors are looked at. `main`: the loss of controls and noise."""

    probed: list[RunSpec]
    main: str

    @property
    def said(self) -> str:
        """Every student, then the teacher once."""
        p, seeds = profiles.load(self.profile), len({s.seed for s in self.specs})
        *others, last = self.students
        who = [*(played(p.student(s)) for s in others), cast(p, last, self.teachers)]
        return f"profile {self.profile}; {'; '.join(who)}; {seeds_said(seeds)}"

    def analyse(self, probes: Sequence[Probe], results: Sequence[Result]) -> Frames:
        """Every analysis of the chapter; see `analysis.analyse`."""
        return analyse(probes, results, self.main)


def analysis(ns: dict[str, Any]) -> AnalysisPlan:
    """Check the parameters of the chapter on analyses and make its specs; nothing is computed yet.

    `student`: one that classifies, one that generates, or both. `tasks` may hold suites of students
    that generate. Tasks with classes are probed; a regression task has neither right nor wrong, and
    only its scores and losses are used.
    """
    got = guard.params(ns, ANALYSIS_PARAMETERS)
    name, p = profile_of(got)
    block = p.analysis
    if block is None:
        raise ValueError(f"profile {name!r} has no block `analysis`")
    p.teacher(got["teacher"])
    students = several(got["student"], [block.student], p.students, f"student (profile {name})")
    able = [t for t in run_data.tasks_of(p) if run_data.task_of(p, t).kind != "multilabel"]
    wanted = several(got["tasks"], block.tasks, [*able, *gentasks.SUITES], "task or suite")
    manifolds = several(got["manifold"], block.manifolds, MANIFOLDS, "manifold loss")
    main = block.main if block.main in manifolds else manifolds[0]
    generates = {s: p.student(s).lora is not None for s in students}
    who = next((s for s in students if not generates[s]), block.student)
    writer = next((s for s in students if generates[s]), block.generator)
    RunStore().check()
    probed: list[RunSpec] = []
    others: list[RunSpec] = []
    for task in wanted:
        generating = task in gentasks.SUITES
        usual = block.generation_seeds if generating else block.seeds
        for seed in seeds_of(got["seeds"], usual):
            common = {
                "student": writer if generating else who,
                "teacher": got["teacher"],
                "seed": seed,
            }
            if generating:
                others += _generating(name, block, task, main, common)
                continue
            plain = _plain(name, block, task, manifolds, main, common)
            regression = run_data.task_of(p, task).kind == "regression"
            (others if regression else probed).extend(plain)
            others += _noisy(name, block, task, block.noisy, main, common)
    if not probed:
        classes = [t for t in able if run_data.task_of(p, t).kind != "regression"]
        raise ValueError(
            f"none of these tasks has classes to look at: add one of {', '.join(classes)}"
        )
    used = [*dict.fromkeys(s.student for s in [*probed, *others])]
    found = {s.key: s for s in [*probed, *others]}
    looked = {s.key: s for s in probed}
    return AnalysisPlan(
        name, [got["teacher"]], used, list(found.values()), list(looked.values()), main
    )


def _plain(
    name: str, block: Analysis, task: str, manifolds: list[str], main: str, common: dict[str, Any]
) -> list[RunSpec]:
    """Every method without noise; those of `LOSSES` with every loss, the others with the main one."""
    return [
        specs.spec(name, task, method, manifold=loss, **common)
        for method in block.methods
        for loss in (manifolds if method in LOSSES else [main])
    ]


def _noisy(
    name: str, block: Analysis, task: str, methods: Sequence[str], main: str, common: dict[str, Any]
) -> list[RunSpec]:
    return [
        specs.spec(name, task, method, manifold=main, noise=sigma, **common)
        for method in methods for sigma in block.sigmas
    ]  # fmt: skip


def _generating(
    name: str, block: Analysis, task: str, main: str, common: dict[str, Any]
) -> list[RunSpec]:
    """Figure 12: ARMADA at every noise level; undistilled and the other noisy methods without noise."""
    still = ["undistilled", *(m for m in block.noisy if m != "armada")]
    return [
        *(specs.spec(name, task, m, manifold=main, **common) for m in still),
        *_noisy(name, block, task, ["armada"], main, common),
    ]


def keep_analysis(results: Sequence[Result], frames: Frames, name: str) -> Path:
    """Write runs to `book/results/<name>.jsonl` and their numbers to `book/results/<name>.json`.

    Tasks may come one after another: those of other tasks stay, and of these tasks nothing that was
    there before. ValueError, with nothing written, if the main loss is another one.
    """
    path = evidence.folder() / f"{name}.json"
    if path.exists():
        frames = frame_files.merge(frame_files.read(path), frames)
    evidence.keep(results, name, whole=True)
    return frame_files.write(frames, path)


def analysed(name: str) -> tuple[evidence.Evidence, Frames] | None:
    """Committed runs and numbers, or None where there are none yet."""
    path = evidence.folder() / f"{name}.json"
    if not path.exists():
        return None
    return evidence.committed(name), frame_files.read(path)
