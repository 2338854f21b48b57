"""VisualBERT, VL-BERT and ViLBERT: each loss against the recipe, text by text, and who learns."""

from __future__ import annotations

import copy
import math
import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_visual import CHANNELS, CLOSE, PICTURE, batch_of, learns, make
from tiny import alike, killed_and_resumed, same, setting, weights
from transformers import VisualBertConfig, VisualBertModel

from armada_lib import engine, evaluation, losses
from armada_lib.methods import Method, visual
from armada_lib.methods.pretraining import VLBERT, ViLBERT, VisualBERT
from armada_lib.profiles import StudentSpec

ALL = [VisualBERT, VLBERT, ViLBERT]
TERMS = {VisualBERT: {"words", "match"}, VLBERT: {"words", "regions", "text"},
         ViLBERT: {"words", "regions", "match"}}  # fmt: skip


def said(stage, batch, seed=11):
    torch.manual_seed(seed)
    return stage.losses(batch, None, "joint", losses.mean_row)


def plain(student):
    """The encoder with ordinary attention, for one text at a time."""
    found = copy.deepcopy(student).eval()
    found.model.set_attn_implementation("eager")
    return found.model.bert


def texts_of(batch, data):
    """(ids (1, t), places of its tokens in the packed row) of each text, in the pictures' order."""
    for i, row in enumerate(batch.rows):
        at = (batch.inputs["packing"].text == i).nonzero()[:, 0]
        yield torch.from_numpy(data.tokens[row].astype(np.int64))[None], at


def word_loss(stage, states, ids):
    """Cross-entropies of these words (k,) from their states (k, d)."""
    dense, _, norm = stage.words.transform
    h = F.layer_norm(F.gelu(dense(states)), (32,), norm.weight, norm.bias, 1e-12)
    return F.cross_entropy(h @ stage.table.T + stage.words.bias, ids, reduction="none")


def head(sequential, x):
    dense, _, norm, out = sequential
    return out(F.layer_norm(F.gelu(dense(x)), (32,), norm.weight, norm.bias, 1e-12))


# -- the losses ----------------------------------------------------------------------------------


def test_visualbert_is_that_of_transformers_on_every_text(checkpoints):
    student, stage, data = make(checkpoints, VisualBERT)
    batch = batch_of(data)
    terms = said(stage, batch)
    # the same draws, in the order in which the stage makes them
    torch.manual_seed(11)
    given, own = visual.mispair(batch.teacher)
    read, chosen = stage.masked(batch.inputs["input_ids"])
    assert 0 < own.sum() < len(own) and chosen.sum() > 2

    c = student.model.config
    model = VisualBertModel(VisualBertConfig(
        vocab_size=c.vocab_size, hidden_size=c.hidden_size, visual_embedding_dim=PICTURE // 4,
        num_hidden_layers=c.num_hidden_layers, num_attention_heads=c.num_attention_heads,
        intermediate_size=c.intermediate_size, max_position_embeddings=c.max_position_embeddings,
    )).eval()  # fmt: skip
    missing, extra = model.load_state_dict(student.model.bert.state_dict(), strict=False)
    assert all("visual" in k for k in missing) and not extra
    e = model.embeddings
    e.visual_projection.load_state_dict(stage.seen.project.state_dict())
    e.visual_token_type_embeddings.weight.data[1] = stage.seen.segment
    e.visual_position_embeddings.weight.data.zero_()
    words, match = [], []
    for i, (ids, at) in enumerate(texts_of(batch, data)):
        cut = torch.stack([given[i].view(CHANNELS, 4, 4)[:, y : y + 2, x : x + 2].flatten()
                           for y in (0, 2) for x in (0, 2)])  # fmt: skip
        out = model(
            input_ids=read[0, at][None],
            visual_embeds=cut[None],
            visual_attention_mask=torch.ones(1, 4),
            visual_token_type_ids=torch.ones(1, 4, dtype=torch.long),
            attention_mask=torch.ones(1, len(at)),
        )
        asked = chosen[0, at]
        words += word_loss(stage, out.last_hidden_state[0, : len(at)][asked], ids[0][asked])
        match.append(F.cross_entropy(stage.match(out.pooler_output), own[i][None]))
    assert set(terms) == TERMS[VisualBERT]
    torch.testing.assert_close(terms["words"], torch.stack(words).mean(), **CLOSE)
    torch.testing.assert_close(terms["match"], torch.stack(match).mean(), **CLOSE)


def test_vlbert_is_the_recipes_sum(checkpoints):
    student, stage, data = make(checkpoints, VLBERT)
    el = stage.elements
    with torch.no_grad():  # gains that start at 0 would hide how pictures come in
        el.region[1].weight.normal_()
        el.whole[1].weight.normal_()
    batch = batch_of(data, picked=range(12))
    terms = said(stage, batch)
    torch.manual_seed(11)
    true = visual.regions(batch.teacher, 4, CHANNELS)
    seen, asked, hidden = visual.mask_regions(true)
    read, chosen = stage.masked(batch.inputs["input_ids"])
    again, also = stage.masked(batch.inputs["input_ids"])
    assert asked.sum() > 2 and hidden.any()

    bert = plain(student)
    e = bert.embeddings
    words, shown, text = [], [], []
    for i, (ids, at) in enumerate(texts_of(batch, data)):
        t = len(at)
        whole = el.whole(sum(seen[i, j] for j in range(4)) / 4)
        x = e.word_embeddings(read[0, at]) + whole + e.token_type_embeddings.weight[0]
        x = x + e.position_embeddings.weight[:t]
        regions = [
            el.region(seen[i, j]) + (el.hidden if hidden[i, j] else el.image) + el.segment
            + el.place.weight[j] + e.position_embeddings.weight[t]
            for j in range(4)
        ]  # fmt: skip
        x = e.LayerNorm(torch.cat([x, torch.stack(regions)]))[None]
        states = bert.encoder(x).last_hidden_state[0]
        words += word_loss(stage, states[:t][chosen[0, at]], ids[0][chosen[0, at]])
        for j in range(4):
            if asked[i, j]:
                shown.append((head(stage.shown, states[t + j]) - true[i, j]).square().mean())
        states = bert(input_ids=again[0, at][None]).last_hidden_state[0]
        text += word_loss(stage, states[also[0, at]], ids[0][also[0, at]])
    assert set(terms) == TERMS[VLBERT]
    for name, found in (("words", words), ("regions", shown), ("text", text)):
        torch.testing.assert_close(terms[name], torch.stack(found).mean(), **CLOSE)


def attend(m, x, other):
    """Multi-head attention of x (q, d) to other (k, d), head by head."""
    w, b = m.in_proj_weight.chunk(3), m.in_proj_bias.chunk(3)
    q, k, v = (a @ w[i].T + b[i] for i, a in enumerate((x, other, other)))
    size, out = 32 // m.num_heads, []
    for h in range(0, 32, size):
        scores = q[:, h : h + size] @ k[:, h : h + size].T / math.sqrt(size)
        out.append(scores.softmax(-1) @ v[:, h : h + size])
    return m.out_proj(torch.cat(out, -1))


def block(side, x, other):
    """One side of a co-attention block, for one text."""
    x = side.norms[0](x + attend(side.attention, x, other))
    first, _, second = side.inner
    return side.norms[1](x + second(F.gelu(first(x))))


def ordinary(layer, x):
    """One layer of the visual stream, for one picture."""
    x = layer.norm1(x + attend(layer.self_attn, x, x))
    return layer.norm2(x + layer.linear2(F.gelu(layer.linear1(x))))


def deeper(checkpoints, layers):
    """A checkpoint of this many layers, with random weights, in place of the two of the tests."""
    from transformers import AutoConfig, AutoModel, AutoTokenizer

    where = checkpoints["bert"].checkpoint
    folder = f"{where}-{layers}"
    if not os.path.isdir(folder):
        config = AutoConfig.from_pretrained(where, num_hidden_layers=layers)
        torch.manual_seed(8)
        AutoModel.from_config(config).save_pretrained(folder)
        AutoTokenizer.from_pretrained(where).save_pretrained(folder)
    return {"bert": StudentSpec(name="deeper", checkpoint=folder)}


@pytest.mark.parametrize("layers, alone", [(1, 0), (2, 1), (5, 3)])
def test_vilbert_is_the_recipes_two_streams(checkpoints, layers, alone):
    student, stage, data = make(deeper(checkpoints, layers), ViLBERT)
    assert stage.connections == layers - alone
    batch = batch_of(data, picked=range(12))
    terms = said(stage, batch)
    torch.manual_seed(11)
    given, own = visual.mispair(batch.teacher)
    true = visual.regions(given, 4, CHANNELS)
    seen, asked, _ = visual.mask_regions(true)
    read, chosen = stage.masked(batch.inputs["input_ids"])
    assert 0 < own.sum() < len(own) and asked.sum() > 2

    bert, s = plain(student), stage.stream
    words, shown, match = [], [], []
    for i, (ids, at) in enumerate(texts_of(batch, data)):
        x = bert.embeddings(input_ids=read[0, at][None])
        whole = torch.stack([seen[i, j] for j in range(4)]).mean(0)
        v = s.norm(s.project(torch.cat([whole[None], seen[i]])) + s.place.weight)
        for layer, own_layer in enumerate(bert.encoder.layer):
            if layer >= alone:
                c = layer - alone
                before = x[0]
                x = block(s.words[c], before, v)[None]
                v = ordinary(s.layers[c], block(s.regions[c], v, before))
            x = own_layer(x)
        words += word_loss(stage, x[0, chosen[0, at]], ids[0][chosen[0, at]])
        for j in range(4):
            if asked[i, j]:
                shown.append((head(stage.shown, v[1 + j]) - true[i, j]).square().mean())
        pooled = student.model.bert.pooler(x)[0] * torch.tanh(s.pooler(v[0]))
        match.append(F.cross_entropy(stage.match(pooled)[None], own[i][None]))
    assert set(terms) == TERMS[ViLBERT]
    for name, found in (("words", words), ("regions", shown), ("match", match)):
        torch.testing.assert_close(terms[name], torch.stack(found).mean(), **CLOSE)


# -- limits --------------------------------------------------------------------------------------


def test_vlberts_third_term_is_plain_masked_words_whatever_the_pictures(checkpoints):
    _, stage, data = make(checkpoints, VLBERT)
    batch = batch_of(data)
    found = []
    for scale in (1.0, -5.0):
        batch.teacher *= scale
        found.append(said(stage, batch))
    assert torch.equal(found[0]["text"], found[1]["text"])
    assert not torch.equal(found[0]["regions"], found[1]["regions"])
    torch.manual_seed(11)
    visual.mask_regions(visual.regions(batch.teacher, 4, CHANNELS))
    stage.masked(batch.inputs["input_ids"])
    torch.testing.assert_close(stage.masked_words(batch.inputs)[0], found[0]["text"])


def test_vlbert_begins_with_words_that_see_no_picture(checkpoints):
    _, stage, data = make(checkpoints, VLBERT)
    batch = batch_of(data)
    first = said(stage, batch)
    batch.teacher = batch.teacher + 10  # what is to be told changes, what is seen does not yet
    second = said(stage, batch)
    assert torch.equal(first["words"], second["words"])
    assert second["regions"] > first["regions"]


@pytest.mark.parametrize("build", [VisualBERT, ViLBERT])
def test_words_depend_on_the_picture(checkpoints, build):
    _, stage, data = make(checkpoints, build)
    batch = batch_of(data)
    first = said(stage, batch)
    batch.teacher = batch.teacher.flip(0)
    assert abs(said(stage, batch)["words"] - first["words"]) > 1e-5


@pytest.mark.parametrize("build", [VLBERT, ViLBERT])
def test_what_is_hidden_is_not_seen(checkpoints, monkeypatch, build):
    """With every region hidden, no loss on words or match can depend on the picture."""
    _, stage, data = make(checkpoints, build)
    if build is VLBERT:
        with torch.no_grad():
            stage.elements.whole[1].weight.normal_()
            stage.elements.region[1].weight.normal_()
    true = visual.mask_regions
    monkeypatch.setattr(visual, "mask_regions", lambda x: true(x, 1.0, 1.0))
    batch = batch_of(data)
    first = said(stage, batch)
    batch.teacher = batch.teacher * 3
    second = said(stage, batch)
    assert all(torch.equal(first[k], second[k]) for k in set(first) - {"regions"})
    assert second["regions"] > first["regions"]


# -- who learns ----------------------------------------------------------------------------------


ENCODER = {"word_embeddings", "layer.0.attention.self.query", "layer.1.output.dense"}
REACHED = {  # term: parts that it moves
    VisualBERT: {"words": {"words", "seen"}, "match": {"match", "seen"}},
    VLBERT: {"words": {"words", "elements"}, "regions": {"shown", "elements"}, "text": {"words"}},
    ViLBERT: {
        "words": {"words", "stream"}, "regions": {"shown", "stream"}, "match": {"match", "stream"}
    },
}  # fmt: skip


@pytest.mark.parametrize("build, term", [(b, t) for b in ALL for t in sorted(TERMS[b])])
def test_every_term_moves_the_encoder_and_its_own_parts(checkpoints, build, term):
    student, stage, data = make(checkpoints, build)
    said(stage, batch_of(data, picked=range(12)))[term].backward()
    found = learns(student)
    last = (build, term) != (ViLBERT, "regions")  # the last text layer comes after all connections
    reached = {name for name in ENCODER if any(name in n for n in found)}
    assert reached == (ENCODER if last else ENCODER - {"layer.1.output.dense"})
    assert any("pooler" in n for n in found) == (term == "match")
    assert not any("classifier" in n for n in found)
    assert {n for n, part in stage.parts.items() if learns(part)} == REACHED[build][term]


@pytest.mark.parametrize("build", ALL)
def test_everything_is_trained_by_the_sum(checkpoints, build):
    student, stage, data = make(checkpoints, build, n=32)
    if build is VLBERT:  # gains that start at 0 hold what lies before them back for one step
        with torch.no_grad():
            for side in (stage.elements.region, stage.elements.whole):
                side[1].weight.normal_()
    sum(said(stage, batch_of(data, picked=range(32))).values()).backward()
    for name, part in stage.parts.items():
        assert learns(part) == {n for n, _ in part.named_parameters()}, name
    head = {"model.classifier.weight", "model.classifier.bias"}
    if build is VLBERT:
        head |= {"model.bert.pooler.dense.weight", "model.bert.pooler.dense.bias"}
    assert {n for n, _ in student.named_parameters()} - learns(student) == head


# -- in the engine -------------------------------------------------------------------------------


@torch.no_grad()
def over_draws(stage, batch):
    """Mean of each term over some draws of masks and pairs."""
    found = [said(stage, batch, seed) for seed in range(4)]
    return {k: torch.stack([terms[k] for terms in found]).mean().item() for k in found[0]}


@pytest.mark.parametrize("build", ALL)
def test_a_stage_learns_and_leaves_an_encoder_that_reads_text_alone(checkpoints, build):
    student, stage, data = make(checkpoints, build, n=32, epochs=6, student_lr=4e-3)
    before, names = weights(student), set(weights(student))
    everything = batch_of(data, picked=range(32))
    first = over_draws(stage, everything)
    engine.train(student, stage, data, stage.setting.training, 0)
    last = over_draws(stage, everything)
    assert all(last[name] < (1 if name == "match" else 0.95) * first[name] for name in first)
    assert not stage.parts and set(weights(student)) == names
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in student.modules())
    assert not torch.equal(
        before["model.bert.encoder.layer.0.output.dense.weight"],
        student.model.bert.encoder.layer[0].output.dense.weight,
    )
    data.teacher = None
    tuning = Method(setting(), student)
    engine.train(student, tuning, data, tuning.setting.training, 0)
    assert evaluation.predict(student, tuning, data, bf16=False)["student"].shape == (32, 2)


@pytest.mark.parametrize("build", ALL)
def test_a_stage_is_the_same_under_the_same_seed(checkpoints, build):
    found = []
    for seed in (0, 0, 1):
        student, stage, data = make(checkpoints, build, n=8, dropout=0.1)
        engine.train(student, stage, data, stage.setting.training, seed)
        found.append(weights(student))
    assert same(found[0], found[1]) and not same(found[0], found[2])


@pytest.mark.parametrize("build", ALL)
def test_a_killed_stage_ends_as_an_unkilled_one(checkpoints, monkeypatch, tmp_path, build):
    alike(
        *killed_and_resumed(
            lambda: make(checkpoints, build, n=12, dropout=0.1, epochs=2),
            monkeypatch,
            tmp_path / "state",
            3,
        )
    )


@pytest.mark.parametrize("build", ALL)
def test_a_compact_vocabulary_changes_nothing_but_rows_that_occur(checkpoints, build):
    student, stage, data = make(checkpoints, build, used=np.array([0, 4]))
    before = student._full.clone()
    used = student._used.clone()
    engine.train(student, stage, data, stage.setting.training, 0)
    student.expand()
    after = student.model.bert.embeddings.word_embeddings.weight
    moved = (after != before).any(1)
    assert not moved[[i for i in range(len(before)) if i not in used.tolist()]].any()
    assert moved[4] and len(used) < len(before)


@pytest.mark.parametrize("build", ALL)
def test_bf16_is_near(checkpoints, build):
    found = []
    for precision in ("fp32", "bf16"):
        _, stage, data = make(checkpoints, build, precision=precision)
        terms = said(stage, batch_of(data))
        assert all(t.dtype == torch.float32 for t in terms.values())
        sum(terms.values()).backward()
        found.append(torch.stack(list(terms.values())))
    assert not torch.equal(*found)
    torch.testing.assert_close(*found, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("build", ALL)
def test_a_single_text_is_a_batch(checkpoints, build):
    _, stage, data = make(checkpoints, build)
    assert all(torch.isfinite(t) for t in said(stage, batch_of(data, picked=[3])).values())


@pytest.mark.parametrize("build", ALL)
def test_the_longest_text_is_a_batch(checkpoints, build):
    student, stage, data = make(checkpoints, build)
    longest = student.model.config.max_position_embeddings
    data.tokens[3], data.types = np.resize(data.tokens[3], longest), None
    data.lengths[3] = longest
    assert all(torch.isfinite(t) for t in said(stage, batch_of(data)).values())


def test_an_impossible_cut_is_an_error_before_anything_else(checkpoints):
    with pytest.raises(ValueError, match="4 x 4 cannot be cut into 9 equal squares"):
        make(checkpoints, ViLBERT, regions=9)
    with pytest.raises(ValueError, match="64 features cannot be cut into 5 regions"):
        make(checkpoints, VisualBERT, regions=5, channels=None)


def test_features_and_other_numbers_of_regions_are_read(checkpoints):
    for build in ALL:
        _, stage, data = make(checkpoints, build, regions=16, channels=None)
        assert stage.size == 4
        assert all(torch.isfinite(t) for t in said(stage, batch_of(data)).values())
