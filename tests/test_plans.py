"""A chapter's parameters: names checked before any work, committed evidence read and merged."""

from __future__ import annotations

import pytest

from armada_lib import plans, profiles, results, runs, teachers
from armada_lib.methods import METHODS, TABLE_7, TABLE_8
from armada_lib.profiles import Unknown


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
