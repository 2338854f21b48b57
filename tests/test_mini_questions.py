"""The mini sets of the two generative chapters: whole, balanced, right, without leaks."""

from __future__ import annotations

from collections import Counter

import pytest

from armada_lib import answers, gentasks
from armada_lib.overlap import contamination

CHOICE = ("hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")
TRAINED = {**dict.fromkeys(CHOICE, 48), "math": 220, "dolly": 210}
ASKED = {**dict.fromkeys((*CHOICE, "aqua", "selfinst", "s_ni", "uni"), 16),
         "multiarith": 24, "singleeq": 24, "dolly": 24, "vicuna": 10}  # fmt: skip


def items(name: str, split: str) -> list[answers.Item]:
    return gentasks.load(name, split, "mini")[0]


@pytest.mark.parametrize("split, sizes", [("train", TRAINED), ("test", ASKED)])
def test_every_set_is_there(split, sizes):
    assert {name: len(items(name, split)) for name in sizes} == sizes
    assert len(items("commonsense", "train")) == 5 * 48
    for suite in gentasks.SUITES:
        assert gentasks.available(suite, "mini") == list(gentasks.TASKS[suite].tests)


@pytest.mark.parametrize("name", [*CHOICE, "aqua"])
def test_every_option_is_right_equally_often(name):
    counts = Counter(i.answer for i in items(name, "test"))
    assert max(counts.values()) - min(counts.values()) <= 1
    assert len(counts) == {"winogrande": 2, "aqua": 5}.get(name, 4)


@pytest.mark.parametrize("suite", gentasks.SUITES)
def test_no_training_question_is_a_test_question(suite):
    tests = {t: items(t, "test") for t in gentasks.TASKS[suite].tests}
    train = items(suite, "train")
    kept, removed = contamination(train, tests)
    assert len(kept) == len(train) and not removed
    texts = [i.prompt_text for i in [*train, *(i for part in tests.values() for i in part)]]
    assert len(set(texts)) == len(texts)


@pytest.mark.parametrize("name", [*CHOICE, "multiarith", "singleeq", "aqua"])
def test_the_gold_response_parses_to_the_gold_answer(name):
    found = items(name, "test")
    scored = gentasks.score(name, [i.response for i in found], found)
    assert scored.percent == 100 and not scored.unparsed
    wrong = gentasks.score(name, [found[n - 1].response for n in range(len(found))], found)
    assert wrong.percent < 60


def test_rationales_end_in_the_answer_of_their_file():
    found = items("math", "train")
    assert sum(i.answer is not None for i in found) == len(found)
    assert [i.id for i in found if answers.disagrees(i)] == []
