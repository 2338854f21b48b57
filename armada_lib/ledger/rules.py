"""The rules by which an entry of the ledger is judged: a criterion, and the function that applies it.

A criterion is that of the chapter which the entry belongs to, stated there before the runs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from armada_lib.ledger import analyses, judges
from armada_lib.ledger.judges import Measured


@dataclass(frozen=True)
class Rule:
    """`criterion`: what was to be met. `judge`: evidence by name (and options) -> `Measured`, or None
    where the evidence has none of the runs that are asked for.
    """

    criterion: str
    judge: Callable[..., Measured | None]


SEEDS = "each difference with a 95 % interval over three seeds or more above zero"
RULES: dict[str, Rule] = {
    "losses": Rule(
        "every manifold loss gains on average over the tasks, over undistilled and over the shuffled "
        f"teacher, {SEEDS}", judges.losses),
    "f1": Rule(
        "in micro and in macro F1, every manifold loss gains over undistilled and over the shuffled "
        f"teacher, {SEEDS}", judges.f1),
    "transfer": Rule(
        "real minus shuffled teacher is above zero on a primary task of the protocol (Holm over the "
        "three, and the 95 % interval over seeds and examples) and below zero on none",
        judges.transfer),
    "over": Rule(f"every manifold loss scores above that method on average over the tasks, {SEEDS}", judges.over),
    "aligner_below": Rule(
        f"the undistilled student scores above the aligner on average over the tasks, {SEEDS}",
        judges.aligner_below),
    "heads": Rule(
        "the 95 % interval of Spearman's coefficient over losses and tasks holds the printed one "
        "(direction agrees: it is above zero)", judges.heads),
    "equal": Rule(
        "ARMADA minus the mean of the baselines, averaged over tasks, has a 95 % interval over three "
        "seeds or more that lies within one point of zero", judges.equal),
    "ahead": Rule(f"ARMADA scores above every baseline on average over the tasks, {SEEDS}", judges.ahead),
    "weights": Rule("the better value of each weight gains over the other end, and for β the base over the shuffled "
        f"teacher, {SEEDS}", analyses.weights),
    "best_loss": Rule(f"the loss that the claim names scores above each other one, {SEEDS}", analyses.best_loss),
    "alike": Rule(
        "every two losses differ by less than one point, by the whole 95 % interval of their "
        "difference averaged over the test sets", analyses.alike),
    "measure": Rule(
        "the measure moves as claimed: over the arm that the claim names, over the shuffled and over the random "
        "teacher, each with a 95 % interval over three seeds or more on the claimed side of zero",
        analyses.measure),
    "frozen_below": Rule(
        f"the student with a frozen aligner scores below undistilled, {SEEDS}",
        analyses.frozen_below),
    "robust": Rule(f"the student is more sensitive to noise than its aligner, {SEEDS}", analyses.robust),
    "noise_hurts": Rule(f"the gain without noise is larger than with the most noise, {SEEDS}",
                        analyses.noise_hurts),
}  # fmt: skip
