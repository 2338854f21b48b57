"""The texts of the training benchmarks, as token ids.

Real CoLA and MRPC where ARMADA_DATA holds them. Elsewhere texts of the same lengths, joined from
the mini tasks' texts: what a step costs depends on lengths and on the vocabulary alone.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np
import torch
from transformers.trainer_pt_utils import get_length_grouped_indices

from armada_lib import examples, profiles, students
from benchmarks.common import Split

MAX_LENGTH, HELD = 128, 256
STUDENT = profiles.load("mini").student("bert-6l")

# Of the real training sets with this student's tokeniser: texts, distinct tokens with those of the
# validation set, and the length at each of these shares of the texts.
SHARES = (0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1)
SHAPES = {
    "cola": (8551, 5869, (4, 6, 7, 8, 9, 10, 10, 11, 12, 14, 17, 20, 25, 47)),
    "mrpc": (3668, 12063, (19, 32, 36, 41, 45, 50, 53, 57, 61, 64, 70, 74, 83, 103)),
}


@dataclass
class Corpus:
    """`vocabulary`: the token ids that a run on the whole task keeps. `source`: for the notes."""

    train: Split
    held: Split
    vocabulary: np.ndarray
    source: str


def load(task: str) -> Corpus:
    """`cola` or `mrpc`, with at most 256 validation texts."""
    real = bool(os.environ.get("ARMADA_DATA"))
    student = students.load(STUDENT, 2, seed=0)  # its tokeniser is needed
    train, held = (_split(student, task, s, real) for s in ("train", "validation"))
    source = f"real {task}"
    if not real:
        size, words, lengths = SHAPES[task]
        rng = np.random.default_rng(0)
        train, held = (_stretch(s, rng, n, lengths) for s, n in ((train, size), (held, HELD)))
        source = f"mini {task} texts joined to the lengths of the real set"
    used = np.unique(np.concatenate([*train.tokens, *held.tokens, [_pad(student)]]))
    if not real:  # as many embedding rows to train as on the real set
        rest = np.setdiff1d(np.arange(student.model.config.vocab_size), used)
        used = np.concatenate([used, rest[: max(0, words - len(used))]])
    few = np.random.default_rng(0).permutation(len(held))[:HELD]
    return Corpus(train, held.take(few), used, source)


def _pad(student: students.Student) -> int:
    return int(student.tokenizer.pad_token_id)


def _split(student: students.Student, task: str, split: str, real: bool) -> Split:
    e = examples.load(task, split, "real" if real else "mini")
    ids, types, _ = students.tokenise(student, e.first, e.second, MAX_LENGTH)
    assert types is not None
    return Split(ids, types, e.labels)


def _stretch(s: Split, rng: np.random.Generator, size: int, lengths: tuple[int, ...]) -> Split:
    """`size` texts of given length quantiles: texts drawn with replacement, joined and cut."""
    tokens, types, labels = [], [], []
    for n in np.interp(rng.random(size), SHARES, lengths).round().astype(int):
        picks = [int(i) for i in rng.integers(len(s), size=1 + n // 4)]
        body = np.concatenate([s.tokens[i][1:-1] for i in picks])[: n - 2]
        kind = np.concatenate([s.types[i][1:-1] for i in picks])[: n - 2]
        first, last = s.tokens[picks[0]][:1], s.tokens[picks[0]][-1:]
        tokens.append(np.concatenate([first, body, last]))
        types.append(np.concatenate([[0], kind, kind[-1:]]).astype(np.int32))
        labels.append(s.labels[picks[0]])
    return Split(tokens, types, np.array(labels))


def grouped(lengths: np.ndarray, size: int, batch: int, seed: int) -> np.ndarray:
    """Texts of one round in order: `size` in batches of Trainer's grouped epoch over the whole set.

    One batch of each of equal parts of that epoch, in order of length: the texts are about as long
    as the set's, whoever batches them and however.
    """
    torch.manual_seed(seed)
    order = np.array(get_length_grouped_indices(lengths.tolist(), batch))
    batches = order[: len(order) // batch * batch].reshape(-1, batch)
    batches = batches[np.argsort(lengths[batches].max(1), kind="stable")]
    picks = [p[len(p) // 2] for p in np.array_split(np.arange(len(batches)), max(1, size // batch))]
    return batches[np.random.default_rng(seed).permutation(picks)].reshape(-1)
