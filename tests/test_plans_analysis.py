"""The chapter on analyses: which runs it makes, what is probed, and what is committed."""

from __future__ import annotations

import pandas as pd
import pytest
from looked import everything, numbers

from armada_lib import frames, plans, profiles, report, runs, specs, tasks, teachers
from armada_lib.gentasks import SUITES
from armada_lib.methods import METHODS
from armada_lib.profiles import Unknown


def given(**changed):
    base = dict.fromkeys(plans.ANALYSIS_PARAMETERS, "auto")
    return base | {"profile": "smoke", "teacher": "sd14", "workers": None, "keep": ""} | changed


@pytest.fixture(autouse=True)
def no_work(monkeypatch):
    for module, name in ((runs, "compute"), (teachers, "load")):
        monkeypatch.setattr(module, name, lambda *a, **k: pytest.fail("work was started"))


def test_auto_is_the_profiles_choice():
    plan, block = plans.analysis(given()), profiles.load("smoke").analysis
    assert list(dict.fromkeys(s.task for s in plan.specs)) == block.tasks
    assert plan.students == [block.student, block.generator] and plan.main == block.main
    assert len({s.key for s in plan.specs}) == len(plan.specs)
    assert {s.key for s in plan.probed} <= {s.key for s in plan.specs}
    assert not [s for s in plan.probed if s.training.noise or s.task in SUITES]
    for task in ("cola", "copa"):
        own = [s for s in plan.probed if s.task == task]
        assert {s.method for s in own} == set(block.methods)
        for method in ("armada", "frozen_aligner"):  # every loss, as Table 15 has it
            assert {s.manifold for s in own if s.method == method} == set(block.manifolds)
        assert {s.manifold for s in own if s.method == "shuffled"} == {block.main}
        levels = {
            (s.method, s.training.noise) for s in plan.specs if s.task == task and s.training.noise
        }
        assert levels == {(m, x) for m in block.noisy for x in block.sigmas if x}
    written = {(s.method, s.training.noise) for s in plan.specs if s.task == "dolly"}
    assert written == {("undistilled", 0), ("shuffled", 0), *(("armada", x) for x in block.sigmas)}


@pytest.mark.parametrize("name", profiles.names())
def test_the_names_of_every_profile_exist(name):
    p = profiles.load(name)
    block = p.analysis
    assert p.student(block.generator).lora and not p.student(block.student).lora
    assert set(block.tasks) <= {*tasks.TASKS, *SUITES} and block.main in block.manifolds
    assert {"undistilled", "armada"} <= set(block.methods) <= set(METHODS)
    assert set(block.noisy) <= set(block.methods) and 0 in block.sigmas
    assert {"shuffled", "random", "frozen_aligner"} <= set(block.methods)  # what the verdict asks


def test_parameters_choose_tasks_students_losses_and_seeds():
    plan = plans.analysis(given(tasks="cola,dolly", manifold="cosine,elementwise", seeds=[3, 4],
                                student="bert-6l"))  # fmt: skip
    assert plan.main == "cosine" and {s.seed for s in plan.specs} == {3, 4}
    assert plan.students == ["bert-6l", "llama-3.2-3b"]
    assert {s.manifold for s in plan.specs} == {None, "cosine", "elementwise"}
    both = plans.analysis(given(student="bert-6l,llama-3.1-8b"))
    assert both.students == ["bert-6l", "llama-3.1-8b"]


def test_a_regression_task_is_run_and_not_probed():
    plan = plans.analysis(given(tasks="cola,stsb", seeds="0"))
    assert {s.task for s in plan.probed} == {"cola"}
    assert {"armada", "undistilled"} <= {s.method for s in plan.specs if s.task == "stsb"}


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"taecher": "sd14"}, "unknown parameter 'taecher'; did you mean 'teacher'"),
        ({"profile": "minni"}, "unknown profile 'minni'; did you mean 'mini'"),
        ({"tasks": "colla"}, "unknown task or suite 'colla'; did you mean 'cola'"),
        ({"tasks": "mmimdb"}, "unknown task or suite 'mmimdb'"),
        ({"manifold": "cos"}, "unknown manifold loss 'cos'"),
        ({"student": "bert"}, "unknown student"),
        ({"teacher": "sd15"}, "unknown teacher"),
        ({"seeds": "x"}, "seeds must be whole numbers"),
        ({"tasks": "stsb,dolly"}, "none of these tasks has classes to look at: add one of cola"),
    ],
)
def test_bad_parameters_stop_before_any_work(changed, message):
    with pytest.raises((Unknown, ValueError), match=message):
        plans.analysis(given(**changed))


def test_noise_belongs_to_runs_that_read_vectors():
    make = lambda method, **kw: specs.spec("smoke", "cola", method, **kw)
    assert make("undistilled", noise=2.0).key == make("undistilled").key
    assert make("armada", noise=2.0).key != make("armada").key == make("armada", noise=0.0).key
    with pytest.raises(ValueError, match="reading 'released' does not have; use reading 'paper'"):
        make("armada", reading="released", noise=1.0)
    with pytest.raises(ValueError, match="noise"):
        make("armada", noise=-1.0)


def test_committed_numbers_are_read_back_or_are_none(tmp_path, monkeypatch):
    monkeypatch.setattr(plans.evidence, "folder", lambda: tmp_path)
    assert plans.analysed("x") is None
    one = {"seeds": (0,), "tasks": ("cola",)}
    found, results = numbers(**one), everything(**one)[1]
    plans.keep_analysis(results, found, "x")
    evidence, frames = plans.analysed("x")
    assert len(evidence.records) == len(results) and frames.keys() == found.keys()
    assert len(frames["alignment"]) == len(found["alignment"])
    first = (tmp_path / "x.json").read_bytes()
    plans.keep_analysis(results, found, "x")
    assert (tmp_path / "x.json").read_bytes() == first


def test_tasks_are_kept_one_after_another(tmp_path, monkeypatch):
    monkeypatch.setattr(plans.evidence, "folder", lambda: tmp_path)

    def keep(*seeds, task):
        one = {"seeds": seeds, "tasks": (task,)}
        plans.keep_analysis(everything(**one)[1], numbers(**one), "x")
        runs, found = plans.analysed("x")
        there = {(r["spec"].task, r["spec"].seed) for r in runs.records}
        said = {(report.title(t), s) for t, s in there}
        for name, frame in found.items():
            if "seed" in frame:  # examples are of one seed
                shown = set(zip(frame["task"], frame["seed"], strict=True))
                assert shown <= said if name == "examples" else shown == said, name
        return there, found

    one = keep(0, 1, task="cola")[1]
    both, merged = keep(0, 1, task="copa")
    assert both == {("cola", 0), ("cola", 1), ("copa", 0), ("copa", 1)}
    for name, frame in one.items():
        pd.testing.assert_frame_equal(frame, merged[name].iloc[: len(frame)], check_dtype=False)
    assert list(merged["maps"]["task"].unique()) == ["CoLA", "COPA"]
    # the runs and numbers of a task are replaced together, those of others stay
    assert keep(2, task="cola")[0] == {("cola", 2), ("copa", 0), ("copa", 1)}


def test_frames_without_rows_are_merged():
    """Where two students are right on the same examples there is none of a scenario to show."""
    about, none = pd.DataFrame([{"main": "euclid"}]), pd.DataFrame([])
    one = lambda task: {"about": about, "examples": pd.DataFrame([{"task": task, "seed": 0}])}
    empty = {"about": about, "examples": none}
    assert frames.merge(one("CoLA"), empty)["examples"]["task"].tolist() == ["CoLA"]
    assert frames.merge(empty, one("COPA"))["examples"]["task"].tolist() == ["COPA"]
    assert frames.merge(one("CoLA"), one("COPA"))["examples"]["task"].tolist() == ["CoLA", "COPA"]
    assert frames.merge(empty, empty)["examples"].empty


def test_numbers_of_another_main_loss_are_not_mixed_in(tmp_path, monkeypatch):
    monkeypatch.setattr(plans.evidence, "folder", lambda: tmp_path)
    one = {"seeds": (0,), "tasks": ("cola",)}
    results, found = everything(**one)[1], numbers(**one)
    plans.keep_analysis(results, found, "x")
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    other = found | {"about": pd.DataFrame([{"main": "cosine"}])}
    with pytest.raises(ValueError, match="about: .*euclid.* and .*cosine.* do not go together"):
        plans.keep_analysis(results, other, "x")
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
