"""Metrics are the field's, predictions stand in the order of the data, a collapse is seen."""

from __future__ import annotations

import json
import warnings

import numpy as np
import pytest
import torch
from scipy.stats import pearsonr
from sklearn.metrics import accuracy_score, matthews_corrcoef
from test_results import result, run_spec
from tiny import rows, setting

from armada_lib import evaluation, results, students
from armada_lib.methods import METHODS
from armada_lib.results import RunStore

OUTPUTS = {"class": 2, "regression": 1, "choice": 1}


# -- metrics -----------------------------------------------------------------------------------


def logits(predicted, classes=2):
    """Outputs (n, c) whose largest entry is the predicted class."""
    return np.eye(classes, dtype=np.float32)[np.asarray(predicted)] * 3 - 1


def test_metrics_of_examples_done_by_hand():
    gold = np.array([1, 1, 1, 0])
    # 2 true positives, 1 false negative, 1 false positive: (2 * 0 - 1 * 1) / sqrt(3 * 3 * 1 * 1)
    assert evaluation.metric("mcc", logits([1, 0, 1, 1]), gold) == pytest.approx(-100 / 3)
    assert evaluation.metric("accuracy", logits([1, 0, 1, 1]), gold) == 50
    assert evaluation.metric(
        "accuracy", logits([2, 0, 1], 3), np.array([2, 1, 1])
    ) == pytest.approx(200 / 3)
    # deviations (-1, 0, 1) and (-1, 1, 0): 1 / sqrt(2 * 2)
    assert evaluation.metric(
        "pearson", np.float32([1, 2, 3]), np.float32([0, 2, 1])
    ) == pytest.approx(50)


@pytest.mark.parametrize("seed", range(5))
def test_metrics_are_those_of_scikit_learn_and_scipy(seed):
    rng = np.random.default_rng(seed)
    n, classes = 200, 2 + seed % 2
    gold, out = rng.integers(0, classes, n), rng.standard_normal((n, classes), np.float32)
    out[np.arange(n), gold] += 0.8
    said = [max(range(classes), key=lambda c, row=row: row[c]) for row in out.tolist()]
    assert evaluation.metric("accuracy", out, gold) == pytest.approx(
        100 * accuracy_score(gold, said)
    )
    assert evaluation.metric("mcc", out, gold) == pytest.approx(100 * matthews_corrcoef(gold, said))
    score = rng.random(n, np.float32) * 5
    guess = (score + rng.standard_normal(n, np.float32)).astype(np.float32)
    expected = 100 * pearsonr(guess.astype(float), score.astype(float)).statistic
    assert evaluation.metric("pearson", guess, score) == pytest.approx(expected, abs=1e-4)
    assert 20 < expected < 95


def test_scores_can_be_recomputed_from_what_is_stored(store, tmp_path):
    """From the stored outputs, and from the predictions in an exported evidence file."""
    rng = np.random.default_rng(3)
    stored, gold = [], {}
    for seed, name in enumerate(("accuracy", "mcc", "pearson")):
        r = result(run_spec(seed=seed), seed, n=90)
        r.metric = name
        if name == "pearson":
            r.labels = rng.random(90, np.float32) * 5
            r.outputs = {
                "student": (r.labels + rng.standard_normal(90, np.float32)).astype(np.float32)
            }
        r.scores = {h: evaluation.metric(name, o, r.labels) for h, o in r.outputs.items()}
        RunStore().save(r)
        stored.append(RunStore().load(r.spec.key))
        gold[r.spec.key] = r.labels
        for head, out in stored[-1].outputs.items():
            assert evaluation.metric(name, out, stored[-1].labels) == stored[-1].scores[head]
    results.export(stored, tmp_path / "evidence.jsonl")
    theirs = {
        "accuracy": accuracy_score,
        "mcc": matthews_corrcoef,
        "pearson": lambda y, p: pearsonr(p, y).statistic,
    }
    for record in results.read(tmp_path / "evidence.jsonl"):
        again = 100 * theirs[record["metric"]](
            gold[record["key"]].astype(float), record["predictions"]
        )
        assert again == pytest.approx(record["scores"]["student"], abs=0.05)  # rounded predictions


@pytest.mark.parametrize("constant", [0.1, 2.5, 3.3, 4.066351])
@pytest.mark.parametrize("n", [40, 277, 1500])
def test_a_constant_score_has_pearson_zero(n, constant):
    gold = np.random.default_rng(0).random(n, np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert evaluation.metric("pearson", np.full(n, constant, np.float32), gold) == 0
        assert evaluation.metric("pearson", gold, np.full(n, constant, np.float32)) == 0


@pytest.mark.parametrize("said", [0, 1])
def test_a_constant_class_has_mcc_zero_and_the_accuracy_of_its_share(said):
    gold = np.array([1] * 30 + [0] * 10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert evaluation.metric("mcc", logits([said] * 40), gold) == 0
    assert evaluation.metric("accuracy", logits([said] * 40), gold) == (75 if said else 25)


def test_an_unknown_metric_names_the_valid_ones():
    with pytest.raises(ValueError, match="unknown metric 'f1'; valid: accuracy, mcc, pearson"):
        evaluation.metric("f1", logits([0]), np.array([0]))


# -- behaviour ---------------------------------------------------------------------------------


@pytest.mark.parametrize("others, collapsed", [(0, True), (1, True), (2, False), (100, False)])
def test_a_model_that_says_one_class_only_is_flagged(others, collapsed):
    said = np.array([1] * (200 - others) + [0] * others)
    gold = np.array([0] * 60 + [1] * 140)
    found = evaluation.behaviour(logits(said), gold)
    assert found["majority_share"] == max(200 - others, others) / 200
    assert found["gold_majority"] == 0.7
    assert found["collapsed"] is collapsed


@pytest.mark.parametrize(
    "spread, collapsed", [(0, True), (0.004, True), (0.01, False), (1, False), (2, False)]
)
def test_a_model_that_says_one_score_only_is_flagged(spread, collapsed):
    gold = np.random.default_rng(0).random(300, np.float32) * 5
    found = evaluation.behaviour((2.5 + spread * (gold - gold.mean())).astype(np.float32), gold)
    assert found["spread"] == pytest.approx(spread, rel=1e-2, abs=1e-5)
    assert found["collapsed"] is collapsed
    assert json.dumps(found)  # it is stored with the run


def test_the_rarer_class_may_be_the_collapsed_one():
    found = evaluation.behaviour(logits([2] * 50, 3), np.array([0] * 49 + [2]))
    assert found == {"majority_share": 1.0, "gold_majority": 0.98, "collapsed": True}


# -- predictions -------------------------------------------------------------------------------


def one_by_one(student, data) -> np.ndarray:
    """The plain classifier's logits (texts, c), each text on its own: nothing is padded or packed."""
    kept = student.model.config._attn_implementation
    student.model.set_attn_implementation("eager")
    found = []
    with torch.no_grad():
        for tokens in data.tokens:
            found.append(
                student.model(input_ids=torch.from_numpy(tokens.astype(np.int64))[None])
                .logits[0]
                .numpy()
            )
    student.model.set_attn_implementation(kept)
    return np.stack(found)


@pytest.mark.parametrize("kind", ["class", "regression", "choice"])
@pytest.mark.parametrize("name", ["bert", "opt", "deberta"])
def test_predictions_stand_in_the_order_of_the_data(checkpoints, name, kind):
    """Packed (bert, opt) and padded (deberta), over several evaluation batches."""
    student = students.load(checkpoints[name], OUTPUTS[kind], 0, kind == "regression")
    method = METHODS["armada"].build(setting(kind), student)
    n = 2 * evaluation.EVAL_BATCH + 7
    data = rows(student, n if kind != "choice" else 2 * n, kind=kind)
    assert len(data) == n and student.packs == (name != "deberta")
    out = evaluation.predict(student.train(), method, data, bf16=False)

    expected = one_by_one(student, data).reshape((n,) if kind == "regression" else (n, 2))
    assert np.std(expected, axis=0).min() > 1e-2  # in another order it would not fit
    assert set(out) == {"student", "student_aux", "aligner", "aligner_aux"}
    for values in out.values():
        assert values.shape == expected.shape and values.dtype == np.float32
    np.testing.assert_allclose(out["student"], expected, atol=2e-5)

    with torch.no_grad():
        aligned = method.aligner(data.teacher.float())
        branch = student.branch
        hidden = [
            student(data.batch(np.array([i]), student.packs).inputs).hidden for i in range(n)
        ]  # two texts an example for a choice task
        aux = branch["aux_head"](branch["projection"](torch.cat(hidden)))
    for head, value in (
        ("aligner", aligned.logits),
        ("aligner_aux", aligned.aux_logits),
        ("student_aux", aux),
    ):
        np.testing.assert_allclose(out[head], value.numpy().reshape(expected.shape), atol=2e-5)


@pytest.mark.parametrize("name", ["bert", "deberta"])
def test_the_student_predicts_from_texts_alone(checkpoints, name):
    student = students.load(checkpoints[name], 2, 0)
    method = METHODS["armada"].build(setting(), student)
    data = rows(student, 40)
    whole = evaluation.predict(student, method, data, bf16=False)
    data.teacher = None
    alone = evaluation.predict(student, method, data, bf16=False)
    assert set(alone) == {"student", "student_aux"}
    np.testing.assert_array_equal(alone["student"], whole["student"])


def test_an_undistilled_student_has_one_head_and_dropout_is_off(checkpoints):
    student = students.load(checkpoints["bert"], 2, 0, dropout=0.5)
    method = METHODS["undistilled"].build(setting(), student)
    data = rows(student, 40)
    a, b = (evaluation.predict(student.train(), method, data, bf16=False) for _ in range(2))
    assert set(a) == {"student"}
    np.testing.assert_array_equal(a["student"], b["student"])


def test_half_precision_changes_little_and_gives_float32(checkpoints):
    student = students.load(checkpoints["bert"], 2, 0)
    method = METHODS["armada"].build(setting(), student)
    data = rows(student, 40)
    full, half = (evaluation.predict(student, method, data, bf16=b) for b in (False, True))
    for head in full:
        assert half[head].dtype == np.float32
        np.testing.assert_allclose(half[head], full[head], atol=0.1)
    assert np.abs(half["student"] - full["student"]).max() > 0
