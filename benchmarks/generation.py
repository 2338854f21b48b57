"""Students that generate: tuning beside `Trainer` with peft, answers beside one prompt at a time.

Tuning: a round is one short training of each side on the same texts. Trainer with dynamic padding
is given the very batches of the engine, which are random; "grouped", the harder peer, batches that
its group_by_length makes over the whole training set. Everything is built and tokenised before the
clock starts, which runs over the whole call of the engine, but only over the loop of Trainer.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    DataCollatorForSeq2Seq,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)

from armada_lib import answers, decoders, engine, generation, gentasks, profiles
from armada_lib.batching import epoch
from armada_lib.decoders import Decoder
from armada_lib.methods import METHODS, Setting
from armada_lib.profiles import StudentSpec, Training
from armada_lib.sequences import Sequences, sequences
from armada_lib.tuning import NEW_TOKENS as NEW
from benchmarks.data import grouped
from benchmarks.ours import training
from benchmarks.peer import Clock

STUDENT = profiles.load("mini").student("llama-7b")
SUITES, TEMPLATE = ("math", "commonsense", "dolly"), "alpaca"
BATCH, LENGTH = 8, 256  # as the chapters tune
ROUNDS, SIZE = 2, 24  # texts a round
TEXTS = 240  # of a suite: all that the mini set has
NEW_TOKENS, PROMPTS = NEW["instruct"], 32  # at most, of an instruction; prompts of all suites
# name -> Trainer's side
TUNING = {"lm_tokens_vs_trainer_dynamic": "dynamic", "lm_tokens_vs_trainer_grouped": "grouped"}


def measure(names: list[str], rounds: int | None, size: int | None) -> dict[str, tuple]:
    """name -> (speed-up of each round, unit, note)."""
    found: dict[str, tuple] = {}
    if tuned := {n: TUNING[n] for n in names if n in TUNING}:
        recipe = training("auto", batch_size=BATCH, student_lr=3e-4)
        found |= tune(tuned, STUDENT, recipe, rounds or ROUNDS, size or SIZE)
    for n in names:
        if n not in TUNING:
            found[n] = answer(STUDENT, questions(size or PROMPTS), NEW_TOKENS, rounds or ROUNDS)
    return found


# ---------------------------------------------------------------- texts
def _data() -> str:
    return "real" if os.environ.get("ARMADA_DATA") else "mini"


def _some(items: list[Any], n: int) -> list[Any]:
    return [items[i] for i in np.random.default_rng(0).permutation(len(items))[:n]]


def corpus(student: Decoder) -> Sequences:
    """At most `TEXTS` training texts of each suite, those whose prompt leaves room for an answer."""
    items = [i for s in SUITES for i in _some(gentasks.load(s, "train", _data())[0], TEXTS)]
    end, pad = student.tokenizer.eos_token, student.tokenizer.pad_token_id
    prompts = [student.prompt_ids(answers.prompt(i, TEMPLATE)) for i in items]
    pairs = [(p, student.answer_ids(i.response + end)) for p, i in zip(prompts, items, strict=True)]
    first, second = zip(*[x for x in pairs if len(x[0]) < LENGTH], strict=True)
    return sequences(first, second, pad, LENGTH)[0]


def questions(n: int) -> list[str]:
    """Prompts of the suites' test sets."""
    sets = [t for s in SUITES for t in gentasks.available(s, _data())]
    items = [i for t in sets for i in _some(gentasks.load(t, "test", _data())[0], n)]
    return [answers.prompt(i, TEMPLATE) for i in _some(items, n)]


def take(data: Sequences, rows: np.ndarray) -> Sequences:
    """The texts with these numbers, in this order."""
    assert data.prompts is not None
    cut = [np.split(data.tokens[i], [data.prompts[i]]) for i in rows]
    return sequences([p for p, _ in cut], [r for _, r in cut], data.pad, LENGTH)[0]


def sample(lengths: np.ndarray, size: int, seed: int) -> np.ndarray:
    """Texts of one round: one of each of `size` equal parts of the set in order of length."""
    parts = np.array_split(np.argsort(lengths, kind="stable"), size)
    rng = np.random.default_rng(seed)
    return np.array([rng.choice(p) for p in parts])


# ---------------------------------------------------------------- tuning
class Ours:
    """The library's side, set up as `tuning.build` does it; trained again and again."""

    def __init__(self, spec: StudentSpec, training: Training, seed: int = 0):
        self.training, precision = training, engine.precision(training.precision)
        self.student = decoders.load(spec, 1, seed, training.dropout, precision)
        self.model = self.student.model
        setting = Setting("generation", 1, training, seed)
        self.method = METHODS["undistilled"].build(setting, self.student)

    def train(self, data: Sequences, order: np.ndarray, seed: int) -> tuple[float, float, float]:
        """(seconds, CPU seconds, mean loss) of the whole call of the engine, which draws `order`."""
        began = time.perf_counter(), time.process_time()
        trained = engine.train(self.student, self.method, data, self.training, seed, probes=0)
        seconds, cpu = time.perf_counter() - began[0], time.process_time() - began[1]
        return seconds, cpu, float(trained.curves["total"].mean())


class Peer:
    """Trainer's side: the same checkpoint, precision and LoRA, drawn from the same seed."""

    def __init__(self, spec: StudentSpec, training: Training, seed: int = 0):
        assert spec.lora is not None
        self.training, lora = training, spec.lora
        self.bf16 = engine.precision(training.precision) == "bf16"
        base = AutoModelForCausalLM.from_pretrained(
            decoders.checkpoint(spec), dtype=torch.bfloat16 if self.bf16 else torch.float32
        )
        base.config.use_cache = False
        torch.manual_seed(seed)
        self.model = get_peft_model(base, LoraConfig(
            r=lora.rank, lora_alpha=lora.alpha, target_modules=list(lora.targets),
            lora_dropout=lora.dropout if training.dropout is None else training.dropout,
            task_type="CAUSAL_LM",
        ))  # fmt: skip
        self.collate = DataCollatorForSeq2Seq(decoders.load_tokenizer(spec))

    def train(self, data: Sequences, order: np.ndarray, seed: int) -> tuple[float, float, float]:
        """One epoch over the texts in this order; (seconds, CPU seconds, mean loss)."""
        t, clock = self.training, Clock()
        with tempfile.TemporaryDirectory() as folder:
            arguments = TrainingArguments(
                output_dir=folder, use_cpu=True, bf16=self.bf16, seed=seed, num_train_epochs=1,
                per_device_train_batch_size=t.batch_size, learning_rate=t.student_lr,
                max_grad_norm=t.clip, weight_decay=t.weight_decay, warmup_steps=0,
                optim="adamw_torch_fused", train_sampling_strategy="sequential",
                report_to="none", save_strategy="no", logging_strategy="no", eval_strategy="no",
                disable_tqdm=True, dataloader_pin_memory=False,
            )  # fmt: skip
            given = examples(data, order)
            trainer = Trainer(self.model, arguments, self.collate, given, callbacks=[clock])
            trainer.remove_callback(PrinterCallback)
            done = trainer.train()
        return clock.seconds, clock.cpu, done.training_loss


def examples(data: Sequences, order: np.ndarray) -> list[dict]:
    """One dict a text, as `Trainer` takes them: the prompt is no label."""
    assert data.prompts is not None
    pairs = [(data.tokens[i].tolist(), int(data.prompts[i])) for i in order]
    return [{"input_ids": x, "labels": [-100] * p + x[p:]} for x, p in pairs]


def tune(
    peers: dict[str, str], spec: StudentSpec, recipe: Training, rounds: int, size: int,
    data: Sequences | None = None,
) -> dict[str, tuple]:  # fmt: skip
    """name -> (tokens a second of ours / of the peer in each round, unit, note)."""
    ours = Ours(spec, recipe)
    sides: dict[str, Ours | Peer] = {"ours": ours}
    sides |= {s: Peer(spec, recipe) for s in peers.values()}
    data = data or corpus(ours.student)
    took: dict[str, list[tuple]] = {s: [] for s in sides}  # seconds, CPU seconds a token; loss
    work: dict[str, list[tuple]] = {s: [] for s in sides}  # tokens: all, of answers, with padding
    for r in range(-1, rounds):  # round -1 warms up and is not counted
        n = BATCH if r < 0 else size
        part = take(data, sample(data.lengths, n, r + 1))
        other = take(data, grouped(data.lengths, n, BATCH, r + 1))
        drawn = np.concatenate(list(epoch(part, recipe.batch_size, r + 1, 0, packed=True)))
        for s in list(sides)[:: 1 if r % 2 else -1]:
            given, order = (other, np.arange(len(other))) if s == "grouped" else (part, drawn)
            seconds, cpu, loss = sides[s].train(given, order, r + 1)
            if r >= 0:
                assert given.prompts is not None
                total = int(given.lengths.sum())
                took[s].append((seconds / total, cpu / total, loss))
                asked = int(given.prompts.sum())
                work[s].append((total, total - asked, _padded(given.lengths[order])))
        if r >= 0:
            rate = {s: round(1 / t[-1][0]) for s, t in took.items()}
            print(f"tuning round {r + 1} of {rounds}, tokens/s: {rate}", file=sys.stderr)
    results = {}
    for name, s in peers.items():
        ratio = lambda k, s=s: [b[k] / a[k] for a, b in zip(took["ours"], took[s], strict=True)]
        tokens, answered, padded = np.sum(work[s], 0)
        mine, theirs = (1 / np.median([x[0] for x in took[w]]) for w in ("ours", s))
        note = f"{_data()} texts of {', '.join(SUITES)}, {tokens / rounds:.0f} tokens a round, "
        note += f"{answered / tokens:.0%} of answers, batches of {BATCH}; "
        note += f"{engine.precision(recipe.precision)}; ours {mine:.0f} tokens/s, Trainer "
        note += f"{theirs:.0f}, which computes {padded / tokens:.2f} for each; CPU time "
        note += f"{float(np.median(ratio(1))):.2f}"
        if s == "dynamic":  # the same batches
            note += f"; training loss {took['ours'][-1][2]:.4f}, Trainer {took[s][-1][2]:.4f}"
        results[name] = ratio(0), "times more tokens/s", note
    return results


def _padded(lengths: np.ndarray) -> int:
    """Tokens of these texts' batches with dynamic padding."""
    cut = np.split(lengths, range(BATCH, len(lengths), BATCH))
    return sum(int(x.max()) * len(x) for x in cut)


# ---------------------------------------------------------------- answers
def answer(spec: StudentSpec, prompts: list[str], new_tokens: int, rounds: int) -> tuple:
    """(speed-up of each round, unit, note), greedy, in fp32.

    The peer is the saved adapter, merged by peft, that answers one prompt after the other. Raises
    RuntimeError where an answer is not the same.
    """
    student = decoders.load(spec, 1, seed=0).eval()
    with torch.no_grad():  # a fresh adapter does nothing
        draw = torch.Generator().manual_seed(0)
        for name, p in student.model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.02, generator=draw)
    with tempfile.TemporaryDirectory() as folder:
        student.save_pretrained(folder)
        base = AutoModelForCausalLM.from_pretrained(decoders.checkpoint(spec), dtype=torch.float32)
        peer: Any = PeftModel.from_pretrained(base, folder).merge_and_unload().eval()
    ids = [student.prompt_ids(p) for p in prompts]
    generation.generate(student, prompts[:2], 2)  # the first calls pay for set-up
    _alone(student, peer, ids[0], 2)
    took, new = [], []  # (seconds, CPU seconds) for all prompts of ours, of the peer; tokens
    for r in range(rounds):
        clock = [(time.perf_counter(), time.process_time())]
        said = generation.generate(student, prompts, new_tokens)
        clock.append((time.perf_counter(), time.process_time()))
        alone = [_alone(student, peer, x, new_tokens) for x in ids]
        clock.append((time.perf_counter(), time.process_time()))
        for prompt, together, (text, n) in zip(prompts, said, alone, strict=True):
            if text != together:
                raise RuntimeError(f"{prompt!r}: {together!r} in a batch, {text!r} alone")
            new.append(n)
        took.append(np.diff(np.array(clock), axis=0))
        print(f"answers round {r + 1} of {rounds}, s: {took[-1][:, 0].round(1)}", file=sys.stderr)
    ratio = np.array([t[1] / t[0] for t in took])  # (rounds, 2)
    lengths, rate = [len(x) for x in ids], np.mean(new) * len(ids) / np.median(took, 0)[:, 0]
    note = f"{len(ids)} prompts of {min(lengths)} to {max(lengths)} tokens, at most {new_tokens} "
    note += f"new ones, {np.mean(new):.0f} on average; fp32; ours {rate[0]:.0f} tokens/s, one "
    note += f"prompt at a time {rate[1]:.0f}; CPU time {np.median(ratio[:, 1]):.2f}; the same "
    note += f"{len(new)} answers"
    return ratio[:, 0].tolist(), "times faster", note


@torch.inference_mode()
def _alone(student: Decoder, model: Any, ids: np.ndarray, new_tokens: int) -> tuple[str, int]:
    """(answer, its tokens) to one prompt."""
    prompt = torch.from_numpy(ids)[None]
    out = model.generate(
        input_ids=prompt, attention_mask=torch.ones_like(prompt), do_sample=False,
        max_new_tokens=new_tokens, pad_token_id=student.tokenizer.pad_token_id,
    )[0, len(ids) :]  # fmt: skip
    return student.tokenizer.decode(out, skip_special_tokens=True), len(out)
