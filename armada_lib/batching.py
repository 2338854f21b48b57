"""Batches without padding work.

A packed batch is one row of tokens: linear layers see no padding at all, and only the attention
pads, inside a few groups of texts of similar length. It plugs into transformers' attention
interface, so no model code is touched; models without that interface (DeBERTa) get padded batches
drawn from length buckets instead. Batches are the same random subsets as in the plain recipe.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

PACKED = "armada_packed"
GROUPS = 4  # length groups in a packed batch; more groups pad less and launch more kernels
WINDOW = 50  # batches per length bucket, where packing is not possible


@dataclass
class Group:
    """Texts of similar length inside a packed batch: where each token lies when padded."""

    count: int
    longest: int
    tokens: int
    slots: torch.Tensor | None  # (tokens,) padded slot of every token; None when all are as long
    mask: torch.Tensor | None  # (count, 1, 1, longest) True where a token stands


@dataclass
class Packing:
    """Index maps of one packed batch of n texts and T tokens."""

    groups: list[Group]
    first: torch.Tensor  # (n,) place of each text's first token
    last: torch.Tensor  # (n,) place of each text's last token
    text: torch.Tensor  # (T,) number of the text a token belongs to
    order: torch.Tensor  # (n,) number of the text at each place

    @property
    def sizes(self) -> list[int]:
        return [g.tokens for g in self.groups]

    def to(self, device: torch.device) -> Packing:
        move = lambda x: None if x is None else _sent(x, device)
        groups = [
            Group(g.count, g.longest, g.tokens, move(g.slots), move(g.mask)) for g in self.groups
        ]
        maps = (self.first, self.last, self.text, self.order)
        return Packing(groups, *(_sent(m, device) for m in maps))


def _sent(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """On the device; to a GPU from pinned memory, or the host would wait for each copy."""
    return (x.pin_memory() if device.type == "cuda" else x).to(device, non_blocking=True)


def pack(lengths: np.ndarray, groups: int = GROUPS) -> Packing:
    """Index maps for texts of these lengths, which must be in descending order."""
    parts = []
    for chunk in np.array_split(lengths, min(groups, len(lengths))):
        n, m = len(chunk), int(chunk[0])
        full = bool(chunk[-1] == m)
        valid = np.arange(m)[None] < chunk[:, None]
        parts.append(Group(
            n, m, int(chunk.sum()),
            None if full else torch.from_numpy(np.flatnonzero(valid)),
            None if full else torch.from_numpy(valid)[:, None, None, :],
        ))  # fmt: skip
    ends = np.cumsum(lengths)
    text = np.repeat(np.arange(len(lengths)), lengths)
    maps = (ends - lengths, ends - 1, text, np.arange(len(lengths)))
    return Packing(parts, *map(torch.from_numpy, maps))


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    packing: Packing | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of a packed batch, (1, heads, T, width) each, padded group by group.

    Causal models need no mask: padding stands at the end, where no token looks.
    """
    if packing is None:
        raise ValueError(
            "packed attention needs the batch's `packing`; use a model's own attention otherwise"
        )
    causal = bool(getattr(module, "is_causal", False) if is_causal is None else is_causal)
    width, grouped = query.shape[3], query.shape[1] != key.shape[1]
    out = []
    split = [
        t[0].transpose(0, 1).split(packing.sizes) for t in (query, key, value)
    ]  # (tokens, heads, width)
    for g, q, k, v in zip(packing.groups, *split, strict=True):
        q, k, v = (_padded(x, g, x.shape[1], width) for x in (q, k, v))
        if causal and not dropout and q.device.type == "cpu" and q.dtype == torch.bfloat16:
            o = _causal(q, k, v, width**-0.5 if scaling is None else scaling)
        else:
            o = F.scaled_dot_product_attention(
                q, k, v, attn_mask=None if causal else g.mask,
                dropout_p=dropout, is_causal=causal, scale=scaling, enable_gqa=grouped,
            )  # fmt: skip
        o = o.transpose(1, 2).reshape(g.count * g.longest, query.shape[1], width)
        out.append(o if g.slots is None else o.index_select(0, g.slots))
    return torch.cat(out)[None], None


def _causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float) -> torch.Tensor:
    """Causal attention, (n, heads, L, width), by plain matrix products.

    In bf16 the backward pass of torch's CPU kernel takes three to nine times as long. Queries that
    share a key (grouped queries) stand below each other in one matrix.
    """
    n, heads, length, width = q.shape
    flat = lambda x: x.reshape(n * k.shape[1], -1, width)
    future = torch.full((length, length), -torch.inf, dtype=q.dtype).triu(1)
    future = future.repeat(heads // k.shape[1], 1)
    scores = torch.baddbmm(future, flat(q), flat(k).transpose(1, 2), alpha=scaling)
    return torch.bmm(torch.softmax(scores, -1), flat(v)).view(n, heads, length, width)


def _padded(x: torch.Tensor, g: Group, heads: int, width: int) -> torch.Tensor:
    """(tokens, heads, width) -> (count, heads, longest, width)"""
    x = x.reshape(-1, heads * width)
    if g.slots is not None:
        x = x.new_zeros(g.count * g.longest, heads * width).index_copy(0, g.slots, x)
    return x.view(g.count, g.longest, heads, width).transpose(1, 2)


def packed() -> str:
    """The name under which transformers knows packed attention, from this call on."""
    from transformers import AttentionInterface  # takes seconds: only where a model is loaded

    AttentionInterface.register(PACKED, packed_attention)
    return PACKED


def pooled_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    heads: int,
    scaling: float,
    dropout: float,
    packing: Packing,
) -> torch.Tensor:
    """Attention of one query a text, (n, d), to the batch's T tokens, (T, d) each: (n, d)."""
    width, out = query.shape[1] // heads, []
    sizes = [g.count for g in packing.groups], packing.sizes, packing.sizes
    split = [x.split(n) for x, n in zip((query, key, value), sizes, strict=True)]
    for g, q, k, v in zip(packing.groups, *split, strict=True):
        q, k, v = (
            q.view(g.count, heads, 1, width),
            _padded(k, g, heads, width),
            _padded(v, g, heads, width),
        )
        o = F.scaled_dot_product_attention(
            q, k, v, attn_mask=g.mask, dropout_p=dropout, scale=scaling
        )
        out.append(o.reshape(g.count, heads * width))
    return torch.cat(out)


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
        move = lambda v: _sent(v, device) if isinstance(v, torch.Tensor) else v.to(device)
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
