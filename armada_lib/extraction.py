"""Teacher vectors of runs, tasks or plain texts: what the store lacks is computed once and kept."""

from __future__ import annotations

import contextlib
import math
import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from tqdm import tqdm

from armada_lib import features, profiles, rowfile, run_data, specs, tables, tasks, teachers
from armada_lib.batching import Encoded
from armada_lib.methods import METHODS, READINGS
from armada_lib.results import RunSpec, RunStore

FILES = (".txt", *tables.KINDS)


def feature_store(profile: str, teacher: str, store: RunStore) -> features.Store:
    """The store of this teacher's vectors, read by its fingerprint on this machine's device."""
    who = profiles.load(profile).teacher(teacher)
    meta = {"teacher": who.name, "checkpoint": who.checkpoint, "stands_for": who.stands_for}
    fingerprint = teachers.fingerprint(who, specs.device().type)
    return features.Store(store.features, fingerprint, who.width, meta=meta)


def extract(
    wanted: Sequence[RunSpec], store: RunStore, workers: int = 1, progress: bool = True
) -> int:
    """Compute the vectors that these runs need and the store lacks; returns how many."""
    found: dict[tuple[str, str], dict[str, None]] = {}
    for s in wanted:
        if s.teacher and not _noise(s):
            texts = found.setdefault((s.profile, s.teacher), {})
            texts.update(dict.fromkeys(run_data.teacher_texts(s)))
    return sum(fill(p, t, list(texts), store, workers, progress) for (p, t), texts in found.items())


def _noise(s: RunSpec) -> bool:
    """Standardised noise needs no teacher; in the other reading it takes the teacher's moments."""
    return METHODS[s.method].vectors == "random" and READINGS[s.reading or "paper"].standardise


def fill(
    profile: str,
    teacher: str,
    texts: Sequence[str],
    store: RunStore,
    workers: int = 1,
    progress: bool = True,
) -> int:
    """Compute the vectors of `texts` that the store lacks, in `workers` processes of one thread.

    Returns how many were computed. Raises what the teacher raises; what it made before is kept.
    """
    if not texts:
        return 0
    refused = refusals(profile, teacher, texts)
    missing = [t for t in feature_store(profile, teacher, store).missing(texts) if t not in refused]
    if not missing:
        return 0
    if profiles.load(profile).teacher(teacher).kind == "blackbox":
        load(profile, teacher).check(missing)
    # many parts, so that the bar moves while a teacher paints; not too many: each opens the store
    step = max(64, math.ceil(len(missing) / max(64, workers * 4)))
    parts = [missing[i : i + step] for i in range(0, len(missing), step)]
    if workers <= 1 or len(parts) == 1:
        return _fill(profile, teacher, missing, store.root, progress)
    with (
        tqdm(
            total=len(missing), desc=f"vectors of {teacher}", unit="text", disable=not progress
        ) as bar,
        pool(workers) as processes,
    ):
        jobs = {
            processes.submit(_fill, profile, teacher, p, store.root, False): len(p) for p in parts
        }
        computed = 0
        for job in as_completed(jobs):
            computed += job.result()
            bar.update(jobs[job])
    return computed


def _fill(profile: str, teacher: str, texts: list[str], root: Any, progress: bool) -> int:
    who, store = load(profile, teacher), feature_store(profile, teacher, RunStore(root))
    if hasattr(who, "collect"):  # a black box answers first, and may refuse
        texts = who.collect(texts)
    return store.fill(texts, who.encode, progress=progress) if texts else 0


def refusals(profile: str, teacher: str, texts: Sequence[str]) -> set[str]:
    """Texts that a black box is known to have refused."""
    return teachers.refused(profiles.load(profile).teacher(teacher), texts, specs.device().type)


@cache
def load(profile: str, teacher: str) -> Any:
    """The teacher on this machine's device; loaded once a process."""
    return teachers.load(profiles.load(profile).teacher(teacher), specs.device().type)


_open: ProcessPoolExecutor | None = None


@contextlib.contextmanager
def pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    """Spawned processes of one thread: two of them finish more than one with two threads.

    They start with the first job. Inside another `pool` its processes serve, as each takes seconds
    to start.
    """
    global _open
    if _open is not None:
        yield _open
        return
    _open = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_worker)
    try:
        yield _open
    except BaseException:
        _open.shutdown(wait=False, cancel_futures=True)
        raise
    else:
        _open.shutdown()
    finally:
        _open = None


def every(
    work: Callable[..., None],
    jobs: Sequence[tuple[str, tuple[Any, ...]]],
    workers: int,
    unit: str,
    progress: bool = True,
) -> None:
    """Call `work(*job)`, a function of a module, for every (label, job), in up to `workers` processes."""
    with tqdm(total=len(jobs), desc=f"{unit}s", unit=unit, disable=not progress or not jobs) as bar:
        if workers <= 1 or len(jobs) < 2:
            for label, job in jobs:
                bar.set_postfix_str(label)
                work(*job)
                bar.update()
            return
        with pool(min(workers, len(jobs))) as processes:
            labels = {processes.submit(work, *job): label for label, job in jobs}
            for done in as_completed(labels):
                done.result()
                bar.set_postfix_str(labels[done])
                bar.update()


def _worker() -> None:
    torch.set_num_threads(1)


def attach(
    s: RunSpec, store: RunStore, data: Sequence[tuple[Encoded, list[str]]], width: int
) -> int:
    """Give each split, the training split first, its texts' vectors, or a control's.

    A text that a black box refused is given the mean of the training vectors, as is every text by
    the constant teacher. Returns how many were refused.
    """
    assert s.teacher is not None
    vectors, rng = METHODS[s.method].vectors, np.random.default_rng([s.seed, 77])
    standardised = READINGS[s.reading or "paper"].standardise
    known = feature_store(s.profile, s.teacher, store)
    for number, (part, _) in enumerate(data):  # Figures 10 to 12: noise at the aligner's input
        part.noise, part.noise_seed = s.training.noise, (s.seed, 78, number)
    if vectors == "random":  # normal, with the moments that the teacher's vectors have there
        centre, spread = np.zeros(width), np.ones(width)
        if not standardised:
            refused = refusals(s.profile, s.teacher, data[0][1])
            given = [t for t in data[0][1] if t not in refused]
            centre, spread = features.moments(known.matrix(given))
        for part, _ in data:
            noise = rng.standard_normal((len(part.tokens), width), np.float32)
            part.teacher = torch.from_numpy(noise * spread + centre).half()
        return 0
    refused = refusals(s.profile, s.teacher, [t for _, texts in data for t in texts])
    for part, texts in data:
        given = [t for t in texts if t not in refused]
        part.teacher = known.matrix(given)
        if len(given) < len(texts):
            row = {t: i for i, t in enumerate(given)}
            part.where = np.array([row.get(t, -1) for t in texts])
    centred = standardised or refused or vectors == "constant"
    known_moments = features.moments(data[0][0].teacher) if centred else None
    for part, _ in data:
        if known_moments is not None:
            mean, sd = (torch.as_tensor(x, dtype=torch.float32) for x in known_moments)
            if standardised:
                part.mean, part.scale = mean, sd.clamp(min=1e-6)
            else:
                part.absent = mean
        if vectors == "shuffled":
            order = rng.permutation(len(part.tokens))
            part.where = order if part.where is None else part.where[order]
    absent = sum(int((p.where < 0).sum()) for p, _ in data if p.where is not None)
    if vectors == "constant":
        for part, _ in data:
            part.where = np.full(len(part.tokens), -1)
    return absent


# -- texts and what they cost -------------------------------------------------------------------


def read(sources: Iterable[str], profile: str) -> list[str]:
    """Texts of tasks, by name (both splits, at the profile's sizes), and of files, each once.

    A file has one text a line (.txt), or a column `text` (a table, see `tables.read`).
    Raises ValueError naming what is wrong with a source, and where, and FileNotFoundError.
    """
    found: dict[str, None] = {}
    for source in sources:
        path = Path(source)
        if path.suffix in FILES:
            found.update(dict.fromkeys(_file(path)))
            continue
        if source not in tasks.TASKS and ("/" in source or path.exists()):
            raise ValueError(f"{source}: a file of texts ends in {', '.join(FILES)}")
        for e in run_data.examples(specs.spec(profile, source, "undistilled")):
            found.update(dict.fromkeys(e.teacher_texts))
    return list(found)


def _file(path: Path) -> list[str]:
    if path.suffix != ".txt":
        rows = tables.column(tables.read(path), "text", str(path))
    elif path.is_file():
        with path.open(encoding="utf-8", newline="") as f:
            rows = [line.rstrip("\r\n") for line in f]
    else:
        raise FileNotFoundError(f"{path}: there is no such file of texts")
    for n, text in enumerate(rows):
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{path}: text {n + 1} of {len(rows)} is empty: a teacher needs words")
    if not rows:
        raise ValueError(f"{path}: there is no text in it")
    return rows


def estimate(profile: str, teacher: str, texts: int) -> dict[str, int | None]:
    """Bytes that `texts` new vectors take on disk, and the weights in memory (None = not known).

    Reads the heads of weight files that are on this machine; fetches nothing.
    """
    who = profiles.load(profile).teacher(teacher)
    found = 0
    names = ("checkpoint", "text_encoder", "adapter", "spatial", "vocoder", "encoder")
    for reference in filter(None, (getattr(who, n, None) for n in names)):
        for file in Path(profiles.resolve(reference)).rglob("*.safetensors"):
            with safe_open(file, "pt") as f:
                found += sum(math.prod(f.get_slice(k).get_shape()) for k in f.keys())  # noqa: SIM118
    size = 2 if specs.device().type == "cuda" else 4
    return {
        "disk": texts * (who.width * 2 + rowfile.KEY),
        "weights": found * size or None,
    }
