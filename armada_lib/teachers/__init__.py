"""Frozen teachers: a text becomes one vector. `load` a teacher, or ask for its `fingerprint`.

A teacher has `name`, `width`, `fingerprint` and `encode(texts) -> float16 array (n, width)`. The
vector of a text depends on that text only: not on its neighbours, its place in the list or the
number of processes.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from armada_lib.teacher_settings import TeacherSpec


class Teacher(Protocol):
    """What the rest of the library may rely on."""

    name: str
    width: int
    fingerprint: str

    def encode(self, texts: list[str]) -> np.ndarray: ...

    def truncated(self, texts: list[str]) -> int: ...


def _module(spec: TeacherSpec) -> Any:
    """The module of the teacher's kind: it has `fingerprint(spec, device)` and `load(spec, device)`."""
    return importlib.import_module(f"armada_lib.teachers.{spec.kind}")


def load(spec: TeacherSpec, device: str = "cpu") -> Teacher:
    """The teacher behind `spec`, frozen, on `device` ("cpu" or "cuda").

    Raises ValueError for settings that do not fit the checkpoint and FileNotFoundError, with the
    command that gets them, for weights that are not there.
    """
    return _module(spec).load(spec, device)


def fingerprint(spec: TeacherSpec, device: str = "cpu") -> str:
    """Hash of everything that changes the vectors, computed without loading weights."""
    return _module(spec).fingerprint(spec, device)


def refused(spec: TeacherSpec, texts: Sequence[str], device: str = "cpu") -> set[str]:
    """Texts known to get no vector, because a black box would not answer them; asks for nothing."""
    module = _module(spec)
    return set(module.refused(spec, texts, device)) if hasattr(module, "refused") else set()
