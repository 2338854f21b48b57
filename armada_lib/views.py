"""What a teacher makes of a text, to be looked at, and what of the text its vectors keep."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image

from armada_lib import extraction, features, profiles, run_data, specs, stats, teachers
from armada_lib.files import Damaged, keep_tensors, kept_tensors
from armada_lib.results import RunStore
from armada_lib.teachers import encoders
from armada_lib.teachers.sound import spectrogram

Shown = list[Any]  # PIL pictures (the frames of a film), or one spectrogram (bands, time)


def _blackbox(who: Any, texts: list[str]) -> list[Shown]:
    there = set(who.collect(texts))
    read = lambda text: who.collection.path(text).read_bytes()
    if who.encoder.reads == "picture":
        return [[encoders.picture(read(t))[0]] if t in there else [] for t in texts]
    return [[spectrogram(*encoders.sound(read(t)))] if t in there else [] for t in texts]


SHOW: dict[str, Callable[[Any, list[str]], list[Shown]]] = {
    "image": lambda who, texts: [[picture] for picture in who.paint(texts)],
    "video": lambda who, texts: who.film(texts),
    "audio": lambda who, texts: [[spectrogram(*sound)] for sound in who.speak(texts)],
    "blackbox": _blackbox,
}


def show(
    profile: str, teacher: str, texts: Sequence[str], store: RunStore | None = None
) -> list[Shown]:
    """For every text the teacher's picture, frames or spectrogram; nothing where it refused.

    Made once and kept in the store. Raises ValueError for a text encoder: it makes nothing that can
    be looked at.
    """
    who = profiles.load(profile).teacher(teacher)
    if who.kind not in SHOW:
        raise ValueError(f"teacher {teacher!r} of kind {who.kind!r} makes nothing to look at")
    asked = [teachers.fingerprint(who, specs.device().type), *texts]
    name = hashlib.sha256("\0".join(asked).encode()).hexdigest()[:20]
    path = (store or RunStore()).root / "looks" / f"{name}.safetensors"
    try:
        return _unpacked(kept_tensors(path, {"teacher": teacher}), len(texts))
    except (FileNotFoundError, Damaged):
        made = SHOW[who.kind](extraction.load(profile, teacher), list(texts))
    if all(made):  # what was refused may be answered later
        path.parent.mkdir(parents=True, exist_ok=True)
        keep_tensors(path, _packed(made), {"teacher": teacher}, "what the teacher made")
    return made


def _packed(made: list[Shown]) -> dict[str, torch.Tensor]:
    named = {f"{i}/{j}": x for i, shown in enumerate(made) for j, x in enumerate(shown)}
    return {k: torch.from_numpy(np.array(x, order="C")) for k, x in named.items()}


def _unpacked(tensors: dict[str, torch.Tensor], n: int) -> list[Shown]:
    """Pictures are whole numbers, spectrograms are not."""
    arrays = {tuple(map(int, k.split("/"))): x.numpy() for k, x in tensors.items()}
    look = lambda x: Image.fromarray(x) if x.dtype == np.uint8 else x
    return [[look(arrays[k]) for k in sorted(arrays) if k[0] == i] for i in range(n)]


def sentences(profile: str, tasks: Sequence[str], longest: int = 60) -> list[str]:
    """The first text of at most `longest` characters in each task's validation split.

    ValueError if there is none.
    """
    found = []
    for task in tasks:
        _, held = run_data.examples(specs.spec(profile, task, "undistilled"))
        short = [t for t in held.first if len(t) <= longest]
        if not short:
            raise ValueError(f"{task} has no text of {longest} characters or fewer")
        found.append(short[0])
    return found


def likeness(
    profile: str, teachers: Sequence[str], store: RunStore, workers: int = 1
) -> pd.DataFrame:
    """How far each teacher's vectors agree with people about which sentences mean the same.

    Spearman correlation between the cosine of two sentences' vectors, standardised over all
    sentences as the aligner sees them, and the human score of the pair: STS-B's validation split.
    Columns teacher, width, pairs, rho, low, high (95 % bootstrap interval over pairs).
    """
    _, held = run_data.examples(specs.spec(profile, "stsb", "undistilled"))
    assert held.second is not None
    texts, rows = list(dict.fromkeys(held.first + held.second)), []
    for name in teachers:
        extraction.fill(profile, name, texts, store, workers)
        refused = extraction.refusals(profile, name, texts)
        pairs = [(a, b, y) for a, b, y in zip(held.first, held.second, held.labels, strict=True)
                 if a not in refused and b not in refused]  # fmt: skip
        vectors = extraction.feature_store(profile, name, store)
        x = vectors.gather([p[0] for p in pairs] + [p[1] for p in pairs]).astype(np.float64)
        mean, sd = features.moments(x)
        x = (x - mean) / np.maximum(sd, 1e-6)
        x /= np.linalg.norm(x, axis=1, keepdims=True)
        cosine = (x[: len(pairs)] * x[len(pairs) :]).sum(1)
        r = stats.spearman(cosine, [p[2] for p in pairs])
        width = profiles.load(profile).teacher(name).width
        found = {"pairs": len(pairs), "rho": r.rho, "low": r.low, "high": r.high}
        rows.append({"teacher": name, "width": width, **found})
    return pd.DataFrame(rows)


def sheet(shown: Sequence[Shown], height: int = 96) -> list[Any]:
    """One picture a text: frames side by side; a spectrogram stays an array; None for nothing."""
    out: list[Any] = []
    for item in shown:
        if not item or not isinstance(item[0], Image.Image):
            out.append(item[0] if item else None)
            continue
        frames = [f.convert("RGB").resize((height, height), Image.Resampling.LANCZOS) for f in item]
        whole = Image.new("RGB", (height * len(frames), height), "white")
        for i, frame in enumerate(frames):
            whole.paste(frame, (i * height, 0))
        out.append(whole)
    return out
