"""Two networks that learn together: deep mutual learning, and a teacher near its student.

The second network is a *partner*: in every step it is trained first (`turn`), against what the
student says, and the student then learns from what the trained partner says (`losses`). Both are
kept by the engine alike; only the student is evaluated.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from armada_lib import losses
from armada_lib.batching import Batch, Encoded
from armada_lib.methods.base import LOSS, Centroid, Mentor, Method, Phase, Setting, Terms
from armada_lib.students import Student, StudentOutput, centre

TWIN_SEED = 2_000_003  # added to the run's seed: two equal students would have nothing to say


def mentor_of(setting: Setting, method: str) -> Mentor:
    """The setting's mentor; ValueError if there is none."""
    if setting.mentor is None:
        raise ValueError(f"{method} trains a second language model: it needs a mentor")
    return setting.mentor


def counterpart(batch: Batch, data: Encoded, packed: bool) -> tuple[Batch, Tensor]:
    """The same examples as another model reads them, and the place of each of `batch`'s in there.

    Another vocabulary gives other lengths, and a packed batch is ordered by length. For x with a
    row an example of the counterpart, x[place] (b, ...) is in `batch`'s order.
    """
    other = data.batch(batch.rows, packed).to(batch.labels.device)
    place = np.argsort(other.rows)[np.argsort(np.argsort(batch.rows))]
    return other, torch.from_numpy(place).to(batch.labels.device)


def divergence(target: Tensor, own: Tensor, kind: str) -> Tensor:
    """KL(softmax(target) || softmax(own)), mean over examples, (b, c) each; the target is detached.

    For a regression the mean squared difference of the scores, (b,) each: they have no softmax. For
    several labels sigmoid, summed over them.
    """
    if kind == "regression":
        return losses.mse(own, target.detach())
    phi = losses.sigmoid if kind == "multilabel" else losses.softmax
    return losses.soft_kl(target.detach(), own, 1.0, phi)


@contextlib.contextmanager
def training(module: nn.Module, on: bool) -> Iterator[None]:
    """Within this block, dropout of the module is on or off; afterwards as it was."""
    was = module.training
    module.train(on)
    try:
        yield
    finally:
        module.train(was)


def twin(student: Student, seed: int) -> Student:
    """A second student: the same encoder, a head of its own, N(0, 0.02), drawn from `seed`."""
    other = copy.deepcopy(student, {id(student.tokenizer): student.tokenizer})
    head = other.family.head(other.model)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        head.weight.normal_(std=0.02)
    return other


class DML(Method):
    """Deep mutual learning: a peer learns the same task, and each is pulled to what the other says.

        L_peer = T(y, z_peer) + a KL(p_s || p_peer),    stepped first;
        L_s    = T(y, z_s)    + a KL(p_peer || p_s),    with the peer's output after its step;

    p = softmax(z), temperature 1; the distribution that is learned from is detached. a =
    `setting.alpha`; the source has no weight, so it is a = 1, and a = 0 is the undistilled student.
    Source: Zhang, Xiang, Hospedales and Lu (CVPR 2018), the alternating schedule.

    Peer: the mentor before its fine-tuning, or a second student (`twins=True`).

    Unsure: which of the two peers the printed row of Table 7 had. Dropout (the source's networks
    have none): here it is on in both outputs, as in one forward of training.
    Differs: the student's own output is not computed again after the peer's step, because that
    step does not change it. A regression's KL is the mean squared difference of the scores. The
    peer's learning rate is `training.partner_lr`, by default the student's.
    """

    def __init__(self, setting: Setting, student: Student, twins: bool = False):
        super().__init__(setting, student)
        self.data: Encoded | None = None  # None: the peer reads what the student reads
        if twins:
            self.peer = twin(student, setting.seed + TWIN_SEED)
        else:
            mentor = mentor_of(setting, "dml")
            self.peer, self.data = mentor.start(), mentor.data
        if setting.kind in LOSS:
            self.peer.centre(setting.label_mean)
        self.partners["peer"] = self.peer

    def learning_rate(self, part: str) -> float:
        own = self.setting.training.partner_lr
        return own if part == "peer" and own is not None else super().learning_rate(part)

    def _peer(self, batch: Batch) -> Tensor:
        """The peer's outputs in the student's order, a row an example."""
        with training(self.peer, True):
            if self.data is None:
                return self.shape(self.forward(self.peer, batch.inputs).logits)
            other, place = counterpart(batch, self.data, self.peer.packs)
            return self.shape(self.forward(self.peer, other.inputs).logits)[place]

    def turn(self, batch: Batch, out: StudentOutput | None, step: Callable[[str], Tensor]) -> None:
        assert out is not None
        z = self._peer(batch)
        loss = self.task_loss(z, batch.labels)
        pull = divergence(self.shape(out.logits), z, self.setting.kind)
        (loss + self.setting.alpha * pull).backward()
        step("peer")

    def losses(
        self, batch: Batch, out: StudentOutput | None, phase: Phase, centroid: Centroid
    ) -> Terms:
        assert out is not None
        terms = {"task": self.task(out.logits, batch.labels)}
        if self.setting.alpha:
            with torch.no_grad():
                z = self._peer(batch)
            pull = divergence(z, self.shape(out.logits), self.setting.kind)
            terms["soft"] = self.setting.alpha * pull
        return terms

    def facts(self) -> dict[str, float]:
        """Size of the peer."""
        return {"partner_parameters": sum(p.numel() for p in self.peer.parameters())}


class ProKT(Method):
    """Progressive knowledge transfer: the teacher learns the task at a pace the student can follow.

        L_teacher = (1 - a) T(y, z_t) + a KL(p_s || p_t),    stepped first;
        L_s       = KL(p_t || p_s),    with the teacher's output after its step, without labels;

    p = softmax(z), temperature 1, the first distribution detached and read without dropout. a =
    `setting.alpha` (lambda; 0.1-0.5 are searched). a = 0: the teacher's plain fine-tuning.
    The teacher starts pre-trained, not fine-tuned, and both heads start at zero, so that both
    start from one prediction. Source: Shi, Song, Zhou, Li and Li (2020, 2021), "Follow your path: a
    progressive method for knowledge distillation", and its authors' code for text classification.

    Unsure: the setting of the printed row of Table 7; the authors start from a student that was
    distilled in pre-training.
    Differs: a regression's KL is the mean squared difference of the scores, and there the heads'
    biases start at the mean score (weights at zero). The teacher's learning rate is
    `training.partner_lr`, by default 0.3 of the student's, the source's 3e-5 to 1e-4.
    """

    def __init__(self, setting: Setting, student: Student):
        super().__init__(setting, student)
        mentor = mentor_of(setting, "prokt")
        self.teacher, self.data = mentor.start(), mentor.data
        for model in (student, self.teacher):
            head: Any = model.family.head(model.model)
            nn.init.zeros_(head.weight)
            if head.bias is not None:
                centre(head, setting.label_mean if setting.kind in LOSS else 0.0)
        self.partners["teacher"] = self.teacher

    def learning_rate(self, part: str) -> float:
        t = self.setting.training
        if part != "teacher":
            return super().learning_rate(part)
        return 0.3 * t.student_lr if t.partner_lr is None else t.partner_lr

    def _teacher(self, batch: Batch, train: bool) -> Tensor:
        """The teacher's outputs in the student's order, a row an example."""
        other, place = counterpart(batch, self.data, self.teacher.packs)
        with training(self.teacher, train), torch.set_grad_enabled(train):
            return self.shape(self.forward(self.teacher, other.inputs).logits)[place]

    def turn(self, batch: Batch, out: StudentOutput | None, step: Callable[[str], Tensor]) -> None:
        a = self.setting.alpha
        z = self._teacher(batch, train=True)
        loss = (1 - a) * self.task_loss(z, batch.labels)
        if a:
            # `out` has dropout; the source reads the student without
            with training(self.student, False), torch.no_grad():
                target = self.shape(self.forward(self.student, batch.inputs).logits)
            loss = loss + a * divergence(target, z, self.setting.kind)
        loss.backward()
        step("teacher")

    def losses(
        self, batch: Batch, out: StudentOutput | None, phase: Phase, centroid: Centroid
    ) -> Terms:
        assert out is not None
        z = self._teacher(batch, train=False)
        return {"soft": divergence(z, self.shape(out.logits), self.setting.kind)}

    def facts(self) -> dict[str, float]:
        """Size of the teacher."""
        return {"partner_parameters": sum(p.numel() for p in self.teacher.parameters())}
