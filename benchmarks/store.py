"""Reading teacher vectors: the feature store's mapped matrix against two other mapped formats."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from armada_lib import features
from benchmarks.common import BATCH

ROWS, WIDTH, ROUNDS = 100_000, 1024, 7
SLOW = 10  # the slowest peer reads this share of the batches


def measure(names: list[str], rounds: int | None, size: int | None) -> dict[str, tuple]:
    """name -> (vectors per second of each round, unit, note). `size`: rows of the store."""
    n = size or ROWS
    with tempfile.TemporaryDirectory() as folder:
        readers = _readers(Path(folder), n)
        speed: dict[str, list[float]] = {r: [] for r in readers}
        own = _anonymous()
        for r in range(-1, rounds or ROUNDS):  # round -1 brings the files into memory
            order = np.random.default_rng(r + 1).permutation(n)
            batches = [order[i : i + BATCH] for i in range(0, n, BATCH)]
            for name in list(readers)[:: 1 if r % 2 else -1]:
                part = batches[: max(1, len(batches) // SLOW)] if name == "datasets" else batches
                began = time.perf_counter()
                for rows in part:
                    readers[name](rows)
                taken = time.perf_counter() - began
                if r >= 0:
                    speed[name].append(sum(map(len, part)) / taken)
        own = _anonymous() - own
        del readers
    middle = {name: float(np.median(v)) for name, v in speed.items()}
    note = f"{n:,} x {WIDTH} float16, shuffled batches of {BATCH}, files in memory; "
    note += f"memory of its own grew by {max(own, 0) / 1e6:.0f} MB; "
    note += "safetensors {safetensors:,.0f}, datasets {datasets:,.0f}".format(**middle)
    return dict.fromkeys(names, (speed["store"], "vectors/s", note))


def _anonymous() -> int:
    """Bytes of resident memory that are no mapped file; 0 where the system does not say."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(x.split()[1]) * 1024 for x in lines if x.startswith("RssAnon")), 0)


def _readers(folder: Path, n: int) -> dict[str, Callable[[np.ndarray], torch.Tensor]]:
    """Write the same vectors in each format; each function reads the rows it is given."""
    import datasets

    x = np.random.default_rng(0).standard_normal((n, WIDTH), np.float32).astype(np.float16)
    texts = [f"text {i}" for i in range(n)]
    store = features.Store(folder, "store", WIDTH)
    store.fill(texts, lambda part: x[[int(t[5:]) for t in part]], max(2, n // 8), progress=False)
    matrix = store.matrix(texts)
    if not np.array_equal(matrix[-1].numpy(), x[-1]):
        raise RuntimeError("the store does not give back what was written")
    save_file({"x": torch.from_numpy(x)}, folder / "x.safetensors")
    with safe_open(folder / "x.safetensors", "pt") as f:
        mapped = f.get_tensor("x")
    kind = datasets.Features({"x": datasets.List(datasets.Value("float16"), length=WIDTH)})
    made = datasets.Dataset.from_dict({"x": x}, features=kind)
    made.save_to_disk(folder / "arrow")
    arrow = datasets.load_from_disk(folder / "arrow").with_format("torch")
    return {
        "store": lambda rows: matrix.index_select(0, torch.from_numpy(rows)),
        "safetensors": lambda rows: mapped.index_select(0, torch.from_numpy(rows)),
        "datasets": lambda rows: arrow[rows]["x"],
    }
