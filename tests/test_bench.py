"""The benchmark command, and that both sides of a training benchmark do the same training."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import WORDS
from test_decoders import data as sequences_of
from test_decoders import llama, spec  # noqa: F401  (a fixture)

from armada_lib.batching import epoch
from benchmarks import bench, book, distillation, environments, generation, overhead
from benchmarks.common import Split, read
from benchmarks.data import SHARES, Corpus, _stretch, grouped
from benchmarks.ours import Ours, training
from benchmarks.peer import Peer

ROOT = Path(__file__).resolve().parents[1]
KEPT = np.arange(2, len(WORDS) + 5)  # all but two special tokens of the tiny vocabulary


def command(*arguments):
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    whole = [sys.executable, "-m", "benchmarks.bench", *map(str, arguments)]
    return subprocess.run(whole, cwd=ROOT, env=env, text=True, capture_output=True, check=False)


def test_one_small_benchmark_writes_a_valid_file(tmp_path):
    out = tmp_path / "bench.json"
    name = "store_vectors_per_second"
    done = command("--only", name, "--rounds", 1, "--size", 2000, "--out", out)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert list(found) == [name]
    entry = found[name]
    assert set(entry) == {"median", "min", "max", "runs", "unit", "note"}
    assert entry["runs"] == 1 and entry["unit"] == "vectors/s" and "2,000" in entry["note"]
    assert 0 < entry["min"] == entry["median"] == entry["max"]
    assert name in done.stdout


def test_the_book_is_timed_twice_on_one_empty_store(tmp_path, monkeypatch):
    stores = []

    def build(folder, **settings):
        stores.append((folder, list(folder.iterdir()), settings))
        (folder / "ARMADA_STORE").mkdir(exist_ok=True)
        return 100.04 / len(stores)

    monkeypatch.setattr(book, "ROOT", tmp_path)
    monkeypatch.setattr(book, "build", build)
    (tmp_path / "_build" / ".doctrees").mkdir(parents=True)
    kept = tmp_path / "_build" / ".doctrees" / "seconds.json"
    kept.write_text('{"02_nlu": 12.34}')
    found = book.measure()
    assert (found["all"], found["stored"], found["chapters"]) == (100.0, 50.0, {"02_nlu": 12.3})
    (first, empty, one), (second, used, usual) = stores
    assert first == second and not empty and used and not first.exists()
    assert one == {"ARMADA_CHAPTERS": "1"} and not usual  # a chapter's minutes are its own


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--only", "trian_cola"], list(bench.BENCHMARKS)),
        (["--rounds", "0"], ["--rounds must be at least 1"]),
        (["--size", "-3"], ["--size must be at least 1"]),
        (["--out", "no/such/folder/bench.json"], ["is not a folder"]),
    ],
)
def test_bad_input_is_one_message_before_any_work(arguments, said, capsys, monkeypatch):
    monkeypatch.setattr(bench, "prepare", lambda: pytest.fail("work began"))
    with pytest.raises(SystemExit) as e:
        bench.main(arguments)
    assert e.value.code == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert all(s in message for s in said)


def corpus(student, n=40) -> Split:
    """Random texts of the tiny checkpoint's vocabulary, of very different lengths."""
    rng = np.random.default_rng(3)
    first, last = student.tokenizer.cls_token_id, student.tokenizer.sep_token_id
    size = student.model.config.vocab_size
    tokens = [
        np.r_[first, rng.integers(5, size, k), last].astype(np.int32)
        for k in rng.integers(1, 20, n)
    ]
    labels = np.array([int((t == 8).any()) for t in tokens], dtype=np.int64)
    return Split(tokens, [np.zeros_like(t) for t in tokens], labels)


def test_engine_and_trainer_do_the_same_training(checkpoints):
    """Same batches, no dropout: same losses and the same predictions afterwards."""
    spec = checkpoints["bert"]
    recipe = {"batch_size": 8, "student_lr": 1e-3, "clip": 0.5, "weight_decay": 0.0}
    ours = Ours(spec, KEPT, training("fp32", dropout=0.0, **recipe))
    silent = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    peer = Peer(spec.checkpoint, 0, recipe, **silent)
    split = corpus(ours.student)
    data = ours.encode(split)
    before = peer.logits(split.examples())
    np.testing.assert_allclose(ours.logits(data), before, atol=1e-5)
    order = np.concatenate(list(epoch(data, 8, 0, 0, packed=True)))
    loss = peer.train(split.take(order).examples(), 0, "sequential")[2]
    assert ours.train(data, 0)[2] == pytest.approx(loss, abs=1e-5)
    after = peer.logits(split.examples())
    assert np.abs(after - before).max() > 0.1
    np.testing.assert_allclose(ours.logits(data), after, atol=1e-3)


def test_turns_are_taken_one_by_one():
    turns, seen = overhead.Turns(3), []

    def work(me, steps):
        for _ in range(steps):
            turns.next(me)
            seen.append(me)
        turns.leave(me)

    threads = [threading.Thread(target=work, args=(i, n)) for i, n in enumerate((3, 1, 2))]
    for t in threads:
        t.start()
    for t in threads:
        t.join(timeout=10)
    assert not any(t.is_alive() for t in threads)
    assert seen == [0, 1, 2, 0, 2, 0]
    assert [len(t) for t in turns.times] == [2, 0, 1]


def test_training_in_turn_is_the_training_alone(checkpoints):
    def side():
        return Ours(checkpoints["bert"], KEPT, training("fp32", batch_size=8))

    sides = [side(), side()]
    split = corpus(sides[0].student)
    overhead._train(sides, split, torch.zeros(1))
    alone = side()
    alone.train(alone.encode(split), 0)
    for together in sides:
        data = together.encode(split)
        np.testing.assert_array_equal(together.logits(data), alone.logits(data))


def test_stretched_texts_have_the_lengths_asked_for(checkpoints, tmp_path):
    student = Ours(checkpoints["bert"], KEPT, training("fp32")).student
    short = corpus(student)
    lengths = tuple(range(6, 6 + 3 * len(SHARES), 3))
    made = _stretch(short, np.random.default_rng(0), 2000, lengths)
    got = np.array([len(t) for t in made.tokens])
    np.testing.assert_allclose(np.quantile(got, SHARES), lengths, atol=2)
    assert all(len(a) == len(b) for a, b in zip(made.tokens, made.types, strict=True))
    assert {t[0] for t in made.tokens} == {student.tokenizer.cls_token_id}
    assert {t[-1] for t in made.tokens} == {student.tokenizer.sep_token_id}
    made.save(tmp_path / "x.npz", np.arange(3))
    again, vocabulary = read(tmp_path / "x.npz")
    assert vocabulary.tolist() == [0, 1, 2] and again.labels.tolist() == made.labels.tolist()
    assert all(map(np.array_equal, again.tokens, made.tokens))


def test_tuning_by_the_engine_and_by_trainer_is_the_same(llama):  # noqa: F811
    """Same batches, no dropout: same losses and, to rounding, the same adapter afterwards."""
    recipe = training("fp32", batch_size=8, student_lr=1e-2, clip=0.5)
    ours, peer = (side(spec(llama), recipe) for side in (generation.Ours, generation.Peer))
    adapter = lambda side: {
        n: p.detach().clone() for n, p in side.model.named_parameters() if p.requires_grad
    }
    before, start, texts = adapter(ours), adapter(peer), sequences_of()
    assert before.keys() == start.keys()
    assert all(torch.equal(before[n], p) for n, p in start.items())
    order = np.concatenate(list(epoch(texts, 8, 3, 0, packed=True)))
    loss = peer.train(texts, order, 3)[2]
    assert ours.train(texts, order, 3)[2] == pytest.approx(loss, abs=1e-5)
    moved, found = adapter(ours), adapter(peer)
    for n, p in found.items():
        assert (p - start[n]).abs().max() > 5e-3
        torch.testing.assert_close(moved[n], p, atol=1e-5, rtol=0)


def test_a_tuning_benchmark_gives_both_sides_the_same_batches(llama, monkeypatch):  # noqa: F811
    seen = {}

    def train(side, given, order, seed):
        texts = [given.tokens[i].tolist() for i in order]
        seen.setdefault(type(side).__name__, []).append(texts)
        return (2.0 if isinstance(side, generation.Peer) else 0.5) * len(texts), 1.0, 0.0

    for side in (generation.Ours, generation.Peer):
        monkeypatch.setattr(side, "train", train)
    recipe = training("fp32", batch_size=8)
    texts = sequences_of(200)
    one = {"a": "dynamic"}
    found = generation.tune(one, spec(llama), recipe, 3, 16, texts)
    assert seen["Ours"] == seen["Peer"] and [len(t) for t in seen["Ours"]] == [8, 16, 16, 16]
    assert found["a"][0] == pytest.approx([4.0] * 3) and "; fp32; " in found["a"][2]
    del seen["Ours"], seen["Peer"]
    generation.tune({"b": "grouped"}, spec(llama), recipe, 1, 16, texts)
    lengths = np.array([len(t) for t in seen["Peer"][1]]).reshape(-1, 8)
    assert (np.ptp(lengths, 1) <= 2).all()  # 25 batches in order of length, of 15 lengths
    assert sorted(seen["Peer"][1]) != sorted(seen["Ours"][1])


def test_texts_of_a_round_are_spread_as_in_the_set():
    lengths = np.random.default_rng(0).lognormal(4, 0.6, 640).astype(int)
    for seed in range(3):
        single = lengths[generation.sample(lengths, 32, seed)]
        batches = lengths[grouped(lengths, 32, 8, seed)]
        assert single.mean() == pytest.approx(lengths.mean(), rel=0.05)
        assert batches.mean() == pytest.approx(lengths.mean(), rel=0.15)
    assert generation.examples(sequences_of(4), np.array([2]))[0]["labels"][0] == -100


def test_an_answer_benchmark_compares_every_answer(llama, monkeypatch):  # noqa: F811
    prompts = [" ".join(WORDS[i : i + 3 + i % 4]) for i in range(9)]
    answered, real = [], generation._alone
    monkeypatch.setattr(
        generation, "_alone", lambda s, m, ids, n: answered.append(len(ids)) or real(s, m, ids, n)
    )
    values, unit, note = generation.answer(spec(llama), prompts, 6, 2)
    assert len(values) == 2 and min(values) > 0 and unit == "times faster"
    assert len(answered) == 1 + 18 and note.endswith("the same 18 answers")
    wrong = lambda student, prompts, n: ["something else"] * len(prompts)
    monkeypatch.setattr(generation.generation, "generate", wrong)
    with pytest.raises(RuntimeError, match="'something else' in a batch"):
        generation.answer(spec(llama), prompts, 6, 1)


# ---------------------------------------------------------------- distillation
# A stand-in for TextBrewer, which is not installed beside the library: the same loop.
STAND_IN = """
import torch
import torch.nn.functional as F

print("not an answer")
TrainingConfig = DistillationConfig = lambda **given: given

class GeneralDistiller:
    def __init__(self, plain, kd, teacher, student, *adaptors):
        self.kd, self.student, self.adaptors = kd, student, adaptors

    def __enter__(self):
        self.student.train()

    def __exit__(self, *_):
        pass

    def train(self, optimiser, loader, epochs, schedule, given, max_grad_norm):
        rate, kd = schedule(optimiser, **given), self.kd
        for batch in loader:
            said = self.adaptors[0](batch, batch["teacher_cache"])["logits"]
            out = self.adaptors[1](batch, self.student(**batch["student"]))
            soft = F.softmax(said / kd["temperature"], -1)
            loss = kd["kd_loss_weight"] * F.cross_entropy(out["logits"] / kd["temperature"], soft)
            (loss + kd["hard_label_weight"] * out["losses"]).backward()
            torch.nn.utils.clip_grad_norm_(self.student.parameters(), max_grad_norm)
            optimiser.step()
            rate.step()
            optimiser.zero_grad()
"""


def test_a_distillation_peer_in_its_process_trains_as_the_engine(
    checkpoints, tmp_path, monkeypatch
):
    spec = checkpoints["bert"]
    split = corpus(Ours(spec, KEPT, training("fp32")).student, 140)
    texts, said = Corpus(split, split, KEPT, "random texts"), 3 * torch.randn(140, 2)
    split.save(tmp_path / "texts.npz", KEPT)
    np.save(tmp_path / "teacher.npy", said.numpy())
    (tmp_path / "textbrewer.py").write_text(STAND_IN)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(environments, "python", lambda peer: shutil.which("false"))
    with pytest.raises(environments.Unavailable, match="textbrewer stopped: exit code 1"):
        distillation.Peer("textbrewer", tmp_path, spec.checkpoint)
    monkeypatch.setattr(environments, "python", lambda peer: sys.executable)
    peer = distillation.Peer("textbrewer", tmp_path, spec.checkpoint)
    try:
        assert distillation.agree(peer, spec, texts, said) < 1e-5
        with pytest.raises(RuntimeError, match="train differently"):
            distillation.agree(peer, spec, texts, said + 0.5 * torch.randn(140, 2))

        ask, learn = peer.ask, distillation.Distilled.learn
        took = {"fp32": [6.0, 5.0], "fused": [4.0, 5.0], "bf16": [3.0, 5.0]}
        given = []
        monkeypatch.setattr(  # what it really does, with other times
            peer, "ask", lambda do, name, **x: given.append((do, name, x)) or ask(do, name, **x)
            if do != "train" or name == "check" else (ask(do, name, **x), took[name])[1],
        )  # fmt: skip
        mine = lambda side, *x: (learn(side, *x), (2.0, 1.0))[1]
        monkeypatch.setattr(distillation.Distilled, "learn", mine)
        found = distillation.compare({"a": peer}, spec, texts, said, 2, 64)
        values, unit, note = found["a"]
        assert values == [3.0, 3.0] and unit == "times more samples/s"
        assert (
            "ours 32 samples/s" in note and "2.00 (CPU time 5.00) if it is given the fused" in note
        )
        built = [x["fused"] for do, name, x in given if do == "build" and name != "check"]
        assert built[:2] == [False, True]
        with pytest.raises(RuntimeError, match="textbrewer stopped: KeyError: 'nobody'"):
            ask("logits", "nobody", rows=[0])
    finally:
        peer.close()


def test_a_benchmark_whose_peer_cannot_be_had_is_said_to_be_not_run(
    checkpoints, tmp_path, monkeypatch, capsys
):
    split = corpus(Ours(checkpoints["bert"], KEPT, training("fp32")).student)
    monkeypatch.setattr(bench, "prepare", lambda: None)
    monkeypatch.setattr(distillation.data, "load", lambda task: Corpus(split, split, KEPT, ""))
    monkeypatch.setenv("ARMADA_STORE", str(tmp_path / "a file"))
    (tmp_path / "a file").touch()  # so that no environment can be made
    out, name = tmp_path / "bench.json", "kd_vs_textbrewer"
    with pytest.raises(SystemExit) as e:
        bench.main(["--only", name, "--out", str(out)])
    assert str(e.value.code).startswith(f"{name}: not run: the environment of textbrewer could not")
    entry = json.loads(out.read_text())[name]
    assert [entry[k] for k in ("median", "min", "max", "runs")] == [None, None, None, 0]
    assert "not run" in entry["note"] and "not run" in capsys.readouterr().out


def test_an_environment_is_made_once_and_shares_what_is_here(tmp_path, monkeypatch):
    installed, real = [], environments.venv.create
    monkeypatch.setattr(environments.venv, "create", lambda at, with_pip: real(at))  # pip is slow
    monkeypatch.setenv("ARMADA_STORE", str(tmp_path))

    def install(interpreter, pins):
        if not installed:
            installed.append(None)
            words = "WARNING: retrying\nERROR: No matching distribution found for textbrewer\n"
            raise subprocess.CalledProcessError(1, "pip", stderr=words + "note: see above\n")
        installed.append(pins)

    monkeypatch.setattr(environments, "_install", install)
    with pytest.raises(environments.Unavailable, match=r"made: ERROR: No matching distribution"):
        environments.python("textbrewer")
    for _ in range(2):
        python = environments.python("textbrewer")
    assert installed[1:] == [environments.PINS["textbrewer"]]
    code = "import sys, numpy; print(sys.prefix, numpy.__file__)"
    done = subprocess.run([python, "-c", code], text=True, capture_output=True, check=True)
    assert done.stdout.split() == [str(tmp_path / "bench" / "textbrewer"), np.__file__]
    monkeypatch.setitem(environments.PINS, "textbrewer", ("textbrewer==0",))
    environments.python("textbrewer")
    assert installed[2:] == [("textbrewer==0",)]
