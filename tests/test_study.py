"""The page of the study: which contrasts there are, what they are, and what is said of them."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import yaml

from armada_lib import contrasts, experiment, plots_study, profiles, results, stats, working
from armada_lib.plans import common, studied
from armada_lib.plans import study_answer as told
from armada_lib.plans import study_design as page
from armada_lib.plans.study import Studied
from armada_lib.plans.study_design import BESIDE, BETWEEN, BY_LOSS, OVER, PRIMARY

LOSSES = ["cosine", "euclid"]
RAW = {
    "name": "small", "profile": "mini", "training": {"precision": "fp32"},
    "tasks": {"cola": {"seeds": [100, 101, 102, 103], "bound": 3.0},
              "stsb": {"seeds": [100, 101, 102], "bound": 0.5}, "rte": {"seeds": [100]}},
    "stages": [
        {"name": "primary", "tasks": ["cola", "stsb"], "arms": [
            {"methods": ["undistilled"]},
            {"methods": ["armada", "shuffled"], "teacher": "sd14", "manifolds": LOSSES}]},
        {"name": "controls", "tasks": ["cola", "stsb"], "arms": [
            {"methods": ["constant", "layers_only"], "teacher": "sd14", "manifolds": ["euclid"]},
            {"methods": ["armada", "shuffled"], "teacher": "text", "manifolds": ["euclid"]}]},
        {"name": "secondary", "tasks": ["rte"], "arms": [
            {"methods": ["undistilled"]},
            {"methods": ["armada", "shuffled"], "teacher": "sd14", "manifolds": LOSSES}]},
    ],
}  # fmt: skip
N = 300


def evidence(effects: dict[tuple[str, str], float], noise: float = 0.5, raw=RAW) -> Studied:
    """A whole study whose scores are made: `effects` in points, by (method, teacher), at most 40."""
    p = Studied(experiment.Study(**raw), ["sd14", "text"], 400)
    rng, records, labels = np.random.default_rng(3), {}, {}
    for task in p.study.tasks:
        labels[task] = np.arange(N) % 2
    for c in p.cells:
        right = 0.7 + (effects.get((c.method, c.teacher), 0) + noise * rng.standard_normal()) / 100
        right = min(1.0, right + 0.01 * (c.seed - 100))
        y = labels[c.task]
        # the same examples are wrong in every run, but for the effect: examples add little noise
        said = np.where(np.arange(N) * 7919 % N < right * N, y, 1 - y)
        score = float((said == y).mean() * 100)
        records[c.identity] = {
            "metric": "accuracy", "predictions": said.tolist(), "scores": {"student": score},
            "facts": {"seconds": 36.0}, "environment": {"gpu": None, "cpu": "c", "torch": "t"},
            "spec": SimpleNamespace(training=SimpleNamespace(precision="fp32")),
        }  # fmt: skip
    p.__dict__["records"], p.__dict__["labels"] = records, labels
    return p


def again(p: Studied, **changes) -> Studied:
    """The same evidence, with nothing computed from it yet."""
    new = replace(p, **changes)
    new.__dict__.update(records=p.records, labels=p.labels)
    return new


def scores(p: Studied, task: str, method: str, teacher: str | None, manifold: str | None) -> dict:
    found = {n[5]: r["scores"]["student"] for n, r in p.records.items()
             if n[:4] == (task, method, teacher, manifold)}  # fmt: skip
    assert found
    return found


def named(p: Studied, group: str, name: str):
    return next(x for x in p.pairs if (x.group, x.name) == (group, name))


def test_the_first_stages_teacher_and_reading_are_the_primary_ones():
    """Also where the undistilled student's entry names others, and a later stage has these."""
    first = {"methods": ["armada", "shuffled"], "teacher": "text", "readings": ["released"]}
    stages = [{"name": "primary", "tasks": ["cola"], "arms": [{"methods": ["undistilled"]}, first]},
              {"name": "more", "tasks": ["cola"], "arms": [{"methods": ["armada", "shuffled"]}]}]  # fmt: skip
    p = evidence({}, raw=RAW | {"stages": stages})
    assert p.main[1:3] == ("text", "released")
    pair = p.pairs[0]
    assert (pair.group, pair.teacher, pair.name) == (PRIMARY, "text", "text")
    assert {a.reading for side in pair.sides for a in side} == {"released"}


def test_bf16_without_its_instructions_is_named():
    one, two, three, *_ = evidence({}).records.values()
    bf16 = {"spec": SimpleNamespace(training=SimpleNamespace(precision="bf16"))}
    one |= bf16 | {"environment": one["environment"] | {"bf16": False}}
    two |= bf16 | {"environment": one["environment"] | {"gpu": "g"}}
    found = [common.processor(r) for r in (one, two, three)]
    assert found == ["c (bf16 from fp32 products)", "g", "c"]


def test_the_contrasts_follow_from_the_arms():
    p = evidence({})
    assert [(x.group, x.name) for x in p.pairs] == [
        (PRIMARY, "sd14"), (PRIMARY, "text"), (BY_LOSS, "cosine"), (BY_LOSS, "Euclid"),
        (BESIDE, "constant teacher"), (BESIDE, "added layers only"),
        (OVER, "real sd14"), (OVER, "shuffled sd14"), (OVER, "real text"), (OVER, "shuffled text"),
        (OVER, "constant teacher"), (OVER, "added layers only"), (BETWEEN, "text − sd14"),
    ]  # fmt: skip
    arm = page.Arm
    assert named(p, PRIMARY, "sd14").sides == tuple(
        (arm("armada", "sd14", m, "paper"), arm("shuffled", "sd14", m, "paper")) for m in LOSSES
    )
    # a control with one loss is beside the real teacher with that loss
    assert named(p, BESIDE, "added layers only").sides == (
        (arm("armada", "sd14", "euclid", "paper"), arm("layers_only", None, None, "paper")),)  # fmt: skip
    stages = [*RAW["stages"], {"name": "more", "tasks": ["cola"], "arms": [
        {"methods": ["armada", "shuffled", "random"], "teacher": "speecht5", "manifolds": LOSSES}]}]  # fmt: skip
    more = {(x.group, x.name) for x in evidence({}, raw=RAW | {"stages": stages}).pairs}
    assert {
        (PRIMARY, "speecht5"),
        (BETWEEN, "speecht5 − sd14"),
        (BESIDE, "random teacher, speecht5"),
    } <= more


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ({"methods": ["constant"], "teacher": "sd14", "manifolds": ["cosine"]},
         {(BESIDE, "constant teacher (cosine)"), (OVER, "constant teacher (cosine)")}),
        ({"methods": ["armada", "shuffled"], "teacher": "text", "manifolds": ["cosine"]},
         {(PRIMARY, "text (cosine)"), (OVER, "real text (cosine)"), (OVER, "shuffled text (cosine)"),
          (BETWEEN, "text − sd14 (cosine)")}),
        ({"methods": ["armada", "shuffled"], "teacher": "sd14", "readings": ["released"]},
         {(PRIMARY, "sd14, released"), (OVER, "real sd14, released"), (OVER, "shuffled sd14, released"),
          (BETWEEN, "sd14, released − paper")}),
        ({"methods": ["armada"], "teacher": "midjourney"},
         {(OVER, "real midjourney"), (BETWEEN, "midjourney − sd14")}),
        ({"methods": ["random"], "teacher": "midjourney"}, {(OVER, "random teacher, midjourney")}),
    ],
)  # fmt: skip
def test_a_line_brings_contrasts_of_its_own_and_leaves_the_others(line, shown):
    stages = [*RAW["stages"], {"name": "more", "tasks": ["cola"], "arms": [line]}]
    p, q = evidence({}), evidence({}, raw=RAW | {"stages": stages})
    q = again(q, teachers=["sd14", "text", "midjourney"])
    old, new = ({(x.group, x.name): x.sides for x in of.pairs} for of in (p, q))
    assert new.items() >= old.items() and new.keys() - old.keys() == shown
    added = [n for n in q.records if n not in p.records]
    assert {n[0] for n in added} == {"cola"}
    frame = q.frame(q.tasks).set_index(["group", "contrast", "task"])["seeds"]
    assert {(*name, "cola") for name in shown} <= set(frame.index)
    assert not {(*name, "stsb") for name in shown} & set(frame.index)
    for n in added:  # nothing of it is there yet: all that was shown still is
        del q.records[n]
    before = p.frame(p.tasks).set_index(["group", "contrast", "task"])["seeds"]
    assert (
        before.to_dict()
        == q.frame(q.tasks).set_index(["group", "contrast", "task"])["seeds"].to_dict()
    )


def test_a_contrast_is_the_mean_over_losses_of_paired_differences():
    p = evidence({("armada", "sd14"): 4.0})
    c = p.contrast(p.pairs[0], "cola")
    by_hand = [
        np.mean([scores(p, "cola", "armada", "sd14", m)[s] - scores(p, "cola", "shuffled", "sd14", m)[s]
                 for m in LOSSES]) for s in (100, 101, 102, 103)
    ]  # fmt: skip
    assert c.values == pytest.approx(by_hand) and c.n == 4 and c.bound == 3.0
    assert c.p == pytest.approx(stats.paired_t(by_hand, [0] * 4).p)
    assert c.low < c.mean < c.high
    one = p.contrast(named(p, BESIDE, "added layers only"), "stsb")
    real, layers = (
        scores(p, "stsb", "armada", "sd14", "euclid"),
        scores(p, "stsb", "layers_only", None, None),
    )
    assert one.values == pytest.approx([real[s] - layers[s] for s in (100, 101, 102)])


def test_the_interval_is_that_of_a_plain_bootstrap():
    """Draw seeds and examples the slow way, one test set for all runs."""
    p = again(evidence({("armada", "sd14"): 4.0}), draws=4000)
    pair = p.pairs[0]
    right = lambda a, s: np.array(p.records["cola", *a, s]["predictions"]) == np.arange(N) % 2
    gap = np.stack([
        np.mean([right(a, s).astype(float) - right(b, s) for a, b in pair.sides], 0)
        for s in (100, 101, 102, 103)
    ])  # fmt: skip
    rng = np.random.default_rng(8)
    slow = [
        100 * gap[rng.integers(4, size=4)][:, rng.integers(N, size=N)].mean() for _ in range(4000)
    ]
    c = p.contrast(pair, "cola")
    width = c.high - c.low
    assert [c.low, c.high] == pytest.approx(np.quantile(slow, [0.025, 0.975]), abs=0.06 * width)


def test_regularisation_is_said_where_real_and_shuffled_do_not_differ():
    p = evidence({("armada", "sd14"): 9.0, ("shuffled", "sd14"): 9.0}, noise=0.0)
    assert told.conclusion(p) == contrasts.NOT
    assert "both gain, which is regularisation and no transfer" in " ".join(told.answer(p))


def test_a_seed_counts_when_all_its_runs_are_there():
    p = evidence({})
    del p.records["cola", "shuffled", "sd14", "cosine", "paper", 101]
    assert p.contrast(p.pairs[0], "cola").n == 3 and p.contrast(p.pairs[0], "stsb").n == 3
    assert p.contrast(named(p, BY_LOSS, "Euclid"), "cola").n == 4
    assert p.provisional and [c.seed for c in p.missing] == [101]
    text = told.verdict(p)[1]
    assert text.startswith("Provisional: ")
    row = told.cost(p).set_index("stage").loc["primary"]
    assert (row["cells"], row["finished"], row["missing"]) == (35, 34, "CoLA 1")
    assert row["core-hours"] == pytest.approx(0.34)
    for name in [n for n in p.records if n[0] == "stsb" and n[1] == "shuffled"]:
        del p.records[name]
    p = again(p)
    assert list(p.primary) == ["cola"] and told.conclusion(p) == contrasts.OPEN


@pytest.mark.parametrize(
    "effects, outcome, said",
    [
        ({("armada", "sd14"): 9.0}, "reproduced", ["The teacher matters at this scale", "CoLA: the teacher matters"]),
        ({("armada", "sd14"): -9.0}, "not reproduced", ["The real teacher does harm", "the real teacher harms"]),
        ({("armada", "sd14"): 9.0, ("shuffled", "sd14"): 9.0}, "undecided",
         ["stays undecided", "on CoLA and STS-B both gain."]),
        ({("armada", "text"): 9.0}, "undecided",
         ["The text teacher, which knows the text and has no second modality, does better than its shuffled self on "
          "CoLA and STS-B, so that the method can carry something over"]),
        ({}, "undecided", ["on no task do both differ", "shows no transfer from any teacher"]),
    ],
)  # fmt: skip
def test_the_answer_is_put_together_by_rule(effects, outcome, said):
    p = evidence(effects)
    found, text = told.verdict(p)
    assert found == outcome and all(s in text for s in said), text
    assert len(told.answer(p)) == 3 and all(s.endswith(".") for s in told.answer(p))
    c = p.primary["cola"]
    assert f"CoLA {told.signed(c.mean)} [{told.signed(c.low)}, {told.signed(c.high)}]" in text


@pytest.mark.parametrize(
    ("real", "text", "said"),
    [
        (0, 0, "does not differ from its shuffled self beyond noise either, so that at this scale"),
        (
            9,
            0,
            "does not differ from its shuffled self beyond noise, so that text alone does not explain",
        ),
        (
            0,
            9,
            "does better than its shuffled self on CoLA and STS-B, so that the method can carry something",
        ),
        (9, 9, "carry something over here; the real teacher's gain is cross-modal only as far as"),
        (
            0,
            -9,
            "does worse than its shuffled self on CoLA and STS-B, so that no gain is carried over",
        ),
    ],
)
def test_what_the_text_teacher_shows_fits_the_answer(real, text, said):
    p = evidence({("armada", "sd14"): real, ("armada", "text"): text}, noise=0.1)
    assert said in told.answer(p)[2]
    p.__dict__["records"] = {n: r for n, r in p.records.items() if n[2] != "text" or n[5] == 100}
    assert "has not been run with two seeds yet" in told.answer(again(p))[2]


def test_a_bound_beside_nought_keeps_its_sign():
    assert [told.signed(x) for x in (-0.0041, 0.004, -0.1, 0)] == [
        "−0.004",
        "+0.004",
        "−0.10",
        "+0.000",
    ]


def test_no_effect_and_little_noise_is_no_difference_that_matters():
    raw = RAW | {"tasks": RAW["tasks"] | {"stsb": {"seeds": [100, 101, 102], "bound": 2.0}}}
    p = evidence({}, noise=0.3, raw=raw)
    assert told.conclusion(p) == contrasts.NOT and told.verdict(p)[0] == "not reproduced"
    table = told.family(p)
    assert table["conclusion"].tolist() == [contrasts.SAME] * 2 and table["seeds"].tolist() == [
        4,
        3,
    ]
    assert table["p (Holm)"].tolist() == pytest.approx(
        contrasts.holm([c.p for c in p.primary.values()])
    )
    losses = told.family(p, BY_LOSS)
    assert len(losses) == 4 and (losses["p (Holm)"] >= losses["p"]).all()


def test_tables_and_figures_have_every_contrast_that_was_asked_for():
    p = evidence({})
    frame = p.frame(p.tasks)
    assert len(frame) == 13 * 2 and p.others == ["rte"]
    few = again(p, teachers=["sd14"])
    assert not any("text" in c for c in few.frame(p.tasks)["contrast"])
    assert "text teacher" in told.answer(few)[2] and "not been run" not in told.answer(few)[2]
    wide = told.summary(p, p.tasks, [PRIMARY, OVER])
    assert list(wide.columns) == ["group", "contrast", "CoLA", "STS-B"]
    assert (
        wide["CoLA"]
        .str.fullmatch(r"[+−][\d.]+ \[[+−][\d.]+, [+−][\d.]+\], p (= [01]\.\d{3}|< 0\.001), n = 4")
        .all()
    )
    other = told.secondary(p)
    assert list(dict.fromkeys(other["title"])) == [
        "real − shuffled", "real − undistilled", "shuffled − undistilled"]  # fmt: skip
    assert set(other["contrast"]) == {"RTE"}
    figure = plots_study.forest(frame)
    assert [a.get_title() for a in figure.axes] == ["CoLA", "STS-B"]
    labels = [t.get_text() for t in figure.axes[0].get_yticklabels()]
    assert labels == [x.name for x in p.pairs]
    seeds = [line for line in figure.axes[0].lines if line.get_marker() == "."]
    assert len(seeds) == 13 and all(len(line.get_xdata()) == 4 for line in seeds)
    part = plots_study.forest(
        frame[frame["group"] == OVER], order=list(dict.fromkeys(frame["group"]))
    )
    ink = lambda f, i: [x for x in f.axes[0].lines if x.get_marker() == "."][i].get_color()
    # a part of the figure keeps the colours of the whole
    first = list(frame["group"][::2]).index(OVER)
    assert ink(part, 0) == ink(figure, first) != ink(plots_study.forest(frame), 0)
    assert (
        p.said.startswith("profile ") and "emoji painter" in p.said and "a text encoder" in p.said
    )
    with pytest.raises(ValueError, match="no rows"):
        plots_study.forest(frame.iloc[:0])
    with pytest.raises(ValueError, match=r"missing column\(s\) \['bound'\]"):
        plots_study.forest(frame.drop(columns="bound"))


def test_scores_are_means_over_losses_with_their_spread_over_seeds():
    p = evidence({("armada", "sd14"): 5})
    table = told.scores(p, p.study.tasks).set_index("arm")
    assert list(table.columns) == ["CoLA", "STS-B", "RTE"] and list(table.index) == [
        "undistilled", "real sd14", "shuffled sd14", "constant teacher", "added layers only",
        "real text", "shuffled text"]  # fmt: skip
    two = [scores(p, "cola", "armada", "sd14", m) for m in LOSSES]
    whole = stats.summary([(two[0][s] + two[1][s]) / 2 for s in range(100, 104)])
    assert table.loc["real sd14", "CoLA"] == str(whole) and whole.n == 4
    assert table.loc["real text", "RTE"] == "–" and table.loc["real sd14", "RTE"].endswith(
        "(n = 1)"
    )
    part = again(p, teachers=["sd14"])
    part.__dict__["records"] = {
        k: r for k, r in p.records.items() if k[3:] != ("cosine", "paper", 101)
    }
    table = told.scores(part, p.tasks).set_index("arm")
    assert table.loc["real sd14", "CoLA"].endswith("(n = 3)") and "real text" not in table.index
    part.__dict__["records"] = {}
    assert told.scores(part, p.tasks)["arm"].tolist() == ["no cell is there yet"]


# ---------------------------------------------------------------------------- committed files


def test_the_front_page_has_the_main_contrasts_of_the_first_teacher(tmp_path, monkeypatch):
    p = evidence({("armada", "sd14"): 3.0})
    df = told.main(p)
    assert list(dict.fromkeys(df["contrast"])) == ["sd14", "real sd14", "shuffled sd14"]
    assert set(df["task"]) == set(p.tasks)
    monkeypatch.setattr(profiles, "ROOT", tmp_path)
    (tmp_path / "book" / "_static").mkdir(parents=True)
    other = again(p, study=p.study.model_copy(update={"name": "mine"}))
    assert told.show_on_front_page(other) is None  # somebody's own study leaves the book's alone
    shown = told.show_on_front_page(again(p, study=p.study.model_copy(update={"name": "study"})))
    assert shown == tmp_path / "book/_static/study.svg" and shown.stat().st_size > 1000
    assert shown.with_suffix(".txt").read_text(encoding="utf-8").strip() == told.answer(p)[0]


@pytest.fixture
def tiny(project):
    """The file of a tiny study."""
    raw = {"name": "small", "profile": "tiny", "training": {"train_size": 16, "eval_size": 10, "epochs": 1},
           "tasks": {"cola": {"seeds": [100, 101], "bound": 3.0}},
           "stages": [{"name": "primary", "tasks": ["cola"], "arms": [
               {"methods": ["undistilled"]}, {"methods": ["armada", "shuffled"]}]}]}  # fmt: skip
    (project / "params/small.yaml").write_text(yaml.safe_dump(raw))
    return project


@pytest.fixture
def own(tiny, tmp_path):
    """That study, run, exported, and read back from files alone."""
    store, study = results.RunStore(tmp_path / "s"), experiment.load(tiny / "params/small.yaml")
    working.work(experiment.jobs(study), store, 1, lambda _: None)
    experiment.export(study, store)
    yield tiny
    for path in (tiny / "book/results").glob("small*"):
        path.unlink()


def test_the_page_needs_neither_data_nor_models(own, monkeypatch):
    data = own / "book/data"
    kept = own / "elsewhere"
    shutil.move(data, kept)
    try:
        p = studied({"study": "small", "teachers": "auto", "draws": 100})
        assert not p.missing and p.primary["cola"].n == 2
        assert len(p.frame(["cola"])) == len(p.pairs)
        for name, r in p.records.items():  # examples drawn once each give the stored score
            once = contrasts.rescored(
                "mcc", [r["predictions"]], p.labels["cola"], np.ones((1, 10), np.float32)
            )
            assert once.item() == pytest.approx(r["scores"]["student"], abs=1e-3), name
    finally:
        shutil.move(kept, data)


@pytest.mark.parametrize(
    "change, added, message",
    [({"data_id": "other/other"}, False, "has other data or settings than other runs of cola"),
     ({"beta": 0.7}, False, "was run with other weights, too"),
     ({"beta": 0.7}, True, "was run with other weights, too")],
)  # fmt: skip
def test_runs_on_other_data_or_with_other_weights_are_not_mixed(own, change, added, message):
    path = own / "book/results/small.jsonl"
    lines = [json.loads(x) for x in path.read_text().splitlines()]
    one = next(x for x in lines if x["spec"]["method"] == "armada")
    other = one | {"spec": one["spec"] | change}
    other["key"] = results.RunSpec(**other["spec"]).key
    changed = [*lines, other] if added else [other if x is one else x for x in lines]
    path.write_text("\n".join(map(json.dumps, changed)))
    with pytest.raises(ValueError, match=message):
        _ = studied({"study": "small", "teachers": "auto", "draws": 100}).records


@pytest.mark.parametrize(
    "change, message",
    [
        ({"study": "smal"}, "unknown study in params 'smal'; did you mean 'small'?"),
        ({"teachers": "sd41"}, "unknown teacher of study 'small' 'sd41'; did you mean 'sd14'?"),
        ({"draws": 0}, "draws must be a whole number of 1 or more"),
        ({"taechers": "sd14"}, "unknown parameter 'taechers'; did you mean 'teachers'?"),
    ],
)
def test_bad_parameters_are_named(tiny, change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        studied({"study": "small", "teachers": "auto", "draws": 100} | change)


def test_the_committed_study_makes_the_contrasts_of_the_protocol():
    p = Studied(experiment.load(profiles.ROOT / "params/study.yaml"), [], 10)
    names = {g: [x.name for x in p.pairs if x.group == g] for g in page.GROUPS}
    assert names[PRIMARY] == ["sd14", "text", "speecht5", "sd14, released"]
    assert (
        p.pairs[0].sides[0][0] == page.Arm("armada", "sd14", "cosine", "paper")
        and len(p.pairs[0].sides) == 3
    )
    assert len(names[BY_LOSS]) * len(p.tasks) == 9  # the second family
    assert set(names[BESIDE]) == {
        "random teacher",
        "constant teacher",
        "frozen aligner",
        "added layers only",
    }
    assert names[BETWEEN] == ["text − sd14", "speecht5 − sd14", "sd14, released − paper"]
    assert set(Counter((x.group, x.name) for x in p.pairs).values()) == {1}
