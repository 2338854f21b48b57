"""MetaDistil: the teacher's gradient through a step of the student, and what is left without it."""

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
from armada_lib.methods.metadistil import MetaDistil, Seen, objective
from armada_lib.profiles import StudentSpec

KINDS = ["class", "regression", "choice"]
OUT = {"class": 2, "regression": 1, "choice": 1}


@dataclass
class Mentor:
    """A fine-tuned model, and the examples as it reads them."""

    model: students.Student
    data: Encoded

    def tuned(self) -> students.Student:
        return copy.deepcopy(self.model)


@pytest.fixture(scope="module")
def larger(checkpoints, tmp_path_factory) -> StudentSpec:
    """A BERT of four layers of the student's width."""
    from transformers import AutoModel, AutoTokenizer, BertConfig

    where, small = tmp_path_factory.mktemp("larger"), checkpoints["bert"].checkpoint
    config = BertConfig.from_pretrained(small)
    config.num_hidden_layers = 4
    torch.manual_seed(11)
    AutoModel.from_config(config).save_pretrained(where)
    AutoTokenizer.from_pretrained(small).save_pretrained(where)
    return StudentSpec(name="larger", checkpoint=str(where))


def load(spec, kind, seed, dropout=0.0):
    return students.load(spec, OUT[kind], seed, kind == "regression", dropout)


def make(checkpoints, larger, kind="class", name="bert", n=24, dropout=0.0, lr=None, **kw):
    """(student, method, data), the training examples attached; `lr`: the pilot's step."""
    student, model = load(checkpoints[name], kind, 0, dropout), load(larger, kind, 5, dropout)
    data = rows(student, n, kind=kind)
    training = {"dropout": dropout} | kw.pop("training", {})
    training |= {} if lr is None else {"pilot_lr": lr}
    s = setting(kind, training=training, **{"alpha": 0.4, "beta": 2.0, "tau": 3.0} | kw)
    m = MetaDistil(dataclasses.replace(s, mentor=Mentor(model, rows(model, n, kind=kind))), student)
    m.attach(data)
    student.train()
    return student, m, data


def still(name: str) -> torch.Tensor:
    """Stands for the engine's step of a teacher that does not move."""
    return torch.zeros(())


def by_hand(z_s, z_t, h_s, h_t, y, kind, a, b, tau) -> dict[str, torch.Tensor]:
    """The recipe's loss on plain tensors, example by example; h (examples, texts, layers, d)."""
    task, soft, patience = [], [], []
    for i in range(len(y)):
        if kind == "regression":
            task.append((z_s[i] - y[i]) ** 2)
            soft.append((z_s[i] - z_t[i]) ** 2)
        else:
            task.append(-(z_s[i, y[i]] - z_s[i].exp().sum().log()))
            p, q = (z[i].div(tau).exp() / z[i].div(tau).exp().sum() for z in (z_s, z_t))
            soft.append(tau**2 * ((p - q) ** 2).sum() / len(p))
        u, v = (h[i] / (h[i] ** 2).sum(-1, keepdim=True).sqrt() for h in (h_s, h_t))
        patience.append(((u - v) ** 2).sum() / u.numel())
    mean = lambda xs: torch.stack(xs).mean()
    return {"task": (1 - a) * mean(task), "soft": a * mean(soft), "patience": b * mean(patience)}


# -- the loss ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_objective_is_the_recipe_over_the_examples_that_count(kind):
    torch.manual_seed(0)
    shape = (6,) if kind == "regression" else (6, 3)
    z_s, z_t = 2 * torch.randn(shape), 2 * torch.randn(shape)
    h_s, h_t = torch.randn(6, 2, 4, 5), 3 * torch.randn(6, 2, 4, 5)
    y = torch.rand(6) if kind == "regression" else torch.randint(3, (6,))
    keep = torch.tensor([0, 2, 3, 5])
    counts = torch.zeros(6).index_fill(0, keep, 1.0)
    s = setting(kind, alpha=0.4, beta=7.0, tau=3.0)
    found = objective(Seen(z_s, h_s), Seen(z_t, h_t), y, counts, s)
    parts = [x[keep] for x in (z_s, z_t, h_s, h_t, y)]
    expected = by_hand(*parts, kind, 0.4, 7.0, 3.0)
    assert found.keys() == expected.keys()
    for k, v in expected.items():
        torch.testing.assert_close(found[k], v)
    none = objective(Seen(z_s, h_s), Seen(z_t, h_t), y, 0 * counts, s)
    assert all(v == 0 for v in none.values())
    assert "patience" not in objective(Seen(z_s, None), Seen(z_t, None), y, counts, s)


@pytest.mark.parametrize("kind", KINDS)
def test_the_student_learns_from_the_outputs_and_layers_of_both(checkpoints, larger, kind):
    student, m, data = make(checkpoints, larger, kind)
    batch = data.batch(np.arange(8), True)
    k = data.per_example
    keep = torch.from_numpy(np.flatnonzero([r not in m.quiz for r in batch.rows]))
    assert 0 < len(keep) < 8
    seen = {}
    for name, model in (("s", student), ("t", m.teacher)):
        each = []  # text by text, so that no order is taken on trust
        for text in (r * k + j for r in batch.rows for j in range(k)):
            one = data._padded(np.array([text]))
            kept = model.model.config._attn_implementation
            model.model.set_attn_implementation("eager")
            full = model.model(**one, output_hidden_states=True)
            model.model.set_attn_implementation(kept)
            each.append((full.logits[0], torch.stack([h[0, 0] for h in full.hidden_states])))
        z = m.shape(torch.stack([e[0] for e in each]))
        h = torch.stack([e[1] for e in each]).view(len(z), k, -1, 32)
        seen[name] = z[keep].detach(), h[keep].detach()
    inner = seen["s"][1][:, :, 1:2], seen["t"][1][:, :, 2:3]  # of 2 and of 4 layers
    expected = by_hand(seen["s"][0], seen["t"][0], *inner, batch.labels[keep], kind, 0.4, 2.0, 3.0)
    out = student(batch.inputs)
    m.turn(batch, out, still)
    found = m.losses(batch, out, "joint", None)
    assert found.keys() == expected.keys()
    for name, v in expected.items():
        torch.testing.assert_close(found[name], v, rtol=1e-3, atol=1e-5)


# -- the teacher's gradient ----------------------------------------------------------------------


@pytest.fixture
def exact(monkeypatch):
    """float64 models stay float64 where the student asks for at least float32."""
    plain = torch.Tensor.float
    monkeypatch.setattr(
        torch.Tensor, "float", lambda x: x if x.dtype is torch.float64 else plain(x)
    )


@pytest.mark.parametrize(
    "kind, weight", [("class", {}), ("class", {"beta": 0.0}), ("class", {"alpha": 0.0}),
                     ("regression", {}), ("choice", {})]
)  # fmt: skip
def test_the_teachers_gradient_is_the_finite_difference_of_the_quiz(
    checkpoints, larger, exact, kind, weight
):
    student, m, data = make(checkpoints, larger, kind, lr=0.3, **weight)
    student.double(), m.teacher.double()
    data.labels = data.labels.double() if kind == "regression" else data.labels
    batch = data.batch(np.arange(8), True)
    found = {}

    def keep(name: str) -> torch.Tensor:
        found.update({k: p.grad for k, p in m.teacher.named_parameters() if p.grad is not None})
        return torch.zeros(())

    m.turn(batch, student(batch.inputs), keep)
    assert next(iter(found.values())).dtype is torch.float64
    named = dict(m.teacher.named_parameters())
    rng = torch.Generator().manual_seed(1)
    draw = lambda p: torch.randn(p.shape, generator=rng, dtype=torch.float64)
    everything = {k: draw(named[k]) for k in found}
    singles = [k for k in found if k.endswith(("layer.0.attention.self.query.weight",
                                               "layer.1.output.dense.weight"))]  # fmt: skip
    if m.setting.alpha:
        singles += ["model.classifier.weight"]
    assert len(singles) >= 2
    eps = 1e-5
    for direction in (everything, *({k: draw(named[k])} for k in singles)):
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                for k, v in direction.items():
                    named[k] += sign * eps * v
            with torch.no_grad():
                taught = m._taught(batch)
            ends.append(m.quiz_loss(batch, taught).item())
            with torch.no_grad():
                for k, v in direction.items():
                    named[k] -= sign * eps * v
        slope = sum((found[k] * v).sum().item() for k, v in direction.items())
        assert abs(slope) > 1e-7
        assert slope == pytest.approx((ends[0] - ends[1]) / (2 * eps), rel=2e-5)


def test_the_quiz_is_taken_by_a_student_one_plain_step_ahead(checkpoints, larger):
    student, m, data = make(checkpoints, larger, lr=0.2)
    batch = data.batch(np.arange(8), True)
    taught = m._taught(batch)
    found = m.quiz_loss(batch, taught)
    ahead = copy.deepcopy(student)
    out = student(batch.inputs)
    m.turn(batch, out, still)
    total = torch.stack(list(m.losses(batch, out, "joint", None).values())).sum()
    grads = torch.autograd.grad(total, list(student.parameters()), allow_unused=True)
    with torch.no_grad():
        for p, g in zip(ahead.parameters(), grads, strict=True):
            p -= 0.2 * g
    asked = []
    keep = data.batch
    data.batch = lambda r, packed: asked.append(r) or keep(r, packed)
    m.quiz_loss(batch, taught)
    quiz = keep(asked[0], True)
    assert set(asked[0]) <= set(m.quiz) and len(asked) == 1
    ahead.eval()
    z = ahead(quiz.inputs).logits
    torch.testing.assert_close(found, m.task(z, quiz.labels), rtol=1e-4, atol=1e-6)
    plain = m.task(student.eval()(quiz.inputs).logits, quiz.labels)
    assert (found - plain).abs() > 1e-2


def test_only_the_teacher_gets_a_gradient_from_the_quiz(checkpoints, larger):
    student, m, data = make(checkpoints, larger, dropout=0.2)
    batch = data.batch(np.arange(8), True)
    before, out, seen = weights(student), student(batch.inputs), []

    def step(name: str) -> torch.Tensor:
        seen.append(
            (
                name,
                sum(
                    p.grad.abs().sum().item() for p in m.teacher.parameters() if p.grad is not None
                ),
            )
        )
        for p in m.teacher.parameters():
            p.grad = None
        return torch.zeros(())  # fmt: skip

    m.turn(batch, out, step)
    assert len(seen) == 1 and seen[0][0] == "teacher" and seen[0][1] > 0
    assert same(before, weights(student)) and all(p.grad is None for p in student.parameters())
    assert all(x.training for x in student.modules())
    assert not any(x.training for x in m.teacher.modules())
    torch.stack(list(m.losses(batch, out, "joint", None).values())).sum().backward()
    assert all(p.grad is None for p in m.teacher.parameters())
    assert sum(p.grad.abs().sum() for p in student.parameters() if p.grad is not None) > 0


def test_the_teacher_has_no_dropout_the_pilot_has_and_the_quiz_has_not(checkpoints, larger):
    student, m, data = make(checkpoints, larger, dropout=0.3)
    batch = data.batch(np.arange(8), True)
    modes = []
    for name, model in (("student", student), ("teacher", m.teacher)):
        model.register_forward_pre_hook(lambda x, _, n=name: modes.append((n, x.training)))
    m.turn(batch, student(batch.inputs), still)
    assert modes == [("student", True), ("teacher", False), ("student", True), ("student", False)]


def test_a_step_of_the_teacher_lowers_the_quiz_loss(checkpoints, larger):
    student, m, data = make(checkpoints, larger, lr=0.3)
    batch = data.batch(np.arange(8), True)

    def step(name: str) -> torch.Tensor:
        with torch.no_grad():
            moving = [p for p in m.teacher.parameters() if p.grad is not None]
            norm = torch.stack([p.grad.norm() for p in moving]).norm()
            for p in moving:
                p -= 0.02 * p.grad / norm
                p.grad = None
        return norm

    quiz = lambda: m.quiz_loss(batch, m._taught(batch)).item()
    before = quiz()
    for _ in range(5):
        m.turn(batch, student(batch.inputs), step)
    assert quiz() < before - 1e-4


# -- the quiz examples ---------------------------------------------------------------------------


def test_a_seeded_tenth_is_put_aside(checkpoints, larger):
    found = []
    for seed, n in ((0, 40), (0, 40), (1, 40), (0, 3)):
        _, m, data = make(checkpoints, larger, n=n, seed=seed)
        assert len(m.quiz) == max(1, n // 10) and set(m.quiz) <= set(range(len(data)))
        assert len(set(m.quiz)) == len(m.quiz) and m.facts()["quiz"] == len(m.quiz)
        found.append(m.quiz.tolist())
    assert found[0] == found[1] != found[2]


def test_nobody_learns_the_labels_or_the_lessons_of_the_quiz(checkpoints, larger):
    student, m, data = make(checkpoints, larger)
    batch = data.batch(np.concatenate([m.quiz, np.setdiff1d(np.arange(8), m.quiz)]), True)
    inside = torch.from_numpy(np.isin(batch.rows, m.quiz))
    assert 0 < inside.sum() < len(inside)
    found = []
    for flip in (~inside & False, inside, ~inside):
        other = dataclasses.replace(batch, labels=torch.where(flip, 1 - batch.labels, batch.labels))
        taught = m._taught(other)
        taught = Seen(torch.where(flip[:, None], -taught.outputs, taught.outputs), taught.first)
        found.append({k: v.detach() for k, v in m.pilot(other, taught).items()})
        out = student(other.inputs)
        m.turn(other, out, still)
        found.append(m.losses(other, out, "joint", None)["task"].detach())
    assert same(found[0], found[2]) and torch.equal(found[1], found[3])
    assert not same(found[0], found[4]) and not torch.equal(found[1], found[5])


def test_a_batch_of_quiz_examples_teaches_nothing_and_breaks_nothing(checkpoints, larger):
    student, m, data = make(checkpoints, larger)
    batch = data.batch(m.quiz, True)
    grads = []
    step = lambda name: grads.extend(p.grad for p in m.teacher.parameters() if p.grad is not None)
    out = student(batch.inputs)
    m.turn(batch, out, step)
    assert grads and all((g == 0).all() for g in grads)
    terms = m.losses(batch, out, "joint", None)
    assert set(terms) == {"task", "soft", "patience"} and all(v == 0 for v in terms.values())
    torch.stack(list(terms.values())).sum().backward()
    assert all((p.grad == 0).all() for p in student.parameters() if p.grad is not None)


# -- runs ----------------------------------------------------------------------------------------


def run(student, m, data, **kw):
    return engine.train(student, m, data, m.setting.training, m.setting.seed, **kw)


class SquaredKD(Method):
    """(1 - a) CE + a tau^2 MSE of probabilities, against logits read once, no quiz examples."""

    def __init__(self, s, student, z, quiz):
        super().__init__(s, student)
        self.z, self.quiz = z, quiz

    def losses(self, batch, out, phase, centroid):
        keep = torch.from_numpy(np.flatnonzero(~np.isin(batch.rows, self.quiz)))
        z, t = self.shape(out.logits)[keep], self.z[torch.from_numpy(batch.rows)][keep]
        a, tau = self.setting.alpha, self.setting.tau
        gap = (z / tau).softmax(-1) - (t / tau).softmax(-1)
        return {
            "task": (1 - a) * self.task_loss(z, batch.labels[keep]),
            "soft": a * tau**2 * (gap**2).mean(),
        }


@pytest.mark.parametrize("kind", ["class", "choice"])
def test_a_teacher_that_does_not_move_gives_kd_with_the_squared_soft_loss(
    checkpoints, larger, kind
):
    student, m, data = make(checkpoints, larger, kind, beta=0.0)
    rate = m.learning_rate
    m.learning_rate = lambda part: 0.0 if part == "teacher" else rate(part)
    start = weights(m.teacher)
    z = torch.empty(len(data), 2)
    full = data.batch(np.arange(len(data)), True)
    with torch.no_grad():
        z[torch.from_numpy(full.rows)] = m.shape(m.teacher(full.inputs).logits)
    found = run(student, m, data)
    assert same(start, weights(m.teacher))
    plain = load(checkpoints["bert"], kind, 0)
    expected = run(plain, SquaredKD(m.setting, plain, z, m.quiz), data)
    for name in ("task", "soft"):
        np.testing.assert_allclose(found.curves[name], expected.curves[name], rtol=1e-4, atol=1e-6)
    # and one that moves does not
    other, m, data = make(checkpoints, larger, kind, beta=0.0, lr=1.0)
    m.learning_rate = lambda part: 1e-3
    moved = run(other, m, data)
    assert abs(moved.curves["soft"] - expected.curves["soft"]).max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_task_runs_and_both_move(checkpoints, larger, kind):
    training = {"batch_size": 4, "epochs": 1, "precision": "bf16" if kind == "class" else "fp32"}
    student, m, data = make(checkpoints, larger, kind, dropout=0.2, training=training)
    a, b = weights(student), weights(m.teacher)
    trained = run(student, m, data)
    assert {"task", "soft", "patience"} <= set(trained.curves)
    assert np.isfinite(trained.curves["total"]).all()
    assert not same(a, weights(student)) and not same(b, weights(m.teacher))


@pytest.mark.parametrize("name", ["deberta", "opt"])
def test_other_families_have_second_derivatives_too(checkpoints, larger, name):
    student, m, data = make(checkpoints, larger, name=name, beta=0.0, lr=0.1)
    batch = data.batch(np.arange(8), student.packs)
    grads = []
    step = lambda name: grads.extend(p.grad for p in m.teacher.parameters() if p.grad is not None)
    m.turn(batch, student(batch.inputs), step)
    assert sum(g.abs().sum() for g in grads) > 0


def test_a_killed_run_goes_on_to_the_same_end(checkpoints, larger, monkeypatch, tmp_path):
    build = lambda: make(checkpoints, larger, dropout=0.2, lr=0.1)
    whole, resumed = killed_and_resumed(build, monkeypatch, tmp_path / "state", 4)
    alike(whole, resumed)
    assert same(weights(whole[1].teacher), weights(resumed[1].teacher))


def test_a_teacher_with_other_tokens_is_read_in_the_students_order(checkpoints, larger):
    _, m, data = make(checkpoints, larger)
    lengths = np.random.default_rng(3).permutation(len(data)) + 3
    m.lessons.tokens = [np.full(k, 7 + k % 5, dtype=np.int32) for k in lengths]
    m.lessons.types = None
    m.lessons.__post_init__()
    batch = data.batch(np.array([4, 1, 9, 12, 0]), True)
    seen = m._taught(batch)
    for i, row in enumerate(batch.rows):
        one = m._taught(data.batch(np.array([row]), True))
        torch.testing.assert_close(seen.outputs[i], one.outputs[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(seen.first[i], one.first[0], rtol=1e-4, atol=1e-5)


# -- what is refused -----------------------------------------------------------------------------


def test_bad_settings_stop_before_any_work(checkpoints, larger):
    student = load(checkpoints["bert"], "class", 0)
    with pytest.raises(ValueError, match="metadistil trains a second language model: it needs a m"):
        MetaDistil(setting(), student)
    with pytest.raises(ValueError, match="set compile: false"):
        make(checkpoints, larger, training={"compile": True})
    wide = load(larger, "class", 0)
    wide.model.config.hidden_size = 48
    s = setting(beta=1.0)
    with pytest.raises(ValueError, match="student has 2 of width 32, the mentor 4 of 48; set beta"):
        MetaDistil(dataclasses.replace(s, mentor=Mentor(wide, rows(wide, 8))), student)
    with pytest.raises(ValueError, match="'deberta-v2' students cannot be watched"):
        make(checkpoints, larger, name="deberta")
    _, m, data = make(checkpoints, larger)
    with pytest.raises(ValueError, match="splits the training examples; there are 1"):
        m.attach(rows(student, 1))
    m.data = None
    with pytest.raises(ValueError, match="call `attach` before training"):
        m._counts(data.batch(np.arange(4), True))


def test_learning_rates(checkpoints, larger):
    _, m, _ = make(checkpoints, larger)
    assert m.learning_rate("student") == 1e-3 and m.learning_rate("teacher") == pytest.approx(2e-4)
    _, m, _ = make(checkpoints, larger, training={"partner_lr": 7e-6})
    assert m.learning_rate("teacher") == 7e-6 and m.learning_rate("student") == 1e-3
