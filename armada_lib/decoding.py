"""Token by token, for many prompts at once, without reading anything twice.

Prompts are read as one packed row in which a beginning that several share (a template's preamble)
stands once. What was read of them is then laid side by side, padded on the left; its memory has
room for the answers from the start, and answers that have ended leave the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, DynamicCache
from transformers.cache_utils import DynamicLayer

PREFILL = "armada_prefill"
GROUPS = 4  # prompts of like length are padded together inside attention
LEAVE = 0.2  # share of ended answers from which they are taken out of the batch

Pick = Callable[[Tensor, list[int]], Tensor]  # logits (r, vocabulary), rows' numbers -> token (r,)


class Shared(NamedTuple):
    """Index maps of T distinct tokens: `groups` of (texts, longest, token of every slot); `read`
    (T,) a slot of each token.
    """

    groups: list[tuple[int, int, Tensor]]
    read: Tensor


def prefill_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    packing: Shared | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention of texts with shared beginnings, (1, heads, T, width) each.

    No mask: a text's padding stands at its end, where no token looks.
    """
    assert packing is not None
    q, k, v = (x[0].transpose(0, 1).flatten(1) for x in (query, key, value))
    width, out = query.shape[3], []
    for count, longest, slots in packing.groups:
        pad = lambda x, s=slots, n=count, m=longest: (
            x.index_select(0, s).view(n, m, -1, width).transpose(1, 2)
        )
        o = F.scaled_dot_product_attention(
            pad(q), pad(k), pad(v), is_causal=True, scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )  # fmt: skip
        out.append(o.transpose(1, 2).reshape(count * longest, -1, width))
    return torch.cat(out).index_select(0, packing.read)[None], None


AttentionInterface.register(PREFILL, prefill_attention)


def share(texts: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """(ids, positions) of the distinct tokens, (T,) each, and which of them each text consists of.

    Two texts share a token as long as everything before it is the same.
    """
    known: dict[tuple[int, int], int] = {}
    ids: list[int] = []
    positions: list[int] = []
    places: list[np.ndarray] = []
    for text in texts:
        before, place = -1, []
        for position, token in enumerate(text.tolist()):
            here = known.setdefault((before, token), len(ids))
            if here == len(ids):
                ids.append(token)
                positions.append(position)
            place.append(here)
            before = here
        places.append(np.array(place))
    return np.array(ids), np.array(positions), places


class Room(DynamicLayer):
    """Keys and values (b, heads, n, width) of one layer, with room for `more` tokens."""

    def __init__(self, keys: Tensor, values: Tensor, more: int):
        super().__init__()
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        self.used = keys.shape[2]
        self.whole = [F.pad(x, (0, 0, 0, more)) for x in (keys, values)]
        self._show()

    def _show(self) -> None:
        self.keys, self.values = (x[:, :, : self.used] for x in self.whole)

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> Any:
        end = self.used + keys.shape[2]
        for whole, new in zip(self.whole, (keys, values), strict=True):
            whole[:, :, self.used : end] = new
        self.used = end
        self._show()
        return self.keys, self.values

    def select(self, rows: Tensor) -> None:
        """Keep these rows of the batch."""
        self.whole = [x.index_select(0, rows) for x in self.whole]
        self._show()


def read(model: Any, texts: Sequence[np.ndarray], **kwargs: Any) -> tuple[Tensor, list[np.ndarray]]:
    """(hidden vectors (T, d) of the distinct tokens, which of them each text consists of)."""
    model.set_attn_implementation(PREFILL)
    ids, positions, places = share(texts)
    order = np.argsort([-len(p) for p in places], kind="stable")
    groups, slot, start = [], np.zeros(len(ids), dtype=np.int64), 0
    to = lambda x: _to(model, x)
    for chunk in np.array_split(order, min(GROUPS, len(order))):
        longest = len(places[chunk[0]])
        slots = np.zeros((len(chunk), longest), dtype=np.int64)
        for row, i in enumerate(chunk):
            slots[row, : len(places[i])] = places[i]
            slot[places[i]] = start + row * longest + np.arange(len(places[i]))
        start += slots.size
        groups.append((len(chunk), longest, to(slots.reshape(-1))))
    out = model.model(
        input_ids=to(ids)[None], position_ids=to(positions)[None], packing=Shared(groups, to(slot)),
        **kwargs,
    )  # fmt: skip
    return out.last_hidden_state[0], places


def _to(model: Any, x: np.ndarray) -> Tensor:
    return torch.from_numpy(x).to(model.get_input_embeddings().weight.device)


def likelihoods(
    model: Any, prompts: Sequence[np.ndarray], choices: Sequence[Sequence[np.ndarray]]
) -> list[tuple[np.ndarray, np.ndarray]]:
    """For every prompt (sum of log p(token), number of tokens) of each of its choices, (k,) each.

    All are token ids. A prompt is read once, whatever the number of its choices.
    """
    flat = [(p, c) for p, cs in zip(prompts, choices, strict=True) for c in cs]
    hidden, places = read(model, [np.concatenate(x) for x in flat], use_cache=False)
    before = [at[len(p) - 1 : -1] for at, (p, _) in zip(places, flat, strict=True)]
    at, row = np.unique(np.concatenate(before), return_inverse=True)
    token = np.concatenate([c for _, c in flat])
    logits = model.get_output_embeddings()(hidden.index_select(0, _to(model, at)))
    logp = torch.log_softmax(logits.float(), -1)[_to(model, row), _to(model, token)].cpu()
    lengths = [len(c) for _, c in flat]
    total = np.array([float(x.sum()) for x in logp.split(lengths)])
    ends = np.cumsum([len(cs) for cs in choices])[:-1]
    return list(zip(np.split(total, ends), np.split(np.array(lengths), ends), strict=True))


def prefill(model: Any, texts: Sequence[np.ndarray], more: int) -> tuple[DynamicCache, Tensor]:
    """(cache of the texts, padded on the left, with room for `more` tokens; logits of their ends)."""
    cache = DynamicCache()
    hidden, places = read(model, texts, use_cache=True, past_key_values=cache)
    ends = _to(model, np.array([p[-1] for p in places]))
    logits = model.get_output_embeddings()(hidden.index_select(0, ends))
    longest = max(len(p) for p in places)
    slots = np.zeros((len(texts), longest), dtype=np.int64)
    for row, p in enumerate(places):
        slots[row, longest - len(p) :] = p
    at = _to(model, slots.reshape(-1))
    side_by_side = lambda x: (
        x[0].index_select(1, at).view(x.shape[1], len(texts), longest, -1).transpose(0, 1)
    )
    cache.layers = [Room(side_by_side(x.keys), side_by_side(x.values), more) for x in cache.layers]
    return cache, logits


def decode(
    model: Any, texts: Sequence[np.ndarray], new_tokens: int, ends: set[int], pick: Pick
) -> Iterator[tuple[int, list[int]]]:
    """(row, its answer) as each ends: at most `new_tokens` tokens, up to one of `ends`, left out.

    `model`: a causal model of transformers; `texts`: token ids, none empty; `pick`: chooses each
    row's next token.
    """
    cache, logits = prefill(model, texts, new_tokens)
    model.set_attn_implementation("sdpa")
    device, lengths = logits.device, [len(t) for t in texts]
    longest = max(lengths)
    seen = torch.ones(len(texts), longest + new_tokens, dtype=torch.long, device=device)
    for row, n in enumerate(lengths):
        seen[row, : longest - n] = 0
    position = torch.tensor(lengths, device=device)
    rows, said = list(range(len(texts))), [list[int]() for _ in texts]
    going = [True] * len(rows)
    for step in range(new_tokens):
        token = pick(logits, rows)
        for k, (row, x) in enumerate(zip(rows, token.tolist(), strict=True)):
            if going[k] and x not in ends:
                said[row].append(x)
            elif going[k]:
                going[k] = False
                yield row, said[row]
        if step + 1 == new_tokens or not any(going):
            break
        if sum(going) <= (1 - LEAVE) * len(going):
            stay = torch.tensor([k for k, g in enumerate(going) if g], device=device)
            for layer in cache.layers:
                layer.select(stay)  # type: ignore[attr-defined]
            token, position, seen = token[stay], position[stay], seen[stay]
            rows, going = [r for r, g in zip(rows, going, strict=True) if g], [True] * len(stay)
        logits = model(
            input_ids=token[:, None], attention_mask=seen[:, : longest + step + 1],
            position_ids=position[:, None], past_key_values=cache, use_cache=True,
        ).logits[:, -1]  # fmt: skip
        position = position + 1
    for row, g in zip(rows, going, strict=True):
        if g:
            yield row, said[row]
