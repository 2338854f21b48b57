"""Fine-tuning: the engine against `transformers.Trainer`, in turn in one process.

A round is one short training of each side on the same texts, with everything built and tokenised
before the clock starts. The clock runs over the whole call of the engine, but only over the loop
of Trainer. Both students are trained on from round to round and scored at the end.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from armada_lib import profiles
from benchmarks import data
from benchmarks.common import BATCH, RECIPE, Split
from benchmarks.ours import Ours, training
from benchmarks.peer import Peer

ROUNDS = {"cola": 4, "mrpc": 3}
SIZE = {"cola": 20 * BATCH, "mrpc": 10 * BATCH}  # texts a round

# name -> (task, our side, Trainer's side)
PAIRS = {
    "train_cola_vs_trainer_dynamic": ("cola", "fp32", "dynamic"),
    "train_mrpc_vs_trainer_dynamic": ("mrpc", "fp32", "dynamic"),
    "train_cola_vs_trainer_grouped": ("cola", "fp32", "grouped"),
    "train_mrpc_vs_trainer_grouped": ("mrpc", "fp32", "grouped"),
    "train_cola_vs_trainer_grouped_epoch": ("cola", "fp32", "epoch"),
    "train_mrpc_vs_trainer_grouped_epoch": ("mrpc", "fp32", "epoch"),
    "train_cola_default_vs_trainer_fp32": ("cola", "auto", "dynamic"),
}
# Trainer's sampling on each of its sides. "grouped" is its group_by_length on the texts of a round,
# which are few, so that it pads more than in a real epoch (CoLA, 24 steps: 1.23 tokens for each
# useful one, against 1.04). "epoch", the harder peer, is given in order the batches that
# group_by_length makes over the whole training set (see `data.grouped`).
SAMPLING = {"dynamic": "random", "grouped": "group_by_length", "epoch": "sequential"}


def measure(names: list[str], rounds: int | None, size: int | None) -> dict[str, tuple]:
    """name -> (speed-up of each round, unit, note) of those of `PAIRS` that are asked for."""
    found: dict[str, tuple] = {}
    for task in ROUNDS:
        mine = {n: PAIRS[n][1:] for n in names if PAIRS[n][0] == task}
        if mine:
            found |= _task(task, mine, rounds or ROUNDS[task], size or SIZE[task])
    return found


def _task(task: str, pairs: dict[str, Any], rounds: int, size: int) -> dict[str, tuple]:
    corpus = data.load(task)
    lengths = np.array([len(x) for x in corpus.train.tokens])
    sides: dict[str, Ours | Peer] = {}
    checkpoint = profiles.resolve(data.STUDENT.checkpoint)
    for own, other in pairs.values():
        if own not in sides:
            sides[own] = Ours(data.STUDENT, corpus.vocabulary, training(own))
        if other not in sides:
            sides[other] = Peer(checkpoint, 0, RECIPE)
    seconds: dict[str, list[float]] = {s: [] for s in sides}
    cpu: dict[str, list[float]] = {s: [] for s in sides}
    loss: dict[str, list[float]] = {s: [] for s in sides}
    for r in range(-1, rounds):  # round -1 warms up and is not counted
        subset = corpus.train.take(
            data.grouped(lengths, BATCH * 2 if r < 0 else size, BATCH, r + 1)
        )
        for s in list(sides)[:: 1 if r % 2 else -1]:
            took = _round(sides[s], s, subset, r + 1)
            if r >= 0:
                for store, value in zip((seconds, cpu, loss), took, strict=True):
                    store[s].append(value)
        if r >= 0:
            ms = {s: round(seconds[s][-1] / size * BATCH * 1e3) for s in sides}
            print(f"{task} round {r + 1} of {rounds}, ms a step: {ms}", file=sys.stderr)
    scores = {s: _score(side, corpus.held) for s, side in sides.items()}
    found = {}
    for name, (own, other) in pairs.items():
        ratio = lambda t, o=own, p=other: [b / a for a, b in zip(t[o], t[p], strict=True)]
        note = f"{corpus.source}, ours {own}, {size // BATCH} steps a round; CPU time "
        note += f"{float(np.median(ratio(cpu))):.2f}"
        if other == "epoch":
            note += "; batches grouped over the whole training set"
        note += "; ours / Trainer: " + ", ".join(
            f"{what} {mine:.3f} / {theirs:.3f}" for what, mine, theirs in (
                ("training loss", loss[own][-1], loss[other][-1]),
                ("validation loss", scores[own][0], scores[other][0]),
                ("accuracy", scores[own][1], scores[other][1]),
            )
        )  # fmt: skip
        found[name] = ratio(seconds), "times faster", note
    return found


def _round(side: Ours | Peer, name: str, subset: Split, seed: int) -> tuple[float, ...]:
    if isinstance(side, Ours):
        return side.train(side.encode(subset), seed)
    return side.train(subset.examples(), seed, SAMPLING[name])


def _score(side: Ours | Peer, held: Split) -> tuple[float, float]:
    """(loss, accuracy) on the validation texts."""
    given = side.encode(held) if isinstance(side, Ours) else held.examples()
    logits = torch.from_numpy(side.logits(given))  # type: ignore[arg-type]
    labels = torch.from_numpy(held.labels)
    right = (logits.argmax(-1) == labels).float().mean()
    return float(F.cross_entropy(logits, labels)), float(right)
