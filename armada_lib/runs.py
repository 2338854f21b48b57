"""Experiments: a `RunSpec` in, a stored `Result` out; `study` makes many and returns one table."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import time
from collections.abc import Sequence
from concurrent.futures import as_completed
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from tqdm import tqdm

from armada_lib import engine, evaluation, profiles, students, tuning
from armada_lib.batching import Encoded
from armada_lib.extraction import attach, extract, pool
from armada_lib.gentasks import SUITES
from armada_lib.methods import METHODS, Setting
from armada_lib.results import Result, RunSpec, RunStore, environment
from armada_lib.specs import examples

log = logging.getLogger(__name__)


# -- one run -----------------------------------------------------------------------------------


def run(
    s: RunSpec,
    store: RunStore | None = None,
    accelerator: Accelerator | None = None,
    progress: bool = False,
) -> Result:
    """The stored Result of `s`, or compute and store it.

    Safe beside other workers (one computes, the others wait), and a killed run goes on from its
    last state. Under `accelerate launch` all processes call this together.
    """
    store = store or RunStore()
    if (found := store.load(s.key)) is not None:
        return found
    store.check()
    main = accelerator is None or accelerator.is_main_process
    with store.lock(s.key) if main else contextlib.nullcontext():
        if main and (found := store.load(s.key)) is not None and accelerator is None:
            return found
        if main:
            extract([s], store, progress=progress)
        if accelerator is not None:
            accelerator.wait_for_everyone()
        result = compute(s, store, accelerator, progress)
        if main:
            store.save(result)
        gc.collect()  # models and optimisers refer to each other; a worker makes many of them
    return result


def build(
    s: RunSpec, store: RunStore
) -> tuple[students.Student, Any, Encoded, Encoded, dict[str, Any]]:
    """(student, method, training data, evaluation data, facts) of a run, untrained."""
    p, t, entry = profiles.load(s.profile), s.training, METHODS[s.method]
    train, held = examples(s)
    task = train.task
    student = students.load(
        p.student(s.student), task.outputs, s.seed, task.kind == "regression", t.dropout
    )
    ids, types, cut = students.tokenise(student, train.first, train.second, t.max_length)
    held_ids, held_types, held_cut = students.tokenise(
        student, held.first, held.second, t.max_length
    )
    if cut or held_cut:
        log.warning(
            "%s: %d training and %d evaluation texts are cut at %d tokens",
            task.title,
            cut,
            held_cut,
            t.max_length,
        )
    remap = (
        student.compact(np.concatenate(ids + held_ids + [np.array([_pad(student)])]))
        .numpy()
        .astype(np.int32)
    )
    pad = int(remap[_pad(student)])
    tr = Encoded(
        [remap[i] for i in ids], types, torch.from_numpy(train.labels), train.per_example, pad
    )
    ev = Encoded(
        [remap[i] for i in held_ids],
        held_types,
        torch.from_numpy(held.labels),
        held.per_example,
        pad,
    )
    width, absent = None, 0
    if entry.vectors:
        width = p.teacher(s.teacher).width  # type: ignore[arg-type]
        absent = attach(s, store, [(tr, train.teacher_texts), (ev, held.teacher_texts)], width)
    setting = Setting(
        kind=task.kind, outputs=task.outputs, training=t, seed=s.seed, alpha=s.alpha, beta=s.beta,
        gamma=s.gamma, tau=s.tau, manifold=s.manifold or "euclid", reading=s.reading or "paper",
        width=width, label_mean=float(train.labels.mean()) if task.kind == "regression" else 0.0,
    )  # fmt: skip
    method = entry.build(setting, student)
    facts = {
        "train": len(train), "evaluation": len(held), "cut": cut + held_cut, "split": t.split,
        "texts_without_vector": absent,
        "sources": [train.source, held.source],
        "student_parameters": sum(x.numel() for x in student.model.parameters()) + _left_out(student),
        "branch_parameters": sum(x.numel() for x in student.branch.parameters()) if student.branch else 0,
    }  # fmt: skip
    return student, method, tr, ev, facts


def _pad(student: students.Student) -> int:
    return student.model.config.pad_token_id or 0


def _left_out(student: students.Student) -> int:
    small = student.model.get_input_embeddings().weight
    return 0 if student._full is None else student._full.numel() - small.numel()


def compute(
    s: RunSpec, store: RunStore, accelerator: Accelerator | None = None, progress: bool = False
) -> Result:
    """Train and evaluate, without looking whether the Result is there."""
    if s.task in SUITES:
        return tuning.compute(s, store, accelerator, progress)
    began = time.perf_counter()
    student, method, tr, ev, facts = build(s, store)
    _, held = examples(s)
    bf16 = s.training.precision == "bf16"
    judge = lambda: evaluation.metric(
        held.task.metric, evaluation.predict(student, method, ev, bf16)["student"], held.labels
    )
    trained = engine.train(
        student, method, tr, s.training, s.seed, accelerator, judge, store.state(s.key),
        save_every=float(os.environ.get("ARMADA_SAVE_EVERY", engine.SAVE_EVERY)), progress=progress,
    )  # fmt: skip
    outputs = evaluation.predict(student, method, ev, bf16)
    scores = {
        head: evaluation.metric(held.task.metric, o, held.labels) for head, o in outputs.items()
    }
    facts |= {
        "behaviour": evaluation.behaviour(outputs["student"], held.labels),
        "diagnostics": trained.diagnostics,
        "epochs": trained.epochs,
        "steps": trained.steps,
        "train_seconds": round(trained.seconds, 2),
        "seconds": round(time.perf_counter() - began, 2),
    }
    return Result(
        s, held.task.metric, scores, outputs, held.labels, trained.curves, facts, environment()
    )


def trained_student(s: RunSpec, store: RunStore | None = None) -> students.Student:
    """Train as `s` says and return the student itself, ready for `save_pretrained`."""
    store = store or RunStore()
    store.check()
    extract([s], store)
    student, method, tr = tuning.build(s, store)[:3] if s.task in SUITES else build(s, store)[:3]
    engine.train(student, method, tr, s.training, s.seed)
    student.expand()
    return student


# -- many runs ---------------------------------------------------------------------------------


def study(
    specs: Sequence[RunSpec],
    store: RunStore | None = None,
    workers: int | None = None,
    progress: bool = True,
) -> list[Result]:
    """Every Result, computing what is missing with `workers` processes of one thread each.

    Nothing is computed twice: a killed study goes on where it stopped, and several studies may
    share a store. Default: one worker a CPU core, or one in all where a GPU is present.
    """
    store = store or RunStore()
    store.check()
    workers = workers or (1 if torch.cuda.is_available() else os.cpu_count() or 1)
    missing = [s for s in specs if s not in store]
    workers = max(1, min(workers, len(missing)))
    extract(missing, store, workers, progress)
    with tqdm(
        total=len(missing), desc="runs", unit="run", disable=not progress or not missing
    ) as bar:
        if workers == 1:
            for s in missing:
                bar.set_postfix_str(s.label)
                run(s, store)
                bar.update()
        else:
            with pool(workers) as processes:
                jobs = {processes.submit(_run, s, store.root): s for s in missing}
                for job in as_completed(jobs):
                    job.result()
                    bar.set_postfix_str(jobs[job].label)
                    bar.update()
    return [run(s, store) for s in specs]


def _run(s: RunSpec, root: Any) -> None:
    run(s, RunStore(root))
