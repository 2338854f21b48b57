"""Training items that are test questions: found exactly or nearly, removed, and reported.

Public tuning mixtures hold test questions of the sets they are read on; one mixture for arithmetic
holds most of MultiArith and SingleEq. A score on a seen question says nothing about reasoning.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from armada_lib.answers import Item

NEAR = 0.8  # Jaccard similarity of the word 5-grams from which two questions are the same


@dataclass(frozen=True)
class Match:
    """A training item that is a test question; `similarity` is 1 if "exact", else >= `NEAR`."""

    train: str
    test_set: str
    test: str
    kind: Literal["exact", "near"]
    similarity: float


def _words(text: str) -> tuple[str, ...]:
    """Lower-case words and numbers; numbers are kept, their thousands commas dropped."""
    text = unicodedata.normalize("NFKC", text).lower()
    return tuple(re.findall(r"[^\W\d_]+|\d+(?:\.\d+)?", re.sub(r"(?<=\d),(?=\d{3})", "", text)))


def _grams(words: tuple[str, ...], n: int = 5) -> set[tuple[str, ...]]:
    return {words[i : i + n] for i in range(max(len(words) - n, 0) + 1)} if words else set()


def contamination(
    train: Sequence[Item], tests: Mapping[str, Sequence[Item]]
) -> tuple[list[Item], list[Match]]:
    """Training items that are no test question, and a record of every match of the others.

    Compared are question and options (sorted, so that their order does not matter), without the
    request around them. Exact: all words equal, or all words of the question where it has 8 or
    more. Near: Jaccard similarity of the sets of word 5-grams >= `NEAR`; a long question with one
    other number is near too. No pair is missed: sets this similar share one of the rarest
    |a| - ceil(NEAR |a|) + 1 grams of a, and only pairs that do are compared.
    """
    flat: list[tuple[str, str, set]] = []
    same: dict[tuple, list[int]] = defaultdict(list)
    having: dict[tuple, list[int]] = defaultdict(list)

    def keys(item: Item) -> tuple[tuple[str, ...], list[tuple]]:
        asked = _words(item.question)
        whole = sum(sorted(map(_words, item.options)), asked)
        return whole, [("whole", *whole)] * bool(whole) + [("asked", *asked)] * (len(asked) >= 8)

    for name, items in tests.items():
        for item in items:
            whole, exact = keys(item)
            for key in exact:
                same[key].append(len(flat))
            flat.append((name, item.id, _grams(whole)))
            for gram in flat[-1][2]:
                having[gram].append(len(flat) - 1)
    kept, removed = [], []
    for item in train:
        whole, exact = keys(item)
        found = {t: 1.0 for key in exact for t in same.get(key, ())}
        twins = set(found)
        mine = _grams(whole)
        rare = sorted(mine, key=lambda g: len(having.get(g, ())))
        rare = rare[: len(mine) - math.ceil(NEAR * len(mine)) + 1]
        for t in {t for g in rare for t in having.get(g, ())} - twins:
            shared = len(mine & flat[t][2])
            alike = shared / (len(mine) + len(flat[t][2]) - shared)
            if alike >= NEAR:
                found[t] = alike
        for t, alike in sorted(found.items()):
            kind: Literal["exact", "near"] = "exact" if t in twins else "near"
            removed.append(Match(item.id, flat[t][0], flat[t][1], kind, alike))
        if not found:
            kept.append(item)
    return kept, removed


def counts(removed: Sequence[Match]) -> dict[str, dict[str, int]]:
    """Per test set: training rows removed, of these exact, and test questions they stand for."""
    table = {}
    for name in sorted({m.test_set for m in removed}):
        mine = [m for m in removed if m.test_set == name]
        table[name] = {
            "rows": len({m.train for m in mine}),
            "exact": len({m.train for m in mine if m.kind == "exact"}),
            "questions": len({m.test for m in mine}),
        }
    return table
