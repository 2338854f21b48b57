"""Probes: the vectors are the run's own, the Result is untouched, and a file is whole or absent."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny import Killed

from armada_lib import engine, evaluation, geometry, probes, runs, specs
from armada_lib.results import RunStore


def spec(task="cola", method="armada", **kw):
    return specs.spec("tiny", task, method, **kw)


def test_a_probe_leaves_the_result_that_a_run_leaves(project, tmp_path):
    s = spec()
    plain = runs.run(s, RunStore(tmp_path / "plain"))
    looked = RunStore(tmp_path / "looked")
    p = probes.probe(s, looked)
    assert s in looked
    result = looked.load(s.key)
    assert result.scores == plain.scores
    for name in plain.outputs:
        np.testing.assert_array_equal(result.outputs[name], plain.outputs[name])
        # batches of other sizes round differently
        np.testing.assert_allclose(p.get(name), plain.outputs[name], atol=1e-5)
    for name in plain.curves:
        np.testing.assert_array_equal(result.curves[name], plain.curves[name])
    assert p.right.mean() * 100 == pytest.approx(
        evaluation.metric("accuracy", plain.outputs["student"], plain.labels)
    )


@pytest.mark.parametrize("task", ["cola", "copa"])
def test_vectors_lead_to_the_outputs_in_the_order_of_the_data(project, store, task):
    """The last layer applied to the stored vectors gives the stored outputs."""
    s = spec(task)
    p, kept = probes.probe(s), {}

    def look(when, student, method, tr, ev):
        if when == "after":
            heads = (student.family.head(student.model), student.branch["projection"],
                     method.aligner.output_head, method.aligner.aux_head)  # fmt: skip
            kept.update(
                head=heads[0], projection=heads[1], aligner=heads[2], aux=heads[3], method=method
            )

    runs.compute(s, RunStore(), look=look)
    f = lambda name: torch.from_numpy(p.get(name)).float()
    shape = kept["method"].shape
    with torch.no_grad():
        for vectors, layer, output in (
            ("student_hidden", "head", "student"), ("aligner_hidden", "aligner", "aligner"),
            ("aligner_projection", "aux", "aligner_aux"),
        ):  # fmt: skip
            torch.testing.assert_close(
                shape(kept[layer](f(vectors))), f(output), atol=5e-3, rtol=5e-3
            )
        torch.testing.assert_close(
            kept["projection"](f("student_hidden")), f("student_projection"), atol=5e-3, rtol=5e-3
        )
    n = len(p.labels())
    assert len(p.get("student_hidden")) == n * p.per_example == len(p.text_labels())
    if task == "copa":
        assert p.per_example == 2
        assert (p.text_labels().reshape(n, 2).argmax(1) == p.labels()).all()
        assert (p.text_labels().reshape(n, 2).sum(1) == 1).all()


def test_before_is_the_start_and_a_frozen_aligner_stays_there(project, store):
    trained, frozen, plain = (
        probes.probe(spec(method=m)) for m in ("armada", "frozen_aligner", "undistilled")
    )
    get = lambda p, what, when: p.get(what, when=when)
    start = get(trained, "student_hidden", "before")
    np.testing.assert_array_equal(get(plain, "student_hidden", "before"), start)
    assert not np.array_equal(get(trained, "student_hidden", "after"), start)
    fixed = [get(frozen, "aligner_projection", w) for w in ("before", "after")]
    np.testing.assert_array_equal(*fixed)
    np.testing.assert_array_equal(get(trained, "aligner_projection", "before"), fixed[0])
    assert not np.array_equal(get(trained, "aligner_projection", "after"), fixed[0])
    assert plain.get("aligner_hidden") is None and plain.get("student_aux") is None


def test_an_undistilled_student_is_seen_through_the_projection_armada_starts_with(project, store):
    plain, trained = probes.probe(spec(method="undistilled")), probes.probe(spec())
    for split in ("held", "train"):
        a = plain.get("student_projection", split, "before")
        np.testing.assert_array_equal(a, trained.get("student_projection", split, "before"))
    # an isometry: distances between the student's own vectors are what they were
    h, p = plain.get("student_hidden"), plain.get("student_projection")
    assert h.shape[1] < p.shape[1]
    np.testing.assert_allclose(np.linalg.norm(p, axis=1), np.linalg.norm(h, axis=1), rtol=1e-2)
    assert geometry.linear_cka(h, p) == pytest.approx(1, abs=1e-3)


def test_a_control_is_read_with_its_own_vectors(project, store):
    real, shuffled, random = (
        probes.probe(spec(method=m)) for m in ("armada", "shuffled", "random")
    )
    start = [p.get("aligner_hidden", when="before") for p in (real, shuffled, random)]
    assert not np.array_equal(start[0], start[1])
    rows = lambda x: sorted(map(tuple, np.round(x, 2)))
    assert rows(start[0]) == rows(start[1]) != rows(start[2])  # the same aligner, other texts


def test_the_sample_of_training_examples_depends_on_their_number_alone(project, store):
    assert len(probes.sample(1000)) == probes.SAMPLE and len(set(probes.sample(1000))) == 256
    assert (probes.sample(1000) == probes.sample(1000)).all()
    assert (probes.sample(10) == np.arange(10)).all()
    a, b = probes.probe(spec()), probes.probe(spec(method="undistilled", seed=1))
    np.testing.assert_array_equal(a.labels("train"), b.labels("train"))


def test_a_stored_probe_is_read_and_a_damaged_one_made_again(project, store, monkeypatch, caplog):
    s = spec()
    first = probes.probe(s)
    with monkeypatch.context() as patch:
        patch.setattr(runs, "compute", lambda *a, **k: pytest.fail("computed twice"))
        again = probes.study([s, s], progress=False)
    for p in again:
        assert p.arrays.keys() == first.arrays.keys() and p.per_example == first.per_example
        assert all(np.array_equal(p.arrays[k], first.arrays[k]) for k in first.arrays)
    home = probes.path(s, RunStore())
    raw = bytearray(home.read_bytes())
    raw[-5] ^= 1  # one bit of one number
    home.write_bytes(raw)
    assert probes.load(s, RunStore()) is None and "damaged" in caplog.text
    made = probes.probe(s)
    assert all(np.array_equal(made.arrays[k], first.arrays[k]) for k in first.arrays)
    home.write_bytes(b"nothing")
    assert probes.load(s, RunStore()) is None and not home.exists()


def test_a_killed_probe_goes_on_to_the_same_vectors(project, tmp_path, monkeypatch):
    monkeypatch.setenv("ARMADA_SAVE_EVERY", "0")
    s, save = spec(), engine.save
    whole = probes.probe(s, RunStore(tmp_path / "whole"))

    def save_and_die(path, student, method, optimisers, progress):
        save(path, student, method, optimisers, progress)
        if progress.step >= 2:
            raise Killed

    other = RunStore(tmp_path / "killed")
    with monkeypatch.context() as patch:
        patch.setattr(engine, "save", save_and_die)
        with pytest.raises(Killed):
            probes.probe(s, other)
    assert other.state(s.key).exists()
    assert s not in other and not probes.path(s, other).exists()
    again = probes.probe(s, other)
    assert all(np.array_equal(again.arrays[k], whole.arrays[k]) for k in whole.arrays)
    assert not other.state(s.key).exists()


def test_a_student_that_generates_has_no_probe(store):
    s = specs.spec("mini", "dolly", "undistilled", student="llama-3.2-3b")
    with pytest.raises(ValueError, match="students that classify"):
        probes.probe(s)
