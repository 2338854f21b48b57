"""One way to compute what a claim says, and the status that several ways add up to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from armada_lib.audit.numbers import agrees

# What a claim's own tables say of it. The first three are decided by its readings; the others are
# stated in `book/published/claims.csv`, because no printed number can decide them.
COMPUTED = ("agrees", "agrees under one reading", "differs")
STATED = {
    "figure only": "rests on a figure or on data that are not printed",
    "contradicts itself": "the paper states two different things",
    "remark": "a property of the printed tables, not a claim of the paper",
    "false": "refuted by a counterexample",
}


@dataclass(frozen=True)
class Reading:
    """A rule, the numbers that answer those in the claim (in its order), and what stands beside.

    `holds` is set for a claim in words: whether it is so under this rule.
    """

    rule: str
    answers: Mapping[str, float] = field(default_factory=dict)
    beside: Mapping[str, float] = field(default_factory=dict)
    holds: bool | None = None

    def agrees(self, printed: Sequence[str]) -> bool | None:
        """Whether the claim is so under this rule; None if nothing can be compared.

        One printed number serves all answers. ValueError if the counts do not fit otherwise.
        """
        if self.holds is not None:
            return self.holds
        if not self.answers or not printed:
            return None
        numbers = list(printed) * len(self.answers) if len(printed) == 1 else list(printed)
        if len(numbers) != len(self.answers):
            raise ValueError(f"{self.rule}: {len(self.answers)} answers to {list(printed)}")
        return all(agrees(v, p) for v, p in zip(self.answers.values(), numbers, strict=True))


def status(readings: Sequence[Reading], printed: Sequence[str]) -> str | None:
    """One of `COMPUTED`: every comparable reading agrees, some, or none; None if none compares."""
    found = [a for r in readings if (a := r.agrees(printed)) is not None]
    if not found:
        return None
    return COMPUTED[0] if all(found) else COMPUTED[1] if any(found) else COMPUTED[2]
