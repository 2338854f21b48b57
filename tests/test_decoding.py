"""Reading prompts as one row with shared beginnings changes no logit; ended answers leave no trace."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_decoders import llama  # noqa: F401  (a fixture)
from transformers import AutoModelForCausalLM

from armada_lib import decoding

TEXTS = [np.array(t) for t in ([5, 6, 7, 8], [5, 6, 9], [5, 6, 7, 8, 10, 11, 12], [20], [5, 6, 7])]


@pytest.fixture
def model(llama):  # noqa: F811
    return AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()


def test_a_shared_beginning_stands_once():
    ids, positions, places = decoding.share(TEXTS)
    assert ids.tolist() == [5, 6, 7, 8, 9, 10, 11, 12, 20]
    assert positions.tolist() == [0, 1, 2, 3, 2, 4, 5, 6, 0]
    for text, place in zip(TEXTS, places, strict=True):
        assert ids[place].tolist() == text.tolist()
        assert positions[place].tolist() == list(range(len(text)))
    again = decoding.share([np.array([1, 2, 1, 2]), np.array([2, 1])])
    assert len(again[0]) == 6  # the same token after something else is another one


@torch.no_grad()
def test_logits_and_memory_are_those_of_each_text_alone(model):
    model.set_attn_implementation(decoding.PREFILL)
    cache, logits = decoding.prefill(model, TEXTS, more=3)
    model.set_attn_implementation("eager")
    longest = max(map(len, TEXTS))
    for row, text in enumerate(TEXTS):
        alone = model(input_ids=torch.from_numpy(text)[None], use_cache=True)
        torch.testing.assert_close(logits[row], alone.logits[0, -1], atol=1e-5, rtol=1e-5)
        for ours, theirs in zip(cache.layers, alone.past_key_values.layers, strict=True):
            assert ours.keys.shape[2] == longest
            for a, b in ((ours.keys, theirs.keys), (ours.values, theirs.values)):
                torch.testing.assert_close(
                    a[row, :, longest - len(text) :], b[0], atol=1e-5, rtol=1e-5
                )


def by_hand(model, text: np.ndarray, new: int, ends: set[int]) -> list[int]:
    """Greedy, without a cache."""
    model.set_attn_implementation("eager")
    ids = text.tolist()
    for _ in range(new):
        token = int(model(torch.tensor([ids])).logits[0, -1].argmax())
        if token in ends:
            break
        ids.append(token)
    return ids[len(text) :]


def answers(*args):
    """All that `decode` yields, a row each."""
    found = dict(decoding.decode(*args))
    return [found[i] for i in range(len(found))]


@torch.no_grad()
@pytest.mark.parametrize("leave", [0.0, 0.2, 1.1])
def test_answers_end_at_different_steps_and_leave_the_batch(model, monkeypatch, leave):
    monkeypatch.setattr(decoding, "LEAVE", leave)
    free = [by_hand(model, t, 8, set()) for t in TEXTS]
    ends = {free[0][2], free[2][4]}  # the first answer ends at its third token, others elsewhere
    expected = [by_hand(model, t, 8, ends) for t in TEXTS]
    assert len({len(e) for e in expected}) > 1
    sizes = []

    def pick(logits, rows):
        sizes.append(len(rows))
        return logits.argmax(-1)

    assert answers(model, TEXTS, 8, ends, pick) == expected
    assert (sizes[-1] < len(TEXTS)) == (leave < 1)
    assert model.config._attn_implementation == "sdpa"


def test_one_token_alone_and_no_token_at_all(model):
    with torch.no_grad():
        found = answers(model, TEXTS[:1], 1, set(), lambda x, rows: x.argmax(-1))
        assert found == [by_hand(model, TEXTS[0], 1, set())]
        ends = set(range(model.config.vocab_size))
        assert answers(model, TEXTS, 5, ends, lambda x, r: x.argmax(-1)) == [[]] * len(TEXTS)
