"""Chapters as files: hygiene, table of contents, parameter files, guards."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import yaml

from armada_lib import runs
from armada_lib.profiles import ROOT

BOOK = ROOT / "book"
NOTEBOOKS = sorted(BOOK.glob("*.ipynb"))
STUDIES = {"study.yaml"}  # lists of cells, not parameters of a chapter: see test_experiment.py
PLANS = sorted(p for p in (ROOT / "params").glob("*.yaml") if p.name not in STUDIES)
SCRIPTS = Path(sys.executable).parent

chapters = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.name)


@cache
def cells(path: Path) -> list[dict]:
    """The cells of a notebook, each with its source as one string."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    return [c | {"source": "".join(c["source"])} for c in notebook["cells"]]


def code(path: Path) -> list[dict]:
    return [c for c in cells(path) if c["cell_type"] == "code"]


def defaults(path: Path) -> dict[str, object]:
    """What the parameters cell sets."""
    (cell,) = [c for c in code(path) if "parameters" in c["metadata"].get("tags", [])]
    body = ast.parse(cell["source"]).body
    assert all(isinstance(node, ast.Assign) for node in body), "only assignments"
    return {node.targets[0].id: ast.literal_eval(node.value) for node in body}  # type: ignore


def test_there_are_chapters():
    assert NOTEBOOKS, "no notebook in book/"


@chapters
def test_kernel_and_metadata(path):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert set(notebook["metadata"]) <= {"kernelspec", "language_info"}
    # a kernel named after somebody's environment would stop papermill and the build elsewhere
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    assert set(notebook["metadata"].get("language_info", {})) <= {"name"}
    ids = [c["id"] for c in notebook["cells"]]
    assert len(set(ids)) == len(ids)
    for cell in notebook["cells"]:
        assert set(cell["metadata"]) <= {"tags", "mystnb"}, cell["id"]


@chapters
def test_stored_without_outputs(path):
    for cell in code(path):
        assert cell["outputs"] == [] and cell["execution_count"] is None, cell["id"]


@chapters
def test_parameters_cell_comes_first_and_the_guard_next(path):
    first, guard = code(path)[:2]
    assert first["metadata"].get("tags") == ["parameters"]
    assert defaults(path)
    assert re.search(r"(guard\.params|plans\.\w+)\(globals\(\)", guard["source"])


@chapters
def test_a_cell_with_a_figure_ends_in_it(path):
    """Inside an `if` it would be drawn and never shown."""
    for cell in code(path):
        if "figure" in cell["metadata"].get("mystnb", {}):
            assert isinstance(ast.parse(cell["source"]).body[-1], ast.Expr), cell["id"]


@chapters
def test_code_fits_the_page(path):
    for cell in code(path):
        for line in cell["source"].splitlines():
            assert len(line) <= 88, f"{cell['id']}: {line}"


@chapters
def test_library_code_stays_in_the_library(path):
    for cell in code(path):
        source = re.sub(r"^%.*$", "", cell["source"], flags=re.M)
        made = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.ClassDef)]
        assert not made, f"{cell['id']} defines {[n.name for n in made]}"
        assert not re.search(r"^\s*[!%](?!matplotlib)", cell["source"], flags=re.M), cell["id"]
        assert "tqdm.auto" not in source, "widgets leave empty space in the pages: use plain tqdm"


def test_table_of_contents_lists_exactly_the_pages():
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))
    listed = [toc["root"]] + [c["file"] for p in toc["parts"] for c in p["chapters"]]
    places = [*BOOK.iterdir(), *(BOOK / "api").iterdir()]
    files = [p for p in places if p.suffix in {".md", ".ipynb"}]
    assert sorted(listed) == sorted(str(p.relative_to(ROOT).with_suffix("")) for p in files)


def test_chapter_tables_list_exactly_the_chapters():
    for page in ("README.md", "book/intro.md"):
        text = (ROOT / page).read_text(encoding="utf-8")
        named = re.findall(r"^\| (?:\[[^\]]*\]\(book/|\{doc\}`)(\w+)", text, flags=re.M)
        assert sorted(named) == [p.stem for p in NOTEBOOKS], page


@pytest.mark.parametrize("plan", PLANS, ids=lambda p: p.name)
def test_parameter_files_fit_their_chapter(plan):
    text = plan.read_text(encoding="utf-8")
    commands = re.findall(r"papermill (\S+) out\.ipynb -f (\S+)", text)
    assert commands, "a parameter file says how to use it"
    values = yaml.safe_load(text)
    for notebook, own in commands:
        assert ROOT / own == plan
        known = defaults(ROOT / notebook)
        assert set(values) <= set(known)
        same = [k for k, v in values.items() if known[k] == v]
        assert not same, f"{same} are the chapter's defaults: a file holds only what differs"
    for line in text.splitlines():
        if re.match(r"\w+:", line):
            assert "#" in line, f"no source: {line}"


# ---------------------------------------------------------------------------- parameters


def papermill_command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [SCRIPTS / "papermill", "--no-progress-bar", *arguments],
        # the reader's own store: what building the book has computed is not computed again
        env=os.environ | {"ARMADA_STORE": str(ROOT / ".armada")},
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip


def misspelling(path: Path, what: str) -> tuple[str, dict[str, object]]:
    """(the wrong word, parameters that hold it) for a chapter."""
    first = next(iter(defaults(path)))
    if what == "a name":
        wrong = first[1] + first[0] + first[2:]
        return wrong, {wrong: 1}
    if "profile" not in defaults(path):
        pytest.skip("the chapter has no profile")
    return "minni", {"profile": "minni"}


def pass_guard(path: Path, given: dict[str, object]) -> None:
    """Run a chapter's cells up to the guard as papermill does; the guard follows the parameters."""
    found = code(path)
    at = next(i for i, c in enumerate(found) if "parameters" in c["metadata"].get("tags", []))
    asked = "# Parameters\n" + "\n".join(f"{k} = {v!r}" for k, v in given.items())
    sources = [c["source"] for c in found[: at + 2]]
    sources.insert(at + 1, asked)
    names: dict[str, object] = {"__name__": "__main__", "In": ["", *sources]}
    for source in sources:
        exec(source, names)


@chapters
@pytest.mark.parametrize("what", ["a name", "a value"])
def test_a_misspelt_parameter_stops_a_chapter_at_its_guard(path, what, monkeypatch):
    monkeypatch.setattr(runs, "compute", lambda *a, **k: pytest.fail("work was started"))
    wrong, given = misspelling(path, what)
    with pytest.raises(ValueError, match=f"'{wrong}'; did you mean"):
        pass_guard(path, given)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["a name", "a value"])
def test_papermill_reports_a_misspelt_parameter_before_any_work(what, tmp_path):
    path, out = ROOT / "book/02_nlu.ipynb", tmp_path / "out.ipynb"
    wrong, given = misspelling(path, what)
    done = papermill_command(str(path), str(out), "-p", *map(str, *given.items()))
    assert done.returncode != 0
    assert f"'{wrong}'; did you mean" in done.stderr
    ran = [c for c in code(out) if c["execution_count"] is not None]
    assert len(ran) <= 3  # parameters, papermill's own cell and the guard: nothing after them
