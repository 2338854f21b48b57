"""Generation tasks: outputs are read by the stated rules; training holds no test question."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from armada_lib import answers, gentasks, overlap
from armada_lib.answers import Item, Template
from armada_lib.profiles import Unknown

# ---------------------------------------------------------------- parsing: stored outputs
OUTPUTS = [
    # the first label, in any case, with one space or none
    ("answer", "the correct answer is answer2", "answer2"),
    ("answer", "the correct answer is answer2.", "answer2"),
    ("answer", "The Correct Answer is Answer 3", "answer3"),
    ("answer", "answer1 answer1 answer1 answer1", "answer1"),
    ("answer", "It could be answer4, but I think that answer1 is better.", "answer4"),
    ("answer", "the correct answer is answer12", None),
    ("answer", "the correct answer is answer0", None),
    ("answer", "the correct answer is light to reflect", None),
    ("answer", "the correct answer is ending2", None),
    ("answer", "", None),
    ("ending", "the correct answer is ending4\n\n### Instruction:\nending1", "ending4"),
    ("ending", "the correct answer is ending5", None),
    ("option", "option2 because Maria is tired", "option2"),
    ("option", "the correct answer is option3", None),
    # the last number
    ("number", "\nA: They have 5 * 8 = 40 seeds. The answer is 29.", 29.0),
    ("number", "The answer is 1,234.50", 1234.5),
    ("number", "It costs $1,000,000 in all", 1e6),
    ("number", "They are 3,4 and 12,5", 5.0),  # no thousands: a comma between them
    ("number", "The temperature is −7 degrees", -7.0),
    ("number", "He loses -$5.", -5.0),
    ("number", "so 12-7=5, and 9-4", 4.0),
    ("number", "That is (3)-2", 2.0),
    ("number", "The answer is 3/4.", 0.75),
    ("number", "The answer is 3/0.", None),
    ("number", "12/4 = 3", 3.0),
    ("number", "The area is 62 m2", 62.0),
    ("number", "about .5 litres", 0.5),
    ("number", "20% of them", 20.0),
    ("number", "Either 4 or 6, hard to say", 6.0),
    ("number", "The answer is 7. ### Instruction: What is 3 + 9?", 7.0),
    ("number", "I do not know.", None),
    ("number", "", None),
    ("number", "The answer is 111" + "1" * 400, float("inf")),
    # the letter it settles on
    ("letter", "The answer is (B).", "B"),
    ("letter", "Rationale: (A) is too small and (C) too large. The answer is D.", "D"),
    ("letter", "The answer is B. So C gets 300.", "B"),
    ("letter", "A train runs 60 km. Because it is late, B", "B"),
    ("letter", "A train runs 60 km in an hour.", None),
    ("letter", "A", "A"),
    ("letter", "D) 45", "D"),
    ("letter", "the correct option is: **C**", "C"),
    ("letter", "the answer is c.", "C"),
    ("letter", "the answer is a bit more than 5", None),
    ("letter", "P(A) is small, thus E", "E"),
    ("letter", "Because Dora Can't", None),
    ("letter", "the answer is $20", None),
    ("letter", "", None),
]


@pytest.mark.parametrize(("parse", "output", "wanted"), OUTPUTS)
def test_stored_outputs_are_read_by_the_stated_rule(parse, output, wanted):
    assert answers.PARSERS[parse](answers.cut(output)) == wanted


def item(n=0, **kw):
    base = {"instruction": "ask", "input": "", "response": "r", "question": "ask"}
    return Item(f"x/test/{n}", **(base | kw))


# ---------------------------------------------------------------- scoring
def test_accuracy_counts_what_cannot_be_read_as_wrong():
    items = [item(n, answer=a) for n, a in enumerate(("5.0", "0.333", "7.0", "2.0"))]
    outputs = ["It is 5", "1/3", "no idea", "The answer is 3."]
    got = gentasks.score("singleeq", outputs, items)
    assert got.percent == 50.0 and got.unparsed == 1
    assert got.each.tolist() == [100.0, 100.0, 0.0, 0.0] and got.each.dtype == np.float64
    # the tolerance is 1e-3
    assert gentasks.score("singleeq", ["5.0009", "0.3345"], items[:2]).each.tolist() == [100.0, 0.0]


def test_rouge_l_is_the_f_of_the_longest_common_subsequence():
    # LCS "the cat on the mat": 5 words of 6 and of 7, so P 5/6, R 5/7, F 10/13
    long = "the cat sat down on the mat"
    one = item(references=(long,))
    got = gentasks.score("vicuna", ["The cat on the mat today!"], [one])
    assert got.percent == pytest.approx(100 * 10 / 13)
    # the best reference counts, words are stemmed, an empty output is 0 and unparsed
    two = item(references=(long, "he was running with dogs"))
    got = gentasks.score("s_ni", ["he was run with dog", " \n"], [two, two])
    assert got.each.tolist() == [100.0, 0.0] and got.unparsed == 1 and got.percent == 50.0


def test_scoring_refuses_what_it_cannot_score():
    with pytest.raises(ValueError, match=r"x/test/0: no answer"):
        gentasks.score("aqua", ["B"], [item()])
    with pytest.raises(ValueError, match=r"x/test/0: no answer"):
        gentasks.score("vicuna", ["B"], [item(answer="B")])
    with pytest.raises(ValueError, match="2 outputs for 1 items"):
        gentasks.score("aqua", ["B", "C"], [item(answer="B")])
    with pytest.raises(ValueError, match="0 outputs for 0 items"):
        gentasks.score("aqua", [], [])
    with pytest.raises(Unknown, match="did you mean 'aqua'"):
        gentasks.score("aqau", ["B"], [item(answer="B")])


def test_the_likelihood_protocol_picks_one_candidate():
    assert answers.pick([-9.0, -4.0, -6.0], [9, 2, 2], normalise=False) == 1
    assert answers.pick([-9.0, -4.0, -6.0], [9, 2, 2], normalise=True) == 0
    assert answers.pick([-2.0, -2.0], [1, 1], normalise=True) == 0
    for bad in (([-1.0], [1, 2]), ([], []), ([-1.0, -2.0], [1, 0])):
        with pytest.raises(ValueError, match="lengths"):
            answers.pick(*bad, normalise=True)
    with pytest.raises(ValueError, match="not a number"):
        answers.pick([float("nan"), -1.0], [1, 1], normalise=False)
    with pytest.raises(ValueError, match=r"x/test/0: no choices.*generate-and-parse"):
        answers.candidates(item())


# ---------------------------------------------------------------- templates
def test_the_alpaca_prompt_to_the_letter():
    assert answers.prompt(item(instruction="Say {hi}.", input="to Ann"), "alpaca") == (
        "Below is an instruction that describes a task, paired with an input that provides "
        "further context. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nSay {hi}.\n\n### Input:\nto Ann\n\n### Response:\n"
    )
    assert answers.prompt(item(instruction="Say hi."), "alpaca") == (
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\nSay hi.\n\n### Response:\n"
    )
    assert answers.prompt(item(instruction="A", input="B"), "plain") == "A\nB\n\nAnswer:\n"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (("{instruction} {input} R:", "{instruction}", "R:"), "must end with its response marker"),
        (("{instruction} R:", "{instruction} R:", "R:"), "it needs ['input', 'instruction']"),
        (("{instruction} {input} R:", "{instruction} {x} R:", "R:"), "it has the fields"),
        (("{instruction} {input}", "{instruction}", ""), "response marker"),
    ],
)
def test_a_template_without_marker_or_field_is_refused(fields, message):
    with pytest.raises(ValueError) as e:
        Template(*fields)
    assert message in str(e.value)


class Chat:
    """A tokenizer of one token a character; with a chat template it starts with "<s>"."""

    chat_template = "yes"

    def apply_chat_template(self, turns, tokenize, add_generation_prompt):
        assert add_generation_prompt and not tokenize
        return "".join(f"<{t['role']}>{t['content']}" for t in turns) + "<assistant>"

    def __call__(self, texts, add_special_tokens):
        return {"input_ids": [[0] * (len(t) + add_special_tokens) for t in texts]}


def test_the_chat_template_is_the_tokenizers():
    two = item(instruction="A", input="B")
    assert answers.prompt(two, "chat", Chat()) == "<user>A\nB<assistant>"
    for without in (None, SimpleNamespace(chat_template=None)):
        with pytest.raises(ValueError, match="chat template.*alpaca, plain"):
            answers.prompt(two, "chat", without)
    with pytest.raises(Unknown, match="unknown template 'alpacka'; did you mean 'alpaca'"):
        answers.prompt(two, "alpacka")


# ---------------------------------------------------------------- contamination
def ask(n, text, options=()):
    return Item(f"train/{n}", text, "", "r", text, tuple(options))


LONG = "On a Monday the baker of our town sold 48 rolls to a school, and then he sold half as many"
END = " on the Tuesday to a hotel by the sea. How many rolls did he sell on both days together?"


def test_test_questions_are_removed_from_training():
    test = {
        "m": [ask(0, LONG + END), ask(1, "Sam has 3 dogs.")],
        "c": [ask(2, "The sun is", ["a star", "a moon"]), ask(3, "")],
    }
    train = [
        ask(10, (LONG + END).upper().replace(",", " ,").replace("?", " ?")),  # 0, exact
        ask(11, (LONG + END).replace("Monday", "Sunday")),  # 0, near: 33 of 39 5-grams
        ask(12, (LONG + END).replace("together", "in all")),  # 0, near
        ask(13, (LONG + END).replace("baker", "cook")),  # too far: 31 of 41
        ask(14, "Sam has 4 dogs."),
        ask(15, "The sun is", ["a moon", "A star"]),  # options in another order
        ask(16, "The sun is", ["a rock", "a fire"]),  # a short question, another item
        ask(17, LONG + END, ["1", "2"]),  # a long question, options or not
        ask(18, ""),
    ]
    kept, removed = overlap.contamination(train, test)
    assert [i.id for i in kept] == ["train/13", "train/14", "train/16", "train/18"]
    assert {(m.train, m.test_set, m.test, m.kind) for m in removed} == {
        ("train/10", "m", "train/0", "exact"), ("train/11", "m", "train/0", "near"),
        ("train/12", "m", "train/0", "near"), ("train/15", "c", "train/2", "exact"),
        ("train/17", "m", "train/0", "exact"),
    }  # fmt: skip
    assert overlap.counts(removed) == {
        "m": {"rows": 4, "exact": 2, "questions": 1},
        "c": {"rows": 1, "exact": 1, "questions": 1},
    }
    assert {m.similarity for m in removed if m.train == "train/11"} == {33 / 39}


def test_the_index_misses_no_pair():
    rng = random.Random(0)
    make = lambda: [rng.choice("abcdef") * rng.randint(1, 2) for _ in range(rng.randint(3, 60))]
    bases = [make() for _ in range(25)]

    def variant(words):
        words = list(words)
        for _ in range(rng.randint(0, 2)):
            words[rng.choice((0, 1, rng.randrange(len(words))))] = rng.choice(["zz", "yy"])
        return " ".join(words)

    test = [ask(n, variant(b)) for n, b in enumerate(bases * 3)]
    train = [ask(1000 + n, variant(b)) for n, b in enumerate(bases * 8)]
    _, removed = overlap.contamination(train, {"t": test})
    found = {(m.train, m.test) for m in removed}

    def grams(text):
        w = text.split()
        return {tuple(w[i : i + 5]) for i in range(max(1, len(w) - 4))}

    wanted = set()
    for a in train:
        for b in test:
            x, y = grams(a.question), grams(b.question)
            if len(x & y) / len(x | y) >= overlap.NEAR:
                wanted.add((a.id, b.id))
    assert found == wanted and 100 < len(wanted) < len(train) * len(test) / 10
    assert {m.kind for m in removed} == {"exact", "near"}


# ---------------------------------------------------------------- files
def choose(question, options, word="answer"):
    shown = " ".join(f"{word.capitalize()}{n + 1}: {o}" for n, o in enumerate(options))
    labels = "/".join(f"{word}{n + 1}" for n in range(len(options)))
    request = f"Please choose the correct answer to the question: {question}"
    return f"{request}\n\n{shown}\n\nAnswer format: {labels}"


def row(n, gold="answer2"):
    text = choose(f"What is thing number {n}?", ["red", "blue", "green"])
    return {
        "instruction": text,
        "input": "",
        "output": f"the correct answer is {gold}",
        "answer": gold,
    }


@pytest.fixture
def put(tmp_path, monkeypatch):
    monkeypatch.setenv("ARMADA_DATA", str(tmp_path))

    def write(place, rows, form="jsonl"):
        path = tmp_path / f"{place}.{form}"
        path.parent.mkdir(parents=True, exist_ok=True)
        if form == "parquet":
            import pyarrow as pa
            import pyarrow.parquet as pq

            pq.write_table(pa.Table.from_pylist(rows), path)
        else:
            path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")

    return write


def test_an_item_of_a_choice_task(put):
    put("reasoning/arc_easy/test", [row(0)], "parquet")
    (got,), sources = gentasks.load("arc_easy", "test", "real")
    assert sources == {"arc_easy/test": "reasoning/arc_easy/test (local file)"}
    assert (got.id, got.answer, got.response) == (
        "arc_easy/test/0", "answer2", "the correct answer is answer2",
    )  # fmt: skip
    assert got.prompt_text == row(0)["instruction"]
    assert got.teacher_text == "What is thing number 0? red blue green"
    assert answers.candidates(got) == [f"the correct answer is answer{n}" for n in (1, 2, 3)]


def test_math_is_scored_against_answer_and_never_output(put):
    wrong = {"input": "", "output": "So it is 4. The answer is 4."}
    put(
        "reasoning/multiarith/test",
        [{"instruction": " 1,200 and 34? ", "answer": "1,234.0"} | wrong],
    )
    (got,), _ = gentasks.load("multiarith", "test", "real")
    assert (got.answer, got.response, got.choices) == ("1234.0", "The answer is 1234.", ())
    text = "How much? Answer Choices: (A) 4 (B) 1 km (C) P (D) 7 (E) 9"
    put("reasoning/aqua/test", [{"instruction": text, "answer": "B"} | wrong])
    (got,), _ = gentasks.load("aqua", "test", "real")
    assert (got.answer, got.response) == ("B", "The answer is (B).")
    assert got.teacher_text == "How much? 4 1 km P 7 9"
    assert answers.candidates(got)[4] == "The answer is (E)."
    # in training it is the rationale that is learned
    put("reasoning/math_data/train", [{"instruction": "1?", "answer": "1.0"} | wrong])
    (got,), _ = gentasks.load("math", "train", "real")
    assert (got.response, got.answer) == ("So it is 4. The answer is 4.", "1.0")


def test_an_item_of_an_instruction_task(put):
    rows = [{"instruction": "Name it.", "input": " a\n b ", "output": [" one", "two"]}]
    put("instruct/s_ni/test", rows)
    (got,), _ = gentasks.load("s_ni", "test", "real")
    assert (got.references, got.response) == (("one", "two"), "one")
    assert got.prompt_text == "Name it.\n a\n b " and got.teacher_text == "Name it. a b"


BAD = [
    ("arc_easy", "test", [row(0) | {"answer": "answer4"}],
     "answer 'answer4', 3 options; expected one of answer1,"),
    ("arc_easy", "test", [row(0) | {"instruction": "Why?"}], "expected one of the labels"),
    ("arc_easy", "test", [row(0), row(1) | {"answer": None}], "row 1: no answer"),
    ("arc_easy", "test", [row(0) | {"answer": None}],
     "this split has no answers; it cannot be scored"),
    ("arc_easy", "test", [{"instruction": "Why?", "output": "x"}],
     "row 0: missing column(s) ['answer']"),
    ("arc_easy", "test", [row(0) | {"instruction": " "}], "row 0: the instruction is empty"),
    ("arc_easy", "test", [], "no rows"),
    ("arc_easy", "train", [row(0), row(1) | {"output": " "}], "row 1: empty response"),
    ("arc_easy", "train", [row(0), row(1) | {"output": None}], "row 1: empty response"),
    ("singleeq", "test", [{"instruction": "1?", "answer": "two"}],
     "row 0: answer 'two' is not a number"),
    ("vicuna", "test", [{"instruction": "1?", "output": ""}], "this split has no answers"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "split", "rows", "message"), BAD)
def test_a_bad_file_is_refused_by_name(put, name, split, rows, message):
    group = gentasks.TASKS[name].group
    put(f"{group}/{name}/{split}", rows)
    with pytest.raises(ValueError) as e:
        gentasks.load(name, split, "real")
    assert message in str(e.value) and f"{group}/{name}/{split}" in str(e.value)


# ---------------------------------------------------------------- suites
@pytest.fixture
def common(put):
    """Two of the five test sets, two training files; one training row is a test question."""
    put("reasoning/arc_easy/train", [row(n) for n in range(40)])
    put("reasoning/openbookqa/train", [row(n, "answer1") for n in range(100, 140)])
    put("reasoning/arc_easy/test", [row(n) for n in (200, 201, 202, 7)])
    put("reasoning/openbookqa/test", [row(n) for n in range(300, 310)])
    return put


def test_a_suite_takes_what_is_there_and_reports_what_it_removed(common):
    there = gentasks.available("commonsense", "real")
    assert there == ["arc_easy", "openbookqa"]
    got = gentasks.suite("commonsense", "real", tests=there, test_size=5)
    assert len(got.train) == 79 and "arc_easy/train/7" not in {i.id for i in got.train}
    assert {k: len(v) for k, v in got.tests.items()} == {"arc_easy": 4, "openbookqa": 5}
    assert got.validation is None
    assert overlap.counts(got.removed) == {"arc_easy": {"rows": 1, "exact": 1, "questions": 1}}
    assert set(got.sources) == {
        "arc_easy/train", "openbookqa/train", "arc_easy/test", "openbookqa/test",
    }  # fmt: skip


def test_a_missing_test_set_is_an_error_that_names_it(common):
    with pytest.raises(FileNotFoundError, match=r"HellaSwag: .*hellaswag/test.parquet.*Rowan/"):
        gentasks.suite("commonsense", "real")
    with pytest.raises(FileNotFoundError, match="SingleEq: .*no copy on the Hugging Face hub"):
        gentasks.suite("math", "real", tests=["singleeq"])
    with pytest.raises(Unknown, match="test set of commonsense"):
        gentasks.suite("commonsense", "real", tests=["aqua"])
    with pytest.raises(ValueError, match="no test set; choose from hellaswag"):
        gentasks.suite("commonsense", "real", tests=[])
    with pytest.raises(FileNotFoundError, match=r"vicuna/test.parquet|dolly/test.parquet"):
        gentasks.suite("dolly", "real", tests=gentasks.available("dolly", "real"))
    with pytest.raises(Unknown, match="unknown suite 'aqua'.*commonsense, dolly, math"):
        gentasks.suite("aqua", "real")
    with pytest.raises(Unknown, match="unknown data"):
        gentasks.suite("commonsense", "paper")


def test_a_mixture_without_any_part_names_the_files(put):
    put("reasoning/arc_easy/test", [row(0)])
    with pytest.raises(FileNotFoundError, match=r"none of .*hellaswag/train.*openbookqa/train"):
        gentasks.suite("commonsense", "real", tests=["arc_easy"])


def test_samples_are_seeded_and_nested(common):
    def take(**kw):
        return gentasks.suite("commonsense", "real", tests=["arc_easy", "openbookqa"], **kw)

    ids = lambda s: [i.id for i in s.train]
    a, b, c = take(train_size=20), take(train_size=20), take(train_size=20, seed=1)
    assert ids(a) == ids(b) and a.digest == b.digest and len(ids(a)) == 20
    assert ids(a) != ids(c) and a.digest != c.digest
    assert set(ids(a)) < set(ids(take(train_size=30)))
    assert {i.split("/")[0] for i in ids(a)} == {"arc_easy", "openbookqa"}
    with pytest.raises(ValueError, match="train_size is 80, but 79 of 80 training items"):
        take(train_size=80)
    with pytest.raises(ValueError, match="test_size is 0"):
        take(test_size=0)


def test_the_digest_covers_all_that_is_trained_on_or_scored():
    base = item(answer="A", references=("x", "y"), choices=("p", "q"))
    changed = [
        dict(instruction="z"), dict(input="z"), dict(response="z"), dict(answer="B"),
        dict(references=("xy",)), dict(choices=("q", "p")),
    ]  # fmt: skip
    digests = {gentasks.digest([replace(base, **c)]) for c in ({}, *changed)}
    assert len(digests) == 7 and all(len(d) == 24 for d in digests)


def test_dolly_has_a_validation_split_and_a_short_stand_in(put):
    ask = lambda n: {"instruction": f"Tell me of {n}.", "input": "", "output": f"It is {n}."}
    for split, start in (("train", 0), ("validation", 50), ("test", 80)):
        put(f"instruct/dolly/{split}", [ask(n) for n in range(start, start + 20)])
    put("instruct/uni_short/test", [ask(100)])
    assert gentasks.available("dolly", "real") == ["dolly", "uni_short"]
    got = gentasks.suite("dolly", "real", test_size=4, tests=["dolly", "uni_short"])
    assert (len(got.train), len(got.validation), len(got.tests["dolly"])) == (20, 4, 4)
    assert got.validation[0].id.startswith("dolly/validation/")


# ---------------------------------------------------------------- the hub
FOUR = {"text": ["p", "q", "r", "s"], "label": ["1", "2", "3", "4"]}
HUB = {
    "hellaswag": (
        {"activity_label": "Cooking", "ctx": "[header] How to [title] A man", "label": "2",
         "endings": ["eats.", "[step] runs.", "sits.", "sleeps."]},
        ("Rowan/hellaswag", {"name": "default"}, "validation"),
        "Please choose the correct ending to complete the given sentence: Cooking: How to A man\n\n"
        "Ending1: eats. Ending2: runs. Ending3: sits. Ending4: sleeps.\n\n"
        "Answer format: ending1/ending2/ending3/ending4", "ending3",
    ),
    "winogrande": (
        {"sentence": "Al met Bo and _ left.", "option1": "Al", "option2": "Bo", "answer": "1"},
        ("allenai/winogrande", {"name": "winogrande_xl"}, "validation"),
        "Please choose the correct answer to fill in the blank to complete the given sentence: "
        "Al met Bo and _ left.\n\nOption1: Al Option2: Bo Answer format: option1/option2",
        "option1",
    ),
    "arc_challenge": (
        {"question": "Why?", "choices": FOUR, "answerKey": "4"},
        ("allenai/ai2_arc", {"name": "ARC-Challenge"}, "test"),
        choose("Why?", FOUR["text"]), "answer4",
    ),
    "openbookqa": (
        {"question_stem": "Why?", "choices": FOUR | {"label": list("ABCD")}, "answerKey": "B"},
        ("allenai/openbookqa", {"name": "main"}, "test"), choose("Why?", FOUR["text"]), "answer2",
    ),
    "multiarith": (
        {"question": "How many?", "final_ans": "18"},
        ("ChilleD/MultiArith", {"name": "default"}, "train+test"), "How many?", "18.0",
    ),
    "aqua": (
        {"question": "How many?", "options": ["A)1", "B)2 km", "C)3"], "correct": "B"},
        ("deepmind/aqua_rat", {"name": "raw"}, "test"),
        "How many? Answer Choices: (A) 1 (B) 2 km (C) 3", "B",
    ),
    "uni": (
        {"instruction": "Do.", "input": "", "output": "done"},
        ("MiniLLM/uinst", {"data_files": "11_/valid.jsonl"}, "train[:2000]"), "Do.", None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HUB)
def test_the_hubs_rows_become_the_wording_of_the_files(name, monkeypatch):
    given, wanted, text, gold = HUB[name]
    calls = []

    def load(repo, split, revision, **part):
        calls.append((repo, part, split, revision))
        return [given]

    monkeypatch.delenv("ARMADA_DATA", raising=False)
    monkeypatch.setattr("datasets.load_dataset", load)
    info = SimpleNamespace(sha="0" * 40)
    monkeypatch.setattr(
        "huggingface_hub.HfApi", lambda: SimpleNamespace(dataset_info=lambda repo, timeout: info)
    )
    (got,), sources = gentasks.load(name, "test", "real")
    assert calls == [(*wanted, "0" * 40)]
    assert (got.instruction, got.answer) == (text, gold)
    assert sources[f"{name}/test"].endswith("@" + "0" * 40) and wanted[0] in sources[f"{name}/test"]


def test_what_the_hub_has_not_is_said_without_asking_it(monkeypatch):
    monkeypatch.delenv("ARMADA_DATA", raising=False)
    monkeypatch.setattr("datasets.load_dataset", lambda *a, **k: pytest.fail("asked"))
    with pytest.raises(FileNotFoundError, match="SingleEq.*ARMADA_DATA.*reasoning/singleeq/test"):
        gentasks.load("singleeq", "test", "real")
    assert gentasks.available("math", "real") == ["multiarith", "aqua"]
    assert gentasks.available("dolly", "real") == list(gentasks.TASKS["dolly"].tests)


# ---------------------------------------------------------------- the mini files
@pytest.mark.parametrize("name", gentasks.SUITES)
def test_the_mini_suites_are_whole_and_their_gold_answers_score_100(name):
    task = gentasks.TASKS[name]
    assert gentasks.available(name, "mini") == list(task.tests)
    got = gentasks.suite(name, "mini")
    assert got.train and (got.validation is None) == (name != "dolly")
    for test, items in got.tests.items():
        own = gentasks.score(test, [i.response for i in items], items)
        assert own.percent == pytest.approx(100.0) and own.unparsed == 0, test
        assert len({i.teacher_text for i in items}) == len(items)
        for i in items:
            assert "Answer format" not in i.teacher_text
            if i.choices:  # a candidate is read as its own label: exactly one is right
                assert gentasks.score(test, list(i.choices), [i] * len(i.choices)).each.sum() == 100
                assert len(i.options) == len(i.choices) > 1
