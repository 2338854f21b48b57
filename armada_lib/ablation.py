"""Ablations: one thing changed from a stated base, and what that does, paired by task and seed.

The base is ARMADA with the Euclid loss in the paper's reading, at the weights and the recipe of the
profile. What a run changes is read off its specification, so that committed runs and live ones are
told apart in one way. Tables of differences are (task, seed) -> points unless they say otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import pandas as pd

from armada_lib import gentasks, profiles, report, run_data, stats
from armada_lib.methods import METHODS
from armada_lib.profiles import check
from armada_lib.results import Result, RunSpec, fields

BASE = {"method": "armada", "manifold": "euclid", "reading": "paper"}
SIGN = {"alpha": "α", "beta": "β", "gamma": "γ", "tau": "τ"}


class Factor(NamedTuple):
    """What may be changed: a weight, a loss, a reading or a setting of `Training`, by its name."""

    about: str
    register: str  # where the register of ambiguities lists it; "" = the paper varies it itself
    # what runs at each level: the shuffled teacher where a pull towards anything may be what helps,
    # the undistilled student where the level changes its training, too
    methods: tuple[str, ...] = ("armada",)


FACTORS: dict[str, Factor] = {
    "alpha": Factor("weight α of logit matching", "A18"),
    "beta": Factor("weight β of the manifold loss", "", ("armada", "shuffled")),
    "gamma": Factor("weight γ of the auxiliary losses", ""),
    "tau": Factor("temperature τ", ""),
    "manifold": Factor("manifold loss", ""),
    "reading": Factor("reading of the paper", "", ("armada", "shuffled")),
    "distance": Factor("form of the manifold loss", "A8"),
    "soft": Factor("distance of logits", "A6"),
    "manifold_to": Factor("who follows the manifold loss", "A11"),
    "detach": Factor("stop-gradient on the aligner", "A10"),
    "aligner_pretrain": Factor("epochs of the aligner alone, before", "A13"),
    "aligner": Factor("form of the aligner", "A1"),
    "projection": Factor("the student's projection", "A16"),
    "batch_size": Factor("batch size", "", ("undistilled", "armada")),
}


def overrides(factor: str, level: Any) -> dict[str, Any]:
    """The arguments of `specs.spec` that a level of a factor changes.

    A level that is a mapping names several of them, the factor's own among them. `Unknown` for a
    factor that does not exist, ValueError for a mapping without it or with another factor's field
    that is no weight.
    """
    check(factor, FACTORS, "factor")
    if not isinstance(level, Mapping):
        return {factor: level}
    more = set(level) - {factor}
    if factor not in level or not more <= set(SIGN):
        raise ValueError(
            f"a level of {factor!r} may set {factor!r} and the weights {list(SIGN)}, got {dict(level)}"
        )
    return dict(level)


def changes(s: RunSpec) -> dict[str, Any]:
    """What a run changes from the base of its profile, field by field, in the order of `FACTORS`.

    Seed, teacher, student, task and precision are no changes. Weights are compared with those of
    the run's own reading; a weight that a method does not have is no change.
    """
    p = profiles.load(s.profile)
    generates = s.task in gentasks.SUITES
    group = (gentasks.TASKS[s.task] if generates else run_data.task_of(p, s.task)).group
    usual = p.recipe(group, s.task, s.student)
    given = s.training.model_dump()
    found = {f: v for f, v in given.items() if f != "precision" and v != getattr(usual, f)}
    if METHODS[s.method].distils:
        w = p.armada[s.reading]  # type: ignore[index]
        base: dict[str, Any] = {"alpha": w.alpha, "gamma": w.gamma, "tau": w.tau}
        base |= {k: BASE[k] for k in ("manifold", "reading")}
        base["beta"] = w.of(s.manifold or BASE["manifold"], s.task)
        for name, value in base.items():
            left_out = name == "alpha" and generates or name == "manifold" and s.manifold is None
            if getattr(s, name) != value and not left_out:
                found[name] = getattr(s, name)
    order = {f: i for i, f in enumerate(FACTORS)}
    return dict(sorted(found.items(), key=lambda kv: order.get(kv[0], len(order))))


def _said(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        return f"{value:g}"
    return report.LOSS.get(value, str(value))


def _level(found: Mapping[str, Any]) -> tuple[str, str]:
    """(factor, level) by what is changed: "base", one factor, or "grid" where weights are crossed."""
    if not found:
        return "base", ""
    factor = next((f for f in reversed(list(found)) if f not in SIGN and f != "manifold"), "")
    if len(found) > 1 and not factor:
        return "grid", ", ".join(f"{SIGN.get(f, f)} = {_said(v)}" for f, v in found.items())
    factor = factor or next(iter(found))
    rest = [f"{SIGN.get(f, f)} = {_said(v)}" for f, v in found.items() if f != factor]
    return factor, ", ".join([_said(found[factor]), *rest])


def frame(results: Iterable[Result | dict[str, Any]]) -> pd.DataFrame:
    """The tidy table of runs, live or committed.

    A row a run, or a run and test set, of the student's own head, with the columns of
    `report.table` and: factor, level (see `changes`), pull_first and pull_last, the manifold term's
    gradient as a multiple of the task term's, in the first and the last epoch. ValueError if two
    runs cannot be told apart. No runs are an empty table.
    """
    results, told = list(results), {}
    for r in results:
        spec, facts = (fields(r)[part] for part in ("spec", "facts"))
        factor, level = _level(changes(spec))
        probes = [g["gradient"] for g in facts.get("diagnostics", {}).get("gradients", [])]
        pull = [g["manifold"] / g["task"] if g.get("manifold") and g.get("task") else math.nan
                for g in (probes[0], probes[-1])] if probes else [math.nan] * 2  # fmt: skip
        told[spec.key] = dict(zip(("factor", "level", "pull_first", "pull_last"),
                                  (factor, level, *pull), strict=True))  # fmt: skip
    if not results:
        return pd.DataFrame()
    df = report.table(results)
    df = df[df["head"] == "student"]
    df = df.join(pd.DataFrame.from_dict(told, orient="index"), on="key").reset_index(drop=True)
    by = ["task", "seed", "method", "factor", "level"]
    if len(twice := df[df.duplicated(by)]):
        raise ValueError(f"runs that differ in something else: {twice[by].values.tolist()[:3]}")
    return df


def scores(df: pd.DataFrame, method: str, factor: str = "base", level: str = "") -> pd.Series:
    """Scores of one arm, indexed by (task, seed); empty if it was not run."""
    mine = (df["method"] == method) & (df["factor"] == factor) & (df["level"] == level)
    return df[mine].set_index(["title", "seed"])["score"].rename_axis(["task", "seed"])


def against(df: pd.DataFrame, factor: str, level: str, other: str) -> pd.Series:
    """ARMADA at a level minus `other`: "base", or a method under the same setting.

    The undistilled student's setting is the base's unless the factor changes its training.
    """
    own = scores(df, "armada", factor, level)
    if other == "base":
        return (own - scores(df, "armada")).dropna()
    same = factor == "base" or other != "undistilled" or other in FACTORS[factor].methods
    return (own - (scores(df, other, factor, level) if same else scores(df, other))).dropna()


# -- one factor at a time -----------------------------------------------------------------------


def levels(df: pd.DataFrame) -> list[tuple[str, str]]:
    """The (factor, level) pairs that ARMADA was run at besides the base, in the order of `FACTORS`."""
    own = df[(df["method"] == "armada") & df["factor"].isin(FACTORS)]
    pairs = own[["factor", "level"]].drop_duplicates().itertuples(index=False, name=None)
    order = list(FACTORS)
    return sorted(pairs, key=lambda fl: order.index(fl[0]))


def differences(df: pd.DataFrame) -> pd.DataFrame:
    """Every level's differences, a row a seed: factor, level, other, seed, gain (mean over tasks), tasks.

    `other`: what it is compared with, "base", "undistilled" or "shuffled", as in `against`.
    """
    rows = []
    for factor, level in [("base", ""), *levels(df)]:
        for other in ("base", "undistilled", "shuffled")[factor == "base" :]:
            values, tasks = report.by_seed(against(df, factor, level, other))
            rows += [{"factor": factor, "level": level, "other": other, "seed": seed, "gain": gain,
                      "tasks": tasks} for seed, gain in values.items()]  # fmt: skip
    return pd.DataFrame(rows, columns=["factor", "level", "other", "seed", "gain", "tasks"])


def names(found: pd.DataFrame) -> dict[tuple[str, str], str]:
    """A name for every (factor, level) of a table of `differences`, in its order."""
    keys = found[["factor", "level"]].drop_duplicates().itertuples(index=False, name=None)
    return {key: _name(*key) for key in keys}


def _name(factor: str, level: str) -> str:
    return f"{FACTORS[factor].about}: {level}" if factor in FACTORS else "the base"


def compare(df: pd.DataFrame) -> pd.DataFrame:
    """A row a level: what it changes, its difference to the base, to undistilled and to the
    shuffled teacher under the same setting, the manifold term's pull, and how much was run.

    Differences are means over tasks with their t interval over seeds from three seeds on; p is that
    of the difference to the base, by Holm's rule over all levels.
    """
    found, rows, p = differences(df), [], []
    runs = df[df["method"] == "armada"].groupby(["factor", "level"])
    pull = runs[["pull_first", "pull_last"]].mean()
    for factor, level in [("base", ""), *levels(df)]:
        own = found[(found["factor"] == factor) & (found["level"] == level)]
        cell = {o: g["gain"].to_numpy() for o, g in own.groupby("other")}
        to_base = cell.get("base", [])
        test = stats.paired_t(to_base, [0.0] * len(to_base)) if len(to_base) > 2 else None
        p.append(test.p if test else math.nan)
        rows.append({
            "change": _name(factor, level),
            "point": FACTORS[factor].register or "–" if level else "–",
            "minus base": gap(to_base), "p (Holm)": math.nan,
            "over undistilled": gap(cell.get("undistilled", [])),
            "over shuffled": gap(cell.get("shuffled", [])),
            "pull": _pull(pull, factor, level),
            "tasks × seeds": f"{own['tasks'].max()} × {own['seed'].nunique()}",
        })  # fmt: skip
    out = pd.DataFrame(rows)
    return out.assign(**{"p (Holm)": [math.nan, *stats.holm(p[1:])]})


def _pull(pull: pd.DataFrame, factor: str, level: str) -> str:
    if (factor, level) not in pull.index or pull.loc[(factor, level)].isna().any():
        return "–"
    first, last = pull.loc[(factor, level)]
    return f"{first:.2g} to {last:.2g}"


def gap(values: Sequence[float]) -> str:
    """ "+1.2 [+0.3, +2.1]": mean and, from three values on, its t interval; a dash for none."""
    if not len(values):
        return "–"
    s = stats.summary(values)
    around = report.interval(s.low, s.high) if s.n > 2 else ""
    return report.signed(s.mean) + around


def needs_teacher(df: pd.DataFrame) -> tuple[str, str]:
    """(outcome, sentence): does ARMADA beat the shuffled teacher at some setting it was run at?

    Reproduced: somewhere the difference is positive with p below 0.05 by Holm's rule over all
    settings, three seeds at least.
    """
    found = differences(df).query("other == 'shuffled'")
    settings, p, parts, most = names(found), [], [], 0
    for key, name in settings.items():
        g = found[(found["factor"] == key[0]) & (found["level"] == key[1])]
        most = max(most, len(g))
        test = stats.paired_t(g["gain"], [0.0] * len(g), "greater") if len(g) > 2 else None
        p.append(test.p if test else math.nan)
        parts.append(f"{name} {gap(g['gain'].to_numpy())}")
    text = "ARMADA minus the shuffled teacher, in points: " + "; ".join(parts) + "."
    if most < 3:
        return "undecided", f"{text} {report.too_few(most, 'test')}"
    better = [s for s, q in zip(settings.values(), stats.holm(p), strict=True) if q < 0.05]
    if better:
        return "reproduced", f"{text} Better than chance: {', '.join(better)}."
    return "not reproduced", f"{text} Nowhere is p below 0.05."
