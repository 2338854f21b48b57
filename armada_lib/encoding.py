"""A student and its task's examples as tokens: what every run on labelled examples begins with."""

from __future__ import annotations

import logging
from typing import NamedTuple

import numpy as np
import torch

from armada_lib import profiles, students
from armada_lib.batching import Encoded
from armada_lib.methods import METHODS
from armada_lib.results import RunSpec
from armada_lib.run_data import examples
from armada_lib.students import Student

log = logging.getLogger(__name__)


class Splits(NamedTuple):
    """Both splits as tokens; `cut`: texts that are too long; `used`: the token ids that occur."""

    train: Encoded
    held: Encoded
    cut: int
    used: np.ndarray


def student(s: RunSpec) -> Student:
    """The untrained student of a run, with a new head."""
    task, who = examples(s)[0].task, profiles.load(s.profile).student(s.student)
    found = students.load(who, task.outputs, s.seed, task.kind == "regression", s.training.dropout)
    found.labels, found.multilabel = task.labels, task.kind == "multilabel"
    return found


def encode(s: RunSpec, student: Student) -> Splits:
    """The run's examples as this student reads them, which keeps the embeddings of their tokens."""
    train, held = examples(s)
    longest = s.training.max_length
    ids, types, cut = students.tokenise(student, train.first, train.second, longest)
    held_ids, held_types, held_cut = students.tokenise(student, held.first, held.second, longest)
    if cut or held_cut:
        log.warning(
            "%s: %d training and %d evaluation texts are cut at %d tokens",
            train.task.title,
            cut,
            held_cut,
            longest,
        )
    used, new, padding = _compact(student, [*ids, *held_ids], METHODS[s.method].masks)
    parts = [
        Encoded(
            [new[i] for i in tokens],
            kinds,
            torch.from_numpy(e.labels),
            e.per_example,
            padding,
        )
        for tokens, kinds, e in ((ids, types, train), (held_ids, held_types, held))
    ]
    return Splits(parts[0], parts[1], cut + held_cut, used)


def corpus(s: RunSpec, student: Student) -> Encoded:
    """The training texts alone, each on its own and without a label, for a stage of pre-training.

    The student keeps the embeddings of their tokens and of [MASK]: what is only evaluated has no part.
    """
    train = examples(s)[0]
    ids, types, _ = students.tokenise(student, train.first, train.second, s.training.max_length)
    _, new, padding = _compact(student, ids, masks=True)
    return Encoded([new[i] for i in ids], types, torch.zeros(len(ids)), 1, padding)


def _compact(
    student: Student, texts: list[np.ndarray], masks: bool
) -> tuple[np.ndarray, np.ndarray, int]:
    """(token ids that are kept, new id of each old one, new id of the padding); sets `mask_id`."""
    padding, mask = student.model.config.pad_token_id or 0, student.tokenizer.mask_token_id
    if masks and mask is None:
        raise ValueError("the student's tokenizer has no [MASK], which a masked-word loss needs")
    used = np.unique(np.concatenate([*texts, np.array([padding, *([mask] if masks else [])])]))
    new = student.compact(used).numpy().astype(np.int32)
    student.mask_id = int(new[mask]) if masks else None
    return used, new, int(new[padding])
