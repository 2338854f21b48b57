"""The chapter on the method: its plan, the source it shows, and the heads of its trained pairs."""

from __future__ import annotations

import numpy as np
import pytest

from armada_lib import chapter, losses, plans, probes, profiles, specs, transfer
from armada_lib.methods import Armada
from armada_lib.profiles import Unknown


def given(**changed):
    return {"profile": "mini", "teacher": "sd14", "seed": 0, "workers": None} | changed


def test_the_pairs_differ_in_the_manifold_loss_alone():
    plan = plans.method(given(seed=3))
    assert plan.titles[0] == "no manifold loss" and len(plan.titles) == len(plan.specs) == 6
    assert [s.manifold for s in plan.specs] == [
        None, "cosine", "euclid", "elementwise", "euclid", "elementwise",
    ]  # fmt: skip
    assert [s.training.distance for s in plan.specs] == [None] * 4 + ["squared"] * 2
    usual = profiles.load("mini").armada["paper"].of("euclid")
    assert [s.beta for s in plan.specs] == [0.0] + [usual] * 5
    assert {s.teacher for s in plan.specs} == {"sd14"} and plan.teachers == ["sd14"]
    assert {s.seed for s in plan.specs} == {3} and len({s.key for s in plan.specs}) == 6
    assert plan.batch == plan.specs[0].training.batch_size
    rest = lambda s: s.model_dump(exclude={"manifold", "beta", "training"})
    assert all(rest(s) == rest(plan.specs[0]) for s in plan.specs)


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"taecher": "sd14"}, "unknown parameter 'taecher'; did you mean 'teacher'"),
        ({"teacher": "sd15"}, "unknown teacher"),
        ({"profile": "minni"}, "unknown profile 'minni'; did you mean 'mini'"),
        ({"seed": "x"}, "seeds must be whole numbers"),
        ({"seed": [0, 1]}, "one seed"),
    ],
)
def test_bad_parameters_stop_before_any_work(changed, message):
    with pytest.raises(ValueError, match=message) as e:
        plans.method(given(**changed))
    assert ("unknown" not in message) or isinstance(e.value, Unknown)


def test_a_profile_without_classes_is_refused(monkeypatch):
    p = profiles.load("mini")
    scores = p.model_copy(update={"nlu": p.nlu.model_copy(update={"tasks": ["stsb"]})})
    monkeypatch.setattr(profiles, "load", lambda _: scores)
    with pytest.raises(ValueError, match="needs a task with classes, and profile mini has none"):
        plans.method(given())


def test_source_is_shown_as_it_stands(monkeypatch):
    shown = []
    monkeypatch.setattr(chapter, "display", lambda data, raw: shown.append(data))
    chapter.source(losses.euclid, Armada.losses)
    text = shown[0]["text/markdown"]
    assert "`armada_lib/losses.py`" in text and "`armada_lib/methods/armada.py`" in text
    assert "\ndef euclid(p_ts: Tensor" in text and "return _norm(a - b)" in text
    assert "\ndef losses(\n    self" in text  # a method starts at the margin
    assert "&lt;" not in text and "Armada" not in shown[0]["text/plain"].split("def")[0]


@pytest.mark.parametrize("method", ["armada", "frozen_aligner"])
def test_heads_lead_from_projections_to_outputs(project, store, method):
    pair = probes.probe(specs.spec("tiny", "cola", method))
    for name in ("student", "student_aux", "aligner", "aligner_aux"):
        W, w = pair.head(name)
        p = pair.get(f"{name.removesuffix('_aux')}_projection")
        assert W.shape == (2, 768) and W.dtype == np.float64
        # vectors are kept in float16
        np.testing.assert_allclose(p @ W.T + w, pair.get(name), atol=2e-2, rtol=1e-2)
    bound = transfer.transfer(
        pair.get("aligner_projection"), pair.get("student_projection"),
        pair.head("aligner_aux"), pair.head("student_aux"),
    )  # fmt: skip
    measured = np.linalg.norm(pair.get("aligner_aux") - pair.get("student_aux"), axis=1).mean()
    assert bound.left == pytest.approx(measured, rel=0.02) and 0 < bound.left < bound.right


def test_a_run_without_an_aligner_has_no_heads(project, store):
    pair = probes.probe(specs.spec("tiny", "cola", "undistilled"))
    with pytest.raises(KeyError, match="student_aux"):
        pair.head("student_aux")
