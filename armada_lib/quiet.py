"""Hugging Face libraries without their bars and advice, where these say nothing that is not known."""

from __future__ import annotations

import importlib
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def libraries(diffusers: bool = False) -> Iterator[None]:
    """Bars, advice and warnings of transformers off, and then as before; of diffusers too, if asked."""
    names = ["transformers", *(["diffusers"] if diffusers else [])]
    found = [importlib.import_module(f"{name}.utils.logging") for name in names]
    before = [(lib, lib.get_verbosity(), lib.is_progress_bar_enabled()) for lib in found]
    for lib in found:
        lib.set_verbosity(logging.ERROR)
        lib.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for lib, level, bar in before:
            lib.set_verbosity(level)
            if bar:
                lib.enable_progress_bar()
