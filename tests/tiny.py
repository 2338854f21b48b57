"""A tiny experiment for engine tests, also run as a script under `accelerate launch`."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from armada_lib import engine, students
from armada_lib.batching import Encoded
from armada_lib.methods import METHODS, Setting
from armada_lib.profiles import MANIFOLDS, StudentSpec, Training

WIDTH = 24


def rows(student, n=32, seed=0, kind="class"):
    """Random sentences; the label is whether a word occurs, the teacher vector knows it too."""
    rng = np.random.default_rng(seed)
    words = [
        "cat",
        "dog",
        "bird",
        "sat",
        "ran",
        "on",
        "under",
        "tree",
        "house",
        "red",
        "blue",
        "not",
    ]
    texts = [" ".join(rng.choice(words, size=rng.integers(2, 12))) for _ in range(n)]
    has = np.array(["dog" in t for t in texts])
    ids, types, _ = students.tokenise(student, texts, None, 64)
    vectors = rng.standard_normal((n, WIDTH)).astype(np.float32)
    vectors[:, 0] += 3 * has
    if kind == "regression":
        labels = torch.from_numpy((has * 3 + rng.random(n)).astype(np.float32))
    else:
        labels = torch.from_numpy(has.astype(np.int64))
    if kind == "choice":
        labels = labels[: n // 2]
    return Encoded(
        ids, types, labels, 2 if kind == "choice" else 1, 0, torch.from_numpy(vectors).half()
    )


def setting(kind="class", seed=0, training=None, **weights) -> Setting:
    t = Training(
        **{"epochs": 2, "batch_size": 8, "student_lr": 1e-3, "precision": "fp32"} | (training or {})
    )
    w = {"alpha": 0.5, "beta": 0.1, "gamma": 1.0} | weights
    return Setting(kind, 2 if kind == "class" else 1, t, seed, width=WIDTH, label_mean=1.5, **w)


def experiment(
    spec: StudentSpec, method="armada", kind="class", student_seed=None, run=None, n=32, **kw
):
    """(student, method, Trained) of a tiny run; `run` goes to `engine.train`."""
    s = setting(kind, **kw)
    student = students.load(
        spec,
        s.outputs,
        s.seed if student_seed is None else student_seed,
        kind == "regression",
        s.training.dropout,
    )
    m = METHODS[method].build(s, student)
    data = rows(student, n, kind=kind)
    return student, m, engine.train(student, m, data, s.training, s.seed, **(run or {}))


def mentor_checkpoint(checkpoint: str, folder: Path) -> str:
    """A checkpoint of four layers, otherwise as `checkpoint`, with its tokenizer; returns the folder."""
    from transformers import AutoModel, AutoTokenizer, BertConfig

    config = BertConfig.from_pretrained(checkpoint)
    config.num_hidden_layers = 4
    torch.manual_seed(8)
    AutoModel.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(checkpoint).save_pretrained(folder)
    return str(folder)


def weights(module) -> dict[str, torch.Tensor]:
    return {k: v.detach().clone() for k, v in module.named_parameters()}


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


class Killed(BaseException):
    pass


@contextlib.contextmanager
def killed(monkeypatch, at):
    """What is trained here dies as it saves its state at step `at` or later; it has to."""
    save = engine.save

    def save_and_die(path, student, method, optimisers, progress):
        save(path, student, method, optimisers, progress)
        if progress.step >= at:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(engine, "save", save_and_die)
        with pytest.raises(Killed):
            yield


def killed_and_resumed(build, monkeypatch, state, at):
    """(whole run, resumed run), each (student, method, Trained); `build()` makes the first three."""
    run = lambda s, m, d, **kw: (s, m, engine.train(s, m, d, m.setting.training, 0, **kw))
    whole = run(*build())
    with killed(monkeypatch, at):
        run(*build(), state=state, save_every=0.0)
    assert state.exists()
    return whole, run(*build(), state=state, save_every=0.0)


def alike(whole, resumed):
    assert same(weights(whole[0]), weights(resumed[0]))
    for name, curve in whole[2].curves.items():
        np.testing.assert_array_equal(curve, resumed[2].curves[name])


def main(checkpoint: str, out: str, batch: str) -> None:
    """Train with this many processes and every loss; save student and aligner (main process)."""
    from accelerate import Accelerator
    from safetensors.torch import save_file

    torch.set_num_threads(1)
    acc, found, steps = Accelerator(cpu=True), {}, []
    training = {"dropout": 0.0, "batch_size": int(batch)}
    spec = StudentSpec(name="tiny", checkpoint=checkpoint)
    for loss in MANIFOLDS:
        student, m, trained = experiment(
            spec, run={"accelerator": acc}, training=training, manifold=loss, beta=1.0
        )
        found |= {f"{loss}/s/{k}": v for k, v in weights(student).items()}
        found |= {f"{loss}/a/{k}": v for k, v in weights(m.aligner).items()}
        steps.append(str(trained.steps))
    if acc.is_main_process:
        about = {"processes": str(acc.num_processes), "steps": " ".join(steps)}
        save_file(found, Path(out), metadata=about)


if __name__ == "__main__":
    main(*sys.argv[1:])
