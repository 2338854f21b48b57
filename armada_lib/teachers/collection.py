"""Collections: what came back for each text, in a folder with an append-only index.

    <folder>/index.jsonl       {"text": ..., "file": ...} or {"text": ..., "refused": reason} a line
             files/            one file a text; any place below the folder will do
             collection.json   whom the texts were given to
             calls.log         a + for every call that may be billed, a - for one that was not

A folder made by hand has the index and the files; its index may be `index.csv` with the columns
text and file.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import json
import logging
import os
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from filelock import FileLock, Timeout

from armada_lib import profiles

log = logging.getLogger(__name__)


def store() -> Path:
    """The folder of what this machine keeps: `ARMADA_STORE`, else .armada in the project."""
    return Path(os.environ.get("ARMADA_STORE") or profiles.ROOT / ".armada")


class Collection:
    """What came back for each text, in `folder`. With a `source` it may grow, else it is read only.

    Any number of processes may add to it. A line is synced before `add` returns; the torn last line
    of a killed process is dropped. Raises ValueError for an index that is wrong, naming the line,
    and for a folder that holds the answers of another source.
    """

    def __init__(self, folder: str | Path, source: dict[str, Any] | None = None) -> None:
        self.folder, self.source = Path(folder), source
        self.index, self.files = self.folder / "index.jsonl", self.folder / "files"
        self.entries: dict[str, str | None] = {}  # text -> its file, or None: refused
        self._read_to, self._line, self._spent = 0, 0, -1
        self._mutex = threading.RLock()
        about = self.folder / "collection.json"
        if source is not None and about.exists():
            other = json.loads(about.read_text(encoding="utf-8"))
            if other != source:
                raise ValueError(f"{self.folder} holds the answers of {other}, not of {source}")
        self.read()

    # -- reading -------------------------------------------------------------------------------

    def read(self) -> None:
        """Take in what the index holds by now. Raises ValueError if it is wrong, or none is there
        and none may be made.
        """
        table = self.folder / "index.csv"
        with self._mutex:
            if table.exists():
                self._read_table(table)
                return
            if not self.index.exists():
                if self.source is None:
                    raise ValueError(f"{self.folder} holds neither index.jsonl nor index.csv")
                return
            with self.index.open("rb") as f:
                f.seek(self._read_to)
                data = f.read()
            whole = data.rfind(b"\n") + 1
            if self.source is None and _record(data[whole:]) is not None:
                whole = len(data)  # a hand that ended its last line with no newline
            for line in data[:whole].splitlines():
                self._line += 1
                if line.strip():
                    self._take(_record(line), self.index)
            self._read_to += whole

    def _read_table(self, table: Path) -> None:
        if self.source is not None or self.index.exists():
            raise ValueError(f"{table} cannot be added to, nor stand beside {self.index.name}")
        if self.entries:
            return
        rows = csv.DictReader(io.StringIO(table.read_text(encoding="utf-8-sig"), newline=""))
        if not {"text", "file"} <= set(rows.fieldnames or ()):
            raise ValueError(f"{table} must have the columns text and file, got {rows.fieldnames}")
        for row in rows:
            self._line = rows.line_num
            self._take({k: row[k] for k in ("text", "file")}, table)

    def _take(self, record: dict[str, Any] | None, index: Path) -> None:
        where = f"{index}, line {self._line}"
        if record is None:
            raise ValueError(f"{where} is not a JSON object")
        text, file, reason = (record.get(k) for k in ("text", "file", "refused"))
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{where}: `text` must hold words")
        if (file is None) == (reason is None) or not isinstance(file or reason, str):
            raise ValueError(
                f"{where}: either `file` (a path) or `refused` (a reason), as a string"
            )
        if file and (PurePosixPath(file).is_absolute() or ".." in PurePosixPath(file).parts):
            raise ValueError(f"{where}: {file!r} is not below the folder")
        if text in self.entries:
            raise ValueError(f"{where}: a second entry for {text[:60]!r}")
        self.entries[text] = file

    def missing(self, texts: Sequence[str]) -> list[str]:
        """Those of `texts` that were not answered yet, each once, in order."""
        return [t for t in dict.fromkeys(texts) if t not in self.entries]

    def path(self, text: str) -> Path:
        """The file of an answered text. Raises ValueError if it is not there."""
        path = self.folder / (self.entries[text] or "")
        if not path.is_file():
            raise ValueError(f"{path}, which the index names for {text[:60]!r}, is not there")
        return path

    def digest(self) -> str:
        """sha256 over all texts and the bytes of their files; unchanged files are read once."""
        where = str(self.folder.resolve()).encode()
        kept = store() / "collections" / "digests" / f"{hashlib.sha256(where).hexdigest()}.json"
        known: dict[str, Any] = {}
        with contextlib.suppress(OSError, ValueError):
            known = json.loads(kept.read_text())
        found, rows = {}, []
        for text, file in sorted(self.entries.items()):
            content = "refused"
            if file is not None:
                stat = self.path(text).stat()
                state = [stat.st_size, stat.st_mtime_ns]
                before = known.get(file)
                content = before[1] if before and before[0] == state else _sha(self.path(text))
                if time.time_ns() - stat.st_mtime_ns > 2e9:  # a newer one may change unnoticed
                    found[file] = [state, content]
            rows.append([text, content])
        if found != known:
            with contextlib.suppress(OSError):  # only a cache
                kept.parent.mkdir(parents=True, exist_ok=True)
                _write(kept, json.dumps(found).encode())
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()

    # -- writing -------------------------------------------------------------------------------

    @contextlib.contextmanager
    def filling(self, texts: Sequence[str], alone: bool) -> Iterator[list[str]]:
        """Those of `texts` still missing; `alone` keeps other processes from asking meanwhile."""
        self.files.mkdir(parents=True, exist_ok=True)
        if not (self.folder / "collection.json").exists():
            _write(self.folder / "collection.json", json.dumps(self.source).encode())
        for left in self.files.glob("*.tmp"):  # of a killed process: a living one renames it soon
            with contextlib.suppress(FileNotFoundError):
                if time.time() - left.stat().st_mtime > 3600:
                    left.unlink()
        with self._alone() if alone else contextlib.nullcontext():
            self._spent = -1
            with FileLock(self.folder / "index.lock"):
                self._mend()
            # A file whose line was not written before the process was killed is an answer as well.
            kept = {p.stem: p for p in self.files.iterdir() if p.suffix != ".tmp"}
            for text in self.missing(texts):
                if found := kept.get(_key(text)):
                    self._append({"text": text, "file": f"files/{found.name}"})
            yield self.missing(texts)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        lock = FileLock(self.folder / "filling.lock")
        try:
            lock.acquire(blocking=False)
        except Timeout:
            log.info("another process fills %s: waiting for it", self.folder)
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def add(self, text: str, data: bytes, suffix: str) -> None:
        """Keep `data` as the answer to `text`: first the file, then its line, both synced."""
        path = self.files / f"{_key(text)}{suffix}"
        _write(path, data)
        self._append({"text": text, "file": f"files/{path.name}"})

    def refuse(self, text: str, reason: str) -> None:
        """Note that there is no answer to `text` and never will be."""
        self._append({"text": text, "refused": reason or "no reason given"})

    def _append(self, record: dict[str, str]) -> None:
        line = json.dumps(record, ensure_ascii=False).encode() + b"\n"
        with self._mutex, FileLock(self.folder / "index.lock"):
            self._mend()
            if record["text"] in self.entries:
                return
            new = not self.index.exists()
            with self.index.open("ab") as f:
                f.write(line)
                f.flush()
                os.fsync(f.fileno())
            if new:
                _sync(self.folder)
            self.read()

    def _mend(self) -> None:
        """Read, and end or drop a last line with no newline; needs the lock of the index."""
        self.read()
        if not self.index.exists():
            return
        with self.index.open("r+b") as f:
            f.seek(self._read_to)
            tail = f.read()
            if tail and _record(tail) is None:
                log.warning("%s: the torn last line of a killed process is dropped", self.index)
                f.truncate(self._read_to)
            elif tail:
                f.write(b"\n")
        if tail:
            self.read()

    def spend(self, limit: int) -> bool:
        """Count one more call, unless `limit` calls were made; the count outlives the process."""
        with self._mutex:
            if self._spent < 0:
                ledger = self.folder / "calls.log"
                made = ledger.read_bytes() if ledger.exists() else b""
                self._spent = made.count(b"+") - made.count(b"-")
            return self._spent < limit and self._count("+")

    def refund(self) -> None:
        """Take back one call that was surely not billed."""
        with self._mutex:
            self._count("-")

    def _count(self, sign: str) -> bool:
        self._spent += 1 if sign == "+" else -1
        with (self.folder / "calls.log").open("a") as f:
            f.write(sign)
            f.flush()
            os.fsync(f.fileno())
        return True


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(line.decode("utf-8-sig"))
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _key(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _sha(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _write(path: Path, data: bytes) -> None:
    """Write under another name, sync, rename: complete or absent."""
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync(path.parent)


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)
