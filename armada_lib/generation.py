"""What a generating student answers: batched, resumable, and the same whatever stands beside a prompt.

Prompts of like length share a batch (`decoding`). Sampling adds Gumbel noise, drawn for each
example from its own seed, to the logits and takes the maximum: an exact draw from the softmax that
depends on seed and example alone.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.utils.mkldnn import MkldnnLinear
from tqdm import tqdm

from armada_lib import answers, autocast
from armada_lib.decoders import Decoder
from armada_lib.packing import PACKED

Set = tuple[Path | None, Sequence[str]]  # prompts, and the file that keeps their answers


class Job(NamedTuple):
    """One answer: the file that keeps it, and its `name` there."""

    file: Path | None
    name: str


class Gumbel:
    """argmax(logits / temperature + Gumbel noise): a draw from the softmax, a generator a row."""

    def __init__(self, seeds: Sequence[int], temperature: float):
        self.generators = [torch.Generator().manual_seed(s) for s in seeds]
        self.temperature = temperature

    def __call__(self, logits: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
        u = torch.stack([torch.rand(logits.shape[1], generator=self.generators[r]) for r in rows])
        noise = -torch.log(-torch.log(u.clamp(1e-20, 1 - 1e-7)))
        return (logits.float() / self.temperature + noise.to(logits.device)).argmax(-1)


def greedy(logits: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
    """The likeliest token of each row."""
    return logits.argmax(-1)


def tokens(student: Decoder, prompts: Sequence[str], room: int) -> list[np.ndarray]:
    """Token ids of every prompt, as `Decoder.prompt_ids` writes them.

    Raises ValueError for an empty prompt and for one that leaves no `room` in the context.
    """
    out = []
    for i, text in enumerate(prompts):
        if not text.strip():
            raise ValueError(f"prompt {i} of {len(prompts)} is empty")
        ids = student.prompt_ids(text)
        if len(ids) + room > student.context:
            raise ValueError(
                f"prompt {i} has {len(ids)} tokens; with {room} for the answer it is beyond the "
                f"model's context of {student.context}: {text[:60]!r}"
            )
        out.append(ids)
    return out


def generate(
    student: Decoder,
    prompts: Sequence[str],
    new_tokens: int,
    kept: Path | None = None,
    batch_size: int = 32,
    seed: int | None = None,
    temperature: float = 1.0,
    bf16: bool = False,
    progress: bool = False,
) -> list[str]:
    """The student's answer to every prompt, greedy, or sampled where `seed` is given: see `samples`."""
    sets = [(kept, prompts)]
    return samples(student, sets, new_tokens, [seed], batch_size, temperature, bf16, progress)[0][0]


@torch.inference_mode()
def samples(
    student: Decoder,
    sets: Sequence[Set],
    new_tokens: int,
    seeds: Sequence[int | None],
    batch_size: int = 32,
    temperature: float = 1.0,
    bf16: bool = False,
    progress: bool = False,
) -> list[list[list[str]]]:
    """For each set of prompts a list of answers a seed; the likeliest tokens where `seeds` is [None].

    A batch takes prompts of like length from all sets, and reads a prompt once for all its answers
    there. Every answer is appended to its set's file as it ends, and a killed call goes on from
    there. Raises ValueError for prompts that are empty or too long, before any is answered.
    """
    from armada_lib import decoding  # imports what of transformers takes seconds

    student = student.eval()
    read = [tokens(student, prompts, new_tokens) for _, prompts in sets]
    ids = [x for each in read for x in each for _ in seeds]
    jobs = [
        Job(file, name(i, p, seed))
        for file, prompts in sets for i, p in enumerate(prompts) for seed in seeds
    ]  # fmt: skip
    device = next(student.parameters()).device
    with _plain(student) as model:
        ends = _ends(model, student.tokenizer)

        def answer(part: list[int]) -> Iterator[tuple[int, str]]:
            pick: decoding.Pick = greedy
            if None not in seeds:
                pick = Gumbel([_fold(jobs[i].name) for i in part], temperature)
            with autocast.to_bf16(device, bf16):
                for row, said in decoding.decode(
                    model, [ids[i] for i in part], new_tokens, ends, pick
                ):
                    yield part[row], student.tokenizer.decode(said, skip_special_tokens=True)

        every = iter(_resumed(jobs, [len(x) for x in ids], answer, batch_size, progress))
    found = [list(islice(every, len(prompts) * len(seeds))) for _, prompts in sets]
    return [[one[n :: len(seeds)] for n in range(len(seeds))] for one in found]


@torch.inference_mode()
def choose(
    student: Decoder,
    sets: Sequence[Set],
    choices: Sequence[Sequence[Sequence[str]]],
    batch_size: int = 16,
    bf16: bool = False,
    progress: bool = False,
) -> list[list[str]]:
    """For every prompt of every set the one of its choices with the highest mean log p a token.

    Files and batches as in `samples`. Raises ValueError for prompts that are empty or too long,
    before any choice is made.
    """
    from armada_lib import decoding

    said = [c for each in choices for c in each]
    options = [[student.answer_ids(c) for c in cs] for cs in said]
    room = max(len(c) for cs in options for c in cs)
    ids = [x for _, prompts in sets for x in tokens(student.eval(), prompts, room)]
    jobs = [Job(file, name(i, p, None)) for file, prompts in sets for i, p in enumerate(prompts)]
    device = next(student.parameters()).device
    with _plain(student) as model:

        def answer(part: list[int]) -> Iterator[tuple[int, str]]:
            with autocast.to_bf16(device, bf16):
                found = decoding.likelihoods(
                    model, [ids[i] for i in part], [options[i] for i in part]
                )
            for i, (total, n) in zip(part, found, strict=True):
                yield i, said[i][answers.pick(list(total), list(n), normalise=True)]

        every = iter(_resumed(jobs, [len(x) for x in ids], answer, batch_size, progress))
    return [list(islice(every, len(prompts))) for _, prompts in sets]


def _resumed(
    jobs: list[Job],
    lengths: list[int],
    answer: Callable[[list[int]], Iterator[tuple[int, str]]],
    batch_size: int,
    progress: bool,
) -> list[str]:
    """`answer` for batches of like length, longest first, of what the files lack; in `jobs`' order."""
    done = {
        Job(file, n): text
        for file in dict.fromkeys(j.file for j in jobs) if file
        for n, text in kept_answers(file).items()
    }  # fmt: skip
    todo = sorted((i for i, j in enumerate(jobs) if j not in done), key=lambda i: -lengths[i])
    with tqdm(
        total=len(jobs), initial=len(jobs) - len(todo), desc="answers", disable=not progress
    ) as bar:
        for at in range(0, len(todo), batch_size):
            for i, text in answer(todo[at : at + batch_size]):
                done[jobs[i]] = text
                if (file := jobs[i].file) is not None:
                    _append(file, jobs[i].name, text)
                bar.update()
    return [done[j] for j in jobs]


@contextlib.contextmanager
def _plain(student: Decoder) -> Iterator[Any]:
    """The model under the adapter, with the adapter folded in; as it was before afterwards.

    Into bf16 or 4-bit weights it is not folded: rounding would lose a part of it.
    """
    base = student.model.get_base_model()
    fold = base.get_output_embeddings().weight.dtype == torch.float32
    if fold:
        student.model.merge_adapter()
    swapped = _onednn(base) if fold and base.device.type == "cpu" and _wide() else []
    try:
        yield base
    finally:
        for parent, name, layer in swapped:
            setattr(parent, name, layer)
        base.set_attn_implementation(PACKED)
        if fold:
            student.model.unmerge_adapter()


def _wide() -> bool:
    """Whether oneDNN's fp32 products are faster than MKL's, torch's usual ones.

    They take half the time where MKL leaves AVX-512 unused, as it does on AMD's processors; with
    AVX2 alone they take up to twice the time.
    """
    return torch.backends.cpu.get_cpu_capability() == "AVX512"


def _onednn(model: nn.Module) -> list[tuple[nn.Module, str, nn.Module]]:
    """Let oneDNN do the matrix products of all linear layers; returns what was there before.

    It holds the weights a second time, in its own layout.
    """
    parents = list(model.modules())
    found: list[tuple[nn.Module, str, nn.Module]] = [
        (p, n, c) for p in parents for n, c in p.named_children() if type(c) is nn.Linear
    ]
    for parent, name, layer in found:
        setattr(parent, name, MkldnnLinear(layer, torch.float))
    return found


def _ends(model: Any, tokenizer: Any) -> set[int]:
    """Tokens that end an answer: the checkpoint's own setting, else the tokenizer's."""
    known = model.generation_config.eos_token_id
    known = tokenizer.eos_token_id if known is None else known
    return set(known if isinstance(known, list | tuple) else [] if known is None else [known])


def name(number: int, prompt: str, seed: int | None) -> str:
    """The key under which an answer is kept: place, seed and prompt."""
    return hashlib.sha256(f"{number}\0{seed}\0{prompt}".encode()).hexdigest()[:24]


def _fold(name: str) -> int:
    return int(name[:15], 16)


def kept_answers(path: Path) -> dict[str, str]:
    """Answers kept by an earlier call, by `name`; a line cut short by a kill is left out."""
    found: dict[str, str] = {}
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(json.JSONDecodeError, ValueError):
                key, text = json.loads(line)
                found[key] = text
    return found


def _append(path: Path, name: str, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as f:
        torn = f.tell() and (f.seek(-1, os.SEEK_END), f.read(1))[1] != b"\n"
        f.write(("\n" if torn else "").encode() + json.dumps([name, text]).encode() + b"\n")
        f.flush()
        os.fsync(f.fileno())
