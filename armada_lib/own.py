"""A project of one's own: a table of texts and labels, a student, a teacher, and what came of it.

`project` writes a profile to the folder of one's own profiles, so that every chapter and command
takes the project's name where it takes `mini`. The controls always run: a gain over the undistilled
student says nothing of the teacher until a shuffled teacher stands beside it.
"""

from __future__ import annotations

import math
import re
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import transformers
import yaml

from armada_lib import (
    contrasts,
    extraction,
    families,
    profiles,
    report,
    run_data,
    runs,
    specs,
    tables,
)
from armada_lib import tasks as task_table
from armada_lib.contrasts import Contrast
from armada_lib.files import write_text
from armada_lib.profiles import Profile, check
from armada_lib.results import Result, RunSpec, RunStore
from armada_lib.teachers import encoders

METHODS = ("undistilled", "armada", "shuffled", "layers_only")
MOST_CLASSES = 50
MARK = (
    "# Written by armada_lib.own.project, which replaces it. Without this line it is left alone.\n"
)
PAIRS = {
    "real − undistilled": ("armada", "undistilled"),
    "shuffled − undistilled": ("shuffled", "undistilled"),
    "added layers − undistilled": ("layers_only", "undistilled"),
    "real − shuffled": ("armada", "shuffled"),
}


@dataclass(frozen=True)
class Project:
    """What is run: every method of `METHODS` with every seed, all complete and checked."""

    name: str
    specs: list[RunSpec]

    @property
    def profile(self) -> Profile:
        return profiles.load(self.name)

    @property
    def best(self) -> RunSpec:
        """The distilled student that is exported: that of the first seed, whatever it scored."""
        return next(s for s in self.specs if s.method == "armada")


def project(
    name: str,
    table: str | Path,
    text: str | Sequence[str] = "text",
    label: str = "label",
    labels: Sequence[str] | None = None,
    scale: tuple[float, float] | None = None,
    validation: str | Path | None = None,
    student: str | None = None,
    teacher: str | Mapping[str, Any] = "sd14",
    like: str | None = None,
    manifold: str = "euclid",
    seeds: Sequence[int] | None = None,
    **training: Any,
) -> Project:
    """Check everything, write the profile `name` and make its specs; nothing is computed yet.

    `table`: a .csv, .jsonl or .parquet with the column(s) `text`, one or two, and `label`. `labels`:
    the classes in the order of the outputs, by default the values there are; `scale` instead: lowest
    and highest of a score. Without `validation`, another such table, a quarter of the rows is held
    out. `student`: a student of the profile `like`, or a hub id or folder of a classifier that
    `students` can take apart. `teacher`: a teacher of that profile, or the settings of one
    (`teacher_settings.TeacherSpec`). `seeds`: by default the profile's. `training`: any field of
    `settings.Training`.

    Raises one clear error (ValueError, FileNotFoundError) for whatever is wrong, before any work.
    """
    _name(name)
    base = profiles.load(like or profiles.default())
    own: dict[str, Any] = {"about": f"a project like {base.name}", "like": base.name}
    task: dict[str, Any] = {
        "train": str(Path(table).absolute()), "label": label,
        "texts": [text] if isinstance(text, str) else list(text),
    }  # fmt: skip
    if validation is not None:
        task["validation"] = str(Path(validation).absolute())
    rows = tables.column(tables.read(table), label, Path(table).name)
    if scale is not None:
        task["scale"] = [float(x) for x in scale]
    else:
        task["labels"] = [str(x) for x in labels] if labels else _classes(rows, label)
    own["tasks"] = {name: task}
    if student is not None and student not in base.students:
        own["students"] = {"own": {"checkpoint": student}}
        student = "own"
    if not isinstance(teacher, str):
        own["teachers"] = {"own": _teacher(teacher)}
        teacher = "own"
    if training:
        own["training"] = {"tasks": {name: training}}
    _write(name, own)
    who = profiles.load(name).student(student or base.nlu.student)
    profiles.identity(who.checkpoint, who.revision)  # says how to get what is not there
    if who.lora is None:  # else `specs` says that it generates
        where = transformers.AutoConfig.from_pretrained(
            profiles.resolve(who.checkpoint), revision=who.revision
        )
        check(where.model_type, families.FAMILIES, f"architecture of student {who.checkpoint}")
    found = specs.grid(
        name, [name], METHODS, [manifold], seeds=list(seeds or base.own_seeds), controls=[manifold], student=who.name,
        teacher=teacher,
    )  # fmt: skip
    return Project(name, found)


def _name(name: str) -> None:
    taken = [*(p.stem for p in profiles.folder().glob("*.yaml")), *task_table.TASKS]
    if not re.fullmatch(r"[a-z][a-z0-9_-]*", name):
        raise ValueError(f"project name {name!r}: use small letters, digits, - and _")
    if name in taken:
        raise ValueError(f"project name {name!r} is taken; so are {', '.join(sorted(taken))}")


def _classes(values: list[Any], label: str) -> list[str]:
    found = sorted({str(v).strip() for v in values})
    if "" in found:
        raise ValueError(f"column {label!r}: some rows have no label")
    if not 2 <= len(found) <= MOST_CLASSES:
        raise ValueError(
            f"column {label!r} has {len(found)} different values, which are no classes: give `labels`, "
            "or `scale` for a score"
        )
    return found


def _teacher(given: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a teacher, with the width that its encoder has and a folder that stays found."""
    made = dict(given)
    if made.get("kind") == "blackbox" and "encoder" in made and "width" not in made:
        made["width"] = encoders.get(made["encoder"], made.get("encoder_revision")).width
    if isinstance(made.get("folder"), str | Path):
        made["folder"] = str(Path(made["folder"]).expanduser().absolute())
    return made


def _write(name: str, own: dict[str, Any]) -> None:
    path = profiles.own() / f"{name}.yaml"
    text = MARK + yaml.safe_dump(own, sort_keys=False, allow_unicode=True)
    old = path.read_text(encoding="utf-8") if path.exists() else MARK
    if not old.startswith(MARK):
        raise ValueError(
            f"{path} was changed by hand and is left alone: use another project name, or run its "
            f"profile as it is, such as `papermill book/02_nlu.ipynb out.ipynb -p profile {name}`"
        )
    if text == old:
        return
    write_text(path, text)
    for known in (profiles.load, profiles.file_digest, extraction.load):
        known.cache_clear()
    try:
        profiles.load(name)
    except ValueError:
        path.unlink()  # else every later list of profiles holds one that cannot be read
        profiles.load.cache_clear()
        raise


# -- what it will cost ---------------------------------------------------------------------------


def cost(p: Project, store: RunStore | None = None, trial: int = 4) -> pd.DataFrame:
    """What is missing and how long it takes, from a trial of `trial` steps and as many texts.

    One row a kind of work: what, how many, stored, minutes of one process. The texts of the trial are
    kept; a service is asked for nothing, and its row counts calls. Nothing is trained to an end.
    """
    store = store or RunStore()
    taught = p.best
    who = p.profile.teacher(str(taught.teacher))
    texts = list(dict.fromkeys(run_data.teacher_texts(taught)))
    missing = extraction.feature_store(p.name, who.name, store).missing(texts)
    asked = getattr(who, "source", None) == "api"
    each = math.nan
    if missing and not asked:
        # the first texts carry the loading of the model, the next ones the time of a text
        extraction.fill(p.name, who.name, missing[:1], store, 1, progress=False)
        began = time.perf_counter()
        extraction.fill(p.name, who.name, missing[1 : 1 + trial], store, 1, progress=False)
        each = (time.perf_counter() - began) / max(1, len(missing[1 : 1 + trial]))
        missing = missing[1 + trial :]
    rows = [{
        "work": "calls of the service" if asked else "teacher's vectors", "all": len(texts),
        "missing": len(missing), "minutes": len(missing) * each / 60 if missing else 0.0,
    }]  # fmt: skip
    todo = [s for s in p.specs if s not in store]
    rows.append({"work": "training runs", "all": len(p.specs), "missing": len(todo),
                 "minutes": len(todo) * _minutes(p, store, trial) if todo else 0.0})  # fmt: skip
    return pd.DataFrame(rows)


def _minutes(p: Project, store: RunStore, trial: int) -> float:
    """How long one run takes a process, from its first `trial` steps."""
    first = next(s for s in p.specs if s.method == "undistilled")
    some = first.training.batch_size * trial
    few = first.training.model_copy(update={"train_size": some, "epochs": 1})
    with tempfile.TemporaryDirectory() as folder:
        tried = runs.compute(
            first.model_copy(update={"training": few}), store, state=Path(folder) / "state"
        )
    done = tried.facts
    step = done["train_seconds"] / done["steps"]
    steps = math.ceil(len(run_data.examples(first)[0]) / first.training.batch_size)
    return (done["seconds"] - done["train_seconds"] + step * steps * first.training.epochs) / 60


# -- what came of it -----------------------------------------------------------------------------


def compare(found: Sequence[Result]) -> dict[str, Contrast]:
    """The contrasts of `PAIRS` over the shared seeds, with intervals over seeds and examples."""
    by = {(r.spec.method, r.spec.seed): r for r in found}
    metric, labels = found[0].metric, found[0].labels
    drawn = contrasts.counts(len(labels), 2000)
    out = {}
    for name, (a, b) in PAIRS.items():
        seeds = [s for m, s in by if m == a and (b, s) in by]
        if not seeds:
            continue
        scored = [
            contrasts.rescored(metric, [by[m, s].predictions() for s in seeds], labels, drawn)
            for m in (a, b)
        ]
        d = [by[a, s].score - by[b, s].score for s in seeds]
        out[name] = contrasts.contrast(d, scored[0] - scored[1])
    return out


def table(found: Sequence[Result]) -> pd.DataFrame:
    """A row an arm: seeds, mean and standard deviation of the score, collapsed runs."""
    by_arm = report.arms(report.table(found)).groupby("arm", sort=False)
    made = by_arm.agg(seeds=("score", "size"), mean=("score", "mean"), sd=("score", "std"),
                      collapsed=("collapsed", "sum"))  # fmt: skip
    return made.rename_axis("trained as").reset_index()


CRITERION = (
    "the teacher helped by what it knows if the distilled student is above the undistilled one *and* "
    "above the student of a shuffled teacher, each with p < 0.05 (paired t test over seeds) and a 95 % "
    "interval over seeds and examples above zero; regularisation, if the shuffled teacher helps as well"
)


PLAIN = {"reproduced": "Yes", "not reproduced": "No", "undecided": "It cannot be told"}


def answer(found: Sequence[Result]) -> tuple[str, str]:
    """(outcome for `chapter.verdict`, the plain answer): did the teacher help, beyond regularisation?

    The rule is `CRITERION`; with fewer than three seeds of every arm the answer stays open.
    """
    c = compare(found)
    if not PAIRS.keys() <= c.keys() or min(x.n for x in c.values()) < 3:
        return "undecided", "It cannot be said: every arm needs three seeds or more."
    lies = {name: contrasts.direction(x, x.p) for name, x in c.items()}
    over, knows = lies["real − undistilled"], lies["real − shuffled"]
    if over > 0 and knows > 0:
        outcome, said = "reproduced", "Yes. The teacher helped, and by what it knows of each text."
    elif over < 0 or knows < 0:
        worse = "a shuffled teacher" if knows < 0 else "no teacher at all"
        outcome, said = "not reproduced", f"No. The student does worse than with {worse}."
    elif over > 0 and lies["shuffled − undistilled"] > 0:
        outcome = "not reproduced"
        said = "Not by what it knows: a teacher that knows nothing helps as well."
    elif over > 0:
        outcome, seen = "undecided", c["real − shuffled"].found
        said = (
            "The student gained, but not clearly more than with a shuffled teacher: more seeds or "
            f"examples would tell; {seen:.1f} points would probably have been seen."
        )
    else:
        outcome, most = "undecided", max(c["real − undistilled"].high, 0)
        said = (
            "No gain was found over the student that nobody taught. A true gain above "
            f"{most:.1f} points is unlikely."
        )
    numbers = "; ".join(
        f"{k} {report.signed(x.mean)}{report.interval(x.low, x.high)}" for k, x in c.items()
    )
    return outcome, f"{said} In points: {numbers}; {c['real − undistilled'].n} seeds."
