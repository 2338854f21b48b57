"""SFTN, first stage: branches against the layers run one by one, and what they teach the mentor."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from test_tinybert import KINDS, batch_of, network
from tiny import alike, killed_and_resumed, rows, same, setting, weights

from armada_lib import engine, evaluation, losses
from armada_lib.methods import Method
from armada_lib.methods.sftn import SFTNTeacher, places


def make(checkpoints, kind="class", n=16, layers=6, small=3, dropout=0.0, method=SFTNTeacher, **kw):
    """(mentor to be, method, data); the mentor has 6 layers of 48, the student 3 of 32."""
    mentor = network(checkpoints, kind, layers, 48, seed=9, dropout=dropout)
    kw = {"alpha": 0.0, "beta": 3.0, "gamma": 1.5, "tau": 2.0} | kw
    s = setting(kind, **kw)
    if method is SFTNTeacher:
        built = SFTNTeacher(s, mentor, network(checkpoints, kind, small, dropout=dropout))
    else:
        built = method(s, mentor)
    return mentor.train(), built, rows(mentor, n, kind=kind)


def softmax(z):
    return np.exp(z - z.max()) / np.exp(z - z.max()).sum()


@torch.no_grad()
def one_by_one(mentor, method, small, tokens):
    """(z_T, z_1, z_2) of one text: layers of an untouched copy of the student, applied in turn."""
    for model in (mentor := copy.deepcopy(mentor).eval(), small):
        model.model.set_attn_implementation("eager")
        model.early = False
    ids = torch.from_numpy(tokens.astype(np.int64))[None]
    states = mentor.model.bert(input_ids=ids, output_hidden_states=True).hidden_states
    found = [mentor.model.classifier(mentor.model.bert.pooler(states[-1]))]
    for (at, left_out), branch in zip([(2, 1), (4, 2)], method.branches, strict=True):
        f = branch.model.bert.embeddings.map
        x = states[at] @ f.weight.T + f.bias
        for layer in small.model.bert.encoder.layer[left_out:]:
            x = layer(x)
        found.append(small.model.classifier(small.model.bert.pooler(x)))
    return [z[0].numpy() for z in found]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("packed", [True, False])
def test_the_loss_is_the_recipes_sum(checkpoints, kind, packed):
    mentor, method, data = make(checkpoints, kind)
    small = network(checkpoints, kind, layers=3).eval()  # what the branches were copied from
    if kind == "regression":
        small.centre(1.5)
    batch = batch_of(data, mentor, packed)
    for branch in method.branches:
        branch.model.set_attn_implementation(mentor.model.config._attn_implementation)
    out = mentor(batch.inputs)
    terms = {k: v.item() for k, v in method.losses(batch, out, "joint", torch.mean).items()}

    task, near, gold = [], [], []
    for row in batch.rows:
        y = data.labels[row].item()
        if kind == "choice":
            both = [one_by_one(mentor, method, small, data.tokens[2 * row + j]) for j in (0, 1)]
            z = [np.concatenate(x) for x in zip(*both, strict=True)]
        else:
            z = one_by_one(mentor, method, small, data.tokens[row])
        if kind == "regression":
            loss, apart = (lambda x, y=y: (x[0] - y) ** 2), lambda a, b: (a[0] - b[0]) ** 2
        else:
            loss = lambda x, y=y: -np.log(softmax(x)[y])
            apart = lambda a, b: (
                4 * (softmax(a / 2) * np.log(softmax(a / 2) / softmax(b / 2))).sum()
            )
        task.append(loss(z[0]))
        near.append(apart(z[1], z[0]) + apart(z[2], z[0]))
        gold.append(loss(z[1]) + loss(z[2]))
    np.testing.assert_allclose(terms["task"], np.mean(task), rtol=1e-4)
    np.testing.assert_allclose(terms["branch_soft"], 3 * np.mean(near), rtol=1e-3)
    np.testing.assert_allclose(terms["branch_task"], 1.5 * np.mean(gold), rtol=1e-4)


def test_every_term_teaches_mentor_and_branches_but_only_below_the_branch(checkpoints):
    mentor, method, data = make(checkpoints)
    batch = batch_of(data, mentor, True)
    learns = lambda m: {n for n, p in m.named_parameters() if p.grad is not None and p.grad.any()}

    def after(name):
        mentor.zero_grad()
        method.branches.zero_grad()
        method.losses(batch, mentor(batch.inputs), "joint", losses.mean_row)[name].backward()
        return learns(mentor), [learns(b) for b in method.branches]

    whole = {n for n, _ in mentor.named_parameters()}
    found, branches = after("branch_task")
    assert any("layer.3.output" in n for n in found) and any("embeddings" in n for n in found)
    assert not any("layer.4" in n or "layer.5" in n or "classifier" in n for n in found)
    for learned, branch in zip(branches, method.branches, strict=True):
        # a key's bias moves no softmax; every other weight of a branch learns
        names = {n for n, _ in branch.named_parameters()}
        assert {n for n in names - learned if "key.bias" not in n} == set()
        assert "model.bert.embeddings.map.weight" in learned
    found, branches = after("branch_soft")
    assert any("layer.5.output" in n for n in found) and any("classifier" in n for n in found)
    assert all(branches)
    found, branches = after("task")
    assert any("layer.5" in n for n in found) and not any(branches)
    assert found <= whole


def test_the_two_branches_are_copies_that_share_nothing(checkpoints):
    _, method, _ = make(checkpoints)
    a, b = (dict(x.named_parameters()) for x in method.branches)
    assert len([n for n in a if "layer.0.output.dense" in n]) == 2
    lengths = [len(x.model.bert.encoder.layer) for x in method.branches]
    assert lengths == [2, 1]
    assert not {id(p) for p in a.values()} & {id(p) for p in b.values()}
    last = "model.bert.encoder.layer.{}.output.dense.weight"
    assert torch.equal(a[last.format(1)], b[last.format(0)])
    entrance = "model.bert.embeddings.map.weight"
    assert not torch.equal(a[entrance], b[entrance])
    assert not any("word_embeddings" in n for n in a)


def test_a_student_with_a_compact_vocabulary_leaves_no_table_behind(checkpoints):
    small = network(checkpoints, layers=3)
    small.compact(np.arange(9))
    method = SFTNTeacher(setting(beta=1.0), network(checkpoints, layers=6), small)
    assert all(b._full is None for b in method.branches)


@pytest.mark.parametrize(
    "mentor, student, want",
    [(12, 6, [(4, 2), (8, 4)]), (6, 3, [(2, 1), (4, 2)]), (12, 1, [(4, 0), (8, 0)]),
     (3, 2, [(1, 1), (2, 1)]), (24, 6, [(8, 2), (16, 4)]), (4, 4, [(1, 1), (3, 3)])],
)  # fmt: skip
def test_branches_hang_at_a_third_and_two_thirds(mentor, student, want):
    assert places(mentor, student) == want


@pytest.mark.parametrize("mentor", [1, 2])
def test_a_mentor_without_two_inner_layers_is_an_error(mentor):
    with pytest.raises(ValueError, match=f"a mentor of {mentor} has none"):
        places(mentor, 2)


@pytest.mark.parametrize("kind", KINDS)
def test_without_weights_it_is_fine_tuning_bit_for_bit(checkpoints, kind):
    found = []
    for method in (SFTNTeacher, Method):
        mentor, m, data = make(checkpoints, kind, method=method, beta=0.0, gamma=0.0)
        found.append((mentor, None, engine.train(mentor, m, data, m.setting.training, 0)))
    alike(*found)
    mentor, m, data = make(checkpoints, kind)
    engine.train(mentor, m, data, m.setting.training, 0)
    assert not same(weights(mentor), weights(found[0][0]))


@pytest.mark.parametrize("kind", KINDS)
def test_branches_learn_with_the_mentor_and_are_dropped(checkpoints, kind, tmp_path):
    mentor, method, data = make(
        checkpoints, kind, n=32, training={"epochs": 12, "student_lr": 2e-3}, beta=1.0
    )
    before = set(weights(mentor))
    run = engine.train(mentor, method, data, method.setting.training, 0)
    for name in ("task", "branch_task"):
        assert run.curves[name][-4:].mean() < 0.8 * run.curves[name][:4].mean()
    assert not method.parts and set(weights(mentor)) == before
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in mentor.modules())
    outputs = evaluation.predict(mentor, method, data, bf16=False)
    assert list(outputs) == ["student"]
    mentor.save_pretrained(tmp_path)


def test_branches_use_dropout_while_they_learn(checkpoints):
    mentor, method, data = make(checkpoints, dropout=0.3)
    batch = batch_of(data, mentor, True)
    said = lambda: method.losses(batch, mentor(batch.inputs), "joint", losses.mean_row)
    said()
    assert all(b.training for b in method.branches)
    once, again = (method.branch_logits(batch.inputs)[1] for _ in range(2))
    assert not torch.equal(once, again)  # the mentor's states were the same


@pytest.mark.parametrize("at", [2, 6])
def test_a_killed_run_ends_as_an_unkilled_one(checkpoints, monkeypatch, tmp_path, at):
    build = lambda: make(checkpoints, n=32, dropout=0.1)
    whole, resumed = killed_and_resumed(build, monkeypatch, tmp_path / "state", at)
    alike(whole, resumed)


@pytest.mark.parametrize("name", ["deberta", "opt"])
def test_a_student_of_another_architecture_is_refused(checkpoints, name):
    from armada_lib import students

    mentor = network(checkpoints, layers=6)
    with pytest.raises(ValueError, match="cannot be watched; valid: bert"):
        SFTNTeacher(setting(), mentor, students.load(checkpoints[name], 2, 0))
