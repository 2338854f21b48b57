"""Two networks that learn together: what each minimises, who moves, and what is left without it."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from tiny import alike, killed_and_resumed, rows, same, setting, weights

from armada_lib import engine, students
from armada_lib.batching import Encoded
from armada_lib.methods import Method
from armada_lib.methods.mutual import DML, ProKT, counterpart, twin
from armada_lib.profiles import StudentSpec

KINDS = ["class", "regression", "choice"]
OUT = {"class": 2, "regression": 1, "choice": 1}


@dataclass
class Mentor:
    """A model before its fine-tuning, and the examples as it reads them."""

    model: students.Student
    data: Encoded

    def start(self) -> students.Student:
        return copy.deepcopy(self.model)


def load(spec: StudentSpec, kind: str, seed: int, dropout: float | None = 0.0):
    return students.load(spec, OUT[kind], seed, kind == "regression", dropout)


def make(checkpoints, method=DML, kind="class", other="bert", dropout=0.0, n=16, **kw):
    """(student, method, data) with a mentor from the checkpoint `other`."""
    options = kw.pop("options", {})
    student = load(checkpoints["bert"], kind, 0, dropout)
    model = load(checkpoints[other], kind, 5, dropout)
    with torch.no_grad():  # another pre-trained model, not the student's
        for p in model.parameters():
            p.mul_(0.9)
    data = rows(student, n, kind=kind)
    s = setting(kind, **{"training": {"dropout": dropout}, **kw})
    s = dataclasses.replace(s, mentor=Mentor(model, rows(model, n, kind=kind)))
    return student, method(s, student, **options), data


class Steps:
    """Stands for the engine: keeps the gradients, and makes a plain gradient step of size `lr`."""

    def __init__(self, method, lr=0.1):
        self.method, self.lr, self.calls, self.grads = method, lr, [], {}

    @torch.no_grad()
    def __call__(self, name: str) -> torch.Tensor:
        self.calls.append(name)
        for key, p in self.method.partners[name].named_parameters():
            if p.grad is not None:
                self.grads[key] = p.grad.clone()
                p -= self.lr * p.grad
                p.grad = None
        return torch.zeros(())


def log_p(z: torch.Tensor, kind: str) -> torch.Tensor:
    return (z.view(-1, 2) if kind == "choice" else z).log_softmax(-1)


def task(z: torch.Tensor, y: torch.Tensor, kind: str) -> torch.Tensor:
    """Cross-entropy by hand, or the squared error of a score."""
    if kind == "regression":
        return ((z[:, 0] - y) ** 2).mean()
    return -log_p(z, kind)[torch.arange(len(y)), y].mean()


def kl(p: torch.Tensor, q: torch.Tensor, kind: str) -> torch.Tensor:
    """KL(p || q) summed over classes, mean over examples; squared difference of scores."""
    if kind == "regression":
        return ((p - q) ** 2).mean()
    a, b = log_p(p, kind), log_p(q, kind)
    return (a.exp() * (a - b)).sum(1).mean()


def grads(loss: torch.Tensor, module) -> dict[str, torch.Tensor]:
    named = dict(module.named_parameters())
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {k: g for k, g in zip(named, found, strict=True) if g is not None}


def close(a: dict, b: dict) -> None:
    assert a.keys() == b.keys() and a
    for k in a:
        torch.testing.assert_close(a[k], b[k], rtol=1e-4, atol=1e-6)


# -- the losses, from the recipe -----------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_dml_is_the_recipe(checkpoints, kind):
    student, m, data = make(checkpoints, kind=kind, alpha=0.7)
    batch = data.batch(np.arange(6), True)
    inputs = m.data.batch(np.arange(6), True).inputs  # the same vocabulary: the same order
    out, step = student(batch.inputs), Steps(m)
    z_s, z_p = out.logits.detach(), m.peer(inputs).logits
    expected = grads(task(z_p, batch.labels, kind) + 0.7 * kl(z_s, z_p, kind), m.peer)
    before = weights(m.peer)
    m.turn(batch, out, step)
    assert step.calls == ["peer"]
    close(step.grads, expected)
    assert not same(before, weights(m.peer))
    terms = m.losses(batch, out, "joint", None)
    again = m.peer(inputs).logits.detach()  # after its step
    torch.testing.assert_close(terms["task"], task(out.logits, batch.labels, kind))
    torch.testing.assert_close(terms["soft"], 0.7 * kl(again, out.logits, kind))
    assert (again - z_p).abs().max() > 1e-3 and set(terms) == {"task", "soft"}


@pytest.mark.parametrize("kind", KINDS)
def test_prokt_is_the_recipe(checkpoints, kind):
    student, m, data = make(checkpoints, ProKT, kind=kind, alpha=0.3)
    with torch.no_grad():  # past the first step, where a head of zeros hides the rest
        student.family.head(student.model).weight.normal_()
        m.teacher.family.head(m.teacher.model).weight.normal_()
    batch = data.batch(np.arange(6), True)
    inputs = m.data.batch(np.arange(6), True).inputs
    out, step = student(batch.inputs), Steps(m, 0.01)
    z_s, z_t = out.logits.detach(), m.teacher(inputs).logits
    expected = grads(0.7 * task(z_t, batch.labels, kind) + 0.3 * kl(z_s, z_t, kind), m.teacher)
    m.turn(batch, out, step)
    assert step.calls == ["teacher"]
    close(step.grads, expected)
    terms = m.losses(batch, out, "joint", None)
    again = m.teacher(inputs).logits.detach()
    assert set(terms) == {"soft"} and (again - z_t).abs().max() > 1e-4
    torch.testing.assert_close(terms["soft"], kl(again, out.logits, kind))
    batch.labels.fill_(1)  # the student's loss does not read them
    torch.testing.assert_close(m.losses(batch, out, "joint", None)["soft"], terms["soft"])


@pytest.mark.parametrize("method", [DML, ProKT])
def test_each_network_gets_its_own_gradient_only(checkpoints, method):
    student, m, data = make(checkpoints, method, alpha=0.5)
    batch = data.batch(np.arange(6), True)
    out, step = student(batch.inputs), Steps(m)
    m.turn(batch, out, step)
    assert step.grads and all(p.grad is None for p in student.parameters())
    partner = next(iter(m.partners.values()))
    terms = m.losses(batch, out, "joint", None)
    torch.stack(list(terms.values())).sum().backward()
    assert all(p.grad is None for p in partner.parameters())
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in student.parameters())


# -- dropout and order ---------------------------------------------------------------------------


def test_prokt_reads_targets_without_dropout_and_learns_with_it(checkpoints):
    student, m, data = make(checkpoints, ProKT, alpha=1.0, dropout=0.5)
    with torch.no_grad():
        for model in (student, m.teacher):
            model.family.head(model.model).weight.normal_()
    student.train()
    batch = data.batch(np.arange(6), True)
    out = student(batch.inputs)
    seen = [m.losses(batch, out, "joint", None)["soft"].item() for _ in range(2)]
    assert seen[0] == seen[1]
    modes = []
    m.forward = lambda model, inputs: (
        modes.append((model is student, model.training)) or model(inputs)
    )
    m.turn(batch, out, Steps(m))
    assert modes == [(False, True), (True, False)]
    assert student.training and all(x.training for x in student.modules())


@pytest.mark.parametrize("kind", ["class", "regression"])
def test_a_partner_with_other_tokens_answers_in_the_students_order(checkpoints, kind):
    _, m, data = make(checkpoints, kind=kind)
    lengths = np.random.default_rng(3).permutation(len(data)) + 3
    m.data.tokens = [np.full(k, 7 + k % 5, dtype=np.int32) for k in lengths]
    m.data.types = None
    m.data.__post_init__()
    batch = data.batch(np.array([4, 1, 9, 12, 0]), True)
    other, place = counterpart(batch, m.data, True)
    assert (other.rows[place.numpy()] == batch.rows).all() and (other.rows != batch.rows).any()
    one = [m.shape(m.peer(m.data.batch(np.array([r]), True).inputs).logits) for r in batch.rows]
    torch.testing.assert_close(m._peer(batch), torch.cat(one), rtol=1e-4, atol=1e-5)


# -- limits --------------------------------------------------------------------------------------


def run(student, m, data, **kw):
    return engine.train(student, m, data, m.setting.training, m.setting.seed, **kw)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_dml_without_the_pull_is_undistilled_bit_for_bit(checkpoints, dropout):
    student, m, data = make(checkpoints, alpha=0.0, dropout=dropout)
    run(student, m, data)
    plain = load(checkpoints["bert"], "class", 0, dropout)
    run(plain, Method(m.setting, plain), data)
    assert same(weights(student), weights(plain))
    other, m, data = make(checkpoints, alpha=1.0, dropout=dropout)
    run(other, m, data)
    assert not same(weights(other), weights(plain))


def test_prokt_with_lambda_zero_fine_tunes_the_teacher_plainly(checkpoints):
    student, m, data = make(checkpoints, ProKT, alpha=0.0)
    m.learning_rate = lambda part: 1e-3
    alone, own = m.setting.mentor.start(), m.data
    head = alone.family.head(alone.model)
    torch.nn.init.zeros_(head.weight), torch.nn.init.zeros_(head.bias)
    run(student, m, data)
    run(alone, Method(m.setting, alone), own)
    assert same(weights(m.teacher), weights(alone))


def test_a_far_sighted_prokt_teacher_only_follows_the_student(checkpoints):
    # lambda 1 and equal outputs: nothing to learn for either
    training = {"dropout": 0.0, "weight_decay": 0.0}
    student, m, data = make(checkpoints, ProKT, alpha=1.0, training=training)
    start = weights(m.teacher)
    run(student, m, data)
    moved = max((start[k] - v).abs().max().item() for k, v in weights(m.teacher).items())
    assert moved < 1e-6


# -- starts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_prokt_heads_start_at_one_prediction(checkpoints, kind):
    student, m, data = make(checkpoints, ProKT, kind=kind)
    batch = data.batch(np.arange(6), True)
    level = 1.5 if kind == "regression" else 0.0
    for model, inputs in ((student, batch.inputs), (m.teacher, batch.inputs)):
        assert (model(inputs).logits == level).all()


def test_a_twin_is_a_network_of_its_own_with_another_head(checkpoints):
    student = load(checkpoints["bert"], "class", 0)
    state = torch.get_rng_state()
    other = twin(student, 3)
    assert torch.equal(state, torch.get_rng_state())
    assert not {id(p) for p in other.parameters()} & {id(p) for p in student.parameters()}
    differs = [k for k, v in weights(other).items() if not torch.equal(v, weights(student)[k])]
    assert differs == ["model.classifier.weight"]
    batch = rows(student).batch(np.arange(4), True)
    expected = other(batch.inputs).hidden
    with torch.no_grad():  # its layers must not be the student's, `early` last layer included
        for p in student.parameters():
            p.zero_()
    assert torch.equal(other(batch.inputs).hidden, expected)
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    assert (other(batch.inputs).hidden == 0).all()


def test_two_students_may_learn_from_each_other(checkpoints):
    student, m, data = make(checkpoints, alpha=1.0, options={"twins": True})
    trained = run(student, m, data)
    assert not same(weights(student), weights(m.peer))
    assert {"task", "soft"} <= set(trained.curves)
    assert trained.diagnostics["partner_parameters"] == sum(p.numel() for p in m.peer.parameters())


def test_both_learn(checkpoints):
    training = {"dropout": 0.0, "epochs": 20, "student_lr": 3e-3}
    for method, alpha in ((DML, 1.0), (ProKT, 0.3)):
        student, m, data = make(checkpoints, method, alpha=alpha, training=training, n=32)
        run(student, m, data)
        for model in (student, *m.partners.values()):
            batch = data.batch(np.arange(32), True)
            right = (model.eval()(batch.inputs).logits.argmax(1) == batch.labels).float().mean()
            assert right > 0.9, (method, right)


@pytest.mark.parametrize("method", [DML, ProKT])
def test_a_killed_run_goes_on_to_the_same_end(checkpoints, method, monkeypatch, tmp_path):
    build = lambda: make(checkpoints, method, dropout=0.2, n=32)
    whole, resumed = killed_and_resumed(build, monkeypatch, tmp_path / "state", 5)
    alike(whole, resumed)
    partners = [torch.nn.ModuleDict(m.partners) for _, m, _ in (whole, resumed)]
    assert same(*map(weights, partners))


def test_a_mentor_is_asked_for(checkpoints):
    student = load(checkpoints["bert"], "class", 0)
    for method, name in ((DML, "dml"), (ProKT, "prokt")):
        with pytest.raises(
            ValueError, match=f"{name} trains a second language model: it needs a m"
        ):
            method(setting(), student)


def test_learning_rates_of_partners(checkpoints):
    _, m, _ = make(checkpoints)
    assert m.learning_rate("peer") == m.learning_rate("student") == 1e-3
    _, m, _ = make(checkpoints, ProKT)
    assert m.learning_rate("student") == 1e-3 and m.learning_rate("teacher") == pytest.approx(3e-4)
    for method, part in ((DML, "peer"), (ProKT, "teacher")):
        _, m, _ = make(checkpoints, method, training={"partner_lr": 7e-6})
        assert m.learning_rate(part) == 7e-6 and m.learning_rate("student") == 1e-3
