"""Chapters are run while pages are read, several at a time, each in a kernel of its own.

Reading a page waits for its chapter and takes the outputs from jupyter-cache. What an earlier build left there is
thrown away first, so that a page always shows a run of the library, parameters and data as they are:
results are kept in the store of runs, never as cells.
"""

from __future__ import annotations

import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import nbformat
from jupyter_cache import get_cache
from jupyter_cache.base import CacheBundleIn
from jupyter_cache.executors.utils import single_nb_execution
from nbclient import NotebookClient
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


def share(n: int) -> None:
    """Leave each of `n` chapters its part of the cores: more threads than cores wait for each other."""
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // n)))


def execute(path: Path, timeout: int) -> tuple[nbformat.NotebookNode, float, str | None]:
    """(notebook with outputs, seconds, traceback of the cell that failed)."""
    notebook = nbformat.read(path, as_version=4)
    done = single_nb_execution(notebook, str(path.parent), timeout, allow_errors=False)
    return done.nb, done.time, done.exc_string


def start(app: Any, env: Any, docnames: list[str]) -> None:
    """Begin to run the chapters among the pages to be read, in that order."""
    paths = {d: p for d in docnames if (p := Path(env.doc2path(d))).suffix == ".ipynb"}
    app.armada_running = {}
    if not paths:
        return
    get_cache(env.mystnb_config.execution_cache_path).clear_cache()
    n = min(at_a_time(), len(paths))
    logging.getLogger(__name__).info("running %d chapters, %d at a time", len(paths), n)
    app.armada_pool = ProcessPoolExecutor(n, initializer=share, initargs=(n,))
    for docname, path in paths.items():
        begun = app.armada_pool.submit(execute, path, app.config.nb_execution_timeout)
        app.armada_running[docname] = path, begun


def await_chapter(app: Any, docname: str, source: list[str]) -> None:
    """Before a page is read: have its chapter's outputs; before the introduction, those of all.

    The introduction shows figures, a sentence and counts that other pages make. Raises ExtensionError
    with the traceback for a chapter that failed; those under way are ended first, no other is begun.
    """
    running = app.armada_running
    for name in list(running) if docname == app.config.root_doc else {docname} & set(running):
        path, begun = running.pop(name)
        notebook, seconds, failure = begun.result()
        if failure:
            app.armada_pool.shutdown(cancel_futures=True)
            raise ExtensionError(f"{path} failed:\n{failure}")
        cache = get_cache(app.env.mystnb_config.execution_cache_path)
        kept = CacheBundleIn(notebook, str(path), data={"execution_seconds": seconds})
        cache.cache_notebook_bundle(kept, check_validity=False, overwrite=True)


def side_by_side(app: Any, env: Any) -> None:
    """Have pages written by several processes, too. Not every extension can be read so."""
    app.parallel = at_a_time()


def setup(app: Any) -> dict[str, bool]:
    """Register with Sphinx."""
    # A kernel whose outputs are all here need not take its libraries down one by one: a second a page.
    NotebookClient.shutdown_kernel.default_value = "immediate"
    app.connect("env-before-read-docs", start)
    app.connect("source-read", await_chapter)
    app.connect("env-updated", side_by_side)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
