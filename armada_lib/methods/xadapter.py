"""X-adapter: small layers before an encoder's last ones, through which it reads a second encoder.

The T-expert reads a frozen text encoder's states of the same text, so that it needs text alone, also
at test time. The V-expert reads the picture that a teacher made of the text, also at test time. A
plain checkpoint has no place for either, so that a student with adapters cannot be exported.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from armada_lib import profiles
from armada_lib.batching import Batch
from armada_lib.methods.base import Centroid, Method, Phase, Setting, Terms
from armada_lib.methods.layers import bert
from armada_lib.methods.vidlankd import halves
from armada_lib.methods.visual import (
    MLMHead,
    init,
    mask_id,
    masked_words,
    regions,
    slots,
    special_ids,
    spread,
)  # fmt: skip
from armada_lib.profiles import Training
from armada_lib.students import Student, StudentOutput
from armada_lib.teachers import common

LAYERS = 2  # the last ones have an adapter each
NARROW = 4  # the bottleneck is that many times narrower than the encoder


class Adapter(nn.Module):
    """h + Up(gelu(Down(A))), A the attention of h to a memory; at first h itself, as Up is 0.

    `width` d of h, `memory` e, `heads` of the attention; the bottleneck has d / 4 numbers.
    """

    def __init__(self, width: int, memory: int, heads: int):
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key, self.value = nn.Linear(memory, width), nn.Linear(memory, width)
        self.down = nn.Linear(width, max(1, width // NARROW))
        self.up = nn.Linear(self.down.out_features, width)
        init(self)
        nn.init.zeros_(self.up.weight)

    def forward(self, h: Tensor, memory: Tensor, mask: Tensor) -> Tensor:
        """h (n, t, d), memory (n, s, e), mask (n, s) of what is there -> (n, t, d), to be added."""
        split = lambda x: x.unflatten(2, (self.heads, -1)).transpose(1, 2)
        q, k, v = split(self.query(h)), split(self.key(memory)), split(self.value(memory))
        found = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None])
        return self.up(F.gelu(self.down(found.transpose(1, 2).flatten(2))))


class Own(nn.Module):
    """A frozen copy of the student's encoder as it came, with all its vocabulary."""

    def __init__(self, student: Student):
        super().__init__()
        self.encoder = copy.deepcopy(bert(student))
        if student._full is not None:
            self.encoder.set_input_embeddings(nn.Embedding.from_pretrained(student._full.clone()))
        self.requires_grad_(False)
        self.width: int = self.encoder.config.hidden_size

    @torch.no_grad()
    def forward(self, student: Student, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """(states (n, s, e), mask (n, s) bool) of a batch's texts."""
        self.encoder.eval()
        ids = everywhere(student, inputs["input_ids"])
        rest = {k: v for k, v in inputs.items() if k != "at"}
        states = self.encoder(**(rest | {"input_ids": ids})).last_hidden_state
        return spread(states, inputs), there(inputs)


class Other(nn.Module):
    """A frozen text encoder with a tokenizer of its own, such as CLIP's, by its checkpoint."""

    def __init__(self, reference: str):
        super().__init__()
        self.tokenizer = common.pretrained(transformers.AutoTokenizer, reference, None)
        config = transformers.AutoConfig.from_pretrained(profiles.resolve(reference))
        clip = config.model_type.startswith("clip")
        kind = transformers.CLIPTextModel if clip else transformers.AutoModel
        self.encoder = common.model(kind, reference, None, "cpu")
        self.width: int = self.encoder.config.hidden_size
        self.limit = min(
            self.tokenizer.model_max_length, self.encoder.config.max_position_embeddings
        )

    @torch.no_grad()
    def forward(self, student: Student, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """(states (n, s, e), mask (n, s) bool) of a batch's texts; hidden words are left out."""
        self.encoder.eval()
        ids = spread(everywhere(student, inputs["input_ids"]), inputs)
        rows = [row[seen].tolist() for row, seen in zip(ids, there(inputs), strict=True)]
        texts = student.tokenizer.batch_decode(rows, skip_special_tokens=True)
        read = self.tokenizer(
            texts, padding=True, truncation=True, max_length=self.limit, return_tensors="pt"
        ).to(ids.device)
        return self.encoder(**read).last_hidden_state, read["attention_mask"].bool()


def everywhere(student: Student, ids: Tensor) -> Tensor:
    """(Compact) token ids as the tokenizer numbers them."""
    return ids if student._used is None else student._used.to(ids.device)[ids]


def there(inputs: dict[str, Any]) -> Tensor:
    """(n, t) bool: where a batch, spread text by text, has tokens."""
    mask = inputs.get("attention_mask")
    return (spread(torch.ones_like(inputs["input_ids"]), inputs) if mask is None else mask).bool()


class Adapters(nn.Module):
    """An adapter before each of the last layers, and what they read in this forward.

    `source` says it of the inputs (T-expert); None: `pictures` (n, r, e), set before each forward.
    """

    def __init__(self, student: Student, source: Own | Other | None, memory: int):
        super().__init__()
        encoder = bert(student)
        config, layers = encoder.config, encoder.encoder.layer
        made = [
            Adapter(config.hidden_size, memory, config.num_attention_heads)
            for _ in range(min(LAYERS, len(layers)))
        ]
        self.source, self.adapters = source, nn.ModuleList(made)
        self.pictures: Tensor | None = None
        self.inputs: dict[str, Any] = {}
        self.memory: tuple[Tensor, Tensor] = (torch.empty(0), torch.empty(0))

    def read(self, student: Student, inputs: dict[str, Any]) -> None:
        """As a forward of the encoder begins; ValueError if the V-expert has not been shown pictures."""
        self.inputs = inputs
        if self.source is not None:
            self.memory = self.source(student, inputs)
            return
        if self.pictures is None:
            raise ValueError(
                "the V-expert reads the texts' pictures: pass every batch through "
                "`XAdapter.inputs` before the student's forward"
            )
        self.memory = self.pictures, self.pictures.new_ones(self.pictures.shape[:2]).bool()
        self.pictures = None  # the next batch has others

    def add(self, number: int, x: Tensor) -> Tensor:
        """Token vectors on their way into a layer, (1, T, d) or (n, t, d), with the adapter's."""
        found = self.adapters[number](spread(x, self.inputs), *self.memory)
        if "packing" in self.inputs:
            found = found.flatten(0, 1).index_select(0, slots(self.inputs))[None]
        return x + found


def wear(student: Student, adapters: Adapters) -> None:
    """Let every forward of the student's encoder go through the adapters."""
    encoder = bert(student)
    # partials of functions, not closures: a copy of the student then has adapters of its own
    begin = functools.partial(_begin, student, adapters)
    encoder.register_forward_pre_hook(begin, with_kwargs=True)
    last = list(encoder.encoder.layer)[-len(adapters.adapters) :]
    for number, layer in enumerate(last):
        layer.register_forward_pre_hook(functools.partial(_enter, adapters, number))
    student.save_pretrained = refuse  # type: ignore[method-assign]


def _begin(student: Student, adapters: Adapters, _: Any, args: Any, kwargs: dict[str, Any]) -> None:
    adapters.read(student, kwargs)


def _enter(adapters: Adapters, number: int, _: Any, args: tuple[Tensor, ...]) -> tuple[Any, ...]:
    return (adapters.add(number, args[0]), *args[1:])


def refuse(folder: str | Path) -> NoReturn:
    """In place of `Student.save_pretrained`."""
    raise ValueError(
        "x_adapter's student reads its adapters at test time; a plain checkpoint has no place for "
        "them and would predict something else"
    )


@contextlib.contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """What is computed here asks no gradient of the module's parameters, nor of what comes before."""
    learns = [p for p in module.parameters() if p.requires_grad]
    for p in learns:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in learns:
            p.requires_grad_(True)


class XAdapter(Method):
    """**A re-implementation from the abstract**: no code was found, and details are guesses.

    Before each of the last 2 layers, token vectors H get h + Up(gelu(Down(A))), A the multi-head
    attention of H to what an expert knows of the text (`Adapter`). First (phase "aligner") the
    adapters alone learn, by masked words, beside the frozen encoder; then ("joint") adapters and
    student are fine-tuned: L = T(y, o_s). The first part gets half of the epochs, or `first_epochs`.

    T-expert (the default; the source's choice for language understanding): the states of a frozen
    text encoder, `training.text_encoder`, by default the student's own as it came; the words that
    are masked are hidden from it, too. V-expert (`pictures`): the r regions of the picture that a
    teacher made of the text (`training.regions`, `setting.channels`). At test time each is read as in
    training: the one needs text alone, the other the pictures of the evaluated texts.

    Source: Zhang, Tan, Wu and Yu 2023, "Towards Versatile and Efficient Visual Knowledge Integration
    into Pre-trained Language Models with Cross-Modal Adapters" (arXiv 2305.07358).
    Unsure: form, place and width of the adapters; whether the T-expert sees masked words; whether the
    encoder is trained on a task (here it is); learning rates (adapters: `partner_lr`, by default 5
    times the student's).
    Differs: the source adapts on Wikitext-103 or captions, here on the task's texts, within the
    common budget; its experts are CLIP's, and its V-expert looks up pictures for a text, where here
    one is made of it. Where the text encoder is the student's own it knows no pictures: a control.

    ValueError without `student.mask_id`, for a student that is no BERT, and for a run of one epoch.
    """

    @staticmethod
    def check(training: Training, width: int | None, channels: int | None) -> None:
        """ValueError for settings with which it cannot work; `width` None: it reads no pictures."""
        halves("x_adapter", training.epochs, training.first_epochs)
        if width is not None:
            regions(torch.empty(1, width), training.regions, channels)

    def __init__(self, setting: Setting, student: Student, pictures: bool = False):
        t = setting.training
        self.check(t, setting.width if pictures else None, setting.channels)
        self.first = halves("x_adapter", t.epochs, t.first_epochs)
        super().__init__(setting, student)
        self.encoder = bert(student)
        self.mask, self.special = mask_id(student), special_ids(student)
        self.reads_teacher = pictures
        self.count, self.channels = t.regions, setting.channels
        source: Own | Other | None = None
        if pictures:
            if setting.width is None:
                raise ValueError("the V-expert reads pictures; the setting has no width")
            memory = self.cut(torch.empty(1, setting.width)).shape[2]
        else:
            source = Other(t.text_encoder) if t.text_encoder else Own(student)
            memory = source.width
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(setting.seed + 9_000_011)
            self.adapters = Adapters(student, source, memory)
            self.words = MLMHead(student.width, len(self.table))
        # one part: in each half the engine steps what has a gradient
        self.parts["adapters"] = nn.ModuleDict({"adapters": self.adapters, "words": self.words})
        wear(student, self.adapters)

    @property
    def table(self) -> Tensor:
        """(V, d) the student's word embeddings."""
        return self.encoder.get_input_embeddings().weight

    def cut(self, pictures: Tensor) -> Tensor:
        """(n, m) -> (n, r, e)"""
        return regions(pictures, self.count, self.channels)

    def learning_rate(self, part: str) -> float:
        t = self.setting.training
        return t.student_lr if part == "student" else t.partner_lr or 5 * t.student_lr

    def schedule(self, epochs: int) -> list[Phase]:
        return ["aligner"] * self.first + ["joint"] * (epochs - self.first)  # type: ignore[return-value]

    def inputs(self, batch: Batch) -> dict[str, Any]:
        """What the student reads of a batch; shows the V-expert its pictures, or ValueError."""
        if self.reads_teacher:
            if batch.teacher is None:
                raise ValueError("the V-expert reads pictures; the texts have none")
            self.adapters.pictures = self.cut(batch.teacher)
        return batch.inputs

    def losses(
        self, batch: Batch, out: StudentOutput | None, phase: Phase, centroid: Centroid
    ) -> Terms:
        if phase != "aligner":
            return super().losses(batch, out, phase, centroid)
        inputs = self.inputs(batch)
        with frozen(self.student), self.autocast(inputs["input_ids"].device):
            words, _ = masked_words(self.encoder, self.words, inputs, self.special, self.mask)
            return {"words": words}

    def finish(self) -> None:
        """The adapters go to the student, with which they stay."""
        self.student.add_module("adapters", self.adapters)
        self.parts.clear()
