"""What all teachers share: seeds, checks of texts and vectors, digests."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from armada_lib import machine, profiles, quiet

# The parts of a diffusers pipeline that count; a model card or an evaluation beside them does not.
PARTS = ("unet", "vae", "scheduler", "text_encoder", "tokenizer", "model_index.json", "text.json")


def precision(device: str) -> str:
    """fp16 on a GPU; on a CPU bf16 where the processor multiplies in bf16 itself, else fp32."""
    if torch.device(device).type == "cuda":
        return "fp16"
    return "bf16" if machine.bf16() else "fp32"


def digest(facts: dict[str, Any]) -> str:
    """sha256 of plain facts: the fingerprint of a teacher."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def identity(reference: str, revision: str | None = None) -> str:
    """What a checkpoint is: a digest of its parts, or hub id @ resolved revision."""
    where = Path(profiles.resolve(reference))
    if not any((where / part).exists() for part in PARTS):
        return profiles.identity(reference, revision)
    # A pipeline folder: only its parts count, not a model card or an evaluation beside them.
    parts = {p: profiles.file_digest(str(where / p)) for p in PARTS if (where / p).exists()}
    return "sha256:" + hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]


def seed(recipe: str, text: str) -> int:
    """Seed of a text's noise: 63 bits of a hash of the recipe and the text."""
    digest = hashlib.sha256(f"{recipe}\0{text}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def check_texts(texts: list[str]) -> None:
    """Raise ValueError unless `texts` is a list of texts with words in them."""
    if isinstance(texts, str):
        raise ValueError("texts must be a list of strings, not one string")
    for i, text in enumerate(texts):
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"text {i} of {len(texts)} is empty: a teacher needs words")


def check_vectors(vectors: np.ndarray, texts: list[str], name: str) -> None:
    """Raise FloatingPointError for a vector (a row of `vectors`) that is not finite or constant."""
    finite = np.isfinite(vectors).all(1)
    varied = vectors.max(1) > vectors.min(1)
    for what, good in (
        ("a vector that is not finite", finite),
        ("a constant vector", varied | ~finite),
    ):
        if not good.all():
            text = texts[int(np.argmin(good))]
            raise FloatingPointError(
                f"teacher {name!r} gave {what} for {int((~good).sum())} of {len(texts)} texts, "
                f"first {text[:60]!r}"
            )


def model(kind: Any, reference: str, revision: str | None, device: str) -> Any:
    """The frozen fp32 model of class `kind`, with no weight left as it was drawn."""
    options = dict(use_safetensors=True, dtype=torch.float32, output_loading_info=True)
    loaded, found = pretrained(kind, reference, revision, **options)
    if found["missing_keys"]:
        raise ValueError(f"{reference} lacks weights: {sorted(found['missing_keys'])[:4]}")
    return loaded.to(device).eval().requires_grad_(False)


def pretrained(kind: Any, reference: str, revision: str | None, **options: Any) -> Any:
    """`kind.from_pretrained` of a reference; raises what `missing` says of weights that are not here."""
    where = profiles.resolve(reference)
    try:
        return kind.from_pretrained(where, revision=revision or "main", **options)
    except OSError as e:
        raise missing(e, where, revision) from e


def missing(error: Exception, where: str, revision: str | None) -> FileNotFoundError:
    """The one error for weights that cannot be loaded: not there, or there only as a pickle."""
    if "safetensors" in str(error):
        return FileNotFoundError(
            f"{where} has no safetensors weights, and a pickle is never loaded; convert it with "
            "https://huggingface.co/spaces/safetensors/convert and set the revision to the pull "
            "request it opens (refs/pr/N), or save it again with save_pretrained"
        )
    option = f" --revision {revision}" if revision else ""
    return FileNotFoundError(
        f"the weights of {where} are not here and cannot be fetched; get them with "
        f"`hf download {where}{option}`"
    )


def in_batches(
    texts: list[str], width: int, size: int, name: str, vectors: Callable[[list[str]], Any]
) -> np.ndarray:
    """Vectors of `texts`, float16 (n, width), from `vectors(part)` of at most `size` texts at once.

    Raises what `check_texts`, before any work, and `check_vectors` raise.
    """
    check_texts(texts)
    out = np.empty((len(texts), width), np.float16)
    for at in range(0, len(texts), size):
        part = list(texts[at : at + size])
        found = vectors(part)
        with np.errstate(over="ignore"):  # reported as not finite below
            out[at : at + len(part)] = found
        check_vectors(out[at : at + len(part)], part, name)
    return out


def count_longer(texts: list[str], tokenizer: Any, limit: int) -> int:
    """How many of `texts` have more than `limit` tokens."""
    if not texts:
        return 0
    with quiet.libraries():
        ids = tokenizer(list(texts), truncation=False, verbose=False).input_ids
    return sum(len(row) > limit for row in ids)
