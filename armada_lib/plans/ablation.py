"""The chapter on ablations: crossed weights, manifold losses, and one change at a time."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pandas as pd

from armada_lib import ablation as ablations
from armada_lib import gentasks, guard, profiles, report, run_data, specs
from armada_lib.plans.common import Plan, profile_of, seeds_of, several
from armada_lib.plans.evidence import Evidence, committed, folder
from armada_lib.profiles import MANIFOLDS, Profile
from armada_lib.results import RunSpec, RunStore

ABLATION_PARAMETERS = (
    "profile", "teacher", "student", "parts", "tasks", "factors", "manifold", "alphas", "betas",
    "gammas", "seeds", "workers", "keep",
)  # fmt: skip
# Figures 3 and 4 and one change at a time on language understanding; 5 and 6 on instructions.
PARTS = ("figure3", "figure4", "factors", "figure5", "figure6")


@dataclass(frozen=True)
class Ablation(Plan):
    """What half of the chapter will run: its `parts`, and the `levels` of weights and losses crossed."""

    parts: list[str]
    levels: dict[str, list[Any]]

    @property
    def base(self) -> dict[str, Any]:
        """For a run line: the setting from which single changes are counted."""
        one = next(s for s in self.specs if s.method == "armada" and not ablations.changes(s))
        sizes = {s.training.batch_size for s in self.specs if not ablations.changes(s)}
        # a student that generates has no logits to match
        heard = [w for w in ablations.SIGN if w != "alpha" or one.task not in gentasks.SUITES]
        weights = {ablations.SIGN[w]: f"{getattr(one, w):g}" for w in heard}
        name = f"ARMADA, {report.LOSS[one.manifold or '']} loss, the {one.reading}'s reading"
        return {"base": name, **weights, "batch size": sorted(sizes)}


@dataclass(frozen=True)
class Ablated(Evidence):
    """Committed runs of half of the chapter, with the levels that their profile crosses."""

    @cached_property
    def frame(self) -> pd.DataFrame:
        return ablations.frame(self.records)

    @property
    def levels(self) -> dict[str, list[Any]]:
        one: RunSpec = self.records[0]["spec"]
        return _levels(profiles.load(one.profile), one.task in gentasks.SUITES)


def ablated(name: str) -> tuple[Ablated | None, Ablated | None]:
    """Evidence in `book/results/<name>.jsonl` on students that classify, and that generate.

    None for what has not been run yet, also where there is no such file.
    """
    records = committed(name).records if (folder() / f"{name}.jsonl").exists() else []
    halves = [[r for r in records if (r["spec"].task in gentasks.SUITES) == g] for g in (0, 1)]
    first, second = (Ablated(name, half) if half else None for half in halves)
    return first, second


def _levels(p: Profile, generates: bool) -> dict[str, list[Any]]:
    block = p.ablation
    if block is None:
        raise ValueError(f"profile {p.name!r} has no block 'ablation'")
    if not generates:
        return {"alpha": block.alphas, "beta": block.betas, "gamma": block.gammas,
                "manifold": block.grid}  # fmt: skip
    own = block.instruction
    return (
        {"beta": own.betas, "gamma": own.gammas, "manifold": [ablations.BASE["manifold"]]}
        if own
        else {}
    )


def ablation(ns: dict[str, Any]) -> tuple[Ablation, Ablation]:
    """Check the chapter's parameters and make its specs: on language understanding, on instructions.

    Specs come seed by seed, so that a study that was stopped has whole seeds.
    """
    got = guard.params(ns, ABLATION_PARAMETERS)
    name, p = profile_of(got)
    levels, block = _levels(p, False), p.ablation
    assert block is not None
    own = block.instruction
    parts = several(got["parts"], [x for x in PARTS if own or x not in PARTS[3:]], PARTS, "part")
    if own is None and set(parts) & set(PARTS[3:]):
        raise ValueError(f"profile {name!r} has no block 'instruction' in 'ablation'")
    factors = several(
        got["factors"], list(block.factors), block.factors, f"factor (profile {name})"
    )
    given = {k: _numbers(got[f"{k}s"], k) for k in ("alpha", "beta", "gamma")}
    manifolds = several(got["manifold"], block.manifolds, MANIFOLDS, "manifold loss")
    student = several(got["student"], [block.student], p.students, f"student (profile {name})")[0]
    p.teacher(got["teacher"])
    RunStore().check()

    levels |= {k: v for k, v in given.items() if v}
    seeds = seeds_of(got["seeds"], block.seeds)
    wanted = several(got["tasks"], block.tasks, run_data.tasks_of(p), "task")
    # the factors have tasks of their own, unless tasks are asked for
    apart = wanted if got["tasks"] != "auto" else block.factor_tasks
    common = {"student": student, "teacher": got["teacher"]}
    made: list[RunSpec] = []
    for seed in seeds:
        for task in wanted:
            one = _Maker(name, task, common | {"seed": seed})
            if "figure3" in parts:
                made += one.grid(levels)
            if "figure4" in parts:
                made += one.losses(manifolds)
        for task in apart:
            one = _Maker(name, task, common | {"seed": seed})
            made += (
                one.factors({f: block.factors[f] for f in factors}) if "factors" in parts else []
            )
    first = _plan(name, common, parts, levels, made)

    made, levels = [], {}
    if own is not None:
        levels = _levels(p, True) | {k: v for k, v in given.items() if v and k != "alpha"}
        common = {"student": own.student, "teacher": got["teacher"]}
        manifolds = several(got["manifold"], own.manifolds, MANIFOLDS, "manifold loss")
        for seed, suite in itertools.product(seeds_of(got["seeds"], own.seeds), own.suites):
            one = _Maker(name, suite, common | {"seed": seed})
            made += one.grid(levels) if "figure5" in parts else []
            made += one.losses(manifolds) if "figure6" in parts else []
    return first, _plan(name, common, parts, levels, made)


def _plan(
    name: str, common: dict[str, Any], parts: list[str], levels: dict[str, Any], made: list[RunSpec]
) -> Ablation:
    found = {s.key: s for s in made}
    return Ablation(
        name, [common["teacher"]], [common["student"]], list(found.values()), parts, levels
    )


def _numbers(value: Any, what: str) -> list[float]:
    """ "auto" -> nothing; "0,0.5" or [0, 0.5] -> that list; its bounds are those of `specs.spec`."""
    try:
        return [] if value == "auto" else [float(v) for v in several(value, [], what=f"{what}s")]
    except (TypeError, ValueError):
        raise ValueError(f"{what}s must be numbers such as 0,0.5; got {value!r}") from None


@dataclass(frozen=True)
class _Maker:
    """The specs of one task, student and seed."""

    profile: str
    task: str
    common: dict[str, Any]

    def make(self, method: str, **changed: Any) -> RunSpec:
        base = {"manifold": ablations.BASE["manifold"], "reading": ablations.BASE["reading"]}
        return specs.spec(self.profile, self.task, method, **(self.common | base | changed))

    def base(self) -> list[RunSpec]:
        return [self.make("undistilled"), self.make("armada"), self.make("shuffled")]

    def grid(self, levels: Mapping[str, Sequence[Any]]) -> list[RunSpec]:
        found = self.base()
        for values in itertools.product(*levels.values()):
            chosen = dict(zip(levels, values, strict=True))
            # with all weights 0 ARMADA is the undistilled student, which is in the base
            if any(v for k, v in chosen.items() if k != "manifold"):
                found.append(self.make("armada", **chosen))
        return found

    def losses(self, manifolds: Sequence[str]) -> list[RunSpec]:
        return [*self.base(), *(self.make("armada", manifold=m) for m in manifolds)]

    def factors(self, levels: Mapping[str, Sequence[Any]]) -> list[RunSpec]:
        return self.base() + [
            self.make(method, **ablations.overrides(factor, level))
            for factor, values in levels.items() for level in values
            for method in ablations.FACTORS[factor].methods
        ]  # fmt: skip
