"""The paper's printed cells as gains, and the rules by which three losses become one number."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import pandas as pd

from armada_lib import chapter
from armada_lib.report import LOSS
from armada_lib.stats import TTest, paired_t

BEST = "best of three losses"
EVEN = 1e-9  # two printed numbers are equal up to the rounding of their difference


@cache
def cells(*tables: int) -> pd.DataFrame:
    """One row an ARMADA cell of these tables: student, task, loss, teacher, undistilled, score, gain.

    Scores and gains in points, as printed; a gain is the score minus the undistilled student's.
    """
    parts = []
    for number in tables:
        printed = chapter.published(number)
        printed = printed[printed["task"] != "average"]
        keys = ["student", "task"]
        base = printed[printed["method"] == "undistilled"].set_index(keys)["value"]
        own = printed[printed["method"] == "ARMADA"].copy()
        own["undistilled"] = base.loc[
            list(zip(own["student"], own["task"], strict=True))
        ].to_numpy()
        parts.append(own)
    found = pd.concat(parts, ignore_index=True)
    found = found.rename(columns={"manifold_loss": "loss", "value": "score"})
    found["gain"] = found["score"] - found["undistilled"]
    columns = ["student", "task", "loss", "teacher", "undistilled", "score", "gain"]
    return found[columns]


def of(frame: pd.DataFrame, **wanted: str) -> pd.DataFrame:
    """Rows whose columns have these values; ValueError if there are none."""
    for column, value in wanted.items():
        frame = frame[frame[column] == value]
    if frame.empty:
        raise ValueError(f"no printed cell for {wanted}")
    return frame


def best(frame: pd.DataFrame, *by: str) -> pd.DataFrame:
    """The cell with the highest score in each group; groups are (student, task) unless named."""
    rows = frame.groupby(list(by) or ["student", "task"], sort=False)["gain"].idxmax()
    return frame.loc[rows]


def mean_cell(frame: pd.DataFrame) -> pd.DataFrame:
    """The mean of all cells of each (student, task)."""
    keys = ["student", "task"]
    return frame.groupby(keys, sort=False, as_index=False)[["undistilled", "score", "gain"]].mean()


# One number for each student and task, out of the cells of a table.
RULES: dict[str, Callable[[pd.DataFrame], pd.DataFrame]] = {
    BEST: best,
    **{name: partial(of, loss=loss) for loss, name in LOSS.items()},
}


def t_test(frame: pd.DataFrame) -> TTest:
    """One-sided paired t test of score against undistilled, one pair a row."""
    return paired_t(frame["score"], frame["undistilled"], "greater")


def sides(gains: pd.Series) -> dict[str, int]:
    """How many gains are up, down, equal."""
    return {
        "up": int((gains > EVEN).sum()),
        "down": int((gains < -EVEN).sum()),
        "equal": int((gains.abs() <= EVEN).sum()),
    }


def without_best_task(frame: pd.DataFrame) -> tuple[str, float]:
    """(task, average of the other tasks): what is left of an average without its largest gain."""
    top = frame["gain"].idxmax()
    return str(frame.loc[top, "task"]), float(frame["gain"].drop(top).mean())
