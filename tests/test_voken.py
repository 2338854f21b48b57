"""Vokenization: ranking, nearest pictures and both losses by loops over words; who learns when."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_pretraining import head, plain, texts_of, word_loss
from test_visual import CLOSE, batch_of, learns, make
from tiny import alike, killed_and_resumed, same, setting, weights

from armada_lib import engine, evaluation, losses
from armada_lib.methods import Method, visual
from armada_lib.methods.voken import Vokenization, match_epochs, opponents, ranking

SPECIAL = {0, 1, 2, 3, 4}


def ready(checkpoints, **kw):
    """(student, stage, data) before its first step, without dropout in the match model."""
    student, stage, data = make(checkpoints, Vokenization, **kw)
    stage.attach(data)
    stage.match.eval()
    return student, stage, data


def said(stage, batch, phase, seed=11):
    torch.manual_seed(seed)
    return stage.losses(batch, None, phase, losses.mean_row)


def unit(mlp, x):
    first, _, _, last = mlp
    x = last(F.relu(first(x)))
    return x / x.square().sum(-1, keepdim=True).sqrt()


@torch.no_grad()
def read(encoder, ids):
    """(t, 64) of one text: what the match model reads of its words."""
    states = encoder(input_ids=ids, output_hidden_states=True).hidden_states[1:]
    return torch.cat(states[-4:], -1)[0]


# -- stage 1 -------------------------------------------------------------------------------------


def test_every_word_is_ranked_against_the_picture_of_the_text_across(checkpoints):
    student, stage, data = ready(checkpoints)
    batch = batch_of(data, picked=(3, 0, 7, 5, 2, 9, 1))  # seven: one text rests
    terms = said(stage, batch, "aligner")
    torch.manual_seed(11)
    other = opponents(7, torch.device("cpu")).tolist()
    assert sum(i == j for i, j in enumerate(other)) == 1
    v, found, encoder = unit(stage.match.pictures, batch.teacher).detach(), [], plain(student)
    for i, (ids, _) in enumerate(texts_of(batch, data)):
        for token, w in zip(
            ids[0].tolist(), unit(stage.match.words, read(encoder, ids)), strict=True
        ):
            if other[i] != i and token not in SPECIAL:
                found.append(max(0.0, (0.5 - w @ v[i] + w @ v[other[i]]).item()))
    assert set(terms) == {"match"} and 0 < min(found) < max(found)
    np.testing.assert_allclose(terms["match"].item(), np.mean(found), rtol=1e-4)


def test_opponents_are_pairs_across_a_random_halving():
    for n in (1, 2, 7, 32):
        torch.manual_seed(n)
        other = opponents(n, torch.device("cpu"))
        assert torch.equal(other[other], torch.arange(n))
        assert (other == torch.arange(n)).sum() == n % 2
    torch.manual_seed(1)
    assert len({int(opponents(8, torch.device("cpu"))[0]) for _ in range(99)}) == 7


def test_the_ranking_is_the_margin_for_equal_pictures_and_0_beyond_it():
    w, text, other = torch.eye(4)[[0, 1]], torch.tensor([0, 1]), torch.tensor([1, 0])
    assert ranking(w, torch.eye(4)[[0, 0]], text, other).item() == 0.5
    assert ranking(w, torch.eye(4)[[0, 1]], text, other).item() == 0
    assert ranking(w, torch.eye(4)[[1, 0]], text, other).item() == 1.5
    nobody = ranking(w[:0], torch.eye(4), text[:0], other)
    assert nobody.item() == 0


def test_stage_1_moves_the_match_model_alone(checkpoints):
    student, stage, data = ready(checkpoints)
    said(stage, batch_of(data), "aligner")["match"].backward()
    assert learns(stage.match) == {n for n, _ in stage.match.named_parameters()}
    assert not learns(student) and set(stage.parts) == {"match"}
    assert stage.learning_rate("match") == 1e-3
    assert make(checkpoints, Vokenization, partner_lr=0.2)[1].learning_rate("match") == 0.2


# -- vokens --------------------------------------------------------------------------------------


@pytest.mark.parametrize("bound", [50_000, 9])
def test_every_token_gets_the_nearest_picture(checkpoints, bound):
    student, stage, data = ready(checkpoints, n=80, vokens=bound)  # more than one chunk
    stage.before_epoch(1, 2)
    v = unit(stage.match.pictures, data.vectors(np.arange(80)))
    allowed, encoder = stage.chosen.tolist(), plain(student)
    assert len(allowed) == min(bound, 80) == len(set(allowed))
    assert len(stage.names[-1].bias) == len(allowed)
    place, own, words = 0, 0, 0
    for i, tokens in enumerate(data.tokens):
        ids = torch.from_numpy(tokens.astype(np.int64))[None]
        scores = unit(stage.match.words, read(encoder, ids)) @ v[allowed].T
        picked = stage.vokens[place : place + len(tokens)]
        torch.testing.assert_close(scores[range(len(tokens)), picked], scores.amax(1), **CLOSE)
        is_word = [t not in SPECIAL for t in tokens]
        own += sum(w and allowed[p] == i for w, p in zip(is_word, picked.tolist(), strict=True))
        words += sum(is_word)
        place += len(tokens)
    assert place == len(stage.vokens)
    assert stage.facts() == {
        "vokens": len(set(stage.vokens.tolist())),
        "vokens_own": pytest.approx(own / words),
    }


def test_pictures_are_drawn_from_the_seed(checkpoints):
    chosen = [ready(checkpoints, n=40, vokens=9)[1].chosen for _ in range(2)]
    assert np.array_equal(*chosen) and not np.array_equal(chosen[0], np.arange(9))


def test_vokens_are_those_of_the_encoder_as_it_came(checkpoints):
    found = []
    for moved in (False, True):
        student, stage, _ = ready(checkpoints)
        if moved:
            with torch.no_grad():
                for p in student.model.bert.parameters():
                    p.add_(torch.randn_like(p))
        stage.before_epoch(0, 2)
        assert stage.vokens is None
        stage.before_epoch(1, 2)
        found.append(stage.vokens)
        assert stage.start is None
    assert torch.equal(*found) and len(found[0].unique()) > 1


def test_a_trained_match_model_gives_words_their_own_pictures_more_often(checkpoints):
    shares = []
    for first in (0, 20):
        student, stage, data = make(
            checkpoints, Vokenization, n=24, epochs=first + 1, match_epochs=first, partner_lr=5e-3
        )
        trained = engine.train(student, stage, data, stage.setting.training, 0)
        shares.append(trained.diagnostics["vokens_own"])
    match = trained.curves["match"][np.isfinite(trained.curves["match"])]
    assert match[-6:].mean() < 0.6 * match[:6].mean()
    assert shares[1] > 4 * shares[0]


# -- stage 2 -------------------------------------------------------------------------------------


def test_stage_2_is_masked_words_and_the_voken_of_every_word(checkpoints):
    student, stage, data = ready(checkpoints)
    stage.before_epoch(1, 2)
    batch = batch_of(data, picked=range(12))
    terms = said(stage, batch, "student")
    torch.manual_seed(11)
    masked, chosen = stage.masked(batch.inputs["input_ids"])
    starts = np.cumsum(data.lengths) - data.lengths
    words, named, encoder = [], [], plain(student)
    for (ids, at), row in zip(texts_of(batch, data), batch.rows, strict=True):
        states = encoder(input_ids=masked[0, at][None]).last_hidden_state[0]
        words += word_loss(stage, states[chosen[0, at]], ids[0][chosen[0, at]])
        for j, token in enumerate(ids[0].tolist()):
            if token not in SPECIAL:
                logits = head(stage.names, states[j])
                named.append(-logits.log_softmax(-1)[stage.vokens[starts[row] + j]])
    assert set(terms) == {"words", "vokens"} and len(words) > 2
    torch.testing.assert_close(terms["words"], torch.stack(words).mean(), **CLOSE)
    torch.testing.assert_close(terms["vokens"], torch.stack(named).mean(), **CLOSE)


def test_stage_2_moves_encoder_and_heads_and_no_picture_is_read(checkpoints):
    student, stage, data = ready(checkpoints)
    stage.before_epoch(1, 2)
    batch = batch_of(data)
    batch.teacher = None
    terms = said(stage, batch, "student")
    terms["vokens"].backward()
    found = learns(student)
    assert all(any(name in n for n in found) for name in (
        "word_embeddings", "layer.0.attention.self.query", "layer.1.output.dense", "stage.vokens"))  # fmt: skip
    assert not any("stage.words" in n for n in found)
    terms = said(stage, batch, "student")
    terms["words"].backward()
    assert any("stage.words" in n for n in learns(student))
    assert not any("pooler" in n or "classifier" in n for n in learns(student))
    assert not learns(stage.match)


def test_with_one_picture_stage_2_is_masked_words_alone(checkpoints):
    """The limit without pictures: a voken that is always the same one teaches nothing."""
    _, stage, data = ready(checkpoints, vokens=1)
    stage.before_epoch(1, 2)
    batch = batch_of(data)
    terms = said(stage, batch, "student")
    assert terms["vokens"].item() == 0
    torch.manual_seed(11)
    assert torch.equal(terms["words"], stage.masked_words(batch.inputs)[0])


# -- in the engine -------------------------------------------------------------------------------


@pytest.mark.parametrize("epochs, chosen, want", [
    (10, None, 2), (20, None, 5), (2, None, 1), (6, 0, 0), (6, 5, 5),
])  # fmt: skip
def test_epochs_are_split_as_stated(epochs, chosen, want):
    assert match_epochs(epochs, chosen) == want


@pytest.mark.parametrize("epochs, chosen", [(1, None), (6, 6), (6, 9)])
def test_a_split_that_leaves_the_student_none_is_an_error(checkpoints, epochs, chosen):
    with pytest.raises(ValueError, match=f"of {epochs} epochs leave none for the student"):
        make(checkpoints, Vokenization, epochs=epochs, match_epochs=chosen)


def test_both_stages_learn_and_leave_an_encoder_that_reads_text_alone(checkpoints):
    student, stage, data = make(
        checkpoints, Vokenization, n=48, epochs=8, match_epochs=2, student_lr=3e-3
    )
    names, before, snapshots = set(weights(student)), weights(student), []
    note = lambda _: snapshots.append((weights(student), weights(stage.match)))
    trained = engine.train(student, stage, data, stage.setting.training, 0, after_epoch=note)
    assert [e["phase"] for e in trained.epochs] == ["aligner"] * 2 + ["student"] * 6
    assert same(before, {k: v for k, v in snapshots[1][0].items() if k in before})
    assert same(snapshots[1][1], snapshots[-1][1]) and not same(snapshots[0][1], snapshots[1][1])
    for name in ("words", "vokens"):
        curve = trained.curves[name][np.isfinite(trained.curves[name])]
        assert curve[-6:].mean() < 0.9 * curve[:6].mean()
    assert not stage.parts and set(weights(student)) == names and not hasattr(student, "stage")
    assert not same(before, weights(student))
    data.teacher = None
    tuning = Method(setting(), copy.deepcopy(student))
    engine.train(tuning.student, tuning, data, tuning.setting.training, 0)
    found = evaluation.predict(tuning.student, tuning, data, bf16=False)
    assert found["student"].shape == (48, 2)


@pytest.mark.parametrize("at", [2, 5])
def test_a_run_killed_in_either_stage_ends_as_an_unkilled_one(
    checkpoints, monkeypatch, tmp_path, at
):
    build = lambda: make(checkpoints, Vokenization, n=24, dropout=0.1, epochs=3)
    whole, resumed = killed_and_resumed(build, monkeypatch, tmp_path / "state", at)
    alike(whole, resumed)
    assert whole[2].diagnostics == resumed[2].diagnostics


def test_it_is_the_same_under_the_same_seed(checkpoints):
    found = []
    for seed in (0, 0, 1):
        student, stage, data = make(checkpoints, Vokenization, dropout=0.1)
        engine.train(student, stage, data, stage.setting.training, seed)
        found.append(weights(student))
    assert same(found[0], found[1]) and not same(found[0], found[2])


def test_bf16_is_near(checkpoints):
    found = []
    for precision in ("fp32", "bf16"):
        _, stage, data = ready(checkpoints, precision=precision)
        batch = batch_of(data)
        terms = list(said(stage, batch, "aligner").values())
        stage.before_epoch(1, 2)
        terms += said(stage, batch, "student").values()
        sum(terms).backward()
        found.append(torch.stack(terms))
    assert not torch.equal(*found)
    torch.testing.assert_close(*found, rtol=0.05, atol=0.05)


def test_texts_without_pictures_and_examples_of_two_texts_are_errors(checkpoints):
    _, stage, data = ready(checkpoints)
    data.teacher = None
    with pytest.raises(ValueError, match="Vokenization reads pictures; the texts have none"):
        said(stage, batch_of(data), "aligner")
    with pytest.raises(ValueError, match="Vokenization reads pictures; the texts have none"):
        stage.before_epoch(1, 2)
    _, stage, data = make(checkpoints, Vokenization)
    data.per_example = 2
    with pytest.raises(ValueError, match="reads plain texts"):
        stage.attach(data)


def test_a_compact_vocabulary_and_a_single_text_are_read(checkpoints):
    _, stage, data = ready(checkpoints, used=np.array([0, 4]))
    for epoch, phase in enumerate(("aligner", "student")):
        stage.before_epoch(epoch, 2)
        terms = said(stage, batch_of(data, picked=[3]), phase)
        assert all(torch.isfinite(t) for t in terms.values())
        sum(terms.values()).backward()
    assert visual.mask_id(stage.student) == stage.mask
