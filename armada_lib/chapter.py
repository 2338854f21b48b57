"""What a notebook calls: run line, tables, published numbers, sources, verdicts.

Each function shows one thing in three forms at once: MyST Markdown for the built book (numbered
tables with cross-references), HTML for Jupyter, plain text for a terminal. Nothing is computed
here; the numbers come from the run store, `book/results/` or `book/published/`.
"""

from __future__ import annotations

import html
import inspect
import re
import textwrap
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from IPython.display import display

from armada_lib import figures
from armada_lib.profiles import ROOT, check

LINK = re.compile(r"\[([^\[\]]+)\]\(([^()\s]+)\)")  # of Markdown; cells may hold them

# Where the numbers of a table come from; each has a sign in the book's style sheet.
ORIGINS = ("published", "measured", "computed")

# Outcomes a verdict may have, each with a sign, so that colour never carries the meaning alone.
OUTCOMES = {
    "reproduced": "✔",
    "direction agrees": "≈",
    "not reproduced": "✘",
    "undecided": "?",
    "not attempted": "–",
}


# ------------------------------------------------------------------------------- tables


def table(
    df: pd.DataFrame,
    caption: str,
    name: str,
    origin: str | None = None,
    better: Collection[tuple[int, str]] = (),
    fmt: str | Mapping[str, str] = "{:.1f}",
) -> None:
    """Show `df` as a numbered table that the text can refer to by `name`.

    `origin` says where the numbers come from: "published" in the paper, "measured" in runs here,
    "computed" from either or from a formula; "row" where every row says it; "data" for a data set.
    Heads that begin with one of these words say it of their column; then it may be left out.

    `better` marks cells as (row position, column); say in the caption what the mark means.
    `fmt` formats fractions, for all columns or by column; whole numbers and strings stay as they
    are, a missing value is a dash. Columns of figures, also printed as "62.6 ± 0.4", align right.

    Raises ValueError for a name that cannot be a label, a table that does not say where its
    numbers come from, and a mark outside the table.
    """
    if not re.fullmatch(r"[a-z][a-z0-9-]*", name):
        raise ValueError(f"table name {name!r}: use small letters, digits and hyphens")
    known = (*ORIGINS, "row", "data")
    columns = [" ".join(filter(None, map(str, c))) if isinstance(c, tuple) else str(c) for c in df]
    if outside := [b for b in better if b[1] not in columns or not 0 <= b[0] < len(df)]:
        raise ValueError(f"cells {outside} are not in the table: {len(df)} rows, columns {columns}")
    if origin is None and not any(c.split(" ")[0] in ORIGINS for c in columns):
        raise ValueError(f"table {name!r}: say its origin, one of {', '.join(known)}")
    check(origin or "row", known, "origin")
    said = f"[{origin}]{{.{origin}}} " if origin in ORIGINS else ""
    plain = f"{origin}: {caption}" if said else caption
    body = [[_cell(v, c, fmt) for c, v in zip(columns, row, strict=True)]
            for row in df.itertuples(index=False)]  # fmt: skip
    right = [_figures([row[j] for row in body]) for j in range(len(columns))]

    spaced = lambda text, j: re.sub(r" (?!\[)", "\N{NO-BREAK SPACE}", text) if right[j] else text
    lines = [
        [_head_md(c) for c in columns],
        ["--:" if r else ":--" for r in right],
        *(
            [f"[{_md(s)}]{{.better}}" if (i, c) in better else _labelled(spaced(s, j), origin)
             for j, (c, s) in enumerate(zip(columns, row, strict=True))]
            for i, row in enumerate(body)
        ),
    ]  # fmt: skip
    rows = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    _show(
        f":::{{table}} {said}{caption}\n:name: {name}\n\n{rows}\n:::",
        _html_table(columns, body, right, better, plain),
        f"{plain}\n{pd.DataFrame(body, columns=columns).to_string(index=False)}",
    )


def _cell(value: Any, column: str, fmt: str | Mapping[str, str]) -> str:
    if isinstance(value, str):
        return re.sub(r"(?<![\w.)-])-(?=\.?\d)", "−", value)  # a true minus sign
    if pd.api.types.is_scalar(value) and pd.isna(value):
        return "–"
    if isinstance(value, int | np.integer) and abs(int(value)) >= 10_000:
        return f"{value:,}".replace("-", "−")
    if isinstance(value, float | np.floating):
        form = fmt if isinstance(fmt, str) else fmt.get(column, "{:.1f}")
        text = form.format(value)
        if re.match(r"p\b", column) and value > 0 and not text.strip("0."):
            return f"< {text[:-1]}1"  # a p value is never nought
        return re.sub(r"^-(?=0?\.?0*$)", "", text).replace("-", "−")
    return str(value)


def _figures(cells: list[str]) -> bool:
    """True when most filled cells of a column begin like a number and none is a sentence."""
    filled = [c for c in cells if c not in ("", "–")]
    if not filled:
        return "–" in cells
    numbers = sum(bool(re.match(r"[<>≈]?\s?\[?[+−-]?[\d.]*\d", c)) for c in filled)
    return 2 * numbers > len(filled) and max(map(len, filled)) <= 28


def _md(text: str) -> str:
    """Text inside a Markdown table cell: a bar would end the cell, a line break the table."""
    text = re.sub(r"\s*\n\s*", " ", text).replace("|", "\\|")
    # a name such as STS-B or macro/F1 would be broken at its sign
    return f"[{text}]{{.name}}" if re.fullmatch(r"\w{1,9}[-/]\w{1,6}", text) else text


def _head_md(column: str) -> str:
    return _labelled(column.replace("_", " "), "row")


def _labelled(text: str, origin: str | None) -> str:
    """A cell; where heads or rows say the origin, its word is made a label."""
    m = re.match(rf"({'|'.join(ORIGINS)})\b(.*)", text) if origin == "row" else None
    return f"[{m[1]}]{{.{m[1]}}}{_md(m[2])}" if m else _md(text)


def _html_table(
    columns: list[str],
    body: list[list[str]],
    right: list[bool],
    better: Collection[tuple[int, str]],
    caption: str,
) -> str:
    """The same table for Jupyter, which does not have the book's style sheet."""

    def td(tag: str, text: str, is_right: bool, marked: bool = False) -> str:
        style = f"text-align:{'right' if is_right else 'left'};font-variant-numeric:tabular-nums"
        inner = LINK.sub(r'<a href="\2">\1</a>', html.escape(text))
        inner = f"<strong><u>{inner}</u></strong>" if marked else inner
        return f'<{tag} style="{style}">{inner}</{tag}>'

    head = "".join(td("th", c.replace("_", " "), r) for c, r in zip(columns, right, strict=True))
    rows = "".join(
        "<tr>"
        + "".join(td("td", s, r, (i, c) in better)
                  for c, s, r in zip(columns, row, right, strict=True))
        + "</tr>"
        for i, row in enumerate(body)
    )  # fmt: skip
    return (
        f"<table><caption>{html.escape(caption)}</caption>"
        f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
    )


def published(number: int) -> pd.DataFrame:
    """The paper's table of that number, one printed value a row, from `book/published/`.

    Columns whose every entry is a number are numeric. `value` is joined by `printed`, the text as
    the paper prints it (31.30 keeps its zero). "none" stays the word it is. `settings.Unknown` for
    the number of no table there.
    """
    folder = ROOT / "book" / "published"
    files = {int(p.name[5:7]): p for p in sorted(folder.glob("table[0-9][0-9]_*.csv"))}
    check(str(number), files, "published table")
    df = pd.read_csv(files[int(number)], dtype=str, keep_default_na=False)
    if "value" in df:
        df["printed"] = df["value"]
    for column in df.columns.drop("printed", errors="ignore"):
        if df[column].str.fullmatch(r"-?\d+(\.\d+)?").all():
            df[column] = pd.to_numeric(df[column])
    return df


def claims(*ids: str) -> pd.DataFrame:
    """Claims of the paper as printed, from `book/published/claims.csv`: claim, published, where.

    `settings.Unknown` for an id that is none of its claims.
    """
    df = pd.read_csv(ROOT / "book/published/claims.csv", dtype=str, keep_default_na=False)
    df = df.set_index("id")
    for i in ids:
        check(i, df.index, "published claim")
    found = df.loc[list(ids), ["claim", "published", "location"]]
    return found.rename(columns={"location": "where"}).reset_index(drop=True)


# ------------------------------------------------------------------------------- facts, verdicts


def run_line(facts: Mapping[str, Any]) -> None:
    """Show one line of facts about a run: what stood behind each name, seeds, minutes.

    A list is joined by commas, or by semicolons if its items have commas; an entry that is None is
    left out. ValueError if none is left.
    """
    kept = {k: _joined(v) for k, v in facts.items() if v is not None}
    if not kept:
        raise ValueError("a run line needs at least one fact")
    _show(
        ":::{div} run-line\n" + " · ".join(f"**{k}** {_plain(v)}" for k, v in kept.items())
        + "\n:::",
        "<p><small>" + " · ".join(f"<b>{html.escape(k)}</b> {html.escape(v)}"
                                  for k, v in kept.items()) + "</small></p>",
        " | ".join(f"{k}: {v}" for k, v in kept.items()),
    )  # fmt: skip


def _joined(value: Any) -> str:
    items = [str(v) for v in value] if isinstance(value, list | tuple) else [str(value)]
    return ("; " if len(items) > 1 and any(", " in i for i in items) else ", ").join(items)


def _plain(value: str) -> str:
    """A fact is a name or a number, never markup: escape what MyST would read."""
    return re.sub(r"([\\`*_{}\[\]<>#$|~^])", r"\\\1", value).replace("\n", " ")


def source(*functions: Any) -> None:
    """Show the source of functions, methods or whole files as it stands now, with the file's name."""
    parts = []
    for f in functions:
        if isinstance(f, Path):
            parts.append((str(f.relative_to(ROOT)), f.read_text(encoding="utf-8").rstrip()))
            continue
        module = inspect.getmodule(f)
        name = f"{module.__name__.replace('.', '/')}.py" if module else ""
        parts.append((name, textwrap.dedent(inspect.getsource(f)).rstrip()))
    _show(
        ":::::{div} source\n"
        + "\n\n".join(f"`{name}`\n\n````{_language(name)}\n{code}\n````" for name, code in parts)
        + "\n:::::",
        "".join(f"<p><small><code>{html.escape(name)}</code></small></p><pre>{html.escape(code)}</pre>"
                for name, code in parts),
        "\n\n".join(f"# {name}\n{code}" for name, code in parts),
    )  # fmt: skip


def _language(name: str) -> str:
    return "yaml" if name.endswith((".yaml", ".yml")) else "python"


def verdict(criterion: str, outcome: str, text: str, title: str | None = None) -> None:
    """Show what was to be met (stated before the number), whether it was, and what that means.

    `criterion` and `text` are MyST; `outcome` is a key of `OUTCOMES`, else `profiles.Unknown`.
    `title`: in the place of "Verdict: " and the outcome, where no claim of the paper is judged.
    """
    sign = OUTCOMES[check(outcome, OUTCOMES, "outcome")]
    title = f"{sign} {title or f'Verdict: {outcome}'}"
    _show(
        f"::::{{admonition}} {title}\n:class: verdict verdict-{outcome.replace(' ', '-')}\n\n"
        f"**Criterion, stated beforehand:** {criterion}.\n\n{text}\n::::",
        '<div style="border:1px solid;border-left-width:6px;padding:0.5em 1em">'
        f"<p><b>{title}</b></p><p><b>Criterion, stated beforehand:</b> {html.escape(criterion)}."
        f"</p><p>{html.escape(text)}</p></div>",
        f"{title}\nCriterion, stated beforehand: {criterion}\n{text}",
    )


def _show(markdown: str, html_text: str, plain: str) -> None:
    display({"text/markdown": markdown, "text/html": html_text, "text/plain": plain}, raw=True)


def style() -> None:
    """One look for every figure of the book: `figures.style`."""
    figures.style()
