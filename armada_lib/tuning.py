"""One run of a student that generates: tuned on a suite, then asked the questions of its test sets.

Weights are kept until the last answer is given, and answers as they come: a killed run goes on at
the example where it stopped.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from armada_lib import answers, decoders, engine, generation, gentasks, profiles, specs, state
from armada_lib.answers import Item
from armada_lib.decoders import Decoder
from armada_lib.engine import Trained
from armada_lib.extraction import attach
from armada_lib.methods import METHODS, Method, Setting
from armada_lib.results import Result, RunSpec, RunStore, environment
from armada_lib.sequences import Sequences, sequences

NEW_TOKENS = {"reasoning": 32, "instruct": 128}  # of an answer, unless the settings say otherwise


def build(s: RunSpec, store: RunStore) -> tuple[Decoder, Method, Sequences, dict[str, Any]]:
    """(student, method, training data, facts) of a run, untrained."""
    p, t, entry, suite = profiles.load(s.profile), s.training, METHODS[s.method], specs.suite(s)
    width = p.teacher(s.teacher).width if s.teacher and entry.vectors else None
    student = decoders.load(p.student(s.student), width or 1, s.seed, t.dropout)
    end = student.tokenizer.eos_token or ""
    encode = lambda text: np.asarray(
        student.tokenizer(text, add_special_tokens=False).input_ids, dtype=np.int32
    )
    prompts = [np.asarray(ids, dtype=np.int32) for ids in _ids(s, student, suite.train)]
    responses = [encode(i.response + end) for i in suite.train]
    data, cut = sequences(prompts, responses, student.tokenizer.pad_token_id, t.max_length)
    absent = 0
    if width is not None:
        absent = attach(s, store, [(data, [i.teacher_text for i in suite.train])], width)
    setting = Setting(
        kind="generation", outputs=width or 1, training=t, seed=s.seed, beta=s.beta, gamma=s.gamma,
        tau=s.tau, manifold=s.manifold or "euclid", reading=s.reading or "paper", width=width,
    )  # fmt: skip
    method = entry.build(setting, student)
    count = lambda module: sum(x.numel() for x in module.parameters() if x.requires_grad)
    facts = {
        "train": len(suite.train), "cut": cut, "texts_without_vector": absent,
        "tests": {name: len(items) for name, items in suite.tests.items()},
        "removed_from_training": len(suite.removed), "sources": suite.sources,
        "student_parameters": sum(x.numel() for x in student.model.parameters()),
        "trained_parameters": count(student.model),
        "branch_parameters": count(student.branch) if student.branch else 0,
    }  # fmt: skip
    return student, method, data, facts


def _prompts(s: RunSpec, student: Decoder, items: list[Item]) -> list[str]:
    return [answers.prompt(i, s.training.template or "alpaca", student.tokenizer) for i in items]


def _ids(s: RunSpec, student: Decoder, items: list[Item]) -> list[list[int]]:
    special = s.training.template != "chat"  # the chat template writes its own
    texts = _prompts(s, student, items)
    return student.tokenizer(texts, add_special_tokens=special).input_ids


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
        ),
    )  # fmt: skip
    scores, outputs, unparsed = {}, {}, {}
    for name, items in specs.suite(s).tests.items():
        said = answer(s, student, items, kept / f"{name}.jsonl", progress)
        found = gentasks.score(name, said, items)
        scores[name], outputs[name], unparsed[name] = found.percent, found.each, found.unparsed
    mean = float(np.mean(list(scores.values())))
    each = np.concatenate(list(outputs.values()))
    facts |= {
        "behaviour": {"unparsed": unparsed, "collapsed": sum(unparsed.values()) > len(each) / 2},
        "diagnostics": trained.diagnostics, "epochs": trained.epochs, "steps": trained.steps,
        "train_seconds": round(trained.seconds, 2),
        "evaluation": len(each), "seconds": round(time.perf_counter() - began, 2),
    }  # fmt: skip
    (kept / "trained.safetensors").unlink(missing_ok=True)
    metric = "rougeL" if gentasks.TASKS[s.task].parse == "text" else "accuracy"
    return Result(
        s, metric, {"student": mean, **scores}, {"student": each, **outputs}, np.zeros(len(each)),
        trained.curves, facts, environment(),
    )  # fmt: skip


def answer(
    s: RunSpec,
    student: Decoder,
    items: list[Item],
    kept: Path | None = None,
    progress: bool = False,
) -> list[str]:
    """The student's answers to test items, by the protocol of the run."""
    t, bf16 = s.training, s.training.precision == "bf16"
    prompts = _prompts(s, student, items)
    if t.protocol == "likelihood":
        options = [answers.candidates(i) for i in items]
        found = generation.likelihoods(student, prompts, options, bf16=bf16)
        best = [answers.pick(list(total), list(n), normalise=True) for total, n in found]
        return [cs[k] for cs, k in zip(options, best, strict=True)]
    room = t.new_tokens or NEW_TOKENS[gentasks.TASKS[s.task].group]
    return generation.generate(student, prompts, room, kept, bf16=bf16, progress=progress)


def said(s: RunSpec, store: RunStore) -> dict[str, list[str]]:
    """The answers that a stored run gave, by test set. Raises FileNotFoundError if they are gone."""
    found, tokenizer = {}, decoders.load_tokenizer(profiles.load(s.profile).student(s.student))
    for name, items in specs.suite(s).tests.items():
        path = store.root / "answers" / s.key / f"{name}.jsonl"
        if not path.exists():
            raise FileNotFoundError(f"{path}: the answers of this run are not in the store")
        known = generation.kept_answers(path)
        prompts = [answers.prompt(i, s.training.template or "alpaca", tokenizer) for i in items]
        found[name] = [known[generation.name(n, p, None)] for n, p in enumerate(prompts)]
    return found


def examples(before: RunSpec, after: RunSpec, store: RunStore, each: int = 1) -> pd.DataFrame:
    """The first `each` items of every test set on which two runs score differently.

    Columns test set, question, gold, before, after; the rule picks them, not the eye.
    """
    first, second, rows = said(before, store), said(after, store), []
    for name, items in specs.suite(before).tests.items():
        a, b = (gentasks.score(name, x[name], items).each for x in (first, second))
        for n in np.flatnonzero(a != b)[:each]:
            rows.append({
                "test set": gentasks.TASKS[name].title, "question": items[n].teacher_text,
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
            return Trained({k: v.numpy() for k, v in pick("c/").items()}, **rest)
        except (SafetensorError, KeyError, ValueError):
            path.unlink(missing_ok=True)
    found = train()
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {f"w/{k}": v.detach().cpu().contiguous() for k, v in state.weights(student, method)}
    tensors |= {f"c/{k}": torch.from_numpy(v) for k, v in found.curves.items()}
    rest = {k: getattr(found, k) for k in ("epochs", "seconds", "steps", "diagnostics")}
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    save_file(tensors, temporary, metadata={"rest": json.dumps(rest)})
    temporary.replace(path)
    return found
