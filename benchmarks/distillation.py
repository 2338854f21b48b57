"""Distillation of logits: the engine's `kd` beside TextBrewer and torchdistill.

A round is one short training of each side on the same batches of texts, with the mentor's logits at
hand and everything built and tokenised before the clock starts. It runs over the whole call of the
engine, but only over the peer's own loop. Each peer is a process of an environment of its own (see
`environments`, `distillers`), which waits while another side trains. Before the first round both
sides train without dropout and must end with the same student.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from armada_lib import engine, profiles
from armada_lib.batching import epoch
from armada_lib.methods import METHODS
from armada_lib.profiles import StudentSpec
from benchmarks import data, environments
from benchmarks.common import BATCH, RECIPE, Split
from benchmarks.data import Corpus
from benchmarks.generation import sample
from benchmarks.ours import Ours, training

PAIRS = {"kd_vs_textbrewer": "textbrewer", "kd_vs_torchdistill": "torchdistill"}
ROUNDS, SIZE = 4, 10 * BATCH  # texts a round
UNIT = "times more samples/s"
CHECKED, APART = 3 * BATCH, 1e-3  # texts of the training that both sides do alike, of its logits
# what the peer is given: the plain AdamW of its examples, or the fused one, which the engine has
VARIANTS = {"fp32": ("fp32", False), "fused": ("fp32", True), "bf16": ("bf16", True)}
CACHED = {
    "textbrewer": "the teacher's logits in each batch, as its `teacher_cache`",
    "torchdistill": "a teacher that hands over the stored logits",
}
WEIGHTS = {k: METHODS["kd"].weights[k] for k in ("alpha", "tau")}


@dataclass(frozen=True)
class Said:
    """The part of a `methods.base.Mentor` that `kd` reads: (n, 2) float32."""

    logits: Tensor


class Distilled(Ours):
    """The library's side: `kd` from stored logits."""

    def __init__(self, spec: StudentSpec, vocabulary: np.ndarray, precision: str, **changes: Any):
        more: dict[str, Any] = {**WEIGHTS, "mentor": Said(torch.zeros(0, 2))}
        super().__init__(spec, vocabulary, training(precision, **changes), "kd", **more)

    def learn(self, texts: Split, said: Tensor, seed: int) -> tuple[float, float]:
        """One epoch: (seconds, CPU seconds)."""
        self.method.mentor = Said(said)  # type: ignore[attr-defined]
        return self.train(self.encode(texts), seed)[:2]


class Peer:
    """The other side: `distillers` in the environment of a peer.

    Raises `environments.Unavailable` where that cannot be made or does not run.
    """

    def __init__(self, peer: str, folder: Path, checkpoint: str):
        self.peer, self.checkpoint = peer, checkpoint
        interpreter = str(environments.python(peer))
        command = [interpreter, "-m", "benchmarks.distillers", peer, str(folder)]
        self.log = (folder / f"{peer}.log").open("w+", encoding="utf-8")
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=self.log, text=True, cwd=profiles.ROOT
        )
        try:
            here = [torch.__version__, torch.get_num_threads()]
            if (there := self._answer()) != here:
                raise RuntimeError(f"it has torch and threads {there}, this side {here}")
        except RuntimeError as e:
            self.close()
            raise environments.Unavailable(f"{peer} does not run in its environment: {e}") from e

    def ask(self, do: str, name: str, **request: Any) -> Any:
        """See `distillers.serve`. Raises RuntimeError with its last words if it stopped."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps({"do": do, "name": name, **request}) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # it stopped; what it said then is read below
        return self._answer()

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        if line := self.process.stdout.readline():
            return json.loads(line)
        self.process.wait()
        self.log.seek(0)
        last = (self.log.read().strip() or f"exit code {self.process.returncode}").splitlines()[-1]
        raise RuntimeError(f"{self.peer} stopped: {last}")

    def build(self, name: str, precision: str, fused: bool = False, **config: Any) -> None:
        """A fresh student under this name; `config`: changes to its configuration."""
        self.ask(
            "build", name, checkpoint=self.checkpoint, recipe=RECIPE, precision=precision, fused=fused,
            seed=0, config=config, **WEIGHTS,
        )  # fmt: skip

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.communicate()
        self.log.close()


def measure(names: list[str], rounds: int | None, size: int | None) -> dict[str, tuple]:
    """name -> (ratio of each round, unit, note); no ratio where a peer cannot be had."""
    corpus, found = data.load("cola"), dict[str, tuple]()
    said = 2 * torch.randn(len(corpus.train), 2, generator=torch.Generator().manual_seed(0))
    checkpoint = profiles.resolve(data.STUDENT.checkpoint)
    with tempfile.TemporaryDirectory() as name:
        folder, peers = Path(name), {}
        corpus.train.save(folder / "texts.npz", corpus.vocabulary)
        np.save(folder / "teacher.npy", said.numpy())
        try:
            for n in names:
                try:
                    peers[n] = Peer(PAIRS[n], folder, checkpoint)
                except environments.Unavailable as e:
                    found[n] = [], UNIT, f"not run: {e}"
            if peers:
                size = max(1, (size or SIZE) // BATCH) * BATCH
                found |= compare(peers, data.STUDENT, corpus, said, rounds or ROUNDS, size)
        finally:
            for peer in peers.values():
                peer.close()
    return found


def agree(peer: Peer, spec: StudentSpec, corpus: Corpus, said: Tensor) -> float:
    """The largest difference of a logit after the same training without dropout.

    Raises RuntimeError if it is more than `APART` of how far that training moved them.
    """
    part, order, texts = _drawn(corpus, CHECKED, 0)
    own = Distilled(spec, corpus.vocabulary, "fp32", dropout=0.0)
    peer.build("check", "fp32", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    start = own.logits(own.encode(texts))
    own.learn(texts, said[part], 0)
    peer.ask("train", "check", rows=order, seed=0)
    end = own.logits(own.encode(texts))
    theirs = np.array(peer.ask("logits", "check", rows=part.tolist()))
    apart, moved = float(np.abs(end - theirs).max()), float(np.abs(end - start).max())
    if not apart <= APART * moved:
        raise RuntimeError(
            f"{peer.peer} and the engine train differently: logits {apart:.1e} apart after a "
            f"training that moved them by {moved:.1e}"
        )
    return apart


def compare(
    peers: dict[str, Peer], spec: StudentSpec, corpus: Corpus, said: Tensor, rounds: int, size: int
) -> dict[str, tuple]:
    """name -> (samples a second of ours / of the peer in each round, unit, note)."""
    apart = {n: agree(peer, spec, corpus, said) for n, peer in peers.items()}
    native = ["fp32"] + ["bf16"] * (engine.precision("auto") == "bf16")
    ours = {p: Distilled(spec, corpus.vocabulary, p) for p in native}
    variants = {v: k for v, k in VARIANTS.items() if k[0] in native}
    for peer in peers.values():
        for v, (precision, fused) in variants.items():
            peer.build(v, precision, fused)
    turns = [("ours", p) for p in native] + [(n, v) for n in peers for v in variants]
    took: dict[tuple[str, str], list] = {t: [] for t in turns}  # (seconds, CPU seconds)
    padded = []
    for r in range(-1, rounds):  # round -1 warms up and is not counted
        part, order, texts = _drawn(corpus, BATCH if r < 0 else size, r + 1)
        for side, v in turns[:: 1 if r % 2 else -1]:
            if side == "ours":
                one = ours[v].learn(texts, said[part], r + 1)
            else:
                one = peers[side].ask("train", v, rows=order, seed=r + 1)
            if r >= 0:
                took[side, v].append(one)
        if r >= 0:
            lengths = np.array([len(corpus.train.tokens[i]) for i in order])
            padded.append(lengths.reshape(-1, BATCH).max(1).sum() * BATCH / lengths.sum())
            rate = {", ".join(t): round(size / x[-1][0]) for t, x in took.items()}
            print(f"distillation round {r + 1} of {rounds}, samples/s: {rate}", file=sys.stderr)
    results = {}
    for n, peer in peers.items():
        # (rounds, 2): seconds and CPU seconds of the peer over those of ours
        ratio = {v: np.divide(took[n, v], took["ours", k[0]]) for v, k in variants.items()}
        middle = {v: np.median(x, 0) for v, x in ratio.items()}
        mine, theirs = (size / np.median(took[t, "fp32"], 0)[0] for t in ("ours", n))
        note = f"{corpus.source}, fp32, batches of {BATCH}, {size // BATCH} steps a round; ours "
        note += f"{mine:.0f} samples/s, {environments.PINS[peer.peer][0]} {theirs:.0f}, given "
        note += f"{CACHED[peer.peer]}; it computes {np.mean(padded):.2f} tokens for each useful "
        note += f"one; CPU time {middle['fp32'][1]:.2f}"
        note += "; {:.2f} (CPU time {:.2f}) if it is given the fused AdamW".format(*middle["fused"])
        if "bf16" in ratio:
            note += ", {:.2f} ({:.2f}) so in bf16".format(*middle["bf16"])
        note += f"; without dropout the same student, logits {apart[n]:.0e} apart"
        results[n] = ratio["fp32"][:, 0].tolist(), UNIT, note
    return results


def _drawn(corpus: Corpus, size: int, seed: int) -> tuple[np.ndarray, list[int], Split]:
    """(numbers of a round's texts, the same in the order that the engine draws, the texts)."""
    lengths = np.array([len(x) for x in corpus.train.tokens])
    part = sample(lengths, size, seed)
    texts = corpus.train.take(part)
    order = np.concatenate(list(epoch(texts, BATCH, seed, 0, packed=True)))  # type: ignore
    return part, part[order].tolist(), texts
