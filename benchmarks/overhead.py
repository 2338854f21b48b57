"""What ARMADA adds to a step of plain fine-tuning, measured step by step in turn.

Each variant is a whole training by the engine in a thread of its own, but only one runs at a time:
the processor is handed on whenever a step has ended, so that slow moments hit all alike.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from armada_lib import engine
from armada_lib.batching import Batch, Encoded
from benchmarks import data
from benchmarks.common import BATCH, Split
from benchmarks.ours import Ours, training

WIDTH = 1024  # of the teacher's vectors, as the paper's
WINDOW = 10  # steps a round: one retraction at the default interval
ROUNDS = 6
NAMES = {"armada_over_undistilled": "armada", "armada_exact_over_undistilled": "exact"}


class Turns:
    """Whose turn it is among n threads, and how long each turn took (seconds, CPU seconds)."""

    def __init__(self, n: int):
        self.order, self.turn, self.changed = list(range(n)), 0, threading.Condition()
        self.times: list[list[tuple[float, float]]] = [[] for _ in range(n)]
        self.began: list[tuple[float, float] | None] = [None] * n

    def next(self, me: int) -> None:
        """End my turn and wait for the next one."""
        now = time.perf_counter(), time.thread_time()
        if (began := self.began[me]) is not None:
            self.times[me].append((now[0] - began[0], now[1] - began[1]))
            self._pass(me)
        with self.changed:
            self.changed.wait_for(lambda: self.turn == me)
        self.began[me] = time.perf_counter(), time.thread_time()

    def leave(self, me: int) -> None:
        """Take no more turns."""
        with self.changed:
            if self.turn == me:
                self._pass(me)
            self.order.remove(me)

    def _pass(self, me: int) -> None:
        with self.changed:
            self.turn = self.order[(self.order.index(me) + 1) % len(self.order)]
            self.changed.notify_all()


@dataclass
class InTurn(Encoded):
    """Data whose reader waits for its turn before each batch."""

    wait: Callable[[], None] = lambda: None

    def batch(self, rows: np.ndarray, packed: bool) -> Batch:
        self.wait()
        return super().batch(rows, packed)


def measure(names: list[str], rounds: int | None, size: int | None) -> dict[str, tuple]:
    """name -> (step-time ratio of each window of 10 steps, unit, note). `size` is not used."""
    rounds = rounds or ROUNDS
    corpus = data.load("cola")
    lengths = np.array([len(x) for x in corpus.train.tokens])
    # one step before the windows takes the memory, one after them ends the run
    subset = corpus.train.take(data.grouped(lengths, (rounds * WINDOW + 2) * BATCH, BATCH, 0))
    vectors = torch.randn(len(subset), WIDTH, generator=torch.Generator().manual_seed(0)).half()
    precisions = ["fp32"] + ["bf16"] * (engine.precision("auto") == "bf16")
    variants: dict[tuple[str, str], Ours] = {}
    for p in precisions:
        variants[p, "undistilled"] = Ours(data.STUDENT, corpus.vocabulary, training(p))
        for n in names:
            every = {"retract_every": 1} if NAMES[n] == "exact" else {}
            variants[p, NAMES[n]] = Ours(
                data.STUDENT, corpus.vocabulary, training(p, **every), "armada",
                width=WIDTH, alpha=0.5, beta=0.1, gamma=1.0,
            )  # fmt: skip
    turns = _train(list(variants.values()), subset, vectors)
    # (variants, rounds, 2): seconds and CPU seconds of each window
    steps = np.array([t[1:] for t in turns.times])
    windows = steps.reshape(len(variants), rounds, WINDOW, 2).sum(2)
    took = dict(zip(variants, windows, strict=True))
    found = {}
    for n in names:
        ratio = {p: took[p, NAMES[n]] / took[p, "undistilled"] for p in precisions}
        note = f"{corpus.source}, fp32, batch {BATCH}, windows of {WINDOW} steps; CPU time "
        note += f"{np.median(ratio['fp32'][:, 1]):.3f}"
        if "bf16" in ratio:
            wall, cpu = np.median(ratio["bf16"], 0)
            note += f"; in bf16 {wall:.3f} (CPU time {cpu:.3f})"
        drift = variants["fp32", NAMES[n]].method.facts()["drift"]
        note += f"; drift {drift:.1e} at the end"
        found[n] = ratio["fp32"][:, 0].tolist(), "step time ratio", note
    return found


def _train(sides: list[Ours], subset: Split, vectors: torch.Tensor) -> Turns:
    turns, failed = Turns(len(sides)), []
    mean, scale = torch.zeros(WIDTH), torch.ones(WIDTH)

    def work(me: int) -> None:
        torch.set_num_threads(1)
        more: dict[str, Any] = {}
        if sides[me].method.reads_teacher:
            more = {"teacher": vectors, "mean": mean, "scale": scale}
        try:
            wait = lambda: turns.next(me)
            sides[me].train(sides[me].encode(subset, InTurn, wait=wait, **more), seed=0)
        except Exception as e:  # noqa: BLE001  (raised again below, in the main thread)
            failed.append(e)
        finally:
            turns.leave(me)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(sides))]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    if failed:
        raise failed[0]
    return turns
