"""What the multimodal baselines share: pictures as regions, masked words, and a stage of pre-training.

A stage trains the student's encoder on texts and their pictures; `batch.teacher` (n, m) holds the
picture that a teacher made of each text, each of its numbers standardised over the training texts
(A24), so that not the scale of a teacher's numbers decides how much a picture counts beside words.
What a stage adds is dropped at its end: afterwards the student reads text alone.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from armada_lib.batching import Batch
from armada_lib.methods.base import Method, Setting
from armada_lib.methods.layers import bert
from armada_lib.packing import Packing, pack
from armada_lib.profiles import Training
from armada_lib.students import Student

SHARE = 0.15  # of the words, and of the regions, that are hidden and asked for
REGIONS = 16
STD = 0.02  # of new weights, as BERT draws them


# -- pictures ------------------------------------------------------------------------------------


def regions(x: Tensor, r: int = REGIONS, channels: int | None = None) -> Tensor:
    """Pictures (n, m) as r regions of m / r numbers each, (n, r, m / r), for methods of Table 8.

    With `channels` c a picture is c x side x side numbers, as latents (c = 4) and grey frames (1)
    are, and its regions are the patches of a grid, row by row; else it is a vector of features,
    which is cut into r stretches. ValueError if it does not divide.
    """
    n, m = x.shape
    if channels is None:
        if r < 1 or m % r:
            raise ValueError(f"{m} features cannot be cut into {r} regions of one size")
        return x.view(n, r, m // r)
    side, grid = math.isqrt(m // channels), math.isqrt(r)
    if channels * side * side != m:
        raise ValueError(f"{m} numbers are no square picture of {channels} channels")
    if r < 1 or grid * grid != r or side % grid:
        raise ValueError(
            f"a picture of {side} x {side} cannot be cut into {r} equal squares; valid: "
            f"{', '.join(str(g * g) for g in range(1, side + 1) if side % g == 0)}"
        )
    patch = side // grid
    x = x.reshape(n, channels, grid, patch, grid, patch)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(n, r, m // r)


def mask_regions(
    x: Tensor, share: float = SHARE, hidden: float = 0.9
) -> tuple[Tensor, Tensor, Tensor]:
    """(x with hidden regions set to zero (n, r, k), which are asked for, which are hidden).

    Each region is asked for, (n, r) bool, with probability `share`; `hidden` of those are set to zero.
    """
    chosen = torch.rand(x.shape[:2], device=x.device) < share
    gone = chosen & (torch.rand(x.shape[:2], device=x.device) < hidden)
    return x.masked_fill(gone[..., None], 0.0), chosen, gone


def mispair(pictures: Tensor) -> tuple[Tensor, Tensor]:
    """(pictures (n, m) in which about half are another text's, is each its text's own (n,) int64).

    A picture equal to a text's own counts as its own; a single text keeps it. For the match that Li
    et al. (2019) and Lu et al. (2019) ask for.
    """
    n, device = len(pictures), pictures.device
    if n == 1:
        return pictures, torch.ones(1, dtype=torch.long, device=device)
    at = torch.arange(n, device=device)
    other = (at + torch.randint(1, n, (n,), device=device)) % n
    given = pictures[torch.where(torch.rand(n, device=device) < 0.5, other, at)]
    return given, (given == pictures).all(1).long()


# -- words ---------------------------------------------------------------------------------------


def mask_id(student: Student) -> int:
    """The [MASK] token as the student's (compact) embeddings number it; ValueError if not set."""
    if (found := student.mask_id) is None:
        raise ValueError(
            "a stage that masks words needs the id of [MASK] among the student's embeddings: set "
            "student.mask_id, and keep that row when the vocabulary is made compact"
        )
    return found


def special_ids(student: Student) -> Tensor:
    """(k,) ids of the tokenizer's special tokens, as the (compact) embeddings number them."""
    every = torch.tensor(student.tokenizer.all_special_ids, dtype=torch.long)
    used = student._used
    if used is None:
        return every
    return torch.isin(used.cpu(), every).nonzero()[:, 0]


def mask_tokens(
    ids: Tensor, special: Tensor, mask: int, vocabulary: int, share: float = SHARE
) -> tuple[Tensor, Tensor]:
    """(ids as the model is to read them, which are asked for (bool)), both (...) as `ids`.

    Each token that is not in `special` (k,) is asked for with probability `share`; of those 80 %
    become `mask`, 10 % a token drawn from the vocabulary, 10 % stay (Devlin et al., 2019).
    """
    draw = lambda: torch.rand(ids.shape, device=ids.device)
    chosen = (draw() < share) & ~torch.isin(ids, special.to(ids.device))
    kind, other = draw(), torch.randint(vocabulary, ids.shape, device=ids.device)
    read = torch.where(kind < 0.8, torch.full_like(ids, mask), torch.where(kind < 0.9, other, ids))
    return torch.where(chosen, read, ids), chosen


def init(module: nn.Module) -> nn.Module:
    """Draw the weights of new layers as BERT does: N(0, 0.02), biases 0."""
    for m in module.modules():
        if isinstance(m, nn.Linear | nn.Embedding):
            nn.init.normal_(m.weight, std=STD)
        if isinstance(m, nn.Linear) and m.bias is not None:
            nn.init.zeros_(m.bias)
    return module


def head(width: int, outputs: int) -> nn.Sequential:
    """BERT's form of a head: linear, GELU, layer norm, linear."""
    layers = (
        nn.Linear(width, width),
        nn.GELU(),
        nn.LayerNorm(width, 1e-12),
        nn.Linear(width, outputs),
    )
    return nn.Sequential(*map(init, layers))


class MLMHead(nn.Module):
    """BERT's masked-word head. Its output layer is the input embeddings (V, d), which stay theirs."""

    def __init__(self, width: int, vocabulary: int):
        super().__init__()
        self.transform = head(width, 1)[:-1]
        self.bias = nn.Parameter(torch.zeros(vocabulary))

    def forward(self, states: Tensor, table: Tensor) -> Tensor:
        """(k, d) -> logits (k, V)"""
        return F.linear(self.transform(states), table, self.bias)

    def loss(self, states: Tensor, ids: Tensor, chosen: Tensor, table: Tensor) -> Tensor:
        """Mean cross-entropy of the `chosen` words; 0 if there are none.

        states (..., d), true ids (...), chosen (...) bool.
        """
        return mean_loss(F.cross_entropy, self(states[chosen], table), ids[chosen])


def masked_words(
    encoder: Any, words: MLMHead, inputs: dict[str, Any], special: Tensor, mask: int
) -> tuple[Tensor, Tensor]:
    """(loss of masked words, token vectors (1, T, d) or (b, t, d)) of an encoder that reads `inputs`."""
    ids, table = inputs["input_ids"], encoder.get_input_embeddings().weight
    read, chosen = mask_tokens(ids, special, mask, len(table))
    if (there := inputs.get("attention_mask")) is not None:
        chosen = chosen & there.bool()
    states = encoder(**(inputs | {"input_ids": read})).last_hidden_state
    return words.loss(states, ids, chosen, table), states


def mean_loss(loss: Any, found: Tensor, wanted: Tensor) -> Tensor:
    """`loss` as a mean over rows, in float32; 0, with a gradient of zeros, if there are no rows."""
    return loss(found.float(), wanted, reduction="sum") / max(1, wanted.numel())


# -- batches -------------------------------------------------------------------------------------


def spread(x: Tensor, inputs: dict[str, Any]) -> Tensor:
    """What belongs to a batch's tokens, (1, T, ...), text by text: (n, t, ...), 0 where none is.

    A padded batch's, (n, t, ...), is returned as it is.
    """
    packing = inputs.get("packing")
    if packing is None:
        return x
    n, longest = len(packing.first), max(g.longest for g in packing.groups)
    out = x.new_zeros(n * longest, *x.shape[2:])
    return out.index_copy(0, slots(inputs), x[0]).view(n, longest, *x.shape[2:])


def slots(inputs: dict[str, Any]) -> Tensor:
    """(T,) where each token of a packed batch lies in n x t padded places."""
    packing = inputs["packing"]
    return packing.text * max(g.longest for g in packing.groups) + inputs["position_ids"][0]


def padded(batch: Batch) -> tuple[Tensor, Tensor]:
    """(ids (n, t), mask (n, t) of 0 and 1) of a packed or padded batch, in the texts' order.

    Where the mask is 0 the id means nothing.
    """
    inputs = batch.inputs
    ids = inputs["input_ids"]
    mask = inputs.get("attention_mask")
    return spread(ids, inputs), spread(torch.ones_like(ids), inputs) if mask is None else mask


@dataclasses.dataclass(frozen=True)
class Joint:
    """One packed row in which r regions follow the words of each text.

    words (T,): where each word stands; regions (n, r): where the regions of text i stand.
    """

    packing: Packing
    words: Tensor
    regions: Tensor

    def put(self, words: Tensor, pictures: Tensor) -> Tensor:
        """(T, d) and (n, r, d) as one row (1, T + n r, d)."""
        out = words.new_empty(len(words) + self.regions.numel(), words.shape[1])
        out = out.index_copy(0, self.words, words)
        return out.index_copy(0, self.regions.flatten(), pictures.flatten(0, 1).to(out.dtype))[None]


def join(packing: Packing, r: int) -> Joint:
    """Where words and regions stand when r regions follow the words of each text."""
    lengths, order = (packing.last - packing.first + 1)[packing.order], packing.order
    n, device = len(lengths), lengths.device
    place = torch.empty_like(order).index_copy(0, order, torch.arange(n, device=device))
    new = pack(lengths.cpu().numpy() + r).to(device)
    new = dataclasses.replace(
        new, first=new.first[place], last=new.last[place], text=order[new.text], order=order
    )
    text = packing.text
    words = torch.arange(len(text), device=device) + r * place[text]
    ends = (new.last + 1)[:, None] - r + torch.arange(r, device=device)
    return Joint(new, words, ends)


# -- stages --------------------------------------------------------------------------------------


class Stage(Method):
    """Pre-training of a BERT student's encoder, as of the baselines in Table 8.

    Its data are texts, and `batch.teacher` their pictures.

    A stage says by `make` which parts it adds, besides the masked-word head; they learn as fast as
    the student, and `finish` drops them. The engine runs no student for it (`predicts`).

    Raises ValueError for an architecture whose layers are not known here, without the width of the
    pictures, and without a valid `student.mask_id`.
    """

    predicts = False

    @staticmethod
    def check(training: Training, width: int, channels: int | None) -> None:
        """ValueError for settings with which the stage cannot work on pictures of this form."""

    def __init__(self, setting: Setting, student: Student):
        self.encoder = bert(student)
        if setting.width is None:
            raise ValueError(f"{type(self).__name__} reads pictures; the setting has no width")
        self.check(setting.training, setting.width, setting.channels)
        super().__init__(setting, student)
        self.width, self.mask = setting.width, mask_id(student)
        self.special, self.vocabulary = special_ids(student), len(self.table)
        if not 0 <= self.mask < self.vocabulary:
            raise ValueError(f"student.mask_id {self.mask} is none of {self.vocabulary} embeddings")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(setting.seed + 7_000_003)
            self.words = MLMHead(student.width, self.vocabulary)
            self.parts |= {"words": self.words, **self.make()}

    def make(self) -> dict[str, nn.Module]:
        """The stage's own parts, drawn from the seed alone."""
        return {}

    @property
    def table(self) -> Tensor:
        """(V, d) the student's word embeddings."""
        return self.encoder.get_input_embeddings().weight

    def learning_rate(self, part: str) -> float:
        return self.setting.training.student_lr

    def masked(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """`mask_tokens` of ids (...) over this student's vocabulary."""
        return mask_tokens(ids, self.special, self.mask, self.vocabulary)

    def masked_words(self, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """(loss of masked words with no picture in sight, token vectors (1, T, d) or (b, t, d))."""
        return masked_words(self.encoder, self.words, inputs, self.special, self.mask)

    def pictures(self, batch: Batch) -> Tensor:
        """(n, m) float32; ValueError if the texts have none."""
        if batch.teacher is None:
            raise ValueError(f"{type(self).__name__} reads pictures; the texts have none")
        return batch.teacher

    def finish(self) -> None:
        self.parts.clear()
