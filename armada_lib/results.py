"""What a run is (`RunSpec`), what it leaves (`Result`), and where Results are kept (`RunStore`)."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import time
import uuid
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from safetensors.numpy import load_file, save_file

from armada_lib import profiles
from armada_lib.files import write_text
from armada_lib.profiles import Strict, Training

log = logging.getLogger(__name__)

# Part of every key. Raise it when a change of the code changes numbers; the committed trajectory
# (tests/trajectory.json) fails until that is done.
RECIPE = 2


class RunSpec(Strict):
    """One run, complete: two equal specs give the same numbers. Make one with `runs.spec`.

    `teacher`, `manifold`, `reading` are None and the weights 0 where a method does not use them,
    so that equal work has one key. The `_id` fields say what stood behind the names; `mentor_id` is
    the key of the run that makes the mentor, `start_id` that of the stage that makes the student's
    start, and `stage` says that a spec is of such a stage alone (`specs.start_of`). A method that
    reads a text encoder has that as its `teacher_id`, and no teacher.
    """

    profile: str
    task: str
    student: str
    method: str
    teacher: str | None
    manifold: str | None
    reading: str | None
    alpha: float
    beta: float
    gamma: float
    tau: float
    seed: int
    training: Training
    student_id: str
    teacher_id: str | None
    data_id: str
    processes: int = 1
    recipe: int = RECIPE
    mentor: str | None = None
    mentor_seed: int = 0
    mentor_id: str | None = None
    start_id: str | None = None
    stage: bool = False

    @property
    def key(self) -> str:
        """A hash of what differs from the defaults: a setting added later leaves old keys valid."""
        given = self.model_dump(mode="json", exclude_defaults=True)
        given |= {"training": self.training.model_dump(mode="json", exclude_defaults=True)}
        given |= {"recipe": self.recipe}
        return hashlib.sha256(json.dumps(given, sort_keys=True).encode()).hexdigest()[:20]

    @property
    def label(self) -> str:
        parts = (self.task, self.method, self.manifold, self.reading, f"seed {self.seed}")
        return " ".join(p for p in parts if p)


def decide_each(outputs: np.ndarray, threshold: float) -> np.ndarray:
    """(n, c) bool from logits (n, c) of labels of which several may hold: sigmoid(o) >= threshold."""
    return outputs.astype(np.float64) >= np.log(threshold / (1 - threshold))


@dataclass
class Result:
    """`scores`: metric × 100 by head; `outputs`: (n, c) or (n,) by head; `labels` (n,) or (n, c).

    A task with a second metric has its scores in `facts["also"]`, by metric and head.
    """

    spec: RunSpec
    metric: str
    scores: dict[str, float]
    outputs: dict[str, np.ndarray]
    labels: np.ndarray
    curves: dict[str, np.ndarray] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)

    @property
    def score(self) -> float:
        return self.scores["student"]

    @property
    def collapsed(self) -> bool:
        return bool(self.facts["behaviour"]["collapsed"])

    def predictions(self, head: str = "student") -> np.ndarray:
        """Predicted class (n,), or the score itself for regression; of several labels (n, c) bool."""
        out = self.outputs[head]
        if self.labels.ndim == 2:
            return decide_each(out, self.spec.training.threshold)
        return out.argmax(-1) if out.ndim == 2 else out

    def record(self) -> dict[str, Any]:
        """The Result as plain JSON: everything but curves and logits."""
        said = self.predictions()
        if said.ndim == 2:  # numbers of labels
            listed: list[Any] = [np.flatnonzero(row).tolist() for row in said]
        else:
            listed = [round(float(x), 3) for x in said] if said.dtype.kind == "f" else said.tolist()
        return {
            "key": self.spec.key,
            "spec": self.spec.model_dump(),
            "metric": self.metric,
            "scores": self.scores,
            "facts": self.facts,
            "environment": self.environment,
            "predictions": listed,
        }


def _age(path: Path) -> float:
    """Seconds since the last change; 0 for what is gone by now."""
    try:
        return time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


class RunStore:
    """Results by key, one folder each: complete and verified, or absent.

    A Result is written to a temporary folder, synced and renamed. On reading, both files are
    checked against their digests; a damaged one is set aside with a warning and computed again.
    """

    def __init__(self, root: str | Path | None = None):
        self.root = Path(root or os.environ.get("ARMADA_STORE") or profiles.ROOT / ".armada")

    @property
    def runs(self) -> Path:
        return self.root / "runs"

    @property
    def features(self) -> Path:
        return self.root / "features"

    def check(self) -> None:
        """Raise OSError naming the folder and the variable if the store cannot be written to."""
        try:
            for folder in (self.runs, self.features, self.root / "locks", self.root / "states"):
                folder.mkdir(parents=True, exist_ok=True)
            for left in self.runs.glob(".*"):  # of a killed process: a living one renames it soon
                if not left.name.startswith(".damaged") and _age(left) > 3600:
                    shutil.rmtree(left, ignore_errors=True)
            probe = self.runs / f".{uuid.uuid4().hex}"
            probe.write_bytes(b"")
            probe.unlink()
        except OSError as e:
            raise OSError(
                f"the store {self.root} cannot be written to ({e.strerror}); set ARMADA_STORE to a writable folder"
            ) from None

    def lock(self, key: str) -> FileLock:
        """Held while a run is computed; freed by the system when its process dies."""
        return FileLock(self.root / "locks" / f"{key}.lock")

    def state(self, key: str) -> Path:
        return self.root / "states" / f"{key}.safetensors"

    def save(self, result: Result) -> None:
        """Raises OSError naming the folder when the disk is full; nothing half-written is left."""
        home = self.runs / result.spec.key
        temporary = self.runs / f".{result.spec.key}.{uuid.uuid4().hex}"
        arrays = {f"outputs/{k}": np.ascontiguousarray(v) for k, v in result.outputs.items()}
        arrays |= {f"curves/{k}": np.ascontiguousarray(v) for k, v in result.curves.items()}
        arrays["labels"] = np.ascontiguousarray(result.labels)
        try:
            temporary.mkdir(parents=True)
            save_file(arrays, temporary / "arrays.safetensors")
            body = result.record() | {"arrays": _sha(temporary / "arrays.safetensors")}
            text = json.dumps(body, sort_keys=True)
            digest = hashlib.sha256(text.encode()).hexdigest()
            (temporary / "result.json").write_text(json.dumps({"digest": digest, "result": text}))
            for name in ("arrays.safetensors", "result.json"):
                with (temporary / name).open("rb") as f:
                    os.fsync(f.fileno())
            try:
                temporary.rename(home)
            except OSError:
                if not home.is_dir():
                    raise
                shutil.rmtree(temporary)  # another worker was first; both are the same run
        except Exception as e:
            shutil.rmtree(temporary, ignore_errors=True)
            if isinstance(e, OSError) or "No space left" in str(e):
                raise OSError(
                    f"the Result of {result.spec.label} could not be written to {self.runs}: {e}"
                ) from e
            raise

    def load(self, key: str) -> Result | None:
        """The Result, or None if it is absent or damaged (then it is set aside).

        Raises OSError if it is there and cannot be read now.
        """
        home = self.runs / key
        if not home.is_dir():
            return None
        try:
            outer = json.loads((home / "result.json").read_text())
            if hashlib.sha256(outer["result"].encode()).hexdigest() != outer["digest"]:
                raise ValueError("result.json does not match its digest")
            body = json.loads(outer["result"])
            if _sha(home / "arrays.safetensors") != body["arrays"]:
                raise ValueError("arrays.safetensors does not match its digest")
            arrays = load_file(home / "arrays.safetensors")
            found = result_of(body, arrays)
            if found.spec.key != key:
                raise ValueError("it is of another specification")
            return found
        except FileNotFoundError as e:
            self._set_aside(key, e)
        except (OSError, MemoryError):  # nothing is known of the Result
            raise
        except Exception as e:  # noqa: BLE001  (whatever is wrong with it, it must not be used)
            self._set_aside(key, e)
        return None

    def _set_aside(self, key: str, why: Exception) -> None:
        aside = self.runs / f".damaged-{key}-{uuid.uuid4().hex[:8]}"
        log.warning(
            "stored run %s is damaged (%s): set aside as %s and computed again",
            key,
            why,
            aside.name,
        )
        with contextlib.suppress(FileNotFoundError):  # another worker has set it aside
            (self.runs / key).rename(aside)

    def __contains__(self, spec: RunSpec) -> bool:
        return (self.runs / spec.key / "result.json").exists()


def result_of(body: dict[str, Any], arrays: dict[str, np.ndarray]) -> Result:
    """A Result from its stored parts."""
    pick = lambda p: {k[len(p) :]: v for k, v in arrays.items() if k.startswith(p)}
    return Result(
        _spec(body["spec"]), body["metric"], body["scores"], pick("outputs/"), arrays["labels"],
        pick("curves/"), body["facts"], body["environment"],
    )  # fmt: skip


def _spec(raw: dict[str, Any]) -> RunSpec:
    """A stored specification. What a later version added has its default there, or the key would be
    another one; here it is left out.
    """
    known = {k: v for k, v in raw.items() if k in RunSpec.model_fields}
    training = {k: v for k, v in raw["training"].items() if k in Training.model_fields}
    return RunSpec(**known | {"training": training})


def fields(r: Result | dict[str, Any]) -> dict[str, Any]:
    """`spec`, `metric`, `scores` and `facts` of a Result, or of a record that `read` gives."""
    if isinstance(r, Result):
        return {"spec": r.spec, "metric": r.metric, "scores": r.scores, "facts": r.facts}
    return r


def export(results: Iterable[Result | dict[str, Any]], path: str | Path) -> None:
    """Write Results, or records read before, as evidence to be committed: one JSON line each,
    sorted, without arrays. Of two with one key the later stays.
    """
    records = [
        r.record() if isinstance(r, Result) else r | {"spec": r["spec"].model_dump()}
        for r in results
    ]
    lines = {r["key"]: json.dumps(r, sort_keys=True) for r in records}
    ordered = sorted(lines.values(), key=lambda s: (_order(json.loads(s)["spec"]), s))
    write_text(Path(path), "\n".join(ordered) + "\n")


def _order(spec: dict[str, Any]) -> tuple[str, ...]:
    return tuple(str(spec[k]) for k in ("task", "method", "reading", "manifold", "beta", "seed"))


def read(path: str | Path) -> list[dict[str, Any]]:
    """The records of an exported file. Raises ValueError for a line whose key is not its spec's."""
    records = [json.loads(s) for s in Path(path).read_text(encoding="utf-8").splitlines() if s]
    for n, r in enumerate(records):
        r["spec"] = RunSpec(**r["spec"])
        if r["spec"].key != r["key"]:
            raise ValueError(f"{path}, line {n + 1}: the key does not belong to this specification")
    return records
