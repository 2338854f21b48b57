"""What a run's student and aligner make of its texts, before and after training, kept in the store.

A probe is computed while its run is trained: the run's Result is stored as well, bit for bit what
`runs.run` gives, and a run stored without its probe is trained again, to the same weights. One file
a run, `probes/<key>/vectors.safetensors`, complete or absent.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from armada_lib import autocast, evaluation, runs, transfer
from armada_lib.aligner import TSAligner
from armada_lib.batching import Encoded
from armada_lib.files import write_tensors
from armada_lib.gentasks import SUITES
from armada_lib.methods import Method
from armada_lib.methods.armada import BRANCH_SEED
from armada_lib.methods.base import texts
from armada_lib.results import RunSpec, RunStore
from armada_lib.students import Student

log = logging.getLogger(__name__)

FORMAT = "2"  # of the file; raised when what it holds changes
SAMPLE = 256  # training examples; all evaluation examples are there
SHARED = 768  # width of the projections of a student without an aligner


@dataclass(frozen=True)
class Probe:
    """Vectors and outputs of one run: `arrays["<when>/<split>/<what>"]`.

    when: before, after. split: held (evaluation examples), train (a sample). what: student_hidden
    (n, d), student_projection (n, k), aligner_hidden (n, h), aligner_projection (n, k), one row a
    *text* (choice tasks have two an example); and the outputs of each head, one row an example.
    Of a run with an aligner also `heads/<head>/weight` and `/bias`, see `heads`.
    """

    spec: RunSpec
    arrays: dict[str, np.ndarray]
    per_example: int

    def get(self, what: str, split: str = "held", when: str = "after") -> np.ndarray | None:
        """float64; None where the run has no such part (an undistilled student has no aligner)."""
        found = self.arrays.get(f"{when}/{split}/{what}")
        return None if found is None else found.astype(np.float64)

    def head(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """(weight (c, k), bias (c,)) of a head as a map of its model's projection; see `heads`."""
        weight, bias = (self.arrays[f"heads/{name}/{x}"] for x in ("weight", "bias"))
        return weight.astype(np.float64), bias.astype(np.float64)

    def labels(self, split: str = "held") -> np.ndarray:
        """Gold labels (examples,)."""
        return self.arrays[f"labels/{split}"]

    def text_labels(self, split: str = "held") -> np.ndarray:
        """Gold labels a text; of a choice task, whether the text holds the right choice."""
        y = self.labels(split)
        if self.per_example == 1:
            return y
        return (y[:, None] == np.arange(self.per_example)[None]).astype(np.int64).reshape(-1)

    @cached_property
    def right(self) -> np.ndarray:
        """Whether the student answers each evaluation example as the data do, (examples,) bool."""
        return evaluation.decide(self.arrays["after/held/student"]) == self.labels()


def path(s: RunSpec, store: RunStore) -> Path:
    """Where the probe of a run is kept."""
    return store.root / "probes" / s.key / "vectors.safetensors"


def sample(n: int, most: int = SAMPLE) -> np.ndarray:
    """Numbers of the training examples that are looked at: the same for all runs on the same data."""
    return np.sort(np.random.default_rng(n).permutation(n)[:most])


@torch.no_grad()
def read(
    student: Student, method: Method, data: Encoded, rows: np.ndarray, bf16: bool, shared: int
) -> dict[str, np.ndarray]:
    """Vectors (float16, a row a text) and outputs (float32, a row an example) of these examples.

    A student without a branch is given the projection with which ARMADA's student of the same seed
    starts: an isometry where its width is at most `shared`, so that the two can be compared.
    """
    student.eval()
    aligner, borrowed = getattr(method, "aligner", None), student.branch is None
    if aligner is not None:
        aligner.eval()
    if borrowed:
        student.add_branch(shared, method.setting.seed + BRANCH_SEED)
        assert student.branch is not None
        student.branch.to(next(student.parameters()).device)
    device = next(student.parameters()).device
    own = next(aligner.parameters()).device if aligner is not None else device
    found: dict[str, list[np.ndarray]] = {}
    seen = []
    for at in range(0, len(rows), evaluation.EVAL_BATCH):
        batch = data.batch(rows[at : at + evaluation.EVAL_BATCH], student.packs).to(device)
        with autocast.to_bf16(device, bf16):
            out = student(method.inputs(batch))
        parts: dict[str, Any] = {
            "student_hidden": out.hidden, "student_projection": out.projection,
            "student": method.shape(out.logits),
        }  # fmt: skip
        if not borrowed:
            parts["student_aux"] = method.shape(out.aux_logits)
        if aligner is not None and batch.teacher is not None:
            t = aligner(batch.teacher.to(own))
            parts |= {
                "aligner_hidden": t.hidden, "aligner_projection": t.projection,
                "aligner": method.shape(t.logits), "aligner_aux": method.shape(t.aux_logits),
            }  # fmt: skip
        for name, value in parts.items():
            found.setdefault(name, []).append(value.float().cpu().numpy())
        seen.append(batch)
    if borrowed:
        student.branch = None
    order = np.argsort(np.concatenate([b.rows for b in seen]), kind="stable")
    by_text = np.argsort(np.concatenate([texts(b, data.per_example) for b in seen]), kind="stable")
    vector = lambda name: name.endswith(("hidden", "projection"))
    return {
        name: np.concatenate(p)[by_text].astype(np.float16) if vector(name) else np.concatenate(p)[order]
        for name, p in found.items()
    }  # fmt: skip


def heads(student: Student, aligner: TSAligner) -> dict[str, np.ndarray]:
    """Every trained head as a map of its model's projection: weight (c, k) and bias (c,), float32.

    The auxiliary heads are such maps. An output head is one where the projection keeps all that it
    reads (`transfer.through`); where it does not, it is left out.
    """
    assert student.branch is not None
    own: Any = student.branch
    found = {"student_aux": own["aux_head"], "aligner_aux": aligner.aux_head}
    arrays = {f"heads/{name}/weight": h.weight for name, h in found.items()}
    through = {"student": (student.family.head(student.model), own["projection"].weight)}
    if aligner.form != "released":  # there the projection maps the raw vector
        through["aligner"] = (aligner.output_head, aligner.projection)
    for name, (head, projection) in through.items():
        w, p = (x.detach().float().cpu().numpy() for x in (head.weight, projection))
        with contextlib.suppress(ValueError):
            arrays[f"heads/{name}/weight"] = torch.from_numpy(transfer.through(w, p))
            found[name] = head
    for name, head in found.items():
        bias = torch.zeros(head.out_features) if head.bias is None else head.bias
        arrays[f"heads/{name}/bias"] = bias
    return {k: v.detach().float().cpu().numpy() for k, v in arrays.items()}


def probe(s: RunSpec, store: RunStore | None = None) -> Probe:
    """The stored probe of `s`, or train the run and keep its probe and its Result.

    Raises ValueError for a student that generates: its aligner answers nothing.
    """
    store = store or RunStore()
    if s.task in SUITES:
        raise ValueError(
            f"{s.label}: probes are of students that classify, not of one that generates"
        )
    if (known := load(s, store)) is not None:
        return known
    store.check()
    with store.lock(s.key):
        if (known := load(s, store)) is not None:
            return known
        runs.prepare([s], store, progress=False)
        arrays: dict[str, np.ndarray] = {}
        kept: dict[str, str] = {}

        def look(when: str, student: Student, method: Method, tr: Encoded, ev: Encoded) -> None:
            bf16 = s.training.precision == "bf16"
            aligner = getattr(method, "aligner", None)
            shared = SHARED if aligner is None else aligner.shared
            for split, data, rows in (
                ("held", ev, np.arange(len(ev))),
                ("train", tr, sample(len(tr))),
            ):
                for name, x in read(student, method, data, rows, bf16, shared).items():
                    arrays[f"{when}/{split}/{name}"] = x
                arrays[f"labels/{split}"] = data.labels[torch.from_numpy(rows)].numpy()
            kept["per_example"] = str(ev.per_example)
            if when == "after" and aligner is not None:
                arrays.update(heads(student, aligner))

        result = runs.compute(s, store, look=look)
        if s not in store:
            store.save(result)
        home = path(s, store)
        home.parent.mkdir(parents=True, exist_ok=True)
        tensors = {k: torch.from_numpy(np.ascontiguousarray(v)) for k, v in arrays.items()}
        about = {"format": FORMAT, "digest": _digest(arrays), **kept}
        write_tensors(home, tensors, about, "the vectors of this run")
    return Probe(s, arrays, int(kept["per_example"]))


def load(s: RunSpec, store: RunStore) -> Probe | None:
    """The stored probe, or None if it is absent or damaged (then it is removed with a warning)."""
    home = path(s, store)
    try:
        with safe_open(home, "np") as f:
            about = f.metadata()
            arrays = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118
        if (about["format"], about["digest"]) != (FORMAT, _digest(arrays)):
            raise ValueError("it does not match its digest")
        return Probe(s, arrays, int(about["per_example"]))
    except FileNotFoundError:
        return None
    except (SafetensorError, ValueError, KeyError, TypeError) as e:
        log.warning("the probe of %s is damaged (%s): computed again", s.label, e)
        home.unlink(missing_ok=True)
        return None


def _digest(arrays: dict[str, np.ndarray]) -> str:
    h = hashlib.sha256()
    for name in sorted(arrays):
        h.update(f"{name} {arrays[name].dtype} {arrays[name].shape}".encode())
        h.update(np.ascontiguousarray(arrays[name]).tobytes())
    return h.hexdigest()


def study(
    specs: Sequence[RunSpec],
    store: RunStore | None = None,
    workers: int | None = None,
    progress: bool = True,
) -> list[Probe]:
    """Every probe, computing what is missing as `runs.study` does; the Results are stored, too."""
    store = store or RunStore()
    store.check()
    missing = [s for s in specs if not path(s, store).exists()]
    runs.each(_probe, "probe", missing, store, workers, progress)
    return [probe(s, store) for s in specs]


def _probe(s: RunSpec, root: Path) -> None:
    probe(s, RunStore(root))
