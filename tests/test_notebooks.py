"""Chapters as files: hygiene, table of contents, parameter files, commands of the README."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
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
PAGES = ["README.md", "CONTRIBUTING.md", "book/intro.md"]
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
    assert re.search(r"(chapter\.params|plans\.\w+)\(globals\(\)", guard["source"])


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
    files = [p for p in BOOK.iterdir() if p.suffix in {".md", ".ipynb"}]
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


# ---------------------------------------------------------------------------- commands


def commands(page: str) -> list[str]:
    """Lines of the shell blocks of a page, without comments."""
    text = (ROOT / page).read_text(encoding="utf-8")
    blocks = re.findall(r"```bash\n(.*?)```", text, flags=re.S)
    lines = [re.sub(r"\s+#.*", "", line).strip() for b in blocks for line in b.splitlines()]
    return [line for line in lines if line]


def test_every_make_command_exists():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^(\w+):.*##", makefile, flags=re.M))
    texts = [(ROOT / page).read_text(encoding="utf-8") for page in PAGES]
    texts.append((ROOT / ".ci" / "run").read_text(encoding="utf-8"))
    named = {t for text in texts for t in re.findall(r"^make (\w+)|`make (\w+)", text, flags=re.M)}
    named = {a or b for a, b in named}
    assert {"nlu", "test", "book", "lab", "check", "bench"} <= named <= targets
    for target in sorted(targets):
        done = subprocess.run(
            ["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr


def test_make_nlu_runs_the_line_of_the_readme():
    line = "papermill book/02_nlu.ipynb out.ipynb -p teacher sd14"
    assert line in commands("README.md")
    done = subprocess.run(
        ["make", "--dry-run", "nlu"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert f"/{line}\n" in done.stdout


def test_papermill_lines_name_files_and_parameters_that_exist():
    lines = [shlex.split(c) for c in commands("README.md") if c.startswith("papermill ")]
    assert lines
    for _, notebook, out, *options in lines:
        assert (ROOT / notebook).exists() and out == "out.ipynb"
        for i, option in enumerate(options):
            if option == "-p":
                assert options[i + 1] in defaults(ROOT / notebook)
            if option == "-f":
                assert (ROOT / options[i + 1]).exists()


def papermill(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [SCRIPTS / "papermill", "--no-progress-bar", *arguments],
        # the reader's own store: what building the book has computed is not computed again
        env=os.environ | {"ARMADA_STORE": str(ROOT / ".armada")},
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.slow
def test_the_readme_line_runs(tmp_path):
    line = next(c for c in commands("README.md") if c.startswith("papermill "))
    _, notebook, _, *options = shlex.split(line)
    out = tmp_path / "out.ipynb"
    done = papermill(notebook, str(out), *options, "-p", "profile", "smoke")
    assert done.returncode == 0, done.stderr[-3000:]
    shown = [o for c in code(out) for o in c["outputs"]]
    assert any("verdict" in "".join(o.get("data", {}).get("text/markdown", "")) for o in shown)
    assert not any(o["output_type"] == "error" for o in shown)


def misspelling(path: Path, what: str) -> tuple[str, dict[str, object]]:
    """(the wrong word, parameters that hold it) for a chapter."""
    first = next(iter(defaults(path)))
    if what == "a name":
        wrong = first[1] + first[0] + first[2:]
        return wrong, {wrong: 1}
    if "profile" not in defaults(path):
        pytest.skip("the chapter has no profile")
    return "minni", {"profile": "minni"}


@chapters
@pytest.mark.parametrize("what", ["a name", "a value"])
def test_a_misspelt_parameter_stops_a_chapter_at_its_guard(path, what, monkeypatch):
    """The cells up to the guard as papermill runs them; the guard is the one after the parameters."""
    monkeypatch.setattr(runs, "compute", lambda *a, **k: pytest.fail("work was started"))
    cells = code(path)
    at = next(i for i, c in enumerate(cells) if "parameters" in c["metadata"].get("tags", []))
    wrong, given = misspelling(path, what)
    asked = "# Parameters\n" + "\n".join(f"{k} = {v!r}" for k, v in given.items())
    sources = ["".join(c["source"]) for c in cells[: at + 2]]
    sources.insert(at + 1, asked)
    names: dict[str, object] = {"__name__": "__main__", "In": ["", *sources]}
    *before, guard = sources
    for source in before:
        exec(source, names)
    with pytest.raises(ValueError, match=f"'{wrong}'; did you mean"):
        exec(guard, names)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["a name", "a value"])
def test_papermill_reports_a_misspelt_parameter_before_any_work(what, tmp_path):
    path, out = ROOT / "book/02_nlu.ipynb", tmp_path / "out.ipynb"
    wrong, given = misspelling(path, what)
    done = papermill(str(path), str(out), "-p", *map(str, *given.items()))
    assert done.returncode != 0
    assert f"'{wrong}'; did you mean" in done.stderr
    ran = [c for c in code(out) if c["execution_count"] is not None]
    assert len(ran) <= 3  # parameters, papermill's own cell and the guard: nothing after them
