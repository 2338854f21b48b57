"""The built book: nothing fetched from a network, nothing broken, nothing left over.

Uses `_build/html` when `make book` finished after the last change of a source, else builds the
book into a temporary folder.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from armada_lib.profiles import ROOT

pytestmark = pytest.mark.slow

SCRIPTS = Path(sys.executable).parent
SOURCES = ("_config.yml", "_toc.yml", "armada_lib", "book", "params")
# Attributes a browser follows by itself; <a href> is followed by the reader.
FETCHED = {"src", "srcset", "poster", "data", "data-src"}
NAMESPACES = re.compile(r"https?://www\.w3\.org/[\w/.#-]+")
ADDRESS = re.compile(r"(?:https?:)?//[\w-]+\.[\w.-]+")


def build(source: Path, out: Path) -> subprocess.CompletedProcess[str]:
    command = [SCRIPTS / "jupyter-book", "build", str(source), "--path-output", str(out)]
    return subprocess.run(
        [*command, "-W", "-n", "--keep-going"], capture_output=True, text=True, check=False
    )


def fresh(stamp: Path) -> bool:
    """Whether the last complete build is younger than every source."""
    if not stamp.exists():
        return False
    files = [ROOT / s for s in SOURCES] + [p for s in SOURCES for p in (ROOT / s).rglob("*")]
    files = [p for p in files if p.is_file() and "__pycache__" not in p.parts]
    return max(p.stat().st_mtime for p in files) < stamp.stat().st_mtime


@pytest.fixture(scope="session")
def site(tmp_path_factory) -> Path:
    if fresh(ROOT / "_build" / ".complete"):
        return ROOT / "_build" / "html"
    out = tmp_path_factory.mktemp("book")
    done = build(ROOT, out)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return out / "_build" / "html"


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


@pytest.fixture(scope="session")
def pages(site) -> list[Path]:
    found = sorted(site.rglob("*.html"))
    assert (site / "index.html") in found and (site / "book" / "intro.html") in found
    return [p for p in found if "_static" not in p.parts]


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
        (source / "book" / "_static" / "book.css").write_text("")
        (source / "_toc.yml").write_text(
            "format: jb-book\nroot: book/one\nchapters:\n- file: book/two\n"
        )
        (source / "book" / "one.md").write_text(intro)
        (source / "book" / "two.ipynb").write_text(notebook)
        codes[name] = build(source, tmp_path / f"{name}-out").returncode
    assert codes["good"] == 0 and codes["cell"] != 0 and codes["reference"] != 0


BROWSER = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chrome"))), None)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
def test_formulas_render_without_a_network(pages, tmp_path):
    for path in pages:
        if 'class="math' not in path.read_text(encoding="utf-8"):
            continue
        done = subprocess.run(
            [BROWSER, "--headless", "--disable-gpu", "--disable-background-networking",
             "--disable-component-update", "--disable-sync",
             "--host-resolver-rules=MAP * ~NOTFOUND", "--virtual-time-budget=8000",
             f"--user-data-dir={tmp_path}", *(["--no-sandbox"] if os.geteuid() == 0 else []),
             "--dump-dom", path.resolve().as_uri()],
            capture_output=True, text=True, check=True, timeout=120,
        )  # fmt: skip
        assert "<mjx-container" in done.stdout, path.name
        assert "data-mjx-error" not in done.stdout and "mjx-merror" not in done.stdout, path.name
