"""Starts: a student's encoder after a stage of pre-training on texts and pictures, made once and kept.

A method with a stage (`methods.Entry.stage`) first trains the student's encoder on the task's own
training texts and what a teacher made of them, without labels; from that start every seed is
fine-tuned on text alone. `prepare` makes what runs need, `begin` puts it into a student. A start is
described by `specs.start_of`, and `starts/<its key>/` holds the weights, complete or absent.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from armada_lib import encoding, engine, profiles, run_data, specs
from armada_lib.extraction import attach, every
from armada_lib.files import Damaged, keep_tensors, kept_tensors
from armada_lib.machine import peak_memory
from armada_lib.methods import METHODS, Setting
from armada_lib.results import RunSpec, RunStore
from armada_lib.students import Student

log = logging.getLogger(__name__)


def prepare(
    wanted: Iterable[RunSpec], store: RunStore, workers: int = 1, progress: bool = True
) -> int:
    """Make the starts of these runs that the store lacks; returns how many it lacked.

    The teacher's vectors must be there (`extraction.extract`). Safe beside other workers: one makes
    a start, the others wait; a killed stage goes on.
    """
    todo = lacking(wanted, store)
    every(
        _make,
        [(f"{s.student} {s.label}", (s, store.root)) for s in todo],
        workers,
        "start",
        progress,
    )
    return len(todo)


def lacking(wanted: Iterable[RunSpec], store: RunStore) -> list[RunSpec]:
    """The stages that `prepare` would have work with; a damaged start is removed, and lacks."""
    stages = {s.start_id: _stage(s) for s in wanted if METHODS[s.method].stage}
    return [s for s in stages.values() if not _there(s, store)]


def begin(student: Student, s: RunSpec, store: RunStore) -> dict[str, Any]:
    """Put the start of run `s` into its student, before its vocabulary is made compact.

    Returns facts of the stage: {"stage": epochs, steps, seconds, parameters that it trained besides
    the student's, peak memory in MB, last losses, and what the stage itself says}. Raises `Damaged`
    or FileNotFoundError if it is not there.
    """
    found = _read(_stage(s), store)
    facts, ids, rows = (found.pop(k) for k in ("facts", "ids", "rows"))
    encoder = student.family.encoder(student.model)
    table: Tensor = encoder.get_input_embeddings().weight  # type: ignore[operator, union-attr]
    with torch.no_grad():
        table[ids] = rows
        for name, value in encoder.named_parameters():
            if value is not table:
                value.copy_(found[name])
    return {"stage": json.loads(bytes(facts.tolist()))}


def _stage(s: RunSpec) -> RunSpec:
    start = specs.start_of(s)
    if start.key != s.start_id:
        raise ValueError(
            f"{s.label} names the start {s.start_id}, but this profile now describes {start.key}: "
            "make the specification anew"
        )
    return start


def _file(start: RunSpec, store: RunStore) -> Path:
    return store.root / "starts" / start.key / "start.safetensors"


def _read(start: RunSpec, store: RunStore) -> dict[str, Tensor]:
    return kept_tensors(_file(start, store), {"start": start.key})


def _there(start: RunSpec, store: RunStore) -> bool:
    try:
        _read(start, store)
    except FileNotFoundError:
        return False
    except Damaged as e:
        log.warning("%s: made again", e)
        return False
    return True


def _make(start: RunSpec, root: Path) -> None:
    """Train a stage, unless that is done, and keep the encoder."""
    store = RunStore(root)
    store.check()
    path = _file(start, store)
    with store.lock(f"start-{start.key}"):
        if _there(start, store):
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        for left in path.parent.glob("*.tmp"):  # of a killed process
            left.unlink()
        keep_tensors(path, _train(start, store), {"start": start.key}, f"the start {start.label}")


def _train(start: RunSpec, store: RunStore) -> dict[str, Tensor]:
    """The encoder's weights after the stage; of its word embeddings the rows that were trained."""
    began, memory, t = time.perf_counter(), peak_memory(), start.training
    who = profiles.load(start.profile).teacher(start.teacher)  # type: ignore[arg-type]
    student = encoding.student(start)
    texts = encoding.corpus(start, student)
    absent = attach(start, store, [(texts, run_data.teacher_texts(start))], who.width)
    setting = Setting(
        "class", student.outputs, t, start.seed, width=who.width, channels=who.channels
    )
    own = _parameters(student)
    build = METHODS[start.method].stage
    assert build is not None
    stage, sizes = build(setting, student), []

    def count(_: int) -> None:  # some parts come with the texts, and none is left at the end
        sizes.append(_parameters(student, *stage.parts.values()) - own)

    trained = engine.train(
        student, stage, texts, t, start.seed, after_epoch=count, probes=0,
        state=_file(start, store).with_name("state.safetensors"), save_every=engine.save_every(),
    )  # fmt: skip
    last = trained.epochs[-1]["steps"]
    known = {k: v[np.isfinite(v)][-last:] for k, v in trained.curves.items()}
    learned = {k: round(float(v.mean()), 4) for k, v in known.items() if not k.startswith("grad_")}
    facts = {
        "epochs": t.epochs, "steps": trained.steps, "train_seconds": round(trained.seconds, 2),
        "seconds": round(time.perf_counter() - began, 2), "parameters": sizes[-1],
        "peak_memory": memory(), "texts": len(texts), "texts_without_vector": absent,
        "losses": learned, **{k: v for k, v in trained.diagnostics.items() if k != "gradients"},
    }  # fmt: skip
    encoder = student.family.encoder(student.model)
    table = encoder.get_input_embeddings().weight  # type: ignore[operator, union-attr]
    found = {
        k: v.detach().cpu().contiguous() for k, v in encoder.named_parameters() if v is not table
    }
    assert student._used is not None
    found |= {"ids": student._used.cpu(), "rows": table.detach().cpu().contiguous()}
    return found | {"facts": torch.tensor(list(json.dumps(facts).encode()), dtype=torch.uint8)}


def _parameters(*modules: torch.nn.Module) -> int:
    return sum(p.numel() for m in modules for p in m.parameters() if p.requires_grad)
