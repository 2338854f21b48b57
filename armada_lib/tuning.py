"""One run of a student that generates: tuned on a suite, then asked the questions of its test sets.

Weights are kept until the last answer is given, and answers as they come: a killed run goes on at
the example where it stopped.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator
from safetensors import SafetensorError, safe_open

from armada_lib import (
    answers,
    decoders,
    engine,
    generation,
    gentasks,
    profiles,
    run_data,
    specs,
    state,
)
from armada_lib.answers import Item
from armada_lib.decoders import Decoder
from armada_lib.engine import Trained
from armada_lib.extraction import attach
from armada_lib.files import write_tensors
from armada_lib.machine import environment
from armada_lib.methods import METHODS, Method, Setting
from armada_lib.results import Result, RunSpec, RunStore
from armada_lib.sequences import Sequences, sequences

SAMPLES = 5  # as Gu et al. (MiniLLM) sample
NEW_TOKENS = {"reasoning": 32, "instruct": 128}  # of an answer, unless the settings say otherwise


def build(s: RunSpec, store: RunStore) -> tuple[Decoder, Method, Sequences, dict[str, Any]]:
    """(student, method, training data, facts) of a run, untrained."""
    p, t, entry, suite = profiles.load(s.profile), s.training, METHODS[s.method], run_data.suite(s)
    width = p.teacher(s.teacher).width if s.teacher and entry.vectors else None
    student = decoders.load(p.student(s.student), width or 1, s.seed, t.dropout, t.precision)
    for items in suite.tests.values():  # a question too long is named before anything is trained
        generation.tokens(student, _prompts(s, student.tokenizer, items), _room(s))
    items = _responses(s, store) if s.mentor else suite.train
    prompts = [student.prompt_ids(p) for p in _prompts(s, student.tokenizer, items)]
    fits = [n for n, ids in enumerate(prompts) if len(ids) < t.max_length]
    if not fits:
        raise ValueError(
            f"{s.task}: every training prompt has {t.max_length} tokens or more, so none leaves room "
            "for a response; raise max_length"
        )
    train, end = [items[n] for n in fits], student.tokenizer.eos_token or ""
    responses = [student.answer_ids(i.response + end) for i in train]
    pad = student.tokenizer.pad_token_id
    data, cut = sequences([prompts[n] for n in fits], responses, pad, t.max_length)
    absent = 0
    if width is not None:
        absent = attach(s, store, [(data, [i.teacher_text for i in train])], width)
    setting = Setting(
        kind="generation", outputs=width or 1, training=t, seed=s.seed, beta=s.beta, gamma=s.gamma,
        tau=s.tau, manifold=s.manifold or "euclid", reading=s.reading or "paper", width=width,
    )  # fmt: skip
    method = entry.build(setting, student)
    count = lambda module: sum(x.numel() for x in module.parameters() if x.requires_grad)
    facts = {
        "train": len(train), "too_long": len(items) - len(train), "cut": cut,
        "without_response": len(suite.train) - len(items),
        "wrong_rationales": sum(answers.disagrees(i) for i in train), "texts_without_vector": absent,
        "tests": {name: len(items) for name, items in suite.tests.items()},
        "removed_from_training": len(suite.removed), "sources": suite.sources,
        "student_parameters": sum(x.numel() for x in student.model.parameters()),
        "trained_parameters": count(student.model),
        "branch_parameters": count(student.branch) if student.branch else 0,
    }  # fmt: skip
    return student, method, data, facts


def _responses(s: RunSpec, store: RunStore) -> list[Item]:
    """The training items with the mentor's greedy responses (SeqKD; Kim and Rush, 2016).

    The source takes the mode of the mentor's distribution, by beam search; here it is greedy. The
    mentor is tuned on the same items first. Weights and responses are kept in `mentors/<key>/`:
    both are made once, and a killed call goes on. An empty response leaves its item out.
    """
    m = specs.mentor_of(s)
    home, items = store.root / "mentors" / m.key, run_data.suite(s).train
    with store.lock(f"mentor-{m.key}"):
        said = _said_by(m, store)
        if said is None:
            mentor, method, data, _ = build(m, store)
            _trained(
                home / "trained.safetensors", mentor, method,
                lambda: engine.train(
                    mentor, method, data, m.training, m.seed,
                    state=store.state(f"mentor-{m.key}"), probes=0,
                ),
            )  # fmt: skip
            said = generation.generate(
                mentor, _prompts(m, mentor.tokenizer, items), _room(m), home / "responses.jsonl",
                bf16=m.training.precision == "bf16",
            )  # fmt: skip
    found = [replace(i, response=answers.cut(r)) for i, r in zip(items, said, strict=True)]
    if not (left := [i for i in found if i.response]):
        raise ValueError(f"{s.label}: the mentor {m.student} answered none of the training prompts")
    return left


def _said_by(m: RunSpec, store: RunStore) -> list[str] | None:
    """A mentor's responses to the training items; None if one is missing."""
    return _kept(m, run_data.suite(m).train, store.root / "mentors" / m.key / "responses.jsonl")


def lacking(s: RunSpec, store: RunStore) -> bool:
    """Whether `s` learns from a mentor's responses that are not all there."""
    return s.mentor is not None and _said_by(specs.mentor_of(s), store) is None


def _prompts(s: RunSpec, tokenizer: Any, items: list[Item]) -> list[str]:
    return [answers.prompt(i, s.training.template or "alpaca", tokenizer) for i in items]


@cache
def _tokenizer(profile: str, student: str) -> Any:
    return decoders.load_tokenizer(profiles.load(profile).student(student))


def _kept(s: RunSpec, items: list[Item], path: Path, seed: int | None = None) -> list[str] | None:
    """What a file holds of the answers to these items; None if one is missing."""
    known = generation.kept_answers(path)
    chats = s.training.template == "chat"  # the one template for which a tokenizer is read
    tokenizer = _tokenizer(s.profile, s.student) if chats else None
    names = [generation.name(n, p, seed) for n, p in enumerate(_prompts(s, tokenizer, items))]
    return [known[n] for n in names] if known.keys() >= set(names) else None


def _room(s: RunSpec) -> int:
    return s.training.new_tokens or NEW_TOKENS[gentasks.TASKS[s.task].group]


def compute(
    s: RunSpec, store: RunStore, accelerator: Accelerator | None = None, progress: bool = False
) -> Result:
    """Train, answer, score, without looking whether the Result is there."""
    began = time.perf_counter()
    student, method, data, facts = build(s, store)
    kept = store.root / "answers" / s.key
    trained = _trained(
        kept / "trained.safetensors", student, method,
        lambda: engine.train(
            student, method, data, s.training, s.seed, accelerator, None, store.state(s.key),
            save_every=float(os.environ.get("ARMADA_SAVE_EVERY", engine.SAVE_EVERY)), progress=progress,
            probes=0,  # a backward pass for each term is dear here, and no chapter reads them
        ),
    )  # fmt: skip
    scores, outputs, unparsed, tests = {}, {}, {}, run_data.suite(s).tests
    with store.lock(f"answers-{s.key}"):  # of several processes one answers, the others read
        every = answer(s, student, tests, kept, progress)
    for name, items in tests.items():
        found = [gentasks.score(name, one, items) for one in every[name]]
        outputs[name] = np.mean([f.each for f in found], axis=0)
        scores[name], unparsed[name] = float(outputs[name].mean()), [f.unparsed for f in found]
    mean = float(np.mean(list(scores.values())))
    each = np.concatenate(list(outputs.values()))
    facts |= {
        "behaviour": _behaviour(unparsed, len(each)),
        "diagnostics": trained.diagnostics, "epochs": trained.epochs, "steps": trained.steps,
        "train_seconds": round(trained.seconds, 2),
        "evaluation": len(each), "seconds": round(time.perf_counter() - began + trained.earlier, 2),
    }  # fmt: skip
    (kept / "trained.safetensors").unlink(missing_ok=True)
    metric = "rougeL" if gentasks.TASKS[s.task].parse == "text" else "accuracy"
    return Result(
        s, metric, {"student": mean, **scores}, {"student": each, **outputs}, np.zeros(len(each)),
        trained.curves, facts, environment(),
    )  # fmt: skip


def _behaviour(unparsed: dict[str, list[int]], items: int) -> dict[str, Any]:
    """Answers that could not be read, a mean over the samples; most of them: the run collapsed."""
    mean = {name: float(np.mean(counts)) for name, counts in unparsed.items()}
    return {"unparsed": mean, "collapsed": sum(mean.values()) > items / 2}


def answer(
    s: RunSpec,
    student: Decoder,
    tests: Mapping[str, list[Item]],
    kept: Path | None = None,
    progress: bool = False,
) -> dict[str, list[list[str]]]:
    """The student's answers to each test set by the protocol of the run: one list, or one a sample.

    `kept`: a folder with a file of answers for each set, from which a killed call goes on.
    """
    bf16 = s.training.precision == "bf16"
    sets = [
        (kept / f"{name}.jsonl" if kept else None, _prompts(s, student.tokenizer, items))
        for name, items in tests.items()
    ]
    if s.training.protocol == "likelihood":
        options = [[answers.candidates(i) for i in items] for items in tests.values()]
        chosen = generation.choose(student, sets, options, bf16=bf16, progress=progress)
        said = [[one] for one in chosen]
    else:
        said = generation.samples(
            student, sets, _room(s), _samples(s), bf16=bf16, progress=progress
        )
    return dict(zip(tests, said, strict=True))


def _samples(s: RunSpec) -> list[int | None]:
    """Seeds of the answers: five at temperature 1 in protocol "sample", else greedy alone."""
    return list(range(SAMPLES)) if s.training.protocol == "sample" else [None]


def said(s: RunSpec, store: RunStore) -> dict[str, list[str]]:
    """A stored run's answers by test set, the first sample where it took several.

    Raises FileNotFoundError if they are gone.
    """
    found = {}
    for name, items in run_data.suite(s).tests.items():
        path = store.root / "answers" / s.key / f"{name}.jsonl"
        known = _kept(s, items, path, _samples(s)[0])
        if known is None:
            raise FileNotFoundError(f"{path}: the answers of this run are not in the store")
        found[name] = known
    return found


def examples(before: RunSpec, after: RunSpec, store: RunStore, each: int = 1) -> pd.DataFrame:
    """The first `each` items of every test set on which two runs score differently.

    Columns test set, question, gold, before, after; the rule picks them, not the eye.
    """
    first, second, rows = said(before, store), said(after, store), []
    for name, items in run_data.suite(before).tests.items():
        a, b = (gentasks.score(name, x[name], items).each for x in (first, second))
        for n in np.flatnonzero(a != b)[:each]:
            rows.append({
                "test set": gentasks.TASKS[name].title, "question": " / ".join(items[n].teacher_text.split("\n")),
                "gold": items[n].answer or items[n].references[0],
                "before": answers.cut(first[name][n]), "after": answers.cut(second[name][n]),
            })  # fmt: skip
    return pd.DataFrame(rows, columns=["test set", "question", "gold", "before", "after"])


def _trained(path: Path, student: Decoder, method: Method, train: Callable[[], Trained]) -> Trained:
    """What `train` leaves, kept in `path` until the answers are given."""
    if path.exists():
        try:
            with safe_open(path, "pt") as f:
                tensors = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118
                rest = json.loads(f.metadata()["rest"])
            device = next(student.parameters()).device
            pick = lambda p: {k[2:]: v for k, v in tensors.items() if k.startswith(p)}
            state.restore({k: v.to(device) for k, v in pick("w/").items()}, student, method)
            curves = {k: v.numpy() for k, v in pick("c/").items()}
            return Trained(curves, **rest, earlier=rest["seconds"])
        except (SafetensorError, KeyError, ValueError):
            path.unlink(missing_ok=True)
    found = train()
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {f"w/{k}": v.detach().cpu().contiguous() for k, v in state.weights(student, method)}
    tensors |= {f"c/{k}": torch.from_numpy(v) for k, v in found.curves.items()}
    rest = {k: getattr(found, k) for k in ("epochs", "seconds", "steps", "diagnostics")}
    write_tensors(path, tensors, {"rest": json.dumps(rest)}, "the trained weights")
    return found
