"""Chapters are run while pages are read, several at a time, each in a kernel of its own.

Reading a page waits for its chapter and takes the outputs from jupyter-cache. What an earlier build
left there is thrown away first, so that a page always shows a run of the library, parameters and data
as they are: results are kept in the store of runs, never as cells.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import nbformat
from jupyter_cache import get_cache
from jupyter_cache.base import CacheBundleIn
from jupyter_cache.executors.utils import single_nb_execution
from jupyter_client import AsyncKernelManager
from sphinx.errors import ExtensionError
from sphinx.util import logging

NVIDIA = Path("/proc/driver/nvidia/version")  # as the library tells which profile is the default


def at_a_time() -> int:
    """`ARMADA_CHAPTERS`; else 2, of which one computes while the other starts or draws, or 1 on a GPU.

    Raises ExtensionError for anything but a whole number from 1.
    """
    said = os.environ.get("ARMADA_CHAPTERS") or ("1" if NVIDIA.exists() else "2")
    if not said.isdecimal() or int(said) < 1:
        raise ExtensionError(f"ARMADA_CHAPTERS is {said!r}: give a whole number from 1")
    return int(said)


class OverFiles(AsyncKernelManager):
    """A kernel that is spoken to over files: a port that was free when it was chosen may be taken when it is bound."""

    def __init__(self, **options: Any):
        self.folder = tempfile.TemporaryDirectory(prefix="armada-")
        file = os.path.join(self.folder.name, "kernel.json")
        super().__init__(transport="ipc", connection_file=file, **options)


def begin(threads: int, ended: Event) -> None:
    """In a process that runs chapters: how many threads they get, and whether the build has ended."""
    global build_ended
    build_ended = ended
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))


def execute(path: Path, timeout: int) -> tuple[nbformat.NotebookNode, float, str | None]:
    """(notebook with outputs, seconds, traceback of the cell that failed)."""
    notebook = nbformat.read(path, as_version=4)
    if build_ended.is_set():  # the interpreter waits for all that was handed to the pool
        return notebook, 0.0, "not run, since the build has ended"
    done = single_nb_execution(
        notebook, str(path.parent), timeout, allow_errors=False, kernel_manager_class=OverFiles,
        shutdown_kernel="immediate",  # one whose outputs are all here need not take its libraries down
    )  # fmt: skip
    return done.nb, done.time, done.exc_string


class Running:
    """The chapters among the pages to be read, begun in that order."""

    def __init__(self, app: Any, docnames: list[str]):
        paths = {d: p for d in docnames if (p := Path(app.env.doc2path(d))).suffix == ".ipynb"}
        self.begun: dict[str, tuple[Path, Future]] = {}
        if not paths:
            return
        self.cache = get_cache(app.env.mystnb_config.execution_cache_path)
        self.cache.clear_cache()
        n = min(at_a_time(), len(paths))
        logging.getLogger(__name__).info("running %d chapters, %d at a time", len(paths), n)
        # forked processes would share the event loop of this one, if it has one
        fresh = multiprocessing.get_context("spawn")
        self.ended = fresh.Event()
        # more threads than cores would wait for each other
        threads = max(1, (os.cpu_count() or 1) // n)
        pool = ProcessPoolExecutor(n, fresh, initializer=begin, initargs=(threads, self.ended))
        for docname, path in paths.items():
            task = pool.submit(execute, path, app.config.nb_execution_timeout)
            self.begun[docname] = path, task

    def take(self, docname: str) -> None:
        """Wait for a chapter and put its outputs where its page is read from.

        Raises ExtensionError with the traceback if it failed.
        """
        path, task = self.begun[docname]
        notebook, seconds, failure = task.result()
        if failure:
            raise ExtensionError(f"{path} failed:\n{failure}")
        kept = CacheBundleIn(notebook, str(path), data={"execution_seconds": seconds})
        self.cache.cache_notebook_bundle(kept, check_validity=False, overwrite=True)
        del self.begun[docname]

    def end(self) -> None:
        """Begin no further chapter; those under way end by themselves, or with Ctrl-C."""
        if self.begun:
            self.ended.set()


def start(app: Any, env: Any, docnames: list[str]) -> None:
    """Begin to run the chapters."""
    app.armada_running = Running(app, docnames)


def await_chapter(app: Any, docname: str, source: list[str]) -> None:
    """Before a page is read: have its chapter's outputs; before the introduction, those of all.

    The introduction shows figures, a sentence and counts that other pages make.
    """
    running = app.armada_running
    whole = docname == app.config.root_doc
    try:
        for name in list(running.begun) if whole else {docname} & set(running.begun):
            running.take(name)
    except BaseException:  # Ctrl-C, too: no chapter must begin after it
        running.end()
        raise


def end(app: Any, exception: Exception | None) -> None:
    """After a page that cannot be read no other chapter is begun."""
    if hasattr(app, "armada_running"):
        app.armada_running.end()


def side_by_side(app: Any, env: Any) -> None:
    """Have pages written by several processes, too. Not every extension can be read so."""
    app.parallel = at_a_time()


def setup(app: Any) -> dict[str, bool]:
    """Register with Sphinx."""
    app.connect("env-before-read-docs", start)
    app.connect("source-read", await_chapter)
    app.connect("env-updated", side_by_side)
    app.connect("build-finished", end)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
