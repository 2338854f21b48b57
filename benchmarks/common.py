"""What both sides of a benchmark share. Imports neither the library nor its peers, so that the
memory of a process with one side is that side's own.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

BATCH = 32
RECIPE: dict[str, Any] = dict(batch_size=BATCH, student_lr=5e-5, clip=1.0, weight_decay=0.01)


@dataclass
class Split:
    """Texts as int32 token ids of the checkpoint's vocabulary, their token types, their labels."""

    tokens: list[np.ndarray]
    types: list[np.ndarray]
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)

    def take(self, rows: np.ndarray) -> Split:
        """The texts with these numbers, in this order."""
        pick = lambda xs: [xs[i] for i in rows]
        return Split(pick(self.tokens), pick(self.types), self.labels[rows])

    def examples(self) -> list[dict]:
        """One dict a text, as `transformers.Trainer` takes them."""
        return [
            {"input_ids": x.tolist(), "token_type_ids": t.tolist(), "labels": int(y)}
            for x, t, y in zip(self.tokens, self.types, self.labels, strict=True)
        ]

    def save(self, path: Path, vocabulary: np.ndarray) -> None:
        """Write the split and a vocabulary to one .npz file, for another process."""
        lengths = [len(x) for x in self.tokens]
        flat = np.concatenate(self.tokens), np.concatenate(self.types)
        np.savez(path, *flat, np.cumsum(lengths), self.labels, vocabulary)


def read(path: Path) -> tuple[Split, np.ndarray]:
    """What `Split.save` wrote: (split, vocabulary)."""
    with np.load(path) as f:
        tokens, types, ends, labels, vocabulary = (f[f"arr_{i}"] for i in range(5))
    cut = lambda x: np.split(x, ends[:-1])
    return Split(cut(tokens), cut(types), labels), vocabulary
