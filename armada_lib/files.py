"""Files that are complete or absent."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor


class Damaged(ValueError):
    """A file that does not hold what was written to it; it is removed."""


def write_text(path: Path, text: str) -> Path:
    """Write a text file, its line ends as they are: to a temporary file, then renamed. Returns `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8", newline="")
    return temporary.replace(path)


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, str], what: str
) -> None:
    """Write a safetensors file with metadata `about`: to a temporary file, synced, then renamed.

    Raises OSError, "`what` could not be written to ...", with nothing half-written left.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        save_file(dict(tensors), temporary, metadata=dict(about))
        with temporary.open("rb") as f:
            os.fsync(f.fileno())
        temporary.replace(path)
    except Exception as e:  # safetensors has its own error for a full disk
        temporary.unlink(missing_ok=True)
        raise OSError(f"{what} could not be written to {path}: {e}") from e


def keep_tensors(
    path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, str], what: str
) -> None:
    """`write_tensors`, with a digest of the contents, for `kept_tensors`."""
    write_tensors(path, tensors, {"digest": digest(tensors), **about}, what)


def kept_tensors(path: Path, about: Mapping[str, str]) -> dict[str, Tensor]:
    """What `keep_tensors` wrote with this `about`. Raises FileNotFoundError and `Damaged`."""
    if not path.exists():
        raise FileNotFoundError(f"{path} is not there")
    try:
        with safe_open(path, "pt") as f:
            meta = f.metadata()
            tensors = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118
        wanted = {"digest": digest(tensors), **about}
        if meta != wanted:
            raise ValueError(f"{meta} stands where {wanted} should")
        return tensors
    except Exception as e:  # whatever is wrong with it, it must not be used
        path.unlink(missing_ok=True)
        raise Damaged(f"{path} is damaged and was removed ({e})") from e


def digest(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over names, shapes and numbers."""
    h = hashlib.sha256()
    for name in sorted(tensors):
        h.update(f"{name} {tuple(tensors[name].shape)}".encode())
        h.update(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
    return h.hexdigest()
