"""The command line: `python -m armada_lib extract ...`, `study ...`, `films ...`, each a call of the library."""

from __future__ import annotations

import argparse
import functools
import os
import sys
from pathlib import Path

import torch
from accelerate import PartialState

from armada_lib import experiment, extraction, films, profiles, specs, working
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
        help="tasks (cola rte ...) and files: .txt one text a line; .csv, .jsonl, .parquet with `text`",
    )
    extract.add_argument("--profile", default=None, help="default: paper with a GPU, else mini")
    extract.add_argument("--workers", type=int, default=None, help="processes; default: one a core")
    extract.add_argument("--store", default=None, help="folder; default: ARMADA_STORE or .armada")
    study = commands.add_parser(
        "study",
        help="run what is missing of a study, here and on other machines",
        description="Run what is missing of a study, in its order. What is stored or committed in "
        "book/results is left alone, and what another worker on the same store computes is left to "
        "it, so that the same command may run on many machines that share a folder, and again after "
        "a kill.",
    )
    study.add_argument("file", help="the study, e.g. params/study.yaml")
    study.add_argument("--workers", type=int, default=1, help="processes of one thread; default: 1")
    study.add_argument("--store", default=None, help="folder; default: ARMADA_STORE or .armada")
    study.add_argument("--stage", default=None, help="only this stage of the study")
    study.add_argument(
        "--all", action="store_true", help="compute what is committed in book/results, too"
    )
    instead = study.add_mutually_exclusive_group()
    instead.add_argument("--list", action="store_true", help="number, key, state, stage and name")
    instead.add_argument("--cell", help="run one cell alone, by number or key, for schedulers")
    instead.add_argument(
        "--repeat",
        metavar="CELL",
        help="compute a finished cell again and compare; stores no result",
    )
    instead.add_argument(
        "--export", action="store_true", help="write the finished cells to book/results"
    )
    unpacked = commands.add_parser(
        "films",
        help="make the files of MM-IMDb from its authors' archive",
        description="Write MM-IMDb's splits from the unpacked archive (mmimdb.tar.gz) to "
        "DATA/mmimdb/mmimdb/, and an index of the posters into the archive's folder, which "
        "ARMADA_POSTERS then names.",
    )
    unpacked.add_argument("archive", help="the folder that holds split.json and dataset/")
    unpacked.add_argument("--data", default=None, help="folder; default: ARMADA_DATA")
    given = parser.parse_args(argv)
    try:
        {"extract": _extract, "study": _study, "films": _films}[given.command](given)
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
    workers = given.workers or (torch.get_num_threads() if alone else 1)
    done = extraction.fill(name, who.name, share, store, workers, progress=True)
    state.wait_for_everyone()
    say(
        f"done: {done:,} vectors computed" + (" by this process" if state.num_processes > 1 else "")
    )


def _study(given: argparse.Namespace) -> None:
    if given.workers < 1:
        raise ValueError(f"--workers must be at least 1, got {given.workers}")
    study, store = experiment.load(given.file), RunStore(given.store)
    specs.need_gpu(profiles.load(study.profile))
    torch.set_num_threads(1)  # as in a pool of workers: the number of threads changes the last bits
    if given.export:
        path, n = experiment.export(study, store)
        print(f"{path}: {n:,} of {len(experiment.cells(study)):,} cells")
        return
    if given.cell is not None:
        job = experiment.pick(study, given.cell)
        kept = {} if given.all else experiment.committed(study)
        if not experiment.stored(job.spec, store) and experiment.anywhere(job.spec) in kept:
            print(f"{job.spec.key} {job.name}: committed, left alone without --all")
            return
        store.check()
        working.run(job.spec, store)
        print(f"{job.spec.key} {job.name}: stored")
        return
    if given.repeat is not None:
        job = experiment.pick(study, given.repeat)
        table, same = working.repeat(job, study, store)
        print(table.to_string(index=False))
        if not same:
            sys.exit(
                f"{job.name}: further apart than the tolerance of {job.spec.training.precision}"
            )
        return
    found = experiment.jobs(study)
    if given.stage is not None:
        profiles.check(given.stage, [s.name for s in study.stages], "stage")
        found = [j for j in found if j.cell.stage == given.stage]
    kept = {} if given.all else experiment.committed(study)
    known = lambda j: "committed" if experiment.anywhere(j.spec) in kept else "missing"
    states = {j.number: known(j) for j in experiment.lacking(found, store)}
    if given.list:
        for j in found:
            state = states.get(j.number, "stored")
            print(j.number, j.spec.key, state, j.cell.stage, j.name, sep="\t")
    else:
        say = functools.partial(print, flush=True)  # a log is read while it grows
        todo = [j for j in found if states.get(j.number) != "committed"]
        if there := len(found) - len(todo):
            say(f"{there:,} cells committed in book/results; --all computes them, too")
        count = working.work(todo, store, given.workers, say)
        print(", ".join(f"{n:,} {what}" for what, n in count.items()))


def _films(given: argparse.Namespace) -> None:
    data = given.data or os.environ.get("ARMADA_DATA")
    if not data:
        raise ValueError("set ARMADA_DATA to the folder of the data, or give --data")
    counts = films.convert(Path(given.archive), Path(data))
    print("; ".join(f"{split}: {n:,} films" for split, n in counts.items()))
    print(f"posters: export ARMADA_POSTERS={Path(given.archive).resolve()}")


if __name__ == "__main__":
    main()
