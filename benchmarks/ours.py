"""The library's side of a training benchmark, set up as `runs.build` does it."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch

from armada_lib import engine, evaluation, students
from armada_lib.batching import Encoded
from armada_lib.methods import METHODS, Setting
from armada_lib.profiles import StudentSpec, Training
from benchmarks.common import RECIPE, Split


def training(precision: str, **changes: Any) -> Training:
    """The recipe of one round as the engine takes it; the schedule is Trainer's default."""
    return Training(epochs=1, warmup=0.0, precision=precision, **{**RECIPE, **changes})  # type: ignore[arg-type]


class Ours:
    """A student with two labels, trained by the engine again and again.

    `vocabulary`: the token ids that are kept. `weights` go to the method's `Setting`.
    """

    def __init__(
        self, spec: StudentSpec, vocabulary: np.ndarray, training: Training,
        method: str = "undistilled", seed: int = 0, **weights: Any,
    ):  # fmt: skip
        self.training = training
        self.student = students.load(spec, 2, seed, dropout=training.dropout)
        pad = int(self.student.tokenizer.pad_token_id)
        self.remap = self.student.compact(np.append(vocabulary, pad)).numpy().astype(np.int32)
        self.pad = int(self.remap[pad])
        setting = Setting("class", 2, training, seed, **weights)
        self.method = METHODS[method].build(setting, self.student)

    def encode(self, split: Split, kind: type[Encoded] = Encoded, **more: Any) -> Encoded:
        """A split as the engine takes it."""
        tokens = [self.remap[x] for x in split.tokens]
        labels = torch.from_numpy(split.labels)
        return kind(tokens, split.types, labels, 1, self.pad, **more)

    def train(self, data: Encoded, seed: int) -> tuple[float, float, float]:
        """(seconds, CPU seconds, mean loss) of the whole call of the engine."""
        began = time.perf_counter(), time.process_time()
        trained = engine.train(self.student, self.method, data, self.training, seed, probes=0)
        seconds, cpu = time.perf_counter() - began[0], time.process_time() - began[1]
        return seconds, cpu, float(trained.curves["total"].mean())

    def logits(self, data: Encoded) -> np.ndarray:
        """(n, 2) in the order of the data."""
        bf16 = engine.precision(self.training.precision) == "bf16"
        return evaluation.predict(self.student, self.method, data, bf16)["student"]
