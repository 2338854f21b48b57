"""Experiments: a `RunSpec` in, a stored `Result` out; `study` makes many and returns one table."""

from __future__ import annotations

import contextlib
import functools
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from armada_lib import encoding, engine, evaluation, mentors, profiles, starts, students, tuning
from armada_lib.batching import Encoded
from armada_lib.extraction import attach, every, extract, pool
from armada_lib.gentasks import SUITES
from armada_lib.machine import environment, peak_memory
from armada_lib.methods import METHODS, Method, Setting
from armada_lib.results import Result, RunSpec, RunStore
from armada_lib.run_data import examples

# -- one run -----------------------------------------------------------------------------------


def run(
    s: RunSpec,
    store: RunStore | None = None,
    accelerator: Accelerator | None = None,
    progress: bool = False,
    wait: bool = True,
) -> Result:
    """The stored Result of `s`, or compute and store it.

    Safe beside other workers (one computes, the others wait), and a killed run goes on from its
    last state. Under `accelerate launch` all processes call this together; ValueError if `s` is of
    another number of processes, or if a mentor or start that it needs is not there yet. Raises
    `filelock.Timeout` instead of waiting for another worker, if `wait` is False.
    """
    store = store or RunStore()
    if (found := store.load(s.key)) is not None:
        return found
    store.check()
    main = accelerator is None or accelerator.is_main_process
    world = 1 if accelerator is None else accelerator.num_processes
    if s.processes != world:  # the batch of all of them together is another
        raise ValueError(
            f"{s.label}: the specification is of {s.processes} processes, not of {world}; make it with "
            f"`specs.spec(..., processes={world})`"
        )
    if world > 1 and mentors.lacking([s], store):
        raise ValueError(
            f"{s.label}: its mentor is not there yet; make it in one process first, with "
            "`mentors.prepare([spec], RunStore(), runs.compute)`"
        )
    if world > 1 and s.task in SUITES and tuning.lacking(s, store):
        raise ValueError(
            f"{s.label}: its mentor's responses are not there yet; make them in one process first, "
            "with `tuning.build(spec, RunStore())`"
        )
    if world > 1 and starts.lacking([s], store):
        raise ValueError(
            f"{s.label}: its start is not there yet; make it in one process first, with "
            "`starts.prepare([spec], RunStore())`"
        )
    patience = -1 if wait else 0
    with store.lock(s.key).acquire(patience) if main else contextlib.nullcontext(), _released():
        if main and (found := store.load(s.key)) is not None and accelerator is None:
            return found
        if main:
            prepare([s], store, progress=progress)
        if accelerator is not None:
            accelerator.wait_for_everyone()
        result = compute(s, store, accelerator, progress)
        if main:
            store.save(result)
    return result


@contextlib.contextmanager
def _released() -> Iterator[None]:
    """What is made meanwhile and left over is freed at the end: a worker makes many models.

    Models and optimisers refer to each other. Older objects, the many of all imports among them,
    are not searched.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.collect()
        gc.unfreeze()


def build(
    s: RunSpec, store: RunStore
) -> tuple[students.Student, Any, Encoded, Encoded, dict[str, Any]]:
    """(student, method, training data, evaluation data, facts) of a run, untrained."""
    p, t, entry = profiles.load(s.profile), s.training, METHODS[s.method]
    train, held = examples(s)
    task = train.task
    student = encoding.student(s)
    stage = starts.begin(student, s, store) if entry.stage else {}
    tr, ev, cut, _ = encoding.encode(s, student)
    width, channels, absent = None, None, 0
    if entry.vectors and not entry.stage:
        who = p.teacher(s.teacher)  # type: ignore[arg-type]
        width, channels = who.width, who.channels
        absent = attach(s, store, [(tr, train.teacher_texts), (ev, held.teacher_texts)], width)
    setting = Setting(
        kind=task.kind, outputs=task.outputs, training=t, seed=s.seed, alpha=s.alpha, beta=s.beta,
        gamma=s.gamma, tau=s.tau, manifold=s.manifold or "euclid", reading=s.reading or "paper",
        width=width, channels=channels, label_mean=train.start,
        mentor=mentors.load(s, store) if entry.mentor else None,
    )  # fmt: skip
    method = entry.build(setting, student)
    own = [x for part in {**method.parts, **method.partners}.values() for x in part.parameters()]
    facts = {
        "train": len(train), "evaluation": len(held), "cut": cut, "split": t.split,
        "texts_without_vector": absent,
        "sources": [train.source, held.source],
        "student_parameters": sum(x.numel() for x in student.model.parameters()) + _left_out(student),
        "branch_parameters": sum(x.numel() for x in student.branch.parameters()) if student.branch else 0,
        "method_parameters": sum(x.numel() for x in own if x.requires_grad),
    } | stage  # fmt: skip
    return student, method, tr, ev, facts


def _left_out(student: students.Student) -> int:
    small = student.model.get_input_embeddings().weight
    return 0 if student._full is None else student._full.numel() - small.numel()


def compute(
    s: RunSpec,
    store: RunStore,
    accelerator: Accelerator | None = None,
    progress: bool = False,
    state: Path | None = None,
    after_epoch: Callable[[students.Student, int], None] | None = None,
    look: Callable[..., None] | None = None,
) -> Result:
    """Train and evaluate, without looking whether the Result is there.

    `state`: the file from which a killed run goes on, if not the store's for this run. `look` is
    called with "before" or "after" training, student, method, training data, evaluation data.
    """
    if s.task in SUITES:
        return tuning.compute(s, store, accelerator, progress)
    began, memory = time.perf_counter(), peak_memory()
    student, method, tr, ev, facts = build(s, store)
    _, held = examples(s)
    if look:
        look("before", student, method, tr, ev)
    bf16 = s.training.precision == "bf16"
    score = lambda name, o: evaluation.metric(name, o, held.labels, s.training.threshold)
    trained = engine.train(
        student, method, tr, s.training, s.seed, accelerator, _judge(s, student, method, ev),
        state or store.state(s.key), save_every=engine.save_every(), progress=progress,
        after_epoch=functools.partial(after_epoch, student) if after_epoch else None,
    )  # fmt: skip
    if look:
        look("after", student, method, tr, ev)
    outputs = evaluation.predict(student, method, ev, bf16)
    scores = {head: score(held.task.metric, o) for head, o in outputs.items()}
    if held.task.also:
        facts["also"] = {
            m: {head: score(m, o) for head, o in outputs.items()} for m in held.task.also
        }
    facts |= {
        "behaviour": evaluation.behaviour(outputs["student"], held.labels, s.training.threshold),
        "diagnostics": trained.diagnostics,
        "epochs": trained.epochs,
        "steps": trained.steps,
        "train_seconds": round(trained.seconds, 2),
        "seconds": round(time.perf_counter() - began + trained.earlier, 2),
        "peak_memory": memory(),
    }
    return Result(
        s, held.task.metric, scores, outputs, held.labels, trained.curves, facts, environment()
    )


def _judge(
    s: RunSpec, student: students.Student, method: Method, ev: Encoded
) -> Callable[[], float]:
    """The student's score as it stands, by the task's first metric: for `Training.select` "best"."""
    held, bf16 = examples(s)[1], s.training.precision == "bf16"
    said = lambda: evaluation.predict(student, method, ev, bf16)["student"]
    return lambda: evaluation.metric(held.task.metric, said(), held.labels, s.training.threshold)


def trained_student(s: RunSpec, store: RunStore | None = None) -> students.Student:
    """Train as `s` says and return the student itself, ready for `save_pretrained`.

    The student is the one that the run's Result is of; a killed call goes on from its last state.
    """
    store = store or RunStore()
    store.check()
    prepare([s], store)
    judge = None
    if s.task in SUITES:
        student, method, tr, _ = tuning.build(s, store)
    else:
        student, method, tr, ev, _ = build(s, store)  # type: ignore[assignment]
        judge = _judge(s, student, method, ev)
    engine.train(
        student, method, tr, s.training, s.seed, evaluate=judge,
        state=store.state(f"student-{s.key}"), save_every=engine.save_every(),
    )  # fmt: skip
    student.expand()
    return student


def prepare(
    wanted: Sequence[RunSpec],
    store: RunStore,
    workers: int | None = None,
    progress: bool = True,
) -> None:
    """Make what these runs read and the store lacks: vectors, mentors, starts.

    `workers`: processes, by default one for every thread that this process may use (`OMP_NUM_THREADS`,
    else one a CPU core), or one in all where a GPU is present, and never more than there are runs.
    """
    workers = _processes(wanted, workers)
    extract(wanted, store, workers, progress)
    mentors.prepare(wanted, store, compute, workers, progress)
    starts.prepare(wanted, store, workers, progress)


def each(
    work: Callable[[RunSpec, Path], None],
    unit: str,
    wanted: Sequence[RunSpec],
    store: RunStore,
    workers: int | None = None,
    progress: bool = True,
) -> None:
    """`prepare` these runs and call `work(spec, root of the store)` for each, all in the same processes."""
    workers = _processes(wanted, workers)
    with pool(workers):
        prepare(wanted, store, workers, progress)
        every(work, [(s.label, (s, store.root)) for s in wanted], workers, unit, progress)


def _processes(wanted: Sequence[RunSpec], workers: int | None) -> int:
    workers = workers or (1 if torch.cuda.is_available() else torch.get_num_threads())
    return max(1, min(workers, len(wanted)))


# -- many runs ---------------------------------------------------------------------------------


def study(
    specs: Sequence[RunSpec],
    store: RunStore | None = None,
    workers: int | None = None,
    progress: bool = True,
) -> list[Result]:
    """Every Result, computing what is missing with `workers` processes of one thread each.

    Nothing is computed twice: a killed study goes on where it stopped, and several studies may
    share a store. Default: one worker for every thread that this process may use (`OMP_NUM_THREADS`,
    else one a CPU core), or one in all where a GPU is present.
    """
    store = store or RunStore()
    store.check()
    each(_run, "run", [s for s in specs if s not in store], store, workers, progress)
    return [run(s, store) for s in specs]


def _run(s: RunSpec, root: Path) -> None:
    run(s, RunStore(root))
