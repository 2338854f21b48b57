"""A language-only student: a transformers classifier plus the branch that ARMADA trains with it.

The student *is* an `AutoModelForSequenceClassification`: its pooler is the paper's non-linear map
`Fs~`, its classifier the output head `O_s`. Training adds a projection `P_s` and an auxiliary head
`A_s`, which are dropped on saving, so that a distilled student is a plain checkpoint.
"""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from torch import nn

from armada_lib import profiles, quiet
from armada_lib.families import FAMILIES, text_mean
from armada_lib.packing import PACKED, packed
from armada_lib.profiles import StudentSpec


class StudentOutput(NamedTuple):
    """n texts, d student width, k shared width, c outputs. None without the training branch."""

    logits: torch.Tensor  # o_s (n, c)
    hidden: torch.Tensor  # h'_s (n, d)
    projection: torch.Tensor | None  # p_s (n, k)
    aux_logits: torch.Tensor | None  # a_s (n, c)


class Student(nn.Module):
    """`model` + training branch. See `load` for how one is made.

    forward takes a batch's `inputs` (packed or padded) and returns a `StudentOutput`.
    `settings.Unknown` for a model of another architecture than `FAMILIES`.
    """

    def __init__(self, model: Any, tokenizer: Any, pooling: str | None, regression: bool):
        super().__init__()
        kind = model.config.model_type
        self.model, self.tokenizer, self.regression = model, tokenizer, regression
        self.labels: tuple[str, ...] = ()  # names of the outputs, where they have any
        self.multilabel = False  # several of them may hold
        self.family = FAMILIES[profiles.check(kind, FAMILIES, "student architecture")]
        self.pooling = pooling or self.family.pooling
        self.width = self.family.head(model).in_features
        self.outputs = self.family.head(model).out_features
        self.branch: nn.ModuleDict | None = None
        self._full: torch.Tensor | None = None  # the whole embedding table while it is compact
        self._used: torch.Tensor | None = None
        self.mask_id: int | None = (
            None  # [MASK] among its (compact) embeddings, where one is needed
        )
        self.early = self.family.last is not None and self.pooling in ("cls", "last")
        if self.family.last is not None and self.early:
            encoder: Any = self.family.encoder(model)
            layer = encoder.encoder.layer[-1]
            layer.forward = functools.partial(self.family.last, layer, layer.forward)

    @property
    def packs(self) -> bool:
        return self.family.packs

    def add_branch(
        self, shared: int, seed: int, init: str = "orthogonal", fixed: bool = False
    ) -> None:
        """Attach `P_s` (d -> shared) and `A_s` (shared -> c), without touching the global RNG.

        `init`: "orthogonal" (rows or columns orthonormal) or "normal" (N(0, 0.02), released).
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            p = nn.Linear(self.width, shared, bias=False)
            a = nn.Linear(shared, self.outputs)
            if init == "orthogonal":
                nn.init.orthogonal_(p.weight)
            else:
                nn.init.normal_(p.weight, std=0.02)
                nn.init.normal_(a.weight, std=0.02)
                nn.init.zeros_(a.bias)
        p.weight.requires_grad_(not fixed)
        self.branch = nn.ModuleDict({"projection": p, "aux_head": a})

    def forward(self, inputs: dict[str, Any]) -> StudentOutput:
        pooled = self.pooled(inputs)
        # one row a text: heads cost nothing, and in fp32 they keep the losses exact under autocast
        with torch.autocast(pooled.device.type, enabled=False):
            h = self.family.transform(self.model, pooled.float())
            logits = self.family.head(self.model)(self.family.dropout(self.model, h))
            if self.branch is None:
                return StudentOutput(logits, h, None, None)
            p = self.branch["projection"](h)
            return StudentOutput(logits, h, p, self.branch["aux_head"](p))

    def pooled(self, inputs: dict[str, Any]) -> torch.Tensor:
        """h_s (n, d): one vector a text from the token vectors (A14)."""
        packing, mask = inputs.get("packing"), inputs.get("attention_mask")
        if packing is not None and self.early:
            at = (packing.first if self.pooling == "cls" else packing.last)[packing.order]
            states = self.family.encoder(self.model)(**inputs, at=at).last_hidden_state[0]
            return torch.empty_like(states).index_copy(0, packing.order, states)
        states = self.family.encoder(self.model)(**inputs).last_hidden_state
        if packing is not None:
            flat = states[0]
            if self.pooling == "mean":
                return text_mean(flat, packing.text, len(packing.first))
            return flat.index_select(0, packing.first if self.pooling == "cls" else packing.last)
        assert mask is not None
        if self.pooling == "mean":
            return (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        if self.pooling == "last":
            return states[torch.arange(len(states), device=states.device), mask.sum(1) - 1]
        return states[:, 0]

    # -- heads ---------------------------------------------------------------------------------

    def centre(self, mean: float | tuple[float, ...]) -> None:
        """Start the heads at the mean training score, so that no step is all clipping; see `centre`."""
        heads: list[Any] = [self.family.head(self.model)]
        if self.branch is not None:
            heads.append(self.branch["aux_head"])
        for head in heads:
            if head.bias is not None:
                centre(head, mean)

    # -- compact vocabulary --------------------------------------------------------------------

    def compact(self, used: np.ndarray) -> torch.Tensor:
        """Keep only the embedding rows in `used`; returns the (vocabulary,) map to new ids.

        Exact, because rows without a gradient never change: embeddings have no weight decay here.
        `expand` puts the trained rows back.
        """
        table = self.model.get_input_embeddings()
        self._full = table.weight.detach().clone()
        self._used = torch.from_numpy(np.unique(used)).to(table.weight.device)
        small = nn.Embedding(len(self._used), table.embedding_dim, device=table.weight.device)
        small.weight.data = table.weight.data[self._used].clone()
        self.model.set_input_embeddings(small)
        remap = torch.zeros(table.num_embeddings, dtype=torch.long)
        remap[self._used.cpu()] = torch.arange(len(self._used))
        return remap

    def expand(self) -> None:
        """Undo `compact`, with the rows as they are now."""
        if self._full is None or self._used is None:
            return
        small = self.model.get_input_embeddings().weight.detach()
        self._full[self._used] = small
        table = nn.Embedding(
            self._full.shape[0], self._full.shape[1], padding_idx=self.model.config.pad_token_id
        )
        table.weight.data = self._full
        self.model.set_input_embeddings(table.to(small.device))
        self._full = self._used = None

    # -- saving --------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a plain `AutoModelForSequenceClassification` checkpoint with the same predictions.

        Raises ValueError when the pooling is not the one that the plain class uses, because that
        checkpoint would predict something else.
        """
        if self.pooling != self.family.pooling:
            raise ValueError(
                f"pooling {self.pooling!r} has no plain {self.model.config.model_type} classifier; train with "
                f"pooling {self.family.pooling!r} to export"
            )
        self.expand()
        config = self.model.config
        kept = config._attn_implementation
        config.problem_type = "regression" if self.regression else "single_label_classification"
        if self.multilabel:
            config.problem_type = "multi_label_classification"
        if self.labels:
            config.id2label = dict(enumerate(self.labels))
            config.label2id = {name: i for i, name in enumerate(self.labels)}
        try:
            self.model.set_attn_implementation("eager" if kept == PACKED else kept)
            self.model.save_pretrained(folder)
        finally:
            self.model.set_attn_implementation(kept)
        self.tokenizer.save_pretrained(folder)


@torch.no_grad()
def centre(head: nn.Linear, value: float | tuple[float, ...]) -> None:
    """Set a head's bias, to one number or to one an output."""
    head.bias.copy_(torch.as_tensor(value, dtype=head.bias.dtype).expand_as(head.bias))


def load(
    spec: StudentSpec,
    outputs: int,
    seed: int,
    regression: bool = False,
    dropout: float | None = None,
) -> Student:
    """The checkpoint behind a student's name, with a fresh head of `outputs` drawn from `seed`.

    `dropout` None keeps the checkpoint's own; 0 makes training deterministic but for its order.
    Raises ValueError for an architecture that is not taken apart here, and for layers to be kept
    that are not there, before weights are read.
    """
    where = profiles.resolve(spec.checkpoint)
    config = transformers.AutoConfig.from_pretrained(where, revision=spec.revision)
    family = FAMILIES[profiles.check(config.model_type, FAMILIES, "student architecture")]
    if spec.layers and max(spec.layers) >= config.num_hidden_layers:
        raise ValueError(
            f"student {spec.name!r} keeps layers {list(spec.layers)}, and {spec.checkpoint} has "
            f"layers 0 to {config.num_hidden_layers - 1}"
        )
    changed: dict[str, Any] = {"num_labels": outputs}
    if dropout is not None:
        names = ("hidden_dropout_prob", "attention_probs_dropout_prob", "dropout", "attention_dropout",
                 "pooler_dropout", "cls_dropout", "classifier_dropout")  # fmt: skip
        changed |= {n: dropout for n in names if getattr(config, n, None) is not None}
    torch.manual_seed(seed)  # the head is drawn from the global generator by transformers
    with quiet.libraries():  # the head is new, as it always is
        model = transformers.AutoModelForSequenceClassification.from_pretrained(
            where, revision=spec.revision, dtype=torch.float32,
            attn_implementation=packed() if family.packs else "eager", **changed,
        )  # fmt: skip
    if spec.layers:
        _cut(family.encoder(model), spec.layers)
    tokenizer = transformers.AutoTokenizer.from_pretrained(where, revision=spec.revision)
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    return Student(model, tokenizer, spec.pooling, regression)


def _cut(encoder: Any, layers: tuple[int, ...]) -> None:
    """Keep these layers of an encoder alone, in place."""
    stack = encoder.encoder.layer if hasattr(encoder, "encoder") else encoder.decoder.layers
    for i in reversed(range(len(stack))):
        if i not in layers:
            del stack[i]
    for i, layer in enumerate(stack):  # some count themselves, to find their place in a cache
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = i
    encoder.config.num_hidden_layers = len(stack)


def limit(student: Student, max_length: int) -> int:
    """The text length in tokens that the student can read, at most `max_length`."""
    config = student.model.config
    known = (getattr(config, "max_position_embeddings", None), student.tokenizer.model_max_length)
    return min([max_length, *(int(k) for k in known if k and k < math.inf and k < 1 << 30)])


def tokenise(
    student: Student, first: list[str], second: list[str] | None, max_length: int
) -> tuple[list[np.ndarray], list[np.ndarray] | None, int]:
    """(token ids (t,) of every text, token types (t,) or None, how many texts `max_length` cut)."""
    tok, cap = student.tokenizer, limit(student, max_length)
    full = tok(first, second, truncation=True, max_length=cap, return_overflowing_tokens=False)
    ids = [np.asarray(x, dtype=np.int32) for x in full["input_ids"]]
    # a text is cut only if it reaches the cap: count those again without the cap
    at_cap = [i for i, x in enumerate(ids) if len(x) >= cap]
    cut = 0
    if at_cap:
        pick = lambda xs: None if xs is None else [xs[i] for i in at_cap]
        whole = tok(pick(first), pick(second), truncation=False, verbose=False)["input_ids"]
        cut = sum(len(x) > cap for x in whole)
    types = full.get("token_type_ids")
    if types is not None and "token_type_ids" in tok.model_input_names:
        types = [np.asarray(x, dtype=np.int32) for x in types]
    else:
        types = None
    return ids, types, cut
