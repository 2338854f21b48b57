"""Cells of a study computed by any number of workers on any number of machines.

All that is finished is in the run store, so that a study has no state of its own: whoever is started
with the same file and store computes what nobody else has computed or is computing.
"""

from __future__ import annotations

import itertools
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
from filelock import Timeout

from armada_lib import runs
from armada_lib.experiment import Job, Study, anywhere, committed, lacking, other_key, stored
from armada_lib.extraction import pool
from armada_lib.files import write_text
from armada_lib.results import RunSpec, RunStore
from armada_lib.state import Diverged

Say = Callable[[str], None]


def work(found: Sequence[Job], store: RunStore, workers: int, say: Say) -> dict[str, int]:
    """Compute what is missing, in order, with `workers` processes of one thread each.

    A cell that another worker computes, here or on another machine, is left to it. One that
    diverges is named and left out; any other error stops the study. No score is shown, so that
    nobody is tempted. Returns how many cells were `computed`, `diverged`, and are `elsewhere`.
    """
    store.check()
    clock = Clock(store)
    count = {"computed": 0, "diverged": 0, "elsewhere": 0}
    missing = lacking(found, store)
    for j in found:
        clock.note(j.spec)
    say(f"{len(found):,} cells, {len(found) - len(missing):,} stored{clock.left(missing, workers)}")
    diverged: set[str] = set()
    while missing:
        before = count["computed"]
        for job, outcome in _outcomes(missing, store, workers):
            if outcome == "computed":
                count["computed"] += 1
                clock.note(job.spec)
                rest = lacking(missing, store)
                done = len(found) - len(rest) - len(diverged)
                took = clock.seconds[job.spec.key]
                left = clock.left(rest, workers)
                say(f"{done:>5,} of {len(found):,} | {job.name} | {took:.0f} s{left}")
            elif outcome != "elsewhere":
                diverged.add(job.spec.key)
                say(f"{job.name} has no result: {outcome}")
        missing = [j for j in lacking(missing, store) if j.spec.key not in diverged]
        if count["computed"] == before:
            break  # all that is left is being computed elsewhere
    count |= {"diverged": len(diverged), "elsewhere": len(missing)}
    return count


def _outcomes(missing: Sequence[Job], store: RunStore, workers: int) -> Iterator[tuple[Job, str]]:
    """Each job with what became of it; one that is stored by its turn is left out."""
    queue = (j for j in missing if stored(j.spec, store) is None)
    if workers <= 1:
        for job in queue:
            yield job, attempt(job.spec, store.root)
        return
    with pool(min(workers, len(missing))) as processes:
        running: dict[Future[str], Job] = {}
        while True:
            for job in itertools.islice(queue, workers - len(running)):
                running[processes.submit(attempt, job.spec, store.root)] = job
            if not running:
                return
            for done in wait(running, return_when=FIRST_COMPLETED).done:
                yield running.pop(done), done.result()


def attempt(s: RunSpec, root: Path) -> str:
    """Run one cell unless another worker does, or has: "computed", "elsewhere", or why it diverged."""
    try:
        return "computed" if run(s, RunStore(root), wait=False) else "elsewhere"
    except Timeout:
        return "elsewhere"
    except Diverged as e:
        return str(e)


def run(s: RunSpec, store: RunStore, wait: bool = True) -> bool:
    """Compute and store a cell; False if it is stored by then. `store.check` comes before.

    Kinds of machines have keys of their own for a cell (`experiment.anywhere`) and share a lock.
    Raises `filelock.Timeout` instead of waiting for another worker, if `wait` is False, and
    `state.Diverged`.
    """
    with store.lock(f"cell-{anywhere(s)}").acquire(-1 if wait else 0):
        if stored(s, store) is not None:
            return False
        write_text(other_key(s, store), s.key)
        runs.run(s, store, wait=wait)
    return True


@dataclass
class Clock:
    """How long the cells of a store took, and what is left."""

    store: RunStore
    seconds: dict[str, float] = field(default_factory=dict)  # by key
    kinds: dict[tuple[str, str | None], list[float]] = field(default_factory=dict)

    def note(self, s: RunSpec) -> None:
        """Take in a finished cell; one that is not stored says nothing."""
        if (key := stored(s, self.store)) and (found := self.store.load(key)) is not None:
            self.seconds[s.key] = found.facts["seconds"]
            self.kinds.setdefault((s.task, s.reading), []).append(found.facts["seconds"])

    def left(self, missing: Sequence[Job], workers: int) -> str:
        """ ", 3 h 20 min left with 2 workers", from cells of the same task and reading if any are there."""
        if not missing or not self.seconds:
            return ""
        mean = lambda xs: sum(xs) / len(xs)
        every = mean(list(self.seconds.values()))
        kinds = {kind: mean(found) for kind, found in self.kinds.items()}
        rest = sum(kinds.get((j.spec.task, j.spec.reading), every) for j in missing) / workers
        hours, minutes = divmod(math.ceil(rest / 60), 60)
        who = "1 worker" if workers == 1 else f"{workers} workers"
        return f", {f'{hours} h ' if hours else ''}{minutes} min left with {who}"


# -- again --------------------------------------------------------------------------------------

# How far a metric may be from the stored one, in points, when a cell is computed again by one
# thread on the same kind of processor with the same torch. Elsewhere kernels round otherwise.
TOLERANCE = {"fp32": 0.0, "bf16": 0.5}


def repeat(job: Job, study: Study, store: RunStore) -> tuple[pd.DataFrame, bool]:
    """Compute a finished cell anew: (head, stored, again), and whether all are within `TOLERANCE`.

    Stored is what the store holds, else what is committed in book/results; ValueError if neither
    does. Neither is changed, but for teacher vectors that the store lacks.
    """
    key = stored(job.spec, store)
    if key and (found := store.load(key)) is not None:
        before = found.scores
    elif (kept := committed(study).get(anywhere(job.spec))) is not None:
        before = kept["scores"]
    else:
        kept_in = f"book/results/{study.name}.jsonl"
        raise ValueError(f"{job.name} is neither in {store.root} nor in {kept_in}")
    store.check()
    runs.prepare([job.spec], store)
    with tempfile.TemporaryDirectory() as folder:
        again = runs.compute(job.spec, store, state=Path(folder) / "state.safetensors").scores
    table = pd.DataFrame({"stored": before, "again": again}).rename_axis("head").reset_index()
    apart = (table["stored"] - table["again"]).abs()
    return table, bool((apart <= TOLERANCE[job.spec.training.precision]).all())
