"""Pages made from the library's source, the glossary's links, launch buttons and the citation file."""

from __future__ import annotations

import ast
import json
import logging
import os
import re
import sys
import tomllib
import types
from concurrent import futures

import armada_api
import armada_chapters
import armada_pages
import armada_terms
import nbformat
import pytest
import yaml
from docutils import nodes
from jupyter_cache import get_cache
from nbformat import v4
from sphinx.errors import ExtensionError

from armada_lib import __version__
from armada_lib.profiles import ROOT

PAGES = sorted((ROOT / "book" / "api").glob("*.md"))


def rooms(page) -> list[tuple[str, dict[str, str]]]:
    """(module, options) of every place on a page that shows the library."""
    text = page.read_text(encoding="utf-8")
    found = re.findall(r"```\{armada-api\} (\S+)\n((?::\w+:.*\n)*)```", text)
    assert len(found) == text.count("{armada-api}"), page.name
    return [(name, dict(re.findall(r":(\w+): *(.*)", options))) for name, options in found]


# ----------------------------------------------------------------------------- the reference


def test_there_are_reference_pages():
    assert len(PAGES) > 5
    assert sum(len(rooms(p)) for p in PAGES) > 40


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_what_a_reference_page_shows_is_there_and_documented(page):
    for name, options in rooms(page):
        of = armada_api.room(ROOT, name)
        assert ast.get_docstring(of.tree), f"{name} has no docstring"
        chosen = of.chosen(options.get("only"))
        assert chosen, name
        for called, node in chosen.items():
            assert ast.get_docstring(node), f"{name}.{called} has no docstring"
        for shown in options.get("show", "").split():
            assert shown in of.value(shown)


def test_each_room_is_introduced_once():
    introduced = [name for p in PAGES for name, options in rooms(p) if "more" not in options]
    assert sorted(set(introduced)) == sorted(introduced)


@pytest.fixture
def api(tmp_path):
    """The extension, and a library of one module."""
    (tmp_path / "armada_lib").mkdir()
    (tmp_path / "armada_lib" / "one.py").write_text(
        '"""One."""\n'
        "from armada_lib.two import Other as Another\n"
        "SIZES: dict[str, int] = {\n    'a': 1,  # why\n}  # fmt: skip\n"
        "class Box:\n"
        '    """A box."""\n'
        "    # outside\n"
        "    width: int = 3  # in cm\n"
        "    _own: int = 0\n"
        "    def fill(self, by: float = 1.0, /, *more: int) -> Another:\n"
        '        """Fill it."""\n'
        "    def untold(self): ...\n"
        "def bare(x): ...\n"
        "def _hidden(): ...\n"
    )
    return armada_api, armada_api.room(tmp_path, "armada_lib.one")


def test_a_room_is_read_without_importing_it(api):
    module, one = api
    assert list(one.public()) == ["Box", "bare"]
    assert one.value("SIZES").endswith("'a': 1,  # why\n}")
    box = one.public()["Box"]
    assert module.fields(one, box) == "# outside\nwidth: int = 3  # in cm"
    (fill,) = module.methods(box)
    assert module.signature(fill, bound=True) == "(by: float=1.0, /, *more: int) -> Another"
    assert module.signature(fill).startswith("(self, by")
    assert "armada_lib.one" not in sys.modules


def test_names_mean_what_their_module_says(api):
    _, one = api
    assert one.full("Box.fill") == "armada_lib.one.Box.fill"
    assert one.full("Another") == "armada_lib.two.Other"
    assert one.full("one.Box") == "armada_lib.one.Box"
    assert one.full("Tensor") is None and one.full("x + 1") is None


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, one: m.room(one.path.parents[1], "armada_lib.none"), "no module armada_lib.none"),
        (lambda m, one: one.chosen("Box bear"), "no public bear"),
        (lambda m, one: one.chosen("_hidden"), "no public _hidden"),
        (lambda m, one: one.value("COLOURS"), "defines no COLOURS"),
    ],
)  # fmt: skip
def test_what_is_not_there_is_named(api, call, message):
    with pytest.raises(ValueError, match=message):
        call(*api)


def test_docstrings_stay_as_they_are_but_for_marks(api):
    module, one = api
    text = "Of |a_ts - b|_2 and `Box`, *not* `y`:\n\n    E = a * b\n\n* one\n  more\n* **two**"
    paragraph, block, items = module.body(text, one)
    assert paragraph.astext() == "Of |a_ts - b|_2 and Box, not y:"
    (link,) = paragraph.findall(module.addnodes.pending_xref)
    assert link["reftarget"] == "armada_lib.one.Box"
    assert [n.astext() for n in paragraph.findall(nodes.emphasis)] == ["not"]
    assert block.astext() == "E = a * b"
    assert [n.astext() for n in items] == ["one more", "two"]


# ----------------------------------------------------------------------------- glossary, buttons


def test_glossary_is_in_order_and_links_lead_to_it():
    text = (ROOT / "book" / "notation.md").read_text(encoding="utf-8")
    (glossary,) = re.findall(r"````\{glossary\}\n(.*?)````", text, flags=re.S)
    terms = re.findall(r"^(?! )(\S.*)$", glossary, flags=re.M)
    assert len(terms) > 30 and terms == sorted(terms, key=str.casefold)
    for page in [*(ROOT / "book").glob("*.md"), *PAGES]:
        for link in re.findall(r"\{term\}`([^`]+)`", page.read_text(encoding="utf-8")):
            named = re.sub(r".*<(.*)>", r"\1", link)
            assert named in terms, f"{page.name}: {named}"


def test_links_to_terms_carry_their_meaning():
    doctree = nodes.document(None, None)  # type: ignore[arg-type]
    item = nodes.definition_list_item("", nodes.term(ids=["term-run"]), nodes.definition())
    item[1] += nodes.paragraph("", "One student,\ntrained once.")
    doctree += armada_terms.addnodes.glossary("", nodes.definition_list("", item))
    doctree += nodes.table("", nodes.title("", "Scores\nby task"), ids=["scores"])
    doctree += nodes.figure("", nodes.caption("", "Gains"), ids=["gains", "id1"])
    app = types.SimpleNamespace(env=types.SimpleNamespace())
    armada_terms.collect(app, doctree)
    links = [nodes.reference(refuri=f"notation.html#{name}") for name in ("term-run", "symbols")]
    here = [nodes.reference(refid=name) for name in ("scores", "gains")]
    other = nodes.document(None, None)  # type: ignore[arg-type]
    other += [*links, *here]
    armada_terms.explain(app, other, "intro")
    assert links[0]["reftitle"] == "One student, trained once." and "reftitle" not in links[1]
    assert [link["reftitle"] for link in here] == ["Scores by task", "Gains"]


@pytest.mark.parametrize("address", ["", "https://github.com/owner/name"])
def test_one_setting_switches_the_launch_buttons(address):
    config = types.SimpleNamespace(html_theme_options={"repository_url": address})
    armada_pages.buttons(None, config)
    options = config.html_theme_options
    assert bool(options["launch_buttons"]) == options["use_repository_button"] == bool(address)
    ours = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))
    assert not ours["sphinx"]["config"]["html_theme_options"]["repository_url"], "no public address"


# ----------------------------------------------------------------------------- running the chapters


def chapters(folder, **cells):
    """Notebooks of one cell each in `folder`, and what Sphinx gives an extension that reads them."""
    for name, code in cells.items():
        nbformat.write(v4.new_notebook(cells=[v4.new_code_cell(code)]), folder / f"{name}.ipynb")
    settings = types.SimpleNamespace(execution_cache_path=str(folder / "cache"))
    env = types.SimpleNamespace(
        doc2path=lambda d: folder / (d if "." in d else f"{d}.ipynb"), mystnb_config=settings
    )
    config = types.SimpleNamespace(nb_execution_timeout=60, root_doc="intro.md")
    return types.SimpleNamespace(config=config, env=env)


def read(app, *docnames):
    """What Sphinx has the extension do when it reads these pages."""
    armada_chapters.start(app, app.env, list(docnames))
    for name in docnames:
        armada_chapters.await_chapter(app, name, [""])


def shown(folder, name):
    """What the page of a chapter would show; None if it would have to be run again."""
    cache, notebook = get_cache(folder / "cache"), nbformat.read(folder / f"{name}.ipynb", 4)
    try:
        return cache.merge_match_into_notebook(notebook)[1].cells[0].outputs[0].text
    except KeyError:
        return None


def test_chapters_are_run_in_their_folder_side_by_side_and_again_by_the_next_build(
    tmp_path, monkeypatch
):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    meet = (  # each waits for the other, which only works side by side
        "import os, pathlib, time\npathlib.Path('{}').touch()\nfor _ in range(300):\n"
        "    if pathlib.Path('{}').exists(): break\n    time.sleep(0.1)\n"
        "else: raise TimeoutError\nprint(pathlib.Path('said').read_text(), os.environ['OMP_NUM_THREADS'])"
    )
    app = chapters(tmp_path, a=meet.format("a.met", "b.met"), b=meet.format("b.met", "a.met"))
    (tmp_path / "said").write_text("first")
    read(app, "a", "intro.md", "b")
    assert shown(tmp_path, "a") == shown(tmp_path, "b") == "first 3\n"
    (tmp_path / "said").write_text("second")
    read(app, "intro.md")  # nothing to run: nothing is thrown away
    assert shown(tmp_path, "a") == "first 3\n"
    read(app, "a")
    assert shown(tmp_path, "a") == "second 6\n" and shown(tmp_path, "b") is None


def test_kernels_have_no_ports_that_others_could_take(tmp_path):
    app = chapters(
        tmp_path, a="import ipykernel\nprint(open(ipykernel.get_connection_file()).read())"
    )
    read(app, "a")
    about = json.loads(shown(tmp_path, "a"))
    assert about["transport"] == "ipc"
    assert not os.path.exists(os.path.dirname(about["ip"]))  # nothing is left of it


def test_the_introduction_is_read_when_all_chapters_have_run(tmp_path):
    app = chapters(tmp_path, a="1", b="open('made', 'w').close()")
    armada_chapters.start(app, app.env, ["a", "b", "intro.md"])
    armada_chapters.await_chapter(app, "intro.md", [""])
    assert (tmp_path / "made").exists() and not app.armada_running.begun


def test_a_chapter_that_fails_ends_the_build_with_its_traceback(tmp_path, monkeypatch):
    monkeypatch.setenv("ARMADA_CHAPTERS", "1")
    make = "open('{}', 'w').close()"
    app = chapters(tmp_path, a="1 / 0", b=make.format("b"), c=make.format("c"))
    with pytest.raises(ExtensionError, match=r"a\.ipynb failed:(?s:.*)ZeroDivisionError"):
        read(app, "a", "b", "c")
    futures.wait([task for _, task in app.armada_running.begun.values()], timeout=60)
    assert not (tmp_path / "c").exists()  # b may have been under way


@pytest.mark.parametrize("said", ["0", "-1", "two", "1.5"])
def test_the_number_of_chapters_at_a_time_is_checked(said, monkeypatch):
    monkeypatch.setenv("ARMADA_CHAPTERS", said)
    with pytest.raises(ExtensionError, match=f"ARMADA_CHAPTERS is '{said}': give a whole number"):
        armada_chapters.at_a_time()


# ----------------------------------------------------------------------------- the first page


def role(folder, text, named="Status"):
    """What a role makes of a text in a page of a book in `folder`, and the files it rests on."""
    used = []
    env = types.SimpleNamespace(srcdir=str(folder), docname="intro", note_dependency=used.append)
    settings = types.SimpleNamespace(env=env)
    inliner = types.SimpleNamespace(document=types.SimpleNamespace(settings=settings))
    made, problems = getattr(armada_pages, named)()("r", text, text, 1, inliner)
    assert not problems
    return made, used


def test_the_first_page_counts_what_became_of_a_chapters_claims(tmp_path):
    table = tmp_path / "book" / "ledger.csv"
    table.parent.mkdir()
    rows = ["a,?,undecided", "a,✘,not reproduced", "b,✔,reproduced", "a,?,undecided"]
    table.write_text("chapter,sign,status\n" + "\n".join(rows) + "\n", encoding="utf-8")
    made, used = role(tmp_path, "a")
    assert "".join(n.astext() for n in made) == "2\N{NO-BREAK SPACE}? 1\N{NO-BREAK SPACE}✘"
    assert [n["explanation"] for n in made[::2]] == ["undecided", "not reproduced"]
    assert used == [str(table)]  # a changed ledger makes the page stale
    assert [n.astext() for n in role(tmp_path, "c")[0]] == ["–"]


@pytest.fixture
def warned(caplog):
    logger = logging.getLogger("sphinx.armada_pages")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


def test_without_a_ledger_the_build_is_warned(tmp_path, warned):
    assert role(tmp_path, "a") == ([], [])
    assert "no ledger to count in" in warned.text


def test_minutes_of_nothing_that_is_timed_warn_and_name_what_is(tmp_path, warned):
    file = tmp_path / "book" / "results" / "minutes.json"
    file.parent.mkdir(parents=True)
    file.write_text(
        '{"cores": 2, "bf16": true, "all": 600, "stored": 60, "chapters": {"02_nlu": 90}}'
    )
    made, used = role(tmp_path, "02_nlu", "Minutes")
    assert [n.astext() for n in made] == ["1½"] and used == [str(file)]
    assert role(tmp_path, "02_nul", "Minutes") == ([], [str(file)])
    assert "no minutes of '02_nul'; there are: all, stored, machine, 02_nlu" in warned.text


def test_every_chapter_that_judges_claims_shows_their_status():
    text = (ROOT / "book" / "intro.md").read_text(encoding="utf-8")
    shown = re.findall(r"^\| \{doc\}`(\w+)`.*\{status\}`(\w+)` \|$", text, flags=re.M)
    assert all(of == counted for of, counted in shown)
    entries = yaml.safe_load((ROOT / "book" / "ledger.yaml").read_text(encoding="utf-8"))["entries"]
    assert {of for of, _ in shown} == {e["chapter"] for e in entries}


def test_a_build_leaves_what_each_notebook_took(tmp_path):
    kept = {"book/02_nlu": {"exec_data": {"runtime": 12.5}}, "book/intro": {}}
    env = types.SimpleNamespace(nb_metadata=kept)
    app = types.SimpleNamespace(env=env, doctreedir=str(tmp_path))
    armada_pages.time_notebooks(app, None)
    assert json.loads((tmp_path / "seconds.json").read_text()) == {"02_nlu": 12.5}


def test_minutes_are_those_of_the_file_to_the_half():
    minutes = armada_pages.minutes
    about = {
        "cores": 2,
        "bf16": False,
        "chapters": {"a": 4.0, "b": 74.9, "c": 165.0},
        "all": 1490,
        "stored": 95,
    }
    shown = [minutes(about, name) for name in ("a", "b", "c", "all", "stored")]
    assert shown == ["½", "1", "3", "25", "1½"]
    assert minutes(about, "machine") == "2 cores without bf16 instructions"
    assert minutes(about | {"bf16": True}, "machine") == "2 cores with bf16 instructions"
    with pytest.raises(KeyError):
        minutes(about, "d")


def test_readme_and_first_page_have_the_measured_minutes_of_every_chapter():
    minutes = armada_pages.minutes
    file = ROOT / "book" / "results" / "minutes.json"
    about = json.loads(file.read_text(encoding="utf-8"))
    first = (ROOT / "book" / "intro.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| \{doc\}`(\w+)` .*\{minutes\}`(\w+)` \|", first, flags=re.M)
    notebooks = {p.stem for p in (ROOT / "book").glob("*.ipynb")}
    assert all(of == timed for of, timed in rows)
    assert {of for of, _ in rows} == notebooks == set(about["chapters"])
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    said = re.findall(r"^\| \[.*\]\(book/(\w+)\.ipynb\) .* \| ([\d½]+) \|$", readme, flags=re.M)
    assert dict(said) == {of: minutes(about, of) for of in notebooks}
    sentence = f"Minutes are of {minutes(about, 'machine')}; all chapters together took {minutes(about, 'all')}"
    assert sentence in readme


# ----------------------------------------------------------------------------- citation


def test_citation_agrees_with_the_project_and_the_bibliography():
    cff = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    book = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))
    assert cff["cff-version"] == "1.2.0" and cff["message"] and cff["type"] == "software"
    assert project["dynamic"] == ["version"] and str(cff["version"]) == __version__
    assert cff["license"] == project["license"]
    assert cff["title"] == book["title"]
    assert [a["name"] for a in cff["authors"]] == [book["author"]]
    (paper,) = cff["references"]
    bib = (ROOT / "book" / "references.bib").read_text(encoding="utf-8")
    (entry,) = re.findall(r"@misc\{sengupta2026armada,(.*?)\n\}", bib, flags=re.S)
    fields = dict(re.findall(r"(\w+)\s*=\s*\{(.*)\}", entry))
    names = [f"{a['family-names']}, {a['given-names']}" for a in paper["authors"]]
    assert " and ".join(names) == fields["author"]
    assert paper["title"] == fields["title"] and str(paper["year"]) == fields["year"]
    assert paper["identifiers"][0]["value"] == "arXiv:" + fields["eprint"]
    assert paper["url"] == "https://arxiv.org/abs/" + fields["eprint"]
