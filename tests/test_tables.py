"""Tables of one's own: kinds of file, what is wrong with them, and rows held out."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from armada_lib import tables

ROWS = [{"text": 'one, "two"', "label": "a"}, {"text": "línea\u2028dos", "label": "b"}]


def test_three_kinds_of_file_hold_the_same_rows(tmp_path):
    made = {k: tmp_path / f"t.{k}" for k in ("csv", "jsonl", "parquet")}
    made["csv"].write_bytes(
        '\ufefftext,label\r\n"one, ""two""",a\r\nlínea\u2028dos,b\r\n'.encode()
    )  # as Excel writes it
    lines = [json.dumps(r, ensure_ascii=False) for r in ROWS]
    made["jsonl"].write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    pq.write_table(pa.Table.from_pylist(ROWS), made["parquet"])
    assert all(tables.read(p) == ROWS for p in made.values())


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("t.xlsx", b"", "ends in .csv, .jsonl, .parquet"),
        ("t.csv", b"text,label\n", "no rows"),
        ("t.csv", b"text,label\na,b\nc\n", "row 1: it has more or fewer cells"),
        ("t.csv", b"text,label\na,b,c\n", "row 0: it has more or fewer cells"),
        ("t.csv", b"text,label\n\xe4,b\n", "in UTF-8"),
        ("t.jsonl", b'{"text": "a"\n', "cannot be read as jsonl"),
        ("t.jsonl", b'["a"]\n', "rows that have no names"),
    ],
)
def test_what_is_wrong_with_a_table_is_said(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=said):
        tables.read(tmp_path / name)


def test_a_missing_table_and_a_missing_column_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such table"):
        tables.read(tmp_path / "none.csv")
    with pytest.raises(ValueError, match="row 1: no column 'label'; there are text, label"):
        tables.column([{"text": "a", "label": 1}, {"text": "b"}], "label", "t")


def test_rows_with_one_text_stay_together_and_every_row_is_somewhere():
    groups = [f"text {i % 30}" for i in range(100)]
    train, held = tables.apart(groups, 0.2)
    assert sorted([*train, *held]) == list(range(100))
    assert not {groups[i] for i in train} & {groups[i] for i in held}
    assert len({groups[i] for i in held}) == 6
    again = tables.apart(groups, 0.2)
    assert np.array_equal(held, again[1])


def test_too_few_texts_cannot_be_split():
    with pytest.raises(ValueError, match="1 different texts cannot be split"):
        tables.apart(["same"] * 10, 0.25)
