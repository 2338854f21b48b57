"""Files that are complete or absent."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor


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
