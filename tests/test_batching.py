"""Batches hold every example once, in any arrangement, and teacher vectors follow their texts."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from armada_lib.batching import Encoded, epoch, plan
from armada_lib.packing import pack, packed_attention


def data(n=50, per=1, seed=0, teacher=True):
    rng = np.random.default_rng(seed)
    tokens = [
        rng.integers(5, 90, size=rng.integers(2, 30)).astype(np.int32) for _ in range(n * per)
    ]
    x = torch.arange(n * per).float()[:, None].repeat(1, 3).half() if teacher else None
    return Encoded(tokens, None, torch.arange(n), per, 0, x)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_example_once_whatever_the_number_of_processes(packed, world):
    d = data(48)
    seen = [np.concatenate(list(epoch(d, 6, 1, 0, packed, rank, world))) for rank in range(world)]
    assert sorted(np.concatenate(seen)) == list(range(48))
    assert len({len(s) for s in seen}) == 1


def test_epochs_depend_on_seed_and_number_only():
    d = data()
    same = [np.concatenate(plan(d, 8, 1, 2, True)) for _ in range(2)]
    assert (same[0] == same[1]).all()
    assert (same[0] != np.concatenate(plan(d, 8, 1, 3, True))).any()
    assert (same[0] != np.concatenate(plan(d, 8, 2, 2, True))).any()


def test_several_processes_share_the_batches_of_one_with_their_size_together():
    d = data(50)
    whole = list(epoch(d, 16, 3, 0, True))
    halves = [list(epoch(d, 8, 3, 0, True, r, 2)) for r in (0, 1)]
    for w, a, b in zip(whole, *halves, strict=True):
        assert set(a) | set(b) == set(w)


def test_buckets_pad_less_than_random_batches():
    d = data(2000)
    waste = lambda batches: sum(d.lengths[b].max() * len(b) for b in batches) / d.lengths.sum()
    assert waste(plan(d, 16, 0, 0, False)) < 1.1 < 1.5 < waste(plan(d, 16, 0, 0, True))


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("per", [1, 2])
def test_labels_tokens_and_vectors_stay_together(packed, per):
    d = data(20, per)
    b = d.batch(np.array([7, 3, 11, 0]), packed)
    assert b.labels.tolist() == list(b.rows)
    texts = [r * per + j for r in b.rows for j in range(per)]
    assert b.teacher[:, 0].tolist() == texts
    if packed:
        first, last = b.inputs["packing"].first, b.inputs["packing"].last
        got = [
            b.inputs["input_ids"][0, i : j + 1].tolist() for i, j in zip(first, last, strict=True)
        ]
    else:
        mask = b.inputs["attention_mask"].bool()
        got = [ids[m].tolist() for ids, m in zip(b.inputs["input_ids"], mask, strict=True)]
    assert got == [d.tokens[t].tolist() for t in texts]


@pytest.mark.parametrize("packed", [True, False])
def test_a_batch_goes_to_another_device_whole(packed):
    moved = data(20).batch(np.array([7, 3, 11, 0]), packed).to(torch.device("meta"))
    tensors = [moved.labels, moved.teacher]
    tensors += [x for x in moved.inputs.values() if isinstance(x, torch.Tensor)]
    if packed:
        packing = moved.inputs["packing"]
        tensors += [packing.first, packing.last, packing.text, packing.order]
        tensors += [x for g in packing.groups for x in (g.slots, g.mask) if x is not None]
    assert len(tensors) > 3 and {x.device.type for x in tensors} == {"meta"}


def test_vectors_are_standardised_and_shuffled_on_reading():
    d = data(10)
    d.mean, d.scale = torch.full((3,), 2.0), torch.full((3,), 4.0)
    d.where = np.arange(10)[::-1].copy()
    b = d.batch(np.array([1]), True)
    assert b.teacher[0, 0].item() == (8 - 2) / 4


def test_a_text_without_a_vector_gets_the_mean():
    d = data(3)
    d.teacher = torch.tensor([[1.0, 5.0], [3.0, 9.0]]).half()
    d.mean, d.scale = torch.tensor([2.0, 7.0]), torch.tensor([1.0, 2.0])
    d.where = np.array([1, -1, 0])
    assert d.vectors(np.arange(3)).tolist() == [[1.0, 1.0], [0.0, 0.0], [-1.0, -1.0]]


@pytest.mark.parametrize("causal", [False, True])
def test_packed_attention_is_attention_text_by_text(causal):
    torch.manual_seed(0)
    lengths = np.array([9, 9, 7, 4, 4, 1])
    q, k, v = (torch.randn(1, 2, int(lengths.sum()), 8) for _ in range(3))
    module = torch.nn.Module()
    got, _ = packed_attention(module, q, k, v, None, 0.3, packing=pack(lengths), is_causal=causal)
    start = 0
    for n in lengths:
        s = slice(start, start + n)
        scores = q[0, :, s] @ k[0, :, s].transpose(1, 2) * 0.3
        if causal:
            scores = scores.masked_fill(torch.ones(n, n).triu(1).bool(), -torch.inf)
        want = (scores.softmax(-1) @ v[0, :, s]).transpose(0, 1)
        torch.testing.assert_close(got[0, s], want, atol=1e-6, rtol=1e-5)
        start += n


def test_packed_attention_without_its_packing_is_an_error():
    x = torch.zeros(1, 1, 2, 4)
    with pytest.raises(ValueError, match="needs the batch's `packing`"):
        packed_attention(torch.nn.Module(), x, x, x, None)


@pytest.mark.parametrize("heads, kv", [(4, 4), (6, 2)])
def test_causal_attention_in_bf16_is_that_of_the_library(heads, kv):
    """By matrix products on the CPU; values and gradients as of the kernel in fp32."""
    from types import SimpleNamespace

    torch.manual_seed(0)
    packing, module = pack(np.array([7, 5, 5, 2])), SimpleNamespace(is_causal=True)
    draw = lambda h: torch.randn(1, h, 19, 8)
    whole = [draw(heads), draw(kv), draw(kv)]
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        given = [x.detach().clone().to(dtype).requires_grad_() for x in whole]
        out, _ = packed_attention(module, *given, None, scaling=0.3, packing=packing)
        out.float().pow(2).sum().backward()
        found[dtype] = [out, *(x.grad for x in given)]
    for a, b in zip(*found.values(), strict=True):
        assert b.dtype == torch.bfloat16
        assert (a - b.float()).norm() / a.norm() < 0.02


def test_noise_is_one_draw_a_text_of_the_given_spread():
    """Figures 10 to 12: the same in every epoch, batch and resumed run, whatever row a text reads."""
    d = data(400)
    d.mean, d.scale = torch.zeros(3), torch.ones(3)
    plain = d.vectors(np.arange(400))
    d.noise, d.noise_seed = 2.0, (7, 78, 0)
    noisy = d.vectors(np.arange(400)) - plain
    assert abs(float(noisy.std()) - 2) < 0.15 and abs(float(noisy.mean())) < 0.2
    torch.testing.assert_close(d.vectors(np.array([9, 3])) - plain[[9, 3]], noisy[[9, 3]])
    batch = d.batch(np.array([5, 8, 2]), True)
    torch.testing.assert_close(batch.teacher - plain[batch.rows], noisy[batch.rows])
    d.where = np.arange(400)[::-1].copy()  # the noise is the text's, not the vector's
    torch.testing.assert_close(d.vectors(np.arange(400)) - plain.flip(0), noisy, atol=1e-3, rtol=0)
    d.noise_seed = (8, 78, 0)
    assert not torch.allclose(d.vectors(np.arange(400)) - plain.flip(0), noisy)
    d.where[4] = -1  # a text without a vector stays at the mean
    assert d.vectors(np.array([4])).abs().sum() == 0
