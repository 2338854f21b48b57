"""What a student minimises. One entry a method; `METHODS[name].build(setting, student)`.

To add one: write a class with `losses` (see `base.Method`) and add an entry here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

from armada_lib.methods.armada import READINGS, Armada, Reading
from armada_lib.methods.base import Method, Phase, Setting, Terms
from armada_lib.methods.generation import ArmadaGeneration
from armada_lib.students import Student

Vectors = Literal["real", "shuffled", "random"]


class Entry(NamedTuple):
    """How a method is built and what it needs."""

    build: Callable[[Setting, Student], Method]
    about: str
    vectors: Vectors | None = None  # what the aligner reads; None = there is no aligner
    distils: bool = True  # has loss weights, a manifold loss and a reading


def _armada(setting: Setting, student: Student, **options: bool) -> Armada:
    kind = ArmadaGeneration if setting.kind == "generation" else Armada
    return kind(setting, student, **options)


METHODS: dict[str, Entry] = {
    "undistilled": Entry(Method, "the student alone", distils=False),
    "armada": Entry(_armada, "the paper's method", "real"),
    "shuffled": Entry(_armada, "control: each text gets another text's teacher vector", "shuffled"),
    "random": Entry(_armada, "control: noise with the teacher's mean and spread", "random"),
    "layers_only": Entry(
        lambda s, m: _armada(s, m, aligned=False), "control: the added layers, no teacher"
    ),
    "frozen_aligner": Entry(
        lambda s, m: _armada(s, m, frozen=True),
        "control: the aligner stays at its random start",
        "real",
    ),
}

__all__ = [
    "METHODS",
    "READINGS",
    "Armada",
    "Entry",
    "Method",
    "Phase",
    "Reading",
    "Setting",
    "Terms",
    "Vectors",
]
