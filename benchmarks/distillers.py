"""Distillation peers, each in a process of its own environment: one JSON line in, one out.

`python -m benchmarks.distillers textbrewer|torchdistill FOLDER` reads the texts and the teacher's
logits in FOLDER, then requests {"do": "build" | "train" | "logits", ...}; see `serve`. Imports
nothing of the library.

Both peers run their own loop as their users do: batches with dynamic padding from a DataLoader,
transformers' model, AdamW with a linear schedule, gradients clipped at 1. The teacher is cached on
both. TextBrewer has a way for that: `teacher_cache` in a batch, and the teacher is not called.
torchdistill has none and calls a teacher, which here hands over the stored logits.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

# torchdistill needs torchvision, for images alone, and transformers looks for it. The operators of
# the registry's torchvision do not load beside a CPU build of torch, and its import stops at the
# first that it wants to describe: then they are declared, without a body.
try:
    import torchvision  # noqa: F401
except ImportError:
    pass
except RuntimeError as e:
    if "operator torchvision::" not in str(e):
        raise
    declared = torch.library.Library("torchvision", "DEF")  # they last as long as this object
    for name in ("nms", "qnms"):
        declared.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
from accelerate.utils import convert_outputs_to_fp32
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    get_linear_schedule_with_warmup,
)
from transformers.utils import logging as transformers_logging

from benchmarks.common import read

transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()


class Peer:
    """A classifier with two labels, distilled again and again, an epoch at a time.

    `recipe`: batch_size, student_lr, clip, weight_decay; `alpha`, `tau` as in `methods.kd.KD`.
    `precision` bf16 is what accelerate makes of a model: autocast around its forward, outputs in
    float32. `fused`: AdamW in one kernel; the peers' own examples have the plain one.
    """

    package: str  # imported before the first request

    def __init__(
        self, folder: Path, checkpoint: str, recipe: dict[str, Any], alpha: float, tau: float,
        precision: str, fused: bool, seed: int, config: dict[str, Any],
    ):  # fmt: skip
        self.recipe, self.alpha, self.tau, self.fused = recipe, alpha, tau, fused
        torch.manual_seed(seed)
        self.model = AutoModelForSequenceClassification.from_pretrained(
            checkpoint, num_labels=2, dtype=torch.float32, **config
        )
        if precision == "bf16":
            forward = torch.autocast("cpu", torch.bfloat16)(self.model.forward)
            self.model.forward = convert_outputs_to_fp32(forward)
        self.pad = DataCollatorWithPadding(AutoTokenizer.from_pretrained(checkpoint))
        self.examples = read(folder / "texts.npz")[0].examples()
        self.said = np.load(folder / "teacher.npy")

    def collate(self, rows: list[int]) -> tuple[dict[str, Tensor], Tensor]:
        """A batch of `transformers`, and the teacher's logits."""
        return dict(self.pad([self.examples[i] for i in rows])), torch.from_numpy(self.said[rows])

    def loader(self, rows: list[int], collate: Any) -> DataLoader:
        """These texts in this order."""
        return DataLoader(rows, self.recipe["batch_size"], collate_fn=collate)  # type: ignore

    def optimiser(self, model: nn.Module) -> torch.optim.Optimizer:
        """AdamW without decay of biases, norms and embeddings."""
        tables = {
            id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()
        }
        decays = lambda p: p.ndim > 1 and id(p) not in tables
        groups = [
            {"params": [p for p in model.parameters() if decays(p) == d], "weight_decay": w}
            for d, w in ((True, self.recipe["weight_decay"]), (False, 0.0))
        ]
        return torch.optim.AdamW(groups, lr=self.recipe["student_lr"], fused=self.fused)

    def train(self, rows: list[int], seed: int) -> tuple[float, float]:
        """One epoch over the texts in this order: (seconds, CPU seconds) of the peer's own loop."""
        raise NotImplementedError

    @torch.no_grad()
    def logits(self, rows: list[int]) -> list[list[float]]:
        """(n, 2) in the order of the texts."""
        self.model.eval()
        given = self.collate(rows)[0]
        given.pop("labels")
        return self.model(**given).logits.tolist()


class TextBrewer(Peer):
    """`GeneralDistiller`, which does not save."""

    package = "textbrewer"

    def train(self, rows: list[int], seed: int) -> tuple[float, float]:
        from textbrewer import DistillationConfig, GeneralDistiller, TrainingConfig

        def collate(rows: list[int]) -> dict[str, Any]:
            batch, said = self.collate(rows)
            return {"student": batch, "teacher": {}, "teacher_cache": {"logits": said}}

        kd = DistillationConfig(
            temperature=self.tau, kd_loss_type="ce", kd_loss_weight=self.alpha * self.tau**2,
            hard_label_weight=1 - self.alpha,
        )  # fmt: skip
        loader, optimiser = self.loader(rows, collate), self.optimiser(self.model)
        schedule = {"num_warmup_steps": 0, "num_training_steps": len(loader)}
        with tempfile.TemporaryDirectory() as folder:
            plain = TrainingConfig(output_dir=folder, log_dir=None, ckpt_frequency=0, device="cpu")
            distiller = GeneralDistiller(
                plain, kd, nn.Identity(), self.model,
                lambda batch, out: out, lambda batch, out: {"logits": out.logits, "losses": out.loss},
            )  # fmt: skip
            torch.manual_seed(seed)
            with distiller:
                began = time.perf_counter(), time.process_time()
                distiller.train(
                    optimiser, loader, 1, get_linear_schedule_with_warmup, schedule,
                    max_grad_norm=self.recipe["clip"],
                )  # fmt: skip
                return time.perf_counter() - began[0], time.process_time() - began[1]


class Torchdistill(Peer):
    """`DistillationBox` in the loop of its examples."""

    package = "torchdistill.core.distillation"

    def train(self, rows: list[int], seed: int) -> tuple[float, float]:
        from torchdistill.core.distillation import DistillationBox
        from torchdistill.core.interfaces.registry import register_forward_proc_func
        from torchdistill.datasets.registry import register_collate_func
        from torchdistill.optim.registry import register_optimizer, register_scheduler

        def collate(rows: list[int]) -> tuple:
            batch, said = self.collate(rows)
            return batch, batch.pop("labels"), {"said": said}

        register_optimizer(key="adamw")(lambda modules, **_: self.optimiser(modules))
        register_scheduler(key="linear")(get_linear_schedule_with_warmup)
        register_collate_func(key="pad")(collate)
        register_forward_proc_func(key="stored")(lambda model, x, y, more: more["said"])
        register_forward_proc_func(key="logits")(lambda model, x, y, more: model(**x).logits)
        size = self.recipe["batch_size"]
        output = {"module_path": ".", "module_io": "output"}
        sides = {f"{who}_{k}": v for who in ("student", "teacher") for k, v in output.items()}
        kd = {"key": "KDLoss", "kwargs": {
            **sides, "temperature": self.tau, "alpha": 1 - self.alpha, "beta": self.alpha,
            "reduction": "batchmean",
        }}  # fmt: skip
        config = {
            "num_epochs": 1,
            "train_data_loader": {
                "dataset_id": "train", "requires_supp": False, "collate_fn": "pad",
                "sampler": {"class_or_func": torch.utils.data.SequentialSampler},
                "kwargs": {"batch_size": size},
            },
            "teacher": {"forward_proc": "stored", "requires_grad": False},
            "student": {"forward_proc": "logits", "requires_grad": True},
            "optimizer": {
                "key": "adamw", "kwargs": {}, "filters_params": False,
                "max_grad_norm": self.recipe["clip"],
            },
            "scheduler": {
                "key": "linear", "scheduling_step": 1,
                "kwargs": {"num_warmup_steps": 0, "num_training_steps": -(-len(rows) // size)},
            },
            "criterion": {
                "key": "WeightedSumLoss",
                "kwargs": {"sub_terms": {"kd": {"criterion": kd, "weight": 1.0}}},
            },
        }  # fmt: skip
        box = DistillationBox(
            nn.Identity(), self.model, {"train": rows}, config, torch.device("cpu"), None, False, 1
        )
        torch.manual_seed(seed)
        began = time.perf_counter(), time.process_time()
        box.pre_epoch_process(epoch=0)
        for batch, labels, more in box.train_data_loader:
            loss = box.forward_process(batch, labels, more)
            box.post_forward_process(loss=loss)
        box.post_epoch_process()
        return time.perf_counter() - began[0], time.process_time() - began[1]


PEERS = {"textbrewer": TextBrewer, "torchdistill": Torchdistill}


def serve(peer: str, folder: Path) -> None:
    """Answer requests until there are no more.

    build: a student under a `name`, from the arguments of `Peer`; train: (seconds, CPU seconds);
    logits: (n, 2). The first answer says what runs here.
    """
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)  # what the peer prints is no answer
    importlib.import_module(PEERS[peer].package)
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    sides: dict[str, Peer] = {}
    say = lambda what: answers.write(json.dumps(what) + "\n")
    say([torch.__version__, torch.get_num_threads()])
    for line in sys.stdin:
        request = json.loads(line)
        do, name = request.pop("do"), request.pop("name")
        if do == "build":
            sides[name] = PEERS[peer](folder, **request)
            say("built")
        else:
            say(getattr(sides[name], do)(**request))


if __name__ == "__main__":
    serve(sys.argv[1], Path(sys.argv[2]))
