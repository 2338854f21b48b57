"""ARMADA: student and TS Aligner learn the task together and are pulled together.

Two named readings (`reading`):

* "paper": sections 3.2-3.4 as printed. Per-example 2-norms, unsquared; both models step on every
  batch; projections orthogonal; shared width 768.
* "released": the behaviour of the authors' partial code release, written anew. Squared losses,
  divided by the width; one epoch of the aligner, then one of the student; the aligner projects the
  raw vector with an orthogonal map, the student with a plain one. Its constant learning rate and
  its choice of the best epoch apply to every method alike and are settings of `Training`.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from armada_lib import losses
from armada_lib.aligner import AlignerOutput, TSAligner, drift, retract_
from armada_lib.batching import Batch
from armada_lib.methods.base import LOSS, Centroid, Method, Phase, Setting, Terms
from armada_lib.students import Student, StudentOutput, centre

BRANCH_SEED = 1_000_003  # added to a run's seed for the student's branch


@dataclass(frozen=True)
class Reading:
    """What one reading of the paper decides; see the module's text."""

    aligner: str
    soft: str
    manifold: dict[str, str]
    alternate: bool
    projection: str
    init: str
    standardise: bool


READINGS: dict[str, Reading] = {
    "paper": Reading(
        "bottleneck", "norm", {m: m for m in ("cosine", "euclid", "elementwise")},
        alternate=False, projection="orthogonal", init="orthogonal", standardise=True,
    ),
    "released": Reading(
        "released", "mse",
        {"cosine": "cosine", "euclid": "euclid_squared", "elementwise": "elementwise_squared"},
        alternate=True, projection="free", init="normal", standardise=False,
    ),
}  # fmt: skip


class Armada(Method):
    """L_s = (1-a) T(y, o_s) + a D(o_ts, o_s) + g [(1-a) T(y, a_s) + a D(a_ts, a_s)] + b M(p_ts, p_s)
    and L_t = T(y, o_ts) + g T(y, a_ts) (Eqs. 1-5), on disjoint graphs: with `detach` (A10) no
    student loss reaches the aligner.

    `aligned=False` leaves the teacher out and keeps the added layers (a control); `frozen=True`
    keeps the aligner at its random start (Figure 9, Table 15). ValueError for the soft loss "kl"
    of a regression, and for names of losses that are none.
    """

    def __init__(
        self, setting: Setting, student: Student, aligned: bool = True, frozen: bool = False
    ):
        super().__init__(setting, student)
        self.reading = READINGS[setting.reading]
        self.frozen, self.reads_teacher, self.drift = frozen, aligned, 0.0
        self.aligner: TSAligner | None = None
        form = setting.training.aligner or self.reading.aligner
        if aligned:
            assert setting.width is not None
            self.aligner = TSAligner(setting.width, setting.outputs, form=form, seed=setting.seed)
            if not frozen:
                self.parts["aligner"] = self.aligner
        shared = self.aligner.shared if self.aligner else 768
        self.projection = setting.training.projection or self.reading.projection
        # a seed of its own: aligner and student branch must not start equal
        student.add_branch(
            shared, setting.seed + BRANCH_SEED, self.reading.init, self.projection == "fixed"
        )
        soft = setting.training.soft or self.reading.soft
        self.soft = losses.choose(losses.SOFT, soft, "soft loss")
        if soft == "kl" and setting.kind == "regression":
            raise ValueError(
                "soft loss 'kl' needs classes; for a regression task choose norm or mse"
            )
        self.manifold = losses.choose(losses.MANIFOLD, self._distance(), "manifold loss")
        if setting.kind in LOSS:
            student.centre(setting.label_mean)
            if self.aligner is not None:
                for head in (self.aligner.output_head, self.aligner.aux_head):
                    centre(head, setting.label_mean)

    def _distance(self) -> str:
        """The manifold loss to use: the reading's form of it, or the one the settings ask for."""
        name, form = self.setting.manifold, self.setting.training.distance
        if form is None:
            return self.reading.manifold[name]
        if name == "cosine":
            return "cosine_literal" if form == "literal" else "cosine"
        return f"{name}_squared" if form == "squared" else name

    def schedule(self, epochs: int) -> list[Phase]:
        before: list[Phase] = ["aligner"] * self.setting.training.aligner_pretrain
        if not self.parts:
            return ["student"] * epochs
        if self.reading.alternate:
            return before + ["aligner", "student"] * epochs  # type: ignore[operator]
        return before + ["joint"] * epochs  # type: ignore[operator]

    def losses(
        self, batch: Batch, out: StudentOutput | None, phase: Phase, centroid: Centroid
    ) -> Terms:
        s = self.setting
        t, terms = self._taught(batch, out, phase, centroid)
        if phase == "aligner":
            return terms
        assert out is not None and out.projection is not None and out.aux_logits is not None
        terms["task"] = (1 - s.alpha) * self.task(out.logits, batch.labels)
        if s.gamma:
            terms["aux_task"] = s.gamma * (1 - s.alpha) * self.task(out.aux_logits, batch.labels)
        if t is None:
            return terms
        if s.alpha:
            terms["soft"] = s.alpha * self._match(t.logits, out.logits)
            if s.gamma:
                terms["aux_soft"] = s.gamma * s.alpha * self._match(t.aux_logits, out.aux_logits)
        if s.beta:
            terms["manifold"] = s.beta * self.manifold(t.projection, out.projection, centroid)
        return terms

    def _taught(
        self, batch: Batch, out: StudentOutput | None, phase: Phase, centroid: Centroid
    ) -> tuple[AlignerOutput | None, Terms]:
        """What the aligner makes of the batch's teacher vectors, and the losses it learns by."""
        s = self.setting
        terms: Terms = {}
        if self.aligner is None:
            return None, terms
        assert batch.teacher is not None
        learns = phase != "student" and not self.frozen
        self.aligner.train(learns)
        with contextlib.nullcontext() if learns or not s.training.detach else torch.no_grad():
            t = self.aligner(batch.teacher)
        if learns:
            terms["aligner_task"] = self.aligner_loss(t.logits, batch)
            if s.gamma:
                terms["aligner_aux"] = s.gamma * self.aligner_loss(t.aux_logits, batch)
        if learns and out is not None and s.beta and s.training.manifold_to == "both":
            assert out.projection is not None
            pull = self.manifold(out.projection.detach(), t.projection, centroid)
            terms["aligner_manifold"] = s.beta * pull
        return (AlignerOutput(*(x.detach() for x in t)) if s.training.detach else t), terms

    def aligner_loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """T(y, o_ts), 0-d: the task's own loss on `logits` (n, c) of one of the aligner's heads."""
        return self.task(logits, batch.labels)

    def _match(self, taught: Tensor, student: Tensor) -> Tensor:
        """D of Eq. 2; a regression score counts as a vector of one number."""
        a, b = self.shape(taught), self.shape(student)
        if self.setting.kind == "regression":
            a, b = a[:, None], b[:, None]
        return self.soft(a, b, self.setting.tau, self.phi)

    def _orthogonal(self) -> list[nn.Parameter]:
        weights = list(self.aligner.orthogonal_weights()) if self.parts and self.aligner else []
        if self.projection == "orthogonal" and self.student.branch is not None:
            weights.append(self.student.branch["projection"].weight)  # type: ignore[arg-type]
        return weights

    def after_step(self, step: int) -> None:
        # Adam drifts off the orthogonal matrices within a few steps; a QR retraction is cheap.
        if step % self.setting.training.retract_every == 0:
            self._retract()

    @torch.no_grad()
    def _retract(self) -> None:
        for weight in self._orthogonal():
            retract_(weight)

    def finish(self) -> None:
        self.drift = max([drift(w) for w in self._orthogonal()], default=0.0)
        self._retract()

    @torch.no_grad()
    def other_heads(self, teacher: Tensor | None) -> dict[str, Tensor]:
        if self.aligner is None or teacher is None:
            return {}
        self.aligner.eval()
        t = self.aligner(teacher)
        return {"aligner": t.logits, "aligner_aux": t.aux_logits}

    def facts(self) -> dict[str, float]:
        """Size of the aligner; how far a projection had drifted since its last retraction."""
        own = sum(p.numel() for p in self.aligner.parameters()) if self.aligner else 0
        return {"aligner_parameters": own, "drift": self.drift}
