"""The page on teachers: whose work, and for which sentences."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from armada_lib import chapter, guard, profiles, views
from armada_lib import tasks as task_table
from armada_lib.plans.common import played, profile_of, several
from armada_lib.results import RunStore

LOOKED_AT = ("cola", "stsb", "mnli", "qqp", "copa")  # tasks with short sentences
TEACHER_PARAMETERS = ("profile", "teachers", "tasks", "workers")


@dataclass(frozen=True)
class Looks:
    """What the page on teachers shows: whose work, and for which sentences."""

    profile: str
    teachers: list[str]
    texts: list[str]

    @property
    def visible(self) -> list[str]:
        """The teachers that make something to look at."""
        p = profiles.load(self.profile)
        return [t for t in self.teachers if p.teacher(t).kind in views.SHOW]

    def run_line(self) -> None:
        """Show who plays whom."""
        p = profiles.load(self.profile)
        chapter.run_line({
            "profile": f"{self.profile} ({p.about})",
            **{t: played(p.teacher(t)) for t in self.teachers},
        })  # fmt: skip


def looks(ns: dict[str, Any]) -> Looks:
    """Check the parameters of the page on teachers; nothing is computed yet."""
    got = guard.params(ns, TEACHER_PARAMETERS)
    name, p = profile_of(got)
    # posters belong to films: of other texts there is none, or what another teacher paints already
    usual = [t for t in p.teachers if t != "posters"]
    chosen = several(got["teachers"], usual, p.teachers, f"teacher (profile {name})")
    wanted = several(got["tasks"], LOOKED_AT, task_table.TASKS, "task")
    RunStore().check()
    return Looks(name, chosen, views.sentences(name, wanted))
