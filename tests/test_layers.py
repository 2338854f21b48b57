"""Watching layers: equal to transformers' own hidden states and attentions, text by text."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from conftest import SENTENCES

from armada_lib import students
from armada_lib.batching import Encoded
from armada_lib.methods.layers import Watch, layer_map, pairs


def load(checkpoints, pooling=None, seed=0):
    spec = checkpoints["bert"].model_copy(update={"pooling": pooling})
    return students.load(spec, 2, seed, dropout=0.0)


def encoded(student, per=1):
    ids, types, _ = students.tokenise(student, SENTENCES, None, 64)
    labels = torch.zeros(len(ids) // per, dtype=torch.long)
    return Encoded(ids, types, labels, per, 0)


def text_by_text(student, data, rows, per):
    """[(hidden states (layers + 1, t, d), attentions (layers, heads, t, t))] without any padding."""
    plain = copy.deepcopy(student)
    plain.model.set_attn_implementation("eager")
    plain.early = False
    found = []
    for text in (r * per + j for r in rows for j in range(per)):
        ids = torch.from_numpy(data.tokens[text].astype(np.int64))[None]
        out = plain.model.bert(input_ids=ids, output_hidden_states=True, output_attentions=True)
        found.append((torch.cat(out.hidden_states), torch.cat(out.attentions)))
    return found


@pytest.mark.parametrize("per", [1, 2])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("whole", [True, False])
def test_vectors_are_those_of_each_text_alone(checkpoints, packed, whole, per):
    student = load(checkpoints)
    data = encoded(student, per)
    batch = data.batch(np.array([3, 0, 2, 1] if per == 2 else [4, 1, 7, 0, 2]), packed)
    want = text_by_text(student, data, batch.rows, per)
    if not packed:
        student.model.set_attn_implementation("eager")
    watch = Watch(student, whole=whole)
    out = student.train()(batch.inputs)
    close = dict(atol=1e-5, rtol=1e-5)
    first = torch.stack([h[:, 0] for h, _ in want])
    torch.testing.assert_close(watch.first(batch.inputs), first, **close)
    torch.testing.assert_close(watch.first(batch.inputs, [2, 0]), first[:, [2, 0]], **close)
    rows = out.hidden, student.model.bert.pooler(watch.first(batch.inputs)[:, -1:])
    torch.testing.assert_close(*rows, **close)  # the order of the student's own output
    mean = torch.stack([h.mean(1) for h, _ in want])
    torch.testing.assert_close(watch.mean(batch.inputs, [1, 0]), mean[:, [1, 0]], **close)
    if whole or not packed:
        torch.testing.assert_close(watch.mean(batch.inputs), mean, **close)
    else:
        with pytest.raises(ValueError, match=r"pooled tokens alone; use Watch\(whole=True\)"):
            watch.mean(batch.inputs)


@pytest.mark.parametrize("packed", [True, False])
def test_scores_are_what_attention_takes_the_softmax_of(checkpoints, packed):
    student = load(checkpoints)
    data = encoded(student)
    batch = data.batch(np.arange(8), packed)
    want = text_by_text(student, data, batch.rows, 1)
    if not packed:
        student.model.set_attn_implementation("eager")
    watch = Watch(student, whole=True, attention=True)
    student.train()(batch.inputs)
    lengths = [a.shape[-1] for _, a in want]
    assert len(set(lengths)) > 3
    for layer in (1, 2):
        scores = watch.scores(batch.inputs, layer)
        assert len(scores) == (4 if packed else 1)
        texts = [t for group in scores for t in group]
        assert len(texts) == 8
        for t, n, (_, attention) in zip(texts, lengths, want, strict=True):
            got = t[:, :n, :n].softmax(-1)
            torch.testing.assert_close(got, attention[layer - 1], atol=1e-5, rtol=1e-5)
            assert (t[:, n:] == 0).all() and (t[:, :, n:] == 0).all()
            assert t[:, :n, :n].abs().min() > 0
    assert pairs(batch.inputs).item() == sum(n * n for n in lengths)


def test_gradients_reach_the_student_through_states_and_scores(checkpoints):
    student = load(checkpoints)
    batch = encoded(student).batch(np.arange(8), True)
    watch = Watch(student, whole=True, attention=True)
    student.train()(batch.inputs)
    layers = student.model.bert.encoder.layer
    sum(s.square().sum() for s in watch.scores(batch.inputs, 1)).backward(retain_graph=True)
    assert layers[0].attention.self.query.weight.grad.abs().sum() > 0
    assert layers[0].output.dense.weight.grad is None  # the first scores come before it
    watch.mean(batch.inputs, [2]).square().sum().backward()
    assert layers[1].output.dense.weight.grad.abs().sum() > 0


def test_whole_costs_nothing_in_evaluation_and_is_undone_by_close(checkpoints):
    student = load(checkpoints)
    batch = encoded(student).batch(np.arange(8), True)
    seen = []
    student.model.bert.encoder.layer[1].register_forward_hook(
        lambda m, a, out: seen.append(out.shape[1])
    )
    tokens = batch.inputs["input_ids"].shape[1]
    watch = Watch(student, whole=True, attention=True)
    student.train()(batch.inputs)
    assert len(watch.states) == 3
    trained = student(batch.inputs).logits
    student.eval()(batch.inputs)
    assert watch.states == []
    with pytest.raises(ValueError, match="not in training mode"):
        watch.first(batch.inputs)
    torch.testing.assert_close(student(batch.inputs).logits, trained, atol=1e-5, rtol=1e-5)
    student.train()(batch.inputs)
    watch.on = False
    student(batch.inputs)
    watch.on = True
    student(batch.inputs)
    watch.close()
    student(batch.inputs)
    assert seen == [tokens, tokens, 8, 8, tokens, 8, tokens, 8] and watch.states == []
    assert student.early
    hooks = lambda m: len(m._forward_hooks) + len(m._forward_pre_hooks)
    assert sum(hooks(m) for m in student.modules()) == 1  # the one of this test


def test_always_watches_a_model_that_is_only_read(checkpoints):
    student = load(checkpoints).eval()
    data = encoded(student)
    batch = data.batch(np.arange(8), True)
    watch = Watch(student, whole=True, always=True)
    with torch.no_grad():
        student(batch.inputs)
    want = torch.stack([h.mean(1) for h, _ in text_by_text(student, data, batch.rows, 1)])
    torch.testing.assert_close(watch.mean(batch.inputs), want, atol=1e-5, rtol=1e-5)


def test_a_copy_and_a_pickle_of_the_model_work_and_are_not_watched(checkpoints):
    student = load(checkpoints).train()
    data = encoded(student)
    batch, other = data.batch(np.arange(8), True), data.batch(np.arange(3), True)
    watch = Watch(student, whole=True, attention=True)
    logits = student(batch.inputs).logits
    kept = [s.clone() for s in watch.states]
    twins = [copy.deepcopy(student), copy.deepcopy(student).eval()]
    whole = pickle.loads(pickle.dumps(student.model.bert.embeddings))
    whole(other.inputs["input_ids"])
    for twin in twins:
        twin(other.inputs)
        torch.testing.assert_close(twin(batch.inputs).logits, logits, atol=1e-5, rtol=1e-5)
    assert len(watch.states) == 3
    assert all(torch.equal(a, b) for a, b in zip(kept, watch.states, strict=True))
    a = dict(student.named_parameters())
    assert not any(p is a[n] for n, p in twins[0].named_parameters())


def test_pooling_other_than_the_first_token_has_no_first_vector_after_the_last_layer(checkpoints):
    student = load(checkpoints, "last").train()
    batch = encoded(student).batch(np.arange(8), True)
    watch = Watch(student)
    student(batch.inputs)
    assert watch.first(batch.inputs, [0, 1]).shape == (8, 2, 32)
    with pytest.raises(ValueError, match="pooled tokens alone"):
        watch.first(batch.inputs)


def test_attention_that_was_not_watched_or_only_in_part_is_an_error(checkpoints):
    student = load(checkpoints).train()
    batch = encoded(student).batch(np.arange(8), True)
    watch = Watch(student)
    student(batch.inputs)
    with pytest.raises(ValueError, match="Watch\\(attention=True\\)"):
        watch.scores(batch.inputs, 1)
    watch.close()
    watch = Watch(student, attention=True)
    student(batch.inputs)
    assert len(watch.scores(batch.inputs, 1)) == 4
    with pytest.raises(ValueError, match="queries for the pooled tokens alone"):
        watch.scores(batch.inputs, 2)


@pytest.mark.parametrize("name", ["deberta", "opt"])
def test_other_architectures_are_refused_by_name(checkpoints, name):
    with pytest.raises(ValueError, match=r"cannot be watched; valid: bert"):
        Watch(students.load(checkpoints[name], 2, 0))


@pytest.mark.parametrize(
    "student, mentor, want",
    [(6, 12, [0, 2, 4, 6, 8, 10, 12]), (3, 6, [0, 2, 4, 6]), (4, 4, [0, 1, 2, 3, 4]),
     (4, 6, [0, 2, 3, 5, 6]), (2, 9, [0, 5, 9]), (4, 2, [0, 1, 1, 2, 2])],
)  # fmt: skip
def test_layers_are_mapped_evenly(student, mentor, want):
    assert layer_map(student, mentor) == want
