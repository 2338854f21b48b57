"""Visual Guidance: fine-tuning in which a text's vector also looks at pictures of its words.

It reads pictures at test time, too: those of the words that training knew, never the text's own. The
dictionary of words and the layers that read it (`Guide`) stay with the student: its forward asks
them, and `save_pretrained` writes them beside the plain checkpoint, for `restore`.
"""

from __future__ import annotations

import functools
import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from armada_lib.batching import Encoded
from armada_lib.methods.base import Method, Setting
from armada_lib.methods.visual import init, spread
from armada_lib.students import Student

TOP = 5  # words of a text that its picture is filed under
PICTURES = 3  # of a word, at most
FILE = "guidance.safetensors"


def dictionary(
    texts: Sequence[Sequence[int]], top: int = TOP, most: int = PICTURES
) -> dict[int, list[int]]:
    """The texts whose pictures show each word: {word: numbers of texts, at most `most`}.

    A text's picture shows its `top` words by TF-IDF, c / length * log(N / df); a word keeps the
    texts in which it weighs most. Ties go to the lower number, of words and of texts.
    """
    found: dict[int, list[tuple[float, int]]] = defaultdict(list)
    texts_with = Counter(w for text in texts for w in set(text))
    for i, text in enumerate(texts):
        weight = {
            w: c / len(text) * math.log(len(texts) / texts_with[w])
            for w, c in Counter(text).items()
        }
        for w in sorted(weight, key=lambda w: (-weight[w], w))[:top]:
            found[w].append((-weight[w], i))
    return {w: [i for _, i in sorted(hits)[:most]] for w, hits in found.items()}


def words(tokenizer: Any, size: int) -> Tensor:
    """(size,) bool: the token ids that are words, begin one, and are no stop words.

    A word is a piece of letters alone that does not go on with the piece before it.
    """
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

    known = torch.zeros(size, dtype=torch.bool)
    pieces = tokenizer.convert_ids_to_tokens(list(range(min(size, len(tokenizer)))))
    for i, piece in enumerate(pieces):
        word = (piece or "").lstrip("Ġ▁").lower()  # how some tokenizers mark a word's beginning
        known[i] = word.isalpha() and word not in ENGLISH_STOP_WORDS
    known[[i for i in tokenizer.all_special_ids if i < size]] = False
    return known


class Guide(nn.Module):
    """What a text sees of its words' pictures, of m numbers each, merged into its vectors of width d.

    `pictures` (k, m) float16, one row a word; `row` (V,) a token's row among them, or -1.
    """

    pictures: Tensor
    row: Tensor

    def __init__(self, width: int, m: int, vocabulary: int, words: int = 1):
        super().__init__()
        self.project = nn.Linear(m, width)
        self.match = nn.Linear(width, width, bias=False)  # W
        self.own = nn.Linear(width, width)  # W1
        self.seen = nn.Linear(width, width, bias=False)  # W2
        init(self)
        self.register_buffer("pictures", torch.zeros(words, m, dtype=torch.float16))
        self.register_buffer("row", torch.full((vocabulary,), -1))

    def forward(self, h: Tensor, rows: Tensor) -> Tensor:
        """H' = H + g C of q vectors a text, (n, q, d); rows (n, t) of its tokens, -1 for none.

        Without any picture it is H.
        """
        there = (rows >= 0)[:, None]
        keys = self.match(self.project(self.pictures[rows.clamp(min=0)].float()))
        scores = (h @ keys.transpose(1, 2)).masked_fill(~there, torch.finfo(h.dtype).min)
        context = (scores.softmax(-1) * there) @ keys
        return h + torch.sigmoid(self.own(h) + self.seen(context)) * context


def look(student: Student, guide: Guide, inputs: dict[str, Any]) -> Tensor:
    """`Student.pooled` with pictures: (n, d) float32."""
    ids, used = inputs["input_ids"], student._used
    rows = guide.row[ids if used is None else used.to(ids.device)[ids]]
    mask = inputs.get("attention_mask")
    if mask is None:
        mask = spread(torch.ones_like(ids), inputs)
    rows = spread(rows, inputs).masked_fill(mask == 0, -1)
    everywhere = student.pooling == "mean"
    if everywhere:
        states = student.family.encoder(student.model)(**inputs).last_hidden_state
        h = spread(states, inputs)
    else:  # the other tokens' merged vectors would not be read
        h = Student.pooled(student, inputs)[:, None]
    with torch.autocast(h.device.type, enabled=False):
        h = guide(h.float(), rows)
        return (h * mask[..., None]).sum(1) / mask.sum(1, keepdim=True) if everywhere else h[:, 0]


def save(student: Student, guide: Guide, folder: str | Path) -> None:
    """`Student.save_pretrained`, and the guide in a file beside it."""
    Student.save_pretrained(student, folder)
    kept = {k: v.detach().cpu().contiguous() for k, v in guide.state_dict().items()}
    save_file(kept, Path(folder) / FILE)


def wear(student: Student, guide: Guide) -> None:
    """Let every forward of the student, and its saving, go through the guide."""
    student.pooled = functools.partial(look, student, guide)  # type: ignore[method-assign]
    student.save_pretrained = functools.partial(save, student, guide)  # type: ignore[method-assign]


def restore(student: Student, folder: str | Path) -> Student:
    """The student with the guide that was saved with it; `student` is loaded from the same folder.

    Raises FileNotFoundError if there is none.
    """
    file = Path(folder) / FILE
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no guide was saved with this checkpoint")
    kept = load_file(file)
    k, m = kept["pictures"].shape
    guide = Guide(student.width, m, len(kept["row"]), k)
    guide.load_state_dict(kept)
    student.add_module("guide", guide.eval())
    wear(student, guide)
    return student


class VisualGuidance(Method):
    """T(y, o_s) with the pooled vectors of H' = H + g C, where, over the pictured words of a text,

        C = softmax(H (W Q)^T) (W Q),    g = sigmoid(W1 H + W2 C),

    H the encoder's last states, Q = linear map (m -> d) of the mean of each word's picture vectors.
    Everything but the pictures is trained, at one learning rate. Reads pictures at test time, of
    words alone; a text without a pictured word is read as it is, and without a dictionary this is
    undistilled fine-tuning.

    Words get pictures from the training texts: a text's picture is filed under its 5 words of
    highest TF-IDF, stop words left out, and a word keeps 3 pictures (`dictionary`).

    Source: Zhang et al. 2021, "Which Apple Keeps Which Doctor Away? Colorful Word Representations
    with Visual Oracles", and what is released of the authors' code.
    Unsure: the gate, whose code is not among the released files; the form here is a guess from its
    name. Which 3 pictures a word keeps.
    Differs: the pictures are those that a teacher made of the task's own training texts, where the
    source has photographs and captions of Multi30K; they stay fixed, where the source trains its
    table of them as well. A word is a word piece that begins a word. Only the vector that is pooled
    looks at pictures (all of them where the mean is pooled): the others' would not be read.

    ValueError without the width of the pictures.
    """

    reads_teacher = True

    def __init__(self, setting: Setting, student: Student):
        if setting.width is None:
            raise ValueError("visual_guidance reads pictures; the setting has no width")
        super().__init__(setting, student)
        size = student.model.get_input_embeddings().weight.shape[0]
        self.size = size if student._full is None else student._full.shape[0]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(setting.seed + 7_000_003)
            self.guide = Guide(student.width, setting.width, self.size)
        self.parts["guide"] = self.guide
        self.pictured = 0
        wear(student, self.guide)

    def learning_rate(self, part: str) -> float:
        return self.setting.training.student_lr

    def attach(self, data: Encoded) -> None:
        """Make the dictionary; ValueError if the texts have no pictures."""
        if data.teacher is None:
            raise ValueError("visual_guidance reads pictures; the training texts have none")
        known, used = words(self.student.tokenizer, self.size), self.student._used
        full = np.arange(self.size) if used is None else used.cpu().numpy()
        texts = [[int(i) for i in full[t] if known[i]] for t in data.tokens]
        found = dictionary(texts)
        self.pictured, device = len(found), self.guide.row.device
        pictures = torch.zeros(max(1, len(found)), self.guide.project.in_features)
        row = torch.full((self.size,), -1)
        for k, (word, seen) in enumerate(found.items()):
            vectors = data.vectors(np.array(seen))
            assert vectors is not None
            pictures[k], row[word] = vectors.mean(0), k
        self.guide.pictures, self.guide.row = pictures.half().to(device), row.to(device)

    def finish(self) -> None:
        """The guide goes to the student, with which it stays."""
        self.student.add_module("guide", self.guide)
        self.parts.clear()

    def facts(self) -> dict[str, float]:
        """Number of words that have pictures."""
        return {"pictured_words": self.pictured}
