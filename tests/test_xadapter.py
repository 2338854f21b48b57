"""X-adapter: what is added before the last layers, by hand; who learns when; what it reads."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
import torch
from test_tinybert import OUT
from tiny import WIDTH, alike, killed_and_resumed, rows, same, setting, weights
from transformers import AutoModel, AutoTokenizer

from armada_lib import engine, evaluation, losses, students
from armada_lib.batching import Encoded
from armada_lib.methods import Method
from armada_lib.methods.visual import mask_tokens, regions
from armada_lib.methods.xadapter import XAdapter

PICTURE = {"regions": 6}


def make(checkpoints, build=XAdapter, kind="class", n=16, dropout=0.0, layers=3, extra=None,
         compact=False, **kw):  # fmt: skip
    """(student, method, data): a student of random weights, `layers` deep."""
    pictures = {"pictures": kw.pop("pictures")} if "pictures" in kw else {}
    s = setting(kind, **kw)
    s = dataclasses.replace(
        s, training=s.training.model_copy(update={"regions": 6} | (extra or {}))
    )
    student = students.load(checkpoints["bert"], OUT[kind], s.seed, kind == "regression", dropout)
    config = copy.deepcopy(student.model.config)
    config.num_hidden_layers = layers
    with torch.random.fork_rng():
        torch.manual_seed(s.seed)
        student = students.Student(
            type(student.model)(config), student.tokenizer, None, kind == "regression"
        )
    data = rows(student, n, kind=kind)
    student.mask_id = mask = student.tokenizer.mask_token_id
    if compact:
        used = np.unique(np.concatenate([*data.tokens, np.array([0, mask])]))
        new = student.compact(used).numpy().astype(np.int32)
        data.tokens, student.mask_id = [new[t] for t in data.tokens], int(new[mask])
    return student, build(s, student, **pictures), data


def stir(method):
    """Adapters that add something."""
    g = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for p in method.adapters.adapters.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * 0.3)


@torch.no_grad()
def added(adapter, h, memory):
    """What an adapter adds to (t, d), reading (s, e): head by head, token by token."""
    lin = lambda layer, x: x @ layer.weight.T + layer.bias
    q, k, v = lin(adapter.query, h), lin(adapter.key, memory), lin(adapter.value, memory)
    d, out = q.shape[1] // adapter.heads, torch.zeros_like(q)
    for a in range(0, q.shape[1], d):
        for i in range(len(h)):
            scores = np.array([float(q[i, a : a + d] @ x[a : a + d]) for x in k]) / d**0.5
            p = np.exp(scores - scores.max())
            parts = zip(p / p.sum(), v, strict=True)
            out[i, a : a + d] = sum(float(w) * x[a : a + d] for w, x in parts)
    x = lin(adapter.down, out)
    return lin(adapter.up, 0.5 * x * (1 + torch.erf(x / 2**0.5)))


@torch.no_grad()
def by_hand(plain, method, ids, memory):
    """Last states of one text, (t, d), layer by layer; `plain` is a student without adapters."""
    encoder = plain.model.bert
    x = encoder.embeddings(input_ids=ids[None])
    first = len(encoder.encoder.layer) - len(method.adapters.adapters)
    for i, layer in enumerate(encoder.encoder.layer):
        if i >= first:
            x = x + added(method.adapters.adapters[i - first], x[0], memory)
        x = layer(x)
    return x[0]


def plainly(student):
    """The student's weights in a model without adapters and without packing."""
    config = copy.deepcopy(student.model.config)
    model = type(student.model)(config)
    state = {k: v for k, v in student.model.state_dict().items() if "word_embeddings" not in k}
    table = student.model.get_input_embeddings().weight
    model.set_input_embeddings(torch.nn.Embedding.from_pretrained(table.detach().clone()))
    model.load_state_dict(state, strict=False)
    plain = students.Student(model, student.tokenizer, None, student.regression).eval()
    plain.early = False
    model.set_attn_implementation("eager")
    return plain


def texts_of(batch, kind):
    both = np.stack([2 * batch.rows, 2 * batch.rows + 1], 1)
    return (both if kind == "choice" else batch.rows).reshape(-1)


# -- what a forward does ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, packed, pictures, compact, layers",
    [
        ("class", True, False, False, 3),
        ("class", False, False, False, 3),
        ("choice", True, False, True, 3),
        ("class", True, True, False, 3),
        ("choice", False, True, False, 2),
        ("regression", True, True, True, 1),
    ],
)
def test_the_last_layers_read_what_the_adapters_add(
    checkpoints, kind, packed, pictures, compact, layers
):
    student, method, data = make(
        checkpoints, kind=kind, pictures=pictures, compact=compact, layers=layers, extra=PICTURE
    )
    stir(method)
    plain, start = plainly(student), plainly(student)
    assert len(method.adapters.adapters) == min(2, layers)
    with torch.no_grad():  # the student has learnt since; what the T-expert reads has not
        for module in (student, plain):
            module.model.bert.encoder.layer[0].output.dense.weight.mul_(1.5)
    if not packed:
        student.model.set_attn_implementation("eager")
        if not pictures:
            method.adapters.source.encoder.set_attn_implementation("eager")
    batch = data.batch(np.array([3, 0, 7, 5, 2]), packed)
    with torch.no_grad():
        logits = student.eval()(method.inputs(batch)).logits
    for i, text in enumerate(texts_of(batch, kind)):
        ids = torch.from_numpy(data.tokens[text].astype(np.int64))
        if pictures:
            memory = data.teacher[text].float().view(6, WIDTH // 6)
        else:
            with torch.no_grad():
                memory = start.model.bert(input_ids=ids[None]).last_hidden_state[0]
        states = by_hand(plain, method, ids, memory)
        with torch.no_grad():
            want = plain.model.classifier(plain.model.bert.pooler(states[None]))[0]
        torch.testing.assert_close(logits[i], want, atol=2e-5, rtol=1e-3)


def test_another_text_encoder_reads_the_text_with_its_own_tokens(checkpoints):
    other = checkpoints["bert"].checkpoint
    student, method, data = make(checkpoints, extra={"text_encoder": other}, compact=True)
    batch = data.batch(np.arange(5), True)
    words = lambda tokens: student.tokenizer.decode(
        student._used.numpy()[tokens], skip_special_tokens=True
    )
    texts = [words(data.tokens[i]) for i in batch.rows]
    assert texts[0].split() and "[" not in "".join(texts)
    tokenizer, model = AutoTokenizer.from_pretrained(other), AutoModel.from_pretrained(other)
    read = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        want = model.eval()(**read).last_hidden_state
        memory, mask = method.adapters.source(student, batch.inputs)
    assert torch.equal(mask, read["attention_mask"].bool())
    torch.testing.assert_close(memory[mask], want[mask], atol=1e-5, rtol=1e-4)
    assert not any(p.requires_grad for p in method.adapters.source.parameters())


@pytest.mark.parametrize("pictures", [False, True])
def test_at_first_nothing_is_added(checkpoints, pictures):
    student, method, data = make(checkpoints, pictures=pictures, extra=PICTURE)
    plain, batch = plainly(student), data.batch(np.arange(6), True)
    plain.model.set_attn_implementation("armada_packed")
    with torch.no_grad():
        found = student.eval()(method.inputs(batch)).logits
        torch.testing.assert_close(found, plain(batch.inputs).logits, atol=1e-6, rtol=1e-6)


# -- who learns when -------------------------------------------------------------------------------


def learns(module):
    return {n for n, p in module.named_parameters() if p.grad is not None and p.grad.any()}


@pytest.mark.parametrize("pictures", [False, True])
def test_in_adaptation_the_adapters_alone_learn_from_masked_words(checkpoints, pictures):
    student, method, data = make(checkpoints, pictures=pictures, extra=PICTURE)
    stir(method)
    batch = data.batch(np.arange(8), True)
    torch.manual_seed(3)
    terms = method.losses(batch, None, "aligner", losses.mean_row)
    assert list(terms) == ["words"]
    terms["words"].backward()
    assert not any(p.grad is not None for p in student.parameters())
    assert all(p.requires_grad for p in student.parameters())
    found = learns(method.adapters.adapters)
    parts = ("query", "key", "value", "down", "up")
    assert all(f"{i}.{part}.weight" in found for i in (0, 1) for part in parts)
    assert len(learns(method.words)) == 5

    method.parts["adapters"].zero_grad()
    terms = method.losses(batch, student.train()(method.inputs(batch)), "joint", losses.mean_row)
    assert list(terms) == ["task"]
    terms["task"].backward()
    assert any("layer.0" in n for n in learns(student)) and learns(method.adapters.adapters)
    assert not learns(method.words)


@pytest.mark.parametrize("packed", [True, False])
def test_adaptation_is_the_loss_of_masked_words(checkpoints, packed):
    student, method, data = make(checkpoints)
    stir(method)
    student.eval()
    if not packed:
        student.model.set_attn_implementation("eager")
        method.adapters.source.encoder.set_attn_implementation("eager")
    batch = data.batch(np.arange(6), packed)
    seen = []
    method.adapters.source.register_forward_pre_hook(lambda m, args: seen.append(args[1]))
    torch.manual_seed(3)
    loss = method.losses(batch, None, "aligner", losses.mean_row)["words"]
    torch.manual_seed(3)
    ids = batch.inputs["input_ids"]
    read, chosen = mask_tokens(ids, method.special, student.mask_id, len(method.table))
    assert torch.equal(read, seen[0]["input_ids"])  # the expert sees what the encoder does
    plain, total, count = plainly(student), 0.0, 0
    for i, text in enumerate(batch.rows):
        n = len(data.tokens[text])
        row, a = (0, int(batch.inputs["packing"].first[i])) if packed else (i, 0)
        own, truth, asked = (x[row, a : a + n] for x in (read, ids, chosen))
        with torch.no_grad():
            memory = plain.model.bert(input_ids=own[None]).last_hidden_state[0]
            x = method.words.transform(by_hand(plain, method, own, memory))
            z = x @ plain.model.get_input_embeddings().weight.T + method.words.bias
        for j in asked.nonzero()[:, 0].tolist():
            total, count = total - float(z.log_softmax(-1)[j, truth[j]]), count + 1
    assert count > 3
    np.testing.assert_allclose(loss.item(), total / count, rtol=1e-4)


def test_an_encoder_is_frozen_in_adaptation_and_learns_afterwards(checkpoints):
    student, method, data = make(checkpoints, n=24, training={"epochs": 4, "student_lr": 1e-3})
    start, kept = weights(student.model), []
    note = lambda _: kept.append((weights(student.model), weights(method.adapters)))
    trained = engine.train(student, method, data, method.setting.training, 0, after_epoch=note)
    assert [e["phase"] for e in trained.epochs] == ["aligner"] * 2 + ["joint"] * 2
    assert same(start, kept[1][0]) and not same(start, kept[3][0])
    moved = lambda a, b: {k for k in a if not torch.equal(a[k], b[k])}
    assert all(k.startswith("adapters.") for k in moved(kept[0][1], kept[1][1]))
    assert moved(kept[0][1], kept[1][1]) and moved(kept[2][1], kept[3][1])
    assert set(trained.curves) == {"words", "task", "total", "grad_student", "grad_adapters"}


def test_adapters_that_add_nothing_leave_undistilled_fine_tuning(checkpoints):
    found = []
    for build in (XAdapter, Method):
        student, method, data = make(checkpoints, build, n=24, training={"epochs": 2})
        if build is XAdapter:
            method.adapters.requires_grad_(False)  # they stay at their zero start
            method.schedule = lambda epochs: ["joint"] * epochs
            method.parts.clear()
        trained = engine.train(student, method, data, method.setting.training, 0)
        found.append((weights(student.model), trained.curves["task"]))
    assert same(found[0][0], found[1][0])
    np.testing.assert_array_equal(found[0][1], found[1][1])


@pytest.mark.parametrize("kind", ["class", "choice"])
def test_training_lowers_the_losses_and_needs_text_alone_afterwards(checkpoints, kind):
    student, method, data = make(
        checkpoints, kind=kind, n=64,
        training={"epochs": 12, "batch_size": 32, "student_lr": 3e-3},
    )  # fmt: skip
    trained = engine.train(student, method, data, method.setting.training, 0)
    for name in ("words", "task"):
        curve = trained.curves[name][np.isfinite(trained.curves[name])]
        assert curve[-4:].mean() < 0.93 * curve[:3].mean(), name
    assert not method.parts and student.adapters is method.adapters
    bare = Encoded(data.tokens, data.types, data.labels, data.per_example, 0)
    found = evaluation.predict(student, method, data, bf16=False)
    assert list(found) == ["student"]
    np.testing.assert_array_equal(
        found["student"], evaluation.predict(student, method, bare, bf16=False)["student"]
    )
    with torch.no_grad():  # they are part of what predicts
        for adapter in method.adapters.adapters:
            adapter.up.weight.zero_()
    again = evaluation.predict(student, method, bare, bf16=False)["student"]
    assert not np.allclose(again, found["student"])


@pytest.mark.parametrize("at", [1, 3])
def test_a_killed_run_ends_as_an_unkilled_one(checkpoints, monkeypatch, tmp_path, at):
    build = lambda: make(checkpoints, layers=2, dropout=0.1, training={"epochs": 2})
    whole, resumed = killed_and_resumed(build, monkeypatch, tmp_path / "state", at)
    alike(whole, resumed)
    assert same(weights(whole[1].adapters), weights(resumed[1].adapters))


def test_after_expansion_it_predicts_the_same(checkpoints):
    student, method, data = make(checkpoints, compact=True)
    stir(method)
    want = evaluation.predict(student, method, data, bf16=False)["student"]
    used = student._used.numpy()
    student.expand()
    whole = Encoded([used[t].astype(np.int32) for t in data.tokens], None, data.labels, 1, 0)
    found = evaluation.predict(student, method, whole, bf16=False)["student"]
    np.testing.assert_allclose(found, want, atol=1e-5)


def test_a_copy_of_the_student_has_adapters_of_its_own(checkpoints):
    student, method, data = make(checkpoints)
    stir(method)
    other, batch = copy.deepcopy(student).eval(), data.batch(np.arange(4), True)
    with torch.no_grad():
        want = student.eval()(batch.inputs).logits
        torch.testing.assert_close(other(batch.inputs).logits, want)
        for p in method.adapters.adapters.parameters():
            p.zero_()
        torch.testing.assert_close(other(batch.inputs).logits, want)
        assert not torch.allclose(student(batch.inputs).logits, want)


def test_learning_rates(checkpoints):
    _, method, _ = make(checkpoints, training={"student_lr": 1e-4})
    assert method.learning_rate("student") == 1e-4
    assert method.learning_rate("adapters") == pytest.approx(5e-4)
    _, method, _ = make(checkpoints, training={"partner_lr": 2e-3})
    assert method.learning_rate("adapters") == 2e-3


# -- bad input -------------------------------------------------------------------------------------


def test_the_v_expert_asks_for_its_pictures_and_takes_each_batchs_own(checkpoints):
    student, method, data = make(checkpoints, pictures=True, extra=PICTURE)
    batch = data.batch(np.arange(4), True)
    student.eval()
    with pytest.raises(ValueError, match="XAdapter.inputs"):
        student(batch.inputs)
    student(method.inputs(batch))
    torch.testing.assert_close(method.adapters.memory[0], regions(batch.teacher, 6))
    with pytest.raises(ValueError, match="XAdapter.inputs"):
        student(batch.inputs)
    batch.teacher = None
    with pytest.raises(ValueError, match="the texts have none"):
        method.inputs(batch)


def test_a_plain_checkpoint_is_refused(checkpoints, tmp_path):
    student, method, _ = make(checkpoints)
    method.finish()
    with pytest.raises(ValueError, match="x_adapter's student reads its adapters at test time"):
        student.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_without_the_mask_or_with_one_epoch_it_says_so(checkpoints):
    with pytest.raises(ValueError, match="x_adapter .* first_epochs must be 1 to 0"):
        make(checkpoints, training={"epochs": 1})
    student = students.load(checkpoints["bert"], 2, 0)
    with pytest.raises(ValueError, match=r"student\.mask_id"):
        XAdapter(setting(), student)


def test_a_picture_that_cannot_be_cut_is_an_error_at_once(checkpoints):
    with pytest.raises(ValueError, match="24 features cannot be cut into 7"):
        make(checkpoints, pictures=True, extra={"regions": 7})
