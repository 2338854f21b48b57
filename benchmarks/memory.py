"""Peak memory of a training, ours and Trainer's, each in a process of its own.

`python -m benchmarks.memory ours|trainer FOLDER FILE` is one such process: it loads the checkpoint
in FOLDER and the token ids in FILE, trains one epoch and prints the most memory it ever held.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks import common

ROUNDS, SIZE = 2, 12 * common.BATCH


def measure(names: list[str], rounds: int | None, size: int | None) -> dict[str, tuple]:
    """name -> (peak of ours / peak of Trainer's in each round, unit, note)."""
    import numpy as np

    from armada_lib import profiles
    from benchmarks import data

    corpus = data.load("cola")
    lengths = np.array([len(x) for x in corpus.train.tokens])
    peaks: dict[str, list[float]] = {"ours": [], "trainer": []}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "texts.npz"
        rows = data.grouped(lengths, size or SIZE, common.BATCH, 0)
        corpus.train.take(rows).save(file, corpus.vocabulary)
        checkpoint = profiles.resolve(data.STUDENT.checkpoint)
        for r in range(rounds or ROUNDS):
            for side in list(peaks)[:: -1 if r % 2 else 1]:
                command = [sys.executable, "-m", "benchmarks.memory", side, checkpoint, str(file)]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                peaks[side].append(json.loads(done.stdout.splitlines()[-1])["mib"])
            last = {s: round(p[-1]) for s, p in peaks.items()}
            print(f"memory round {r + 1}, MiB: {last}", file=sys.stderr)
    middle = {s: float(np.median(p)) for s, p in peaks.items()}
    note = f"{corpus.source}, fp32, batch {common.BATCH}, Trainer with dynamic padding; ours "
    note += f"{middle['ours']:.0f} MiB, Trainer {middle['trainer']:.0f} MiB"
    ratio = [a / b for a, b in zip(peaks["ours"], peaks["trainer"], strict=True)]
    return dict.fromkeys(names, (ratio, "peak RSS ratio", note))


def train(side: str, checkpoint: str, file: str) -> None:
    """Train one side once."""
    split, vocabulary = common.read(Path(file))
    if side == "ours":
        from armada_lib.profiles import StudentSpec
        from benchmarks.ours import Ours, training

        spec = StudentSpec(name="student", checkpoint=checkpoint)
        ours = Ours(spec, vocabulary, training("fp32"))
        ours.train(ours.encode(split), seed=0)
    else:
        from benchmarks.peer import Peer

        Peer(checkpoint, 0, common.RECIPE).train(split.examples(), 0, "random")


def peak() -> float:
    """The most memory this process held so far, MiB.

    Not `ru_maxrss`: on Linux that begins with the size of the process that started this one.
    """
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    if found is None:
        raise OSError("/proc/self/status does not say how much memory was used (VmHWM)")
    return int(found[1]) / 1024


if __name__ == "__main__":
    train(*sys.argv[1:])
    print(json.dumps({"mib": peak()}))
