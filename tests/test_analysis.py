"""The analyses of section 6 on vectors made by hand: what is compared with what, and on which texts."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from looked import ARMS, everything, gold, numbers, probe, result, spec
from scipy.stats import ttest_ind

from armada_lib import analysis, dynamics, frames, geometry, run_data
from armada_lib.analysis import AGAIN, Cell


def cell(task="cola", seed=0, main="ARMADA Euclid", **arms):
    own = {"undistilled": probe("undistilled", None, seed, task), main: probe(seed=seed, task=task)}
    return Cell(task, seed, own | arms, main)


def known(task="cola"):
    """A cell in which examples 0 to 9 are scenario 1 and 10 to 14 scenario 2."""
    plain, other = np.ones(90, bool), np.ones(90, bool)
    plain[:10], other[10:15] = False, False
    return cell(
        task,
        undistilled=probe("undistilled", None, 0, task, right=plain),
        **{"ARMADA Euclid": probe(task=task, right=other)},
    )


def frame(rows) -> pd.DataFrame:
    return pd.DataFrame(rows)


# -- cells and arms --------------------------------------------------------------------------------


def test_arms_are_named_by_method_and_loss():
    _, results = everything(seeds=(0,), tasks=("cola",))
    named = analysis.arms(results, "euclid")
    assert len(named) == len(ARMS)  # no noise among them
    assert {"undistilled", "ARMADA cosine", "shuffled teacher", "frozen aligner", "added layers only",
            "frozen aligner (cosine)"} <= set(named["arm"])  # fmt: skip
    other = set(analysis.arms(results, "cosine")["arm"])
    assert {"frozen aligner", "frozen aligner (Euclid)", "shuffled teacher (Euclid)"} <= other


def test_a_cell_needs_what_is_compared():
    probes, results = everything(seeds=(0,), tasks=("cola",))
    names = dict(analysis.arms(results, "euclid")[["key", "arm"]].values)
    assert [c.task for c in analysis.cells(probes, names, "euclid")] == ["cola"]
    with pytest.raises(ValueError, match="cola, seed 0: no probe of undistilled"):
        analysis.cells(probes[1:], names, "euclid")


# -- scenarios -------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["cola", "copa"])
def test_silhouettes_are_those_of_the_scenarios_texts(task):
    c = known(task)
    found = frame(analysis.silhouettes(c, [c]))
    per, y = c.arms["undistilled"].per_example, c.arms["undistilled"].text_labels()
    for scenario, rows, n in (("1", np.arange(10), 10), ("2", np.arange(10, 15), 5)):
        pick = (rows[:, None] * per + np.arange(per)).reshape(-1)
        line = found[(found["scenario"] == scenario) & (found["metric"] == "cosine")].iloc[0]
        for column, arm in (("undistilled", "undistilled"), ("distilled", "ARMADA Euclid")):
            x = c.arms[arm].get("student_hidden")[pick]
            assert line[column] == pytest.approx(geometry.silhouette(x, y[pick], "cosine"))
        assert line["n"] == n and line["labels"] == "gold"
    assert line["undistilled"] != pytest.approx(line["distilled"])


def test_correctness_is_each_students_own_over_both_scenarios():
    c = known()
    found = frame(analysis.silhouettes(c, [c]))
    line = found[(found["scenario"] == "1 and 2") & (found["metric"] == "euclidean")].iloc[0]
    assert line["n"] == 15 and line["labels"] == "correctness"
    member = np.array([0] * 10 + [1] * 5)  # the same two groups, for either student
    x = c.arms["undistilled"].get("student_hidden")[:15]
    assert line["undistilled"] == pytest.approx(geometry.silhouette(x, member))


def test_within_a_scenario_gold_and_predicted_labels_make_the_same_groups():
    """What the chapter says of two classes: one student is right and the other wrong throughout."""
    c = known()
    for pick in (slice(0, 10), slice(10, 15)):
        groups = [gold()[pick]]
        groups += [p.arrays["after/held/student"].argmax(-1)[pick] for p in c.arms.values()]
        for g in groups[1:]:
            assert len({(a, b) for a, b in zip(groups[0], g, strict=True)}) == 2


def test_another_seed_is_compared_where_there_is_one():
    one, two = cell(seed=0), cell(seed=1)
    alone = {r["arm"] for r in analysis.silhouettes(one, [one])}
    assert alone == {"ARMADA Euclid"}
    found = frame(analysis.silhouettes(one, [one, two]))
    own = found[(found["arm"] == AGAIN) & (found["scenario"] == "1")]
    a, b = one.arms["undistilled"].right, two.arms["undistilled"].right
    assert own["n"].iloc[0] == (b & ~a).sum()
    back = frame(analysis.silhouettes(two, [one, two]))  # the last seed takes the first
    assert back[(back["arm"] == AGAIN) & (back["scenario"] == "2")]["n"].iloc[0] == (b & ~a).sum()


@pytest.mark.parametrize("task", ["cola", "copa"])
def test_reductions_are_medians_over_a_groups_texts(task):
    c = known(task)
    plain, other = c.arms["undistilled"], c.arms["ARMADA Euclid"]
    per, y = plain.per_example, plain.text_labels()
    found = frame(analysis.distances(c, [c])).set_index("group")
    assert found["n"].to_dict() == {"scenario 1": 10, "scenario 2": 5, "neither": 75, "all": 90}
    before, after = (
        geometry.centroid_distances(p.get("student_hidden"), y) for p in (plain, other)
    )
    expected = np.median(100 * (1 - after / before)[: 10 * per])
    assert found.loc["scenario 1", "reduction"] == pytest.approx(expected)
    assert found.loc["all", "before"] == pytest.approx(np.median(before))
    same = cell(undistilled=plain, **{"ARMADA Euclid": other}) if task == "copa" else c
    same.arms["copy"] = plain
    rows = frame(analysis.distances(same, [same]))
    assert (rows[rows["arm"] == "copy"]["reduction"].dropna() == 0).all()


@pytest.mark.parametrize("task", ["cola", "copa"])
def test_examples_are_the_first_of_each_label_in_each_scenario(task):
    c = known(task)
    found = frame(analysis.examples(c))
    y, held = gold(task), run_data.examples(c.arms["ARMADA Euclid"].spec)[1]
    expected = [(s, int(np.flatnonzero(y[a:b] == g)[0]) + a, g)
                for s, a, b in (("1", 0, 10), ("2", 10, 15)) for g in (0, 1)]  # fmt: skip
    per = 2 if task == "copa" else 1
    for row, (scenario, i, g) in zip(found.itertuples(), expected, strict=True):
        text = i * per + (g if per == 2 else 0)
        assert (row.scenario, row.gold, row.text) == (scenario, g, held.teacher_texts[text])
        assert row.prediction == (g if scenario == "1" else 1 - g)
        assert row.reduction == pytest.approx(100 * (1 - row.after / row.before))


# -- other geometry --------------------------------------------------------------------------------


def test_alignment_is_to_the_own_and_to_the_real_aligner():
    c = cell(**{"shuffled teacher": probe("shuffled")})
    found = frame(analysis.alignment(c))
    assert len(found) == (1 + 2 + 2) * 4  # undistilled has no aligner of its own
    own, real = c.arms["shuffled teacher"], c.arms["ARMADA Euclid"]
    pick = found[(found["arm"] == "shuffled teacher") & (found["when"] == "after")
                 & (found["split"] == "held")].set_index("to")  # fmt: skip
    x = own.get("student_hidden")
    assert pick.loc["own", "cka"] == pytest.approx(
        geometry.linear_cka(x, own.get("aligner_hidden"))
    )
    assert pick.loc["real", "cka"] == pytest.approx(
        geometry.linear_cka(x, real.get("aligner_hidden"))
    )
    gap = geometry.gaps(own.get("student_projection"), real.get("aligner_projection"))
    assert pick.loc["real", "elementwise"] == pytest.approx(gap["elementwise"])
    mine = found[(found["arm"] == "ARMADA Euclid") & (found["when"] == "before")]
    assert (mine.groupby("split")["cka"].nunique() == 1).all()


def test_purity_stands_beside_the_majority_share():
    c = known("copa")
    found = frame(analysis.clusters(c)).set_index(["arm", "labels"])
    assert (found["purity"] >= found["majority"]).all()
    assert found.loc[("undistilled", "gold"), "majority"] == 0.5  # one right text of two
    assert found.loc[("undistilled", "correctness"), "majority"] == pytest.approx(80 / 90)


def test_a_map_shows_every_model_once_and_marks_the_scenarios(monkeypatch):
    monkeypatch.setattr(geometry, "tsne", lambda x: np.asarray(x)[:, :2])
    c = known("copa")
    drawn = analysis.joint_map(c)
    assert list(drawn["model"].unique()) == ["undistilled", "ARMADA Euclid", "aligner"]
    assert len(drawn) == 3 * 180
    one = drawn[drawn["model"] == "aligner"]
    assert (one["scenario"] == 1).sum() == 20 and (one["scenario"] == 2).sum() == 10
    assert (one["label"].to_numpy() == c.arms["undistilled"].text_labels()).all()
    pd.testing.assert_frame_equal(drawn, analysis.joint_map(c))
    flat = frame(analysis.silhouettes(c, [c], drawn))
    own = drawn[(drawn["model"] == "undistilled") & (drawn["scenario"] == 1)]
    line = flat[(flat["space"] == "map") & (flat["scenario"] == "1")].iloc[0]
    assert line["undistilled"] == pytest.approx(
        geometry.silhouette(own[["x", "y"]].to_numpy(), own["label"])
    )


# -- training loss and noise -----------------------------------------------------------------------


def test_the_task_loss_is_without_its_weight():
    r = result(spec(), curve=[1.0, np.nan, 3.0])  # alpha = 0.5; a step of the aligner alone
    assert dynamics.task_loss(r).tolist() == [2.0, 6.0]
    with pytest.raises(ValueError, match="no task loss"):
        dynamics.task_loss(result(spec().model_copy(update={"alpha": 1.0})))


def test_t_over_steps_is_scipys_and_frozen_stands_against_its_own_loss():
    rng = np.random.default_rng(0)
    arms = [("armada", "euclid"), ("armada", "cosine"), ("frozen_aligner", "euclid"),
            ("frozen_aligner", "cosine"), ("shuffled", "euclid")]  # fmt: skip
    found = {a: result(spec(*a), curve=rng.random(30) + i) for i, a in enumerate(arms)}
    named = analysis.arms(found.values(), "euclid")
    names = dict(named[["key", "arm"]].values)
    t = dynamics.steps(list(found.values()), names, "euclid").set_index("arm")
    assert set(t.index) == {"frozen aligner", "frozen aligner (cosine)", "shuffled teacher"}
    for arm, first, second in (
        ("frozen aligner", arms[2], arms[0]), ("frozen aligner (cosine)", arms[3], arms[1]),
        ("shuffled teacher", arms[4], arms[0]),
    ):  # fmt: skip
        curves = [np.float64(found[x].curves["task"]) for x in (first, second)]
        expected = ttest_ind(*curves, equal_var=False)
        assert t.loc[arm, "t"] == pytest.approx(expected.statistic)
        assert t.loc[arm, "p"] == pytest.approx(expected.pvalue)
        assert t.loc[arm, "t"] > 0  # the arm's loss is higher
    means = dynamics.losses(list(found.values()), names).set_index("arm")
    assert means.loc["ARMADA Euclid", "mean"] == pytest.approx(
        2 * found[arms[0]].curves["task"].mean(dtype=np.float64), rel=1e-6
    )


def test_sensitivity_needs_every_level():
    runs = [result(spec(noise=s), 50 - 3 * s, aligner=40.0) for s in (0.0, 1.0, 2.0, 5.0)]
    runs += [result(spec(seed=1, noise=s)) for s in (0.0, 1.0)]
    noisy = dynamics.noise(runs, "euclid")
    found = dynamics.sensitivities(noisy).set_index(["seed", "head"])["sensitivity"]
    assert found.to_dict() == {(0, "student"): pytest.approx(9.0), (0, "aligner"): 0.0}
    other = [result(spec("armada", "cosine"), 70.0)]  # another loss is no noise level
    assert len(dynamics.noise(runs + other, "euclid")) == len(noisy)


def test_gains_of_writers_are_paired_by_test_set_and_seed():
    score = lambda m, seed, a, b, **kw: result(
        spec(m, "euclid", seed, "dolly", **kw), heads=("student",), dolly=a, s_ni=b
    )
    runs = [score("undistilled", 0, 10.0, 20.0), score("undistilled", 1, 11.0, 22.0),
            score("armada", 0, 12.0, 19.0), score("armada", 1, 12.0, 22.0),
            score("armada", 1, 9.0, 21.0, noise=5.0)]  # fmt: skip
    found = dynamics.gains(dynamics.noise(runs, "euclid"))
    wide = found.set_index(["task", "seed", "sigma"])["gain"]
    assert wide["Dolly"].to_dict() == {(0, 0.0): 2.0, (1, 0.0): 1.0, (1, 5.0): -2.0}
    assert dynamics.models(dynamics.noise(runs, "euclid")).empty
    with pytest.raises(ValueError, match="no undistilled run"):
        dynamics.gains(dynamics.noise(runs[1:], "euclid"))
    assert dynamics.gains(dynamics.noise([result(spec())], "euclid")).empty


# -- all of it, and the file -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def found():
    return numbers()


def test_every_analysis_has_every_task_seed_and_arm(found):
    for name in ("alignment", "silhouettes", "distances", "clusters", "losses", "scores"):
        assert set(found[name]["task"]) == {"CoLA", "COPA"}, name
        assert set(found[name]["seed"]) == {0, 1}, name
        assert {"shuffled teacher", "random teacher"} <= set(found[name]["arm"]), name
    assert AGAIN in set(found["silhouettes"]["arm"])
    assert set(found["sensitivities"]["arm"]) == {"ARMADA", "shuffled teacher"}


def test_committed_numbers_are_read_back_and_the_same_bytes(found, tmp_path):
    path = frames.write(found, tmp_path / "x.json")
    again = frames.read(path)
    assert again.keys() == found.keys()
    for name, df in found.items():
        assert list(again[name]) == list(df), name
        numbers = df.select_dtypes("number")
        pd.testing.assert_frame_equal(
            again[name][list(numbers)], numbers, check_dtype=False, rtol=1e-5
        )
        texts = df.columns.difference(numbers.columns)
        assert (again[name][texts].astype(str) == df[texts].astype(str)).all().all(), name
    assert frames.write(again, tmp_path / "y.json").read_bytes() == path.read_bytes()
    assert "NaN" not in path.read_text()
    empty = frames.write({"a": pd.DataFrame({"b": [float("nan")]})}, tmp_path / "z.json")
    assert frames.read(empty)["a"]["b"].isna().all()
