"""The built book as its reader meets it: in a browser, with mouse, keyboard and telephone.

The pages come from a server of their own; every other address is unknown to the browser. Needs
Chromium as the system has it (Debian: `apt install chromium`): Playwright only drives it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, Request, expect, sync_playwright

from armada_lib.profiles import ROOT

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
DESK, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
CONTRAST = 4.5  # WCAG 2.2, level AA, for text of any size
WAIT = 20_000  # ms

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt install chromium"),
]


class Quiet(SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # one connection for many files

    def log_message(self, *args: object) -> None:
        """No line per request."""


@pytest.fixture(scope="module")
def address(site) -> Iterator[str]:
    """Where the built book is served."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(site))) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    arguments = ["--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]
    if os.geteuid() == 0:  # Chromium refuses its sandbox to the superuser
        arguments.append("--no-sandbox")
    with sync_playwright() as play:
        opened = play.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield opened
        opened.close()


def watch(page: Page, host: str, faults: list[str]) -> None:
    """Collect what a page complains of, and what it asks of anybody but `host`."""

    def request(it):
        if urlsplit(it.url).netloc not in ("", host):
            faults.append(f"asks elsewhere: {it.url}")

    def console(it):
        if it.type == "error":
            faults.append(f"console: {it.text} ({it.location.get('url')})")

    def response(it):
        if it.status >= 400:
            faults.append(f"{it.status}: {it.url}")

    def failed(it: Request) -> None:
        # whoever leaves a page at once stops what it has not shown yet; a missing file says otherwise
        if it.failure != "net::ERR_ABORTED":
            faults.append(f"not loaded: {it.url} {it.failure}")

    page.on("request", request)
    page.on("console", console)
    page.on("pageerror", lambda it: faults.append(f"script: {it}"))
    page.on("requestfailed", failed)
    page.on("response", response)


@pytest.fixture
def faults() -> list[str]:
    return []


@pytest.fixture
def context(browser) -> Iterator[BrowserContext]:
    made = browser.new_context(viewport=DESK, reduced_motion="reduce", color_scheme="light")
    made.set_default_timeout(WAIT)
    made.add_init_script(path=Path(__file__).with_name("browser.js"))
    yield made
    made.close()


@pytest.fixture
def tab(context, address, faults) -> Iterator[Page]:
    """A page whose complaints fail the test, whatever else the test looks at."""
    page = context.new_page()
    watch(page, urlsplit(address).netloc, faults)
    yield page
    assert not faults, faults


def visit(page: Page, url: str) -> None:
    """Open a page and wait for its formulas."""
    page.goto(url)
    page.evaluate("""async () => {
        if (document.querySelector('.math')) await window.MathJax.startup.promise;
    }""")


def look(page: Page) -> list[str]:
    """Every check, at a desk in both themes and on a telephone."""
    page.evaluate("checks.open()")
    found = [f for c in ("heading", "images", "formulas", "captions")
             for f in page.evaluate(f"checks.{c}()")]  # fmt: skip
    for theme in ("light", "dark"):
        page.evaluate(f"document.documentElement.dataset.theme = '{theme}'; checks.open()")
        found += [f"{theme}, {f}" for f in page.evaluate(f"checks.contrast({CONTRAST})")]
    page.keyboard.press("Tab")
    found += page.evaluate("checks.focus()")
    page.set_viewport_size(PHONE)
    found += page.evaluate("checks.width()")
    page.set_viewport_size(DESK)
    return found


def title(page: Page):
    return page.get_by_role("main").get_by_role("heading", level=1)


# --------------------------------------------------------------------------- a reader's ways


def test_the_bare_address_leads_to_the_introduction(context, address):
    page = context.new_page()
    page.goto(f"{address}/")
    page.wait_for_url(f"{address}/book/intro.html")
    expect(title(page)).to_contain_text("ARMADA")


def test_a_search_finds_a_chapter(tab, address):
    visit(tab, f"{address}/book/intro.html")
    tab.get_by_role("button", name="Search").first.click()
    tab.get_by_role("searchbox").first.fill("homeomorphism")
    tab.keyboard.press("Enter")
    found = tab.locator("#search-results").get_by_role("link", name="Method and propositions")
    found.first.click()
    expect(title(tab)).to_contain_text("Method and propositions")
    assert tab.get_by_role("main").get_by_text("homeomorphism").count() > 0


def test_a_search_for_nothing_that_is_there_says_so(tab, address):
    visit(tab, f"{address}/search.html?q=zyxwvutsrq")
    expect(tab.locator("#search-results")).to_contain_text("did not match any documents")


def test_a_cross_reference_leads_to_the_table_it_names(tab, address):
    visit(tab, f"{address}/book/02_nlu.html")
    link = tab.locator("article a:has(.std-numref)").first
    name = link.inner_text()
    link.click()
    goal = tab.locator(f"[id='{urlsplit(tab.url).fragment}']")
    expect(goal).to_be_in_viewport()
    expect(goal.locator(".caption-number")).to_have_text(name)


def test_next_and_previous_follow_the_contents(tab, address):
    visit(tab, f"{address}/book/intro.html")
    listed = tab.locator("nav.bd-links a").evaluate_all("links => links.map(a => a.href)")
    for at, button in ((1, "next page"), (2, "next page"), (1, "previous page")):
        onward = tab.get_by_title(button)
        goal = onward.locator(".prev-next-title").inner_text()
        onward.click()
        tab.wait_for_url(listed[at])
        expect(title(tab)).to_contain_text(goal)


def test_the_keyboard_leads_past_the_contents_into_the_text(tab, address):
    visit(tab, f"{address}/book/intro.html")
    tab.keyboard.press("Tab")
    expect(tab.get_by_role("link", name="Skip to main content")).to_be_focused()
    tab.keyboard.press("Enter")
    tab.keyboard.press("Tab")
    assert tab.evaluate("document.activeElement.closest('main') !== null")


def test_dark_mode_takes_effect_and_lasts(tab, address):
    def ground() -> list[int]:
        colour = tab.locator("body").evaluate("e => getComputedStyle(e).backgroundColor")
        return [int(v) for v in colour.removeprefix("rgb(").removesuffix(")").split(",")]

    visit(tab, f"{address}/book/intro.html")
    assert min(ground()) > 200
    for _ in range(3):  # the button goes round: system, light, dark
        if tab.locator("html").get_attribute("data-theme") == "dark":
            break
        tab.get_by_role("button", name="Color mode").click()
    assert max(ground()) < 60
    visit(tab, f"{address}/book/02_nlu.html")
    assert max(ground()) < 60


def test_the_notebook_of_a_chapter_can_be_downloaded(tab, address, tmp_path):
    visit(tab, f"{address}/book/02_nlu.html")
    tab.get_by_role("button", name="Download this page").click()
    with tab.expect_download() as coming:
        tab.get_by_role("link", name=".ipynb").click()
    assert coming.value.suggested_filename == "02_nlu.ipynb"
    coming.value.save_as(tmp_path / "got.ipynb")
    got = json.loads((tmp_path / "got.ipynb").read_text(encoding="utf-8"))
    own = json.loads((ROOT / "book/02_nlu.ipynb").read_text(encoding="utf-8"))
    assert got["nbformat"] == 4 and got["cells"] == own["cells"]


def test_contents_and_search_are_at_hand_on_a_telephone(tab, address):
    tab.set_viewport_size(PHONE)
    visit(tab, f"{address}/book/intro.html")
    tab.get_by_role("button", name="Toggle primary sidebar").click()
    tab.get_by_role("link", name="Method and propositions").first.click()
    expect(title(tab)).to_contain_text("Method and propositions")
    tab.get_by_role("button", name="Search").click()
    expect(tab.get_by_role("searchbox").first).to_be_focused()


# --------------------------------------------------------------------------- every page


def test_no_page_has_a_fault(tab, address, site, pages, faults):
    """Console, requests, heading, images, captions, contrast, focus, width."""
    found = {}
    for name in (p.relative_to(site).as_posix() for p in pages):
        if name == "index.html":
            continue  # a mere redirection, see above
        visit(tab, f"{address}/{name}")
        found[name] = look(tab) + faults
        faults.clear()
    left = {name: few for name, few in found.items() if few}
    assert not left, json.dumps(left, indent=1, ensure_ascii=False)


def test_formulas_are_set_without_a_server(tab, pages, faults):
    """Opened from the disk, as after `make book`."""
    mathematical = [p for p in pages if 'class="math' in p.read_text(encoding="utf-8")]
    assert mathematical
    for path in mathematical:
        visit(tab, path.resolve().as_uri())
        assert not tab.evaluate("checks.formulas()") + faults, path.name


GOOD = """<!DOCTYPE html><html lang="en"><link rel="icon" href="data:,"><title>t</title><main>
<h1>One</h1><p>Dark on white, <a href="#a" style="color: #00c">a link</a>.</p>
<img alt="a dot" src="data:image/gif;base64,R0lGODlhAQABAAAAACwAAAAAAQABAAA=">
<table><caption><span class="caption-number">Table 1</span> <svg width="9" height="9"></svg></caption>
<tr><td>1</td></tr></table>
</main></html>"""
BAD = {
    "2 headings of the first level": ("</h1>", "</h1><h1>Two</h1>"),
    "an image without description": ('alt="a dot"', ""),
    "an image without content": ("R0lGOD", "AAAA"),
    "a formula that is not set": ("Dark", "<span class=math>x</span> Dark"),
    "a caption on the wrong side": ("<caption>", '<caption style="caption-side: bottom">'),
    "light, pale: p 'Dark": ("<p>", '<p style="color: #888">'),
    "pale: a 'a link'": ("#00c", "#99f"),
    "keyboard focus does not show: a 'a link'": ("#00c", "#00c; outline: none"),
    "not reached by keyboard": ("<a ", '<a onfocus="this.blur()" '),
    "px wide at 390": ("<p>", '<p style="width: 500px">'),
}


def test_a_page_without_faults_passes_the_checks(context, tmp_path):
    (tmp_path / "page.html").write_text(GOOD)
    page = context.new_page()
    page.goto((tmp_path / "page.html").as_uri())
    assert look(page) == []


@pytest.mark.parametrize("fault", BAD)
def test_the_checks_find(fault, context, tmp_path):
    assert GOOD.count(BAD[fault][0]) == 1
    (tmp_path / "page.html").write_text(GOOD.replace(*BAD[fault]))
    page = context.new_page()
    page.goto((tmp_path / "page.html").as_uri())
    assert any(fault in f for f in look(page)), look(page)


@pytest.mark.parametrize(
    ("script", "fault"),
    [
        ("console.error('alas')", "console: alas"),
        ("undefined.x", "script: "),
        ("fetch('https://example.org/').catch(() => 0)", "asks elsewhere: https://example.org/"),
        ("fetch('nowhere').catch(() => 0)", "404: "),
    ],
)
def test_the_watch_notices(script, fault, context, address):
    page, faults = context.new_page(), []
    watch(page, urlsplit(address).netloc, faults)
    page.goto(f"{address}/book/intro.html")
    page.add_script_tag(content=script)
    page.wait_for_timeout(300)
    assert any(f.startswith(fault) for f in faults), faults
