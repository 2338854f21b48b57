"""RAIL-KD: the loss written out text by text, the draw, and its limits KD and fine-tuning."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_tinybert import KINDS, Mentor, batch_of, inside, make, network, said
from tiny import alike, killed_and_resumed, same, setting, weights

from armada_lib import engine
from armada_lib.methods import Method
from armada_lib.methods.rail import Rail, draw

THIRDS = dict(alpha=0.3, beta=0.25, tau=3.0)


def build(concatenated=False):
    return lambda setting, student: Rail(setting, student, concatenated)


def deeper(checkpoints, kind="class", concatenated=False, n=16, layers=3, deep=6, **kw):
    """(student of 3 layers, method, data) with a mentor of 6: two of its five are drawn."""
    student = network(checkpoints, kind, layers, dropout=kw.pop("dropout", 0.0))
    _, made, data = make(checkpoints, lambda s, _: s, kind, n, deep)
    kw = {**THIRDS, **kw}
    method = Rail(setting(kind, mentor=made.mentor, **kw), student, concatenated)
    return student.train(), method, data


def softmax(z):
    return np.exp(z - z.max()) / np.exp(z - z.max()).sum()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("concatenated", [False, True])
@pytest.mark.parametrize("packed", [True, False])
def test_the_loss_is_the_recipes_sum(checkpoints, kind, concatenated, packed):
    student, method, data = deeper(checkpoints, kind, concatenated)
    method.before_epoch(2, 4)
    drawn = draw(6, 2, 0, 2)
    batch = batch_of(data, student, packed)
    out = student(batch.inputs)
    terms = {k: v.item() for k, v in method.losses(batch, out, "joint", torch.mean).items()}

    per = 2 if kind == "choice" else 1
    texts = [r * per + j for r in batch.rows for j in range(per)]
    maps = [[(f.weight.detach().numpy(), f.bias.detach().numpy()) for f in method.maps[side]]
            for side in ("mentor", "student")]  # fmt: skip
    rail = 0.0
    for i in texts:
        states, _ = inside(student, data.tokens[i])
        t = [method.mentor.means[i, r].float().numpy() for r in drawn]
        s = [states[j].mean(0).numpy() for j in (1, 2)]
        if concatenated:
            t, s = [np.concatenate(t)], [np.concatenate(s)]
        for x, y, (wt, bt), (ws, bs) in zip(t, s, *maps, strict=True):
            a, b = wt @ x + bt, ws @ y + bs
            assert len(a) == 128
            rail += ((a / np.linalg.norm(a) - b / np.linalg.norm(b)) ** 2).sum()
    np.testing.assert_allclose(terms["rail"], 0.25 * rail / len(texts), rtol=1e-4)

    kd, task = [], []
    z_s, z_t = out.logits.detach().numpy(), method.mentor.logits.numpy()
    for place, row in enumerate(batch.rows):
        y = data.labels[row].item()
        if kind == "regression":
            kd.append((z_s[place, 0] - z_t[row, 0]) ** 2)
            task.append((z_s[place, 0] - y) ** 2)
            continue
        s, t = (z_s[place], z_t[row]) if kind == "class" else (
            z_s[2 * place : 2 * place + 2, 0], z_t[2 * row : 2 * row + 2, 0])  # fmt: skip
        p, q = softmax(t / 3), softmax(s / 3)
        kd.append(9 * (p * np.log(p / q)).sum())
        task.append(-np.log(softmax(s)[y]))
    np.testing.assert_allclose(terms["soft"], 0.3 * np.mean(kd), rtol=1e-4)
    np.testing.assert_allclose(terms["task"], 0.45 * np.mean(task), rtol=1e-4)


def test_layers_are_drawn_in_order_without_repetition_and_anew_each_epoch():
    draws = [draw(12, 5, 3, e) for e in range(200)]
    assert all(d == sorted(set(d)) and len(d) == 5 for d in draws)
    assert {x for d in draws for x in d} == set(range(1, 12))
    assert len({tuple(d) for d in draws}) > 100
    assert draws == [draw(12, 5, 3, e) for e in range(200)]
    assert draws != [draw(12, 5, 4, e) for e in range(200)]
    assert draw(6, 5, 0, 0) == [1, 2, 3, 4, 5]


def test_the_draw_of_an_epoch_does_not_depend_on_the_epochs_before(checkpoints):
    a, b = (deeper(checkpoints)[1] for _ in range(2))
    for number in range(4):
        a.before_epoch(number, 8)
    torch.rand(3)
    b.before_epoch(3, 8)
    assert a.drawn == b.drawn == draw(6, 2, 0, 3)


@pytest.mark.parametrize("at", [2, 4, 7])
def test_a_killed_run_ends_as_an_unkilled_one(checkpoints, monkeypatch, tmp_path, at):
    make = lambda: deeper(checkpoints, n=32, dropout=0.1, training={"epochs": 3})
    whole, resumed = killed_and_resumed(make, monkeypatch, tmp_path / "state", at)
    alike(whole, resumed)
    assert same(weights(whole[1].maps), weights(resumed[1].maps))


def test_the_draw_matters(checkpoints):
    student, method, data = deeper(checkpoints)
    batch = batch_of(data, student, True)
    found = []
    for method.drawn in ([1, 2], [4, 5]):
        found.append(said(method, student, batch)["rail"].item())
    assert abs(found[0] - found[1]) > 1e-4


@pytest.mark.parametrize("concatenated", [False, True])
def test_rail_teaches_maps_and_lower_layers_and_not_the_last_or_the_head(checkpoints, concatenated):
    student, method, data = deeper(checkpoints, concatenated=concatenated)
    said(method, student, batch_of(data, student, True))["rail"].backward()
    learns = {n for n, p in student.named_parameters() if p.grad is not None and p.grad.any()}
    assert any("layer.1.output" in n for n in learns) and any("embeddings" in n for n in learns)
    assert not any("layer.2" in n or "pooler" in n or "classifier" in n for n in learns)
    assert all(p.grad is not None and p.grad.any() for p in method.maps.parameters())
    assert len(list(method.maps.parameters())) == (4 if concatenated else 8)


def test_the_last_layer_is_still_computed_at_the_pooled_tokens_alone(checkpoints):
    student, method, data = deeper(checkpoints)
    batch = batch_of(data, student, True)
    said(method, student, batch)
    assert method.watch.states[-1].shape[1] == len(batch.rows)


def trained(checkpoints, build, **kw):
    student, method, data = make(checkpoints, build, deep=6, training={"epochs": 2}, **kw)
    run = engine.train(student, method, data, method.setting.training, 0)
    return weights(student), run.curves


def test_without_weights_it_is_fine_tuning_bit_for_bit(checkpoints):
    rail, a = trained(checkpoints, build(), alpha=0.0, beta=0.0)
    plain, b = trained(checkpoints, Method)
    assert same(rail, plain) and (a["task"] == b["task"]).all()
    assert not same(rail, trained(checkpoints, build(), **THIRDS)[0])


def test_without_beta_it_is_kd(checkpoints):
    student, method, data = deeper(checkpoints, alpha=1.0, beta=0.0, tau=2.0)
    assert not method.parts
    terms = said(method, student, batch_of(data, student, True))
    assert set(terms) == {"task", "soft"} and terms["task"].item() == 0.0
    _, curves = trained(checkpoints, build(), alpha=1.0, beta=0.0, tau=2.0)
    np.testing.assert_array_equal(curves["total"], curves["soft"])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("concatenated", [False, True])
def test_the_engine_trains_it_and_leaves_a_plain_student(checkpoints, kind, concatenated):
    student, method, data = deeper(
        checkpoints, kind, concatenated, n=32, training={"epochs": 10, "student_lr": 3e-3}
    )
    run = engine.train(student, method, data, method.setting.training, 0)
    assert run.curves["rail"][-4:].mean() < 0.88 * run.curves["rail"][:4].mean()
    assert not method.parts
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in student.modules())


# -- bad input -----------------------------------------------------------------------------------


def test_without_a_mentor_it_says_so(checkpoints):
    with pytest.raises(ValueError, match="Rail learns from a mentor"):
        Rail(setting(), network(checkpoints))


def test_weights_over_one_are_an_error(checkpoints):
    with pytest.raises(ValueError, match=r"alpha \+ beta must not exceed 1, got 0.6 \+ 0.5"):
        deeper(checkpoints, alpha=0.6, beta=0.5)


@pytest.mark.parametrize(
    "layers, deep, counts", [(1, 6, "0, the mentor 5"), (4, 2, "3, the mentor 1")]
)
def test_depths_that_cannot_be_matched_are_an_error(checkpoints, layers, deep, counts):
    with pytest.raises(ValueError, match=f"the student has {counts}"):
        deeper(checkpoints, layers=layers, deep=deep)


def test_equal_depths_match_every_intermediate_layer(checkpoints):
    _, method, _ = deeper(checkpoints, layers=3, deep=3)
    method.before_epoch(1, 2)
    assert method.drawn == [1, 2] and isinstance(method.mentor, Mentor)
