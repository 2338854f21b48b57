"""VidLanKD: its losses against sums over tokens and pairs of units, and who learns in which half."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from tiny import WIDTH, alike, killed_and_resumed, rows, same, setting, weights

from armada_lib import engine, evaluation, losses, students
from armada_lib.batching import Encoded
from armada_lib.methods import Method
from armada_lib.methods.vidlankd import VidLanKD, contrast, halves, hinge, nst

CLOSE = dict(rtol=1e-4, atol=1e-6)
DEPTH = {"class": 2, "choice": 1}


def make(checkpoints, kind="class", n=16, dropout=0.0, first=None, **kw):
    """(student, method, data); the mask token is the tokenizer's."""
    s = setting(kind, **kw)
    if first is not None:
        s = dataclasses.replace(s, training=s.training.model_copy(update={"first_epochs": first}))
    student = students.load(checkpoints["bert"], DEPTH[kind], s.seed, dropout=dropout)
    student.mask_id = student.tokenizer.mask_token_id
    return student, VidLanKD(s, student), rows(student, n, kind=kind)


def said(method, data, phase, packed=True, picked=(3, 0, 7, 5, 2)):
    """(terms, batch); masks are drawn from one seed."""
    method.student.model.set_attn_implementation("armada_packed" if packed else "eager")
    method.teacher.set_attn_implementation("armada_packed" if packed else "eager")
    batch = data.batch(np.array(picked), packed)
    torch.manual_seed(3)
    method.before_epoch(0 if phase == "aligner" else method.first, method.setting.training.epochs)
    return method.losses(batch, None, phase, losses.mean_row), batch


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def unit(x):
    return x / np.linalg.norm(x)


LENGTHS = [5, 3, 2, 4, 1]


def mask_of(lengths):
    return torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]


# -- the three losses on fixed tensors -------------------------------------------------------------


@pytest.mark.parametrize("n", [4, 5])
def test_hinge_is_the_recipes_sum_over_tokens_of_paired_half_batches(n):
    h, v = draw(n, 5, 6), draw(n, 6, seed=1)
    total, count = 0.0, 0
    for i in range(n):
        other = (i + n // 2) % n
        for j in range(LENGTHS[i]):
            token = unit(h[i, j].numpy())
            own, wrong = token @ unit(v[i].numpy()), token @ unit(v[other].numpy())
            total, count = total + max(0.0, 1 - own + wrong), count + 1
    found = hinge(h, v, mask_of(LENGTHS[:n]))
    np.testing.assert_allclose(found.item(), total / count, **CLOSE)


def test_hinge_is_zero_once_every_token_is_nearer_to_its_clip_by_the_margin():
    v = torch.eye(6)[:4]
    assert hinge(v[:, None].expand(4, 3, 6) * 5, v, torch.ones(4, 3)).item() == 0
    wrong = v.roll(2, 0)[:, None].expand(4, 3, 6)
    np.testing.assert_allclose(hinge(wrong, v, torch.ones(4, 3)).item(), 2.0)


def test_nst_is_the_mmd_over_all_pairs_of_units():
    s, t, n = draw(5, 5, 4), draw(5, 5, 3, seed=1), 5
    total = 0.0
    for i in range(n):
        maps = [[unit(x[i, : LENGTHS[i], k].numpy()) for k in range(x.shape[-1])] for x in (s, t)]
        kernel = lambda a, b: np.mean([[(x @ y) ** 2 for y in b] for x in a])
        total += kernel(maps[0], maps[0]) + kernel(maps[1], maps[1]) - 2 * kernel(maps[0], maps[1])
    found = nst(s, t, mask_of(LENGTHS))
    np.testing.assert_allclose(found.item(), total / n, **CLOSE)
    assert found > 0.01


def test_nst_asks_for_the_teachers_pattern_not_for_its_units():
    t = draw(5, 5, 4)
    shuffled = t[..., [2, 0, 3, 1]] * torch.tensor([1.0, -2.0, 0.5, 3.0])
    assert abs(nst(shuffled, t, mask_of(LENGTHS)).item()) < 1e-6


def test_contrast_is_the_recipes_sum_position_by_position():
    s, t = draw(5, 5, 6), draw(5, 5, 6, seed=1)
    found, total, count = contrast(s, t, mask_of(LENGTHS), 0.7), 0.0, 0
    for j in range(5):
        here = [i for i in range(5) if LENGTHS[i] > j]
        z = [unit(x[i, j].numpy()) for x in (s, t) for i in here]
        for a in range(len(z)):
            scores = {b: z[a] @ z[b] / 0.7 for b in range(len(z)) if b != a}
            partner = (a + len(here)) % len(z)
            total += np.log(sum(np.exp(x) for x in scores.values())) - scores[partner]
            count += 1
    np.testing.assert_allclose(found.item(), total / count, **CLOSE)


def test_contrast_of_one_text_is_zero():
    assert contrast(draw(1, 4, 6), draw(1, 4, 6, seed=1), torch.ones(1, 4)).item() == 0


def test_padding_changes_no_loss():
    s, t, v, mask = draw(5, 5, 6), draw(5, 5, 6, seed=1), draw(5, 6, seed=2), mask_of(LENGTHS)
    noise = s.masked_fill(~mask[..., None], 0) + 9.0 * ~mask[..., None]
    for loss, second in ((hinge, v), (nst, t), (contrast, t)):
        np.testing.assert_allclose(
            loss(s, second, mask).item(), loss(noise, second, mask).item(), rtol=1e-6
        )


# -- the stage -------------------------------------------------------------------------------------


def replayed(method, batch):
    """(ids read (n, t), chosen (n, t), mask): the masking of `said`, text by text."""
    torch.manual_seed(3)
    read, chosen = method.masked(batch.inputs["input_ids"])
    packing = batch.inputs.get("packing")
    if packing is None:
        return read, chosen, batch.inputs["attention_mask"].bool()
    lengths = (packing.last - packing.first + 1).tolist()
    out = [torch.zeros(len(lengths), max(lengths), dtype=torch.long) for _ in range(2)]
    for i, (a, m) in enumerate(zip(packing.first.tolist(), lengths, strict=True)):
        for o, x in zip(out, (read, chosen), strict=True):
            o[i, :m] = x[0, a : a + m]
    return out[0], out[1].bool(), mask_of(lengths)


def states(model, ids, mask):
    """Token states by the model's plain attention."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    found = model(input_ids=ids, attention_mask=mask.long()).last_hidden_state
    model.set_attn_implementation(before)
    return found


def cross_entropy(head, found, truth, chosen, table):
    """Over chosen words, from the head's layers; its output layer is the embeddings."""
    z = head.transform(found[chosen]) @ table.T + head.bias
    return (z.logsumexp(-1) - z[torch.arange(len(z)), truth[chosen]]).mean()


@pytest.mark.parametrize("kind", ["class", "choice"])
@pytest.mark.parametrize("packed", [True, False])
@torch.no_grad()
def test_both_halves_are_the_recipes_sums(checkpoints, packed, kind):
    _, method, data = make(checkpoints, kind)
    texts = lambda b: (
        b.rows if kind == "class" else np.stack([2 * b.rows, 2 * b.rows + 1], 1).reshape(-1)
    )

    terms, batch = said(method, data, "aligner", packed)
    read, chosen, mask = replayed(method, batch)
    truth = torch.zeros_like(read)
    for i, text in enumerate(texts(batch)):
        truth[i, : len(data.tokens[text])] = torch.from_numpy(data.tokens[text].astype(np.int64))
    method.teacher.eval()
    h = states(method.teacher, read, mask)
    a, b = method.clip
    clips = data.teacher[torch.from_numpy(texts(batch))].float() @ a.weight.T @ b.weight.T
    table = method.teacher.embeddings.word_embeddings.weight
    want = {
        "words": cross_entropy(method.read, h, truth, chosen, table),
        "clips": hinge(h, clips, mask),
    }
    assert chosen.any() and set(terms) == set(want)
    for name, value in want.items():
        np.testing.assert_allclose(terms[name].item(), value.item(), rtol=1e-4)

    method.teacher.embeddings.word_embeddings.weight.add_(
        draw(*table.shape) * 0.5
    )  # as if it had learnt
    terms, batch = said(method, data, "student", packed)
    method.student.eval()
    h_t, h_s = (states(m, read, mask) for m in (method.teacher, method.encoder))
    h_t = h_t / h_t.norm(dim=-1, keepdim=True)
    want = {
        "words": cross_entropy(method.words, h_s, truth, chosen, method.table),
        "nst": nst(method.heads["select"](h_s), h_t, mask),
        "contrast": contrast(method.heads["near"](h_s), h_t, mask),
    }
    assert set(terms) == set(want)
    for name, value in want.items():
        np.testing.assert_allclose(terms[name].item(), value.item(), rtol=1e-4)


def learns(module):
    return {n for n, p in module.named_parameters() if p.grad is not None and p.grad.any()}


def test_the_teacher_learns_from_clips_and_the_student_from_the_teacher(checkpoints):
    student, method, data = make(checkpoints)
    sum(said(method, data, "aligner")[0].values()).backward()
    assert not learns(student) and not learns(method.heads)
    assert any("layer.0" in n for n in learns(method.teacher))
    assert len(learns(method.clip)) == 4 and len(learns(method.read)) == 5
    method.parts["teacher"].zero_grad()

    sum(said(method, data, "student")[0].values()).backward()
    assert not learns(method.parts["teacher"]) and not method.teacher.training
    assert {n.split(".")[0] for n in learns(method.heads)} == {"words", "select", "near"}
    found = learns(student)
    assert any("layer.0" in n for n in found) and any("word_embeddings" in n for n in found)
    assert not any("pooler" in n or "classifier" in n for n in found)


def test_the_student_reads_no_clip_and_the_teacher_does(checkpoints):
    _, method, data = make(checkpoints)
    before = {p: said(method, data, p)[0] for p in ("aligner", "student")}
    data.teacher = data.teacher.flip(1) * 3
    after = {p: said(method, data, p)[0] for p in ("aligner", "student")}
    assert all(torch.equal(before["student"][k], after["student"][k]) for k in before["student"])
    assert torch.equal(before["aligner"]["words"], after["aligner"]["words"])
    assert before["aligner"]["clips"] != after["aligner"]["clips"]


def test_training_lowers_the_losses_and_leaves_a_plain_student(checkpoints):
    budget = {"epochs": 16, "batch_size": 32, "student_lr": 5e-3}
    student, method, data = make(checkpoints, n=64, training=budget)
    head = student.model.classifier.weight.clone()
    teacher = method.teacher
    trained = engine.train(student, method, data, method.setting.training, 0)
    assert [e["phase"] for e in trained.epochs] == ["aligner"] * 8 + ["student"] * 8
    for name, part in (("clips", 0.93), ("words", 0.93), ("contrast", 0.97)):
        curve = trained.curves[name][np.isfinite(trained.curves[name])][:16]
        assert curve[-4:].mean() < part * curve[:4].mean(), name
    assert not method.parts and not hasattr(student, "stage")
    assert torch.equal(head, student.model.classifier.weight)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in student.modules())
    for p in teacher.parameters():  # nothing of it is read any more
        p.data.fill_(float("nan"))
    bare = Encoded(data.tokens, data.types, data.labels, data.per_example, data.pad)
    found = evaluation.predict(student, Method(method.setting, student), bare, bf16=False)
    assert list(found) == ["student"] and np.isfinite(found["student"]).all()


def test_a_student_can_take_on_the_teachers_patterns(checkpoints):
    _, method, data = make(checkpoints)
    method.table.data.copy_(draw(*method.table.shape))  # far from the teacher
    learner = torch.optim.Adam(
        [*method.encoder.parameters(), *method.heads["select"].parameters()], 5e-3
    )
    curve = []
    for _ in range(30):
        loss = said(method, data, "student")[0]["nst"]
        learner.zero_grad()
        loss.backward()
        learner.step()
        curve.append(loss.item())
    assert curve[-1] < 0.5 * curve[0]


def test_two_runs_of_a_seed_are_one(checkpoints):
    found = []
    for _ in range(2):
        student, method, data = make(checkpoints, dropout=0.1)
        torch.rand(3)  # what is drawn outside has no part in it
        found.append((student, method, engine.train(student, method, data, method.setting.training, 0)))  # fmt: skip
    alike(*found)


@pytest.mark.parametrize("at", [1, 3])
def test_a_killed_stage_ends_as_an_unkilled_one(checkpoints, monkeypatch, tmp_path, at):
    build = lambda: make(checkpoints, n=24, dropout=0.1, training={"epochs": 2})
    alike(*killed_and_resumed(build, monkeypatch, tmp_path / "state", at))


def test_a_teacher_that_is_not_trained_further_stays_as_it_is(checkpoints):
    student, method, data = make(checkpoints, training={"epochs": 2})
    teacher, kept = method.teacher, []
    engine.train(
        student, method, data, method.setting.training, 0,
        after_epoch=lambda n: kept.append(weights(teacher)),
    )  # fmt: skip
    assert same(kept[0], kept[1])
    start = students.load(checkpoints["bert"], 2, 0, dropout=0.0)
    assert not same(kept[0], weights(start.model.bert))


# -- bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "epochs, chosen, want", [(2, None, 1), (3, None, 1), (10, None, 5), (10, 9, 9)]
)
def test_epochs_are_split_as_stated(epochs, chosen, want):
    assert halves("vidlankd", epochs, chosen) == want


@pytest.mark.parametrize("epochs, chosen", [(1, None), (4, 4), (4, 0)])
def test_a_split_that_leaves_nothing_for_one_half_is_an_error(checkpoints, epochs, chosen):
    with pytest.raises(ValueError, match=f"vidlankd .* first_epochs must be 1 to {epochs - 1}"):
        make(checkpoints, first=chosen, training={"epochs": epochs})


def test_the_chosen_number_of_epochs_is_kept(checkpoints):
    _, method, _ = make(checkpoints, first=3, training={"epochs": 4})
    assert method.schedule(4) == ["aligner"] * 3 + ["student"]


def test_texts_without_clips_are_an_error(checkpoints):
    _, method, data = make(checkpoints)
    data.teacher = None
    with pytest.raises(ValueError, match="VidLanKD reads pictures"):
        said(method, data, "aligner")


def test_the_clip_may_have_any_width(checkpoints):
    _, method, _ = make(checkpoints)
    assert method.clip[0].in_features == WIDTH
