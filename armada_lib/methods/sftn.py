"""SFTN: a mentor that grows up with branches of its student, and is therefore easier to learn from.

This is its first stage, the fine-tuning of the mentor. The second is plain KD from that mentor.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from armada_lib import losses
from armada_lib.batching import Batch
from armada_lib.methods.base import LOSS, Centroid, Method, Phase, Setting, Terms
from armada_lib.methods.layers import Watch, bert
from armada_lib.students import Student, StudentOutput


class Entrance(nn.Module):
    """Stands where a branch's embeddings were: a linear map from the mentor's token vectors."""

    def __init__(self, mentor: int, student: int, seed: int):
        super().__init__()
        self.map = nn.Linear(mentor, student)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            nn.init.orthogonal_(self.map.weight)
        nn.init.zeros_(self.map.bias)

    def forward(self, inputs_embeds: Tensor, **_: Any) -> Tensor:
        """(..., mentor width) -> (..., student width), whatever the embeddings were told besides."""
        return self.map(inputs_embeds)


def places(mentor: int, student: int) -> list[tuple[int, int]]:
    """(mentor layer a branch hangs on, student layers it leaves out) at 1/3 and 2/3 of the depths.

    12 and 6 layers: (4, 2) and (8, 4). A branch keeps at least the student's last layer.
    """
    at = [(round(mentor * k / 3), min(student - 1, round(student * k / 3))) for k in (1, 2)]
    if not 0 < at[0][0] < at[1][0] < mentor:
        raise ValueError(f"sftn hangs branches on two inner layers; a mentor of {mentor} has none")
    return at


class SFTNTeacher(Method):
    """Fine-tuning of a mentor (here the `student`) with branches i = 1, 2 of a student to be:

        L = T(y, z_T) + b sum_i tau^2 KL(p_i(tau) || p_T(tau)) + g sum_i T(y, z_i),

    b = beta (source: 3), g = gamma (1), the weight of the first term is 1; alpha is not used. For a
    regression the KL is the squared difference of the scores. Branch i reads the token vectors
    after mentor layer M i / 3 through a linear map, and goes on as the student's layers after
    S i / 3 with its pooler and classifier. All terms train the mentor and the branches; `finish`
    drops the branches, which leaves an ordinary fine-tuned model.

    Source: D. Y. Park et al. 2021, "Learning Student-Friendly Teacher Networks" (NeurIPS).
    Unsure: no official code was found; the weights 1, 3, 1 are remembered, the direction of the KL
    and its temperature are read from descriptions.
    Differs: the source's networks are convolutional; where branches hang in a BERT, and a linear
    map as their transform, are choices made here.

    `small`: the student before fine-tuning, with a new head; its later layers become the branches.
    """

    def __init__(self, setting: Setting, student: Student, small: Student):
        super().__init__(setting, student)
        self.watch = Watch(student)
        if setting.kind in LOSS:
            small.centre(setting.label_mean)
        small.expand()  # its vocabulary goes: let no copy hold the whole table
        encoder = bert(small)
        self.places = places(self.watch.layers, len(encoder.encoder.layer))
        branches = []
        for i, (_, skipped) in enumerate(self.places):
            seed = setting.seed + 5_000_011 + i
            encoder.embeddings = Entrance(self.watch.width, small.width, seed)
            branch = copy.deepcopy(small, {id(small.tokenizer): small.tokenizer})
            inner = bert(branch).encoder
            inner.layer = inner.layer[skipped:]
            branches.append(branch)
        self.branches = nn.ModuleList(branches)
        self.watch.on = bool(setting.beta or setting.gamma)
        if self.watch.on:
            self.parts["branches"] = self.branches

    def learning_rate(self, part: str) -> float:
        return self.setting.training.student_lr

    def losses(
        self, batch: Batch, out: StudentOutput | None, phase: Phase, centroid: Centroid
    ) -> Terms:
        assert out is not None
        s = self.setting
        terms = {"task": self.task(out.logits, batch.labels)}
        if not self.parts:
            return terms
        found = self.branch_logits(batch.inputs)
        if s.beta:
            kl = [self._near(z, out.logits) for z in found]
            terms["branch_soft"] = s.beta * torch.stack(kl).sum()
        if s.gamma:
            gold = [self.task(z, batch.labels) for z in found]
            terms["branch_task"] = s.gamma * torch.stack(gold).sum()
        return terms

    def branch_logits(self, inputs: dict[str, Any]) -> list[Tensor]:
        """z_i of the latest forward, (n, c) each, with its graph."""
        self.branches.train(self.student.training)
        rest = {k: v for k, v in inputs.items() if k not in ("input_ids", "token_type_ids")}
        states = [self.watch.states[layer] for layer, _ in self.places]
        return [
            self.forward(branch, {**rest, "inputs_embeds": x}).logits
            for branch, x in zip(self.branches, states, strict=True)
        ]

    def _near(self, branch: Tensor, own: Tensor) -> Tensor:
        """KL(p_i || p_T), with gradient for both."""
        a, b = self.shape(branch), self.shape(own)
        if self.setting.kind == "regression":
            return losses.mse(b, a)
        return losses.soft_kl(a, b, self.setting.tau, self.phi)

    def finish(self) -> None:
        self.watch.close()
        self.parts.clear()
        del self.branches
