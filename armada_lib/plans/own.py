"""The chapter on one's own student, task and teacher."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from armada_lib import guard, own, profiles, run_data
from armada_lib.own import Project
from armada_lib.plans.common import Plan, profile_of, seeds_of, several
from armada_lib.profiles import MANIFOLDS, check
from armada_lib.results import RunStore

OWN_PARAMETERS = (
    "profile", "name", "table", "text", "label", "scale", "validation", "student", "teacher", "manifold",
    "seeds", "epochs", "workers", "export",
)  # fmt: skip


@dataclass(frozen=True)
class YourOwn(Plan):
    """A plan with the project behind it, and the folder that its student goes to."""

    project: Project
    export: Path
    base: str  # the profile that the project is like
    table: Path
    columns: list[str]

    @property
    def seeds(self) -> list[int]:
        return sorted({s.seed for s in self.specs})

    @property
    def classes(self) -> pd.DataFrame:
        """How many examples of each class, or the mean and spread of the scores, by split."""
        rows = []
        for split, e in zip(
            ("training", "held out"), run_data.examples(self.specs[0]), strict=True
        ):
            row: dict[str, Any] = {"split": split, "examples": len(e)}
            if e.task.kind == "regression":
                row |= {"mean (0 to 5)": float(e.labels.mean()), "sd": float(e.labels.std())}
            else:
                row |= {n: int((e.labels == i).sum()) for i, n in enumerate(e.task.labels)}
            rows.append(row)
        return pd.DataFrame(rows)

    @property
    def texts(self) -> pd.DataFrame:
        """The first five training examples."""
        e = run_data.examples(self.specs[0])[0]
        names = e.task.labels
        said = [names[int(y)] if names else round(float(y), 2) for y in e.labels[:5]]
        second = {"second text": e.second[:5]} if e.second else {}
        return pd.DataFrame({"text": e.first[:5], **second, "label": said})


def your_own(ns: dict[str, Any]) -> YourOwn:
    """Check the chapter's parameters and make the project; nothing is computed yet.

    A file is looked for from where the notebook runs, then in the project. Raises one clear error
    for whatever is wrong with table, names, student or teacher.
    """
    got = guard.params(ns, OWN_PARAMETERS)
    base, p = profile_of(got)
    check(got["manifold"], MANIFOLDS, "manifold loss")
    seeds = seeds_of(got["seeds"], p.own_seeds)
    text = several(got["text"], [])
    given = {"epochs": got["epochs"]} if got["epochs"] is not None else {}
    table = _file(got["table"])
    RunStore().check()
    made = own.project(
        got["name"], table, text, got["label"],
        scale=several(got["scale"], []) if got["scale"] else None,  # type: ignore[arg-type]
        validation=_file(got["validation"]) if got["validation"] else None,
        student=None if got["student"] == "auto" else got["student"], teacher=got["teacher"],
        like=base, manifold=got["manifold"], seeds=seeds, **given,
    )  # fmt: skip
    teacher, student = str(made.best.teacher), made.best.student
    folder = Path(got["export"]) if got["export"] else profiles.own() / f"{made.name}-student"
    return YourOwn(made.name, [teacher], [student], made.specs, made, folder, base, table, text)


def _file(name: str | Path) -> Path:
    path = Path(name).expanduser()
    return path if path.exists() else profiles.ROOT / path
