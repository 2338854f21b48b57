"""TinyBERT's task distillation: first every layer of the mentor, then its predictions."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from armada_lib.batching import Batch, Encoded
from armada_lib.methods.base import Centroid, Phase, Setting, Terms
from armada_lib.methods.kd import KD
from armada_lib.methods.layers import Watch, layer_map, pairs
from armada_lib.students import Student, StudentOutput

FLOOR = -100.0  # scores at or below it count as 0, on both sides
FIRST = 10 / 13  # share of the epochs that step 1 gets: the authors' 10 and 3


def first_epochs(epochs: int, chosen: int | None) -> int:
    """How many of `epochs` step 1 gets; ValueError if the choice leaves none for step 2."""
    if chosen is None:
        return min(epochs - 1, round(epochs * FIRST))
    if chosen >= epochs:
        raise ValueError(
            f"layer_epochs {chosen} of {epochs} epochs leave none in which TinyBERT's classifier "
            f"learns; valid: 0 to {epochs - 1}"
        )
    return chosen


class TinyBERT(KD):
    """Step 1 (phase "joint"), without labels or logits, over the S layers of the student:

        L = sum_{l=1..S} MSE(A_s^l, A_t^g(l)) + sum_{l=0..S} MSE(W h_s^l, h_t^g(l)),

    A the attention scores before softmax (at or below -100: 0), h the token vectors (l = 0: after
    the embeddings), W one trained linear map with bias, g(l) = round(l M / S) for M mentor layers.
    Step 2 (phase "student"): soft cross-entropy -sum_c p_t log p_s at temperature 1, without
    labels; for a regression the squared error to the *gold* score, as released.

    Of the epochs step 1 gets 10 in 13, rounded, and leaves at least one (`layer_epochs` overrides).
    alpha, beta, gamma and tau are not used: the source has no such weights.

    Source: Jiao et al. 2020, "TinyBERT: Distilling BERT for Natural Language Understanding", and
    the authors' code (one W for all layers; the paper has one more for the embeddings).
    Unsure: which of the paper's epochs and learning rates a quoted row used.
    Differs: **no augmented data**, which the published numbers need, and no general distillation
    before; one budget and one learning rate curve for both steps (source: 5e-5 constant, then 3e-5
    with warm-up). Squared errors are means over real tokens and pairs of real tokens, so that they
    do not depend on padding; the source's also count it. The soft cross-entropy is summed over
    classes, not averaged.

    The mentor reads along in step 1, so student and mentor must cut texts into the same tokens and
    have as many attention heads as each other; ValueError otherwise.
    """

    def __init__(self, setting: Setting, student: Student):
        super().__init__(setting, student)
        self.schedule(setting.training.epochs)  # an impossible split stops here
        self.teacher = self.mentor.tuned().eval().requires_grad_(False)
        self.seen = Watch(student, whole=True, attention=True)
        self.read = Watch(self.teacher, whole=True, attention=True, always=True)
        if student.tokenizer.get_vocab() != self.teacher.tokenizer.get_vocab():
            raise ValueError(
                "tinybert compares token by token: student and mentor need one vocabulary"
            )
        if self.seen.heads != self.read.heads:
            raise ValueError(
                f"tinybert compares attention head by head: the student has {self.seen.heads} heads, "
                f"the mentor {self.read.heads}"
            )
        self.layers = layer_map(self.seen.layers, self.read.layers)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(setting.seed + 3_000_017)
            self.fit = nn.Linear(student.width, self.read.width)
            nn.init.normal_(self.fit.weight, std=0.02)
            nn.init.zeros_(self.fit.bias)
        self.parts["fit"] = self.fit

    def learning_rate(self, part: str) -> float:
        return self.setting.training.student_lr

    def schedule(self, epochs: int) -> list[Phase]:
        first = first_epochs(epochs, self.setting.training.layer_epochs)
        return ["joint"] * first + ["student"] * (epochs - first)  # type: ignore[return-value]

    def attach(self, data: Encoded) -> None:
        lengths = data.lengths, self.mentor.data.lengths
        if not np.array_equal(*lengths):
            short = [f"{len(x)} texts of {x.sum()} tokens" for x in lengths]
            raise ValueError(
                "tinybert compares token by token, but student and mentor cut the texts into different "
                f"tokens ({short[0]}, {short[1]}); encode both alike (max_length)"
            )

    def before_epoch(self, number: int, epochs: int) -> None:
        self.seen.on = self.schedule(epochs)[number] == "joint"
        self.teacher.to(next(self.student.parameters()).device)

    def losses(
        self, batch: Batch, out: StudentOutput | None, phase: Phase, centroid: Centroid
    ) -> Terms:
        assert out is not None
        if phase == "joint":
            return self._layers(batch)
        if self.setting.kind == "regression":
            return {"task": self.task(out.logits, batch.labels)}
        if self.setting.kind == "multilabel":  # cross-entropy of c yes-or-no questions, as T is
            return {"soft": self.task_loss(out.logits, self.phi(self.taught(batch)))}
        p_t = self.shape(self.taught(batch)).softmax(-1)
        log_p = self.shape(out.logits).float().log_softmax(-1)
        return {"soft": -(p_t * log_p).sum(-1).mean()}

    def _layers(self, batch: Batch) -> Terms:
        """The two sums of step 1, on the student's latest forward."""
        inputs = batch.inputs
        theirs = self.mentor.data.batch(batch.rows, "packing" in inputs).to(batch.labels.device)
        with torch.no_grad():
            self.forward(self.teacher, theirs.inputs)
        count, attention, hidden = pairs(inputs) * self.seen.heads, [], []
        mask = inputs.get("attention_mask")
        for own, other in enumerate(self.layers):
            a, b = self.fit(self.seen.states[own].float()), self.read.states[other].float()
            hidden.append(_mse(a, b, mask))
            if own:
                groups = self.seen.scores(inputs, own), self.read.scores(inputs, other)
                found = [
                    (_floor(x) - _floor(y)).square().sum() for x, y in zip(*groups, strict=True)
                ]
                attention.append(torch.stack(found).sum() / count)
        return {"attention": torch.stack(attention).sum(), "hidden": torch.stack(hidden).sum()}

    def finish(self) -> None:
        self.seen.close()
        self.read.close()
        self.parts.clear()


def _floor(scores: Tensor) -> Tensor:
    return scores.masked_fill(scores <= FLOOR, 0.0)


def _mse(a: Tensor, b: Tensor, mask: Tensor | None) -> Tensor:
    """Mean squared difference of token vectors, (1, T, d) or (b, t, d) with mask (b, t)."""
    if mask is None:
        return F.mse_loss(a, b)
    return ((a - b).square() * mask[..., None]).sum() / (mask.sum() * a.shape[-1])
