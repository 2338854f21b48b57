"""Frozen teachers: a text becomes one vector. `load` a teacher, or ask for its `fingerprint`.

A teacher has `name`, `width`, `fingerprint` and `encode(texts) -> float16 array (n, width)`. The
vector of a text depends on that text only: not on its neighbours, its place in the list or the
number of processes.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from armada_lib.profiles import TeacherSpec
from armada_lib.teachers import image

KINDS = {"image": image}  # kind -> module with `fingerprint(spec, device)` and `load(spec, device)`


class Teacher(Protocol):
    """What the rest of the library may rely on."""

    name: str
    width: int
    fingerprint: str

    def encode(self, texts: list[str]) -> np.ndarray: ...

    def truncated(self, texts: list[str]) -> int: ...


def _module(spec: TeacherSpec):
    if spec.kind not in KINDS:
        raise ValueError(
            f"teacher {spec.name!r} is of kind {spec.kind!r}, which this version cannot run; "
            f"kinds it can run: {', '.join(sorted(KINDS))}"
        )
    return KINDS[spec.kind]


def load(spec: TeacherSpec, device: str = "cpu") -> Teacher:
    """The teacher behind `spec`, frozen, on `device` ("cpu" or "cuda").

    Raises ValueError for settings that do not fit the checkpoint and FileNotFoundError, with the
    command that gets them, for weights that are not there.
    """
    return _module(spec).load(spec, device)


def fingerprint(spec: TeacherSpec, device: str = "cpu") -> str:
    """Hash of everything that changes the vectors, computed without loading weights."""
    return _module(spec).fingerprint(spec, device)
