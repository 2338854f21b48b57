"""The text encoder as a teacher: mean over tokens, whatever stands beside a text."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from armada_lib import profiles, teachers
from armada_lib.teacher_settings import TextSpec

TEXTS = ["the cat sat", "a dog ran over the red house", "the bird flew", "the cat"]


def tiny(checkpoints, **changes) -> TextSpec:
    known = {"name": "t", "checkpoint": checkpoints["bert"].checkpoint, "width": 32}
    return TextSpec(**(known | changes))


def test_a_vector_is_the_mean_over_the_texts_own_tokens(checkpoints):
    teacher = teachers.load(tiny(checkpoints))
    together = teacher.encode(TEXTS)
    assert together.shape == (4, 32) and together.dtype == np.float16
    for text, vector in zip(TEXTS, together, strict=True):
        ids = torch.tensor([teacher.tokenizer(text).input_ids])
        with torch.no_grad():
            mean = teacher.model(ids).last_hidden_state[0].mean(0)
        np.testing.assert_allclose(vector, mean.numpy(), atol=3e-3)
    other = teachers.load(tiny(checkpoints, batch_size=1)).encode(TEXTS[::-1])[::-1]
    np.testing.assert_allclose(other, together, atol=3e-3)


def test_width_empty_texts_and_long_texts(checkpoints):
    with pytest.raises(ValueError, match="gives 32 numbers; its width is set to 384"):
        teachers.load(tiny(checkpoints, width=384))
    teacher = teachers.load(tiny(checkpoints))
    with pytest.raises(ValueError, match="text 1 of 2 is empty"):
        teacher.encode(["the cat", " "])
    assert teacher.truncated(["the cat " * 600, "the cat"]) == 1 and teacher.truncated([]) == 0
    assert np.isfinite(teacher.encode(["the cat " * 600])).all()


def test_fingerprint_knows_the_checkpoint_and_not_the_name(checkpoints):
    one = teachers.fingerprint(tiny(checkpoints))
    assert teachers.fingerprint(tiny(checkpoints, name="x", note="y", batch_size=3)) == one
    other = tiny(checkpoints, checkpoint=checkpoints["deberta"].checkpoint)
    assert teachers.fingerprint(other) != one


def test_the_packaged_encoder_puts_paraphrases_together():
    teacher = teachers.load(profiles.load("mini").teacher("text"))
    x = teacher.encode(["A man plays the guitar.", "Someone is strumming a guitar.", "It rains."])
    x = x.astype(np.float32) / np.linalg.norm(x.astype(np.float32), axis=1, keepdims=True)
    assert x[0] @ x[1] > x[0] @ x[2] + 0.3
