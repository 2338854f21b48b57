"""What the engine asks of a method, and the plainest one: the task loss alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from armada_lib import losses
from armada_lib.batching import Batch
from armada_lib.profiles import Training
from armada_lib.students import Student, StudentOutput

# Which parts a pass over the data trains: student and method parts together, or one of them.
Phase = Literal["joint", "student", "aligner"]
Terms = dict[str, Tensor]  # named, already weighted; the engine minimises their sum
Centroid = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Setting:
    """All that a method may be built from. `outputs`: width of one head (1 for a choice score)."""

    kind: Literal["class", "regression", "choice", "generation"]
    outputs: int
    training: Training
    seed: int
    alpha: float = 0.0
    beta: float = 0.0
    gamma: float = 0.0
    tau: float = 5.0
    manifold: str = "euclid"
    reading: str = "paper"
    width: int | None = None  # of the teacher's vectors
    label_mean: float = 0.0


class Method:
    """Undistilled fine-tuning: minimise T(y, o_s). Every other method starts from here.

    A method holds its own trainable `parts` (the engine gives each an optimiser), says which phase
    each epoch is, turns a batch and the student's output into named losses, and may act after a
    step. It never sees how data are loaded.
    """

    reads_teacher = False

    def __init__(self, setting: Setting, student: Student):
        self.setting, self.student = setting, student
        self.parts: dict[str, nn.Module] = {}
        self.task_loss = losses.mse if setting.kind == "regression" else losses.cross_entropy
        self.phi = losses.identity if setting.kind == "regression" else losses.softmax
        if setting.kind == "regression":
            student.centre(setting.label_mean)

    def learning_rate(self, part: str) -> float:
        return (
            self.setting.training.student_lr
            if part == "student"
            else self.setting.training.aligner_lr
        )

    def schedule(self, epochs: int) -> list[Phase]:
        return ["joint"] * epochs

    def shape(self, logits: Tensor) -> Tensor:
        """One row an example: (n, c) as it is, a regression score (n,), choice scores (n / 2, 2)."""
        if self.setting.kind == "choice":
            return logits.view(-1, 2)
        return logits.squeeze(-1) if self.setting.kind == "regression" else logits

    def task(self, logits: Tensor, labels: Tensor) -> Tensor:
        return self.task_loss(self.shape(logits), labels)

    def losses(
        self, batch: Batch, out: StudentOutput | None, phase: Phase, centroid: Centroid
    ) -> Terms:
        assert out is not None
        return {"task": self.task(out.logits, batch.labels)}

    def after_step(self, step: int) -> None:
        """Called after every optimiser step, with the number of steps done."""

    def finish(self) -> None:
        """Called once before evaluation and saving."""

    @torch.no_grad()
    def other_heads(self, teacher: Tensor | None) -> dict[str, Tensor]:
        """Logits of the method's own heads for these teacher vectors (Tables 6 and 10)."""
        return {}

    def facts(self) -> dict[str, float]:
        """Numbers worth storing with the run, such as how far a projection is from orthogonal."""
        return {}
