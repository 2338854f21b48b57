"""Black-box teachers: whatever returns a picture or a sound for a text, and nothing else.

What came back is kept in a collection (`collection.py`), and a fixed encoder (`encoders.py`) turns
it into a vector. The sources differ only in how they fill what a collection lacks.
"""

from __future__ import annotations

import functools
import io
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from armada_lib import profiles
from armada_lib.teacher_settings import BlackboxSpec
from armada_lib.teachers import encoders, image, service
from armada_lib.teachers.collection import Collection, store
from armada_lib.teachers.common import check_texts, check_vectors, digest

RECIPE = "blackbox-1"  # raise it when code in encoders.py or audio.encoder changes the vectors


class Refused(LookupError):
    """Texts for which the service would not make anything."""


class BlackboxTeacher:
    """A collection, what fills it, and an encoder. See `armada_lib.teachers`.

    `fill(texts)` adds an answer for every text to the collection, or raises; None: nothing does.
    `alone`: only one process may fill at a time (asking twice would cost twice). `ready()` raises
    if `fill` could not start.
    """

    def __init__(
        self, name: str, encoder: encoders.Encoder, collection: Collection, fingerprint: str,
        fill: Callable[[list[str]], None] | None = None, ready: Callable[[], Any] | None = None,
        alone: bool = True, batch_size: int = 32, device: str = "cpu",
    ) -> None:  # fmt: skip
        self.name, self.width, self.fingerprint = name, encoder.width, fingerprint
        self.encoder, self.collection, self.device = encoder, collection, device
        # Sounds differ in length: padding would change them.
        self.batch_size = batch_size if encoder.reads == "picture" else 1
        self._fill, self._ready, self._alone = fill, ready, alone

    def check(self, texts: Sequence[str]) -> None:
        """Raise what would stop `collect` at once: ValueError for texts without a file or a key."""
        check_texts(list(texts))
        self.collection.read()
        missing = self.collection.missing(texts)
        if missing and self._fill is None:
            raise ValueError(
                f"{len(missing)} of {len(set(texts))} texts have no file in "
                f"{self.collection.folder}; the first: {missing[0][:80]!r}"
            )
        if missing and self._ready is not None:
            self._ready()

    def collect(self, texts: Sequence[str]) -> list[str]:
        """Fill what the collection lacks; returns those of `texts` that were not refused.

        Raises what `check` raises and the source's errors (`service.ServiceError` of an api); what
        came back before is kept. A killed process loses at most the calls in flight.
        """
        self.check(texts)
        if self.collection.missing(texts) and self._fill is not None:
            with self.collection.filling(texts, self._alone) as missing:
                if missing:
                    self._fill(missing)
        return [t for t in texts if self.collection.entries[t] is not None]

    def refused(self, texts: Sequence[str]) -> list[str]:
        """Those of `texts` that are known to get no answer; asks for nothing."""
        self.collection.read()
        return [t for t in texts if self.collection.entries.get(t, "") is None]

    def encode(self, texts: list[str]) -> np.ndarray:
        """Vectors of `texts`, float16 (n, width), of what came back; missing answers are collected.

        Raises what `collect` raises; Refused for a text without an answer; ValueError, naming the
        file, for one that cannot be read; FloatingPointError for a vector that is not finite.
        """
        there = self.collect(texts)
        if len(there) < len(texts):
            raise Refused(
                f"{len(texts) - len(there)} of {len(texts)} texts were refused, the first: "
                f"{self.refused(texts)[0][:80]!r}; `collect` returns the others"
            )
        out = np.empty((len(texts), self.width), np.float16)
        for at in range(0, len(texts), self.batch_size):
            part = list(texts[at : at + self.batch_size])
            try:
                vectors = self._read([self._open(self.collection.path(t)) for t in part])
            except ValueError as e:  # such as a silent sound; sounds are read one at a time
                if self.encoder.reads == "picture":
                    raise
                raise ValueError(f"{self.collection.path(part[0])}: {e}") from None
            with np.errstate(over="ignore"):  # reported as not finite below
                out[at : at + len(part)] = vectors
            check_vectors(out[at : at + len(part)], part, self.name)
        return out

    def truncated(self, texts: list[str]) -> int:
        """0: how much of a text a black box reads cannot be known."""
        return 0

    @functools.cached_property
    def _read(self) -> encoders.Read:
        return self.encoder.load(self.device)

    def _open(self, path: Path) -> Any:
        try:
            data = path.read_bytes()
            return (
                encoders.picture(data)[0]
                if self.encoder.reads == "picture"
                else encoders.sound(data)
            )
        except (OSError, encoders.NotReadable) as e:
            raise ValueError(f"{path} {e}") from None


# -- sources -----------------------------------------------------------------------------------


def fingerprint(spec: BlackboxSpec, device: str = "cpu") -> str:
    """sha256 over all that changes the vectors; asks nobody, loads no weights, knows no key.

    Of an api: its address, model and size; of a painter: its fingerprint; of a folder: its texts
    and files. Raises ValueError for a folder whose index or files are not in order.
    """
    asked = _source(spec, device) or {"content": _collection(spec, device).digest()}
    return _fingerprint(asked, encoders.identity(spec.encoder, spec.encoder_revision))


def load(
    spec: BlackboxSpec, device: str = "cpu",
    paint: Callable[[list[str]], list[Image.Image]] | None = None,
) -> BlackboxTeacher:  # fmt: skip
    """See `armada_lib.teachers.load`. `paint` stands in for the pictures of `spec.painter`."""
    encoder = encoders.get(spec.encoder, spec.encoder_revision)
    if spec.width != encoder.width:
        raise ValueError(
            f"teacher {spec.name!r}: encoder {spec.encoder!r} gives {encoder.width} numbers; its "
            f"width is set to {spec.width}"
        )
    if spec.source != "folder" and encoder.reads != "picture":
        raise ValueError(f"teacher {spec.name!r}: {spec.encoder!r} reads sounds, not pictures")
    collection = _collection(spec, device)
    fill: Callable[[list[str]], None] | None = None
    ready: Callable[[], Any] | None = None
    if spec.source == "api":
        ready = functools.partial(service.Service, spec)
        fill = lambda texts: service.Service(spec).ask(texts, collection)
    elif spec.source == "painter":
        fill = functools.partial(_paint, spec, device, collection, paint)
    return BlackboxTeacher(
        spec.name, encoder, collection, fingerprint(spec, device), fill, ready,
        # A painter costs time only, and two processes are meant to share its work.
        alone=spec.source == "api", batch_size=spec.batch_size, device=device,
    )  # fmt: skip


def refused(spec: BlackboxSpec, texts: Sequence[str], device: str = "cpu") -> list[str]:
    """Those of `texts` that are known to get no answer; loads nothing and asks nobody."""
    entries = _collection(spec, device).entries
    return [t for t in texts if entries.get(t, "") is None]


def from_callable(
    function: Callable[[str], Any], name: str, folder: str | Path | None = None,
    encoder: str = "efficientnet-lite0", version: str = "1", device: str = "cpu",
) -> BlackboxTeacher:  # fmt: skip
    """A teacher of any Python function from a text to a picture or a sound.

    It returns a PIL image, or (waveform (samples,) of floats, rate in Hz), or None to refuse; of
    anything that `encoder` does not read the teacher raises ValueError. It is called once a text;
    what it returned is kept in `folder` (None: in the store). `version` is part of the fingerprint:
    change it, and the folder, when the function changes.
    """
    chosen = encoders.get(encoder)
    source = {"callable": name, "version": version}
    collection = Collection(folder or _default(source, "callable"), source)

    def fill(texts: list[str]) -> None:
        for text in texts:
            made = function(text)
            if made is None:
                collection.refuse(text, "the function returned None")
            elif chosen.reads == "picture" and isinstance(made, Image.Image):
                collection.add(text, _png(made), ".png")
            elif chosen.reads == "sound" and isinstance(made, tuple) and len(made) == 2:
                collection.add(text, encoders.wav(*made), ".wav")
            else:
                kind = "a PIL image" if chosen.reads == "picture" else "(waveform, rate)"
                raise ValueError(
                    f"{name!r} must return {kind} for the encoder {encoder!r}; for {text[:60]!r} it "
                    f"returned {type(made).__name__}"
                )

    mark = _fingerprint(source, encoders.identity(encoder))
    return BlackboxTeacher(name, chosen, collection, mark, fill, device=device)


def _paint(
    spec: BlackboxSpec, device: str, collection: Collection,
    paint: Callable[[list[str]], list[Image.Image]] | None, texts: list[str],
) -> None:  # fmt: skip
    assert spec.painter is not None
    paint = paint or image.load(spec.painter, device).paint
    for at in range(0, len(texts), spec.batch_size):
        part = texts[at : at + spec.batch_size]
        for text, made in zip(part, paint(part), strict=True):
            collection.add(text, _png(made), ".png")


def _source(spec: BlackboxSpec, device: str) -> dict[str, Any] | None:
    """Whom the texts are given to; None for a folder made before."""
    if spec.source == "api":
        where = service.endpoint(spec.base_url or "")[1]
        return {"api": where, "model": spec.model, "size": spec.size}
    if spec.source == "painter":
        assert spec.painter is not None
        return {"painter": image.fingerprint(spec.painter, device)}
    return None


def _collection(spec: BlackboxSpec, device: str) -> Collection:
    source = _source(spec, device)
    if spec.folder is None:
        assert source is not None
        return Collection(_default(source, spec.source), source)
    for name in re.findall(r"\$\{?(\w+)\}?", spec.folder):
        if not os.environ.get(name):
            raise ValueError(
                f"teacher {spec.name!r}: folder {spec.folder!r} needs the environment variable {name}"
            )
    # Relative to the project, not to where a command was typed: else texts are paid for twice.
    folder = profiles.ROOT / Path(os.path.expandvars(spec.folder)).expanduser()
    return Collection(folder, source)


def _default(source: dict[str, Any], kind: str) -> Path:
    return store() / "collections" / f"{kind}-{digest(source)[:16]}"


def _fingerprint(source: dict[str, Any], encoder: str) -> str:
    return digest({"recipe": RECIPE, "source": source, "encoder": encoder})


def _png(picture: Image.Image) -> bytes:
    out = io.BytesIO()
    encoders.rgb(picture).save(out, "PNG")
    return out.getvalue()
