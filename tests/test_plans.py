"""A chapter's parameters: names checked before any work, committed evidence read and merged."""

from __future__ import annotations

import numpy as np
import pytest
import yaml

from armada_lib import comparison, plans, profiles, results, runs, teachers
from armada_lib.methods import METHODS, TABLE_7, TABLE_8
from armada_lib.profiles import Unknown
from armada_lib.results import Result


def given(**changed):
    base = dict.fromkeys(plans.NLU_PARAMETERS)
    base |= dict.fromkeys(
        ("profile", "student", "tasks", "methods", "manifold", "reading", "seeds"), "auto"
    )
    return base | {"teacher": "sd14", "profile": "mini", "keep": ""} | changed


@pytest.fixture(autouse=True)
def no_work(monkeypatch):
    for module, name in ((runs, "compute"), (teachers, "load")):
        monkeypatch.setattr(module, name, lambda *a, **k: pytest.fail("work was started"))


def test_auto_is_the_profiles_choice():
    p = plans.nlu(given())
    nlu = profiles.load("mini").nlu
    assert p.profile == "mini" and p.students == [nlu.student]
    assert list(dict.fromkeys(s.task for s in p.specs)) == nlu.tasks
    assert {s.seed for s in p.specs} == set(nlu.seeds)
    assert {s.method for s in p.specs} == set(nlu.methods)


@pytest.mark.parametrize("value", ["cola,rte", ["cola", "rte"], "[cola, rte]", "['cola', 'rte']"])
def test_several_names_may_be_given_in_any_form(value):
    p = plans.nlu(given(tasks=value, seeds="[3]", methods="armada", manifold="cosine"))
    assert {s.task for s in p.specs} == {"cola", "rte"} and {s.seed for s in p.specs} == {3}
    assert {s.method for s in p.specs} == {"undistilled", "armada"}  # a gain needs its baseline


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"taecher": "sd14"}, "unknown parameter 'taecher'; did you mean 'teacher'"),
        ({"profile": "minni"}, "unknown profile 'minni'; did you mean 'mini'"),
        ({"teacher": "sd15"}, "unknown teacher .* 'sd15'"),
        ({"student": "bert"}, "unknown student .* 'bert'"),
        ({"tasks": "cola,colla"}, "unknown task 'colla'; did you mean 'cola'"),
        ({"methods": "amrada"}, "unknown method 'amrada'; did you mean 'armada'"),
        ({"manifold": "cos"}, "unknown manifold loss 'cos'"),
        ({"reading": "papers"}, "unknown reading 'papers'; did you mean 'paper'"),
        ({"seeds": "0,x"}, "seeds must be whole numbers"),
        ({"tasks": []}, "nothing is chosen"),
        ({"alpha": 2}, "alpha must be a finite number from 0 to 1"),
        ({"beta": -1}, "beta must be a finite number of 0 or more"),
        ({"gamma": float("inf")}, "gamma must be a finite number"),
        ({"tau": 0}, "tau must be a finite number above 0"),
    ],
)
def test_bad_parameters_stop_before_any_work(changed, message):
    with pytest.raises((Unknown, ValueError), match=message):
        plans.nlu(given(**changed))


def test_the_run_line_names_the_stand_ins(capsys):
    plans.nlu(given(tasks="cola", seeds="0")).run_line()
    shown = capsys.readouterr().out
    assert "BERT-6L (66M) played by MiniLM-L6" in shown
    assert "Stable Diffusion v1-4 (860M UNet) played by the project's own emoji painter" in shown


def test_evidence_is_merged_by_key_and_read_back(tmp_path, monkeypatch):
    import numpy as np

    monkeypatch.setattr(plans.evidence, "folder", lambda: tmp_path)
    spec = plans.nlu(given(tasks="cola", methods="undistilled", seeds="0,1")).specs
    facts = {"behaviour": {"collapsed": False}, "evaluation": 2, "seconds": 60.0}
    env = {"gpu": None, "cpu": "c", "torch": "t"}

    def result(s, score):
        return results.Result(
            s, "mcc", {"student": score}, {"student": np.eye(2)}, np.arange(2), {}, facts, env
        )

    plans.keep([result(spec[0], 1.0)], "x")
    plans.keep([result(spec[1], 2.0), result(spec[0], 3.0)], "x")
    e = plans.committed("x")
    assert sorted(e.frame["score"]) == [2.0, 3.0]
    assert e.facts["runs"] == 2 and e.facts["minutes"] == 2 and "2 seeds" in e.said
    both = [r["spec"] for r in e.records]
    assert e.facts["digest of the runs"] == plans.common.digest(both[::-1])
    assert e.facts["digest of the runs"] != plans.common.digest(both[:1])
    with pytest.raises(Unknown, match="'y'.*x"):
        plans.committed("y")
    text = (tmp_path / "x.jsonl").read_text()
    (tmp_path / "x.jsonl").write_text(text.replace('"seed": 0', '"seed": 5'))
    with pytest.raises(ValueError, match="line 1: the key does not belong"):
        plans.committed("x")


def test_the_baselines_share_student_data_and_budget():
    asked = dict(profile="smoke", teacher="sd14", student="auto", mentor="auto", tasks="cola",
                 methods="kd,pkd_skip,armada", manifold="cosine", seeds=[3], workers=None, keep="")  # fmt: skip
    plan, pictured = plans.baselines(dict(asked))
    assert pictured.specs == []  # no baseline of Table 8 was asked for
    assert [s.method for s in plan.specs] == ["undistilled", "kd", "pkd_skip", "armada"]
    for field in ("student", "student_id", "data_id", "training", "seed"):
        assert len({str(getattr(s, field)) for s in plan.specs}) == 1, field
    assert plan.mentors == ["bert-base"] and "mentor BERT-base (110M) played by" in plan.said
    assert plan.specs[-1].manifold == "cosine" and plan.specs[-1].mentor is None
    for change, message in (
        ({"methods": "kdd"}, "unknown method 'kdd'; did you mean 'kd'"),
        ({"mentor": "bert"}, "unknown mentor"),
        ({"manifold": "cosin"}, "did you mean 'cosine'"),
    ):
        with pytest.raises(ValueError, match=message):
            plans.baselines(asked | change)


def test_the_baselines_with_pictures_have_a_plan_of_their_own():
    asked = dict(profile="mini", teacher="sd14", student="auto", mentor="auto", tasks="qqp",
                 methods="auto", manifold="euclid", seeds="auto", workers=None, keep="")  # fmt: skip
    unimodal, pictured = plans.baselines(dict(asked))
    block = profiles.load("mini").baselines.multimodal
    assert [s.method for s in pictured.specs] == block.methods
    assert set(TABLE_8.values()) < {s.method for s in pictured.specs}
    assert not {s.method for s in pictured.specs} & {m for m in METHODS if METHODS[m].mentor}
    for field in ("student", "student_id", "data_id", "training", "seed"):
        assert len({str(getattr(s, field)) for s in pictured.specs}) == 1, field
    assert pictured.students == [block.student] != unimodal.students
    read = {s.method: s.teacher for s in pictured.specs}
    assert read["vilbert"] == read["visual_guidance"] == read["armada"] == "sd14"
    assert read["vid_voken_resnet"] == read["vidlankd_resnet"] == block.video
    assert read["vid_voken_clip"] == block.frames and read["x_adapter"] is None
    assert pictured.teachers == ["sd14", block.video, block.frames]


@pytest.mark.parametrize("methods, seven, eight", [
    ("ViLBERT,X-adapter", [], ["undistilled", "vilbert", "x_adapter"]),
    ("KD,VisualBERT,armada", ["undistilled", "kd", "armada"], ["undistilled", "visualbert", "armada"]),
    ("armada", ["undistilled", "armada"], []),
])  # fmt: skip
def test_named_baselines_go_to_their_own_table(methods, seven, eight):
    asked = dict(profile="smoke", teacher="sd14", student="auto", mentor="auto", tasks="cola",
                 methods=methods, manifold="euclid", seeds=[0], workers=None, keep="")  # fmt: skip
    found = plans.baselines(asked)
    assert [[s.method for s in p.specs] for p in found] == [seven, eight]


def test_every_printed_name_is_a_method_and_an_unknown_one_lists_all():
    printed = {**TABLE_7, **TABLE_8}
    assert plans.common.methods_of(",".join(printed), []) == ["undistilled", *printed.values()]
    with pytest.raises(Unknown, match="unknown method 'ViLBRT'") as e:
        plans.common.methods_of("ViLBRT", [])
    assert all(m in str(e.value) for m in METHODS)


@pytest.fixture
def gridded():
    """A profile whose baselines choose between two learning rates."""
    profiles.own().mkdir()
    block = {"student_lr": [1e-4, 3e-4]}
    raw = {"about": "two rates", "like": "smoke", "baselines": {"grid": block}}
    (profiles.own() / "gridded.yaml").write_text(yaml.safe_dump(raw))
    profiles.load.cache_clear()
    yield "gridded"
    profiles.load.cache_clear()


def test_every_method_chooses_from_the_same_grid_on_held_out_training_rows(gridded):
    asked = dict(profile=gridded, teacher="sd14", student="auto", mentor="auto", tasks="cola",
                 methods="kd,armada", manifold="cosine", seeds=[3, 4], workers=None, keep="")  # fmt: skip
    plan, pictured = plans.baselines(asked)
    assert pictured.tried == [] and plan.varied == ["student_lr"]
    assert len(plan.tried) == 3 * 2 and len(plan.specs) == 3 * 2
    assert {(s.training.split, s.seed) for s in plan.tried} == {("holdout", 3)}
    assert {s.training.split for s in plan.specs} == {"validation"}
    rates = {m: [s.training.student_lr for s in plan.tried if s.method == m]
             for m in ("undistilled", "kd", "armada")}  # fmt: skip
    assert set(map(tuple, rates.values())) == {(1e-4, 3e-4)}
    score = {"undistilled": (1.0, 1.0), "kd": (1.0, 2.0), "armada": (2.0, 1.0)}
    found = [
        Result(
            s, "mcc", {"student": score[s.method][s.training.student_lr > 2e-4]}, {}, np.zeros(2)
        )
        for s in plan.tried
    ]
    chosen = {(s.method, s.seed): s.training.student_lr for s in plan.chosen(found)}
    assert chosen == {
        ("undistilled", 3): 1e-4, ("undistilled", 4): 1e-4,  # the first of two equals
        ("kd", 3): 3e-4, ("kd", 4): 3e-4, ("armada", 3): 1e-4, ("armada", 4): 1e-4,
    }  # fmt: skip
    shown = comparison.choices(found, plan.varied)
    assert list(shown["method"]) == ["undistilled", "KD", "ARMADA cosine"]
    assert list(shown["student lr 0.0003"]) == [1.0, 2.0, 1.0]
    assert list(shown["chosen"]) == [f"student lr {x}" for x in ("0.0001", "0.0003", "0.0001")]


def test_a_grid_may_look_at_some_of_the_tasks(gridded):
    path = profiles.own() / "gridded.yaml"
    raw = yaml.safe_load(path.read_text())
    raw["baselines"]["grid_tasks"] = ["stsb"]
    path.write_text(yaml.safe_dump(raw))
    profiles.load.cache_clear()
    asked = dict(profile=gridded, teacher="sd14", student="auto", mentor="auto", tasks="cola,stsb",
                 methods="kd", manifold="cosine", seeds=[3], workers=None, keep="")  # fmt: skip
    plan, _ = plans.baselines(asked)
    assert {s.task for s in plan.tried} == {"stsb"} and len(plan.tried) == 4
    found = [
        Result(s, "pearson", {"student": float(n)}, {}, np.zeros(2))
        for n, s in enumerate(plan.tried)
    ]
    chosen = plan.chosen(found)
    assert {s.task for s in chosen} == {"cola", "stsb"} and len(chosen) == 4
    assert {s.training.student_lr for s in chosen} == {3e-4}


def test_without_a_grid_nothing_is_tried(gridded):
    asked = dict(profile="smoke", teacher="sd14", student="auto", mentor="auto", tasks="cola",
                 methods="kd", manifold="cosine", seeds=[3], workers=None, keep="")  # fmt: skip
    plan, _ = plans.baselines(asked)
    assert plan.tried == [] and plan.chosen([]) == plan.specs
    bad = profiles.own() / "gridded.yaml"
    bad.write_text(bad.read_text().replace("student_lr", "student_rate"))
    profiles.load.cache_clear()
    with pytest.raises(ValueError, match="unknown training setting 'student_rate'"):
        plans.baselines(asked | {"profile": gridded})
