"""What printed numbers can be: rounding, counts on small test sets, parameters, the best of several."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from decimal import ROUND_DOWN, ROUND_HALF_EVEN, ROUND_HALF_UP, Decimal

import numpy as np
import pandas as pd
from scipy import integrate
from scipy import stats as sps

from armada_lib import chapter, report
from armada_lib.profiles import ROOT

TIE = 1e-9  # a number that lies half-way, such as 1.45, may be printed up or down


# ------------------------------------------------------------------------------- rounding


def printed_numbers(text: str) -> list[str]:
    """The numbers in a claim as printed, each with the sign < or > that stands before it."""
    found = re.findall(r"([<>]?)\s*((?<![\w-])[+-]?\d+(?:\.\d+)?(?:e-?\d+)?)", text)
    return [sign + number for sign, number in found]


def agrees(value: float, printed: str) -> bool:
    """Whether `value` prints as `printed`, or lies on the side that "<" or ">" says.

    A value half-way between two printed ones agrees with both. nan agrees with nothing. ValueError
    if what is printed is not finite.
    """
    if printed[0] in "<>":
        bound = float(printed[1:])
        return value < bound if printed[0] == "<" else value > bound
    unit = Decimal(printed).as_tuple().exponent
    if not isinstance(unit, int):
        raise ValueError(f"{printed!r} is not a finite number")
    return abs(value - float(printed)) <= 0.5 * 10.0**unit + TIE


def rounded(value: Decimal, like: str, how: str) -> Decimal:
    """`value` to the decimals of `like`, by a rounding rule of `decimal`."""
    return value.quantize(Decimal(1).scaleb(Decimal(like).as_tuple().exponent), rounding=how)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------- test sets


def splits() -> pd.DataFrame:
    """Sizes of the public test sets: task, split, n, majority (rows of the commonest label), source."""
    return pd.read_csv(ROOT / "book/published/splits.csv")


def attainable(printed: str, n: int) -> str:
    """How a single run on `n` examples can print as this accuracy in %: "rounded", "truncated" or nothing.

    Exact: some k of n, times 100, to the printed decimals (half-way cases either way).
    """
    value, about = Decimal(printed), round(float(printed) * n / 100)
    near = [Decimal(100 * k) / n for k in range(max(0, about - 1), min(n, about + 1) + 1)]
    for how, name in (
        (ROUND_HALF_UP, "rounded"),
        (ROUND_HALF_EVEN, "rounded"),
        (ROUND_DOWN, "truncated"),
    ):
        if any(rounded(x, printed, how) == value for x in near):
            return name
    return ""


def accuracies(*tables: int) -> pd.DataFrame:
    """Every accuracy that these tables print: table, task, printed."""
    parts = [chapter.published(t).assign(table=t) for t in tables]
    found = pd.concat([p[p["metric"] == "accuracy"] for p in parts], ignore_index=True)
    return found[["table", "task", "printed"]]


def attainability(*tables: int) -> pd.DataFrame:
    """A row a test set: which printed accuracies can be those of one run on it.

    Columns: test set, examples, step (points that one example is worth), standard error (of an
    accuracy of 75 %, in points), printed (how many values), rounded, truncated, neither, which.
    Where the step is below 0.1 every value is attainable.
    """
    rows, values = [], accuracies(*tables)
    for s in splits().itertuples():
        own = values[values["task"] == s.task]
        if own.empty:
            continue
        how = [attainable(p, s.n) for p in own["printed"]]
        out = sorted({p for p, h in zip(own["printed"], how, strict=True) if not h}, key=float)
        rows.append({
            "test set": f"{s.task}, {s.split}", "examples": s.n, "step": 100 / s.n,
            "standard error": 100 * math.sqrt(0.75 * 0.25 / s.n), "printed": len(own),
            "rounded": how.count("rounded"), "truncated": how.count("truncated"),
            "neither": how.count(""), "which": ", ".join(out) or "none",
        })  # fmt: skip
    return pd.DataFrame(rows)


# ------------------------------------------------------------------------------- parameters


def weights(*shapes: Sequence[int], biases: bool = False) -> int:
    """Weights of linear layers (inputs, outputs), with their biases if asked."""
    return sum(i * o + (o if biases else 0) for i, o in shapes)


def bert_weights(
    layers: int = 12, d: int = 768, words: int = 30522, positions: int = 512, inner: int = 3072
) -> int:
    """Parameters of a BERT encoder with its pooler: embeddings, layers, biases, layer norms."""
    norm = 2 * d
    embeddings = (words + positions + 2) * d + norm
    attention = weights(*[(d, d)] * 4, biases=True) + norm
    feed_forward = weights((d, inner), (inner, d), biases=True) + norm
    return embeddings + layers * (attention + feed_forward) + weights((d, d), biases=True)


# ------------------------------------------------------------------------------- best of several


def best_of(n: int) -> float:
    """Expected maximum of `n` independent standard normal numbers (closed form by quadrature).

    ValueError for `n` below 1.
    """
    if n < 1:
        raise ValueError(f"the best of how many? got {n}")
    integrand = lambda x: x * n * sps.norm.pdf(x) * sps.norm.cdf(x) ** (n - 1)
    return float(integrate.quad(integrand, -12, 12)[0])


def seed_spread(df: pd.DataFrame) -> pd.DataFrame:
    """A row a task: standard deviation between seeds, pooled over the arms with three seeds or more.

    `df`: the frame of `report.table`. Columns: task, arms, seeds, df (degrees of freedom), sd.
    ValueError if no arm has three seeds.
    """
    rows = []
    for title, part in report.arms(df).groupby("title", sort=False):
        groups = [g["score"] for _, g in part.groupby("arm") if g["seed"].nunique() > 2]
        if not groups:
            continue
        free = sum(len(g) - 1 for g in groups)
        squares = sum(float(((g - g.mean()) ** 2).sum()) for g in groups)
        rows.append({
            "task": title, "arms": len(groups), "seeds": max(map(len, groups)), "df": free,
            "sd": math.sqrt(squares / free),
        })  # fmt: skip
    if not rows:
        raise ValueError("no arm was run with three seeds: there is no spread to measure")
    return pd.DataFrame(rows)


# What is reported of the student with ARMADA and of the undistilled one: (losses, runs), runs.
REPORTED = {
    "mean of the runs, one loss": ((1, 0), 0),
    "best of three losses, one run each": ((3, 1), 1),
    "best of three runs, one loss, against one run": ((1, 3), 1),
    "best of three losses, each the best of three runs, against the best of three runs": (
        (3, 3),
        3,
    ),
    "best of three losses, each the best of three runs, against one run": ((3, 3), 1),
}


def selection(
    spread: pd.DataFrame, draws: int = 20_000, seed: int = 0
) -> tuple[pd.DataFrame, np.ndarray]:
    """Gains that appear when no loss does anything, by what is reported of each task.

    Every run of every task draws its score from a normal law with the task's own spread between
    seeds (`seed_spread`); all losses and the undistilled student share one mean, so the true gain
    is zero. A (losses, runs) pair reports the maximum over both; (1, 0) is the mean of three runs.

    Returns (table, gains): the table has a row a rule with the expected gain in points, averaged
    over the tasks: closed (sd times differences of `best_of`), simulated, low and high (95 % of the
    simulated averages), and `in_sd` (closed, in standard deviations). gains: (rules, draws).
    ValueError if `draws` is below 1.
    """
    if draws < 1:
        raise ValueError(f"draws must be >= 1, got {draws}")
    rng, sd = np.random.default_rng(seed), spread["sd"].to_numpy()
    rows, drawn = [], []
    for rule, ((losses, runs), base) in REPORTED.items():

        def score(losses: int, runs: int) -> np.ndarray:
            own = rng.normal(size=(draws, len(sd), losses, runs or 3)) * sd[:, None, None]
            return own.mean((2, 3)) if runs == 0 else own.max((2, 3))

        gain = (score(losses, runs) - score(1, base)).mean(1)
        expected = lambda losses, runs: best_of(losses * runs) if runs else 0.0
        in_sd = expected(losses, runs) - expected(1, base)
        low, high = np.quantile(gain, [0.025, 0.975])
        rows.append({
            "reported": rule, "in_sd": in_sd, "closed": in_sd * sd.mean(),
            "simulated": gain.mean(), "low": low, "high": high,
        })  # fmt: skip
        drawn.append(gain)
    return pd.DataFrame(rows), np.array(drawn)
