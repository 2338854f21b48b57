"""What happens inside a BERT: token vectors after every layer, and attention scores before softmax.

Methods that match layers put a `Watch` on a student. It reads packed batches as they are: nothing is
padded but the attention scores, group by group, and no slower kind of attention is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from armada_lib.families import text_mean
from armada_lib.packing import padded
from armada_lib.students import Student

WATCHED = ("bert",)


def layer_map(student: int, mentor: int) -> list[int]:
    """Mentor layer for each student layer 0..`student`, spread evenly: round(l mentor / student).

    Layer 0 is the embeddings; the last goes to the last. 6 of 12 gives 0, 2, 4, ..., 12.
    """
    return [int(i * mentor / student + 0.5) for i in range(student + 1)]


def bert(student: Student) -> Any:
    """The student's encoder, a BertModel; ValueError for an architecture with other layers."""
    kind = student.model.config.model_type
    if kind not in WATCHED:
        raise ValueError(
            f"layers of {kind!r} students cannot be watched; valid: {', '.join(WATCHED)}"
        )
    return student.family.encoder(student.model)


class _Tap:
    """A hook that belongs to its model alone: in a copy or a pickle of the model it does nothing."""

    def __init__(self, note: Callable[[Any], None] | None = None):
        self.note = note

    def __call__(self, module: Any, args: Any, out: Any = None) -> None:
        if self.note is not None:
            self.note(out)

    def __reduce__(self) -> tuple[type[_Tap], tuple[()]]:
        return _Tap, ()


class Watch:
    """Keeps what the student's latest training forward passed through, with its graph.

    `states`: L + 1 tensors, (1, T, d) packed or (b, t, d) padded; 0 is after the embeddings. The last
    of a packed batch is (1, n, d), the pooled tokens alone, unless `whole` asks for every token
    (which costs the time that `Student.early` saves, in training only). `attention` keeps queries and
    keys too. `always` watches evaluation as well, for a model that is only read. With `on = False`
    it rests. `inputs` below are those of that forward; n texts come in the order of its output.

    Raises ValueError for an architecture whose layers are not known here.
    """

    def __init__(
        self, student: Student, whole: bool = False, attention: bool = False, always: bool = False
    ):
        encoder = bert(student)
        self.student, self.whole, self.always, self.on = student, whole, always, True
        self.layers, self.width = len(encoder.encoder.layer), encoder.config.hidden_size
        self.heads = encoder.config.num_attention_heads
        self.states: list[Tensor] = []
        self._queries: list[Tensor] = []
        self._keys: list[Tensor] = []
        self._early, self._active = student.early, False
        places = [(m, self.states) for m in (encoder.embeddings, *encoder.encoder.layer)]
        if attention:
            for layer in encoder.encoder.layer:
                own = layer.attention.self
                places += [(own.query, self._queries), (own.key, self._keys)]
        self._handles = [student.register_forward_pre_hook(_Tap(self._begin))]
        self._handles += [m.register_forward_hook(_Tap(self._note(kept))) for m, kept in places]

    def _begin(self, _: Any) -> None:
        """Forget the forward before; decide whether this one is watched."""
        for kept in (self.states, self._queries, self._keys):
            kept.clear()
        self._active = self.on and (self.always or self.student.training)
        if self.whole:
            self.student.early = self._early and not self._active

    def _note(self, kept: list[Tensor]) -> Callable[[Any], None]:
        return lambda out: kept.append(out) if self._active else None

    def close(self) -> None:
        """Remove every hook; the student is as it was."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.on = False
        self._begin(None)

    def _pick(self, layers: Iterable[int] | None, inputs: dict[str, Any], whole: bool) -> list[Any]:
        """(states, is it every token?) of these layers."""
        if len(self.states) != self.layers + 1:
            raise ValueError(
                "no forward was watched: the student was not in training mode (Watch(always=True) "
                "watches evaluation, too)"
            )
        length = inputs["input_ids"].shape[1]
        chosen = range(self.layers + 1) if layers is None else layers
        found = [(self.states[i], self.states[i].shape[1] == length) for i in chosen]
        if (whole or self.student.pooling != "cls") and not all(full for _, full in found):
            raise ValueError(
                "the last layer was computed at the pooled tokens alone; use Watch(whole=True)"
            )
        return found

    def first(self, inputs: dict[str, Any], layers: Iterable[int] | None = None) -> Tensor:
        """First-token vector of each text after these layers (default all, 0..L): (n, layers, d)."""
        packing, rows = inputs.get("packing"), []
        for x, full in self._pick(layers, inputs, whole=False):
            if packing is None:
                rows.append(x[:, 0])
            elif full:
                rows.append(x[0].index_select(0, packing.first))
            else:
                rows.append(torch.empty_like(x[0]).index_copy(0, packing.order, x[0]))
        return torch.stack(rows, 1).float()

    def mean(self, inputs: dict[str, Any], layers: Iterable[int] | None = None) -> Tensor:
        """Mean over each text's tokens after these layers (default all, 0..L): (n, layers, d)."""
        packing = inputs.get("packing")
        found = [x for x, _ in self._pick(layers, inputs, whole=True)]
        x = torch.cat(found, -1).float()
        if packing is not None:
            mean = text_mean(x[0], packing.text, len(packing.first))
        else:
            mask = inputs["attention_mask"][..., None]
            mean = (x * mask).sum(1) / mask.sum(1)
        return mean.view(len(mean), len(found), self.width)

    def scores(self, inputs: dict[str, Any], layer: int) -> list[Tensor]:
        """Q K^T / sqrt(d_head) of layer 1..L, before any mask: one (texts, heads, m, m) a group.

        A packed batch has a tensor for each of its length groups, in the order of `packing.groups`;
        a padded batch has one. Where query or key is padding, the score is 0.
        """
        if len(self._queries) != self.layers:
            raise ValueError("no scores were watched; use Watch(attention=True) in training mode")
        q, k = self._queries[layer - 1].float(), self._keys[layer - 1].float()
        if q.shape != k.shape:
            raise ValueError(
                "the last layer has queries for the pooled tokens alone; use Watch(whole=True)"
            )
        packing, width = inputs.get("packing"), self.width // self.heads
        if packing is not None:
            split = [x[0].split(packing.sizes) for x in (q, k)]
            groups = [
                [padded(x, g, self.heads, width) for x in both]
                for g, *both in zip(packing.groups, *split, strict=True)
            ]
        else:
            mask = inputs["attention_mask"][..., None]
            heads = lambda x: (x * mask).unflatten(2, (self.heads, width)).transpose(1, 2)
            groups = [[heads(q), heads(k)]]
        # autocast would round what TinyBERT compares
        with torch.autocast(q.device.type, enabled=False):
            return [a @ b.transpose(2, 3) * width**-0.5 for a, b in groups]


def pairs(inputs: dict[str, Any]) -> Tensor:
    """Number of (query, key) pairs of real tokens in the batch, a sum of squared lengths; 0-d."""
    packing = inputs.get("packing")
    if packing is None:
        return inputs["attention_mask"].sum(1).square().sum()
    return torch.bincount(packing.text, minlength=len(packing.first)).square().sum()
