"""What a student minimises. One entry a method; `METHODS[name].build(setting, student)`.

To add one: write a class with `losses` (see `base.Method`) and add an entry here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Literal, NamedTuple

from armada_lib.methods.armada import READINGS, Armada, Reading
from armada_lib.methods.base import Mentor, Method, Phase, Setting, Terms
from armada_lib.methods.generation import ArmadaGeneration
from armada_lib.methods.kd import KD, PKD, RCO, ContinuationKD
from armada_lib.methods.metadistil import MetaDistil
from armada_lib.methods.mutual import DML, ProKT
from armada_lib.methods.rail import Rail
from armada_lib.methods.sftn import SFTNTeacher
from armada_lib.methods.tinybert import TinyBERT
from armada_lib.students import Student

Vectors = Literal["real", "shuffled", "random"]


class Entry(NamedTuple):
    """How a method is built and what it needs."""

    build: Callable[[Setting, Student], Method]
    about: str
    vectors: Vectors | None = None  # what the aligner reads; None = there is no aligner
    distils: bool = True  # has loss weights, a manifold loss and a reading
    # what it needs of its mentor: logits, anchors, cls, means, model (fine-tuned), start (not yet),
    # assistant (the mentor is distilled itself), branches (it was fine-tuned with the student's),
    # responses (its answers to the training prompts; only for students that generate)
    mentor: tuple[str, ...] = ()
    # its alpha, beta, gamma, tau where a profile does not say otherwise: the source's, if it gives any
    weights: Mapping[str, float] = MappingProxyType({})


def _armada(setting: Setting, student: Student, **options: bool) -> Armada:
    kind = ArmadaGeneration if setting.kind == "generation" else Armada
    return kind(setting, student, **options)


def _baseline(
    build: Callable[[Setting, Student], Method], about: str, *mentor: str, **weights: float
) -> Entry:
    return Entry(build, about, distils=False, mentor=mentor, weights=weights)


_HALF = {"alpha": 0.5, "tau": 5.0}  # as ARMADA's own, appendix C
_PKD = _HALF | {"beta": 100.0}  # the authors' best runs: 8 to 500


def _friendly(setting: Setting, student: Student) -> SFTNTeacher:
    assert setting.mentor is not None  # the student to be, whose layers become the branches
    return SFTNTeacher(setting, student, setting.mentor.start())


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
    "kd": _baseline(KD, "the mentor's softened predictions", "logits", **_HALF),
    "pkd_skip": _baseline(PKD, "KD, and every second inner layer", "logits", "cls", **_PKD),
    "pkd_last": _baseline(
        lambda s, m: PKD(s, m, last=True), "KD, and the last inner layers", "logits", "cls", **_PKD
    ),
    "tinybert": _baseline(TinyBERT, "attention and layers, then predictions", "logits", "model"),
    "rco": _baseline(RCO, "KD from checkpoints of the mentor's way", "anchors", **_HALF),
    "takd": _baseline(
        KD, "KD from an assistant that the mentor distilled", "logits", "assistant", **_HALF
    ),
    "dml": _baseline(DML, "two that learn from each other", "start", alpha=1.0),
    # the authors' weight for MNLI
    "prokt": _baseline(ProKT, "a teacher that stays near its student", "start", alpha=0.4),
    "sftn": _baseline(
        KD, "KD from a mentor tuned with the student's branches", "logits", "branches", **_HALF
    ),
    "sftn_mentor": _baseline(
        _friendly, "the first stage of sftn: that mentor", "start", beta=3.0, gamma=1.0, tau=1.0
    ),
    # the authors' script
    "metadistil": _baseline(
        MetaDistil, "a teacher that learns to teach", "model", alpha=0.5, beta=100.0, tau=5.0
    ),
    # tau is T_max; gamma the margin, which the source does not give
    "continuation_kd": _baseline(
        ContinuationKD, "from damped logits to labels", "logits", gamma=0.1, tau=10.0
    ),
    "rail_kd": _baseline(  # a third each
        Rail, "KD, and random inner layers", "logits", "means", alpha=0.333, beta=0.333, tau=5.0
    ),
    "seqkd": _baseline(Method, "the mentor's responses in the place of the data's", "responses"),
}

# For students that generate. `layers_only` is not among them: the added heads reconstruct the
# teacher's vector (A31), so that without one nothing is added to the loss.
GENERATING = ("undistilled", "armada", "shuffled", "random", "frozen_aligner", "seqkd")

# The methods of Table 7 as it prints them.
TABLE_7 = {
    "KD": "kd", "PKD": "pkd_skip", "TinyBERT": "tinybert", "RCO": "rco", "TAKD": "takd", "DML": "dml",
    "ProKT": "prokt", "SFTN": "sftn", "MetaDistil": "metadistil", "Continuation KD": "continuation_kd",
    "Rail KD": "rail_kd", "ARMADA": "armada",
}  # fmt: skip

__all__ = [
    "GENERATING",
    "METHODS",
    "READINGS",
    "TABLE_7",
    "Armada",
    "Entry",
    "Mentor",
    "Method",
    "Phase",
    "Reading",
    "Setting",
    "Terms",
    "Vectors",
]
