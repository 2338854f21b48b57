"""Vokenization: every word gets the picture nearest to it, and learns to name that picture."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from armada_lib.batching import Batch, Encoded
from armada_lib.methods import visual
from armada_lib.methods.base import Centroid, Phase, Setting, Terms
from armada_lib.profiles import Training
from armada_lib.students import Student, StudentOutput

LAYERS = 4  # last layers of the frozen text encoder that the match model reads
INNER, COMMON, DROP = 256, 64, 0.3  # of the match model
MARGIN = 0.5
RATE = 1e-3  # of the match model
SHARE = 0.25  # of the epochs, for the match model
CHUNK = 64  # texts or pictures looked at together when vokens are assigned


def match_epochs(epochs: int, chosen: int | None) -> int:
    """How many of `epochs` train the match model; ValueError if none is left for the student."""
    first = max(1, round(epochs * SHARE)) if chosen is None else chosen
    if first >= epochs:
        raise ValueError(
            f"vokenization trains its match model first: {first} of {epochs} epochs leave none for "
            "the student; stage_epochs must be at least 2, and match_epochs less than that"
        )
    return first


class Match(nn.Module):
    """Words and pictures as unit vectors of one space; a pair's score is their product."""

    def __init__(self, words: int, pictures: int):
        super().__init__()
        mlp = lambda n: nn.Sequential(
            nn.Linear(n, INNER), nn.ReLU(), nn.Dropout(DROP), nn.Linear(INNER, COMMON)
        )
        self.words, self.pictures = mlp(words), mlp(pictures)

    def forward(self, words: Tensor, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """(T, words) and (n, pictures) -> (T, 64) and (n, 64)"""
        return self.unit(self.words, words), self.unit(self.pictures, pictures)

    @staticmethod
    def unit(side: nn.Module, x: Tensor) -> Tensor:
        """One side's vectors, each of length 1."""
        return F.normalize(side(x).float(), dim=-1)


def ranking(words: Tensor, pictures: Tensor, text: Tensor, other: Tensor) -> Tensor:
    """Mean over words of max(0, margin - w . v_own + w . v_other); 0 if there are no words.

    words (T, e), pictures (n, e), text (T,) the text of each word, other (n,) the text whose picture
    each text's words must not prefer.
    """
    own, false = ((words * pictures[i]).sum(-1) for i in (text, other[text]))
    return (MARGIN - own + false).clamp(min=0).sum() / max(1, len(words))


def opponents(n: int, device: torch.device) -> Tensor:
    """(n,) for each text the one at its place in the other half of a random halving.

    The odd one out is its own opponent.
    """
    h, order, other = n // 2, torch.randperm(n, device=device), torch.arange(n, device=device)
    a, b = order[:h], order[h : 2 * h]
    other[a], other[b] = b, a
    return other


class Vokenization(visual.Stage):
    """Stage 1 (phase "aligner"): a match model of words and pictures, the student at rest. A word w
    is the last 4 layers of the student as it came, side by side, then an MLP; v an MLP of a picture:

        L = mean_w max(0, 0.5 - w . v_own + w . v_other), w and v of length 1.

    The batch is halved at random, and text i of one half gets the picture of text i of the other as
    `v_other`, and the other way round (of an odd batch one text rests). Then each word of the
    training texts is given the nearest of their pictures, its *voken*.
    Stage 2 (phase "student"): L = masked words + cross-entropy of the voken of every word, both
    read from the text with its masks. Special tokens are no words in either stage.

    Stage 1 gets a quarter of the epochs, rounded, and at least one (`match_epochs` overrides), at a
    rate of 1e-3 (`partner_lr` overrides); each stage has a schedule of its own. `vokens` bounds the
    number of pictures (50000), which are then drawn from the seed.

    Source: Tan and Bansal (2020), and the authors' code. There the match model learns on COCO and
    its text encoder is another BERT than the one that is pre-trained, from scratch, on Wikipedia;
    vokens are pictures that stage 1 has not seen. Here both stages share the texts and their
    pictures, and the student begins as its checkpoint.
    Unsure: whether the source's match model ranks special tokens, too.

    The paper's Vid-Vokens (Table 8) are read as this with videos: w/ResNet gets the first frames of
    the profile's video teacher, w/CLIP an image encoder's features of pictures
    (`blocks.Pictured`: `video`, `frames`), where the source's frames pass ResNet and CLIP.
    """

    @staticmethod
    def check(training: Training, width: int, channels: int | None) -> None:
        match_epochs(training.epochs, training.match_epochs)

    def __init__(self, setting: Setting, student: Student):
        super().__init__(setting, student)
        # The engine moves every part of a phase. The heads move in stage 2 with the student alone,
        # so until `finish` they are the student's.
        del self.parts["words"]
        self.start: Any = None  # the encoder as it came
        self.vokens: Tensor | None = None  # (tokens,) of all training texts, one after the other
        self.found: dict[str, float] = {}

    def make(self) -> dict[str, nn.Module]:
        depth = min(LAYERS, len(self.encoder.encoder.layer))
        self.match = Match(depth * self.student.width, self.width)
        return {"match": self.match}

    def learning_rate(self, part: str) -> float:
        t = self.setting.training
        return (t.partner_lr or RATE) if part == "match" else t.student_lr

    def schedule(self, epochs: int) -> list[Phase]:
        first = match_epochs(epochs, self.setting.training.match_epochs)
        return ["aligner"] * first + ["student"] * (epochs - first)  # type: ignore[return-value]

    def attach(self, data: Encoded) -> None:
        """Copy the encoder as it came, choose the pictures, make the heads.

        ValueError for examples of several texts.
        """
        if data.per_example != 1:
            raise ValueError("vokenization reads plain texts, not examples of several")
        self.data, self.offsets = data, torch.from_numpy(np.cumsum(data.lengths) - data.lengths)
        self.start = copy.deepcopy(self.encoder).eval().requires_grad_(False)
        bound = self.setting.training.vokens
        rng = np.random.default_rng([self.setting.seed, 7])
        self.chosen = np.sort(rng.permutation(len(data))[:bound])  # texts whose pictures are vokens
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.setting.seed + 8_000_009)
            self.names = visual.head(self.student.width, len(self.chosen))
        heads = nn.ModuleDict({"words": self.words, "vokens": self.names})
        self.student.add_module("stage", heads.to(self.table.device))

    def before_epoch(self, number: int, epochs: int) -> None:
        if self.schedule(epochs)[number] == "student" and self.vokens is None:
            self._assign()

    def losses(
        self, batch: Batch, out: StudentOutput | None, phase: Phase, centroid: Centroid
    ) -> Terms:
        if phase == "aligner":
            return {"match": self._rank(batch)}
        assert self.vokens is not None
        word = self._word(batch)
        wanted = self.vokens[self._places(batch)].to(word.device)[word]
        with self.autocast(word.device):
            words, x = self.masked_words(batch.inputs)
            named = self.names(x[0][word])
        return {"words": words, "vokens": visual.mean_loss(F.cross_entropy, named, wanted)}

    def _rank(self, batch: Batch) -> Tensor:
        """The loss of stage 1."""
        text, n = batch.inputs["packing"].text, len(batch.rows)
        other = opponents(n, text.device)
        plays = other != torch.arange(n, device=text.device)
        word = self._word(batch) & plays[text]
        with self.autocast(text.device):
            w, v = self.match(self._read(batch.inputs)[word], self.pictures(batch))
        return ranking(w, v, text[word], other)

    def _word(self, batch: Batch) -> Tensor:
        """(T,) which tokens are words."""
        ids = batch.inputs["input_ids"][0]
        return ~torch.isin(ids, self.special.to(ids.device))

    @torch.no_grad()
    def _read(self, inputs: dict[str, Any]) -> Tensor:
        """(T, 4 d) what the encoder that came says of each token, its last layers side by side."""
        x = self.start.embeddings(**{k: v for k, v in inputs.items() if k != "packing"})
        states = []
        for layer in self.start.encoder.layer:
            x = layer(x, packing=inputs["packing"])
            states.append(x[0])
        return torch.cat(states[-LAYERS:], -1)

    def _places(self, batch: Batch) -> Tensor:
        """(T,) number of each token among those of all training texts, on the CPU."""
        text, position = batch.inputs["packing"].text.cpu(), batch.inputs["position_ids"][0].cpu()
        return self.offsets[torch.from_numpy(batch.rows)][text] + position

    @torch.no_grad()
    def _assign(self) -> None:
        """The nearest picture of every token of the training texts; then the copy can go."""
        device, unit = self.table.device, self.match.unit
        chunks = lambda x: np.array_split(x, -(-len(x) // CHUNK))
        self.match.eval()
        seen = []
        for at in chunks(self.chosen):
            if (pictures := self.data.vectors(at)) is None:
                raise ValueError("Vokenization reads pictures; the texts have none")
            seen.append(unit(self.match.pictures, pictures.to(device)))
        table = torch.cat(seen)
        vokens = torch.zeros(int(self.data.lengths.sum()), dtype=torch.long)
        chosen, hits = torch.from_numpy(self.chosen), []
        for at in chunks(np.argsort(-self.data.lengths, kind="stable")):
            batch = self.data.batch(at, packed=True).to(device)
            words = unit(self.match.words, self._read(batch.inputs).float())
            nearest = (words @ table.T).argmax(-1).cpu()
            vokens[self._places(batch)] = nearest
            text = torch.from_numpy(batch.rows)[batch.inputs["packing"].text.cpu()]
            hits.append((chosen[nearest] == text)[self._word(batch).cpu()])
        self.vokens, self.start = vokens, None
        share = float(torch.cat(hits).float().mean())
        self.found = {"vokens": float(len(vokens.unique())), "vokens_own": share}

    def facts(self) -> dict[str, float]:
        """Number of pictures that are a voken, and share of words whose voken is their text's own."""
        return self.found

    def finish(self) -> None:
        super().finish()
        del self.student.stage
        self.start = self.vokens = None
