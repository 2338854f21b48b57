"""MetaDistil: the teacher learns to teach, by second derivatives through a step of the student."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from armada_lib import losses
from armada_lib.batching import Batch, Encoded
from armada_lib.methods.base import Centroid, Method, Phase, Setting, Terms
from armada_lib.methods.layers import Watch, layer_map
from armada_lib.methods.mutual import counterpart, mentor_of, training
from armada_lib.students import Student, StudentOutput

QUIZ = 0.1  # of the training examples; the source splits them 9 to 1


class Seen(NamedTuple):
    """What one network makes of b examples of k texts. `first`: None where beta is 0."""

    outputs: Tensor  # (b, c), or (b,) scores of a regression
    first: Tensor | None  # (b, k, layers, d) first-token vectors of the layers that are compared


def objective(own: Seen, taught: Seen, labels: Tensor, counts: Tensor, setting: Setting) -> Terms:
    """The student's loss against the teacher as it is, in named and weighted terms.

    (1 - a) T(y, o_s), a tau^2 MSE(softmax(z_t / tau), softmax(z_s / tau)), b MSE of first-token
    vectors brought to length 1. Means over the examples with `counts` (b,) 1; 0 if there are none.
    """
    z, t, tau = losses.identity(own.outputs), losses.identity(taught.outputs), setting.tau
    if setting.kind == "regression":
        task, soft = (z - labels).square(), (z - t).square()
    elif setting.kind == "multilabel":
        task = F.binary_cross_entropy_with_logits(z, labels, reduction="none").mean(-1)
        gap = losses.sigmoid(z / tau) - losses.sigmoid(t / tau)
        soft = tau**2 * gap.square().mean(-1)
    else:
        task = F.cross_entropy(z, labels, reduction="none")
        gap = losses.softmax(z / tau) - losses.softmax(t / tau)
        soft = tau**2 * gap.square().mean(-1)
    mean = lambda x: (x * counts).sum() / counts.sum().clamp(min=1)
    terms = {"task": (1 - setting.alpha) * mean(task), "soft": setting.alpha * mean(soft)}
    if own.first is not None and taught.first is not None:
        h, g = (F.normalize(losses.identity(x), dim=-1) for x in (own.first, taught.first))
        terms["patience"] = setting.beta * mean((h - g).square().flatten(1).mean(1))
    return terms


class MetaDistil(Method):
    """The teacher is trained so that a step of the student on its lesson helps the student most.

    In every step, on one batch (the source's k batches of a round with k = 1):

    1. pilot: theta' = theta - eta d L(theta, phi) / d theta, one plain gradient step of the
       student theta whose graph is kept, with
       L = a tau^2 MSE(softmax(z_t / tau), softmax(z_s / tau)) + (1 - a) T(y, z_s) + b PKD;
    2. quiz: the teacher phi takes a step down d T(y', z_s'(theta')) / d phi, on other examples;
    3. the student, as it was before 1, learns from L with the new teacher, detached.

    PKD: mean squared difference of first-token vectors brought to length 1, the student's inner
    layers beside the teacher's that `layer_map` gives (1-5 beside 2, 4, .. 10). a, b, tau are
    `setting.alpha`, `beta`, `tau` (the source's code: 0.5, 100, 5), eta is `training.pilot_lr`
    (5e-5). With a teacher that does not move this is KD with the squared soft loss, plus PKD. The
    teacher starts fine-tuned; its learning rate is `training.partner_lr`, by default a fifth of the
    student's (the source's 1e-5 to 5e-5). a = b = 0: the teacher is not trained.

    Quiz examples: a tenth of the training examples, drawn from the seed, from which neither the
    pilot nor the student learns anything else; never those that are evaluated on. A quiz has as
    many examples as a batch, or all there are; they are drawn from the seed and the batch, so that
    a resumed run draws them again.

    Source: Zhou, Xu and McAuley (ACL 2022, first 2021) and their code. As there, the teacher is
    read without dropout and the pilot's step is made with it; the quiz is taken without.

    Unsure: k and the number of quiz batches a round of the printed row; independent runs of the
    authors' code stayed below it. The quiz gradient carries the factor eta, and AdamW takes it out
    again only where the gradient is large beside its epsilon, 1e-8: with a teacher of 22M
    parameters four entries in five were smaller, so the teacher moves less than its learning rate
    says. Kept as in the source.
    Differs: k = 1; one quiz batch a step; the quiz examples stay in the batches with weight 0, so
    a batch teaches by about nine tenths of its examples. A regression compares scores by MSE,
    without temperature. The student's part of steps 1 and 2 is computed in float32.

    ValueError without a mentor, with a compiled encoder, or if beta compares unequal widths.
    """

    def __init__(self, setting: Setting, student: Student):
        super().__init__(setting, student)
        mentor = mentor_of(setting, "metadistil")
        if setting.training.compile:
            raise ValueError(
                "metadistil needs second derivatives, and a compiled encoder has none; "
                "set compile: false"
            )
        self.teacher, self.lessons = mentor.tuned().eval(), mentor.data
        self.partners["teacher"] = self.teacher
        self.data: Encoded | None = None
        self.quiz = np.empty(0, dtype=np.int64)
        self._own: Seen | None = None
        self.watches: dict[str, tuple[Watch, list[int]]] = {}
        if setting.beta:
            own, other = Watch(student), Watch(self.teacher, always=True)
            if own.layers < 2 or own.width != other.width:
                raise ValueError(
                    f"beta {setting.beta} compares inner layers of equal width: the student has "
                    f"{own.layers} of width {own.width}, the mentor {other.layers} of "
                    f"{other.width}; set beta to 0"
                )
            inner = layer_map(own.layers, other.layers)[1:-1]
            self.watches["student"] = own, list(range(1, own.layers))
            self.watches["teacher"] = other, inner

    def learning_rate(self, part: str) -> float:
        t = self.setting.training
        if part != "teacher":
            return super().learning_rate(part)
        return 0.2 * t.student_lr if t.partner_lr is None else t.partner_lr

    def attach(self, data: Encoded) -> None:
        """Take the training examples, as the student reads them, and put a tenth aside as quiz.

        ValueError if there are fewer than two.
        """
        if len(data) < 2:
            raise ValueError(f"metadistil splits the training examples; there are {len(data)}")
        order = np.random.default_rng([self.setting.seed, len(data)]).permutation(len(data))
        self.data, self.quiz = data, np.sort(order[: max(1, round(QUIZ * len(data)))])

    # -- reading -------------------------------------------------------------------------------

    def _counts(self, batch: Batch) -> Tensor:
        """(b,) 1 for an example to learn from, 0 for one of the quiz."""
        if self.data is None:
            raise ValueError(
                "metadistil needs its training examples: call `attach` before training"
            )
        found = torch.from_numpy(~np.isin(batch.rows, self.quiz))
        return found.to(batch.labels.device, torch.float32)

    def _seen(self, name: str, out: StudentOutput, batch: Batch) -> Seen:
        """What the network's latest forward, which gave `out`, made of the batch."""
        outputs = self.shape(out.logits)
        if name not in self.watches:
            return Seen(outputs, None)
        watch, layers = self.watches[name]
        return Seen(outputs, watch.first(batch.inputs, layers).unflatten(0, (len(outputs), -1)))

    def _taught(self, batch: Batch) -> Seen:
        """The teacher's view of the batch, in the student's order."""
        other, place = counterpart(batch, self.lessons, self.teacher.packs)
        seen = self._seen("teacher", self.forward(self.teacher, other.inputs), other)
        return Seen(seen.outputs[place], None if seen.first is None else seen.first[place])

    # -- the two levels ------------------------------------------------------------------------

    def pilot(self, batch: Batch, taught: Seen) -> dict[str, Tensor]:
        """theta' of the student by name, each (...) as before; differentiable in `taught`."""
        named = {n: p for n, p in self.student.named_parameters() if p.requires_grad}
        with sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
            own = self._seen("student", self.student(batch.inputs), batch)
        terms = objective(own, taught, batch.labels, self._counts(batch), self.setting)
        total = torch.stack(list(terms.values())).sum()
        grads = torch.autograd.grad(
            total, list(named.values()), create_graph=True, allow_unused=True
        )
        eta = self.setting.training.pilot_lr
        return {
            n: p if g is None else p - eta * g
            for (n, p), g in zip(named.items(), grads, strict=True)
        }

    def quiz_loss(self, batch: Batch, taught: Seen) -> Tensor:
        """Task loss, 0-d, on quiz examples, of the student after its pilot step on this batch."""
        changed = self.pilot(batch, taught)
        assert self.data is not None
        draw = np.random.default_rng([self.setting.seed, *batch.rows.tolist()])
        rows = draw.choice(self.quiz, min(len(batch.rows), len(self.quiz)), replace=False)
        quiz = self.data.batch(rows, self.student.packs).to(batch.labels.device)
        with training(self.student, False):
            logits = functional_call(self.student, changed, (quiz.inputs,)).logits
        return self.task(logits, quiz.labels)

    def turn(self, batch: Batch, out: StudentOutput | None, step: Callable[[str], Tensor]) -> None:
        assert out is not None
        # read now: the pilot's pass overwrites what the student's layers showed
        self._own = self._seen("student", out, batch)
        if not (self.setting.alpha or self.setting.beta):
            return  # nothing of the teacher reaches the student
        loss = self.quiz_loss(batch, self._taught(batch))
        learnt = [p for p in self.teacher.parameters() if p.requires_grad]
        # not `backward`: the student's own gradients must stay untouched
        for p, g in zip(learnt, torch.autograd.grad(loss, learnt, allow_unused=True), strict=True):
            p.grad = g
        step("teacher")

    def losses(
        self, batch: Batch, out: StudentOutput | None, phase: Phase, centroid: Centroid
    ) -> Terms:
        assert out is not None and self._own is not None
        own, self._own = self._own, None
        with torch.no_grad():
            taught = self._taught(batch)
        return objective(own, taught, batch.labels, self._counts(batch), self.setting)

    def finish(self) -> None:
        for watch, _ in self.watches.values():
            watch.close()

    def facts(self) -> dict[str, float]:
        """Size of the teacher; examples put aside for the quiz."""
        size = sum(p.numel() for p in self.teacher.parameters())
        return {"partner_parameters": size, "quiz": len(self.quiz)}
