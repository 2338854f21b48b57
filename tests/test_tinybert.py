"""TinyBERT: its two steps against sums written out text by text, and who learns in which."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from tiny import alike, killed_and_resumed, rows, same, setting, weights
from torch import Tensor

from armada_lib import engine, evaluation, losses, students
from armada_lib.batching import Encoded
from armada_lib.methods import Method
from armada_lib.methods.tinybert import TinyBERT, first_epochs
from armada_lib.profiles import StudentSpec

KINDS = ["class", "regression", "choice"]
OUT = {"class": 2, "regression": 1, "choice": 1}
CLOSE = dict(atol=1e-5, rtol=1e-4)


@dataclass
class Mentor:
    """A fine-tuned model, and what it says of the examples; enough of `methods.base.Mentor`."""

    model: students.Student
    data: Encoded
    logits: Tensor = field(init=False)
    means: Tensor = field(init=False)

    def __post_init__(self):
        g = torch.Generator().manual_seed(5)
        n, config = len(self.data.tokens), self.model.model.config
        self.layers, self.width = config.num_hidden_layers, config.hidden_size
        self.logits = torch.randn(n, self.model.outputs, generator=g) * 2
        self.means = torch.randn(n, self.layers + 1, self.width, generator=g).half()

    def tuned(self) -> students.Student:
        return copy.deepcopy(self.model)

    start = tuned


def network(checkpoints, kind="class", layers=2, width=32, heads=2, seed=0, dropout=0.0):
    """A student of the tests' vocabulary with random weights, this deep and wide."""
    spec: StudentSpec = checkpoints["bert"]
    student = students.load(spec, OUT[kind], seed, kind == "regression", dropout)
    config = copy.deepcopy(student.model.config)
    config.num_hidden_layers, config.hidden_size = layers, width
    config.num_attention_heads = heads
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = type(student.model)(config)
    return students.Student(model, student.tokenizer, None, kind == "regression")


def make(checkpoints, build=TinyBERT, kind="class", n=16, deep=4, wide=48, dropout=0.0, **kw):
    """(student, method, data) with a mentor of other depth and width."""
    student = network(checkpoints, kind, dropout=dropout)
    mentor = Mentor(network(checkpoints, kind, deep, wide, seed=9), rows(student, n, kind=kind))
    method = build(setting(kind, mentor=mentor, **kw), student)
    return student.train(), method, rows(student, n, kind=kind)


def batch_of(data, student, packed, picked=(3, 0, 7, 5, 2)):
    if not packed:
        student.model.set_attn_implementation("eager")
    return data.batch(np.array(picked), packed)


def said(method, student, batch, phase="joint"):
    return method.losses(batch, student(batch.inputs), phase, losses.mean_row)


@torch.no_grad()
def inside(student, ids):
    """(hidden states, scores) of one text, by the formula, from the model's own weights."""
    plain = copy.deepcopy(student).eval()
    plain.model.set_attn_implementation("eager")
    plain.early = False
    encoder = plain.model.bert
    ids = torch.from_numpy(ids.astype(np.int64))[None]
    states = encoder(input_ids=ids, output_hidden_states=True).hidden_states
    scores = []
    for h, layer in zip(states, encoder.encoder.layer, strict=False):
        own = layer.attention.self
        q, k = own.query(h)[0], own.key(h)[0]
        d = q.shape[1] // own.num_attention_heads
        scores.append(
            [q[:, i : i + d] @ k[:, i : i + d].T / d**0.5 for i in range(0, q.shape[1], d)]
        )
    return [h[0] for h in states], scores


@torch.no_grad()
def by_hand(student, mentor, fit, data, texts, at):
    """Step 1 with student layer l beside mentor layer at[l], token by token."""
    attention, hidden = np.zeros(2), np.zeros(2)  # sum of squares, count; per layer
    for i in texts:
        (h_s, a_s), (h_t, a_t) = (inside(m, data.tokens[i]) for m in (student, mentor))
        for own, other in enumerate(at):
            difference = h_s[own] @ fit.weight.T + fit.bias - h_t[other]
            hidden += [float(difference.square().sum()), difference.numel()]
            if own == 0:
                continue
            for x, y in zip(a_s[own - 1], a_t[other - 1], strict=True):
                cut = [torch.where(z > -100, z, torch.zeros(())) for z in (x, y)]
                attention += [float((cut[0] - cut[1]).square().sum()), x.numel()]
    layers = len(at) - 1
    return attention[0] / (attention[1] / layers), hidden[0] / (hidden[1] / (layers + 1))


@pytest.mark.parametrize("kind", ["class", "choice"])
@pytest.mark.parametrize("packed", [True, False])
def test_step_1_is_the_recipes_sum_over_layers(checkpoints, packed, kind):
    student, method, data = make(checkpoints, kind=kind)
    with torch.no_grad():  # scores on both sides of -100, at different places in the two models
        for model in (student, method.teacher):
            for layer in model.model.bert.encoder.layer:
                layer.attention.self.query.weight.mul_(60)
    batch = batch_of(data, student, packed)
    method.teacher.model.set_attn_implementation(student.model.config._attn_implementation)
    terms = said(method, student, batch)
    texts = batch.rows if kind == "class" else [t for r in batch.rows for t in (2 * r, 2 * r + 1)]
    low = [inside(m, data.tokens[texts[0]])[1][0][0].min() for m in (student, method.teacher)]
    assert max(low) < -100
    attention, hidden = by_hand(student, method.teacher, method.fit, data, texts, [0, 2, 4])
    assert set(terms) == {"attention", "hidden"}
    np.testing.assert_allclose(terms["attention"].item(), attention, rtol=1e-4)
    np.testing.assert_allclose(terms["hidden"].item(), hidden, rtol=1e-4)


def test_step_1_is_zero_for_a_student_that_is_its_mentor(checkpoints):
    student, method, data = make(checkpoints, deep=2, wide=32)
    method.teacher.load_state_dict(student.state_dict())
    with torch.no_grad():
        method.fit.weight.copy_(torch.eye(32))
    terms = said(method, student, batch_of(data, student, True))
    assert all(abs(t.item()) < 1e-9 for t in terms.values())


@pytest.mark.parametrize("kind", KINDS)
def test_step_2_is_a_soft_cross_entropy_at_temperature_1_or_the_gold_score(checkpoints, kind):
    student, method, data = make(checkpoints, kind=kind, tau=7.0)
    batch = batch_of(data, student, True)
    out = student(batch.inputs)
    terms = method.losses(batch, out, "student", losses.mean_row)
    total = 0.0
    z_t, z_s = method.mentor.logits.numpy(), out.logits.detach().numpy()
    for place, row in enumerate(batch.rows):
        if kind == "regression":
            total += (z_s[place, 0] - data.labels[row].item()) ** 2
            continue
        t, s = (z_t[row], z_s[place]) if kind == "class" else (
            z_t[2 * row : 2 * row + 2, 0], z_s[2 * place : 2 * place + 2, 0])  # fmt: skip
        p = [np.exp(z) / np.exp(z).sum() for z in (t, s)]
        total -= (p[0] * np.log(p[1])).sum()
    assert list(terms) == ["task" if kind == "regression" else "soft"]
    found = next(iter(terms.values())).item()
    np.testing.assert_allclose(found, total / len(batch.rows), rtol=1e-4)


def test_step_1_moves_encoder_and_map_and_step_2_the_student_alone(checkpoints):
    student, method, data = make(checkpoints)
    batch = batch_of(data, student, True)
    learns = lambda m: {n for n, p in m.named_parameters() if p.grad is not None and p.grad.any()}
    heads = {"model.bert.pooler.dense", "model.classifier"}
    head = lambda names: {n for n in names if n.rpartition(".")[0] in heads}

    sum(said(method, student, batch).values()).backward()
    found = learns(student)
    assert not head(found) and len(learns(method.fit)) == 2
    for part in ("embeddings.word_embeddings", "layer.0.output.dense", "layer.1.output.dense",
                 "layer.1.attention.self.query"):  # fmt: skip
        assert any(part in n for n in found)
    student.zero_grad()
    method.fit.zero_grad()
    sum(said(method, student, batch, "student").values()).backward()
    found = learns(student)
    assert len(head(found)) == 4 and any("word_embeddings" in n for n in found)
    assert not learns(method.fit)
    assert not any(p.requires_grad for p in method.teacher.parameters())
    assert not method.teacher.training


def test_step_1_uses_neither_labels_nor_logits(checkpoints):
    student, method, data = make(checkpoints)
    batch = batch_of(data, student, True)
    before = said(method, student, batch)
    batch.labels = 1 - batch.labels
    method.mentor.logits = method.mentor.logits.flip(1) * 3
    after = said(method, student, batch)
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_with_a_mentor_that_is_certain_and_right_step_2_alone_is_fine_tuning(checkpoints):
    found = []
    for build in (TinyBERT, Method):
        student, method, data = make(checkpoints, build, training={"layer_epochs": 0})
        method.setting.mentor.logits = torch.nn.functional.one_hot(data.labels, 2) * 1e4
        found.append(engine.train(student, method, data, method.setting.training, 0).curves)
    assert set(found[0]) == {"soft", "total", "grad_student"}
    np.testing.assert_allclose(found[0]["soft"], found[1]["task"], rtol=1e-3)


@pytest.mark.parametrize(
    "epochs, chosen, want",
    [
        (13, None, 10),
        (10, None, 8),
        (3, None, 2),
        (2, None, 1),
        (1, None, 0),
        (10, 0, 0),
        (4, 3, 3),
    ],
)
def test_epochs_are_split_as_stated(epochs, chosen, want):
    assert first_epochs(epochs, chosen) == want


def test_a_split_that_leaves_no_second_step_is_an_error():
    with pytest.raises(ValueError, match="layer_epochs 4 of 4 .* valid: 0 to 3"):
        first_epochs(4, 4)


@pytest.mark.parametrize("kind", KINDS)
def test_the_engine_trains_both_steps_and_leaves_a_plain_student(checkpoints, kind):
    student, method, data = make(
        checkpoints, kind=kind, n=32, training={"epochs": 8, "student_lr": 3e-3}
    )
    mentor = weights(method.teacher)
    trained = engine.train(student, method, data, method.setting.training, 0)
    assert [e["phase"] for e in trained.epochs] == ["joint"] * 6 + ["student"] * 2
    for name in ("attention", "hidden"):
        curve = trained.curves[name][np.isfinite(trained.curves[name])]
        assert curve[-2:].mean() < 0.8 * curve[:2].mean()
    assert same(mentor, weights(method.teacher)) and not method.parts
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in student.modules())
    assert student.early
    assert list(evaluation.predict(student, method, data, bf16=False)) == ["student"]


@pytest.mark.parametrize("at", [3, 6, 11])
def test_a_killed_run_ends_as_an_unkilled_one(checkpoints, monkeypatch, tmp_path, at):
    build = lambda: make(checkpoints, n=32, dropout=0.1, training={"epochs": 3})
    whole, resumed = killed_and_resumed(build, monkeypatch, tmp_path / "state", at)
    alike(whole, resumed)
    assert same(weights(whole[1].fit), weights(resumed[1].fit))


# -- bad input -----------------------------------------------------------------------------------


def test_without_a_mentor_it_says_so(checkpoints):
    with pytest.raises(ValueError, match="TinyBERT learns from a mentor"):
        TinyBERT(setting(), network(checkpoints))


def test_another_number_of_heads_is_an_error(checkpoints):
    student = network(checkpoints)
    mentor = Mentor(network(checkpoints, layers=4, width=48, heads=3), rows(student))
    with pytest.raises(ValueError, match="the student has 2 heads, the mentor 3"):
        TinyBERT(setting(mentor=mentor), student)


def test_another_vocabulary_is_an_error(checkpoints):
    student, model = network(checkpoints), network(checkpoints, seed=1)
    model.tokenizer = copy.deepcopy(model.tokenizer)
    model.tokenizer.add_tokens(["zebra"])
    with pytest.raises(ValueError, match="student and mentor need one vocabulary"):
        TinyBERT(setting(mentor=Mentor(model, rows(student))), student)


def test_other_tokens_are_an_error_before_the_first_step(checkpoints):
    student, method, data = make(checkpoints)
    short = [t[:5] for t in data.tokens]
    method.mentor.data = Encoded(short, None, data.labels, 1, 0)
    before = weights(student)
    with pytest.raises(ValueError, match=r"different tokens .* encode both alike \(max_length\)"):
        engine.train(student, method, data, method.setting.training, 0)
    assert same(before, weights(student))


def test_an_impossible_split_is_an_error_before_the_first_step(checkpoints):
    with pytest.raises(ValueError, match="layer_epochs 2 of 2"):
        make(checkpoints, training={"layer_epochs": 2})
