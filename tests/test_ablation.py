"""Ablations: every switch is a specification of its own and computes something else; pairs are right."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
import tiny
import torch
import yaml

from armada_lib import (
    ablation,
    gentasks,
    plans,
    profiles,
    runs,
    specs,
    stats,
    tasks,
    teachers,
)
from armada_lib.profiles import Training, Unknown
from armada_lib.results import RunSpec

LEVELS = {
    "alpha": [0.0], "beta": [1.0], "gamma": [0.0], "tau": [1.0], "manifold": ["cosine", "elementwise"],
    "reading": ["released"], "distance": ["squared", {"distance": "squared", "beta": 76.8}],
    "soft": ["kl", "squared", "frobenius", "mse"], "manifold_to": ["both"], "detach": [False],
    "aligner_pretrain": [1], "aligner": ["direct", "projected"], "projection": ["fixed", "free"],
    "batch_size": [4],
}  # fmt: skip
CHOICES = [(f, v) for f, values in LEVELS.items() for v in values]


def make(task: str = "cola", method: str = "armada", **changed) -> RunSpec:
    return specs.spec("tiny", task, method, **changed)


def test_every_factor_is_tested_here_and_is_an_argument_of_a_spec():
    assert set(LEVELS) == set(ablation.FACTORS)
    weights = {"alpha", "beta", "gamma", "tau", "manifold", "reading"}
    assert set(ablation.FACTORS) <= weights | set(Training.model_fields)


@pytest.mark.parametrize("factor, level", CHOICES, ids=str)
def test_every_switch_changes_the_specification_and_is_read_back_from_it(project, factor, level):
    changed = ablation.overrides(factor, level)
    base, other = make(), make(**changed)
    assert other.key != base.key and not ablation.changes(base)
    assert ablation.changes(other) == changed
    assert ablation._level(changed)[0] == factor
    assert ablation.changes(make(method="shuffled", **changed)) == changed


# projections are brought back every few steps, and this run has four
SHORT = {"epochs": 1, "retract_every": 1}


@pytest.fixture(scope="module")
def usual(checkpoints):
    return tiny.experiment(checkpoints["bert"], training=SHORT)[0]


@pytest.mark.parametrize("factor, level", CHOICES, ids=str)
def test_every_switch_changes_what_is_computed(checkpoints, usual, factor, level):
    changed = ablation.overrides(factor, level)
    training = {k: v for k, v in changed.items() if k in Training.model_fields}
    rest = {k: v for k, v in changed.items() if k not in training}
    other = tiny.experiment(checkpoints["bert"], training=SHORT | training, **rest)[0]
    a, b = (x.family.encoder(x.model) for x in (usual, other))
    moved = [not torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True)]
    assert any(moved)


def test_gamma_alone_hears_nothing_of_the_teacher(checkpoints):
    alone = dict(training=SHORT, alpha=0.0, beta=0.0, gamma=1.0)
    added = tiny.experiment(checkpoints["bert"], "layers_only", **alone)[0]
    student = tiny.experiment(checkpoints["bert"], **alone)[0]
    assert tiny.same(tiny.weights(added), tiny.weights(student))


def test_a_level_of_several_fields_may_add_weights_alone():
    assert ablation.overrides("soft", "kl") == {"soft": "kl"}
    for level in ({"beta": 1.0}, {"distance": "squared", "detach": False}):
        with pytest.raises(ValueError, match=r"a level of 'distance' may set 'distance' and"):
            ablation.overrides("distance", level)
    with pytest.raises(Unknown, match="'detatch'; did you mean 'detach'"):
        ablation.overrides("detatch", False)


def test_what_is_no_change(project):
    assert not ablation.changes(make(seed=4)) and not ablation.changes(make(method="undistilled"))
    assert ablation.changes(make(beta=0)) == {"beta": 0.0}  # no loss is left to differ in
    assert ablation.changes(make(beta=0, manifold="cosine")) == {"beta": 0.0}
    # the reading's own weights are its base
    assert profiles.load("tiny").armada["released"].of("euclid") != make().beta
    assert ablation.changes(make(reading="released")) == {"reading": "released"}
    assert ablation._level(ablation.changes(make(alpha=0, gamma=0))) == ("grid", "α = 0, γ = 0")
    squared = ablation.changes(make(distance="squared", beta=76.8))
    assert ablation._level(squared) == ("distance", "squared, β = 76.8")


def record(s: RunSpec, score: float, manifold: float = 2.0) -> dict:
    probes = [{"gradient": {"task": 4.0, "manifold": m}} for m in (manifold, 4 * manifold)]
    facts = {"behaviour": {"collapsed": False}, "evaluation": 9, "seconds": 1.0,
             "diagnostics": {"gradients": probes}}  # fmt: skip
    return {
        "spec": s,
        "metric": "mcc",
        "scores": {"student": score, "aligner": 0.0},
        "facts": facts,
    }


def study(gain: float = 0.0, over: float = 0.0, seeds: int = 3) -> list[dict]:
    """Base 50 + seed; detach=False adds `gain` + 0.1 seed; released beats its control by `over`."""
    found = []
    for task in ("cola", "copa"):
        for seed in range(seeds):
            b, own = 50 + seed + (task == "copa"), {"task": task, "seed": seed}
            found += [
                record(make(method="undistilled", **own), b - 1),
                record(make(**own), b),
                record(make(method="shuffled", **own), b + 0.2 * (-1) ** seed),
                record(make(detach=False, **own), b + gain + 0.1 * seed),
                record(make(reading="released", **own), b + 2),
                record(make(method="shuffled", reading="released", **own), b + 2 - over - 0.1 * seed),
            ]  # fmt: skip
    found += [record(make("cola", "undistilled", seed=s, batch_size=4), 40.0) for s in range(seeds)]
    found += [record(make("cola", seed=s, batch_size=4), 43.0 + s) for s in range(seeds)]
    return found


def test_differences_are_with_the_base_and_with_what_ran_under_the_same_setting(project):
    df = ablation.frame(study(gain=1.0, over=3.0))
    assert set(df["head"]) == {"student"} and len(df) == 6 * 6 + 2 * 3
    assert ablation.levels(df) == [("reading", "released"), ("detach", "no"), ("batch_size", "4")]
    found = (
        ablation.differences(df)
        .set_index(["factor", "level", "other", "seed"])["gain"]
        .sort_index()
    )
    assert found["detach", "no", "base"].to_numpy() == pytest.approx([1.0, 1.1, 1.2])
    assert found["detach", "no", "undistilled"].to_numpy() == pytest.approx([2.0, 2.1, 2.2])
    assert found["reading", "released", "shuffled"].to_numpy() == pytest.approx([3.0, 3.1, 3.2])
    # another batch size is another undistilled student
    assert found["batch_size", "4", "undistilled"].to_numpy() == pytest.approx([3.0, 4.0, 5.0])
    assert found["batch_size", "4", "base"].to_numpy() == pytest.approx([-7.0, -7.0, -7.0])
    assert found["base", "", "undistilled"].to_numpy() == pytest.approx([1.0] * 3)
    assert ("detach", "no", "shuffled") not in found.index.droplevel("seed")


def test_the_table_of_changes_says_what_the_runs_say(project):
    df = ablation.frame(study(gain=1.0, over=3.0))
    table = ablation.compare(df).set_index("change")
    row = table.loc[ablation.FACTORS["detach"].about + ": no"]
    t = stats.paired_t([1.0, 1.1, 1.2], [0, 0, 0])
    assert row["minus base"] == f"+1.1 [{t.low:+.1f}, {t.high:+.1f}]"
    assert row["over shuffled"] == "–" and row["point"] == "A10"
    assert row["pull"] == "0.5 to 2" and row["tasks × seeds"] == "2 × 3"
    # of three levels one test could be made: batch size and reading differ by the same in each seed
    assert row["p (Holm)"] == pytest.approx(min(1, 3 * t.p))
    assert table.loc["the base", "minus base"] == "–" and math.isnan(
        table.loc["the base", "p (Holm)"]
    )
    assert table.loc["batch size: 4", "tasks × seeds"] == "1 × 3"


def test_one_seed_has_no_interval(project):
    row = ablation.compare(ablation.frame(study(seeds=1))).iloc[1]
    assert (
        row["minus base"] == "+2.0"
        and math.isnan(row["p (Holm)"])
        and row["tasks × seeds"].endswith("× 1")
    )


@pytest.mark.parametrize(
    "over, seeds, outcome",
    [(3.0, 3, "reproduced"), (-3.0, 3, "not reproduced"), (0.0, 3, "not reproduced"),
     (3.0, 2, "undecided")],
)  # fmt: skip
def test_the_verdict_on_the_teacher_follows_its_criterion(project, over, seeds, outcome):
    got, text = ablation.needs_teacher(ablation.frame(study(over=over, seeds=seeds)))
    assert got == outcome, text
    assert ("reading of the paper: released." in text) == (outcome == "reproduced")


def test_runs_that_differ_in_something_else_are_not_averaged(project):
    a, b = make(), make(eval_size=10)
    assert ablation._level(ablation.changes(b)) == ("eval_size", "10")
    with pytest.raises(ValueError, match="differ in something else.*'cola', 0, 'armada', 'base'"):
        ablation.frame([record(a, 1.0), record(a.model_copy(update={"teacher_id": "x"}), 2.0)])


@pytest.mark.parametrize("name", ["cpu", "mini", "paper", "smoke"])
def test_every_profiles_block_names_what_exists(name):
    p = profiles.load(name)
    block, own = p.ablation, p.ablation.instruction
    assert {*block.tasks, *block.factor_tasks} <= set(tasks.TASKS)
    assert p.student(block.student).lora is None and p.student(own.student).lora
    assert set(own.suites) <= set(gentasks.SUITES)
    assert ablation.BASE["manifold"] in block.grid and set(block.grid) <= set(block.manifolds)
    # the base, from which single changes are counted, is a cell of both grids
    w = p.armada["paper"]
    assert w.alpha in block.alphas and w.gamma in {*block.gammas} & {*own.gammas}
    assert w.of(ablation.BASE["manifold"]) in {*block.betas} & {*own.betas}
    for factor, levels in block.factors.items():
        for level in levels:
            changed = ablation.overrides(factor, level)
            for task in block.factor_tasks:
                given = {k: v for k, v in changed.items() if k in Training.model_fields}
                usual = p.recipe(tasks.get(task).group, task, block.student)
                other = p.recipe(tasks.get(task).group, task, block.student, **given)
                assert other != usual or not given


# -- the plan -----------------------------------------------------------------------------------


def given(**changed):
    base = dict.fromkeys(plans.ABLATION_PARAMETERS, "auto") | {"workers": None, "keep": ""}
    return base | {"teacher": "sd14", "profile": "smoke"} | changed


@pytest.fixture
def no_work(monkeypatch):
    for module, name in ((runs, "compute"), (teachers, "load")):
        monkeypatch.setattr(module, name, lambda *a, **k: pytest.fail("work was started"))


def test_the_plan_is_the_profiles_block(no_work):
    plan, tuned = plans.ablation(given())
    block = profiles.load("smoke").ablation
    assert {s.task for s in plan.specs} == set(block.tasks) and plan.students == [block.student]
    assert {s.task for s in tuned.specs} == {"dolly"}
    keys = [s.key for s in (*plan.specs, *tuned.specs)]
    assert len(keys) == len(set(keys))
    found = {ablation._level(ablation.changes(s))[0] for s in plan.specs}
    assert found == {"base", "alpha", "beta", "gamma", "grid", "manifold", *block.factors}
    batch = [s for s in plan.specs if s.training.batch_size != 16]
    assert {s.method for s in batch} == {"undistilled", "armada"} and {s.task for s in batch} == {
        "cola"
    }
    released = {s.method for s in plan.specs if s.reading == "released"}
    assert released == {"armada", "shuffled"}
    assert "β" in plan.base and plan.base["batch size"] == [16]


def test_the_grid_holds_every_combination_and_the_undistilled_student_for_zero(no_work):
    plan, tuned = plans.ablation(given(parts="figure3,figure5", tasks="cola", betas=[0, 0.1, 1]))
    own = [s for s in plan.specs if s.method == "armada"]
    assert sorted((s.alpha, s.beta, s.gamma) for s in own) == sorted(
        (a, b, g) for a in (0, 0.5) for b in (0, 0.1, 1) for g in (0, 1) if a or b or g
    )
    assert sorted(s.method for s in plan.specs if s.method != "armada") == [
        "shuffled",
        "undistilled",
    ]
    assert sorted((s.beta, s.gamma) for s in tuned.specs if s.method == "armada") == [
        (0, 1), (0.1, 0), (0.1, 1), (1, 0), (1, 1)]  # fmt: skip


def test_parts_seeds_and_factors_can_be_chosen(no_work):
    plan, tuned = plans.ablation(
        given(parts="factors", factors="detach", seeds="3,5", tasks="stsb")
    )
    assert not tuned.specs and ablation.frame(runs.study(tuned.specs, workers=1)).empty
    assert [(s.seed, s.method, s.training.detach) for s in plan.specs] == [
        (seed, m, d) for seed in (3, 5)
        for m, d in (("undistilled", True), ("armada", True), ("shuffled", True), ("armada", False))
    ]  # fmt: skip
    losses = plans.ablation(given(parts=["figure4"], manifold="cosine"))[0]
    assert {s.manifold for s in losses.specs if s.method == "armada"} == {"euclid", "cosine"}


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"taecher": "sd14"}, "unknown parameter 'taecher'"),
        ({"profile": "minni"}, "did you mean 'mini'"),
        ({"parts": "figure7"}, "unknown part 'figure7'"),
        ({"factors": "detatch"}, "unknown factor .*did you mean 'detach'"),
        ({"factors": "soft"}, "unknown factor .profile smoke. 'soft'"),
        ({"alphas": "a"}, "alphas must be numbers such as 0,0.5; got 'a'"),
        ({"alphas": [0, 2]}, "alpha must be a finite number from 0 to 1"),
        ({"betas": []}, "betas must be numbers"),
        ({"seeds": "x"}, "seeds must be whole numbers"),
        ({"tasks": "colla"}, "did you mean 'cola'"),
        ({"teacher": "sd15"}, "unknown teacher"),
    ],
)
def test_bad_parameters_stop_before_any_work(no_work, changed, message):
    with pytest.raises(ValueError, match=message):
        plans.ablation(given(**changed))


def test_a_profile_without_the_block_says_so(project):
    raw = yaml.safe_load((profiles.folder() / "tiny.yaml").read_text())
    (profiles.folder() / "bare.yaml").write_text(yaml.safe_dump(raw | {"ablation": None}))
    with pytest.raises(ValueError, match="profile 'bare' has no block 'ablation'"):
        plans.ablation(given(profile="bare"))


def test_evidence_is_there_or_it_is_none(project, tmp_path, monkeypatch):
    for module in ("evidence", "ablation"):
        monkeypatch.setattr(sys.modules[f"armada_lib.plans.{module}"], "folder", lambda: tmp_path)
    assert plans.ablated("x") == (None, None)
    facts = {"behaviour": {"collapsed": False}, "evaluation": 2, "seconds": 60.0}
    env = {"gpu": None, "cpu": "c", "torch": "t"}
    result = lambda s, score: runs.Result(
        s, "mcc", {"student": score}, {"student": np.eye(2)}, np.arange(2), {}, facts, env)  # fmt: skip
    plans.keep([result(make(), 1.0), result(make(detach=False), 2.0)], "x")
    real, spoken = plans.ablated("x")
    assert spoken is None and real.said.startswith("profile tiny;")
    assert ablation.differences(real.frame)["gain"].tolist() == [1.0]
    assert real.levels["beta"] == profiles.load("tiny").ablation.betas
