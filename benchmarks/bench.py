"""Every benchmark beside its peer: `python -m benchmarks.bench [--only NAME] [--out bench.json]`.

One thread on one core, the two sides in turn, so that ratios hold on a machine with neighbours:
read ratios, not times. Prints a table and writes name -> {median, min, max, runs, unit, note},
over the rounds; `runs` is their number. Where a peer cannot be had it is 0, the numbers are null,
the note says why, and the command fails after all else is written.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

# name -> the module whose `measure` knows it; names of one module share their rounds
BENCHMARKS = {
    "train_cola_vs_trainer_dynamic": "speed",
    "train_mrpc_vs_trainer_dynamic": "speed",
    "train_cola_vs_trainer_grouped": "speed",
    "train_mrpc_vs_trainer_grouped": "speed",
    "train_cola_vs_trainer_grouped_epoch": "speed",
    "train_mrpc_vs_trainer_grouped_epoch": "speed",
    "train_cola_default_vs_trainer_fp32": "speed",
    "armada_over_undistilled": "overhead",
    "armada_exact_over_undistilled": "overhead",
    "memory_over_trainer": "memory",
    "store_vectors_per_second": "store",
    "extraction_overhead": "extraction",
    "lm_tokens_vs_trainer_dynamic": "generation",
    "lm_tokens_vs_trainer_grouped": "generation",
    "generate_vs_batch1": "generation",
    "kd_vs_textbrewer": "distillation",
    "kd_vs_torchdistill": "distillation",
}
NUMBERS: dict[str, Callable[[list[float]], float]] = {"median": median, "min": min, "max": max}


def prepare() -> None:
    """One thread on one core, set before torch is loaded; processes started here inherit it."""
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    import datasets
    import torch

    torch.set_num_threads(1)
    datasets.disable_progress_bars()


def measure(names: list[str], rounds: int | None, size: int | None) -> dict[str, dict]:
    """The entries of bench.json for these names, in this order."""
    found: dict[str, dict] = {}
    for module in dict.fromkeys(BENCHMARKS[n] for n in names):
        began, mine = time.monotonic(), [n for n in names if BENCHMARKS[n] == module]
        print(f"{module}: {', '.join(mine)}", file=sys.stderr)
        part = importlib.import_module(f"benchmarks.{module}").measure(mine, rounds, size)
        for name, (values, unit, note) in part.items():
            numbers = {k: f(values) if values else None for k, f in NUMBERS.items()}
            found[name] = {**numbers, "runs": len(values), "unit": unit, "note": note}
        print(f"{module}: {time.monotonic() - began:.0f} s", file=sys.stderr)
    return {n: found[n] for n in names}


def table(found: dict[str, dict]) -> str:
    """The entries as text, each note below its numbers."""
    number = lambda x: "-" if x is None else f"{x:,.0f}" if abs(x) >= 1000 else f"{x:.3f}"
    lines = [f"{'':36}{'median':>12}{'min':>12}{'max':>12}{'runs':>6}  unit"]
    for name, r in found.items():
        values = "".join(f"{number(r[k]):>12}" for k in NUMBERS)
        lines += [f"{name:36}{values}{r['runs']:>6}  {r['unit']}", f"    {r['note']}"]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench", description=__doc__)
    parser.add_argument("--only", metavar="NAME", help=f"one of: {', '.join(BENCHMARKS)}")
    parser.add_argument("--rounds", type=int, help="default: each benchmark's own")
    parser.add_argument("--size", type=int, help="texts a round, or rows of the store")
    parser.add_argument("--out", type=Path, default=Path("bench.json"))
    given = parser.parse_args(arguments)
    if given.only is not None and given.only not in BENCHMARKS:
        parser.error(f"unknown benchmark {given.only!r}; valid: {', '.join(BENCHMARKS)}")
    for option in ("rounds", "size"):
        if (value := getattr(given, option)) is not None and value < 1:
            parser.error(f"--{option} must be at least 1, got {value}")
    if not given.out.resolve().parent.is_dir():
        parser.error(f"--out: {given.out.resolve().parent} is not a folder")
    prepare()
    found = measure([given.only] if given.only else list(BENCHMARKS), given.rounds, given.size)
    given.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(table(found))
    print(f"written to {given.out}")
    if missing := [f"{n}: {r['note']}" for n, r in found.items() if not r["runs"]]:
        sys.exit("\n".join(missing))


if __name__ == "__main__":
    main()
