"""VidLanKD: a video-language teacher learns first, then the encoder learns from its token states."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from armada_lib.batching import Batch, Encoded
from armada_lib.methods.base import Centroid, Phase, Setting, Terms
from armada_lib.methods.visual import MLMHead, Stage, head, init, padded, spread
from armada_lib.profiles import Training
from armada_lib.students import Student, StudentOutput

MARGIN = 1.0
TEMPERATURE = 1.0
INNER = 1024  # width between the two linear maps that a clip passes


def halves(name: str, epochs: int, chosen: int | None) -> int:
    """How many of `epochs` the first part of `name` gets: `chosen`, or half of them.

    ValueError if that leaves none for one of the two parts.
    """
    first = max(1, epochs // 2) if chosen is None else chosen
    if not 0 < first < epochs:
        raise ValueError(
            f"{name} learns in two parts; of {epochs} epochs the first cannot have {first}: "
            f"first_epochs must be 1 to {epochs - 1}, of at least 2 epochs"
        )
    return first


def hinge(states: Tensor, clips: Tensor, mask: Tensor, margin: float = MARGIN) -> Tensor:
    """mean over tokens of max(0, margin - h . v + h . v'), all vectors of length 1.

    `states` (n, t, d) token states h, `clips` (n, d), `mask` (n, t) of real tokens. v is the clip of
    the token's text, v' that of the text half a batch further on: for an even n the two halves are
    paired with each other. A batch of one text has no other clip: it gives the margin, and no
    gradient. Range [0, margin + 2].
    """
    h, v = F.normalize(states, dim=-1), F.normalize(clips, dim=-1)
    away = v.roll(-(len(v) // 2), 0) - v
    return F.relu(margin + torch.einsum("ntd,nd->nt", h, away))[mask.bool()].mean()


def nst(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """Neuron selectivity transfer (Huang and Wang, 2017): squared MMD of feature maps.

    `student` (n, t, d), `teacher` (n, t, e), `mask` (n, t). A feature map is one unit over the
    tokens of one text, brought to length 1. A mean over texts of mean k(s, s') + mean k(t, t')
    - 2 mean k(s, t), each over all pairs of units, k(a, b) = (a . b)^2; at least 0, and 0 for equal
    states.
    """
    grams = []
    for x in (student, teacher):
        x = F.normalize(x * mask[..., None], dim=1)
        # k summed over all pairs of units is a product of two (t, t) matrices over tokens
        grams.append(x @ x.transpose(1, 2) / x.shape[-1])
    return (grams[0] - grams[1]).square().sum((1, 2)).mean()


def contrast(
    student: Tensor, teacher: Tensor, mask: Tensor, temperature: float = TEMPERATURE
) -> Tensor:
    """Contrast of the two models' states at each position, over the texts that reach it.

    `student`, `teacher` (n, t, k), `mask` (n, t). At position i the 2 n_i vectors, of length 1, are
    each to find their counterpart among the others by cosine / temperature: cross-entropy, a mean
    over vectors. A position that one text alone reaches adds 0.
    """
    n = len(student)
    z = F.normalize(torch.cat([student, teacher]), dim=-1).transpose(0, 1)
    there = torch.cat([mask, mask]).T.bool()  # (t, 2 n)
    itself = torch.eye(2 * n, dtype=torch.bool, device=z.device)
    scores = z @ z.transpose(1, 2) / temperature
    scores = scores.masked_fill(itself | ~there[:, None], float("-inf"))
    other = torch.arange(2 * n, device=z.device).roll(n).expand(len(z), -1)
    return F.cross_entropy(scores[there], other[there])


class VidLanKD(Stage):
    """A stage in two parts. First a teacher, a copy of the encoder that sees clips (phase "aligner"):

        L = MLM + hinge(h_t, V(clip)),

    V two linear maps. Then the student learns from it, frozen, on the same masked words ("student"):

        L = MLM + nst(S(h_s), u_t) + contrast(C(h_s), u_t),

    S and C heads (linear, GELU, layer norm, linear), u_t the teacher's token states of length 1.
    The first part gets half of the epochs, or `first_epochs`. The student never reads a clip, and no
    part is left afterwards.

    Source: Tang, Cho, Tan and Bansal 2021, "VidLanKD: Improving Language Understanding via
    Video-Distilled Knowledge Transfer", and the authors' code as last released: pairs of half
    batches, margin 1, temperature 1, all weights 1.
    Unsure: the example command transfers by NST alone, and what plays CRD is a contrast within the
    batch (the real one is marked as missing), whose value is divided by the number of vectors once
    more than a mean needs (here not); the code leaves the clip's vector at its length (here it has
    length 1, as the tokens' have). "Vid-Voken" may be the source's own baseline, voken
    classification with video, and not this.
    Differs: the clip is one vector that a teacher made of the text, not features of frames, and which
    one it is makes the two variants: w/ResNet reads the first frame of the profile's video teacher,
    w/CLIP an image encoder's features of a picture (`blocks.Pictured`: `video`, `frames`); both
    models start from the student's checkpoint and read the task's texts, where the source trains
    from scratch on HowTo100M and Wikipedia. NST has the teacher's own term, a constant, so that 0 is
    its least value, and is a mean over texts without a division by their length.
    """

    @staticmethod
    def check(training: Training, width: int, channels: int | None) -> None:
        halves("the stage of vidlankd", training.epochs, training.first_epochs)

    def __init__(self, setting: Setting, student: Student):
        t = setting.training
        self.first = halves("the stage of vidlankd", t.epochs, t.first_epochs)
        super().__init__(setting, student)
        # The engine moves every part of a phase. These move with the student alone, so until
        # `finish` they are the student's.
        self.heads["words"] = self.parts.pop("words")

    def make(self) -> dict[str, nn.Module]:
        d = self.student.width
        self.heads = nn.ModuleDict({"select": head(d, d), "near": head(d, d)})
        clip = init(nn.Sequential(nn.Linear(self.width, INNER), nn.Linear(INNER, d)))
        self.teacher, self.clip = copy.deepcopy(self.encoder), clip
        self.read = MLMHead(d, self.vocabulary)  # the teacher's own masked-word head
        parts = {"encoder": self.teacher, "clip": self.clip, "words": self.read}
        return {"teacher": nn.ModuleDict(parts)}

    def attach(self, data: Encoded) -> None:
        self.student.add_module("stage", self.heads.to(self.table.device))

    def schedule(self, epochs: int) -> list[Phase]:
        return ["aligner"] * self.first + ["student"] * (epochs - self.first)  # type: ignore[return-value]

    def before_epoch(self, number: int, epochs: int) -> None:
        self.teacher.train(number < self.first)

    def losses(
        self, batch: Batch, out: StudentOutput | None, phase: Phase, centroid: Centroid
    ) -> Terms:
        ids, mask = batch.inputs["input_ids"], padded(batch)[1]
        read, chosen = self.masked(ids)
        if "packing" not in batch.inputs:
            chosen = chosen & mask.bool()
        inputs = {**batch.inputs, "input_ids": read}
        return (self._teach if phase == "aligner" else self._learn)(batch, inputs, chosen, mask)

    def _teach(self, batch: Batch, inputs: dict[str, Any], chosen: Tensor, mask: Tensor) -> Terms:
        """The teacher's losses."""
        with self.autocast(mask.device):
            states = self.teacher(**inputs).last_hidden_state
            clips = self.clip(self.pictures(batch))
            table = self.teacher.get_input_embeddings().weight
            words = self.read.loss(states, batch.inputs["input_ids"], chosen, table)
        return {"words": words, "clips": hinge(spread(states, inputs).float(), clips.float(), mask)}

    def _learn(self, batch: Batch, inputs: dict[str, Any], chosen: Tensor, mask: Tensor) -> Terms:
        """The student's losses."""
        with self.autocast(mask.device):
            with torch.no_grad():
                taught = self.teacher(**inputs).last_hidden_state
            states = self.encoder(**inputs).last_hidden_state
            words = self.words.loss(states, batch.inputs["input_ids"], chosen, self.table)
            select, near = self.heads["select"](states), self.heads["near"](states)
        taught = F.normalize(spread(taught, inputs).float(), dim=-1)
        return {
            "words": words,
            "nst": nst(spread(select, inputs).float(), taught, mask),
            "contrast": contrast(spread(near, inputs).float(), taught, mask),
        }

    def finish(self) -> None:
        super().finish()
        del self.student.stage, self.teacher, self.heads
