"""Students: the packed arrangement computes what padding computes; saved models predict the same."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import SENTENCES
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from armada_lib import students
from armada_lib.batching import Encoded
from armada_lib.profiles import Unknown


def encoded(student, pairs=False):
    second = SENTENCES[::-1] if pairs else None
    ids, types, _ = students.tokenise(student, SENTENCES, second, 64)
    return Encoded(ids, types, torch.zeros(len(SENTENCES), dtype=torch.long), 1, 0)


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("pooling", ["cls", "mean", "last"])
@pytest.mark.parametrize("name", ["bert", "opt"])
def test_packed_equals_padded(checkpoints, name, pooling, pairs):
    student = students.load(checkpoints[name].model_copy(update={"pooling": pooling}), 3, seed=0)
    student.add_branch(24, seed=1)
    data = encoded(student, pairs)
    student.eval()
    packed = data.batch(np.arange(8), packed=True)
    student_out = student(packed.inputs)
    student.model.set_attn_implementation("eager")
    padded = data.batch(packed.rows, packed=False)
    reference = student(padded.inputs)
    for a, b in zip(student_out, reference, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    if (name, pooling) != ("opt", "cls"):  # a causal model's first token has seen nothing else
        assert (student_out.logits[0] - student_out.logits[1]).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["bert", "deberta", "opt"])
@pytest.mark.parametrize("outputs", [1, 3])
def test_saved_student_is_a_plain_checkpoint_with_the_same_predictions(
    checkpoints, name, outputs, tmp_path
):
    student = students.load(checkpoints[name], outputs, seed=3, regression=outputs == 1)
    student.add_branch(768, seed=1)
    student.compact(np.arange(20))
    student.expand()
    student.eval()
    data = encoded(student)
    batch = data.batch(np.arange(8), student.packs)
    ours = student(batch.inputs).logits.detach()[np.argsort(batch.rows)]
    student.save_pretrained(tmp_path / "out")

    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        theirs = plain(**tokenizer(SENTENCES, padding=True, return_tensors="pt")).logits
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert not {k for k in plain.state_dict() if "projection" in k or "aux_head" in k}
    wanted = "regression" if outputs == 1 else "single_label_classification"
    assert plain.config.problem_type == wanted


def test_a_pooling_that_the_plain_class_lacks_refuses_to_save(checkpoints, tmp_path):
    student = students.load(checkpoints["bert"].model_copy(update={"pooling": "mean"}), 2, seed=0)
    with pytest.raises(ValueError, match="pooling 'mean' has no plain bert classifier"):
        student.save_pretrained(tmp_path)


def test_unknown_architecture_names_the_valid_ones(checkpoints):
    with pytest.raises(Unknown, match=r"'gpt2'.*bert, deberta-v2, opt"):
        students.load(checkpoints["gpt2"], 2, seed=0)


def test_compact_vocabulary_changes_no_number_and_expands_with_the_trained_rows(checkpoints):
    student = students.load(checkpoints["bert"], 2, seed=0, dropout=0.0)
    data = encoded(student)
    before = student(data.batch(np.arange(8), True).inputs).logits
    whole = student.model.get_input_embeddings().weight.detach().clone()
    used = np.unique(np.concatenate(data.tokens))
    remap = student.compact(used).numpy()
    assert student.model.get_input_embeddings().num_embeddings == len(used) < len(whole)
    data.tokens = [remap[t] for t in data.tokens]
    torch.testing.assert_close(student(data.batch(np.arange(8), True).inputs).logits, before)
    with torch.no_grad():
        student.model.get_input_embeddings().weight += 1
    student.expand()
    now = student.model.get_input_embeddings().weight
    touched = torch.zeros(len(whole), dtype=torch.bool)
    touched[torch.from_numpy(used).long()] = True
    torch.testing.assert_close(now[touched], whole[touched] + 1)
    assert torch.equal(now[~touched], whole[~touched])


@pytest.mark.parametrize("shared", [16, 32, 768])
def test_the_branch_starts_orthogonal_and_leaves_the_global_rng_alone(checkpoints, shared):
    student = students.load(checkpoints["bert"], 2, seed=0)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    student.add_branch(shared, seed=1)
    assert torch.equal(torch.rand(3), expected)
    w = student.branch["projection"].weight
    gram = w @ w.T if shared <= 32 else w.T @ w
    torch.testing.assert_close(gram, torch.eye(len(gram)), atol=1e-5, rtol=0)


def test_texts_over_the_limit_are_cut_and_counted(checkpoints):
    student = students.load(checkpoints["bert"], 2, seed=0)
    ids, _, cut = students.tokenise(student, ["the cat sat", "the " * 200, "a dog " * 3], None, 8)
    assert cut == 1
    assert [len(i) for i in ids] == [5, 8, 8]


def test_pooling_last_reads_the_last_token_and_mean_the_mean(checkpoints):
    """Against hidden states computed text by text, without any padding."""
    for pooling, pick in (
        ("cls", lambda h: h[0]),
        ("last", lambda h: h[-1]),
        ("mean", lambda h: h.mean(0)),
    ):
        student = students.load(
            checkpoints["bert"].model_copy(update={"pooling": pooling}), 2, seed=0
        ).eval()
        data = encoded(student)
        batch = data.batch(np.arange(8), True)
        pooled = student.pooled(batch.inputs)
        student.model.set_attn_implementation("eager")
        for row, text in zip(pooled, batch.rows, strict=True):
            ids = torch.from_numpy(data.tokens[text].astype(np.int64))[None]
            states = student.model.bert(input_ids=ids).last_hidden_state[0]
            torch.testing.assert_close(row, pick(states), atol=1e-5, rtol=1e-5)
