"""Batches of encoded texts, without padding work.

Models that take transformers' attention interface read packed batches (`packing`), the same random
subsets as in the plain recipe; the others (DeBERTa) padded ones, drawn from length buckets.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from armada_lib.packing import pack, sent

WINDOW = 50  # batches per length bucket, where packing is not possible


@dataclass
class Batch:
    """What one step reads. `n` texts make b = n / per_example examples.

    inputs: what the student's encoder takes; labels (b,); teacher (n, m) float32 or None;
    rows (b,) which examples these are, in this order.
    """

    inputs: dict[str, Any]
    labels: torch.Tensor
    teacher: torch.Tensor | None
    rows: np.ndarray

    def to(self, device: torch.device) -> Batch:
        if device.type == "cpu":
            return self
        move = lambda v: sent(v, device) if isinstance(v, torch.Tensor) else v.to(device)
        return Batch(
            {k: move(v) for k, v in self.inputs.items()}, move(self.labels),
            None if self.teacher is None else move(self.teacher), self.rows,
        )  # fmt: skip


@dataclass
class Encoded:
    """A split as token ids, beside its labels and teacher vectors.

    tokens: one int32 array a text; types: token types or None; teacher: a float16 matrix of width
    m, may be memory-mapped, whose row `where[i]` (default i) is given to text i;
    `mean`, `scale` standardise it (A24) when a batch is read. Where the row is -1 the text has no
    vector and gets the mean: zeros if standardised, else `absent` (m,). `noise` is the standard
    deviation of what is added to a text's vector: one draw a text, from `noise_seed` and its number.
    """

    tokens: list[np.ndarray]
    types: list[np.ndarray] | None
    labels: torch.Tensor
    per_example: int
    pad: int
    teacher: torch.Tensor | None = None
    mean: torch.Tensor | None = None
    scale: torch.Tensor | None = None
    where: np.ndarray | None = None
    absent: torch.Tensor | None = None
    noise: float = 0.0
    noise_seed: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        self.lengths = np.array([len(t) for t in self.tokens], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.labels)

    def vectors(self, texts: np.ndarray) -> torch.Tensor | None:
        """Standardised teacher vectors of these texts, (n, m) float32."""
        if self.teacher is None:
            return None
        rows = texts if self.where is None else self.where[texts]
        x = self.teacher.index_select(0, torch.from_numpy(np.maximum(rows, 0))).float()
        if self.mean is not None and self.scale is not None:
            x = (x - self.mean) / self.scale
        if self.noise:
            rngs = (np.random.default_rng([*self.noise_seed, int(i)]) for i in texts)
            drawn = np.stack([g.standard_normal(x.shape[1], np.float32) for g in rngs])
            x = x + self.noise * torch.from_numpy(drawn)
        if (rows >= 0).all():
            return x
        mean = 0.0 if self.absent is None else self.absent
        return torch.where(torch.from_numpy(rows < 0)[:, None], mean, x)

    def batch(self, rows: np.ndarray, packed: bool) -> Batch:
        """Collate examples; inside a batch they are ordered by length, longest first."""
        k = self.per_example
        texts = (rows[:, None] * k + np.arange(k)[None]).reshape(-1)
        if packed and k == 1:
            order = np.argsort(-self.lengths[texts], kind="stable")
            rows, texts = rows[order], texts[order]
        inputs = self._packed(texts) if packed else self._padded(texts)
        return Batch(inputs, self.labels[torch.from_numpy(rows)], self.vectors(texts), rows)

    def _packed(self, texts: np.ndarray) -> dict[str, Any]:
        # Choice tasks keep their texts side by side in the output, so length order is undone there.
        order = np.argsort(-self.lengths[texts], kind="stable")
        sorted_texts = texts[order]
        lengths = self.lengths[sorted_texts]
        packing = pack(lengths)
        back = torch.from_numpy(np.argsort(order, kind="stable"))
        packing.first, packing.last = packing.first[back], packing.last[back]
        packing.order = torch.from_numpy(order)
        packing.text = packing.order[packing.text]
        starts = np.cumsum(lengths) - lengths
        position = np.arange(int(lengths.sum())) - np.repeat(starts, lengths)
        inputs: dict[str, Any] = {
            "input_ids": _long(np.concatenate([self.tokens[i] for i in sorted_texts])),
            "position_ids": torch.from_numpy(position)[None],
            "packing": packing,
        }
        if self.types is not None:
            inputs["token_type_ids"] = _long(np.concatenate([self.types[i] for i in sorted_texts]))
        return inputs

    def _padded(self, texts: np.ndarray) -> dict[str, Any]:
        lengths = self.lengths[texts]
        valid = np.arange(lengths.max())[None] < lengths[:, None]
        ids = np.full(valid.shape, self.pad, dtype=np.int64)
        ids[valid] = np.concatenate([self.tokens[i] for i in texts])
        inputs = {
            "input_ids": torch.from_numpy(ids),
            "attention_mask": torch.from_numpy(valid.astype(np.int64)),
        }
        if self.types is not None:
            types = np.zeros_like(ids)
            types[valid] = np.concatenate([self.types[i] for i in texts])
            inputs["token_type_ids"] = torch.from_numpy(types)
        return inputs


def _long(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(x.astype(np.int64))[None]


def epoch(
    data: Encoded, size: int, seed: int, number: int, packed: bool, rank: int = 0, world: int = 1
) -> Iterator[np.ndarray]:
    """Example numbers of each batch of one epoch; a pure function of seed and epoch number.

    `size` is the batch of one process. With several processes each takes its share of a batch of
    size * world; at most world - 1 examples of the last batch are left out so that shares are equal.
    """
    for rows in plan(data, size * world, seed, number, packed):
        rows = rows[: len(rows) // world * world]
        if len(rows):
            yield rows[rank::world]


def plan(data: Encoded, size: int, seed: int, number: int, packed: bool) -> list[np.ndarray]:
    """The epoch's batches over all processes."""
    rng = np.random.default_rng([seed, number])
    order = rng.permutation(len(data))
    if packed:
        return [order[i : i + size] for i in range(0, len(order), size)]
    length = data.lengths.reshape(len(data), -1).max(1)
    out = []
    for w in range(0, len(order), WINDOW * size):
        window = order[w : w + WINDOW * size]
        window = window[np.argsort(-length[window], kind="stable")]
        out += [window[i : i + size] for i in range(0, len(window), size)]
    return [out[i] for i in rng.permutation(len(out))]
