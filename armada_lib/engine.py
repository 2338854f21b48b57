"""The one training loop, for every student and every method. Read it from top to bottom.

What makes it fast is arrangement: packed batches, one forward and one backward a step, fused AdamW
that is handed the clip factor, and no number read back from the device until an epoch ends.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm import tqdm

from armada_lib import autocast, losses, machine
from armada_lib.batching import Encoded, epoch, plan
from armada_lib.methods import Method, Phase
from armada_lib.profiles import Training
from armada_lib.state import Progress, load, restore, save
from armada_lib.students import Student, StudentOutput

SAVE_EVERY = 300.0  # seconds between two states that a killed run can go on from


@dataclass
class Trained:
    """What a run leaves besides its weights. Curves are (steps,), NaN where undefined.

    `seconds` of training in all, of which `earlier` before a kill.
    """

    curves: dict[str, np.ndarray]
    epochs: list[dict[str, Any]]
    seconds: float
    steps: int
    diagnostics: dict[str, Any] = field(default_factory=dict)
    earlier: float = 0.0


def save_every() -> float:
    """Seconds between two states: `ARMADA_SAVE_EVERY`, else `SAVE_EVERY`."""
    return float(os.environ.get("ARMADA_SAVE_EVERY", SAVE_EVERY))


def precision(asked: str, device: str | torch.device = "cpu") -> str:
    """ "auto" -> "bf16" where the device computes it natively, else "fp32"."""
    if asked != "auto":
        return asked
    return "bf16" if machine.bf16(device) else "fp32"


class Optimiser:
    """AdamW with its schedule and its clipping, for one part (the student, the aligner).

    Each part is clipped by its own norm, so that nothing one part does changes another's step.
    """

    def __init__(self, module: nn.Module, lr: float, t: Training, steps: int):
        named = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
        tables = {
            id(p) for m in module.modules() if isinstance(m, nn.Embedding) for p in m.parameters()
        }
        # embeddings without decay: rows that no batch touches stay as they are
        decay = [p for _, p in named if p.ndim > 1 and id(p) not in tables]
        rest = [p for _, p in named if p.ndim <= 1 or id(p) in tables]
        groups = [
            {"params": decay, "weight_decay": t.weight_decay},
            {"params": rest, "weight_decay": 0.0},
        ]
        self.params, self.clip = decay + rest, t.clip
        self.adam = torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, fused=True)
        warm = int(t.warmup * steps) if t.schedule == "linear" else 0

        def factor(step: int) -> float:
            if t.schedule == "constant":
                return 1.0
            return (step + 1) / warm if step < warm else (steps - step) / max(1, steps - warm)

        self.rate = torch.optim.lr_scheduler.LambdaLR(self.adam, factor)

    def step(self) -> Tensor:
        """Clip, step, clear; returns the gradient norm before clipping, still on the device."""
        norms = torch._foreach_norm([p.grad for p in self.params if p.grad is not None])
        norm = torch.linalg.vector_norm(torch.stack(norms))
        # The fused kernel divides gradients by `grad_scale` as it reads them: no pass for clipping.
        scale = {"grad_scale": (norm / self.clip).clamp(min=1.0)}
        for name, value in {**scale, "found_inf": torch.zeros_like(norm)}.items():
            setattr(self.adam, name, value)
        self.adam.step()
        self.rate.step()
        self.adam.zero_grad(set_to_none=True)
        return norm


@torch.random.fork_rng(devices=[])  # the caller's random numbers stay the caller's
def train(
    student: Student,
    method: Method,
    data: Encoded,
    t: Training,
    seed: int,
    accelerator: Accelerator | None = None,
    evaluate: Callable[[], float] | None = None,
    state: Path | None = None,
    save_every: float = SAVE_EVERY,
    progress: bool = False,
    probes: int = 1,
    after_epoch: Callable[[int], None] | None = None,
) -> Trained:
    """Train `student` by `method` on `data`; both end in their final state, ready to evaluate.

    `t.batch_size` is the batch of one process. `evaluate` returns a score and is called after each
    student epoch when `t.select` is "best". `state` is a file from which a killed run goes on, to
    the same end bit for bit; it is written every `save_every` seconds and removed at the end.
    `probes`: batches in the first and in the last epoch on which each term's gradient is measured.
    `after_epoch` gets the number of each epoch that ends, at least once, before a state says so.
    Raises `Diverged` when a loss is not finite.
    """
    acc = accelerator or Accelerator(cpu=not torch.cuda.is_available())
    world, device = acc.num_processes, acc.device
    student.to(device)
    for part in (*method.parts.values(), *method.partners.values()):
        part.to(device)
    if t.compile:
        student.family.encoder(student.model).compile(dynamic=True)
    method.attach(data)
    bf16 = precision(t.precision, device) == "bf16"
    centroid = losses.mean_row if world == 1 else _shared_centroid(acc)

    phases = method.schedule(t.epochs)
    # a rest of fewer examples than processes is no batch: see `batching.epoch`
    planned = plan(data, t.batch_size * world, seed, 0, student.packs)
    size = sum(len(rows) >= world for rows in planned)
    count = lambda part: size * sum(p == "joint" or p == part for p in phases)
    names = {"student": student, **method.parts}
    optimisers = {
        n: Optimiser(m, method.learning_rate(n), t, max(1, count(_phase(n))))
        for n, m in {**names, **method.partners}.items()
    }

    def step(name: str) -> Tensor:
        if world > 1:
            _average_gradients(acc, optimisers[name].params)
        return optimisers[name].step()

    probed = _probe_steps(phases, size, probes)
    run = Progress(steps=size * len(phases))
    if state is not None and state.exists():
        load(state, student, method, optimisers, run)
    earlier = run.seconds

    def save_if_due() -> None:
        """The first process alone decides and writes, so that none waits for another."""
        late = time.monotonic() - run.saved > save_every
        if state is not None and acc.is_main_process and late:
            save(state, student, method, optimisers, run)

    bar = tqdm(
        total=run.steps,
        initial=run.step,
        disable=not progress or not acc.is_main_process,
        desc="train",
    )

    while run.step < run.steps:
        number, start = divmod(run.step, size)
        phase = phases[number]
        moving = [n for n in names if phase == "joint" or _phase(n) == phase]
        for optimiser in optimisers.values():  # a loss may have reached what was at rest (A10)
            optimiser.adam.zero_grad(set_to_none=True)
        student.train(phase != "aligner")
        method.before_epoch(number, len(phases))
        for k, rows in enumerate(
            epoch(data, t.batch_size, seed, number, student.packs, acc.process_index, world)
        ):
            if k < start:
                continue
            began = time.perf_counter()
            batch = data.batch(rows, student.packs).to(device)
            # Dropout depends on seed, step and process alone: a resumed run draws the same masks.
            torch.manual_seed(_fold(seed, run.step, acc.process_index))
            out: StudentOutput | None = None
            with autocast.products(device, bf16):
                if phase != "aligner" and method.predicts:
                    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                        out = student(method.inputs(batch))
                if method.partners:
                    method.turn(batch, out, step)
                terms = method.losses(batch, out, phase, centroid)
                if run.step in probed and out is not None:
                    run.probes.append({"step": run.step, **_gradients(student, terms, out)})
                total = torch.stack(list(terms.values())).sum()
                total.backward()
            if world > 1:
                _average_gradients(acc, [p for n in moving for p in optimisers[n].params])
            norms = {f"grad_{n}": optimisers[n].step() for n in moving}
            run.step += 1
            method.after_step(run.step)
            run.log.append({k: v.detach() for k, v in {**terms, "total": total, **norms}.items()})
            run.seconds += time.perf_counter() - began
            bar.update()
            if run.step % size:
                save_if_due()
        run.flush(number, phase, size)
        if phase != "aligner" and t.select == "best" and evaluate is not None:
            run.keep_best(evaluate(), student, method)
        if after_epoch is not None:
            after_epoch(number)
        if run.step < run.steps:
            save_if_due()
    bar.close()
    if run.best is not None:
        restore(run.best, student, method)
    method.finish()
    student.eval()
    if state is not None and acc.is_main_process:
        state.unlink(missing_ok=True)
    return Trained(
        run.curves(),
        run.epochs,
        run.seconds,
        run.steps,
        {"gradients": run.probes, **method.facts()},
        earlier,
    )


def _phase(part: str) -> str:
    return "student" if part == "student" else "aligner"


def _fold(*numbers: int) -> int:
    return int(
        np.random.SeedSequence([int(n) for n in numbers]).generate_state(1, np.uint64)[0] >> 1
    )


def _shared_centroid(acc: Accelerator) -> Callable[[Tensor], Tensor]:
    """The batch mean over all processes: its value is global, its gradient that of the local share.

    Averaging gradients over processes then gives exactly the gradient of the whole batch.
    """

    def centroid(p: Tensor) -> Tensor:
        local = p.mean(0)
        return local + (acc.reduce(local.detach(), "mean") - local.detach())

    return centroid


def _average_gradients(acc: Accelerator, params: list[nn.Parameter]) -> None:
    """One message for all gradients. No wrapper around the models is needed for this."""
    with_grad = [p for p in params if p.grad is not None]
    flat = acc.reduce(torch.cat([p.grad.reshape(-1) for p in with_grad]), "mean")  # type: ignore[union-attr]
    for p, g in zip(with_grad, flat.split([p.numel() for p in with_grad]), strict=True):
        p.grad.copy_(g.view_as(p))  # type: ignore[union-attr]


def _probe_steps(phases: list[Phase], size: int, probes: int) -> set[int]:
    """Steps in the first and in the last epoch that trains the student."""
    student = [i for i, p in enumerate(phases) if p != "aligner"]
    at = [int((j + 0.5) / probes * size / 2) for j in range(probes)]
    return {student[0] * size + s for s in at} | {(student[-1] + 1) * size - 1 - s for s in at}


def _gradients(student: Student, terms: dict[str, Tensor], out: StudentOutput) -> dict[str, Any]:
    """Norm of each term's gradient on the encoder, and the scatter of the student's vectors."""
    encoder = [p for p in student.family.encoder(student.model).parameters() if p.requires_grad]
    norms = {}
    for name, term in terms.items():
        if name.startswith("aligner"):
            continue
        grads = torch.autograd.grad(term, encoder, retain_graph=True, allow_unused=True)
        seen = [g for g in grads if g is not None]
        norms[name] = float(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(seen))))
    scatter = {}
    for name, x in (("hidden", out.hidden), ("projection", out.projection)):
        if x is not None:
            scatter[name] = float((x.detach() - x.detach().mean(0)).norm(dim=-1).mean())
    return {"gradient": norms, "scatter": scatter}
