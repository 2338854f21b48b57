"""Tables, published numbers, run line and verdict, as a notebook calls them."""

from __future__ import annotations

import csv
import re

import pandas as pd
import pytest

from armada_lib import chapter
from armada_lib.profiles import ROOT


@pytest.fixture
def shown(monkeypatch):
    """The bundles that were displayed."""
    bundles = []
    monkeypatch.setattr(
        chapter, "display", lambda bundle, raw: bundles.append(bundle) if raw else None
    )
    return bundles


# ---------------------------------------------------------------------------- tables


FRAME = pd.DataFrame(
    {
        "task": ["CoLA", "a|b"],
        "published cosine": [46.2, None],
        "measured cosine": ["12.3 ± 0.4", "–"],
        "n": [3, 5],
        "difference": [-0.25, 1.0],
    }
)


def test_table_markdown_is_a_numbered_table(shown):
    chapter.table(FRAME, "Scores. Higher is better.", "nlu-scores", better={(0, "difference")})
    lines = shown[0]["text/markdown"].splitlines()
    assert lines[:3] == [":::{table} Scores. Higher is better.", ":name: nlu-scores", ""]
    assert lines[3:] == [
        "| task | [published]{.published} cosine | [measured]{.measured} cosine | n | difference |",
        "| :-- | --: | --: | --: | --: |",
        "| CoLA | 46.2 | 12.3\xa0±\xa00.4 | 3 | [−0.2]{.better} |",
        "| a\\|b | – | – | 5 | 1.0 |",
        ":::",
    ]


def test_table_html_and_text_hold_the_same_cells(shown):
    chapter.table(FRAME.assign(task=["<b>", "x"]), "A & B", "t", better=[(1, "n")])
    cells = re.findall(r"<td[^>]*>(.*?)</td>", shown[0]["text/html"])
    assert cells[0] == "&lt;b&gt;" and "A &amp; B" in shown[0]["text/html"]
    assert cells[8] == "<strong><u>5</u></strong>"
    assert shown[0]["text/plain"].startswith("A & B\n")
    assert "12.3 ± 0.4" in shown[0]["text/plain"]


@pytest.mark.parametrize("origin", ["published", "measured", "computed"])
def test_a_table_says_where_its_numbers_come_from(shown, origin):
    chapter.table(FRAME[["task", "n"]], "c", "t", origin)
    assert shown[0]["text/markdown"].startswith(f":::{{table}} [{origin}]{{.{origin}}} c\n")
    assert f"<caption>{origin}: c<" in shown[0]["text/html"]
    assert shown[0]["text/plain"].startswith(f"{origin}: c\n")
    assert f".{origin}::before" in (ROOT / "book/_static/book.css").read_text()


def test_a_table_that_does_not_say_it_is_refused(shown):
    with pytest.raises(ValueError, match="'t'.*published, measured, computed, row, data"):
        chapter.table(FRAME[["task", "n"]], "c", "t")
    with pytest.raises(ValueError, match="unknown origin 'guessed'"):
        chapter.table(FRAME, "c", "t", "guessed")
    assert not shown
    by_row = pd.DataFrame({"data": ["published, Table 4", "measured"], "n": [1, 2]})
    chapter.table(by_row, "c", "t", "row")
    assert "| [published]{.published}, Table 4 | 1 |" in shown[0]["text/markdown"]
    assert "| [measured]{.measured} | 2 |" in shown[0]["text/markdown"]
    chapter.table(FRAME, "c", "t")  # its heads say it
    assert all(s["text/markdown"].startswith(":::{table} c\n") for s in shown)


def test_cells_have_true_minus_signs_names_stay_whole_and_most_cells_align(shown):
    df = pd.DataFrame(
        {
            "n_of": ["-0.4, 3", "x-1 (no sign)"],
            "task": ["STS-B", "a word-pair list"],
            "published": ["+3.4", "-"],
            "interval": ["[−1, 2]", ""],
            "none": ["–", "–"],
        }
    )
    chapter.table(df, "c", "t")
    assert shown[0]["text/markdown"].splitlines()[3:7] == [
        "| n of | task | [published]{.published} | interval | none |",
        "| :-- | :-- | :-- | --: | --: |",
        "| −0.4, 3 | [STS-B]{.name} | +3.4 | [−1,\xa02] | – |",
        "| x-1 (no sign) | a word-pair list | - |  | – |",
    ]
    three = pd.DataFrame({"published": ["1 [0, 2]", "2", "theorem"], "text": ["1", "2", "w" * 40]})
    chapter.table(three, "c", "t")
    assert shown[1]["text/markdown"].splitlines()[4:6] == ["| --: | :-- |", "| 1 [0,\xa02] | 1 |"]
    chapter.table(pd.DataFrame({"n": [-12345, 9999]}), "c", "t", "measured")
    assert shown[2]["text/markdown"].splitlines()[5:7] == ["| −12,345 |", "| 9999 |"]


def test_table_formats_by_column_and_joins_two_level_heads(shown):
    df = pd.DataFrame([[0.5, 0.125]], columns=pd.MultiIndex.from_tuples([("p", ""), ("t", "x")]))
    chapter.table(df, "c", "t", "measured", fmt={"p": "{:.3f}"})
    assert "| p | t x |" in shown[0]["text/markdown"]
    assert "| 0.500 | 0.1 |" in shown[0]["text/markdown"]


def test_a_small_p_is_below_a_bound_and_nought_has_no_sign(shown):
    df = pd.DataFrame({"p (Holm)": [0.0002, 0.0], "price": [0.0002, -0.0], "gap": [-0.0004, -0.6]})
    chapter.table(df, "c", "t", "measured", fmt="{:.3f}")
    rows = shown[0]["text/markdown"].splitlines()[5:7]
    assert rows == ["| <\xa00.001 | 0.000 | 0.000 |", "| 0.000 | 0.000 | −0.600 |"]


@pytest.mark.parametrize("better", [{(2, "n")}, {(0, "m")}, {(-1, "n")}])
def test_table_refuses_marks_outside(better):
    with pytest.raises(ValueError, match="not in the table"):
        chapter.table(FRAME, "c", "t", better=better)


def test_table_refuses_a_name_that_is_no_label():
    with pytest.raises(ValueError, match="Table 2"):
        chapter.table(FRAME, "c", "Table 2")


# ---------------------------------------------------------------------------- published


def test_published_numbers_and_types():
    df = chapter.published(2)
    assert len(df) == 128 and df["value"].dtype == float
    row = df[(df.student == "BERT-6L") & (df.manifold_loss == "euclid") & (df.task == "CoLA")]
    assert row["value"].item() == 47.6
    # "none" is a word here, never a missing value
    assert set(df[df.method == "undistilled"].manifold_loss) == {"none"}
    assert not df.isna().any().any()


def test_published_keeps_what_was_printed():
    df = chapter.published(11)
    assert "31.30" in set(df.printed) and 31.3 in set(df.value)
    assert chapter.published(13)["scenario"].tolist() == [1, 2] * 4
    assert chapter.published(15)["p_value"].dtype == float


def test_published_reads_every_file_whole():
    files = sorted((ROOT / "book" / "published").glob("table*.csv"))
    assert len(files) == 14
    for path in files:
        df = chapter.published(int(path.name[5:7]))
        with path.open(encoding="utf-8") as f:
            rows = list(csv.DictReader(f))
        assert len(df) == len(rows)
        if "value" in df:
            assert df.printed.tolist() == [r["value"] for r in rows]


def test_published_names_the_tables_there_are():
    with pytest.raises(ValueError, match="unknown published table '1'.*10, 11"):
        chapter.published(1)


# ---------------------------------------------------------------------------- facts, verdicts


def test_run_line(shown):
    chapter.run_line({"profile": "mini", "seeds": [0, 1], "student": "a_b*c|d", "gpu": None})
    assert shown[0]["text/markdown"] == (
        ":::{div} run-line\n**profile** mini · **seeds** 0, 1 · **student** a\\_b\\*c\\|d\n:::"
    )
    assert shown[0]["text/plain"] == "profile: mini | seeds: 0, 1 | student: a_b*c|d"
    assert "gpu" not in shown[0]["text/html"]
    with pytest.raises(ValueError, match="at least one"):
        chapter.run_line({"gpu": None})


@pytest.mark.parametrize("outcome", chapter.OUTCOMES)
def test_verdict(shown, outcome):
    chapter.verdict("The interval lies above 0.", outcome, "It does not.")
    md = shown[0]["text/markdown"]
    assert md.startswith(f"::::{{admonition}} {chapter.OUTCOMES[outcome]} Verdict: {outcome}\n")
    assert f":class: verdict verdict-{outcome.replace(' ', '-')}\n" in md
    assert "The interval lies above 0." in md and md.endswith("It does not.\n::::")
    assert outcome in shown[0]["text/html"] and outcome in shown[0]["text/plain"]


def test_verdict_refuses_other_outcomes():
    with pytest.raises(ValueError, match="unknown outcome 'reproducd'; did you mean 'reproduced'"):
        chapter.verdict("c", "reproducd", "t")


def test_claims_are_read_as_printed_and_unknown_ones_refused():
    df = chapter.claims("C39", "C38")
    assert df["published"].tolist() == ["0.69", "0.99"] and list(df) == [
        "claim",
        "published",
        "where",
    ]
    with pytest.raises(ValueError, match="unknown published claim 'C380'; did you mean 'C38'"):
        chapter.claims("C380")


def test_gains_named_in_the_introduction_are_published_ones():
    said = re.findall(r"up to (\d\.\d) %", (ROOT / "book" / "intro.md").read_text())
    assert said and set(said) == set(chapter.claims("C07", "C16")["published"])
