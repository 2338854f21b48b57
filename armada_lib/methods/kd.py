"""Distillation from a language model's logits, its checkpoints and its layers.

The mentor is read from what it said of the training examples before the run (`base.Mentor`): no
step runs it. `setting.alpha, beta, gamma, tau` mean what each class says.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from armada_lib import losses
from armada_lib.batching import Batch
from armada_lib.methods.base import Centroid, Method, Phase, Setting, Terms, texts
from armada_lib.methods.layers import Watch
from armada_lib.students import Student, StudentOutput


class KD(Method):
    """L = (1 - a) T(y, z_s) + a tau^2 KL(softmax(z_t / tau) || softmax(z_s / tau)).

    Hinton, Vinyals and Dean (2015). a = `alpha`, tau = `tau`; KL is summed over classes and a mean
    over examples. A regression: (1 - a) MSE(y, z_s) + a MSE(z_t, z_s), without a temperature.
    Several labels: sigmoid in the place of softmax, KL summed over the labels.

    The mentor is fine-tuned on the task and frozen; its logits are those of evaluation mode. a = 0
    is the undistilled student. With the assistant as mentor this is TAKD (Mirzadeh et al., 2020):
    mentor -> assistant -> student, both steps with this loss; the source tunes a and tau for each
    step, here the assistant has those of `kd`. Its size in the printed row of Table 7 is unknown.

    Unsure: the a, tau and reduction behind the printed row; codes that average over classes as well
    weigh the second term as many times less as there are classes.

    ValueError without a mentor.
    """

    def __init__(self, setting: Setting, student: Student):
        super().__init__(setting, student)
        if setting.mentor is None:
            raise ValueError(f"{type(self).__name__} learns from a mentor; the setting has none")
        self.mentor = setting.mentor
        self.per_example = 2 if setting.kind == "choice" else 1

    def said(self, batch: Batch, table: Tensor) -> Tensor:
        """Rows (n, ...) of the mentor's `table` (texts, ...) for the batch's n texts, as float32.

        They are in the order of the student's outputs.
        """
        rows = torch.from_numpy(texts(batch, self.per_example))
        return table[rows].to(batch.labels.device, torch.float32)

    def taught(self, batch: Batch) -> Tensor:
        """z_t (n, c), a row a text."""
        return self.said(batch, self.mentor.logits)

    def soft(self, z_t: Tensor, z_s: Tensor) -> Tensor:
        """How far the student's logits `z_s` are from `z_t`, (n, c) each, a row a text: 0-d."""
        z_t, z_s = self.shape(z_t), self.shape(z_s)
        if self.setting.kind == "regression":
            return losses.mse(z_s, z_t)
        return losses.soft_kl(z_t, z_s, self.setting.tau, self.phi)

    def losses(
        self, batch: Batch, out: StudentOutput | None, phase: Phase, centroid: Centroid
    ) -> Terms:
        assert out is not None
        a = self.setting.alpha
        return {
            "task": (1 - a) * self.task(out.logits, batch.labels),
            "soft": a * self.soft(self.taught(batch), out.logits),
        }


class PKD(KD):
    """L = KD + b MSE(h_t, h_s): patient distillation of first-token vectors of the inner layers.

    Sun, Cheng, Gan and Liu (2019). b = `beta`; the mean runs over texts, layers and width; with
    `training.normalised` each vector is brought to length 1 first. Student layers 1 .. m - 1 (of m)
    learn from mentor layers (of M): `last`: M - m + 1 .. M - 1; skip: every M / m-th, rounded down.
    6 of 12: 2, 4, 6, 8, 10 and 7 .. 11. b = 0 is KD.

    Unsure: the b of the printed row; the authors' best runs have 8 to 500, and none for CoLA or
    STS-B. The authors normalise for small tasks (MRPC, SST-2, RTE) and not for large ones; here a
    run is normalised unless it says otherwise. Differs: the mentor's vectors are kept in float16.

    ValueError if the mentor has another width, or fewer layers than the student.
    """

    def __init__(self, setting: Setting, student: Student, last: bool = False):
        super().__init__(setting, student)
        self.watch = Watch(student)
        m, big = self.watch.layers, self.mentor.layers
        if m > big or m < 2 or student.width != self.mentor.width:
            raise ValueError(
                f"PKD compares inner layers of one width: the student has {m} layers of {student.width}, "
                f"its mentor {big} of {self.mentor.width}"
            )
        self.own = list(range(1, m))
        self.theirs = [big - m + i if last else i * big // m for i in self.own]

    def losses(
        self, batch: Batch, out: StudentOutput | None, phase: Phase, centroid: Centroid
    ) -> Terms:
        terms = super().losses(batch, out, phase, centroid)
        if self.setting.beta:
            h_t = self.said(batch, self.mentor.cls)[:, self.theirs]
            h_s = self.watch.first(batch.inputs, self.own)
            terms["patience"] = self.setting.beta * self.patience(h_t, h_s)
        return terms

    def patience(self, h_t: Tensor, h_s: Tensor) -> Tensor:
        """Mean squared difference of `h_t` and `h_s` (n, layers, d).

        Of vectors brought to length 1 if `normalised`.
        """
        if self.setting.training.normalised:
            h_t, h_s = F.normalize(h_t, dim=-1), F.normalize(h_s, dim=-1)
        return F.mse_loss(h_s, h_t)

    def finish(self) -> None:
        self.watch.close()


class RCO(KD):
    """KD along the mentor's own route: from its checkpoints, one after the other, early ones first.

    Jin et al. (2019), route constrained optimisation, with equal epoch intervals: of A epochs of the
    mentor's fine-tuning, anchor j of m is epoch j A / m (rounded), and the student stays with each
    for as many epochs; weights and optimiser go on. a = `alpha`, tau = `tau`; m is
    `training.anchors`, or as many as there are epochs of either if that is fewer. m = 1 is KD.

    Unsure: the setting of the printed row, and of any BERT; no code for text is known. Differs: the
    source also has a greedy search for anchors, which is left out.
    """

    def __init__(self, setting: Setting, student: Student):
        super().__init__(setting, student)
        self.stages, self.stage = setting.training.anchors, 0

    def before_epoch(self, number: int, epochs: int) -> None:
        self.stages = min(self.setting.training.anchors, epochs, len(self.mentor.anchors))
        self.stage = number * self.stages // epochs

    @property
    def anchor(self) -> int:
        """The mentor's epoch, from 0, that the student learns from now."""
        route = len(self.mentor.anchors)
        return int((self.stage + 1) * route / self.stages + 0.5) - 1

    def taught(self, batch: Batch) -> Tensor:
        return self.said(batch, self.mentor.anchors[self.anchor])


class ContinuationKD(KD):
    """L = psi T(y, z_s) + (1 - psi) mean_i max(0, ||z_s,i - phi z_t,i||^2 - m phi).

    Jafari et al. (2022). Both schedules are by epoch i = 1 .. n, for the source's n = 30: phi =
    1 - (T_i - 1) / T_max with T_i falling from T_max to 1, one every n / T_max epochs; psi = i / 40
    up to i = 20, then 1, the labels alone. m = `gamma` is the margin, T_max = `tau` (the source's
    is 10). A run of other length is stretched: its epoch e of n (from 0) stands for the source's
    epoch floor(30 e / n) + 1. So a run of 10 has psi 1 / 40, 4 / 40, ..., 19 / 40, then 1.

    Unsure: m, which the source does not give. Differs: the source keeps the best of 30 epochs; here
    all methods have the same number and the same choice. Logits of a regression are its scores.
    """

    LENGTH, TURN, SLOPE = 30, 20, 40

    def __init__(self, setting: Setting, student: Student):
        super().__init__(setting, student)
        self.phi_now, self.psi_now = 1.0, 1.0

    def before_epoch(self, number: int, epochs: int) -> None:
        i = self.LENGTH * number // epochs
        passed = int(i * self.setting.tau // self.LENGTH)
        self.phi_now = 1 - (max(1.0, self.setting.tau - passed) - 1) / self.setting.tau
        self.psi_now = (i + 1) / self.SLOPE if i < self.TURN else 1.0

    def losses(
        self, batch: Batch, out: StudentOutput | None, phase: Phase, centroid: Centroid
    ) -> Terms:
        assert out is not None
        pull = self.continuation(self.taught(batch), out.logits)
        return {
            "task": self.psi_now * self.task(out.logits, batch.labels),
            "soft": (1 - self.psi_now) * pull,
        }

    def continuation(self, z_t: Tensor, z_s: Tensor) -> Tensor:
        """Squared distance of `z_s` to the damped `z_t`, (n, c) each.

        As far as it is over the margin; a mean over examples, 0-d.
        """
        gap = (self.shape(z_s) - self.phi_now * self.shape(z_t)).float().square()
        each = gap if gap.ndim == 1 else gap.sum(-1)
        return (each - self.setting.gamma * self.phi_now).clamp(min=0).mean()
