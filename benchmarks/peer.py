"""The peer: `transformers.Trainer` as its users run it, without evaluation, saving and logging.

Imports nothing of the library, so that the memory of a process that runs it is the peer's own.
"""

from __future__ import annotations

import tempfile
import time
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.utils import logging

logging.set_verbosity_error()
logging.disable_progress_bar()


class Clock(TrainerCallback):
    """From the start of the loop to its end: what `train` sets up before is not counted."""

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.began = time.perf_counter(), time.process_time()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.seconds = time.perf_counter() - self.began[0]
        self.cpu = time.process_time() - self.began[1]


class Peer:
    """A classifier with two labels, trained by `Trainer` again and again.

    `checkpoint`: a folder; `config`: changes to its configuration. The head is drawn from `seed`,
    as the library draws it.
    """

    def __init__(self, checkpoint: str, seed: int, recipe: dict[str, Any], **config: Any):
        torch.manual_seed(seed)
        self.model = AutoModelForSequenceClassification.from_pretrained(
            checkpoint, num_labels=2, dtype=torch.float32, **config
        )
        self.tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        self.recipe = recipe

    def train(self, examples: list[dict], seed: int, sampling: str) -> tuple[float, float, float]:
        """One epoch; (seconds, CPU seconds, mean loss). `sampling` is Trainer's name for it."""
        with tempfile.TemporaryDirectory() as folder:
            arguments = TrainingArguments(
                output_dir=folder, use_cpu=True, seed=seed, num_train_epochs=1,
                per_device_train_batch_size=self.recipe["batch_size"],
                learning_rate=self.recipe["student_lr"], max_grad_norm=self.recipe["clip"],
                weight_decay=self.recipe["weight_decay"], warmup_steps=0,
                optim="adamw_torch_fused", train_sampling_strategy=sampling,
                report_to="none", save_strategy="no", logging_strategy="no", eval_strategy="no",
                disable_tqdm=True, dataloader_pin_memory=False,
            )  # fmt: skip
            clock = Clock()
            trainer = Trainer(
                self.model, arguments, DataCollatorWithPadding(self.tokenizer), examples,
                callbacks=[clock],
            )  # fmt: skip
            trainer.remove_callback(PrinterCallback)
            done = trainer.train()
        return clock.seconds, clock.cpu, done.training_loss

    @torch.no_grad()
    def logits(self, examples: list[dict], batch: int = 64) -> np.ndarray:
        """(n, 2) in the order of the examples."""
        self.model.eval()
        collate, out = DataCollatorWithPadding(self.tokenizer), []
        for i in range(0, len(examples), batch):
            out.append(self.model(**collate(examples[i : i + batch])).logits)
        self.model.train()
        return torch.cat(out).numpy()
