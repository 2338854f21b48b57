"""Reasoning and instruction tuning: the suites, their files, and what training must not contain.

A suite is what a student is tuned on (`commonsense`, `math`, `dolly`) with its test sets. Files
have the columns instruction, input, output (and answer); the hub's rows are brought to them. The
gold answer is `answer`, never `output`: in math files a model's rationale, sometimes wrong.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import numpy as np

from armada_lib import answers, profiles, sources
from armada_lib.answers import Item, Score
from armada_lib.overlap import Match, contamination
from armada_lib.sources import SUBSET_SEED
from armada_lib.tables import Row


# ---------------------------------------------------------------- the hub's rows
def _choice(ask: str, word: str, gap: str, question: str, options: list[str], gold: int) -> Row:
    """A row in the wording of Hu et al."""
    labels = [f"{word}{n + 1}" for n in range(len(options))]
    shown = " ".join(f"{w.capitalize()}: {o}" for w, o in zip(labels, options, strict=True))
    text = f"Please choose the correct {ask}: {question}\n\n{shown}{gap}"
    text += f"Answer format: {'/'.join(labels)}"
    return {"instruction": text, "answer": labels[gold]}


def _arc(r: Row) -> Row:  # a few official items number their options 1, 2, 3, ...
    gold, text = (
        r["choices"]["label"].index(r["answerKey"]),
        r.get("question") or r["question_stem"],
    )
    return _choice("answer to the question", "answer", "\n\n", text, r["choices"]["text"], gold)


def _hellaswag(r: Row) -> Row:  # WikiHow's tags ([header], [title], ...) are no words
    plain = lambda t: " ".join(re.sub(r"\[\w+\]", " ", t).split())
    text, ends = f"{r['activity_label']}: {plain(r['ctx'])}", [plain(e) for e in r["endings"]]
    ask = "ending to complete the given sentence"
    return _choice(ask, "ending", "\n\n", text, ends, int(r["label"]))


def _winogrande(r: Row) -> Row:
    ask = "answer to fill in the blank to complete the given sentence"
    two = [r["option1"], r["option2"]]
    return _choice(ask, "option", " ", r["sentence"], two, int(r["answer"]) - 1)


def _multiarith(r: Row) -> Row:
    return {"instruction": r["question"], "answer": r["final_ans"]}


def _aqua(r: Row) -> Row:  # options as "A)23.65"
    shown = " ".join(f"({o[0]}) {o[2:].strip()}" for o in r["options"])
    return {"instruction": f"{r['question']} Answer Choices: {shown}", "answer": r["correct"]}


@dataclass(frozen=True)
class GenTask:
    """A test set, or a suite (`tests` not empty), or both (`dolly`).

    `parse`: a name of `answers.PARSERS`, or "text" (ROUGE-L). `hub`: split -> repository,
    configuration or file, split there; a split without comes from `ARMADA_DATA` only. `parts`:
    whose local training files stand for the suite's own. `extra`: test sets not of the paper.
    """

    name: str
    title: str
    group: Literal["reasoning", "instruct"]
    parse: str
    hub: dict[str, tuple[str, str, str]] = field(default_factory=dict)
    convert: Callable[[Row], Row] | None = None
    file: str | None = None  # folder below ARMADA_DATA, where it is not the task's name
    parts: tuple[str, ...] = ()
    tests: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()


def _test(repo: str, config: str, split: str = "test") -> dict[str, tuple[str, str, str]]:
    return {"test": (repo, config, split)}


_COMMON = ("hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")
_ARC, _GU, _LONG = "allenai/ai2_arc", "valid.jsonl", "11_/valid.jsonl"
_DOLLY = {  # as Gu et al. cut it; they also drop prompts over 256 GPT-2 tokens
    "train": ("MiniLLM/dolly", "raw.jsonl", "train[1000:]"),
    "validation": ("MiniLLM/dolly", "raw.jsonl", "train[:1000]"),
    "test": ("MiniLLM/dolly", _GU, "train"),
}

TASKS: dict[str, GenTask] = {t.name: t for t in (
    GenTask("hellaswag", "HellaSwag", "reasoning", "ending",
            _test("Rowan/hellaswag", "default", "validation"), _hellaswag),
    GenTask("winogrande", "WinoGrande", "reasoning", "option",
            _test("allenai/winogrande", "winogrande_xl", "validation"), _winogrande),
    GenTask("arc_easy", "ARC-e", "reasoning", "answer", _test(_ARC, "ARC-Easy"), _arc),
    GenTask("arc_challenge", "ARC-c", "reasoning", "answer", _test(_ARC, "ARC-Challenge"), _arc),
    GenTask("openbookqa", "OpenBookQA", "reasoning", "answer",
            _test("allenai/openbookqa", "main"), _arc),
    GenTask("multiarith", "MultiArith", "reasoning", "number",
            _test("ChilleD/MultiArith", "default", "train+test"), _multiarith),
    GenTask("singleeq", "SingleEq", "reasoning", "number"),
    GenTask("aqua", "AQuA", "reasoning", "letter", _test("deepmind/aqua_rat", "raw"), _aqua),
    GenTask("selfinst", "SelfInst", "instruct", "text", _test("MiniLLM/self-inst", _GU, "train")),
    GenTask("vicuna", "Vicuna", "instruct", "text", _test("MiniLLM/Vicuna", _GU, "train")),
    GenTask("s_ni", "SNI", "instruct", "text", _test("MiniLLM/sinst", _LONG, "train")),
    GenTask("uni", "UNI", "instruct", "text", _test("MiniLLM/uinst", _LONG, "train[:2000]")),
    GenTask("uni_short", "UNI, references of 10 words or fewer", "instruct", "text"),
    GenTask("commonsense", "commonsense mixture", "reasoning", "answer",
            {"train": ("zwhe99/commonsense_170k", "default", "train")},
            parts=_COMMON, tests=_COMMON),
    GenTask("math", "Math10K", "reasoning", "number",
            {"train": ("lmms-lab/Math10K", "default", "train")}, file="math_data",
            tests=("multiarith", "singleeq", "aqua")),
    GenTask("dolly", "Dolly", "instruct", "text", _DOLLY, extra=("uni_short",),
            tests=("dolly", "selfinst", "vicuna", "s_ni", "uni")),
)}  # fmt: skip
SUITES = tuple(t.name for t in TASKS.values() if t.tests)


def _folder(task: GenTask, data: str) -> str:
    return task.name if data == "mini" else task.file or task.name


def _exists(name: str, split: str, data: str) -> bool:
    task = TASKS[name]
    paths = sources.places(task.group, _folder(task, data), split, data)
    return any(p.exists() for p in paths) if paths else split in task.hub


def available(suite: str, data: str) -> list[str]:
    """Test sets of a suite whose file is there (or that the hub has), the paper's first.

    What `TASKS[suite].tests` has beyond it is missing, to be reported by name. `settings.Unknown`
    for a suite or `data` ("mini", "real") that is none.
    """
    task = TASKS[profiles.check(suite, SUITES, "suite")]
    profiles.check(data, ("mini", "real"), "data")
    return [t for t in (*task.tests, *task.extra) if _exists(t, "test", data)]


_CHOOSE = re.compile(r"Please [^:]*:\s*(.*?)\s*Answer format:\s*(\S+)\s*$", re.DOTALL)
_OPTION = re.compile(r"\s*\b(?:Answer|Ending|Option|Solution)\d:\s*")
_LETTER = re.compile(r"\s*\(([A-E])\)\s*")


def _asked(text: str, group: str) -> tuple[str, list[str], list[str], str]:
    """(question, options, labels, how a label is answered) of an instruction."""
    if group == "reasoning" and (found := _CHOOSE.search(text)):
        question, *options = _OPTION.split(found[1])
        return question, options, found[2].split("/"), "the correct answer is {}"
    question, mark, shown = text.partition("Answer Choices:")
    if mark and group == "reasoning":
        return question, _LETTER.split(shown)[2::2], _LETTER.findall(shown), "The answer is ({})."
    return text, [], [], "The answer is {}."


def _item(task: GenTask, split: str, n: int, row: Row, source: str) -> Item:
    where = f"{source}, row {n}"
    scored = split == "test" and task.parse != "text"
    last = "answer" if scored else "output"
    if missing := [c for c in ("instruction", last) if c not in row]:
        raise ValueError(f"{where}: missing column(s) {missing}; the file has {sorted(row)}")
    asked, given = str(row["instruction"] or ""), str(row.get("input") or "")
    if not asked.strip():
        raise ValueError(f"{where}: the instruction is empty")
    raw = row[last] if isinstance(row[last], list) else [row[last]]
    texts = tuple(str(t).strip() for t in raw if t is not None)
    if not texts or not all(texts):
        raise ValueError(f"{where}: {'no answer' if split == 'test' else 'empty response'}")
    question, options, labels, say = _asked(asked, task.group)
    item = partial(Item, f"{task.name}/{split}/{n}", asked, given if given.strip() else "")
    plain = tuple(" ".join(t.split()) for t in (f"{question} {given}", *options))
    if not scored:
        known = str(row["answer"]) if task.parse == "number" and row.get("answer") else None
        several = texts if task.parse == "text" else ()
        return item(texts[0], plain[0], plain[1:], answer=known, references=several)
    gold, said = texts[0], texts[0]
    if task.parse == "number":
        try:
            gold = str(float(gold.replace(",", "")))
        except ValueError:
            raise ValueError(f"{where}: answer {gold!r} is not a number") from None
        said, labels = gold.removesuffix(".0"), []
    elif gold not in labels or len(options) != len(labels):
        raise ValueError(
            f"{where}: answer {gold!r}, {len(options)} options; expected one of "
            f"{', '.join(labels) or 'the labels in Answer format'}, an option for each"
        )
    choices = tuple(say.format(w) for w in labels)
    return item(say.format(said), plain[0], plain[1:], answer=gold, choices=choices)


def load(name: str, split: str, data: str) -> tuple[list[Item], dict[str, str]]:
    """All items of one split (`train`, `validation`, `test`), checked row by row, and sources.

    Raises FileNotFoundError (file looked for, variable to set, hub name) and ValueError (missing
    column, empty instruction or response, a test split without answers).
    """
    task = TASKS[profiles.check(name, TASKS, "task")]
    profiles.check(data, ("mini", "real"), "data")
    at_hub = data == "real" and not os.environ.get("ARMADA_DATA")
    if task.parts and split == "train" and not at_hub:
        found = [load(p, split, data) for p in task.parts if _exists(p, split, data)]
        if not found:
            looked = [sources.places(task.group, p, split, data)[0] for p in task.parts]
            raise FileNotFoundError(f"data of {task.title}: none of {[*map(str, looked)]} found")
        items = [i for part, _ in found for i in part]
        return items, dict(kv for _, where in found for kv in where.items())
    hub = task.hub.get(split)
    rows, source = sources.read(task.title, task.group, _folder(task, data), split, data, hub)
    if task.convert and at_hub:
        rows = [task.convert(r) for r in rows]
    if not rows:
        raise ValueError(f"{source}: no rows")
    if split == "test" and not any(r.get("answer", r.get("output")) for r in rows):
        raise ValueError(f"{source}: this split has no answers; it cannot be scored")
    items = [_item(task, split, n, r, source) for n, r in enumerate(rows)]
    return items, {f"{task.name}/{split}": source}


def score(task: str, outputs: Sequence[str], items: Sequence[Item]) -> Score:
    """`answers.score` with the task's way to read an output; `settings.Unknown` for no task."""
    return answers.score(TASKS[profiles.check(task, TASKS, "task")].parse, outputs, items)


# ---------------------------------------------------------------- suites
@dataclass(frozen=True)
class Suite:
    """Data of one run. `sources`: task/split -> file or hub revision; `digest` covers all items."""

    name: str
    train: list[Item]
    validation: list[Item] | None
    tests: dict[str, list[Item]]
    removed: list[Match]
    sources: dict[str, str]
    digest: str


def digest(items: Sequence[Item]) -> str:
    """24 hex digits over everything that is trained on or scored against, in order."""
    h = hashlib.sha256()
    for i in items:
        parts = (i.instruction, i.input, i.response, i.answer or "", *i.references, *i.choices)
        h.update(("\x1f".join(parts) + "\x1e").encode())
    return h.hexdigest()[:24]


def _sample(items: list[Item], size: int | None, seed: int) -> list[Item]:
    """A fixed random subset in file order; a smaller one is part of a larger one.

    Files in equal shares: a mixture of local parts would else be nearly all WinoGrande.
    """
    order, taken = np.random.default_rng(seed).permutation(len(items)), Counter[str]()
    rank = []
    for i in order:
        part = items[i].id.split("/")[0]
        rank.append(taken[part])
        taken[part] += 1
    chosen = order[np.argsort(rank, kind="stable")][:size]
    return [items[i] for i in np.sort(chosen)]


def suite(
    name: str,
    data: str,
    train_size: int | None = None,
    test_size: int | None = None,
    seed: int = SUBSET_SEED,
    tests: Sequence[str] | None = None,
) -> Suite:
    """Training, validation and test items, without training items that are test questions.

    `train_size`: a seeded sample of what the contamination check leaves (A22: 8,000 of the
    commonsense mixture); None keeps all. `test_size`: at most so many items of every test set and
    of the validation split; the check reads the whole test sets. `tests`: by default the paper's,
    and a missing one is an error; pass `available(name, data)` to take what is there. ValueError
    for an unknown name, no test set, sizes below 1, and more training items than are left.
    """
    task = TASKS[profiles.check(name, SUITES, "suite")]
    chosen = task.tests if tests is None else tuple(tests)
    if not chosen:
        if not available(name, data):
            load(task.tests[0], "test", data)  # says which file is missing, and how to get it
        raise ValueError(f"{name}: no test set; choose from {', '.join(task.tests)}")
    for t in chosen:
        profiles.check(t, (*task.tests, *task.extra), f"test set of {name}")
    for what, size in (("train_size", train_size), ("test_size", test_size)):
        if size is not None and size < 1:
            raise ValueError(f"{name}: {what} is {size}; it must be at least 1")
    wanted = [*((t, "test") for t in chosen), (name, "train")]
    wanted += [(name, "validation")] if _exists(name, "validation", data) else []
    read = {key: load(*key, data) for key in wanted}
    sources = dict(kv for _, found in read.values() for kv in found.items())
    pool = read[name, "train"][0]
    kept, removed = contamination(pool, {t: read[t, "test"][0] for t in chosen})
    if (train_size or 1) > len(kept):
        raise ValueError(
            f"{name}: train_size is {train_size}, but {len(kept)} of {len(pool)} training items "
            "are left without those that are test questions"
        )
    train = _sample(kept, train_size, seed)
    held = _sample(read[wanted[-1]][0], test_size, seed) if len(wanted) > len(chosen) + 1 else None
    asked = {t: _sample(read[t, "test"][0], test_size, seed) for t in chosen}
    everything = [*train, *(held or []), *(i for items in asked.values() for i in items)]
    return Suite(name, train, held, asked, removed, sources, digest(everything))
