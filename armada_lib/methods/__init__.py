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
from armada_lib.methods.guidance import VisualGuidance
from armada_lib.methods.kd import KD, PKD, RCO, ContinuationKD
from armada_lib.methods.metadistil import MetaDistil
from armada_lib.methods.mutual import DML, ProKT
from armada_lib.methods.pretraining import VLBERT, ViLBERT, VisualBERT
from armada_lib.methods.rail import Rail
from armada_lib.methods.sftn import SFTNTeacher
from armada_lib.methods.tinybert import TinyBERT
from armada_lib.methods.vidlankd import VidLanKD
from armada_lib.methods.visual import Stage
from armada_lib.methods.voken import Vokenization
from armada_lib.methods.xadapter import XAdapter
from armada_lib.profiles import Training
from armada_lib.students import Student

Vectors = Literal["real", "shuffled", "random", "constant"]


class Entry(NamedTuple):
    """How a method is built and what it needs."""

    build: Callable[[Setting, Student], Method]
    about: str
    vectors: Vectors | None = (
        None  # what the aligner, or a stage, reads of a teacher; None: nothing
    )
    distils: bool = True  # has loss weights, a manifold loss and a reading
    # what it needs of its mentor: logits, anchors, cls, means, model (fine-tuned), start (not yet),
    # assistant (the mentor is distilled itself), branches (it was fine-tuned with the student's),
    # responses (its answers to the training prompts; only for students that generate)
    mentor: tuple[str, ...] = ()
    # its alpha, beta, gamma, tau where a profile does not say otherwise: the source's, if it gives any
    weights: Mapping[str, float] = MappingProxyType({})
    # pre-training on the training texts and their pictures, before `build` fine-tunes on text alone
    stage: type[Stage] | None = None
    teacher: Literal["video", "frames"] | None = None  # of `blocks.Pictured`; None: the run's own
    masks: bool = False  # it masks words in fine-tuning
    # ValueError for settings with which it cannot work: of the stage, if there is one
    check: Callable[[Training, int, int | None], None] = lambda training, width, channels: None


def _armada(setting: Setting, student: Student, **options: bool) -> Armada:
    kind = ArmadaGeneration if setting.kind == "generation" else Armada
    return kind(setting, student, **options)


def _baseline(
    build: Callable[[Setting, Student], Method], about: str, *mentor: str, **weights: float
) -> Entry:
    return Entry(build, about, distils=False, mentor=mentor, weights=weights)


def _staged(
    stage: type[Stage], about: str, teacher: Literal["video", "frames"] | None = None
) -> Entry:
    return Entry(Method, about, "real", False, stage=stage, teacher=teacher, check=stage.check)


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
    "constant": Entry(_armada, "control: the mean teacher vector for every text", "constant"),
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
    "vilbert": _staged(ViLBERT, "pre-trained with pictures, two streams that look at each other"),
    "vlbert": _staged(VLBERT, "pre-trained with pictures, one stream of words and regions"),
    "visualbert": _staged(VisualBERT, "pre-trained with pictures, one stream and a match"),
    "img_voken": _staged(Vokenization, "pre-trained to name the picture nearest to each word"),
    "vid_voken_resnet": _staged(Vokenization, "the same with first frames of videos", "video"),
    "vid_voken_clip": _staged(Vokenization, "the same with features of frames", "frames"),
    "vidlankd_resnet": _staged(VidLanKD, "pre-trained by a teacher that saw first frames", "video"),
    "vidlankd_clip": _staged(VidLanKD, "the same with features of frames", "frames"),
    "visual_guidance": Entry(
        VisualGuidance, "texts look at pictures of their words", "real", distils=False
    ),
    "x_adapter": Entry(
        XAdapter, "adapters that read a text encoder", distils=False, masks=True,
        check=lambda training, width, channels: XAdapter.check(training, None, None),
    ),
    "x_adapter_pictures": Entry(
        lambda s, m: XAdapter(s, m, pictures=True), "adapters that read the text's picture", "real",
        distils=False, masks=True, check=XAdapter.check,
    ),
}  # fmt: skip

# For students that generate. `layers_only` is not among them: the added heads reconstruct the
# teacher's vector (A31), so that without one nothing is added to the loss.
GENERATING = (
    "undistilled", "armada", "shuffled", "random", "constant", "frozen_aligner", "seqkd",
)  # fmt: skip

# The methods of Table 7 as it prints them.
TABLE_7 = {
    "KD": "kd", "PKD": "pkd_skip", "TinyBERT": "tinybert", "RCO": "rco", "TAKD": "takd", "DML": "dml",
    "ProKT": "prokt", "SFTN": "sftn", "MetaDistil": "metadistil", "Continuation KD": "continuation_kd",
    "Rail KD": "rail_kd", "ARMADA": "armada",
}  # fmt: skip

# The methods of Table 8. Its Vid-Vokens are read as vokenization with videos; they may as well be
# VidLanKD itself (`vidlankd.VidLanKD`), which is therefore an entry of its own.
TABLE_8 = {
    "ViLBERT": "vilbert", "VL-BERT": "vlbert", "VisualBERT": "visualbert", "Img-Voken": "img_voken",
    "Visual Guidance": "visual_guidance", "Vid-Voken w/ResNet": "vid_voken_resnet",
    "Vid-Voken w/CLIP": "vid_voken_clip", "X-adapter": "x_adapter", "ARMADA": "armada",
}  # fmt: skip
# All that read pictures, or what stands for them, and are not ARMADA.
MULTIMODAL = (
    *(m for m in TABLE_8.values() if m != "armada"),
    "vidlankd_resnet", "vidlankd_clip", "x_adapter_pictures",
)  # fmt: skip

__all__ = [
    "GENERATING",
    "METHODS",
    "MULTIMODAL",
    "READINGS",
    "TABLE_7",
    "TABLE_8",
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
