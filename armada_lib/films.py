"""MM-IMDb: its genres, what a teacher is told of a film, and its archive as files that are read here.

The data set's authors give out one archive (Arevalo et al., 2017): `split.json`, and for every film
`dataset/<id>.json` beside its poster `dataset/<id>.jpeg`.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import re
from pathlib import Path
from typing import Any

from armada_lib.files import write_text

log = logging.getLogger(__name__)

# The 23 that the data set's authors predict, of the 27 that occur in it.
GENRES = (
    "Action", "Adventure", "Animation", "Biography", "Comedy", "Crime", "Documentary", "Drama",
    "Family", "Fantasy", "Film-Noir", "History", "Horror", "Music", "Musical", "Mystery", "Romance",
    "Sci-Fi", "Short", "Sport", "Thriller", "War", "Western",
)  # fmt: skip
SPLITS = {"train": "train", "dev": "validation", "test": "test"}
WORDS = 4  # a first sentence has at least as many

# A sentence may be followed by the next without a space: two plots of a film were put together.
END = re.compile(r"""[.!?]+["')\]]*(?=\s|[A-Z]|$)""")
ABBREVIATION = re.compile(
    r"^\W*((?:[a-z]\.)+|(?:dr|mr|mrs|ms|st|lt|lieut|sgt|capt|cpl|col|gen|maj|det|prof|rev|hon|jr|sr"
    r"|vs|inc|no|mt)\.)$",
    re.IGNORECASE,
)


def opening(plot: str) -> str:
    """The first sentence of a plot, of four words at least; all of it where no sentence ends.

    It is what a teacher that paints is given, and what a poster is kept under.
    """
    for end in END.finditer(plot):
        words = plot[: end.end()].split()
        if len(words) >= WORDS and not ABBREVIATION.match(words[-1]):
            return plot[: end.end()].strip()
    return plot.strip()


def convert(archive: Path, data: Path) -> dict[str, int]:
    """Write the unpacked archive as `data`/mmimdb/mmimdb/<split>.parquet; returns rows by split.

    Columns plot (the longest of a film's plots), genres and poster (its file); films with none of
    the 23 genres are left out. Beside `archive`'s posters it writes `index.csv` (text, file), under
    each film's `opening`; of films that open alike the first keeps its poster, which is said.
    Raises FileNotFoundError for an incomplete archive.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not (archive / "split.json").is_file():
        raise FileNotFoundError(f"{archive / 'split.json'}: not the folder of MM-IMDb's archive")
    splits = json.loads((archive / "split.json").read_text(encoding="utf-8"))
    posters: dict[str, str] = {}
    counts, again = {}, 0
    for theirs, ours in SPLITS.items():
        rows = [r for r in (_film(archive, i) for i in splits[theirs]) if r["genres"]]
        for r in rows:
            again += posters.setdefault(opening(r["plot"]), r["poster"]) != r["poster"]
        path = data / "mmimdb" / "mmimdb" / f"{ours}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows), path, compression="zstd")
        counts[ours] = len(rows)
    if again:
        log.warning("%d films open as another does and are given that one's poster", again)
    table = io.StringIO()
    csv.writer(table).writerows([("text", "file"), *posters.items()])
    write_text(archive / "index.csv", table.getvalue())
    return counts


def _film(archive: Path, number: str) -> dict[str, Any]:
    about, poster = (f"dataset/{number}.{kind}" for kind in ("json", "jpeg"))
    for name in (about, poster):
        if not (archive / name).is_file():
            raise FileNotFoundError(f"{archive / name} is missing from the archive of MM-IMDb")
    film = json.loads((archive / about).read_text(encoding="utf-8"))
    genres = [g for g in GENRES if g in film["genres"]]
    return {"plot": max(film["plot"], key=len), "genres": genres, "poster": poster}
