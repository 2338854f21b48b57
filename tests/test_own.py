"""A project of one's own: checked before any work, answered by rule, exported as plain transformers."""

from __future__ import annotations

import csv
import runpy
import sys

import numpy as np
import pytest
import yaml
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from armada_lib import card, chapter, own, plans, profiles, report, run_data, runs, specs
from armada_lib.methods import METHODS
from armada_lib.results import Result, RunStore

WORDS = ["the", "cat", "dog", "bird", "sat", "ran", "on", "under", "mat", "tree", "red", "not"]


@pytest.fixture
def table(tmp_path):
    """80 texts; the label is whether a word occurs."""
    rng = np.random.default_rng(0)
    path = tmp_path / "pets.csv"
    with path.open("w", newline="") as f:
        out = csv.writer(f)
        out.writerow(["text", "more", "label", "stars"])
        for n in range(80):
            words = [*rng.choice(WORDS, size=5), f"{n}"]
            has = "dog" in words
            out.writerow(
                [" ".join(words), "the mat", "dog" if has else "none", 1 + 8 * has + n % 2]
            )
    return path


@pytest.fixture
def base(checkpoints, monkeypatch, tmp_path):
    """A profile `tiny` to be like, with a random student and the text teacher made of it."""
    where = checkpoints["bert"].checkpoint
    mini = yaml.safe_load((profiles.folder() / "mini.yaml").read_text())
    own_folder = profiles.own()
    own_folder.mkdir()
    raw = {k: mini[k] for k in ("nlu", "training", "armada")} | {
        "about": "tiny", "data": "mini", "own_seeds": [0, 1, 2],
        "students": {"bert-6l": {"checkpoint": where}},
        "teachers": {"sd14": {"kind": "text", "checkpoint": where, "width": 32}},
    }  # fmt: skip
    raw["training"] = {"default": {"epochs": 1, "batch_size": 16, "precision": "fp32"}}
    (own_folder / "tiny.yaml").write_text(yaml.safe_dump(raw))
    profiles.load.cache_clear()
    yield "tiny"
    profiles.load.cache_clear()


@pytest.fixture
def made(base, table):
    return own.project("pets", table, like=base)


# -- making a project ---------------------------------------------------------------------------


def test_a_project_has_every_arm_with_every_seed(made):
    assert {(s.method, s.seed) for s in made.specs} == {
        (m, n) for m in own.METHODS for n in (0, 1, 2)
    }
    assert made.best.method == "armada" and made.best.seed == 0
    train, held = run_data.examples(made.best)
    assert (len(train), len(held)) == (60, 20)
    assert train.task.labels == ("dog", "none")
    assert [train.labels[i] for i, t in enumerate(train.first) if "dog" in t.split()] == [0] * sum(
        "dog" in t.split() for t in train.first
    )


def test_the_project_is_a_profile_for_every_chapter(made):
    ns = dict.fromkeys(plans.NLU_PARAMETERS, "auto") | {
        "profile": "pets", "tasks": "pets", "methods": "undistilled", "teacher": "sd14",
        "alpha": None, "beta": None, "gamma": None, "tau": None, "workers": 1, "keep": "",
    }  # fmt: skip
    plan = plans.nlu(ns)
    assert {s.task for s in plan.specs} == {"pets"}


def test_the_same_project_again_changes_no_key_and_another_table_changes_them_all(
    made, base, table
):
    again = own.project("pets", table, like=base)
    assert [s.key for s in again.specs] == [s.key for s in made.specs]
    table.write_text(table.read_text().replace("cat", "bird"))
    other = own.project("pets", table, like=base)
    assert not {s.key for s in other.specs} & {s.key for s in made.specs}


def test_pairs_and_scores(base, table):
    p = own.project("pets", table, ["text", "more"], "stars", scale=(0, 10), like=base)
    train = run_data.examples(p.best)[0]
    assert train.second[0] == "the mat" and train.teacher_texts[0].endswith(" the mat")
    assert train.task.kind == "regression" and train.task.metric == "pearson"
    stars = {r[0]: float(r[3]) for r in csv.reader(table.open()) if r[0] != "text"}
    assert train.labels == pytest.approx([stars[t] / 2 for t in train.first])


def test_a_second_table_is_the_validation_split(base, table, tmp_path):
    second = tmp_path / "more.csv"
    second.write_text("text,label\nthe dog,dog\na cat,none\n")
    p = own.project("pets", table, validation=second, like=base)
    train, held = run_data.examples(p.best)
    assert (len(train), held.first) == (80, ["the dog", "a cat"])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"name": "mini"}, "'mini' is taken; so are"),
        ({"name": "cola"}, "'cola' is taken; so are"),
        ({"name": "My Pets"}, "use small letters"),
        ({"table": "none.csv"}, "no such table"),
        ({"label": "colour"}, "no column 'colour'; there are text, more, label, stars"),
        ({"text": "titel"}, "no column 'titel'"),
        ({"label": "text"}, "80 different values, which are no classes"),
        ({"labels": ["dog", "cat"]}, "label is 'none'; the labels of pets are dog, cat"),
        ({"label": "stars", "scale": (0, 5)}, "the scale of pets is 0 to 5"),
        ({"scale": (0, 5)}, "label is 'none'"),
        ({"teacher": "sd15"}, "unknown teacher .*did you mean 'sd14'"),
        ({"teacher": {"kind": "images"}}, "teachers.own"),
        ({"student": "no-such-folder/model"}, "no-such-folder/model"),
        ({"manifold": "cosinus"}, "unknown manifold loss"),
        ({"epoch": 3}, "unknown training setting 'epoch'; did you mean 'epochs'"),
        ({"epochs": 0}, "epochs"),
        ({"seeds": [-1]}, "seed must be an integer of 0 or more"),
        ({"like": "tinny"}, "unknown profile 'tinny'"),
    ],
)
def test_what_is_wrong_shows_before_any_work(base, table, change, said, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    given = {"name": "pets", "table": table, "like": base} | change
    with pytest.raises((ValueError, OSError), match=said):
        own.project(**given)
    assert not RunStore().runs.exists() or not any(RunStore().runs.iterdir())


def test_settings_that_cannot_be_read_leave_no_profile_behind(base, table):
    with pytest.raises(ValueError, match="teachers.own"):
        own.project("pets", table, teacher={"kind": "images"}, like=base)
    assert profiles.names() == ["cpu", "mini", "paper", "smoke", "tiny"]


def test_a_file_that_was_changed_by_hand_is_left_alone(made, base, table):
    path = profiles.own() / "pets.yaml"
    mine = path.read_text().removeprefix(own.MARK)
    path.write_text(mine)
    with pytest.raises(ValueError, match="changed by hand and is left alone"):
        own.project("pets", table, like=base, epochs=2)
    assert path.read_text() == mine


def test_an_own_profile_cannot_hide_one_of_the_project(base):
    (profiles.own() / "mini.yaml").write_text("about: mine\n")
    assert profiles.files()["mini"].parent == profiles.folder()


def test_like_takes_over_a_profile_and_puts_the_file_on_top(base):
    (profiles.own() / "mine.yaml").write_text(
        "about: mine\nlike: tiny\ntraining: {default: {epochs: 7}}\n"
    )
    p = profiles.load("mine")
    t = p.recipe("glue", "cola", "bert-6l")
    assert (p.about, t.epochs, t.batch_size, p.own_seeds) == ("mine", 7, 16, (0, 1, 2))
    (profiles.own() / "self.yaml").write_text("about: self\nlike: self\n")
    with pytest.raises(ValueError, match="unknown profile that self is like"):
        profiles.load("self")


# -- running, judging, exporting ----------------------------------------------------------------


def test_from_a_table_to_a_plain_checkpoint(made, tmp_path, monkeypatch):
    cost = own.cost(made, trial=2)
    assert list(cost["missing"]) == [80 - 3, 12] and (cost["minutes"] > 0).all()
    found = runs.study(made.specs, workers=1, progress=False)
    with monkeypatch.context() as nothing:  # what is stored needs no trial
        nothing.setattr(runs, "compute", None)
        done = own.cost(made)
    assert list(done["missing"]) == [0, 0] and list(done["minutes"]) == [0, 0]
    folder = card.export(made, found, tmp_path / "out")
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.config.id2label == {0: "dog", 1: "none"}
    assert model.config.problem_type == "single_label_classification"
    held = run_data.examples(made.best)[1]
    said = model(**tokenizer(held.first, padding=True, return_tensors="pt")).logits
    stored = next(r for r in found if r.spec == made.best)
    assert said.detach().numpy() == pytest.approx(stored.outputs["student"], abs=1e-4)
    text = (folder / "README.md").read_text()
    front = yaml.safe_load(text.split("---")[1])
    assert front["library_name"] == "transformers"
    assert "shuffled teacher" in text and own.CRITERION in text and f"{stored.score:.1f}" in text
    weights = folder / "model.safetensors"
    before, whole = weights.stat().st_mtime_ns, weights.read_bytes()
    (folder / "README.md").write_text("old")
    card.export(made, found, folder)  # again: the weights stay, the card is made anew
    assert weights.stat().st_mtime_ns == before and (folder / "README.md").read_text() == text
    weights.write_bytes(whole[:-1] + b"x")
    card.export(made, found, folder)  # changed by somebody: replaced
    assert weights.read_bytes() == whole
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match="holds other files"):
        card.export(made, found, tmp_path / "full")


def test_an_export_that_says_something_else_than_its_run_is_refused(made, tmp_path):
    found = runs.study([s for s in made.specs if s.seed == 0], workers=1, progress=False)
    wrong = next(r for r in found if r.spec == made.best)
    wrong.outputs["student"] = -wrong.outputs["student"]
    with pytest.raises(RuntimeError, match="agrees with its run on 0% of the examples"):
        card.export(made, found, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def results(made, **right):
    """Results whose runs are right on these shares of 200 examples, by method: one share a seed."""
    y, out = np.tile([0, 1], 100), []
    for method, shares in right.items():
        for seed, share in enumerate(shares):
            s = next(x for x in made.specs if (x.method, x.seed) == (method, 0))
            said = np.where(np.arange(200) < round(200 * share), y, 1 - y)
            out.append(Result(
                s.model_copy(update={"seed": seed}), "accuracy", {"student": 100 * (said == y).mean()},
                {"student": np.eye(2)[said]}, y,
            ))  # fmt: skip
    return out


LOW, MID, HIGH = (0.50, 0.51, 0.52, 0.51), (0.70, 0.71, 0.72, 0.70), (0.90, 0.92, 0.91, 0.90)


@pytest.mark.parametrize(
    ("real", "shuffled", "alone", "outcome", "said"),
    [
        (HIGH, MID, LOW, "reproduced", "Yes. The teacher helped"),
        (HIGH, HIGH, LOW, "not reproduced", "a teacher that knows nothing helps as well"),
        (LOW, MID, LOW, "not reproduced", "worse than with a shuffled teacher"),
        (LOW, LOW, MID, "not reproduced", "worse than with no teacher at all"),
        (MID, MID, MID, "undecided", "No gain was found"),
        (HIGH[:2], MID[:2], LOW[:2], "undecided", "three seeds or more"),
        (HIGH, (0.2, 0.9, 0.9, 0.9), LOW, "undecided", "not clearly more than with a shuffled"),
    ],
)
def test_the_answer_follows_the_rule(made, real, shuffled, alone, outcome, said):
    found = results(made, armada=real, shuffled=shuffled, undistilled=alone, layers_only=alone)
    got = own.answer(found)
    assert got[0] == outcome and said in got[1]


def test_contrasts_pair_runs_of_one_seed(made):
    found = results(made, armada=HIGH, shuffled=MID, undistilled=LOW, layers_only=LOW)
    c = own.compare(found)
    assert c["real − shuffled"].values == pytest.approx([20, 21, 19, 20])
    assert c["real − undistilled"].mean == pytest.approx(100 * (np.mean(HIGH) - np.mean(LOW)))
    assert c["added layers − undistilled"].mean == 0


# -- the examples of the chapter ----------------------------------------------------------------


@pytest.mark.parametrize("name", ["add_method.py", "add_teacher.py", "add_task.yaml"])
def test_an_example_is_short(name):
    lines = (profiles.ROOT / "examples" / name).read_text().splitlines()
    assert len(lines) < 40 and max(map(len, lines)) <= 100


def test_the_example_of_a_method_trains_and_has_a_name(made, monkeypatch):
    monkeypatch.setattr("armada_lib.methods.METHODS", METHODS)
    try:
        runpy.run_path(str(profiles.ROOT / "examples" / "add_method.py"))
        s = specs.spec("pets", "pets", "smoothed", seed=0)
        assert (s.gamma, s.alpha, s.teacher) == (0.1, 0.0, None)
        other = specs.spec("pets", "pets", "smoothed", seed=0, gamma=5.0)
        assert other.key != s.key
        mild, strong = (runs.run(x).outputs["student"] for x in (s, other))
        sure = lambda o: abs(o[:, 0] - o[:, 1]).mean()
        assert sure(strong) < sure(mild)
        df = report.arms(report.table([runs.run(s)]))
        assert list(df["arm"]) == ["smoothed"]
    finally:
        METHODS.pop("smoothed", None)


def test_the_example_of_a_teacher_draws_and_is_read(made, base, table, tmp_path):
    bars = runpy.run_path(str(profiles.ROOT / "examples" / "add_teacher.py"))
    texts = run_data.teacher_texts(made.best)
    given = bars["collect"](texts[:-1], tmp_path / "bars")
    p = own.project("bars", table, teacher=given, like=base, seeds=[0])
    assert p.profile.teacher("own").width == 1280
    with pytest.raises(ValueError, match="1 of 80 texts have no file"):
        runs.study(p.specs, workers=1, progress=False)
    bars["collect"](texts, tmp_path / "bars")
    p = own.project("bars", table, teacher=given, like=base, seeds=[0])
    found = runs.study(p.specs, workers=1, progress=False)
    assert {r.spec.teacher for r in found} == {None, "own"}


def test_the_example_of_a_task_is_a_profile(monkeypatch):
    monkeypatch.setenv("ARMADA_OWN", str(profiles.ROOT / "examples"))
    profiles.load.cache_clear()
    s = specs.spec("add_task", "urgency", "undistilled")
    train, held = run_data.examples(s)
    assert (len(train), len(held), s.training.epochs) == (144, 48, 6)
    assert train.task.labels == ("nothing to do", "later", "now")
    profiles.load.cache_clear()


def test_the_sample_is_balanced_and_says_everything_once():
    rows = list(csv.DictReader((profiles.ROOT / "book/data/own/messages.csv").open()))
    assert len({r["text"] for r in rows}) == len(rows) == 192
    counts = {k: sum(r["label"] == k for r in rows) for k in {r["label"] for r in rows}}
    assert set(counts.values()) == {64}


def test_the_chapter_makes_the_project(base, table, capsys):
    ns = {
        "profile": base, "name": "pets", "table": str(table), "text": "text,more", "label": "stars",
        "scale": [0, 10], "validation": None, "student": "auto", "teacher": "sd14",
        "manifold": "cosine", "seeds": "auto", "epochs": 2, "workers": 1, "export": "",
    }  # fmt: skip
    plan = plans.your_own(ns)
    assert plan.export == profiles.own() / "pets-student"
    assert plan.seeds == [0, 1, 2] and {s.training.epochs for s in plan.specs} == {2}
    assert list(plan.classes["examples"]) == [60, 20] and len(plan.texts) == 5
    with pytest.raises(ValueError, match="unknown parameter 'tabel'"):
        plans.your_own(ns | {"tabel": "x"})


def test_a_whole_file_can_be_shown(monkeypatch):
    shown = {}
    monkeypatch.setattr(chapter, "display", lambda data, raw: shown.update(data))
    chapter.source(profiles.ROOT / "examples" / "add_task.yaml")
    assert "`examples/add_task.yaml`" in shown["text/markdown"]
    assert "````yaml\n# A task of one's own" in shown["text/markdown"]
    assert sys.modules["armada_lib.chapter"] is chapter
