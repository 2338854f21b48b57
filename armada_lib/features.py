"""The store of teacher vectors: a text is encoded once, kept, and read back memory-mapped.

    <root>/<fingerprint>/meta.json       what stands behind the vectors, for people and tools
                         shards/*.rows   the vectors, in the order they were computed
                         views/*.rows    copies in the order a run reads them; may be deleted

`rowfile` has the format of the files.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from filelock import FileLock
from tqdm import tqdm

from armada_lib import rowfile
from armada_lib.rowfile import DTYPES, KEY, RowFile, publish

if TYPE_CHECKING:
    import torch

SHARD_BYTES, SHARD_ROWS, SHARD_SECONDS = 4 << 20, 256, 30.0


class MissingVectors(LookupError):
    """Texts that were not given to `fill` yet."""


class Store:
    """Vectors of one teacher, `width` wide, one a text, in `root`/`fingerprint`.

    `meta` describes them (teacher, checkpoint ...). Any number of processes may read and fill a
    store at once; a text stored twice is read from the shard first by name, the oldest. A damaged
    file is set aside with a warning, and its texts are missing again. Raises ValueError if the
    store there has another width or dtype.
    """

    def __init__(
        self, root: str | Path, fingerprint: str, width: int, dtype: str = "float16",
        meta: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        if not re.fullmatch(r"\w[\w.-]{0,199}", fingerprint, re.ASCII):
            raise ValueError(
                f"fingerprint {fingerprint!r} cannot name a folder (A-Z a-z 0-9 _ . -)"
            )
        if dtype not in DTYPES:
            raise ValueError(f"unknown dtype {dtype!r}; choose from {', '.join(DTYPES)}")
        if width < 1:
            raise ValueError(f"width must be at least 1, got {width}")
        self.folder, self.width, self.dtype = Path(root) / fingerprint, width, np.dtype(dtype)
        self.files = RowFile(width, self.dtype)
        self.shards, self.views = self.folder / "shards", self.folder / "views"
        self.meta = {**(meta or {}), "fingerprint": fingerprint, "width": width, "dtype": dtype}
        self._keys: dict[str, list[bytes]] = {}  # shard name -> its keys
        self._where: dict[bytes, tuple[str, int]] = {}  # key -> (shard name, row in it)
        self._bad: set[str] = set()
        self._scan()

    def missing(self, texts: Sequence[str]) -> list[str]:
        """Those of `texts` without a sound vector, each once, in order.

        Reads the shards concerned against their digests, once per process.
        """
        places = self._places(_keys(texts))
        return list(dict.fromkeys(t for t, p in zip(texts, places, strict=True) if not p))

    def fill(
        self, texts: Sequence[str], encode: Callable[[list[str]], np.ndarray],
        shard_rows: int | None = None, progress: bool = True,
    ) -> int:  # fmt: skip
        """Encode what is missing and store it; returns how many vectors this call computed.

        encode: list of n texts -> (n, width), finite. One call of it makes one shard, of at most
        `shard_rows` texts (default 256 or 4 MiB) and about half a minute: all that an interruption
        can lose. Processes that fill the same texts share the work and return when all is there.

        Raises ValueError, storing nothing of that call, for vectors that are misshapen, not
        finite, beyond float16, or all the same in a new store; OSError if the folder cannot be
        written to or the disk is full. What was stored before is kept.
        """
        if shard_rows is not None and shard_rows < 1:
            raise ValueError(f"shard_rows must be at least 1, got {shard_rows}")
        missing = self.missing(texts)
        if not missing:
            return 0
        todo = dict(zip(_keys(missing), missing, strict=True))
        limit = shard_rows or max(1, min(SHARD_ROWS, SHARD_BYTES // self.files.row_bytes))
        size, computed = min(limit, 4), 0
        self._prepare()
        with tqdm(total=len(todo), desc="vectors", unit="text", disable=not progress) as bar:
            while todo:
                order, new = list(todo), not self._where
                if new:
                    # Neighbours may share a vector (one long paragraph, cut). Texts far apart that
                    # do show a teacher that does not read them, before it fills the store.
                    order = order[:: max(1, len(order) // max(size, 2))]
                began = time.monotonic()
                with self._claim(order, max(size, 2) if new else size) as keys:
                    if keys:
                        batch = [todo[k] for k in keys]
                        vectors = self._validated(encode(batch), batch, new)
                        name = f"{time.time_ns():020d}-{uuid.uuid4().hex[:8]}"  # by name is by age
                        path = self.shards / f"{name}.rows"
                        self.files.write(path, path.with_suffix(".tmp"), keys, [vectors])
                if keys:
                    computed += len(keys)
                    pace = SHARD_SECONDS / max(time.monotonic() - began, 1e-9)
                    size = max(1, min(limit, int(len(keys) * min(pace, 2))))
                else:  # other processes compute all that is left
                    time.sleep(0.1)
                self._scan()
                todo = {k: t for k, t in todo.items() if k not in self._where}
                bar.update(len(missing) - len(todo) - bar.n)
        return computed

    def gather(self, texts: Sequence[str]) -> np.ndarray:
        """Vectors (n, width) of `texts`, copied to memory. Raises MissingVectors."""
        return self._copy(self._found(texts))

    def matrix(self, texts: Sequence[str]) -> torch.Tensor:
        """Vectors (n, width) in the order of `texts`: one mapped file, not copied to memory.

        The first call for these texts writes the file (n × width × 2 bytes, streamed), later ones
        map it; changing the tensor changes no file. For NumPy add `.numpy()`. Raises
        MissingVectors, and OSError like `fill`.
        """
        import torch

        keys = _keys(texts)
        path = self.views / (hashlib.sha256(b"".join(keys)).hexdigest()[:32] + ".rows")
        if self.files.keys(path) is None:
            places = self._found(texts)
            self._prepare()
            with FileLock(self.folder / "views.lock"):  # a second process waits and finds it
                if self.files.keys(path) is None:
                    step = max(1, SHARD_BYTES // self.files.row_bytes)
                    parts = (places[i : i + step] for i in range(0, len(places), step))
                    # One writer at a time: what a killed one left is overwritten by the next.
                    self.files.write(path, self.views / "next.tmp", keys, map(self._copy, parts))
        size, kind = len(keys) * self.width, getattr(torch, self.dtype.name)
        return torch.from_file(str(path), False, size, dtype=kind).view(len(keys), self.width)

    def verify(self) -> list[str]:
        """Read every shard and view against its digests; returns the damaged ones, set aside."""
        rowfile.forget()
        return [str(p) for p in sorted(self.folder.glob("*/*.rows")) if self.files.keys(p) is None]

    # -- writing -------------------------------------------------------------------------------

    def _prepare(self) -> None:
        for d in (self.shards, self.views):
            d.mkdir(parents=True, exist_ok=True)
        for left in self.shards.glob("*.tmp"):  # of a killed process: a living one renames it soon
            with suppress(FileNotFoundError):
                if time.time() - left.stat().st_mtime > 3600:
                    left.unlink()
        text = json.dumps(self.meta, indent=1, sort_keys=True) + "\n"
        temporary = self.folder / f"{uuid.uuid4().hex}.tmp"
        publish(self.folder / "meta.json", temporary, [text.encode()], len(text))

    @contextmanager
    def _claim(self, order: Iterable[bytes], size: int) -> Iterator[list[bytes]]:
        """The first `size` keys that no other process is computing; claimed inside the context.

        A claim is a lock on one byte of a file, at a place given by the key. The system frees it
        when its process ends, however it ends. Threads of one process do not exclude each other.
        """
        with (self.folder / "claims.lock").open("wb") as f:
            mine: list[bytes] = []
            for key in order:
                try:
                    fcntl.lockf(f, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, int.from_bytes(key[:7]))
                except OSError as e:
                    if e.errno in (errno.EAGAIN, errno.EACCES):
                        continue
                    # A file system without locks: texts computed twice are a waste, not an error.
                mine.append(key)
                if len(mine) == size:
                    break
            self._scan()  # whoever freed a claim since the last look has stored its vectors
            yield [k for k in mine if k not in self._where]

    def _validated(self, vectors: Any, texts: list[str], new: bool) -> np.ndarray:
        x, expected = np.asarray(vectors), (len(texts), self.width)
        if x.shape != expected:
            raise ValueError(f"the teacher returned shape {x.shape}; expected {expected}")
        if not np.can_cast(x.dtype, self.dtype, "same_kind"):
            raise ValueError(f"the teacher returned {x.dtype}; expected {self.dtype}")
        with np.errstate(over="ignore"):  # found below
            out = np.ascontiguousarray(x, self.dtype)
        for values, why in ((x, "is not finite"), (out, f"is beyond {self.dtype}")):
            bad = np.flatnonzero(~np.isfinite(values).all(1))
            if len(bad):
                raise ValueError(
                    f"the teacher's vector {why} for {len(bad)} of {len(texts)} texts; "
                    f"the first: {texts[bad[0]][:80]!r}"
                )
        if new and len(out) > 1 and (out == out[0]).all():
            raise ValueError(f"the teacher gives the same vector for all of {len(out)} texts")
        return out

    # -- reading -------------------------------------------------------------------------------

    def _found(self, texts: Sequence[str]) -> list[tuple[str, int]]:
        places = self._places(_keys(texts))
        if None in places:
            absent = dict.fromkeys(t for t, p in zip(texts, places, strict=True) if not p)
            raise MissingVectors(
                f"{len(absent)} of {len(set(texts))} texts have no vector in {self.folder}; "
                f"the first: {next(iter(absent))[:80]!r}. `fill` computes them."
            )
        return places  # type: ignore[return-value]

    def _places(self, keys: list[bytes]) -> list[tuple[str, int] | None]:
        """(shard, row) of each key in shards that are sound, None where there is none."""
        while True:
            self._scan()
            places = [self._where.get(k) for k in keys]
            touched = {p[0] for p in places if p}
            bad = {n for n in touched if self.files.keys(self.shards / n) is None}
            if not bad:
                return places
            self._bad |= bad

    def _copy(self, places: Sequence[tuple[str, int]]) -> np.ndarray:
        out = np.empty((len(places), self.width), self.dtype)
        by_shard: dict[str, list[tuple[int, int]]] = {}
        for i, (name, row) in enumerate(places):
            by_shard.setdefault(name, []).append((i, row))
        for name, pairs in by_shard.items():  # mapped and let go: a mapping holds a descriptor
            to, rows = np.array(pairs).T
            shape = (len(self._keys[name]), self.width)
            out[to] = np.memmap(self.shards / name, self.dtype, "r", shape=shape)[rows]
        return out

    def _scan(self) -> None:
        """Index the shards that appeared; start again if one is gone."""
        names: set[str] = set()
        with suppress(FileNotFoundError):
            names = {n for n in os.listdir(self.shards) if n.endswith(".rows")} - self._bad
        if self._keys.keys() - names:
            self._keys, self._where = {}, {}
        for name in sorted(names - self._keys.keys()):
            keys = self.files.keys(self.shards / name, matrix=False)
            if keys is None:
                self._bad.add(name)
                continue
            self._keys[name] = keys
            for row, key in enumerate(keys):
                if self._where.setdefault(key, (name, row))[0] > name:
                    self._where[key] = (name, row)


def moments(matrix: Any, chunk_bytes: int = 8 << 20) -> tuple[np.ndarray, np.ndarray]:
    """Mean and (population) standard deviation of each dimension, float64 (width,) each.

    matrix: (n, width), array or tensor, may be mapped. Read in chunks that are merged as in Chan,
    Golub and LeVeque (1983), so neither memory nor rounding grows with n. Raises ValueError if
    n is 0.
    """
    n, width = matrix.shape
    if not n:
        raise ValueError("no rows: mean and standard deviation need at least one")
    mean, square, step = np.zeros(width), np.zeros(width), max(1, chunk_bytes // (8 * width))
    for seen in range(0, n, step):
        part = matrix[seen : seen + step]
        x = np.array(part.numpy() if hasattr(part, "numpy") else part, np.float64)
        here, total = x.mean(0), seen + len(x)
        x -= here
        delta = here - mean
        square += np.square(x, out=x).sum(0) + delta**2 * (seen * len(x) / total)
        mean += delta * (len(x) / total)
    return mean, np.sqrt(square / n)


def _keys(texts: Sequence[str]) -> list[bytes]:
    if isinstance(texts, str) or not len(texts):
        raise ValueError("texts must be a list of at least one text")
    for i, t in enumerate(texts):
        if not isinstance(t, str) or not t.strip():
            raise ValueError(f"text {i} of {len(texts)} is {t!r}: a teacher needs words")
    return [hashlib.sha256(t.encode()).digest()[:KEY] for t in texts]
