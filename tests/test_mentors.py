"""Mentors: made once, kept complete, found again after a kill, computed again when damaged."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tiny import Killed, mentor_checkpoint

from armada_lib import encoding, engine, evaluation, files, mentors, profiles, run_data, runs, specs
from armada_lib.methods import METHODS
from armada_lib.methods.layers import Watch
from armada_lib.profiles import Unknown
from armada_lib.results import RunStore

HERE = Path(__file__).parent
TINY = {"train_size": 16, "eval_size": 8}


@pytest.fixture(scope="session")
def school_root(root, checkpoints, tmp_path_factory) -> Path:
    """A project with a mentor of four layers, an assistant of three of them, a student of two."""
    base = tmp_path_factory.mktemp("school")
    shutil.copytree(root / "book", base / "book")
    rows = (profiles.ROOT / "book/data/mini/glue/stsb/train.jsonl").read_text().splitlines()[:24]
    (base / "book/data/mini/glue/stsb").mkdir()
    for split in ("train", "validation"):
        (base / f"book/data/mini/glue/stsb/{split}.jsonl").write_text("\n".join(rows))
    big = mentor_checkpoint(checkpoints["bert"].checkpoint, base / "big")
    raw = yaml.safe_load((root / "params/profiles/tiny.yaml").read_text())
    raw["students"] = {
        "bert-6l": {"checkpoint": checkpoints["bert"].checkpoint},
        "big": {"checkpoint": big},
        "middle": {"checkpoint": big, "layers": [0, 1, 3]},
        "little": {"checkpoint": big, "layers": [1, 3]},
    }
    raw["baselines"] |= {"student": "little", "mentor": "big", "assistant": "middle"}
    (base / "params/profiles").mkdir(parents=True)
    (base / "params/profiles/school.yaml").write_text(yaml.safe_dump(raw))
    return base


@pytest.fixture
def school(school_root, monkeypatch):
    monkeypatch.setattr(profiles, "ROOT", school_root)
    monkeypatch.setenv("ARMADA_ROOT", str(school_root))  # for workers
    for known in (profiles.load, run_data._examples):
        known.cache_clear()
    yield school_root
    for known in (profiles.load, run_data._examples):
        known.cache_clear()


def spec(method="kd", task="cola", **kw):
    return specs.spec("school", task, method, **{**TINY, **kw})


def ready(s, store=None) -> mentors.Stored:
    store = store or RunStore()
    store.check()
    mentors.prepare([s], store, runs.compute, progress=False)
    return mentors.load(s, store)


def spoil(path: Path, body: bytes) -> None:
    """Another file of that name: what is read is mapped, and must not change under its reader."""
    path.unlink()
    path.write_bytes(body)


def contents(folder: Path) -> dict[str, dict]:
    return {p.name: load_file(p) for p in sorted(folder.glob("*"))}


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(
        x.keys() == b[n].keys() and all(torch.equal(x[k], b[n][k]) for k in x) for n, x in a.items()
    )


# -- what a mentor is --------------------------------------------------------------------------


def test_the_mentor_is_a_run_of_the_same_task_and_data(school):
    s = spec(seed=3, student_lr=5e-4, tau=2.0, epochs=1)
    m = specs.mentor_of(s)
    assert (m.student, m.method, m.seed, m.mentor, m.key) == (
        "big",
        "undistilled",
        0,
        None,
        s.mentor_id,
    )
    assert m.data_id == s.data_id and m.training.epochs == 1
    assert (
        m.training.student_lr == 1e-3
    )  # the profile's: a search over the student's makes no new one
    # one mentor for all seeds, weights and methods; another for other data, budget, seed or model
    same = (
        spec(epochs=1),
        spec("rco", epochs=1),
        spec("pkd_skip", epochs=1, seed=1, normalised=False),
    )
    assert {x.mentor_id for x in same} == {s.mentor_id} and len({x.key for x in (s, *same)}) == 4
    for other in ({"train_size": 12}, {"mentor_seed": 1}, {"mentor": "middle"}, {"epochs": 2}):
        assert spec(**{"epochs": 1, **other}).mentor_id != s.mentor_id, other


def test_takd_learns_from_a_distilled_assistant_and_sftn_from_its_first_stage(school):
    a = specs.mentor_of(spec("takd"))
    assert (a.student, a.method, a.mentor) == ("middle", "kd", "big")
    assert specs.mentor_of(a) == specs.mentor_of(spec("kd"))
    stage = specs.mentor_of(spec("sftn"))
    assert (stage.student, stage.method, stage.mentor) == ("big", "sftn_mentor", "little")


def test_a_method_without_a_mentor_has_the_key_it_had(school):
    s = spec("undistilled", student="bert-6l")
    assert s.mentor is s.mentor_id is None
    assert not {"mentor", "mentor_id", "mentor_seed"} & set(s.model_dump(exclude_defaults=True))
    assert not {"anchors", "normalised"} & set(s.training.model_dump(exclude_defaults=True))
    assert "layers" not in s.student_id
    ids = {spec("undistilled", student=n).student_id for n in ("big", "middle", "little")}
    assert len(ids) == 3


def test_weights_are_those_that_the_method_has(school):
    s = spec("kd", alpha=0.25)
    assert (s.alpha, s.beta, s.gamma, s.tau) == (0.25, 0.0, 0.0, 5.0)
    assert spec("pkd_last").beta == 100


@pytest.mark.parametrize("method, given, words", [
    ("kd", {"beta": 3.0}, "kd does not use beta: its weights are alpha, tau"),
    ("kd", {"beta": 0.0, "gamma": 1.0, "tau": 2.0}, "kd does not use beta, gamma: "),
    ("tinybert", {"alpha": 0.5}, "tinybert does not use alpha: it has no weights"),
])  # fmt: skip
def test_a_weight_that_a_method_does_not_have_is_refused(school, method, given, words):
    with pytest.raises(ValueError, match=f"^{words}"):
        spec(method, **given)
    assert (
        spec("undistilled", **given).key == spec("undistilled").key
    )  # no baseline: part of a grid


@pytest.mark.parametrize(
    "given, words",
    [
        (dict(mentor="bigger"), "unknown student .* 'bigger'; did you mean 'big'"),
        (dict(mentor="bigger"), "Valid: bert-6l, big, little, middle"),
        (dict(method="kd2"), "unknown method 'kd2'.*continuation_kd.*metadistil.*rail_kd.*undistilled"),
        (dict(alpha=1.5), "alpha must be a finite number from 0 to 1"),
        (dict(mentor_seed=-1), "mentor_seed"),
    ],
)  # fmt: skip
def test_wrong_names_and_numbers_are_refused_before_any_work(school, monkeypatch, given, words):
    monkeypatch.setattr(run_data, "splits", lambda *a: pytest.fail("data were read"))
    with pytest.raises((Unknown, ValueError), match=words):
        spec(**given)


def test_a_profile_without_mentors_and_a_task_without_labels_are_refused(school, monkeypatch):
    with pytest.raises(ValueError, match="unknown method for commonsense 'kd'"):
        spec(task="commonsense", student="bert-6l")
    p = profiles.load("school").model_copy(update={"baselines": None})
    with monkeypatch.context() as patch:
        patch.setattr(profiles, "load", lambda name: p)
        with pytest.raises(ValueError, match="no block `baselines`"):
            spec()


@pytest.mark.parametrize("name", ["mini", "cpu", "paper", "smoke"])
def test_the_baselines_of_every_profile_are_complete(name):
    p = profiles.load(name)
    block = p.baselines
    assert block is not None
    for who in (block.student, block.mentor, block.assistant):
        assert p.student(who).stands_for
    assert set(block.methods) <= set(METHODS)
    assert set(block.tasks) <= set(run_data.TASKS)
    assert set(block.weights) <= {n for n, e in METHODS.items() if e.mentor}


@pytest.mark.parametrize("name", ["minilm-3l", "minilm-4l"])
def test_a_cut_student_has_the_size_that_its_note_says(name):
    who = profiles.load("mini").student(name)
    from armada_lib import students

    found = students.load(who, 2, 0)
    whole = students.load(profiles.load("mini").student("bert-base"), 2, 0)
    size = sum(x.numel() for x in found.model.bert.parameters())
    assert f"{size / 1e6:.1f} million parameters" in who.note
    kept, every = found.model.bert.encoder.layer, whole.model.bert.encoder.layer
    assert len(kept) == len(who.layers) == found.model.config.num_hidden_layers
    for mine, i in zip(kept, who.layers, strict=True):
        own, theirs = mine.state_dict(), every[i].state_dict()
        assert all(torch.equal(own[k], theirs[k]) for k in own)


def test_layers_that_are_not_there_are_refused_before_weights_are_read(school, monkeypatch):
    from armada_lib import students

    monkeypatch.setattr(students.transformers.AutoModelForSequenceClassification, "from_pretrained",
                        lambda *a, **k: pytest.fail("weights were read"))  # fmt: skip
    who = profiles.load("school").student("little").model_copy(update={"layers": (1, 4)})
    with pytest.raises(ValueError, match=r"keeps layers \[1, 4\].*layers 0 to 3"):
        students.load(who, 2, 0)
    for layers in ([], [2, 1], [-1]):
        with pytest.raises(ValueError, match="layers"):
            profiles.StudentSpec(name="a", checkpoint="b", layers=layers)


@pytest.mark.parametrize("name", ["bert", "deberta", "opt"])
def test_a_cut_student_of_every_family_is_saved_as_a_plain_checkpoint(checkpoints, tmp_path, name):
    from transformers import AutoModelForSequenceClassification

    from armada_lib import students

    who = checkpoints[name].model_copy(update={"layers": (1,)})
    student = students.load(who, 2, 0).eval()
    student.save_pretrained(tmp_path)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert plain.config.num_hidden_layers == 1
    texts = student.tokenizer(["the dog ran on the mat"], return_tensors="pt")
    with torch.no_grad():
        own = student.model
        own.set_attn_implementation("eager")
        torch.testing.assert_close(own(**texts).logits, plain(**texts).logits)


# -- what it says ------------------------------------------------------------------------------


@pytest.mark.parametrize("task, rows, outputs", [("cola", 16, 2), ("stsb", 16, 1), ("copa", 32, 1)])
def test_what_is_kept_belongs_to_the_examples_by_number(school, task, rows, outputs):
    """Against a plain forward of the tuned model, one text at a time."""
    m = ready(spec("rco", task))
    tuned, data = m.tuned().eval(), m.data
    assert m.logits.shape == (rows, outputs) and m.logits.dtype == torch.float32
    assert len(m.anchors) == 2 and torch.equal(m.anchors[-1], m.logits)
    assert not torch.equal(m.anchors[0], m.logits)
    assert m.cls.shape == m.means.shape == (rows, 5, 32) and m.cls.dtype == torch.float16
    assert (m.layers, m.width) == (4, 32)
    with torch.no_grad():
        for i in (0, 3, rows - 1):
            ids = torch.from_numpy(data.tokens[i].astype(np.int64))[None]
            types = torch.from_numpy(data.types[i].astype(np.int64))[None]
            inputs = {
                "input_ids": ids,
                "token_type_ids": types,
                "attention_mask": torch.ones_like(ids),
            }
            tuned.model.set_attn_implementation("eager")
            states = tuned.model.bert(**inputs, output_hidden_states=True).hidden_states
            out = tuned(inputs).logits[0]
            torch.testing.assert_close(m.logits[i], out, atol=1e-4, rtol=1e-4)
            for layer, x in enumerate(states):
                torch.testing.assert_close(m.cls[i, layer].float(), x[0, 0], atol=5e-3, rtol=5e-3)
                torch.testing.assert_close(
                    m.means[i, layer].float(), x[0].mean(0), atol=5e-3, rtol=5e-3
                )


def test_the_tuned_model_scores_as_its_result_does(school):
    s = spec()
    m = ready(s)
    result = RunStore().load(s.mentor_id)
    splits = encoding.encode(m.spec, encoding.student(m.spec))
    found = evaluation.predict(
        m.tuned(), METHODS["undistilled"].build(_plain(m), m.start()), splits.held, False
    )
    np.testing.assert_array_equal(found["student"], result.outputs["student"])


def _plain(m):
    from armada_lib.methods import Setting

    return Setting("class", 2, m.spec.training, 0)


def test_start_is_the_model_before_fine_tuning_and_copies_are_apart(school):
    m = ready(spec("dml"))
    assert not m.folder.exists()  # nothing was fine-tuned for it
    a, b = m.start(), m.start()
    first = {k: v.clone() for k, v in a.model.named_parameters()}
    assert all(torch.equal(v, first[k]) for k, v in b.model.named_parameters())
    with torch.no_grad():
        a.model.classifier.weight.add_(1)
    assert torch.equal(b.model.classifier.weight, first["classifier.weight"])
    tuned = ready(spec("metadistil")).tuned()
    assert tuned.branch is None and next(tuned.parameters()).device.type == "cpu"
    assert any(not torch.equal(v, first[k]) for k, v in tuned.model.named_parameters())


def test_only_what_is_asked_for_is_computed(school, store):
    m = ready(spec("kd"))
    names = lambda: {p.name for p in m.folder.iterdir()}
    epochs = {"epoch-0.safetensors", "epoch-1.safetensors"}
    assert names() == epochs | {"logits.safetensors"}
    ready(spec("pkd_skip"))
    assert names() == epochs | {"logits.safetensors", "cls.safetensors"}
    trained = load_file(m.folder / "epoch-1.safetensors")
    assert len(trained["bert.embeddings.word_embeddings.weight"]) < 30  # only tokens that occur


def test_the_best_epoch_is_the_last_that_counts(school):
    s = spec("rco", select="best", epochs=3)
    m = ready(s)
    scores = [e["score"] for e in RunStore().load(s.mentor_id).facts["epochs"]]
    assert m.last == scores.index(max(scores)) and len(m.anchors) == m.last + 1
    assert torch.equal(m.anchors[-1], m.logits)


# -- kills, workers, damage --------------------------------------------------------------------


@pytest.mark.parametrize("at", [1, 3, 5, 6, 7])
def test_a_killed_fine_tuning_leaves_nothing_wrong_and_goes_on(school, tmp_path, monkeypatch, at):
    """Six optimiser steps of two epochs, and the work after them, are cut at each kind of place."""
    monkeypatch.setenv("ARMADA_SAVE_EVERY", "0")
    s = spec("rco", train_size=24, epochs=2)
    whole = RunStore(tmp_path / "whole")
    ready(s, whole)
    store, done = RunStore(tmp_path / "killed"), {"n": 0}

    def dying(module, name):
        plain = getattr(module, name)

        def call(*a, **k):
            done["n"] += 1
            if done["n"] == at:
                raise Killed
            return plain(*a, **k)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(engine.Optimiser, "step", dying(engine.Optimiser, "step"))
        patch.setattr(mentors.Stored, "compute", dying(mentors.Stored, "compute"))
        with pytest.raises(Killed):
            ready(s, store)
    steps = engine.Optimiser.step
    taken = []
    monkeypatch.setattr(engine.Optimiser, "step", lambda self: (taken.append(1), steps(self))[1])
    again = ready(s, store)
    assert len(taken) <= 6 - min(at - 1, 6) + 1 and not list(again.folder.glob("*.tmp"))
    assert equal(contents(again.folder), contents(mentors.load(s, whole).folder))
    a, b = (x.load(s.mentor_id) for x in (store, whole))
    assert a.scores == b.scores and (a.outputs["student"] == b.outputs["student"]).all()


def test_a_kill_between_weights_and_rename_leaves_no_file(school, monkeypatch):
    m = ready(spec("kd"))
    m.file("logits").unlink()
    monkeypatch.setattr(Path, "replace", lambda *a: (_ for _ in ()).throw(Killed))
    with pytest.raises(Killed):
        m.compute("logits")
    monkeypatch.undo()
    assert not m.file("logits").exists() and list(m.folder.glob("*.tmp"))


@pytest.mark.parametrize("how", ["cut", "changed", "other", "absent"])
def test_a_damaged_cache_is_computed_again(school, how):
    s = spec("kd")
    m = ready(s)
    before, path = m.logits.clone(), m.file("logits")
    if how == "cut":
        spoil(path, path.read_bytes()[:-8])
    elif how == "changed":
        body = bytearray(path.read_bytes())
        body[-1] ^= 64
        spoil(path, bytes(body))
    elif how == "other":  # of other data: rows would be joined to the wrong examples
        path.unlink()
        save_file({"0": before}, path, metadata={"digest": files.digest({"0": before}),
                                                 "mentor": m.spec.key, "data": "other"})  # fmt: skip
    else:
        path.unlink()
    assert torch.equal(mentors.load(s, RunStore()).logits, before)
    assert torch.equal(load_file(path)["0"], before)


def test_damaged_weights_are_made_again(school):
    s = spec("metadistil")
    m = ready(s)
    good = load_file(m.epoch(1))
    spoil(m.epoch(1), b"no weights")
    with pytest.raises(mentors.Damaged, match="epoch-1.safetensors is damaged"):
        m.tuned()
    m.epoch(1).write_bytes(b"no weights")
    ready(s)
    found = load_file(m.epoch(1))
    assert all(torch.equal(found[k], good[k]) for k in good)


def test_a_mentor_that_the_profile_no_longer_describes_is_refused(school):
    s = spec().model_copy(update={"mentor_id": "0" * 20})
    with pytest.raises(ValueError, match="make the specification anew"):
        mentors.prepare([s], RunStore(), runs.compute)


MAKE = """
import os, torch
from armada_lib import mentors, runs, specs
from armada_lib.results import RunStore
torch.set_num_threads(1)
s, store, made, plain = specs.spec("school", "cola", "kd", train_size=16), RunStore(), [], runs.compute
store.check()
children = []
for _ in range(2):
    child = os.fork()
    if child == 0:
        mentors.prepare([s], store, lambda *a, **k: (made.append(1), plain(*a, **k))[1], progress=False)
        os._exit(len(made))
    children.append(child)
print([os.waitstatus_to_exitcode(os.waitpid(c, 0)[1]) for c in children])
"""


def test_two_workers_make_one_mentor(school, store):
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent)}
    done = subprocess.run([sys.executable, "-c", MAKE], env=env, capture_output=True, text=True)
    assert sorted(json.loads(done.stdout)) == [0, 1], done.stderr[-2000:]
    assert mentors.load(spec(eval_size=None), RunStore()).whole()


def test_mentors_of_several_tasks_are_made_side_by_side(school, tmp_path):
    one, two = RunStore(tmp_path / "one"), RunStore(tmp_path / "two")
    wanted = [spec("kd"), spec("kd", "stsb")]
    for store, workers in ((one, 1), (two, 2)):
        store.check()
        assert mentors.prepare(wanted, store, runs.compute, workers, progress=False) == 2
        assert mentors.prepare(wanted, store, runs.compute, workers, progress=False) == 0
    for s in wanted:
        assert equal(*(contents(mentors.load(s, x).folder) for x in (one, two)))


# -- whole runs --------------------------------------------------------------------------------


def test_a_run_and_a_study_agree_and_all_results_are_stored(school, tmp_path):
    one, two = RunStore(tmp_path / "one"), RunStore(tmp_path / "two")
    wanted = [spec("kd"), spec("takd"), spec("kd", "copa")]
    alone = [runs.run(s, one) for s in wanted]
    found = runs.study(wanted, two, workers=1, progress=False)
    for a, b in zip(alone, found, strict=True):
        assert a.spec == b.spec and a.scores == b.scores
        assert (a.outputs["student"] == b.outputs["student"]).all()
        assert {"task", "soft"} <= set(a.curves) and np.isfinite(a.curves["total"]).all()
    for s in wanted:  # the mentors' own Results are there, the assistant's mentor's as well
        assert two.load(s.mentor_id) is not None
    assert two.load(specs.mentor_of(specs.mentor_of(wanted[1])).key) is not None


def test_several_processes_need_a_mentor_that_is_there(school):
    """One of them cannot fine-tune it alone: its engine would wait for the others."""

    class Two:
        num_processes, is_main_process = 2, True

        def wait_for_everyone(self):
            raise Killed  # it came as far as training

    with pytest.raises(ValueError, match="is of 1 processes, not of 2"):
        runs.run(spec("kd"), accelerator=Two())
    s = spec("kd", processes=2)
    with pytest.raises(ValueError, match="make it in one process first"):
        runs.run(s, accelerator=Two())
    ready(s)
    with pytest.raises(Killed):
        runs.run(s, accelerator=Two())


def test_a_student_of_a_mentor_is_a_plain_checkpoint(school, tmp_path):
    from transformers import AutoModelForSequenceClassification

    student = runs.trained_student(spec("pkd_skip"))
    assert not any(m._forward_hooks for m in student.modules())
    student.save_pretrained(tmp_path / "student")
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "student")
    assert plain.config.num_hidden_layers == 2


def test_mentors_are_made_once_for_all_runs(school, monkeypatch):
    made, plain = [], runs.compute
    counted = lambda s, *a, **k: (made.append(s.student), plain(s, *a, **k))[1]
    monkeypatch.setattr(runs, "compute", counted)
    runs.study([spec("kd"), spec("kd", seed=1), spec("pkd_skip")], workers=1, progress=False)
    assert sorted(made) == ["big", "little", "little", "little"]


@pytest.mark.parametrize("method", [n for n, e in METHODS.items() if e.mentor and n != "seqkd"])
def test_every_baseline_runs_and_is_stored(school, method):
    student = "big" if method == "sftn_mentor" else None
    more = {"mentor": "little"} if student else {}
    result = runs.run(spec(method, student=student, **more))
    assert np.isfinite(result.curves["total"]).all() and result.spec.mentor_id
    assert set(result.outputs) == {"student"}


def test_the_watch_of_a_student_sees_what_a_mentor_keeps(school):
    """What `cls` and `means` hold is what methods read of the student, at the same places."""
    m = ready(spec("rail_kd"))
    model = m.tuned().eval()
    watch = Watch(model, whole=True, always=True)
    batch = m.data.batch(np.arange(8)[::-1].copy(), model.packs)
    with torch.no_grad():
        model(batch.inputs)
    torch.testing.assert_close(watch.first(batch.inputs).half(), m.cls[torch.from_numpy(batch.rows)],
                               atol=2e-3, rtol=2e-3)  # fmt: skip
    torch.testing.assert_close(watch.mean(batch.inputs).half(), m.means[torch.from_numpy(batch.rows)],
                               atol=2e-3, rtol=2e-3)  # fmt: skip
