"""Mentors: fine-tuned language models that students learn from, made once and kept in the store.

`prepare` makes what runs need of them, `load` reads it. A mentor is an ordinary run, described by
`specs.mentor_of`; besides its Result, `mentors/<key of that run>/` holds its weights after every
epoch and what it says of the training examples, one file each, complete or absent. Row i belongs to
example (or text) i of the data that the run's `data_id` names.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

from armada_lib import autocast, encoding, run_data, specs
from armada_lib.batching import Batch, Encoded
from armada_lib.evaluation import EVAL_BATCH
from armada_lib.extraction import every
from armada_lib.files import Damaged, keep_tensors, kept_tensors
from armada_lib.methods import METHODS
from armada_lib.methods.base import texts
from armada_lib.methods.layers import Watch
from armada_lib.results import Result, RunSpec, RunStore
from armada_lib.students import Student

log = logging.getLogger(__name__)

SAID = ("logits", "anchors", "cls", "means")  # see `methods.base.Mentor`
Train = Callable[..., Result]  # `runs.compute`: trains and evaluates a run


class Stored:
    """A `methods.base.Mentor`, made by run `spec`. Reads, or computes, only what is asked for.

    `cls` and `means` take 2 (layers + 1) d bytes a text: 20 KB for BERT-base.
    """

    def __init__(self, spec: RunSpec, store: RunStore):
        self.spec, self.store = spec, store
        self.folder = store.root / "mentors" / spec.key

    # -- what a method reads -------------------------------------------------------------------

    @cached_property
    def logits(self) -> Tensor:
        return self._said("logits")["0"]

    @cached_property
    def anchors(self) -> list[Tensor]:
        found = self._said("anchors")
        return [found[str(i)] for i in range(len(found))]

    @cached_property
    def cls(self) -> Tensor:
        return self._said("cls")["0"]

    @cached_property
    def means(self) -> Tensor:
        return self._said("means")["0"]

    @property
    def data(self) -> Encoded:
        return self._begun[0].train

    @property
    def layers(self) -> int:
        return self._begun[1]

    @property
    def width(self) -> int:
        return self._begun[2]

    def start(self) -> Student:
        student = encoding.student(self.spec)
        student.compact(self._begun[0].used)
        if student.regression:
            student.centre(float(self.data.labels.mean()))
        elif student.multilabel:
            student.centre(run_data.examples(self.spec)[0].start)
        return student

    def tuned(self) -> Student:
        """Raises `Damaged` or FileNotFoundError if its weights are not there."""
        return self._after(self.last)

    # -- what is kept --------------------------------------------------------------------------

    @cached_property
    def _begun(self) -> tuple[encoding.Splits, int, int]:
        """Its data as tokens; number of layers and width."""
        student = encoding.student(self.spec)
        config = student.model.config
        return encoding.encode(self.spec, student), config.num_hidden_layers, config.hidden_size

    @cached_property
    def last(self) -> int:
        """The epoch whose weights it ended with: the last, or the first of the best."""
        result = self.store.load(self.spec.key)
        if result is None:
            raise FileNotFoundError(f"the mentor {self.spec.student} {self.spec.label} is not made")
        scores = [e.get("score", e["epoch"]) for e in result.facts["epochs"]]
        return int(np.argmax(scores))

    def lock(self) -> FileLock:
        return self.store.lock(f"mentor-{self.spec.key}")

    def epoch(self, number: int) -> Path:
        """The file of its weights after this epoch."""
        return self.folder / f"epoch-{number}.safetensors"

    def file(self, what: str) -> Path:
        return self.folder / f"{what}.safetensors"

    def whole(self) -> bool:
        """Is it fine-tuned, and all of its way there?"""
        if self.store.load(self.spec.key) is None:
            return False
        return all(self.epoch(i).exists() for i in range(self.last + 1))

    def keep(self, student: Student, number: int) -> None:
        """Write the student's trained weights after an epoch."""
        named = student.model.named_parameters()
        found = {k: v.detach().cpu().contiguous() for k, v in named if v.requires_grad}
        write(self.epoch(number), found, self.spec)

    def _after(self, number: int) -> Student:
        """A fresh copy with its weights after this epoch."""
        student, found = self.start(), read(self.epoch(number), self.spec)
        with torch.no_grad():
            for name, value in student.model.named_parameters():
                if value.requires_grad:
                    value.copy_(found[name])
        return student

    # -- what it says of the training examples -------------------------------------------------

    def _said(self, what: str) -> dict[str, Tensor]:
        try:
            return read(self.file(what), self.spec)
        except (Damaged, FileNotFoundError) as e:
            log.warning("%s: computed again", e)
        with self.lock():
            if not self.file(what).exists():  # another worker may have made it by now
                self.compute(what)
        return read(self.file(what), self.spec)

    def compute(self, what: str) -> None:
        """Compute one of `SAID` on the training examples, in evaluation mode, and keep it."""
        if what in ("logits", "anchors"):
            epochs = range(self.last + 1) if what == "anchors" else [self.last]
            say = lambda student, batch: student(batch.inputs).logits.float()
            found = {str(n): self._pass(self._after(i), say) for n, i in enumerate(epochs)}
        else:
            student = self.tuned()
            watch = Watch(student, whole=what == "means", always=True)

            def state(student: Student, batch: Batch) -> Tensor:
                student(batch.inputs)
                seen = watch.first if what == "cls" else watch.mean
                return seen(batch.inputs).half()

            found = {"0": self._pass(student, state)}
        write(self.file(what), found, self.spec)

    @torch.no_grad()
    def _pass(self, student: Student, say: Callable[[Student, Batch], Tensor]) -> Tensor:
        """What `say` returns for each text, a row each, in the order of the data."""
        data, device = self.data, specs.device()
        student.to(device).eval()
        order = np.argsort(-data.lengths.reshape(len(data), -1).max(1), kind="stable")
        found: Tensor | None = None
        for i in range(0, len(order), EVAL_BATCH):
            batch = data.batch(order[i : i + EVAL_BATCH], student.packs).to(device)
            bf16 = self.spec.training.precision == "bf16"
            with autocast.to_bf16(device, bf16):
                rows = say(student, batch).cpu()
            if found is None:
                found = rows.new_empty(len(data.tokens), *rows.shape[1:])
            found[torch.from_numpy(texts(batch, data.per_example))] = rows
        assert found is not None
        return found


# -- making and finding ------------------------------------------------------------------------


def load(s: RunSpec, store: RunStore) -> Stored:
    """The mentor of run `s`, made by `prepare`; ValueError if its profile now describes another."""
    return Stored(_mentor(s), store)


def prepare(
    wanted: Iterable[RunSpec],
    store: RunStore,
    train: Train,
    workers: int = 1,
    progress: bool = True,
) -> int:
    """Make what these runs need of their mentors and the store lacks; returns how many lacked some.

    `train` is `runs.compute`. Safe beside other workers: one makes a mentor, the others wait; a
    killed fine-tuning goes on. The mentors' own Results are stored as well. ValueError for a run
    whose profile now describes another mentor.
    """
    count = 0
    for level in _levels(wanted, store):
        todo = [(m, needs) for m, needs in level.values() if not _there(m, needs)]
        count += len(todo)
        jobs = [
            (f"{m.spec.student} {m.spec.label}", (m.spec, needs, store.root, train))
            for m, needs in todo
        ]
        every(_make, jobs, workers, "mentor", progress)
    return count


def lacking(wanted: Iterable[RunSpec], store: RunStore) -> list[RunSpec]:
    """The mentors' runs that `prepare` would have work with."""
    levels = _levels(wanted, store)
    return [m.spec for level in levels for m, needs in level.values() if not _there(m, needs)]


def _levels(wanted: Iterable[RunSpec], store: RunStore) -> list[dict[str, tuple[Stored, set[str]]]]:
    """The mentors of these runs by key, with what is needed of each; a mentor's mentor comes first."""
    found: list[dict[str, tuple[Stored, set[str]]]] = []

    def visit(s: RunSpec) -> int:
        needs = METHODS[s.method].mentor
        if not needs:
            return 0
        m = _mentor(s)
        depth = visit(m)
        found.extend({} for _ in range(depth + 1 - len(found)))
        found[depth].setdefault(m.key, (Stored(m, store), set()))[1].update(needs)
        return depth + 1

    for s in wanted:
        visit(s)
    return found


def _mentor(s: RunSpec) -> RunSpec:
    m = specs.mentor_of(s)
    if m.key != s.mentor_id or m.data_id != s.data_id:
        raise ValueError(
            f"{s.label} names the mentor {s.mentor_id}, but this profile now describes {m.key}: "
            "make the specification anew"
        )
    return m


def _there(mentor: Stored, needs: set[str]) -> bool:
    """Is all there? Caches are not read: a damaged one is found, and computed again, by its reader."""
    if not needs & {*SAID, "model"}:
        return True  # nothing of its fine-tuning
    if not mentor.whole() or not all(mentor.file(w).exists() for w in SAID if w in needs):
        return False
    if "model" in needs:
        try:
            read(mentor.epoch(mentor.last), mentor.spec)
        except Damaged:
            return False
    return True


def _make(m: RunSpec, needs: set[str], root: Path, train: Train) -> None:
    """Fine-tune one mentor, unless that is done, and compute what is needed of it."""
    store = RunStore(root)
    store.check()
    mentor = Stored(m, store)
    with mentor.lock():
        mentor.folder.mkdir(parents=True, exist_ok=True)
        for left in mentor.folder.glob("*.tmp"):  # of a killed process
            left.unlink()
        for again in (False, True):
            try:
                if not mentor.whole():
                    store.save(train(m, store, state=mentor.file("state"), after_epoch=mentor.keep))
                for what in SAID:
                    if what in needs and not mentor.file(what).exists():
                        mentor.compute(what)
                return
            except Damaged as e:
                if again:
                    raise
                log.warning("%s: fine-tuned again", e)


# -- files -------------------------------------------------------------------------------------


def write(path: Path, tensors: dict[str, Tensor], m: RunSpec) -> None:
    """A file of run `m`'s mentor, complete or absent, with a digest of its contents."""
    keep_tensors(path, tensors, _about(m), f"a file of the mentor {m.student}")


def read(path: Path, m: RunSpec) -> dict[str, Tensor]:
    """The tensors of a file of run `m`'s mentor. Raises FileNotFoundError and `Damaged`."""
    return kept_tensors(path, _about(m))


def _about(m: RunSpec) -> dict[str, str]:
    return {"mentor": m.key, "data": m.data_id}
