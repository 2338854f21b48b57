"""What the engine asks of a method, and the plainest one: the task loss alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from armada_lib import losses
from armada_lib.batching import Batch, Encoded
from armada_lib.profiles import Training
from armada_lib.students import Student, StudentOutput

# T by kind of task, and with it Phi; of every other kind cross-entropy and softmax. Heads of these
# kinds start at what is right on average: else the encoder is first bent to say that of every text.
LOSS = {"regression": "mse", "multilabel": "bce"}

# Which parts a pass over the data trains: student and method parts together, or one of them.
Phase = Literal["joint", "student", "aligner"]
Terms = dict[str, Tensor]  # named, already weighted; the engine minimises their sum
Centroid = Callable[[Tensor], Tensor]


class Mentor(Protocol):
    """A language model of the same task, which a student may learn from; what it gives is a copy.

    Row i of `logits` and of each of `anchors` belongs to training example i (c outputs; 1 of a
    regression); a choice task has a row a text, 2i and 2i + 1. Row i of `cls` and `means` is text i.
    """

    @property
    def logits(self) -> Tensor:
        """(n, c) float32, in evaluation mode."""

    @property
    def anchors(self) -> list[Tensor]:
        """Logits (n, c) after each epoch of its fine-tuning; the last are `logits`."""

    @property
    def cls(self) -> Tensor:
        """(texts, layers + 1, d) float16: first-token vectors; 0 is after the embeddings."""

    @property
    def means(self) -> Tensor:
        """(texts, layers + 1, d) float16: the same, means over the text's tokens."""

    @property
    def data(self) -> Encoded:
        """The training examples, in order, as the mentor reads them."""

    @property
    def layers(self) -> int:
        """Number of layers, without the embeddings."""

    @property
    def width(self) -> int:
        """d."""

    def tuned(self) -> Student:
        """A fresh copy of the fine-tuned model, on the CPU, without a branch."""

    def start(self) -> Student:
        """A fresh copy of the model before its fine-tuning, with a new head."""


@dataclass(frozen=True)
class Setting:
    """All that a method may be built from. `outputs`: width of one head (1 for a choice score)."""

    kind: Literal["class", "regression", "choice", "multilabel", "generation"]
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
    channels: int | None = None  # of the square picture that such a vector is; None: features
    label_mean: float | tuple[float, ...] = 0.0  # where heads start, of kinds in `LOSS`
    mentor: Mentor | None = None


class Method:
    """Undistilled fine-tuning: minimise T(y, o_s), of Eq. 2. Every other method starts from here.

    A method holds its own trainable `parts` (the engine gives each an optimiser), says which phase
    each epoch is, turns a batch and the student's output into named losses, and may act after a
    step. It never sees how data are loaded. Networks that learn by losses of their own are its
    `partners`: the engine keeps an optimiser for each, and `turn` trains them.
    """

    reads_teacher = False
    predicts = True  # False: the engine runs no student, and `losses` gets no output

    def __init__(self, setting: Setting, student: Student):
        self.setting, self.student = setting, student
        self.parts: dict[str, nn.Module] = {}
        self.partners: dict[str, nn.Module] = {}
        loss = LOSS.get(setting.kind, "cross_entropy")
        self.task_loss, self.phi = losses.TASK_LOSS[loss], losses.TASK_PHI[loss]
        if setting.kind in LOSS:
            student.centre(setting.label_mean)

    def learning_rate(self, part: str) -> float:
        t = self.setting.training
        return t.aligner_lr if part in self.parts else t.student_lr

    def schedule(self, epochs: int) -> list[Phase]:
        return ["joint"] * epochs

    def shape(self, logits: Tensor) -> Tensor:
        """One row an example: (n, c) as it is, a regression score (n,), choice scores (n / 2, 2)."""
        if self.setting.kind == "choice":
            return logits.view(-1, 2)
        return logits.squeeze(-1) if self.setting.kind == "regression" else logits

    def task(self, logits: Tensor, labels: Tensor) -> Tensor:
        return self.task_loss(self.shape(logits), labels)

    def attach(self, data: Encoded) -> None:
        """Called once before training, with the training examples as the student reads them.

        Parts and modules of the student that are added here are trained, too.
        """

    def inputs(self, batch: Batch) -> dict[str, Any]:
        """What the student reads of a batch, in training and in evaluation."""
        return batch.inputs

    def before_epoch(self, number: int, epochs: int) -> None:
        """Called as epoch `number` of 0 .. epochs - 1 begins, and when a killed run goes on in it."""

    def turn(self, batch: Batch, out: StudentOutput | None, step: Callable[[str], Tensor]) -> None:
        """Train the partners; called in every step before `losses`, if there are any.

        `out` is the student's output, with its graph. After a .backward(), `step(name)` averages
        that partner's gradients over processes, clips them, steps and clears; it returns
        their norm, 0-d.
        """

    def autocast(self, device: torch.device) -> torch.autocast:
        """The precision of the student's forward, for what a method computes beside it."""
        bf16 = self.setting.training.precision == "bf16"
        return torch.autocast(device.type, torch.bfloat16, enabled=bf16)

    def forward(self, partner: nn.Module, inputs: dict[str, Any]) -> StudentOutput:
        """A partner's output, in the precision of the student's."""
        with self.autocast(next(partner.parameters()).device):
            return partner(inputs)

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
        """Logits (n, c) of the method's own heads for teacher vectors (n, m) (Tables 6 and 10)."""
        return {}

    def facts(self) -> dict[str, float]:
        """Numbers worth storing with the run, such as how far a projection is from orthogonal."""
        return {}


def texts(batch: Batch, per_example: int) -> np.ndarray:
    """Numbers (n,) of a batch's texts, `per_example` an example, as the student's outputs come."""
    return (batch.rows[:, None] * per_example + np.arange(per_example)[None]).reshape(-1)
