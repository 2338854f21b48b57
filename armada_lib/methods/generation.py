"""ARMADA for students that generate, in the reading A31: the paper defines neither o_ts nor a_s there.

The aligner has no class to predict and reconstructs its input instead: with both heads it minimises
the mean squared error to h_t (A13: for some epochs before the student begins, too). The student
minimises token cross-entropy, a matching term between its auxiliary head and the aligner's
reconstruction (weight gamma), and the manifold loss on its mean prompt vector (beta). There is no
alpha: token logits and a reconstruction have nothing to match.
"""

from __future__ import annotations

import torch
from torch import Tensor

from armada_lib import losses
from armada_lib.batching import Batch
from armada_lib.methods.armada import Armada
from armada_lib.methods.base import Centroid, Phase, Terms
from armada_lib.students import StudentOutput


class ArmadaGeneration(Armada):
    """L_s = CE(y, o_s) + g MSE(A_s(p_s), A_t(p_ts)) + b M(p_ts, p_s) and
    L_t = MSE(o_ts, h_t) + g MSE(A_t(p_ts), h_t), on disjoint graphs (A31). h_t, o_ts, A_t(p_ts) and
    A_s(p_s) are (b, m).
    """

    def losses(
        self, batch: Batch, out: StudentOutput | None, phase: Phase, centroid: Centroid
    ) -> Terms:
        s = self.setting
        t, terms = self._taught(batch, out, phase, centroid)
        if phase == "aligner":
            return terms
        assert out is not None
        terms["task"] = self.task(out.logits, batch.labels)
        if t is None:
            return terms
        assert out.projection is not None and out.aux_logits is not None
        if s.gamma:
            terms["aux_soft"] = s.gamma * losses.mse(out.aux_logits, t.aux_logits)
        if s.beta:
            terms["manifold"] = s.beta * self.manifold(t.projection, out.projection, centroid)
        return terms

    def aligner_loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """Mean squared error of a reconstruction to h_t."""
        assert batch.teacher is not None
        return losses.mse(logits, batch.teacher)

    @torch.no_grad()
    def other_heads(self, teacher: Tensor | None) -> dict[str, Tensor]:
        """Nothing: the aligner's heads answer no question here."""
        return {}
