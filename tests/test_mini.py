"""The mini tasks are worth learning from: complete, balanced, without leaks, not solved by words.

`pytest -s tests/test_mini.py` prints two baselines for each task, in % accuracy (STS-B: Pearson
x 100): the largest class, and bag-of-words models that see which words occur in the two texts,
which they share, and how much they overlap.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from functools import cache

import numpy as np
import pytest
from scipy.sparse import csr_matrix, hstack
from scipy.stats import pearsonr
from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import f1_score

from armada_lib import examples, profiles, tasks

LARGE = ("cola", "rte", "stsb", "copa")
FILES = [n for n in tasks.TASKS if n != "sst2"]  # SST-2 is played by a packaged corpus
LABELLED = [
    n for n, t in tasks.TASKS.items() if t.kind != "multilabel"
]  # films: tests of their own
MINI = profiles.ROOT / "book" / "data" / "mini"
EXTRA = {"wic": {"start1": int, "start2": int, "end1": int, "end2": int}}


@cache
def load(name: str, split: str) -> examples.Examples:
    return examples.load(name, split, "mini")


@cache
def rows(name: str, split: str) -> list[dict]:
    task = tasks.TASKS[name]
    path = MINI / task.group / (task.file or name) / f"{task.splits.get(split, split)}.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def plain(text: str) -> str:
    """A text without case and punctuation: what makes two of them the same."""
    return " ".join(words(text))


# -- the files ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", tasks.TASKS)
def test_there_are_enough_examples(name):
    train, held = (240, 80) if name in LARGE else (200, 60) if name == "mmimdb" else (80, 40)
    assert len(load(name, "train")) >= train and len(load(name, "validation")) >= held


@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize("name", FILES)
def test_rows_have_the_columns_of_the_hub(name, split):
    number = {"stsb": float, "mmimdb": list}.get(name, int)
    wanted = (
        dict.fromkeys(tasks.TASKS[name].columns, str)
        | {tasks.TASKS[name].target: number, "idx": int}
        | EXTRA.get(name, {})
    )
    for row in rows(name, split):
        assert {k: type(v) for k, v in row.items()} == wanted, row
        for column in tasks.TASKS[name].columns:
            assert row[column] == row[column].strip() and "  " not in row[column], row
    assert [r["idx"] for r in rows(name, split)] == list(range(len(rows(name, split))))


@pytest.mark.parametrize("split", ["train", "validation"])
def test_marked_words_and_questions_are_what_their_task_means(split):
    for r in rows("wic", split):
        for text, start, end in (("sentence1", "start1", "end1"), ("sentence2", "start2", "end2")):
            marked = r[text][r[start] : r[end]].lower()
            assert marked.isalpha() and marked[0] == r["word"][0], r  # the word or a form of it
            assert not (r[text][: r[start]][-1:] + r[text][r[end] :][:1]).isalpha(), r
    asked = Counter(r["question"] for r in rows("copa", split))
    assert set(asked) == {"cause", "effect"} and min(asked.values()) >= 0.4 * asked.total()
    for r in rows("copa", split):
        assert r["choice1"] != r["choice2"]


@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize("name", LABELLED)
def test_labels_are_balanced(name, split):
    y = load(name, split).labels
    if name == "stsb":  # scores over the whole range: no fifth of it is rare or rules
        shares = np.histogram(y, bins=5, range=(0, 5))[0] / len(y)
        assert shares.min() >= 0.1 and shares.max() <= 0.3
        return
    classes = 2 if name == "copa" else tasks.TASKS[name].outputs
    shares = np.bincount(y, minlength=classes) / len(y)
    # the tweets are balanced over both splits together
    assert np.abs(shares - 1 / classes).max() <= (0.06 if name == "sst2" else 0.03)


@pytest.mark.parametrize("name", tasks.TASKS)
def test_no_example_occurs_twice_and_no_text_is_in_both_splits(name):
    task = tasks.TASKS[name]
    columns = [c for c in task.columns if c != "word" and (c, name) != ("question", "copa")]
    found = {}
    for split in ("train", "validation"):
        if name == "sst2":
            examples = [(plain(t),) for t in load(name, split).first]
        else:
            examples = [tuple(plain(r[c]) for c in columns) for r in rows(name, split)]
        # the order of the two texts makes no new example
        assert len({frozenset(e) for e in examples}) == len(examples)
        found[split] = {text for e in examples for text in e if len(text.split()) > 2}
    assert not found["train"] & found["validation"]


def test_the_two_mnli_validation_splits_are_apart():
    a, b = ({plain(t) for t in (*load(n, "validation").first, *load(n, "validation").second)}
            for n in ("mnli", "mnli_mm"))  # fmt: skip
    assert not a & b


@pytest.mark.parametrize("name", FILES)
def test_texts_are_not_made_from_templates(name):
    """No opening of four words begins more than a few of the texts."""
    column = "sentence1" if name == "wic" else tasks.TASKS[name].columns[0]
    texts = {r[column] for r in rows(name, "train")}
    openings = Counter(tuple(words(t)[:4]) for t in texts)
    assert openings.most_common(1)[0][1] <= 4, openings.most_common(3)


# -- baselines ---------------------------------------------------------------------------------


def features(e: examples.Examples, bag: CountVectorizer) -> dict[str, csr_matrix]:
    """Two sets of bag-of-words features of every text or pair."""
    second = e.second or [""] * len(e.first)
    a, b = bag.transform(e.first), bag.transform(second)
    sets = [(set(words(x)), set(words(y))) for x, y in zip(e.first, second, strict=True)]
    shared = csr_matrix([[len(x & y) / len(x | y), len(y - x) / max(1, len(y))] for x, y in sets])
    return {"words": a + b, "pairs": hstack([a, b, a.multiply(b), abs(a - b), 3 * shared]).tocsr()}


def score(name: str, x: csr_matrix, v: csr_matrix) -> float:
    """Validation score of a linear model on these features, as a fraction."""
    train, held = load(name, "train"), load(name, "validation")
    if train.task.kind == "regression":
        return float(pearsonr(Ridge().fit(x, train.labels).predict(v), held.labels).statistic)
    if train.task.kind == "choice":  # is this the right choice? the likelier of the two wins
        right = np.zeros(2 * len(train), int)
        right[2 * np.arange(len(train)) + train.labels] = 1
        said = LogisticRegression(max_iter=1000).fit(x, right).decision_function(v)
        return float((said.reshape(-1, 2).argmax(1) == held.labels).mean())
    return float(
        (LogisticRegression(max_iter=1000).fit(x, train.labels).predict(v) == held.labels).mean()
    )


@pytest.mark.parametrize("name", LABELLED)
def test_neither_the_largest_class_nor_a_bag_of_words_solves_the_task(name):
    train, held = load(name, "train"), load(name, "validation")
    bag = CountVectorizer(binary=True, token_pattern=r"\w+").fit(train.first + (train.second or []))
    x, v = features(train, bag), features(held, bag)
    found = {kind: score(name, x[kind], v[kind]) for kind in x}
    if train.task.kind != "regression":
        largest = np.bincount(train.labels).argmax()
        found["majority"] = float((held.labels == largest).mean())
        classes = 3 if train.task.outputs == 3 else 2
        assert found["majority"] <= 1 / classes + 0.06
    print(
        f"{train.task.title:8s}", "  ".join(f"{k} {100 * s:5.1f}" for k, s in sorted(found.items()))
    )
    assert found["words"] < 0.85 and found["pairs"] < 0.85


# -- films -------------------------------------------------------------------------------------


def test_every_genre_occurs_and_none_is_named_in_a_plot():
    named = re.compile(
        r"\b(actions?|wars?|noir|sci-fi|science|(adventur|animat|biograph|comed|crim|documentar|drama"
        r"|famil(y|ies)|fantas|histor|horr|music|myster|romanc|romantic|short|sport|thrill|western)\w*)\b"
    )
    for split, least in (("train", 9), ("validation", 3)):
        e = load("mmimdb", split)
        assert e.labels.sum(0).min() >= least and 2 <= e.labels.sum(1).mean() <= 2.5
        for text in e.first:
            assert not named.search(text.lower()), (named.search(text.lower()), text)
        # a teacher is told one sentence of several
        assert all(
            t != text and len(t.split()) >= 4
            for t, text in zip(e.teacher_texts, e.first, strict=True)
        )


def test_a_bag_of_words_does_not_find_the_genres():
    train, held = load("mmimdb", "train"), load("mmimdb", "validation")
    bag = TfidfVectorizer(sublinear_tf=True).fit(train.first)
    x, v = bag.transform(train.first), bag.transform(held.first)
    said = np.stack([LogisticRegression(C=100, max_iter=1000).fit(x, y).predict(v)
                     for y in train.labels.T], 1)  # fmt: skip
    most = np.tile(train.labels.mean(0) >= np.sort(train.labels.mean(0))[-2], (len(held), 1))
    found = {"words": said, "the two most frequent": most}
    score = {
        k: f1_score(held.labels, p, average="micro", zero_division=0) for k, p in found.items()
    }
    print("MM-IMDb ", "  ".join(f"{k} {100 * s:5.1f}" for k, s in score.items()))
    assert max(score.values()) < 0.35
