"""How each architecture of a classifier is taken apart: add an entry to teach another one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from armada_lib.packing import pooled_attention


class Family(NamedTuple):
    """How a family of classifiers is taken apart: encoder, map `Fs~`, dropout, head `O_s`."""

    encoder: Callable[[Any], nn.Module]
    transform: Callable[[Any, torch.Tensor], torch.Tensor]
    dropout: Callable[[Any, torch.Tensor], torch.Tensor]
    head: Callable[[Any], nn.Linear]
    pooling: str  # what the plain classification checkpoint does
    packs: bool  # its attention goes through transformers' attention interface
    last: Callable[..., torch.Tensor] | None = None  # its last layer, at the pooled tokens alone


def _last_bert(
    layer: Any, plain: Callable[..., Any], x: torch.Tensor, *args: Any, **kwargs: Any
) -> torch.Tensor:
    """`BertLayer.forward` at the pooled tokens alone, (1, T, d) -> (1, n, d).

    Nobody reads the other tokens' last vectors: only their keys and values count. `at` (n,): the
    pooled tokens' places, in the order of the packed texts; without it, the plain layer.
    """
    at = kwargs.pop("at", None)
    if at is None:
        return plain(x, *args, **kwargs)
    own, tokens = layer.attention.self, x[0]
    seen, dropout = tokens.index_select(0, at), own.dropout.p if own.training else 0.0
    q, k, v = own.query(seen), own.key(tokens), own.value(tokens)
    found = pooled_attention(
        q, k, v, own.num_attention_heads, own.scaling, dropout, kwargs["packing"]
    )
    return layer.feed_forward_chunk(layer.attention.output(found, seen))[None]


FAMILIES: dict[str, Family] = {
    "bert": Family(
        lambda m: m.bert,
        lambda m, x: m.bert.pooler(x[:, None]),
        lambda m, x: m.dropout(x),
        lambda m: m.classifier,
        "cls",
        packs=True,
        last=_last_bert,
    ),
    "deberta-v2": Family(
        lambda m: m.deberta,
        lambda m, x: m.pooler(x[:, None]),
        lambda m, x: m.dropout(x),
        lambda m: m.classifier,
        "cls",
        packs=False,
    ),
    "opt": Family(
        # OPT's plain classifier reads the last hidden vector directly: here `Fs~` is the identity.
        lambda m: m.model,
        lambda m, x: x,
        lambda m, x: x,
        lambda m: m.score,
        "last",
        packs=True,
    ),
}


def text_mean(x: torch.Tensor, text: torch.Tensor, n: int) -> torch.Tensor:
    """Mean of the rows of x (t, d) that belong to each of n texts, `text` (t,): (n, d)."""
    total = x.new_zeros(n, x.shape[1]).index_add(0, text, x)
    return total / torch.bincount(text, minlength=n)[:, None]
