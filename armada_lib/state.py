"""Where a run stands, and the file from which a killed run goes on to the same end."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn

from armada_lib.files import write_tensors
from armada_lib.methods import Method
from armada_lib.students import Student

KEPT = ("step", "seconds", "done", "epochs", "probes", "best_score")


class Diverged(FloatingPointError):
    """A loss that is not finite; the message names the first step."""


class Stateful(Protocol):
    """What the state needs of an optimiser: its parameters, AdamW and its schedule."""

    params: list[nn.Parameter]
    adam: torch.optim.AdamW
    rate: torch.optim.lr_scheduler.LambdaLR


class Progress:
    """Where a run stands: what a state file holds besides weights and optimiser moments."""

    def __init__(self, steps: int):
        self.steps, self.step, self.seconds, self.saved = steps, 0, 0.0, time.monotonic()
        self.log: list[dict[str, Tensor]] = []
        self.done: list[dict[str, list[float]]] = []  # one block of curves an epoch
        self.epochs: list[dict[str, Any]] = []
        self.probes: list[dict[str, Any]] = []
        self.best: dict[str, Tensor] | None = None
        self.best_score = -np.inf

    def flush(self, number: int | None = None, phase: str = "", size: int = 0) -> None:
        """Read the losses of the steps since the last flush, in one transfer a curve."""
        if self.log:
            names = self.log[0].keys()
            block = {k: torch.stack([s[k].float() for s in self.log]).cpu().tolist() for k in names}
            bad = next((i for i, v in enumerate(block["total"]) if not np.isfinite(v)), None)
            if bad is not None:
                first = self.step - len(self.log) + bad
                raise Diverged(
                    f"the loss is {block['total'][bad]} at step {first}; lower the learning rate or the weights"
                )
            self.done.append(block)
            self.log = []
        if number is not None:
            self.epochs.append({"epoch": number, "phase": phase, "steps": size})

    def keep_best(self, score: float, student: Student, method: Method) -> None:
        self.epochs[-1]["score"] = score
        if score > self.best_score:
            self.best_score = score
            self.best = {k: v.detach().cpu().clone() for k, v in weights(student, method)}

    def curves(self) -> dict[str, np.ndarray]:
        names = sorted({k for b in self.done for k in b})
        blank = lambda b: [np.nan] * len(b["total"])
        return {
            k: np.array([x for b in self.done for x in b.get(k, blank(b))], dtype=np.float32)
            for k in names
        }


def weights(student: Student, method: Method) -> Iterable[tuple[str, Tensor]]:
    """Every trained parameter of the student, of the method's parts and of its partners, by name."""
    for name, module in {"student": student, **method.parts, **method.partners}.items():
        for key, value in module.named_parameters():
            if value.requires_grad:
                yield f"{name}/{key}", value


@torch.no_grad()
def restore(saved: dict[str, Tensor], student: Student, method: Method) -> None:
    """Put saved values back into the parameters, in place."""
    for key, value in weights(student, method):
        value.copy_(saved[key])


def save(
    path: Path,
    student: Student,
    method: Method,
    opts: Mapping[str, Stateful],
    run: Progress,
) -> None:
    """All that the rest of the run depends on, in one file that is complete or absent."""
    run.flush()
    run.saved = time.monotonic()
    tensors = {f"w/{k}": v.detach().cpu().contiguous() for k, v in weights(student, method)}
    for name, o in opts.items():
        for i, p in enumerate(o.params):
            tensors |= {
                f"o/{name}/{i}/{k}": v.detach().cpu().contiguous()
                for k, v in o.adam.state.get(p, {}).items()
            }
    if run.best is not None:
        tensors |= {f"b/{k}": v for k, v in run.best.items()}
    kept = {k: getattr(run, k) for k in KEPT}
    kept["rates"] = {n: o.rate.last_epoch for n, o in opts.items()}
    write_tensors(path, tensors, {"run": json.dumps(kept)}, "the state of this run")


def load(
    path: Path, student: Student, method: Method, opts: Mapping[str, Stateful], run: Progress
) -> None:
    """Go on from a saved state; a file that cannot be read is removed, and the run starts again."""
    try:
        with safe_open(path, "pt") as f:
            kept = json.loads(f.metadata()["run"])
            tensors = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118
    except Exception:  # noqa: BLE001  (a state that cannot be read is no state: start again)
        path.unlink(missing_ok=True)
        return
    restore({k[2:]: v for k, v in tensors.items() if k.startswith("w/")}, student, method)
    for name, o in opts.items():
        for i, p in enumerate(o.params):
            prefix = f"o/{name}/{i}/"
            moments = {
                k[len(prefix) :]: v.to(p.device) for k, v in tensors.items() if k.startswith(prefix)
            }
            if moments:
                o.adam.state[p] = moments
        o.rate.last_epoch = done = kept["rates"][name]
        for group, base in zip(o.adam.param_groups, o.rate.base_lrs, strict=True):
            group["lr"] = base * o.rate.lr_lambdas[0](done)
    run.best = {k[2:]: v for k, v in tensors.items() if k.startswith("b/")} or None
    for key in KEPT:
        setattr(run, key, kept[key])
