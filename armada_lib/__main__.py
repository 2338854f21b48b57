"""The command line: `python -m armada_lib extract ...`. Each command is a call of the library."""

from __future__ import annotations

import argparse
import os
import sys

import torch
from accelerate import PartialState

from armada_lib import extraction, profiles, specs
from armada_lib.results import RunStore


def main(argv: list[str] | None = None) -> None:
    """Parse `argv` (default: the command line) and run one command; exit code 2 for bad input."""
    parser = argparse.ArgumentParser(prog="python -m armada_lib", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    extract = commands.add_parser(
        "extract",
        help="compute the teacher's vectors of tasks or files and store them",
        description="Compute a teacher's vectors once and store them, where the chapters find them. "
        "What is stored is left alone, and a killed extraction goes on where it was. Under "
        "`accelerate launch` every process takes its share, on its own GPU.",
    )
    extract.add_argument("--teacher", required=True, help="a teacher of the profile, e.g. sd14")
    extract.add_argument(
        "--texts",
        required=True,
        nargs="+",
        help="tasks (cola rte ...) and files: .txt one text a line, .csv and .jsonl with `text`",
    )
    extract.add_argument("--profile", default=None, help="default: paper with a GPU, else mini")
    extract.add_argument("--workers", type=int, default=None, help="processes; default: one a core")
    extract.add_argument("--store", default=None, help="folder; default: ARMADA_STORE or .armada")
    given = parser.parse_args(argv)
    try:
        _extract(given)
    except (ValueError, OSError, RuntimeError, ArithmeticError) as e:
        sys.exit(f"{type(e).__name__}: {e}")


def _extract(given: argparse.Namespace) -> None:
    if given.workers is not None and given.workers < 1:
        raise ValueError(f"--workers must be at least 1, got {given.workers}")
    name = given.profile or profiles.default()
    who = profiles.load(name).teacher(given.teacher)
    specs.need_gpu(profiles.load(name))
    state = PartialState(
        cpu=not torch.cuda.is_available()
    )  # one process, unless started by `accelerate launch`
    say = print if state.is_main_process else lambda *_: None
    store = RunStore(given.store)
    store.check()
    texts = extraction.read(given.texts, name)
    missing = extraction.feature_store(name, who.name, store).missing(texts)
    cost = extraction.estimate(name, who.name, len(missing))
    weights = f"{cost['weights'] / 1e6:,.0f} MB" if cost["weights"] else "not on this machine yet"
    say(
        f"{who.name} of profile {name}: {who.note or who.checkpoint}\n"
        f"{len(texts):,} texts, {len(texts) - len(missing):,} stored, {len(missing):,} to compute; "
        f"{(cost['disk'] or 0) / 1e6:,.1f} MB on disk in {store.features}; weights in memory: {weights}"
    )
    share = missing[state.process_index :: state.num_processes]
    alone = state.num_processes == 1 and state.device.type == "cpu"
    workers = given.workers or (os.cpu_count() or 1 if alone else 1)
    done = extraction.fill(name, who.name, share, store, workers, progress=True)
    state.wait_for_everyone()
    say(
        f"done: {done:,} vectors computed" + (" by this process" if state.num_processes > 1 else "")
    )


if __name__ == "__main__":
    main()
