"""Pre-training on texts and pictures: VisualBERT and VL-BERT in one stream, ViLBERT in two.

In all three a picture is r regions of k numbers (`visual.regions`; `training.regions`, 16 unless
set, and `setting.channels`: 4 for latents, 1 for grey frames, None for features). The sources'
regions are some 36 boxes of an object detector with 2048 features each; here they are the squares
of a grid over what a teacher drew for the text. Corpus: the texts of the stage's data.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from armada_lib.batching import Batch
from armada_lib.methods import visual
from armada_lib.methods.base import Centroid, Phase, Setting, Terms
from armada_lib.profiles import Training
from armada_lib.students import Student, StudentOutput


class _Regional(visual.Stage):
    """What the three share: cut pictures, and the sum of a word's embeddings before its norm."""

    @staticmethod
    def check(training: Training, width: int, channels: int | None) -> None:
        visual.regions(torch.empty(1, width), training.regions, channels)

    def __init__(self, setting: Setting, student: Student):
        self.count, self.channels = setting.training.regions, setting.channels
        self.size = (setting.width or 0) // self.count
        super().__init__(setting, student)

    def cut(self, pictures: Tensor) -> Tensor:
        """(n, m) -> (n, r, k)"""
        return visual.regions(pictures, self.count, self.channels)

    def sums(self, ids: Tensor, inputs: dict[str, Any]) -> Tensor:
        """(T, d): word, segment and position of every token, added up."""
        e = self.encoder.embeddings
        types = inputs.get("token_type_ids", torch.zeros_like(ids))
        x = e.word_embeddings(ids) + e.token_type_embeddings(types)
        return (x + e.position_embeddings(inputs["position_ids"]))[0]

    def together(self, words: Tensor, pictures: Tensor, joint: visual.Joint) -> Tensor:
        """Last states (T + n r, d) of one stream of words (T, d) and regions (n, r, d)."""
        e = self.encoder.embeddings
        x = e.dropout(e.LayerNorm(joint.put(words, pictures)))
        return self.encoder.encoder(x, packing=joint.packing).last_hidden_state[0]

    def pool(self, first: Tensor) -> Tensor:
        """(n, d) first tokens' states -> (n, d), by the student's own pooler."""
        return self.student.family.transform(self.student.model, first)


def _vector(width: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(width) * visual.STD)


class _Seen(nn.Module):
    """VisualBERT's visual embedding: W f + b + s, with s the segment of pictures."""

    def __init__(self, size: int, width: int):
        super().__init__()
        self.project = visual.init(nn.Linear(size, width))
        self.segment = _vector(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.project(x) + self.segment


class VisualBERT(_Regional):
    """L = masked words + match, over one stream of a text's words and r regions.

    A region enters as W f + b + segment, is normed like a word and attends like one. 15 % of the
    words are asked for (`visual.mask_tokens`). About half of the texts get the picture of another
    text of their batch; match is the cross-entropy of "is it its own", by a linear map of the
    student's pooled first token. Words are asked for whichever picture is there.

    Source: Li, Yatskar, Yin, Hsieh and Chang (2019), and the authors' pre-training on COCO. There
    the picture stays and one of two captions is false half of the time: here a text has one
    picture, so the picture changes, to another of the batch. As there, regions have no position
    and none is masked. Unsure: how the numbers quoted for text tasks were made of it.
    """

    def make(self) -> dict[str, nn.Module]:
        d = self.student.width
        self.seen, self.match = _Seen(self.size, d), visual.init(nn.Linear(d, 2))
        return {"seen": self.seen, "match": self.match}

    def losses(
        self, batch: Batch, out: StudentOutput | None, phase: Phase, centroid: Centroid
    ) -> Terms:
        inputs, ids = batch.inputs, batch.inputs["input_ids"]
        pictures, own = visual.mispair(self.pictures(batch))
        read, chosen = self.masked(ids)
        joint = visual.join(inputs["packing"], self.count)
        with self.autocast(ids.device):
            x = self.together(self.sums(read, inputs), self.seen(self.cut(pictures)), joint)
            match = self.match(self.pool(x[joint.packing.first]))
            words = self.words.loss(x[joint.words], ids[0], chosen[0], self.table)
        return {"words": words, "match": F.cross_entropy(match.float(), own)}


class _Elements(nn.Module):
    """VL-BERT's embeddings of what is seen.

    word (n, r, d): [IMG], or the mask's word where a region is hidden, + seen + segment + place;
    both maps of what is seen end in a norm whose gain starts at 0, so that a text's words are at
    first what they are without a picture.
    """

    def __init__(self, size: int, width: int, count: int):
        super().__init__()
        maps = [visual.init(nn.Linear(size, width)) for _ in range(2)]
        norms = [nn.LayerNorm(width, 1e-12) for _ in range(2)]
        for norm in norms:
            nn.init.zeros_(norm.weight)
        self.region = nn.Sequential(maps[0], norms[0])
        self.whole = nn.Sequential(maps[1], norms[1])
        self.image, self.hidden, self.segment = (_vector(width) for _ in range(3))
        self.place = visual.init(nn.Embedding(count, width))

    def forward(self, x: Tensor, hidden: Tensor) -> Tensor:
        """(n, r, k), which of them are hidden (n, r) -> (n, r, d)"""
        word = torch.where(hidden[..., None], self.hidden, self.image)
        return self.region(x) + word + self.segment + self.place.weight


class VLBERT(_Regional):
    """L = masked words + masked regions + masked words of text alone; no match loss.

    One stream. Every word's embedding gets the whole picture's added; each region is an element
    with the word [IMG], what is seen there, a segment, its place, and the position after the text's
    last word, the same for all. 15 % of the words and 15 % of the regions are asked for; of those
    regions 90 % are set to zero, also where the whole picture is read, and get another word.
    The third term is plain BERT's, on the same texts with other masks and no picture: the slot of
    the whole picture is empty, as it is afterwards, when the student reads text.

    Source: Su et al. (2020) and the authors' code. There the whole picture is a box of its own,
    places are box coordinates, text alone comes from books and Wikipedia, and its empty slot is a
    learned vector; here the mean of the picture's regions, a vector a place, the same texts, and 0.
    Differs: the source classifies a masked object, and nothing here knows objects: masked regions
    are regressed, mean squared error to the region's k numbers. No [END] element.
    Unsure: gains that start at 0 are remembered from its settings.
    """

    def make(self) -> dict[str, nn.Module]:
        d = self.student.width
        self.elements = _Elements(self.size, d, self.count)
        self.shown = visual.head(d, self.size)
        return {"elements": self.elements, "shown": self.shown}

    def losses(
        self, batch: Batch, out: StudentOutput | None, phase: Phase, centroid: Centroid
    ) -> Terms:
        inputs, ids, packing = batch.inputs, batch.inputs["input_ids"], batch.inputs["packing"]
        true = self.cut(self.pictures(batch))
        seen, asked, hidden = visual.mask_regions(true)
        read, chosen = self.masked(ids)
        joint, positions = visual.join(packing, self.count), self.encoder.embeddings
        table = positions.position_embeddings.weight
        after = (packing.last - packing.first + 1).clamp(max=len(table) - 1)
        with self.autocast(ids.device):
            whole = self.elements.whole(seen.mean(1))
            elements = self.elements(seen, hidden) + table[after][:, None]
            x = self.together(self.sums(read, inputs) + whole[packing.text], elements, joint)
            words = self.words.loss(x[joint.words], ids[0], chosen[0], self.table)
            shown = self.shown(x[joint.regions][asked])
            text = self.masked_words(inputs)[0]
        return {
            "words": words,
            "regions": visual.mean_loss(F.mse_loss, shown, true[asked]),
            "text": text,
        }


class _Side(nn.Module):
    """One side of a co-attention block: x looks at the other stream, then the usual two residuals."""

    def __init__(self, width: int, heads: int, inner: int, dropout: float):
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, dropout, batch_first=True)
        self.inner = nn.Sequential(nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, width))
        self.norms = nn.ModuleList(nn.LayerNorm(width, 1e-12) for _ in range(2))
        self.dropout = nn.Dropout(dropout)

    def look(self, x: Tensor, other: Tensor, absent: Tensor | None = None) -> Tensor:
        """What x (n, q, d) finds in other (n, k, d), except where `absent` (n, k) is True."""
        return self.attention(x, other, other, key_padding_mask=absent, need_weights=False)[0]

    def forward(self, x: Tensor, found: Tensor) -> Tensor:
        x = self.norms[0](x + self.dropout(found))
        return self.norms[1](x + self.dropout(self.inner(x)))


class _Stream(nn.Module):
    """ViLBERT's visual stream: embeddings, c layers, c co-attention blocks, a pooler.

    Element 0 is the whole picture, the mean of its regions.
    """

    def __init__(self, size: int, config: Any, count: int, layers: int):
        super().__init__()
        d, heads, inner = config.hidden_size, config.num_attention_heads, config.intermediate_size
        p = config.hidden_dropout_prob
        self.project, self.place = nn.Linear(size, d), nn.Embedding(count + 1, d)
        self.norm, self.dropout = nn.LayerNorm(d, 1e-12), nn.Dropout(p)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(d, heads, inner, p, "gelu", 1e-12, batch_first=True)
            for _ in range(layers)
        )
        sides = lambda: nn.ModuleList(_Side(d, heads, inner, p) for _ in range(layers))
        self.words, self.regions, self.pooler = sides(), sides(), nn.Linear(d, d)
        visual.init(self)

    def embed(self, x: Tensor) -> Tensor:
        """(n, r, k) -> (n, 1 + r, d)"""
        x = torch.cat([x.mean(1, keepdim=True), x], 1)
        return self.dropout(self.norm(self.project(x) + self.place.weight))


class ViLBERT(_Regional):
    """L = masked words + masked regions + match, over two streams that look at each other.

    The student's S layers are the text stream. c = S / 2 (rounded down, at least 1) layers of the
    same width are the visual stream, over the whole picture (the mean of its regions) and r
    regions. The first S - c text layers run alone; then c times: a co-attention block, in which
    each stream looks at the other's vectors as they were before it, one layer of each stream.
    Words and regions are masked as in VL-BERT and pictures exchanged as in VisualBERT; match is a
    linear map of the product of the pooled first elements of both streams. Words and regions
    are asked for in exchanged pairs, too (the released default).

    Afterwards the text stream is the encoder: co-attention blocks are dropped from it, too.

    Source: Lu, Batra, Parikh and Lee (2019), and the authors' multi-task code (12 text layers, 6
    and 6, a wider visual stream). There masked regions are classified as objects, or, by an option
    of the code, regressed: here they are regressed, mean squared error to the region's k numbers;
    places are a vector each, not box coordinates.
    Unsure: how the numbers quoted for text tasks were made of it.
    """

    def make(self) -> dict[str, nn.Module]:
        config = self.encoder.config
        self.connections = max(1, len(self.encoder.encoder.layer) // 2)
        self.stream = _Stream(self.size, config, self.count, self.connections)
        self.shown = visual.head(self.student.width, self.size)
        self.match = visual.init(nn.Linear(self.student.width, 2))
        return {"stream": self.stream, "shown": self.shown, "match": self.match}

    def losses(
        self, batch: Batch, out: StudentOutput | None, phase: Phase, centroid: Centroid
    ) -> Terms:
        inputs, ids = batch.inputs, batch.inputs["input_ids"]
        pictures, own = visual.mispair(self.pictures(batch))
        true = self.cut(pictures)
        seen, asked, _ = visual.mask_regions(true)
        read, chosen = self.masked(ids)
        with self.autocast(ids.device):
            x, v = self.streams(inputs | {"input_ids": read}, seen)
            pooled = self.pool(x[inputs["packing"].first]) * self.stream.pooler(v[:, 0]).tanh()
            match = self.match(self.stream.dropout(pooled))
            words = self.words.loss(x, ids[0], chosen[0], self.table)
            shown = self.shown(v[:, 1:][asked])
        return {
            "words": words,
            "regions": visual.mean_loss(F.mse_loss, shown, true[asked]),
            "match": F.cross_entropy(match.float(), own),
        }

    def streams(self, inputs: dict[str, Any], regions: Tensor) -> tuple[Tensor, Tensor]:
        """Last states of the words (T, d) and of picture and regions (n, 1 + r, d)."""
        packing, slots, s = inputs["packing"], visual.slots(inputs), self.stream
        rest = {k: v for k, v in inputs.items() if k != "packing"}
        x, v = self.encoder.embeddings(**rest), s.embed(regions)
        absent = visual.spread(torch.ones_like(inputs["input_ids"]), inputs) == 0
        stack = self.encoder.encoder.layer
        for i, layer in enumerate(stack):
            if (c := i - len(stack) + self.connections) >= 0:
                wide = visual.spread(x, inputs)
                found = s.words[c].look(wide, v).flatten(0, 1)[slots]  # type: ignore[operator]
                given = s.regions[c].look(v, wide, absent)  # type: ignore[operator]
                x, v = s.words[c](x, found[None]), s.layers[c](s.regions[c](v, given))
            x = layer(x, packing=packing)
        return x[0], v
