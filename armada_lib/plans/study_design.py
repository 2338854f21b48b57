"""Which contrasts a study's file makes: every line of it is an entry, and pairs of them are compared.

Nothing here looks at a result. A line that is added to the file brings contrasts of its own and
leaves those of the other lines as they are.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from armada_lib import experiment, profiles, report

BARE = "undistilled"
PRIMARY, BY_LOSS = "real − shuffled", "by loss"
OVER, BESIDE, BETWEEN = "over undistilled", "real − control", "between teachers, readings"
GROUPS = (PRIMARY, BY_LOSS, BESIDE, OVER, BETWEEN)


class Arm(NamedTuple):
    """Runs that differ by task and seed alone; what a method does not use is None, as in `experiment.Cell`."""

    method: str
    teacher: str | None = None
    manifold: str | None = None
    reading: str | None = None


class Entry(NamedTuple):
    """A method in a line of the study's file: an arm a loss, or one arm where the method has no loss."""

    method: str
    teacher: str
    reading: str
    losses: tuple[str, ...]

    def arm(self, manifold: str) -> Arm:
        """Its arm with one of the losses."""
        return Arm(self.method, *experiment.used(self.method, self.teacher, manifold, self.reading))


@dataclass(frozen=True)
class Pair:
    """A contrast: the mean over `sides` of first minus second; `teacher`: whose it is about."""

    group: str
    name: str
    teacher: str
    sides: tuple[tuple[Arm, Arm], ...]


@dataclass(frozen=True)
class Design:
    """The arms of a study and the contrasts between them."""

    study: experiment.Study

    @cached_property
    def cells(self) -> list[experiment.Cell]:
        return experiment.cells(self.study)

    @cached_property
    def entries(self) -> list[Entry]:
        """Every method in every line, once; lines with the same losses on other tasks are the same."""
        return _entries(self.study.stages)

    @cached_property
    def main(self) -> Entry:
        """The real teacher of the primary contrasts: the first stage's first with a shuffled one."""
        there = _entries(self.study.stages[:1])
        both = lambda e, x: x[:3] == ("shuffled", *e[1:3]) and set(x.losses) & set(e.losses)
        return next(e for e in there if e.method == "armada" and any(both(e, x) for x in there))

    def _beside(self, e: Entry, method: str) -> list[str]:
        """Losses that the entry shares with another method of its teacher and reading."""
        others = [x.losses for x in self.entries if x[:3] == (method, *e[1:3])]
        return [m for m in e.losses if any(m in losses for losses in others)]

    @cached_property
    def pairs(self) -> list[Pair]:
        """Every contrast that the study's entries make, primary first."""
        main, found = self.main, []
        real = [e for e in self.entries if e.method == "armada"]
        taught = [e for e in self.entries if e.method in ("armada", "shuffled")]
        controls = [e for e in self.entries if e.method not in ("armada", "shuffled", BARE)]

        def add(group: str, name: str, e: Entry, other: Entry, losses: Sequence[str]) -> None:
            # arms without a loss have one side for all
            if sides := tuple(dict.fromkeys((e.arm(m), other.arm(m)) for m in losses)):
                found.append(Pair(group, name, e.teacher, sides))

        for e in real:
            twin = e._replace(method="shuffled")
            add(PRIMARY, f"{self._who(e)}{self._more(e)}", e, twin, self._beside(e, "shuffled"))
        for m in self._beside(main, "shuffled"):
            add(BY_LOSS, report.LOSS[m], main, main._replace(method="shuffled"), [m])
        for e in [*taught, *controls]:
            add(OVER, self.named(e), e, e._replace(method=BARE), e.losses)
        for e in controls:
            twin = e._replace(method="armada")
            add(BESIDE, self.named(e), twin, e, self._beside(e, "armada"))
        for e in real:
            name = None
            if e.teacher != main.teacher and e.reading == main.reading:
                name = f"{e.teacher} − {main.teacher}"
            elif e.teacher == main.teacher and e.reading != main.reading:
                name = f"{e.teacher}, {e.reading} − {main.reading}"
            if name:
                shared = [m for m in e.losses if m in main.losses]
                add(BETWEEN, f"{name}{self._more(e)}", e, main, shared)
        return sorted(found, key=lambda p: GROUPS.index(p.group))

    def _who(self, e: Entry) -> str:
        return e.teacher if e.reading == self.main.reading else f"{e.teacher}, {e.reading}"

    def named(self, e: Entry) -> str:
        """What contrasts and tables call an entry."""
        if e.method == BARE:
            return BARE
        who = self._who(e)
        if e.method in ("armada", "shuffled"):
            return f"{'real' if e.method == 'armada' else e.method} {who}{self._more(e)}"
        other = "" if e[1:3] == self.main[1:3] else f", {who}"
        return f"{report.CONTROLS.get(e.method, e.method)}{other}{self._more(e)}"

    def _more(self, e: Entry) -> str:
        """Losses in the name of an entry that is not the first of its kind."""
        before = next(x for x in self.entries if x[:3] == e[:3])
        return "" if e == before else f" ({', '.join(report.LOSS[m] for m in e.losses)})"

    @cached_property
    def planned(self) -> set[tuple[str, Arm]]:
        """Arms by task; a contrast has on a task what is planned there."""
        return {(c.task, Arm(*c.identity[1:5])) for c in self.cells}


def _entries(stages: Sequence[experiment.Stage]) -> list[Entry]:
    found: dict[Entry, None] = {}
    for a in (a for s in stages for a in s.arms):
        losses = tuple(m for m in profiles.MANIFOLDS if m in a.manifolds)
        for r, method in itertools.product(a.readings, a.methods):
            found.setdefault(Entry(method, a.teacher, str(r), losses))
    return list(found)
