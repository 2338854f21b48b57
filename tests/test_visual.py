"""What the multimodal baselines share, against loops over single numbers, words and texts."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
import torch
from tiny import rows, setting
from torch import Tensor
from transformers import BertForMaskedLM

from armada_lib import students
from armada_lib.batching import Encoded
from armada_lib.methods import visual
from armada_lib.methods.visual import Stage

CHANNELS, SIDE = 4, 4
PICTURE = CHANNELS * SIDE * SIDE
CLOSE = dict(atol=2e-5, rtol=2e-4)


def staged(channels=CHANNELS, **training):
    """A `Setting` of a stage."""
    s = setting(training={"regions": 4} | training)
    return dataclasses.replace(s, width=PICTURE, channels=channels)


def pictured(student, n=16, seed=0) -> Encoded:
    """Random sentences; a word of a sentence draws a pattern into its picture."""
    data = rows(student, n, seed)
    draw = np.random.default_rng(3).standard_normal((student.model.config.vocab_size, PICTURE))
    noise = np.random.default_rng(seed).standard_normal((n, PICTURE)) / 4
    data.teacher = torch.from_numpy(np.stack([draw[t].sum(0) for t in data.tokens]) / 2 + noise)
    data.teacher = data.teacher.half()
    return data


def make(checkpoints, build=Stage, n=16, dropout=0.0, used=None, **training):
    """(student in training, stage, data); `used` makes the vocabulary compact."""
    student = students.load(checkpoints["bert"], 2, 0, dropout=dropout)
    student.mask_id = student.tokenizer.mask_token_id
    data = pictured(student, n)
    if used is not None:
        new = student.compact(np.unique(np.concatenate([*data.tokens, used]))).numpy()
        data.tokens = [new[t].astype(np.int32) for t in data.tokens]
        student.mask_id = int(new[student.tokenizer.mask_token_id])
    return student.train(), build(staged(**training), student), data


def batch_of(data, picked=(3, 0, 7, 5, 2, 9), packed=True):
    return data.batch(np.array(picked), packed)


def learns(module) -> set[str]:
    return {n for n, p in module.named_parameters() if p.grad is not None and p.grad.any()}


# -- pictures ------------------------------------------------------------------------------------


@pytest.mark.parametrize("r", [1, 4, 16])
def test_regions_are_squares_of_a_grid(r):
    x = torch.arange(2 * PICTURE).float().view(2, PICTURE)
    found = visual.regions(x, r, CHANNELS)
    patch = SIDE // int(r**0.5)
    assert found.shape == (2, r, PICTURE // r)
    for i, (n, c, y, z) in enumerate(np.ndindex(2, CHANNELS, SIDE, SIDE)):
        square = (y // patch) * (SIDE // patch) + z // patch
        inside = c * patch * patch + (y % patch) * patch + z % patch
        assert found[n, square, inside] == i


def test_features_are_cut_into_stretches():
    x = torch.randn(3, 24)
    found = visual.regions(x, 8)
    assert torch.equal(found[1, 2], x[1, 6:9]) and found.shape == (3, 8, 3)


@pytest.mark.parametrize("m, r, channels, says", [
    (24, 16, None, "24 features cannot be cut into 16 regions"),
    (24, 0, None, "into 0 regions"),
    (60, 4, 4, "60 numbers are no square picture of 4 channels"),
    (64, 9, 4, r"4 x 4 cannot be cut into 9 equal squares; valid: 1, 4, 16"),
    (64, 8, 4, r"into 8 equal squares; valid: 1, 4, 16"),
])  # fmt: skip
def test_a_picture_that_does_not_divide_is_an_error(m, r, channels, says):
    with pytest.raises(ValueError, match=says):
        visual.regions(torch.zeros(2, m), r, channels)


def test_regions_are_hidden_as_often_as_stated_and_the_others_stay():
    torch.manual_seed(0)
    x = torch.randn(4000, 8, 3)
    seen, asked, gone = visual.mask_regions(x)
    assert abs(asked.float().mean() - 0.15) < 0.01 and not (gone & ~asked).any()
    assert abs(gone.sum() / asked.sum() - 0.9) < 0.02
    assert not seen[gone].any() and torch.equal(seen[~gone], x[~gone])


def test_half_of_the_texts_get_another_picture_and_know_it():
    torch.manual_seed(0)
    x = torch.randn(2000, 5)
    given, own = visual.mispair(x)
    assert abs(own.float().mean() - 0.5) < 0.04
    assert torch.equal((given == x).all(1).long(), own)
    assert all((x == row).all(1).any() for row in given[:50])
    # whose pictures were taken: not always the neighbour's
    taken = [int((x == row).all(1).nonzero()) - i for i, row in enumerate(given[:200])]
    assert len(set(taken)) > 50


def test_an_equal_picture_is_its_own_and_one_text_keeps_its_picture():
    torch.manual_seed(0)
    given, own = visual.mispair(torch.ones(50, 5))
    assert own.all() and torch.equal(given, torch.ones(50, 5))
    for _ in range(5):
        assert visual.mispair(torch.randn(1, 5))[1].tolist() == [1]


# -- words ---------------------------------------------------------------------------------------


def test_words_are_masked_as_bert_masks_them():
    torch.manual_seed(0)
    ids, special = torch.randint(0, 500, (400, 300)), torch.tensor([0, 1, 2, 3])
    read, chosen = visual.mask_tokens(ids, special, 4, 500)
    words = ~torch.isin(ids, special)
    assert not chosen[~words].any() and torch.equal(read[~chosen], ids[~chosen])
    assert abs(chosen[words].float().mean() - 0.15) < 0.005
    masked, same = read[chosen] == 4, read[chosen] == ids[chosen]
    assert abs(masked.float().mean() - 0.8) < 0.01 and abs(same.float().mean() - 0.1) < 0.01
    others = read[chosen][~masked & ~same]
    assert others.min() < 20 and others.max() > 480 and len(others.unique()) > 400


def test_masks_depend_on_the_global_generator_alone(checkpoints):
    _, stage, data = make(checkpoints)
    ids = batch_of(data).inputs["input_ids"]
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(stage.masked(ids.repeat(20, 1))[1])
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_special_tokens_are_found_in_a_compact_vocabulary(checkpoints):
    student, stage, data = make(checkpoints, used=np.array([0, 4]))
    full = student._used[stage.special].tolist()
    assert full == [0, 2, 3, 4] and len(stage.table) < 30  # no text has [UNK]
    assert student._used[student.mask_id] == 4 and stage.vocabulary == len(student._used)
    ids = batch_of(data).inputs["input_ids"]
    assert not stage.masked(ids.repeat(50, 1))[1][:, torch.isin(ids[0], stage.special)].any()


@pytest.mark.parametrize("packed", [True, False])
def test_masked_words_are_those_of_transformers(checkpoints, packed):
    student, stage, data = make(checkpoints)
    batch = batch_of(data, packed=packed)
    if not packed:
        student.model.set_attn_implementation("eager")
    plain = BertForMaskedLM(copy.deepcopy(student.model.config))
    plain.set_attn_implementation("eager")
    plain.bert.load_state_dict(
        {k: v for k, v in student.model.bert.state_dict().items() if "pooler" not in k}
    )
    dense, _, norm = stage.words.transform
    torch.nn.init.normal_(stage.words.bias)
    to = plain.cls.predictions
    to.transform.dense.load_state_dict(dense.state_dict())
    to.transform.LayerNorm.load_state_dict(norm.state_dict())
    to.decoder.weight, to.decoder.bias = plain.bert.embeddings.word_embeddings.weight, to.bias
    to.bias.data = stage.words.bias.data.clone()
    torch.manual_seed(4)
    found, states = stage.masked_words(batch.inputs)
    torch.manual_seed(4)
    ids = batch.inputs["input_ids"]
    read, chosen = stage.masked(ids)
    if not packed:
        chosen &= batch.inputs["attention_mask"].bool()
    spread = lambda x: visual.spread(x, batch.inputs)
    labels = spread(torch.where(chosen, ids, -100) + 1) - 1
    mask = visual.padded(batch)[1]
    labels[mask == 0] = -100
    wanted = plain(input_ids=spread(read), attention_mask=mask, labels=labels)
    assert (labels != -100).sum() > 2
    torch.testing.assert_close(found, wanted.loss, **CLOSE)
    assert states.shape[:2] == ids.shape


def test_the_output_layer_is_the_embeddings_and_is_not_the_heads(checkpoints):
    _, stage, _ = make(checkpoints)
    assert all(p is not stage.table for p in stage.words.parameters())
    states, ids = torch.randn(6, 32, requires_grad=True), torch.arange(6)
    chosen = torch.tensor([True, False, True, False, False, False])
    stage.words.loss(states, ids, chosen, stage.table).backward()
    assert (stage.table.grad.abs().sum(1) > 0).all()
    assert states.grad[chosen].any() and not states.grad[~chosen].any()


def test_no_chosen_word_gives_zero_and_gradients_of_zeros(checkpoints):
    _, stage, _ = make(checkpoints)
    loss = stage.words.loss(torch.randn(3, 32), torch.arange(3), torch.zeros(3).bool(), stage.table)
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is not None and not p.grad.any() for p in stage.words.parameters())


# -- batches -------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [True, False])
def test_padded_gives_texts_in_the_order_of_the_pictures(checkpoints, packed):
    _, _, data = make(checkpoints)
    batch = batch_of(data, packed=packed)
    ids, mask = visual.padded(batch)
    assert ids.shape == mask.shape == (6, max(data.lengths[batch.rows]))
    for row, found, there in zip(batch.rows, ids, mask, strict=True):
        assert there.tolist() == [1] * data.lengths[row] + [0] * (ids.shape[1] - data.lengths[row])
        assert found[there.bool()].tolist() == data.tokens[row].tolist()
    assert torch.equal(batch.teacher, data.vectors(batch.rows))


def test_padded_of_a_task_with_two_texts_an_example(checkpoints):
    student, _, _ = make(checkpoints)
    data = rows(student, 16, kind="choice")
    batch = data.batch(np.array([3, 0, 7]), True)
    for text, found, there in zip([6, 7, 0, 1, 14, 15], *visual.padded(batch), strict=True):
        assert found[there.bool()].tolist() == data.tokens[text].tolist()


@pytest.mark.parametrize("kind", ["class", "choice"])
def test_joined_words_and_regions_attend_within_their_text(checkpoints, kind):
    student, _, _ = make(checkpoints)
    data = rows(student, 16, kind=kind)
    batch = data.batch(np.array([3, 0, 7, 5, 2]), True)
    packing, n, r = batch.inputs["packing"], len(batch.teacher), 3
    joint = visual.join(packing, r)
    words, pictures = torch.randn(len(packing.text), 32), torch.randn(n, r, 32)
    x = joint.put(words, pictures)
    together = student.model.bert.encoder(x, packing=joint.packing).last_hidden_state[0]
    plain = copy.deepcopy(student)
    plain.model.set_attn_implementation("eager")
    assert joint.packing.text.bincount().tolist() == (packing.text.bincount() + r).tolist()
    for i in range(n):
        own = packing.text == i
        alone = torch.cat([words[own], pictures[i]])[None]
        alone = plain.model.bert.encoder(alone).last_hidden_state[0]
        torch.testing.assert_close(together[joint.words[own]], alone[:-r], **CLOSE)
        torch.testing.assert_close(together[joint.regions[i]], alone[-r:], **CLOSE)
        torch.testing.assert_close(together[joint.packing.first[i]], alone[0], **CLOSE)
        torch.testing.assert_close(together[joint.packing.last[i]], alone[-1], **CLOSE)


# -- stages --------------------------------------------------------------------------------------


def test_what_a_stage_adds_depends_on_the_seed_alone(checkpoints):
    def first(noise: int) -> Tensor:
        torch.manual_seed(noise)
        _, stage, _ = make(checkpoints)
        return stage.words.transform[0].weight

    assert torch.equal(first(1), first(2))
    student = make(checkpoints)[0]
    before = torch.get_rng_state()
    Stage(staged(), student)
    assert torch.equal(before, torch.get_rng_state())


def test_a_student_without_a_mask_is_an_error(checkpoints):
    student = students.load(checkpoints["bert"], 2, 0)
    with pytest.raises(ValueError, match="set student.mask_id"):
        Stage(staged(), student)
    student.mask_id = 99
    with pytest.raises(ValueError, match="mask_id 99 is none of 30 embeddings"):
        Stage(staged(), student)


def test_another_architecture_or_no_pictures_is_an_error(checkpoints):
    student = students.load(checkpoints["deberta"], 2, 0)
    student.mask_id = 4
    with pytest.raises(ValueError, match="'deberta-v2' students cannot be watched; valid: bert"):
        Stage(staged(), student)
    student, stage, data = make(checkpoints)
    with pytest.raises(ValueError, match="the setting has no width"):
        Stage(dataclasses.replace(staged(), width=None), student)
    data.teacher = None
    with pytest.raises(ValueError, match="the texts have none"):
        stage.pictures(batch_of(data))
