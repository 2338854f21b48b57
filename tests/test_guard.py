"""A chapter's parameters: what is refused, and that the guard may be run again."""

from __future__ import annotations

import re

import pandas as pd
import pytest

from armada_lib import guard

ALLOWED = ("teacher", "beta")


def notebook(*cells: str) -> dict:
    """The namespace after these cells ran, as IPython keeps it. The last cell is the guard's."""
    ns: dict = {"In": [""], "get_ipython": print, "_i": ""}
    for source in cells:
        ns["In"].append(source)
        exec(source, ns)
    ns["In"].append("guard.params(...)")
    return ns


def test_params_returns_the_allowed_names():
    ns = notebook("teacher = 'sd14'  # type: str\nbeta = None", "import math\nfrom os import sep")
    assert guard.params(ns, ALLOWED) == {"teacher": "sd14", "beta": None}


@pytest.mark.parametrize(
    "cells",
    [
        ["teacher = 'sd14'\nbeta = 1", "# Parameters\ntaecher = 'sd14'\n"],  # papermill's cell
        ["teacher = 'sd14'\nbeta = 1\ntaecher = 'x'"],
        ["teacher = 'sd14'\nbeta: float = -1.0", "taecher = 'x'"],
    ],
)
def test_params_refuses_a_misspelt_name_and_names_the_right_one(cells):
    with pytest.raises(ValueError, match="'taecher'; did you mean 'teacher'.*beta, teacher"):
        guard.params(notebook(*cells), ALLOWED)


def test_params_without_a_notebook_takes_every_variable():
    with pytest.raises(ValueError, match="unknown parameter 'gama'"):
        guard.params({"teacher": 1, "beta": 1, "gama": 1, "re": re, "_x": 1}, ALLOWED)


def test_params_can_be_run_again_in_a_notebook_full_of_results():
    ns = notebook("teacher = 'sd14'\nbeta = 1")
    guard.params(ns, ALLOWED)
    ns |= {"df": pd.DataFrame(), "best": 3}
    ns["In"] += ["df = chapter.study(P)", "best = 3"]
    assert guard.params(ns, ALLOWED)["beta"] == 1

    ns["In"] += ["teacher = 'sd14'\nbeta = 1\nbata = 2", "guard.params(...)"]
    with pytest.raises(ValueError, match="unknown parameter 'bata'"):
        guard.params(ns, ALLOWED)
    # mended: the cell as it was last run counts, although `bata` is still defined
    ns |= {"bata": 2, "beta": 2}
    ns["In"] += ["teacher = 'sd14'\nbeta = 2", "guard.params(...)"]
    assert guard.params(ns, ALLOWED)["beta"] == 2


def test_params_mended_at_once():
    ns = notebook("teacher = 'sd14'\nbata = 1")
    with pytest.raises(ValueError, match="bata"):
        guard.params(ns, ALLOWED)
    with pytest.raises(ValueError, match="bata"):  # the guard alone, run again, still refuses
        guard.params(ns, ALLOWED)
    ns["In"].append("teacher = 'sd14'\nbeta = 1")
    ns["beta"] = 1
    assert guard.params(ns, ALLOWED) == {"teacher": "sd14", "beta": 1}


def test_params_checks_values_and_missing_names():
    allowed = {"teacher": ["sd14", "midjourney"], "tasks": ["cola", "rte"], "beta": None}
    good = {"teacher": "sd14", "tasks": ["rte", "cola"], "beta": 7}
    assert guard.params(dict(good), allowed) == good
    assert guard.params(good | {"teacher": None}, allowed)["teacher"] is None
    with pytest.raises(ValueError, match="unknown teacher 'sd15'; did you mean 'sd14'"):
        guard.params(good | {"teacher": "sd15"}, allowed)
    with pytest.raises(ValueError, match="unknown tasks 'colla'.*cola"):
        guard.params(good | {"tasks": ["rte", "colla"]}, allowed)
    with pytest.raises(ValueError, match="does not define beta"):
        guard.params({"teacher": "sd14", "tasks": []}, allowed)
