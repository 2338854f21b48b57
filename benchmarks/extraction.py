"""What the store adds to a teacher's own time while it is filled: hashing, checking, writing, syncing."""

from __future__ import annotations

import tempfile
import time

import numpy as np

from armada_lib import extraction, features, profiles

TEXTS, ROUNDS, TEACHER = 64, 3, "sd14"


def measure(names: list[str], rounds: int | None, size: int | None) -> dict[str, tuple]:
    """name -> (store's time as a share of the teacher's, of each round, unit, note)."""
    n, teacher = size or TEXTS, extraction.load("mini", TEACHER)
    texts = [f"a picture of number {i}" for i in range(n)]
    shares, inside = [], 0.0

    def encode(part: list[str]) -> np.ndarray:
        nonlocal inside
        began = time.perf_counter()
        found = teacher.encode(part)
        inside += time.perf_counter() - began
        return found

    teacher.encode(texts[:2])  # the first call pays for set-up
    for _ in range(rounds or ROUNDS):
        with tempfile.TemporaryDirectory() as folder:
            store, inside = features.Store(folder, "bench", teacher.width), 0.0
            began = time.perf_counter()
            store.fill(texts, encode, progress=False)
            shares.append((time.perf_counter() - began - inside) / inside)
    played = profiles.load("mini").teacher(TEACHER).note
    note = f"{n} texts, {inside / n:.3f} s each by {played}; from an empty store"
    return dict.fromkeys(names, (shares, "share of the teacher's time", note))
