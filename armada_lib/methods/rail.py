"""RAIL-KD: random intermediate layers of the mentor, drawn anew each epoch."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from armada_lib.batching import Batch
from armada_lib.methods.base import Centroid, Phase, Setting, Terms
from armada_lib.methods.kd import KD
from armada_lib.methods.layers import Watch
from armada_lib.students import Student, StudentOutput

WIDTH = 128  # u


def draw(mentor: int, count: int, seed: int, epoch: int) -> list[int]:
    """`count` of the mentor's intermediate layers 1 .. mentor - 1, ascending; the same in a resumed run."""
    rng = np.random.default_rng([seed, epoch, 1])
    return sorted(int(x) for x in rng.choice(np.arange(1, mentor), size=count, replace=False))


class Rail(KD):
    """L = (1 - a - b) T(y, z_s) + a KD + b L_RAIL, with a = alpha, b = beta (paper: 1/3 each) and

        KD = tau^2 KL(p_t(tau) || p_s(tau)) (regression: MSE of the scores),
        L_RAIL = sum_{j=1..m} mean_i || t_ij - s_ij ||^2,

    s_j = S_j(mean over tokens of student layer j), t_j = T_j(the same of mentor layer r_j), linear
    maps to u = 128 numbers, brought to length 1. Student layers j = 1 .. m are all but the last;
    r_1 < ... < r_m are drawn from the mentor's 1 .. M - 1, once an epoch, from seed and epoch alone.
    With `concatenated` the m means stand side by side, and one map a side and one distance serve all.
    gamma is not used.

    Source: Haidar et al. 2022, "RAIL-KD: RAndom Intermediate Layer Mapping for Knowledge
    Distillation", in the form that others describe; no official code was found.
    Unsure: weights, u and the budget (30 epochs there); which variant a quoted row is; whether the
    maps T_j belong to a place or to a mentor layer (here: to a place, and both sides are trained).
    Differs: the budget is the common one; the mentor's means are read from the store, in float16.

    ValueError: alpha + beta over 1, a student without intermediate layers, or a mentor with fewer.
    """

    def __init__(self, setting: Setting, student: Student, concatenated: bool = False):
        super().__init__(setting, student)
        if setting.alpha + setting.beta > 1:
            raise ValueError(
                f"rail_kd: alpha + beta must not exceed 1, got {setting.alpha} + {setting.beta}"
            )
        self.concatenated, self.watch = concatenated, Watch(student)
        count = self.watch.layers - 1
        if not 0 < count < self.mentor.layers:
            raise ValueError(
                f"rail_kd matches intermediate layers: the student has {count}, the mentor "
                f"{self.mentor.layers - 1}; valid: at least 1, and no more than the mentor"
            )
        self.own, self.drawn = list(range(1, count + 1)), list(range(1, count + 1))
        shape = (count, 1) if concatenated else (1, count)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(setting.seed + 4_000_037)
            self.maps = nn.ModuleDict({
                side: nn.ModuleList(nn.Linear(shape[0] * d, WIDTH) for _ in range(shape[1]))
                for side, d in (("student", self.watch.width), ("mentor", self.mentor.width))
            })  # fmt: skip
        if setting.beta:
            self.parts["maps"] = self.maps
        self.watch.on = bool(setting.beta)

    def learning_rate(self, part: str) -> float:
        return self.setting.training.student_lr

    def before_epoch(self, number: int, epochs: int) -> None:
        self.drawn = draw(self.mentor.layers, len(self.own), self.setting.seed, number)

    def losses(
        self, batch: Batch, out: StudentOutput | None, phase: Phase, centroid: Centroid
    ) -> Terms:
        assert out is not None
        s = self.setting
        terms = {"task": (1 - s.alpha - s.beta) * self.task(out.logits, batch.labels)}
        if s.alpha:
            terms["soft"] = s.alpha * self.soft(self.taught(batch), out.logits)
        if s.beta:
            means = self.said(batch, self.mentor.means)[:, self.drawn]
            terms["rail"] = s.beta * self._rail(means, self.watch.mean(batch.inputs, self.own))
        return terms

    def _rail(self, mentor: Tensor, student: Tensor) -> Tensor:
        """L_RAIL of means after the chosen layers, (n, m, d) each."""
        sides = []
        for name, x in (("mentor", mentor), ("student", student)):
            xs = [x.flatten(1)] if self.concatenated else x.unbind(1)
            maps: nn.ModuleList = self.maps[name]  # type: ignore[assignment]
            mapped = [F.normalize(f(x), dim=-1) for f, x in zip(maps, xs, strict=True)]
            sides.append(torch.stack(mapped, 1))
        return (sides[0] - sides[1]).square().sum((1, 2)).mean()

    def finish(self) -> None:
        self.watch.close()
        self.parts.clear()
