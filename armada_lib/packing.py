"""Packed batches: one row of tokens, so that linear layers see no padding at all.

Only the attention pads, inside a few groups of texts of similar length. It plugs into transformers'
attention interface, so no model code is touched.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

PACKED = "armada_packed"
GROUPS = 4  # length groups in a packed batch; more groups pad less and launch more kernels


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
        move = lambda x: None if x is None else sent(x, device)
        groups = [
            Group(g.count, g.longest, g.tokens, move(g.slots), move(g.mask)) for g in self.groups
        ]
        maps = (self.first, self.last, self.text, self.order)
        return Packing(groups, *(sent(m, device) for m in maps))


def sent(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """On the device; to a GPU from pinned memory, or the host would wait for each copy."""
    return (x.pin_memory() if device.type == "cuda" else x).to(device, non_blocking=True)


def pack(lengths: np.ndarray, groups: int = GROUPS) -> Packing:
    """Index maps for texts of these lengths (n,), which must be in descending order."""
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
    """Attention of a packed batch, padded group by group: (1, T, heads, width), and no weights.

    query, key and value are (1, heads, T, width); attention_mask, (1, T), is not read: a causal model
    needs none, because padding stands at the end, where no token looks. Raises ValueError without
    the batch's `packing`.
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
        q, k, v = (padded(x, g, x.shape[1], width) for x in (q, k, v))
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


def padded(x: torch.Tensor, g: Group, heads: int, width: int) -> torch.Tensor:
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
            padded(k, g, heads, width),
            padded(v, g, heads, width),
        )
        o = F.scaled_dot_product_attention(
            q, k, v, attn_mask=g.mask, dropout_p=dropout, scale=scaling
        )
        out.append(o.reshape(g.count, heads * width))
    return torch.cat(out)
