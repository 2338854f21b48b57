"""From names to complete, validated `RunSpec`s; whatever is wrong shows here, before any work."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from armada_lib import engine, gentasks, profiles, teachers
from armada_lib.blocks import Baselines, Pictured
from armada_lib.methods import GENERATING, METHODS, MULTIMODAL, READINGS
from armada_lib.methods.layers import WATCHED
from armada_lib.profiles import MANIFOLDS, Profile, StudentSpec, TeacherSpec, Training
from armada_lib.results import RunSpec
from armada_lib.run_data import read, suite_of, task_of

# What a mentor's fine-tuning takes from its student's settings: the data and the budget. Its learning
# rate is the profile's own for it, so that a search over the student's leaves one mentor a task.
SHARED = (
    "epochs", "batch_size", "weight_decay", "warmup", "schedule", "clip", "max_length", "train_size",
    "eval_size", "split", "select", "precision", "dropout", "copa", "template", "new_tokens", "test_size",
)  # fmt: skip
# What a stage of pre-training takes from its run's settings, besides the number of its epochs.
STAGED = (
    "batch_size", "weight_decay", "warmup", "schedule", "clip", "max_length", "train_size", "eval_size",
    "split", "precision", "dropout", "copa", "noise", "partner_lr", "regions", "match_epochs", "vokens",
    "first_epochs",
)  # fmt: skip


def spec(
    profile: str,
    task: str,
    method: str = "armada",
    student: str | None = None,
    teacher: str = "sd14",
    manifold: str = "euclid",
    reading: str = "paper",
    seed: int = 0,
    alpha: float | None = None,
    beta: float | None = None,
    gamma: float | None = None,
    tau: float | None = None,
    processes: int = 1,
    mentor: str | None = None,
    mentor_seed: int = 0,
    **training: Any,
) -> RunSpec:
    """A complete, validated RunSpec; what is not given comes from the profile.

    `mentor`: for a method that learns from a language model, the student's name of that model; one
    is fine-tuned for each task, with `mentor_seed`, whatever the student's seed is; so is a start
    pre-trained on pictures. `teacher`: some methods read another (`methods.Entry.teacher`), which the
    profile names. `training`: any field of `profiles.Training`. Checks every name and number, reads
    the task's rows and identifies all checkpoints, so that whatever is wrong shows before any work:
    ValueError (of names `settings.Unknown`) says what would be valid.
    """
    p = profiles.load(profile)
    need_gpu(p)
    entry = METHODS[profiles.check(method, METHODS, "method")]
    profiles.check(manifold, MANIFOLDS, "manifold loss")
    profiles.check(reading, READINGS, "reading")
    for name, number in (("seed", seed), ("mentor_seed", mentor_seed)):
        if not isinstance(number, int | np.integer) or number < 0:
            raise ValueError(f"{name} must be an integer of 0 or more, got {number!r}")
    suite = gentasks.TASKS[task] if task in gentasks.SUITES else None
    able = [m for m in METHODS if (m in GENERATING if suite else m != "seqkd")]
    profiles.check(method, able, f"method for {task}")
    block = baselines(p) if entry.mentor and not suite else None
    student = student or _usual_student(p, method, suite)
    group = suite.group if suite else task_of(p, task).group
    t = p.recipe(group, task, student, **training)
    t = t.model_copy(update={"precision": engine.precision(t.precision, device())})
    who, taught = p.student(student), _taught(p, method, p.teacher(teacher))
    given = {"alpha": alpha, "beta": beta, "gamma": gamma, "tau": tau}
    if t.noise and entry.vectors and not READINGS[reading].standardise:
        raise ValueError(
            f"noise is counted in standard deviations of standardised vectors, which reading {reading!r} "
            "does not have; use reading 'paper'"
        )
    if not entry.vectors:  # there is nothing to add noise to
        t = t.model_copy(update={"noise": 0.0})
    w = _weights(p, reading, manifold, given, task)
    if method == "layers_only":  # no teacher: only the added heads remain
        w |= {"alpha": 0.0, "beta": 0.0}
    if not entry.distils:
        w = {"alpha": 0.0, "beta": 0.0, "gamma": 0.0, "tau": 1.0}
    if block or method in MULTIMODAL or entry.weights:
        w |= _shares(p, method, given)
    if method == "x_adapter" and not t.text_encoder and p.baselines and p.baselines.multimodal:
        t = t.model_copy(update={"text_encoder": p.baselines.multimodal.text_encoder})
    if entry.mentor:
        mentor = p.student(mentor or _usual_mentor(p, suite)).name
    if suite:  # nothing for alpha to weigh: token logits and a reconstruction do not match (A31)
        w["alpha"] = 0.0
        if who.lora is None:
            able = [n for n, x in p.students.items() if x.lora]
            raise ValueError(f"student {student!r} does not generate; of profile {profile}: {able}")
        data_id = suite_of(task, p.data, t.train_size, t.test_size).digest
    else:
        train, evaluation_ = read(p, task, t)
        data_id = f"{train.digest}/{evaluation_.digest}"
    student_id = _student(who)
    teacher_id = teachers.fingerprint(taught, device().type) if taught else None
    if method == "x_adapter" and t.text_encoder:
        teacher_id = profiles.identity(t.text_encoder)
    s = RunSpec(
        profile=profile, task=task, student=student, method=method,
        teacher=taught.name if taught else None,
        manifold=manifold if entry.vectors and w["beta"] else None,
        reading=reading if entry.distils else None,
        seed=seed, training=t, processes=processes,
        alpha=w["alpha"], beta=w["beta"], gamma=w["gamma"], tau=w["tau"],
        student_id=student_id,
        teacher_id=teacher_id, data_id=data_id, mentor=mentor if entry.mentor else None,
        mentor_seed=mentor_seed if entry.mentor or entry.stage else 0,
    )  # fmt: skip
    if entry.stage or entry.masks:
        _layers(who)
    start = start_of(s) if entry.stage else None
    width, channels = (taught.width, taught.channels) if taught else (0, None)
    entry.check(start.training if start else t, width, channels)
    if start:
        return s.model_copy(update={"start_id": start.key})
    return s.model_copy(update={"mentor_id": mentor_of(s).key}) if entry.mentor else s


def _usual_student(p: Profile, method: str, suite: gentasks.GenTask | None) -> str:
    if METHODS[method].mentor and not suite:
        return baselines(p).student
    if method in MULTIMODAL and p.baselines and p.baselines.multimodal:
        return p.baselines.multimodal.student
    return p.nlu.student


def _taught(p: Profile, method: str, given: TeacherSpec) -> TeacherSpec | None:
    """Whose vectors a method reads: the given teacher's, those of its own, or none."""
    entry = METHODS[method]
    if entry.teacher is None:
        return given if entry.vectors else None
    name = getattr(pictured(p, f"the teacher of {method}"), entry.teacher)
    return p.teachers[profiles.check(name, p.teachers, f"teacher of {method} (profile {p.name})")]


def _layers(who: StudentSpec) -> None:
    """ValueError for a student whose layers no stage can reach into."""
    from transformers import AutoConfig

    kind = AutoConfig.from_pretrained(profiles.resolve(who.checkpoint), revision=who.revision)
    profiles.check(
        kind.model_type, WATCHED, f"architecture of {who.name} for pictures and masked words"
    )


def _usual_mentor(p: Profile, suite: gentasks.GenTask | None) -> str:
    if suite is None:
        return baselines(p).mentor
    block = p.reasoning if suite.group == "reasoning" else p.instruction
    if block is None or block.mentor is None:
        raise ValueError(f"profile {p.name!r} names no mentor for {suite.name!r}: give `mentor`")
    return block.mentor


def mentor_of(s: RunSpec) -> RunSpec:
    """The run that makes the mentor of `s`: the same task and data, and all that is `SHARED`.

    It is undistilled, except that TAKD learns from an assistant that was distilled from the mentor,
    and SFTN from a mentor that was fine-tuned with branches of the student.
    """
    needs, method, student, mentor = METHODS[s.method].mentor, "undistilled", s.mentor, None
    if "assistant" in needs:
        student, mentor, method = baselines(profiles.load(s.profile)).assistant, s.mentor, "kd"
    elif "branches" in needs:
        mentor, method = s.student, "sftn_mentor"
    shared = {k: getattr(s.training, k) for k in SHARED}
    return spec(
        s.profile, s.task, method, student, seed=s.mentor_seed, mentor=mentor,
        mentor_seed=s.mentor_seed, **shared,
    )  # fmt: skip


def start_of(s: RunSpec) -> RunSpec:
    """The stage that makes the start of `s`: the same task, data and teacher, and all that is `STAGED`.

    Its learning rate is the profile's for the student, or `stage_lr`, so that a search over the
    student's leaves one start a task; its seed is `mentor_seed`.
    """
    t, p = s.training, profiles.load(s.profile)
    usual = p.recipe(task_of(p, s.task).group, s.task, s.student).student_lr
    kept: dict[str, Any] = {k: getattr(t, k) for k in STAGED}
    kept |= {"epochs": t.stage_epochs or max(2, t.epochs), "student_lr": t.stage_lr or usual}
    change = {"seed": s.mentor_seed, "training": Training(**kept), "processes": 1}
    return s.model_copy(update=change | {"stage": True, "start_id": None, "mentor_seed": 0})


def pictured(p: Profile, what: str) -> Pictured:
    """The profile's block `multimodal` of `baselines`; ValueError where there is none."""
    if p.baselines is None or p.baselines.multimodal is None:
        raise ValueError(
            f"profile {p.name!r} has no block `multimodal` in `baselines`, which names {what}"
        )
    return p.baselines.multimodal


def baselines(p: Profile) -> Baselines:
    """The profile's block `baselines`; ValueError where there is none."""
    if p.baselines is None:
        raise ValueError(f"profile {p.name!r} has no block `baselines`: it names no mentor")
    return p.baselines


def _student(who: StudentSpec) -> str:
    """What a student is: its checkpoint, what is left of it, and how it is read or tuned."""
    own = who.lora.model_dump_json() if who.lora else who.pooling or "own pooling"
    cut = f"/layers {','.join(map(str, who.layers))}" if who.layers else ""
    return profiles.identity(who.checkpoint, who.revision) + f"/{own}{cut}"


def _weights(
    p: Profile, reading: str, manifold: str, given: dict[str, float | None], task: str
) -> dict[str, float]:
    base = p.armada[reading]  # type: ignore[index]
    beta = base.of(manifold, task)
    merged = {"alpha": base.alpha, "beta": beta, "gamma": base.gamma, "tau": base.tau}
    return _checked(merged | {k: v for k, v in given.items() if v is not None})


def _shares(p: Profile, method: str, given: dict[str, float | None]) -> dict[str, float]:
    """The weights that a baseline has; the profile's replace them, and what is given those.

    ValueError for a weight that is given and that it does not have.
    """
    own = dict(METHODS[method].weights)
    if p.baselines and (change := p.baselines.weights.get(method)):
        own |= change.model_dump(exclude_none=True)
    if idle := [k for k, v in given.items() if v is not None and k not in own]:
        has = f"its weights are {', '.join(own)}" if own else "it has no weights"
        raise ValueError(f"{method} does not use {', '.join(idle)}: {has}")
    return _checked(own | {k: given[k] for k in own if given[k] is not None})


def _checked(weights: dict[str, Any]) -> dict[str, float]:
    for name, value in weights.items():
        low, high = {"alpha": (0, 1), "tau": (1e-9, math.inf)}.get(name, (0, math.inf))
        if not (isinstance(value, int | float) and math.isfinite(value) and low <= value <= high):
            bounds = (
                "from 0 to 1" if name == "alpha" else "above 0" if name == "tau" else "of 0 or more"
            )
            raise ValueError(f"{name} must be a finite number {bounds}, got {value!r}")
    return {k: float(v) for k, v in weights.items()}


def grid(
    profile: str,
    tasks: Sequence[str],
    methods: Sequence[str],
    manifolds: Sequence[str] = MANIFOLDS,
    readings: Sequence[str] = ("paper",),
    seeds: Sequence[int] = (0,),
    controls: Sequence[str] = ("euclid",),
    **common: Any,
) -> list[RunSpec]:
    """All combinations, each once; `common` goes to `spec`.

    `controls`: the manifold losses of controls. `settings.Unknown` for a method or loss that is
    none, and whatever `spec` raises.
    """
    for values, valid, what in (
        (methods, METHODS, "method"),
        (manifolds, MANIFOLDS, "manifold loss"),
        (controls, MANIFOLDS, "manifold loss"),
    ):
        for v in values:
            profiles.check(v, valid, what)
    found: dict[str, RunSpec] = {}
    for task, seed, method in itertools.product(tasks, seeds, methods):
        losses = manifolds if method == "armada" else controls
        for reading, manifold in itertools.product(readings, losses):
            s = spec(profile, task, method, manifold=manifold, reading=reading, seed=seed, **common)
            found.setdefault(s.key, s)
    return list(found.values())


def need_gpu(p: Profile) -> None:
    """Raise RuntimeError for a profile that needs a GPU where none is visible."""
    if p.gpu and not torch.cuda.is_available() and not os.environ.get("ARMADA_NO_GPU"):
        raise RuntimeError(
            f"profile {p.name!r} needs a CUDA GPU and none is visible; use profile 'mini' (minutes) or "
            "'cpu' (hours, real data), or set ARMADA_NO_GPU=1 to try without"
        )


def device() -> torch.device:
    """The first GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
