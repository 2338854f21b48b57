"""KD, PKD, RCO, TAKD and Continuation KD against their formulas, written again here in NumPy."""

from __future__ import annotations

import csv
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
from tiny import rows, same, setting, weights

from armada_lib import engine, losses, profiles, students
from armada_lib.batching import Batch
from armada_lib.methods import METHODS, TABLE_7, Method
from armada_lib.methods.kd import KD, PKD, RCO, ContinuationKD
from armada_lib.profiles import StudentSpec
from armada_lib.students import StudentOutput

N = 6  # examples of the fixed tensors
ORDER = np.array([4, 0, 5, 2])  # a batch, not in the order of the data


@dataclass
class Fake:
    """A mentor made of tensors."""

    logits: torch.Tensor
    anchors: list = field(default_factory=list)
    cls: torch.Tensor | None = None
    layers: int = 12
    width: int = 32


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 2


@pytest.fixture(scope="module")
def six(checkpoints, tmp_path_factory) -> StudentSpec:
    """A student of six layers."""
    from transformers import AutoModel, AutoTokenizer, BertConfig

    home = tmp_path_factory.mktemp("six")
    config = BertConfig.from_pretrained(checkpoints["bert"].checkpoint)
    config.num_hidden_layers = 6
    torch.manual_seed(3)
    AutoModel.from_config(config).save_pretrained(home)
    AutoTokenizer.from_pretrained(checkpoints["bert"].checkpoint).save_pretrained(home)
    return StudentSpec(name="six", checkpoint=str(home))


@pytest.fixture(scope="module")
def student(checkpoints):
    return students.load(checkpoints["bert"], 2, 0)


def given(kind="class", mentor=None, **kw):
    return replace(setting(kind, **kw), mentor=mentor)


def labels(kind, n=N):
    return torch.arange(n) % 2 if kind != "regression" else torch.linspace(0, 5, n)


def fixed(kind, build, **kw):
    """(terms, student logits, mentor logits in the batch's order, labels) on fixed tensors."""
    per, c = (2, 1) if kind == "choice" else (1, 1 if kind == "regression" else 3)
    mentor = kw.pop("mentor", None) or Fake(draw(N * per, c))
    method = build(given(kind, mentor, **kw))
    z = draw(len(ORDER) * per, c, seed=1).requires_grad_()
    y = labels(kind)[torch.from_numpy(ORDER)]
    batch = Batch({}, y, None, ORDER)
    terms = method.losses(batch, StudentOutput(z, z, None, None), "joint", losses.mean_row)
    texts = (ORDER[:, None] * per + np.arange(per)).reshape(-1)
    return terms, z, mentor.logits.numpy()[texts].astype(float), y.numpy(), method


def soft(z, tau=1.0):
    e = np.exp(z / tau - (z / tau).max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def table(z, kind):
    """A row an example."""
    return z.reshape(-1, 2) if kind == "choice" else z


def own_loss(z, y, kind):
    if kind == "regression":
        return np.mean((z[:, 0] - y) ** 2)
    return -np.mean(np.log(soft(table(z, kind)))[np.arange(len(y)), y])


def kd_loss(z, t, kind, tau):
    if kind == "regression":
        return np.mean((z - t) ** 2)
    p, q = soft(table(t, kind), tau), soft(table(z, kind), tau)
    return tau**2 * np.mean((p * (np.log(p) - np.log(q))).sum(-1))


# -- KD ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["class", "regression", "choice"])
@pytest.mark.parametrize("a, tau", [(0.3, 4.0), (0.8, 1.0)])
def test_kd_is_its_formula_and_joins_by_example_number(student, kind, a, tau):
    terms, z, t, y, _ = fixed(kind, lambda s: KD(s, student), alpha=a, tau=tau)
    x = z.detach().numpy().astype(float)
    assert terms["task"].item() == pytest.approx((1 - a) * own_loss(x, y, kind), rel=1e-5)
    assert terms["soft"].item() == pytest.approx(a * kd_loss(x, t, kind, tau), rel=1e-4)
    assert set(terms) == {"task", "soft"}


def test_the_gradient_of_the_soft_loss_is_tau_times_the_difference_of_probabilities(student):
    terms, z, t, _, _ = fixed("class", lambda s: KD(s, student), alpha=0.5, tau=3.0)
    terms["soft"].backward()
    expected = 0.5 * 3.0 * (soft(z.detach().numpy(), 3.0) - soft(t, 3.0)) / len(ORDER)
    np.testing.assert_allclose(z.grad.numpy(), expected, atol=1e-6)


def trained(spec, method, mentor=None, kind="class", run=None, flip=False, **kw):
    """(student, Trained) of a tiny run; `flip` turns the labels round."""
    s = given(kind, mentor, **kw)
    found = students.load(spec, s.outputs, 0, kind == "regression")
    m = METHODS[method].build(s, found)
    data = rows(found, kind=kind)
    if flip:
        data.labels = 1 - data.labels
    return found, engine.train(found, m, data, s.training, 0, **(run or {}))


def mentor_of(kind="class", epochs=3, seed=0):
    count, c = 32, 2 if kind == "class" else 1
    way = [draw(count, c, seed=seed + i) for i in range(epochs)]
    return Fake(way[-1], way, draw(count, 13, 32, seed=9).half())


@pytest.mark.parametrize("kind", ["class", "regression", "choice"])
def test_without_the_soft_loss_kd_is_undistilled_bit_for_bit(checkpoints, kind):
    plain, _ = trained(checkpoints["bert"], "undistilled", kind=kind)
    kd, _ = trained(checkpoints["bert"], "kd", mentor_of(kind), kind, alpha=0.0)
    assert same(weights(plain), weights(kd))
    other, _ = trained(checkpoints["bert"], "kd", mentor_of(kind), kind, alpha=0.5)
    assert not same(weights(plain), weights(other))


def test_with_the_soft_loss_alone_labels_do_not_matter_and_the_mentor_does(checkpoints):
    run = lambda flip, seed, a=1.0: weights(
        trained(checkpoints["bert"], "kd", mentor_of(seed=seed), flip=flip, alpha=a)[0]
    )
    assert same(run(False, 0), run(True, 0))
    assert not same(run(False, 0), run(False, 5))
    assert not same(run(False, 0, 0.5), run(True, 0, 0.5))


@pytest.mark.parametrize("name", ["kd", "takd", "sftn"])
def test_second_stages_are_kd(student, name):
    assert type(METHODS[name].build(given(mentor=Fake(draw(N, 2))), student)) is KD


@pytest.mark.parametrize("name", ["kd", "pkd_skip", "rco", "continuation_kd"])
def test_a_setting_without_a_mentor_is_refused(student, name):
    with pytest.raises(ValueError, match="learns from a mentor"):
        METHODS[name].build(setting(), student)


def test_kd_pulls_the_student_to_its_mentor(checkpoints):
    mentor = mentor_of()
    far, near = (
        trained(checkpoints["bert"], "kd", mentor, alpha=a, tau=1.0,
                training={"epochs": 12, "dropout": 0.0})[1].curves["soft"]
        for a in (1e-6, 1.0)
    )  # fmt: skip
    assert near[-4:].mean() < 0.5 * far[-4:].mean() / 1e-6


# -- PKD ---------------------------------------------------------------------------------------


def pkd(spec, last=False, layers=12, **kw):
    s = given(
        "class", Fake(draw(32, 2), cls=draw(32, layers + 1, 32, seed=2).half(), layers=layers), **kw
    )
    found = students.load(spec, 2, 0)
    return found, PKD(s, found, last=last)


def test_pkd_pairs_layers_as_the_source_does(six):
    assert pkd(six)[1].theirs == [2, 4, 6, 8, 10] and pkd(six)[1].own == [1, 2, 3, 4, 5]
    assert pkd(six, last=True)[1].theirs == [7, 8, 9, 10, 11]
    assert pkd(six, layers=8)[1].theirs == [1, 2, 4, 5, 6]
    assert (
        METHODS["pkd_last"]
        .build(given(mentor=Fake(draw(N, 2))), students.load(six, 2, 0))
        .theirs[0]
        == 7
    )


@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize("last", [True, False])
def test_patience_is_its_formula_on_a_batch(six, normalised, last):
    """Against the hidden states that transformers itself gives, one text at a time."""
    found, m = pkd(
        six, last, beta=10.0, alpha=0.5, training={"normalised": normalised, "dropout": 0.0}
    )
    data = rows(found)
    batch = data.batch(np.array([7, 30, 2, 11]), True)
    found.train()
    for module in found.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    terms = m.losses(batch, found(batch.inputs), "joint", losses.mean_row)
    theirs = [7, 8, 9, 10, 11] if last else [2, 4, 6, 8, 10]
    plain = students.load(six, 2, 0).model.eval()
    plain.set_attn_implementation("eager")
    gaps = []
    for i in batch.rows:
        ids = torch.from_numpy(data.tokens[i].astype(np.int64))[None]
        with torch.no_grad():
            states = plain.bert(ids, output_hidden_states=True).hidden_states
        for mine, other in zip((1, 2, 3, 4, 5), theirs, strict=True):
            h, t = (
                states[mine][0, 0].numpy().astype(float),
                m.mentor.cls[i, other].numpy().astype(float),
            )
            if normalised:
                h, t = h / np.linalg.norm(h), t / np.linalg.norm(t)
            gaps.append(np.mean((h - t) ** 2))
    assert terms["patience"].item() == pytest.approx(10 * np.mean(gaps), rel=1e-4)
    assert set(terms) == {"task", "soft", "patience"}


def test_patience_reaches_inner_layers_and_neither_the_last_nor_the_head(six):
    found, m = pkd(six, beta=1.0)
    found.train()
    batch = rows(found).batch(np.arange(8), True)
    m.losses(batch, found(batch.inputs), "joint", losses.mean_row)["patience"].backward()
    layers = found.model.bert.encoder.layer
    moved = [
        any(p.grad is not None and p.grad.any() for p in layer.parameters()) for layer in layers
    ]
    assert moved == [True] * 5 + [False]
    assert (
        found.model.classifier.weight.grad is None
        and found.model.bert.pooler.dense.weight.grad is None
    )
    assert not m.mentor.cls.requires_grad


def test_without_patience_pkd_is_kd_bit_for_bit(checkpoints):
    run = lambda name, b: weights(trained(checkpoints["bert"], name, mentor_of(), beta=b)[0])
    assert same(run("kd", 0.0), run("pkd_skip", 0.0))
    assert not same(run("pkd_skip", 0.0), run("pkd_skip", 10.0))
    assert not same(run("pkd_last", 10.0), run("pkd_skip", 10.0))


@pytest.mark.parametrize("wrong", [dict(width=16), dict(layers=1)])
def test_a_mentor_whose_layers_do_not_fit_is_refused(student, wrong):
    with pytest.raises(ValueError, match="inner layers of one width"):
        PKD(given(mentor=Fake(draw(N, 2), **wrong)), student)


# -- RCO ---------------------------------------------------------------------------------------


def route(student, epochs, way, anchors):
    m = RCO(
        given(mentor=Fake(draw(N, 2), [draw(N, 2)] * way), training={"anchors": anchors}), student
    )
    found = []
    for n in range(epochs):
        m.before_epoch(n, epochs)
        found.append(m.anchor + 1)
    return found


def test_rco_walks_the_mentors_way_at_equal_intervals(student):
    assert route(student, 10, 10, 5) == [2, 2, 4, 4, 6, 6, 8, 8, 10, 10]
    assert route(student, 3, 3, 5) == [1, 2, 3]
    assert route(student, 2, 10, 5) == [5, 10]
    assert route(student, 6, 2, 5) == [1, 1, 1, 2, 2, 2]
    assert route(student, 4, 7, 1) == [7, 7, 7, 7]


def test_rco_learns_from_the_anchor_of_its_stage(student):
    way = [draw(N, 3, seed=i) for i in range(2)]
    for epoch in (0, 1):

        def build(s, epoch=epoch):
            m = RCO(s, student)
            m.before_epoch(epoch, 2)
            return m

        terms, z, _, _, _ = fixed("class", build, mentor=Fake(way[-1], way), alpha=0.5, tau=2.0)
        expected = 0.5 * kd_loss(z.detach().numpy(), way[epoch].numpy()[ORDER], "class", 2.0)
        assert terms["soft"].item() == pytest.approx(expected, rel=1e-4)


def test_rco_with_one_anchor_is_kd_bit_for_bit(checkpoints):
    kd = weights(trained(checkpoints["bert"], "kd", mentor_of())[0])
    one = weights(trained(checkpoints["bert"], "rco", mentor_of(), training={"anchors": 1})[0])
    more = weights(trained(checkpoints["bert"], "rco", mentor_of())[0])
    assert same(kd, one) and not same(kd, more)


# -- Continuation KD ---------------------------------------------------------------------------


def schedules(student, epochs, top=10.0):
    m = ContinuationKD(given(mentor=Fake(draw(N, 2)), tau=top, gamma=0.0), student)
    found = []
    for n in range(epochs):
        m.before_epoch(n, epochs)
        found.append((round(m.psi_now, 6), round(m.phi_now, 6)))
    return found


def test_continuation_follows_the_sources_schedules(student):
    """n = 30, T_max = 10: T falls from 10 to 1, one every 3 epochs; psi = i / 40, from 21 on 1."""
    expected, temperature = [], 10
    for i in range(1, 31):
        if i > 1 and (i - 1) % 3 == 0:
            temperature -= 1
        expected.append((i / 40 if i <= 20 else 1.0, round(1 - (temperature - 1) / 10, 6)))
    assert schedules(student, 30) == expected
    assert expected[0] == (0.025, 0.1) and expected[-1] == (1.0, 1.0)
    # another length is the same, stretched
    assert schedules(student, 10) == expected[::3]
    assert schedules(student, 3) == expected[::10]
    assert schedules(student, 60)[::2] == expected


@pytest.mark.parametrize("kind", ["class", "regression", "choice"])
@pytest.mark.parametrize("epoch", [0, 4, 9])
def test_continuation_is_its_formula(student, kind, epoch):
    def build(s):
        m = ContinuationKD(s, student)
        m.before_epoch(epoch, 10)
        return m

    terms, z, t, y, _ = fixed(kind, build, tau=10.0, gamma=2.0)
    psi, phi = [(1 / 40, 0.1), (13 / 40, 0.5), (1.0, 1.0)][[0, 4, 9].index(epoch)]
    x = z.detach().numpy().astype(float)
    gap = ((table(x, kind) - phi * table(t, kind)) ** 2).sum(-1)
    assert (gap > 2.0 * phi).any(), "no example is over the margin: nothing is tested"
    pull = np.maximum(0, gap - 2.0 * phi).mean()
    assert terms["task"].item() == pytest.approx(psi * own_loss(x, y, kind), rel=1e-5)
    assert terms["soft"].item() == pytest.approx((1 - psi) * pull, rel=1e-4, abs=1e-7)


def test_inside_the_margin_nothing_pulls(student):
    mentor = Fake(draw(N, 3))

    def build(s):
        m = ContinuationKD(s, student)
        m.before_epoch(0, 10)
        return m

    terms, z, _, _, _ = fixed("class", build, mentor=mentor, tau=10.0, gamma=1e6)
    terms["soft"].backward()
    assert terms["soft"].item() == 0 and not z.grad.any()
    terms, z, _, _, _ = fixed("class", build, mentor=mentor, tau=10.0, gamma=0.0)
    terms["soft"].backward()
    assert z.grad.abs().min() > 0


def test_continuation_ends_as_undistilled(student):
    """From two thirds of the run on, only the labels count."""
    m = ContinuationKD(given(mentor=Fake(draw(N, 3)), tau=10.0, gamma=0.0), student)
    for epoch in (7, 8, 9):
        m.before_epoch(epoch, 10)
        z = draw(len(ORDER), 3, seed=1).requires_grad_()
        batch = Batch({}, labels("class")[torch.from_numpy(ORDER)], None, ORDER)
        out = StudentOutput(z, z, None, None)
        torch.stack(list(m.losses(batch, out, "joint", losses.mean_row).values())).sum().backward()
        w = z.detach().clone().requires_grad_()
        torch.nn.functional.cross_entropy(w, batch.labels).backward()
        torch.testing.assert_close(z.grad, w.grad)


# -- the engine's side -------------------------------------------------------------------------


class Pair(Method):
    """A partner that learns to agree with the student, which learns to agree with it."""

    def __init__(self, s, student):
        super().__init__(s, student)
        with torch.random.fork_rng():
            torch.manual_seed(4)
            self.partners["other"] = torch.nn.Linear(student.width, 2)
        self.seen: list[tuple] = []

    def learning_rate(self, part):
        return 1e-2 if part == "other" else super().learning_rate(part)

    def attach(self, data):
        self.seen.append(("attach", len(data)))

    def before_epoch(self, number, epochs):
        self.seen.append(("epoch", number, epochs))

    def turn(self, batch, out, step):
        other = self.partners["other"]
        torch.nn.functional.cross_entropy(other(out.hidden.detach()), batch.labels).backward()
        before = other.weight.detach().clone()
        assert step("other") > 0 and other.weight.grad is None
        assert not torch.equal(other.weight, before)

    def losses(self, batch, out, phase, centroid):
        with torch.no_grad():
            z = self.partners["other"](out.hidden)
        return {
            "task": self.task(out.logits, batch.labels),
            "pull": (out.logits - z).square().mean(),
        }


def paired(spec, **run):
    s = setting(training={"epochs": 3})
    found = students.load(spec, 2, 0)
    m = Pair(s, found)
    engine.train(found, m, rows(found), s.training, 0, **run)
    return found, m


@pytest.mark.parametrize("at", [2, 8, 11])
def test_a_killed_run_with_a_partner_ends_as_an_unkilled_one(
    checkpoints, tmp_path, monkeypatch, at
):
    whole, m = paired(checkpoints["bert"])
    assert m.seen == [("attach", 32), ("epoch", 0, 3), ("epoch", 1, 3), ("epoch", 2, 3)]
    state, step, done = tmp_path / "state.safetensors", engine.Optimiser.step, []

    class Killed(BaseException):
        pass

    def dying(self):
        done.append(1)
        if len(done) > 2 * at:
            raise Killed
        return step(self)

    with monkeypatch.context() as patch:
        patch.setattr(engine.Optimiser, "step", dying)
        with pytest.raises(Killed):
            paired(checkpoints["bert"], state=state, save_every=0.0)
    assert state.exists()
    again, n = paired(checkpoints["bert"], state=state, save_every=0.0)
    assert n.seen[:2] == [("attach", 32), ("epoch", at // 4, 3)]
    assert same(weights(whole), weights(again))
    assert same(weights(m.partners["other"]), weights(n.partners["other"]))


def test_every_epoch_is_told_of_before_a_state_says_that_it_is_over(checkpoints, tmp_path):
    state, told = tmp_path / "state.safetensors", []

    def note(number):
        told.append(number)
        raise KeyboardInterrupt

    for _ in range(2):  # the second goes on inside the first epoch: it is told of it again
        with pytest.raises(KeyboardInterrupt):
            trained(checkpoints["bert"], "undistilled",
                    run=dict(state=state, save_every=0.0, after_epoch=note))  # fmt: skip
    trained(checkpoints["bert"], "undistilled", run=dict(state=state, after_epoch=told.append))
    assert told == [0, 0, 0, 1]


# -- names -------------------------------------------------------------------------------------


def test_every_method_of_table_7_is_an_entry():
    path = profiles.ROOT / "book/published/table07_unimodal_baselines_bert6l.csv"
    with path.open() as f:
        printed = {r["method"] for r in csv.DictReader(f)}
    assert printed == set(TABLE_7) and set(TABLE_7.values()) <= set(METHODS)
    assert len(set(TABLE_7.values())) == len(TABLE_7)


def test_entries_say_what_they_need_of_a_mentor():
    known = {
        "logits",
        "anchors",
        "cls",
        "means",
        "model",
        "start",
        "assistant",
        "branches",
        "responses",
    }
    needs = {n: set(e.mentor) for n, e in METHODS.items() if e.mentor}
    assert all(x <= known for x in needs.values())
    assert not any(METHODS[n].distils or METHODS[n].vectors for n in needs)
    assert set(TABLE_7.values()) - {"armada"} <= set(needs)
