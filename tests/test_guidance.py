"""Visual Guidance: its dictionary and its merged vectors by hand, and what it reads at test time."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from test_tinybert import KINDS, OUT
from tiny import WIDTH, alike, killed_and_resumed, rows, same, setting, weights

from armada_lib import engine, evaluation, losses, students
from armada_lib.batching import Encoded
from armada_lib.methods import Method
from armada_lib.methods.guidance import FILE, VisualGuidance, dictionary, restore, words
from armada_lib.profiles import StudentSpec


def make(
    checkpoints,
    build=VisualGuidance,
    kind="class",
    n=16,
    dropout=0.0,
    pooling=None,
    compact=False,
    **kw,
):
    """(student, method, data)"""
    s = setting(kind, **kw)
    spec = StudentSpec(name="tiny", checkpoint=checkpoints["bert"].checkpoint, pooling=pooling)
    student = students.load(spec, OUT[kind], s.seed, kind == "regression", dropout)
    data = rows(student, n, kind=kind)
    if compact:
        used = np.unique(np.concatenate([*data.tokens, np.array([0])]))
        new = student.compact(used).numpy().astype(np.int32)
        data.tokens = [new[t] for t in data.tokens]
    method = build(s, student)
    method.attach(data)
    return student, method, data


def stir(guide):
    """Weights that make every part of the formula count."""
    g = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for p in guide.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * 0.3)


# -- the dictionary --------------------------------------------------------------------------------


def test_a_picture_is_filed_under_the_heaviest_words_of_its_text():
    # Of 4 texts word 1 is in all (weighs nothing), 2 and 5 in two (log 2), 3, 4 and 6 in one (log 4).
    texts = [[1, 2, 2, 3], [1, 2, 5], [1, 4, 5, 5, 5, 5], [1, 6]]
    assert dictionary(texts, 1, 3) == {2: [0, 1], 5: [2], 6: [3]}
    want = {2: [0, 1], 3: [0], 5: [2, 1], 4: [2], 6: [3], 1: [3]}
    assert dictionary(texts, 2, 3) == want
    assert dictionary(texts, 2, 1) == {word: found[:1] for word, found in want.items()}
    assert dictionary(texts, 5, 2)[1] == [0, 1]
    assert dictionary([[], [7]]) == {7: [1]}


def test_words_are_pieces_of_letters_that_begin_a_word_and_say_something(checkpoints):
    student = students.load(checkpoints["bert"], 2, 0)
    student.tokenizer.add_tokens(["##ing", "42", "cat-dog"])
    vocab = student.tokenizer.get_vocab()
    known = words(student.tokenizer, len(vocab))
    for piece in ("cat", "dog", "house", "quickly", "red"):
        assert known[vocab[piece]]
    for piece in ("the", "on", "not", "is", "[CLS]", "[MASK]", "[UNK]", "##ing", "42", "cat-dog"):
        assert not known[vocab[piece]]


def test_a_word_has_the_mean_of_its_texts_pictures(checkpoints):
    student, method, data = make(checkpoints, n=32)
    vocab = student.tokenizer.get_vocab()
    stop = {"on", "under", "not"}
    listed = [
        [w for w in student.tokenizer.convert_ids_to_tokens(t.tolist()) if w[0] != "[" and w not in stop]
        for t in data.tokens
    ]  # fmt: skip
    found = dictionary([[vocab[w] for w in t] for t in listed])
    assert method.facts() == {"pictured_words": len(found)} and len(found) > 5
    for word, texts in found.items():
        mean = data.teacher[texts].float().mean(0)
        torch.testing.assert_close(
            method.guide.pictures[method.guide.row[word]].float(), mean, atol=2e-3, rtol=2e-3
        )
    assert (method.guide.row >= 0).sum() == len(found)


# -- the merged vectors ----------------------------------------------------------------------------


@torch.no_grad()
def by_hand(student, guide, tokens):
    """H' of one text's pooled vector, and its logits, from the layers' weights."""
    plain = copy.deepcopy(student).eval()
    plain.model.set_attn_implementation("eager")
    plain.early = False
    states = plain.model.bert(
        input_ids=torch.from_numpy(tokens.astype(np.int64))[None]
    ).last_hidden_state[0]
    full = tokens if student._used is None else student._used.numpy()[tokens]
    pictured = [int(guide.row[i]) for i in full if guide.row[i] >= 0]
    lin = lambda layer, x: x @ layer.weight.T + (0 if layer.bias is None else layer.bias)
    merged = []
    for h in states:
        c = torch.zeros_like(h)
        if pictured:
            wq = [lin(guide.match, lin(guide.project, guide.pictures[r].float())) for r in pictured]
            a = np.exp([float(h @ k) for k in wq])
            c = sum(float(x) * k for x, k in zip(a / a.sum(), wq, strict=True))
        g = 1 / (1 + torch.exp(-(lin(guide.own, h) + lin(guide.seen, c))))
        merged.append(h + g * c)
    pooled = torch.stack(merged).mean(0) if student.pooling == "mean" else merged[0]
    return pooled, plain.model.classifier(plain.model.bert.pooler(pooled[None, None]))[0]


@pytest.mark.parametrize(
    "kind, packed, pooling, compact",
    [
        ("class", True, None, False),
        ("class", False, None, False),
        ("choice", True, None, True),
        ("class", True, "mean", True),
        ("class", False, "mean", False),
        ("choice", True, "mean", False),
        ("regression", True, None, True),
    ],
)
@torch.no_grad()
def test_the_student_pools_the_recipes_vectors(checkpoints, kind, packed, pooling, compact):
    student, method, data = make(checkpoints, kind=kind, pooling=pooling, compact=compact)
    stir(method.guide)
    student.eval()
    if not packed:
        student.model.set_attn_implementation("eager")
    batch = data.batch(np.array([3, 0, 7, 5, 2]), packed)
    texts = batch.rows if kind != "choice" else np.stack([2 * batch.rows, 2 * batch.rows + 1], 1)
    pooled, out = student.pooled(batch.inputs), student(batch.inputs)
    for i, text in enumerate(texts.reshape(-1)):
        want, logits = by_hand(student, method.guide, data.tokens[text])
        torch.testing.assert_close(pooled[i], want, atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(out.logits[i], logits, atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_a_text_without_a_pictured_word_is_read_as_it_is(checkpoints):
    student, method, _ = make(checkpoints)
    stir(method.guide)
    student.eval()
    vocab = student.tokenizer.get_vocab()
    plain = [vocab[w] for w in ("[CLS]", "the", "on", "not", "[SEP]")]
    told = [vocab[w] for w in ("[CLS]", "cat", "on", "not", "[SEP]")]
    texts = [np.array(t, dtype=np.int32) for t in (plain, told)]
    batch = Encoded(texts, None, torch.zeros(2), 1, 0).batch(np.arange(2), True)
    own, merged = students.Student.pooled(student, batch.inputs), student.pooled(batch.inputs)
    assert torch.equal(own[0], merged[0]) and not torch.allclose(own[1], merged[1])


# -- training --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_dictionary_it_is_undistilled_fine_tuning(checkpoints, kind, monkeypatch):
    found = []
    for build in (VisualGuidance, Method):
        monkeypatch.setattr("armada_lib.methods.guidance.dictionary", lambda texts: {})
        student, method, data = make(checkpoints, build, kind, n=24)
        trained = engine.train(student, method, data, method.setting.training, 0)
        found.append((student.model, trained.curves["task"]))
    assert same(weights(found[0][0]), weights(found[1][0]))
    np.testing.assert_array_equal(found[0][1], found[1][1])


def test_all_but_the_pictures_learns_from_the_task(checkpoints):
    student, method, data = make(checkpoints)
    batch = data.batch(np.arange(8), True)
    before = method.guide.pictures.clone()
    terms = method.losses(batch, student.train()(batch.inputs), "joint", losses.mean_row)
    assert list(terms) == ["task"]
    terms["task"].backward()
    learns = {n for n, p in method.guide.named_parameters() if p.grad is not None and p.grad.any()}
    assert learns == {n for n, _ in method.guide.named_parameters()} and len(learns) == 6
    assert student.model.bert.encoder.layer[0].output.dense.weight.grad.any()
    assert torch.equal(before, method.guide.pictures) and not method.guide.pictures.requires_grad


def test_pictures_are_of_training_words_and_never_of_the_text_that_is_read(checkpoints):
    student, method, data = make(checkpoints)
    stir(method.guide)
    first = evaluation.predict(student, method, data, bf16=False)["student"]
    bare = Encoded(data.tokens, data.types, data.labels, 1, 0)
    np.testing.assert_array_equal(
        first, evaluation.predict(student, method, bare, bf16=False)["student"]
    )
    data.teacher = data.teacher * -2
    method.attach(data)  # other pictures of the training texts
    assert not np.allclose(first, evaluation.predict(student, method, bare, bf16=False)["student"])


def test_training_lowers_the_loss_and_the_guide_stays(checkpoints):
    student, method, data = make(
        checkpoints, n=32, training={"epochs": 6, "student_lr": 3e-3, "select": "best"}
    )
    start = weights(method.guide)
    judge = lambda: (
        -float(np.abs(evaluation.predict(student, method, data, bf16=False)["student"]).mean())
    )
    trained = engine.train(student, method, data, method.setting.training, 0, evaluate=judge)
    assert trained.curves["task"][-4:].mean() < 0.7 * trained.curves["task"][:4].mean()
    assert not method.parts and student.guide is method.guide
    assert not any(torch.equal(start[k], v) for k, v in weights(method.guide).items())
    assert trained.diagnostics["pictured_words"] > 5
    with torch.no_grad():
        before = evaluation.predict(student, method, data, bf16=False)["student"]
        method.guide.pictures.zero_()
        after = evaluation.predict(student, method, data, bf16=False)["student"]
    assert not np.allclose(before, after)


@pytest.mark.parametrize("at", [1, 5])
def test_a_killed_run_ends_as_an_unkilled_one(checkpoints, monkeypatch, tmp_path, at):
    build = lambda: make(checkpoints, n=24, dropout=0.1, training={"epochs": 2})
    whole, resumed = killed_and_resumed(build, monkeypatch, tmp_path / "state", at)
    alike(whole, resumed)
    assert same(weights(whole[1].guide), weights(resumed[1].guide))


def test_the_guide_is_drawn_from_the_seed_and_draws_nothing_outside(checkpoints):
    state = torch.get_rng_state()
    one = weights(make(checkpoints)[1].guide)
    torch.set_rng_state(state)
    torch.rand(5)
    assert same(one, weights(make(checkpoints)[1].guide))
    assert not same(one, weights(make(checkpoints, seed=1)[1].guide))


def test_a_copy_of_the_student_has_a_guide_of_its_own(checkpoints):
    student, method, data = make(checkpoints)
    stir(method.guide)
    other = copy.deepcopy(student)
    batch = data.batch(np.arange(4), True)
    with torch.no_grad():
        want = other.eval()(batch.inputs).logits
        torch.testing.assert_close(want, student.eval()(batch.inputs).logits)
        method.guide.project.weight.zero_()
        assert torch.equal(other(batch.inputs).logits, want)
        assert not torch.allclose(student(batch.inputs).logits, want)


# -- export ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("compact", [True, False])
def test_what_is_saved_predicts_the_same(checkpoints, tmp_path, compact):
    student, method, data = make(checkpoints, compact=compact)
    full = data if student._used is None else [student._used.numpy()[t] for t in data.tokens]
    stir(method.guide)
    method.finish()
    want = evaluation.predict(student, method, data, bf16=False)["student"]
    student.save_pretrained(tmp_path)
    assert (tmp_path / FILE).exists()

    tokens = data.tokens if full is data else full
    bare = Encoded([np.asarray(t, np.int32) for t in tokens], data.types, data.labels, 1, 0)
    spec = StudentSpec(name="saved", checkpoint=str(tmp_path))
    plain = students.load(spec, 2, seed=5)
    reader = Method(setting(), plain)
    without = evaluation.predict(plain, reader, bare, bf16=False)["student"]
    assert not np.allclose(without, want, atol=1e-3)
    guided = restore(plain, tmp_path)
    found = evaluation.predict(guided, reader, bare, bf16=False)["student"]
    np.testing.assert_allclose(found, want, atol=1e-5)
    again = evaluation.predict(student, method, bare, bf16=False)["student"]  # it is expanded now
    np.testing.assert_allclose(again, want, atol=1e-5)
    assert guided.guide.pictures.shape[1] == WIDTH


def test_restoring_what_was_not_saved_is_an_error(checkpoints, tmp_path):
    with pytest.raises(FileNotFoundError, match="no guide was saved"):
        restore(students.load(checkpoints["bert"], 2, 0), tmp_path)


# -- bad input -------------------------------------------------------------------------------------


def test_texts_without_pictures_are_an_error_before_the_first_step(checkpoints):
    student, method, data = make(checkpoints)
    data.teacher = None
    with pytest.raises(ValueError, match="the training texts have none"):
        engine.train(student, method, data, method.setting.training, 0)
