"""Batches of prompts with their responses, for students that generate.

The same packed rows as for classification; besides, where the prompt of each text lies (its mean is
the text's vector, A14) and from which positions an answer token is predicted. Logits are computed
there and nowhere else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from armada_lib.batching import Batch, Encoded


@dataclass
class Sequences(Encoded):
    """`tokens` hold prompt and response; `prompts` (n,) how many tokens the prompt has.

    Labels of a batch are the answer tokens of all its texts, (N,), in the order of the packed row.
    """

    prompts: np.ndarray | None = None

    def batch(self, rows: np.ndarray, packed: bool) -> Batch:
        """Collate examples into one packed row; see `Encoded.batch`."""
        assert packed and self.prompts is not None and self.per_example == 1
        whole = super().batch(rows, packed)
        length, prompt = self.lengths[whole.rows], self.prompts[whole.rows]
        start = np.cumsum(length) - length
        place = np.arange(int(length.sum())) - np.repeat(start, length)  # within its text
        text = np.repeat(np.arange(len(length)), length)
        asked = place < prompt[text]
        answered = np.flatnonzero(~asked)
        ids = whole.inputs["input_ids"][0]
        whole.inputs |= {
            "asked": torch.from_numpy(np.flatnonzero(asked)),
            "asked_text": torch.from_numpy(text[asked]),
            "predict": torch.from_numpy(answered - 1),  # the token before predicts
        }
        whole.labels = ids[torch.from_numpy(answered)]
        return whole


def sequences(
    prompts: Sequence[np.ndarray], responses: Sequence[np.ndarray], pad: int, limit: int
) -> tuple[Sequences, int]:
    """Join `prompts` and `responses`, token ids (t,), cutting responses at `limit` tokens in all.

    Returns the data and how many responses were cut. Raises ValueError for an empty prompt or
    response and for a prompt that leaves no room for one answer token.
    """
    joined, cut = [], 0
    for i, (p, r) in enumerate(zip(prompts, responses, strict=True)):
        if not len(p) or not len(r):
            what = "prompt" if not len(p) else "response"
            raise ValueError(f"example {i}: the {what} is empty")
        if len(p) >= limit:
            raise ValueError(
                f"example {i}: the prompt has {len(p)} tokens, the limit is {limit}; "
                "raise max_length or leave it out"
            )
        cut += len(p) + len(r) > limit
        joined.append(np.concatenate([p, r])[:limit].astype(np.int32))
    data = Sequences(
        joined, None, torch.zeros(len(joined), dtype=torch.long), 1, pad,
        prompts=np.array([len(p) for p in prompts]),
    )  # fmt: skip
    return data, cut
