"""Files of vectors: complete or absent, checked against their digests, mapped as they are.

A `.rows` file is the raw matrix (rows, width), then a 16-byte key a row (sha256 of the text), then
sizes and digests. It is written under another name, synced and renamed. The matrix comes first so
that a mapping of the file is the matrix.
"""

from __future__ import annotations

import hashlib
import logging
import os
import struct
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

log = logging.getLogger(__name__)

MAGIC, KEY, DTYPES = b"ARMADAv1", 16, ("float16", "float32")
HEAD = struct.Struct("<8s8sQQ32s")  # magic, dtype, rows, width, sha256 of the matrix ...
TAIL = HEAD.size + 32  # ... and the sha256 of keys and head
_checked: dict[str, tuple[int, ...]] = {}  # path -> state of the files this process read in full


class _Damaged(Exception):
    pass


def forget() -> None:
    """Read every file again that this process has checked."""
    _checked.clear()


@dataclass(frozen=True)
class RowFile:
    """The files of one store: vectors `width` wide, of one dtype."""

    width: int
    dtype: np.dtype[Any]

    @property
    def row_bytes(self) -> int:
        return self.width * self.dtype.itemsize

    def write(
        self, path: Path, temporary: Path, keys: list[bytes], blocks: Iterable[np.ndarray]
    ) -> None:
        """Write blocks of vectors (rows, width) with their keys to `path`, by way of `temporary`."""

        def parts() -> Iterator[Any]:
            digest = hashlib.sha256()
            for block in blocks:
                raw = block.data.cast("B")
                digest.update(raw)
                yield raw
            head = (MAGIC, self.dtype.name.encode(), len(keys), self.width, digest.digest())
            end = b"".join(keys) + HEAD.pack(*head)
            yield end + hashlib.sha256(end).digest()

        publish(path, temporary, parts(), len(keys) * (self.row_bytes + KEY) + TAIL)

    def keys(self, path: Path, matrix: bool = True) -> list[bytes] | None:
        """The keys of a file, or None if it is absent or damaged (then it is set aside).

        Its matrix is read against its digest once per process; `matrix=False` leaves that for
        later. Raises ValueError for a sound file of another width or dtype.
        """
        try:
            with path.open("rb") as f:
                return self._check(path, f, matrix)
        except FileNotFoundError:  # never there, or set aside by another process
            return None
        except _Damaged as e:
            log.warning("%s is damaged (%s): set aside, to be computed again", path, e)
            with suppress(OSError):  # a store that may only be read: not using it is enough
                path.replace(path.with_suffix(".damaged"))
            return None

    def _check(self, path: Path, f: Any, matrix: bool) -> list[bytes]:
        stat = os.fstat(f.fileno())
        size, state = stat.st_size, (stat.st_ino, stat.st_size, stat.st_mtime_ns)
        f.seek(max(0, size - TAIL))
        tail = f.read()
        if len(tail) != TAIL or not tail.startswith(MAGIC):
            raise _Damaged("cut short")
        _, kind, rows, width, digest = HEAD.unpack(tail[: HEAD.size])
        f.seek(max(0, size - TAIL - rows * KEY))
        keys = f.read(min(rows * KEY, size))
        if hashlib.sha256(keys + tail[: HEAD.size]).digest() != tail[HEAD.size :]:
            raise _Damaged("keys or sizes do not match their checksum")
        dtype = kind.rstrip(b"\0").decode()
        if (width, dtype) != (self.width, self.dtype.name):
            raise ValueError(
                f"{path.parents[1]} holds {dtype} vectors, {width} wide; "
                f"asked for {self.dtype}, {self.width} wide"
            )
        if size != rows * (self.row_bytes + KEY) + TAIL:
            raise _Damaged(f"{size:,} bytes do not fit {rows:,} rows")
        if matrix and _checked.get(str(path)) != state:
            left, found = rows * self.row_bytes, hashlib.sha256()
            f.seek(0)
            while left and (block := f.read(min(left, 1 << 20))):
                found.update(block)
                left -= len(block)
            if found.digest() != digest:
                raise _Damaged("its data do not match their checksum")
            _checked[str(path)] = state
        return [keys[i : i + KEY] for i in range(0, len(keys), KEY)]


def publish(path: Path, temporary: Path, parts: Iterable[Any], need: int) -> None:
    """Write, sync, rename, sync the folder; if anything fails, nothing of it is left."""
    try:
        with temporary.open("wb") as f:
            for part in parts:
                f.write(part)
            f.flush()
            os.fsync(f.fileno())
        temporary.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
    except BaseException as e:
        with suppress(OSError):
            temporary.unlink()
        if not isinstance(e, OSError):
            raise
        why = f"{path.parent} cannot be written to: {e.strerror or e} ({need:,} bytes needed)"
        raise OSError(e.errno, why) from e
