"""A run of a student that generates, whole: tuned, asked, scored, stored, and resumed when killed."""

from __future__ import annotations

import json

import numpy as np
import pytest
import yaml
from test_decoders import llama  # noqa: F401  (a fixture)

from armada_lib import (
    chapter,
    extraction,
    gentasks,
    plans,
    profiles,
    report,
    run_data,
    runs,
    specs,
    tuning,
)
from armada_lib.results import RunStore

PEOPLE = ("cat", "dog", "bird")


@pytest.fixture
def own(project, llama, tmp_path, monkeypatch):  # noqa: F811
    """Profile `tuned`: the tiny Llama, and a suite of arithmetic with two small test sets."""
    raw = yaml.safe_load((project / "params/profiles/tiny.yaml").read_text())
    raw["students"]["llama"] = {"checkpoint": llama, "lora": {"dropout": 0.0}}
    raw["training"]["groups"] = {"reasoning": {
        "epochs": 2, "batch_size": 4, "max_length": 48, "template": "plain", "new_tokens": 4,
        "test_size": 5, "student_lr": 1.0e-2,
    }}  # fmt: skip
    raw["reasoning"] = {"student": "llama", "suites": ["math"], "teachers": ["sd14"], "seeds": [0],
                        "methods": ["armada", "shuffled"], "manifolds": ["euclid"]}  # fmt: skip
    raw["instruction"] = None
    (project / "params/profiles/tuned.yaml").write_text(yaml.safe_dump(raw))
    base = project / "book/data/mini/reasoning"
    for task, split, n in (
        ("math", "train", 12),
        ("multiarith", "test", 8),
        ("singleeq", "test", 6),
    ):
        (base / task).mkdir(parents=True, exist_ok=True)
        rows = [{"instruction": f"the {PEOPLE[i % 3]} saw {i} red {task} birds and {i} blue", "input": "",
                 "output": f"the answer is {2 * i}", "answer": str(2 * i)} for i in range(n)]  # fmt: skip
        (base / task / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.setenv("ARMADA_STORE", str(tmp_path))
    profiles.load.cache_clear()
    run_data.suite_of.cache_clear()
    yield project
    run_data.suite_of.cache_clear()


def make(method: str = "armada", **changes):
    return specs.spec("tuned", "math", method, student="llama", **changes)


def test_a_run_is_tuned_asked_and_scored(own):
    r = runs.run(make())
    assert set(r.scores) == {"student", "multiarith", "singleeq"} and r.metric == "accuracy"
    assert r.scores["student"] == np.mean([r.scores["multiarith"], r.scores["singleeq"]])
    assert len(r.outputs["multiarith"]) == 5 and r.facts["tests"] == {
        "multiarith": 5,
        "singleeq": 5,
    }
    assert r.facts["train"] == 12 and r.facts["trained_parameters"] < r.facts["student_parameters"]
    assert {"aligner_task", "task", "manifold", "aux_soft"} <= r.curves.keys()
    store = RunStore()
    again = store.load(make().key)
    assert again is not None and again.scores == r.scores and json.dumps(again.record())
    student = runs.trained_student(make())
    said = [json.loads(line)[1] for line in
            (store.root / "answers" / r.spec.key / "multiarith.jsonl").read_text().splitlines()]  # fmt: skip
    tests = run_data.suite(make()).tests
    assert sorted(said) == sorted(tuning.answer(make(), student, tests)["multiarith"][0])


def test_keys_hold_what_matters_and_alpha_has_no_part(own):
    assert make().alpha == 0.0 and make(alpha=0.9).key == make().key
    keys = {make(**k).key for k in ({}, {"seed": 1}, {"template": "alpaca"}, {"new_tokens": 5},
                                    {"protocol": "likelihood"}, {"test_size": 4}, {"train_size": 8})}  # fmt: skip
    assert len(keys) == 7
    with pytest.raises(ValueError, match="student 'bert-6l' does not generate; .*'llama'"):
        specs.spec("tuned", "math", "armada", student="bert-6l")


def test_the_teacher_sees_the_training_questions_alone(own):
    seen = run_data.teacher_texts(make())
    assert len(seen) == 12 and seen == [i.teacher_text for i in run_data.suite(make()).train]
    assert extraction.extract([make()], RunStore(), progress=False) == 12
    assert extraction.extract([make("undistilled")], RunStore(), progress=False) == 0


def test_a_run_killed_between_two_answers_is_not_trained_again(own, monkeypatch):
    whole = runs.run(make(), RunStore(RunStore().root / "whole"))
    real, calls = gentasks.score, []

    def dies(*a):
        calls.append(a[0])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*a)

    monkeypatch.setattr(gentasks, "score", dies)
    with pytest.raises(KeyboardInterrupt):
        runs.run(make())
    monkeypatch.setattr(tuning.engine, "train", lambda *a, **k: pytest.fail("trained again"))
    monkeypatch.setattr(tuning.generation, "_append", lambda *a: pytest.fail("answered again"))
    again = runs.run(make())
    assert again.scores == whole.scores and again.facts["steps"] == whole.facts["steps"]
    assert all(np.array_equal(again.curves[k], v, equal_nan=True) for k, v in whole.curves.items())
    assert not list((RunStore().root / "answers").rglob("trained.safetensors"))


def test_seqkd_is_tuned_on_the_mentors_responses(own, monkeypatch):
    """They are written once, for all seeds, and a killed call goes on with what it has."""
    s, store = make("seqkd", mentor="llama"), RunStore()
    store.check()
    home = store.root / "mentors" / specs.mentor_of(s).key
    real, calls = tuning.generation._append, []

    def dies(path, *answer):
        real(path, *answer)
        calls.append(path.name)
        raise KeyboardInterrupt

    monkeypatch.setattr(tuning.generation, "_append", dies)
    with pytest.raises(KeyboardInterrupt):
        tuning.build(s, store)
    monkeypatch.setattr(tuning.generation, "_append", real)
    assert calls == ["responses.jsonl"] and (home / "trained.safetensors").exists()
    monkeypatch.setattr(tuning.engine, "train", lambda *a, **k: pytest.fail("trained again"))
    student, _, data, facts = tuning.build(s, store)
    said = tuning.generation.kept_answers(home / "responses.jsonl")
    kept = [r for r in said.values() if tuning.answers.cut(r)]
    assert len(said) == 12 and facts["train"] + facts["too_long"] == len(kept)
    assert facts["without_response"] == 12 - len(kept)
    items = [i for i in tuning._responses(s, store) if i.response in map(tuning.answers.cut, kept)]
    for item, tokens, prompt in zip(items, data.tokens, data.prompts, strict=True):
        whole = student.answer_ids(item.response + (student.tokenizer.eos_token or ""))
        assert tokens[prompt:].tolist() == whole[: len(tokens) - prompt].tolist()
    assert [i.instruction for i in items] == [i.instruction for i in run_data.suite(s).train
                                              if i.id in {x.id for x in items}]  # fmt: skip
    again = tuning.build(make("seqkd", mentor="llama", seed=1), store)[2]
    assert all(np.array_equal(a, b) for a, b in zip(data.tokens, again.tokens, strict=True))


def test_a_method_that_needs_labels_or_a_teacher_is_refused(own):
    for method in ("kd", "layers_only"):
        with pytest.raises(ValueError, match=f"unknown method for math '{method}'.*seqkd"):
            make(method)
    with pytest.raises(ValueError, match="'tuned' names no mentor for 'math': give `mentor`"):
        make("seqkd")
    with pytest.raises(ValueError, match="unknown method for cola 'seqkd'"):
        specs.spec("tuned", "cola", "seqkd")


def test_a_damaged_file_of_weights_is_not_used(own, tmp_path):
    s = make("undistilled")
    path = tmp_path / "answers" / s.key / "trained.safetensors"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"no weights")
    assert runs.run(s).scores == runs.run(s, RunStore(tmp_path / "other")).scores


def test_examples_are_the_first_items_that_score_differently(own, monkeypatch):
    a, b, store = make("undistilled"), make(), RunStore()
    runs.study([a, b], store, workers=1, progress=False)
    said = {s.key: tuning.said(s, store) for s in (a, b)}
    tests, student = run_data.suite(a).tests, runs.trained_student(b)
    items = tests["multiarith"]
    assert {k: x[0] for k, x in tuning.answer(b, student, tests).items()} == said[b.key]
    marks = {a.key: iter([[0, 1, 0, 1, 1], [0] * 5]), b.key: iter([[0, 1, 1, 0, 1], [0] * 5])}
    whose = {id(said[k][t]): k for k in said for t in said[k]}
    monkeypatch.setattr(tuning, "said", lambda s, _: said[s.key])
    score = lambda name, x, _: gentasks.Score(0.0, np.array(next(marks[whose[id(x)]])), 0)
    monkeypatch.setattr(gentasks, "score", score)
    found = tuning.examples(a, b, store, each=1)
    assert found["question"].tolist() == [items[2].teacher_text]
    assert found["after"].tolist() == [tuning.answers.cut(said[b.key]["multiarith"][2])]


def test_the_constant_teacher_serves_students_that_generate(own, tmp_path):
    s = make("constant")
    assert s.teacher == "sd14" and s.manifold == "euclid"
    runs.extract([s], RunStore(), progress=False)
    _, _, data, facts = tuning.build(s, RunStore())
    got = data.vectors(np.arange(len(data)))
    assert (got == got[0]).all() and facts["texts_without_vector"] == 0
    result = runs.run(s)
    assert np.isfinite(result.curves["manifold"]).all() and result.spec.key != make("armada").key


CHAPTER = dict(
    profile="tuned", teachers="auto", student="auto", suites="auto", methods="auto", manifold="auto",
    seeds="auto", protocol=None, train_size=None, test_size=None, beta=None, gamma=None, workers=1, keep="",
)  # fmt: skip


def test_a_chapter_plans_its_runs_and_names_missing_test_sets(own):
    plan = plans.tuning(dict(CHAPTER), "reasoning")
    assert [(s.method, s.task) for s in plan.specs] == [
        ("undistilled", "math"), ("armada", "math"), ("shuffled", "math")]  # fmt: skip
    assert plan.teachers == ["sd14"] and plan.absent == ["AQuA"]
    other = plans.tuning(CHAPTER | {"protocol": "likelihood", "train_size": 8}, "reasoning")
    assert {s.training.protocol for s in other.specs} == {"likelihood"}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"suites": "dolly"}, "unknown suite of reasoning 'dolly'"),
        ({"student": "bert-6l"}, "unknown student that generates"),
        ({"teachers": "sd41"}, "unknown teacher"),
        ({"seeds": [-1]}, "seeds must be whole numbers"),
        ({"protocol": "guess"}, "protocol"),
        ({"train_size": 800}, "train_size is 800, but 12 of 12"),
        ({"taecher": 1}, "unknown parameter 'taecher'"),
    ],
)
def test_a_chapters_mistakes_are_named_before_any_work(own, change, message):
    with pytest.raises(ValueError, match=message):
        plans.tuning(CHAPTER | change, "reasoning")
    with pytest.raises(ValueError, match="profile 'tuned' has no block 'instruction'"):
        plans.tuning(dict(CHAPTER), "instruction")


def test_scores_and_gains_are_by_test_set(own):
    found = runs.study(plans.tuning(dict(CHAPTER), "reasoning").specs, workers=1, progress=False)
    frame = report.table(found)
    assert set(frame["title"]) == {"MultiArith", "SingleEq"} and len(frame) == 6
    table = report.scores(frame, chapter.published(4))
    assert table[table["trained as"] == "undistilled"]["published"].tolist() == ["–", "–"]
    grid = report.gain_grid(frame)
    assert grid["trained as"].tolist() == ["ARMADA Euclid", "shuffled teacher"]
    assert {"MultiArith", "SingleEq", "mean over tasks"} <= set(grid)
