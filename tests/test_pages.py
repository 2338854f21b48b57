"""The built book: nothing fetched from a network, nothing broken, nothing left over.

What only a browser can tell is in test_browser.py.
"""

from __future__ import annotations

import importlib.metadata
import re
import shutil
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from conftest import build

from armada_lib.profiles import ROOT

pytestmark = pytest.mark.slow

# Attributes a browser follows by itself; <a href> is followed by the reader.
FETCHED = {"src", "srcset", "poster", "data", "data-src"}
NAMESPACES = re.compile(r"https?://www\.w3\.org/[\w/.#-]+")
ADDRESS = re.compile(r"(?:https?:)?//[\w-]+\.[\w.-]+")


class Page(HTMLParser):
    """What the tests look at: addresses, anchors, scripts, text outside code."""

    def __init__(self, path: Path):
        super().__init__()
        self.fetched: list[str] = []
        self.links: list[str] = []
        self.ids: set[str] = set()
        self.images: list[dict[str, str]] = []
        self.scripts: list[str] = []
        self.prose: list[str] = []
        self.open: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        have = {k: v or "" for k, v in attrs}
        self.open.append(tag)
        self.ids |= {have[k] for k in ("id", "name") if k in have}
        self.fetched += [v for k, v in have.items() if k in FETCHED]
        self.fetched += re.findall(r"url\(['\"]?([^)'\"]+)", have.get("style", ""))
        if tag == "link":
            self.fetched.append(have.get("href", ""))
        if tag == "a" and "href" in have:
            self.links.append(have["href"])
        if tag == "img":
            self.images.append(have)

    def handle_endtag(self, tag):
        if tag in self.open:
            while self.open.pop() != tag:
                pass

    def handle_data(self, data):
        if "script" in self.open or "style" in self.open:
            self.scripts.append(data)
        elif not {"code", "pre"} & set(self.open):
            self.prose.append(data)


@cache
def page(path: Path) -> Page:
    return Page(path)


def test_jupyter_book_is_of_the_line_that_reads_our_files():
    assert importlib.metadata.version("jupyter-book").startswith("1.")


def test_every_chapter_has_its_page(site):
    for source in [*(ROOT / "book").glob("*.ipynb"), *(ROOT / "book").glob("*.md")]:
        assert (site / "book" / f"{source.stem}.html").exists()


def test_no_page_fetches_from_a_network(site, pages):
    for path in pages:
        p = page(path)
        outside = [a for a in p.fetched if re.match(r"(https?:)?//", a)]
        assert not outside, f"{path.name}: {outside}"
        scripts = NAMESPACES.sub("", "".join(p.scripts))
        assert not ADDRESS.search(scripts), f"{path.name}: {ADDRESS.search(scripts)}"
    for sheet in site.rglob("*.css"):
        text = sheet.read_text(encoding="utf-8")
        assert not re.search(r"(url\(|@import\s)\s*['\"]?(https?:)?//", text), sheet.name


def test_every_local_address_and_anchor_is_there(site, pages):
    for path in pages:
        for address in page(path).fetched + page(path).links:
            parts = urlsplit(address)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            assert target.exists(), f"{path.name}: {address}"
            if parts.fragment and target.suffix == ".html":
                assert unquote(parts.fragment) in page(target).ids, f"{path.name}: {address}"


def test_nothing_of_the_machine_or_the_markup_is_left(pages):
    places = [str(ROOT), str(Path.home()), "/tmp/", "/home/", "site-packages"]
    for path in pages:
        text = path.read_text(encoding="utf-8")
        assert "Traceback (most recent call last)" not in text, path.name
        assert not re.search(r"at 0x[0-9a-f]{6,}", text), path.name
        left = [s for s in places if s in text]
        assert not left, f"{path.name}: {left}"
        prose = " ".join(page(path).prose)
        raw = re.findall(r"\{[a-z:]+\}`|:::|\]\{\.|\?\?\?|<IPython", prose)
        assert not raw, f"{path.name}: {raw}"


def test_every_image_is_described(pages):
    for path in pages:
        assert not [i["src"] for i in page(path).images if not i.get("alt")], path.name


def test_a_failing_cell_and_a_broken_reference_stop_the_build(tmp_path):
    """With the book's own settings; a build that hides either would prove nothing above."""
    cell = (
        '{"cells": [{"cell_type": "markdown", "id": "a", "metadata": {}, "source": "# T"}, '
        '{"cell_type": "code", "id": "b", "metadata": {}, "outputs": [], '
        '"execution_count": null, "source": "%s"}], "metadata": {"kernelspec": {"name": "python3", '
        '"display_name": "Python 3"}}, "nbformat": 4, "nbformat_minor": 5}'
    )
    cases = {
        "good": ("# One\n\n{doc}`two`", cell % "1 + 1"),
        "cell": ("# One\n\n{doc}`two`", cell % "1 / 0"),
        "reference": ("# One\n\n{doc}`two` {numref}`nowhere`", cell % "1 + 1"),
    }
    codes = {}
    for name, (intro, notebook) in cases.items():
        source = tmp_path / name
        (source / "book").mkdir(parents=True)
        for part in ("_config.yml", "book/_ext", "book/references.bib"):
            copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
            copy(ROOT / part, source / part)
        (source / "book" / "_static").mkdir()
        for file in ("book.css", "favicon.svg"):
            (source / "book" / "_static" / file).write_text("")
        (source / "_toc.yml").write_text(
            "format: jb-book\nroot: book/one\nchapters:\n- file: book/two\n"
        )
        (source / "book" / "one.md").write_text(intro)
        (source / "book" / "two.ipynb").write_text(notebook)
        codes[name] = build(source, tmp_path / f"{name}-out").returncode
    assert codes["good"] == 0 and codes["cell"] != 0 and codes["reference"] != 0
