"""Every command and every piece of Python that the pages show: README, CONTRIBUTING, book, chapters,
and the heads of the files in params/ and examples/.

Run as they stand: `python -m armada_lib extract` and `films` up to the work itself; papermill lines
as far as papermill's own reading of them and the chapter's guard, which refuses wrong names and
values; Python blocks, with profile smoke (slow). Checked only: `make` by a dry run, `study` up to
its first missing data set, and what prepares a shell (export, source, pip, pre-commit). Real data
sets, checkpoints of the hub and a GPU are not here: a command that needs them must get as far as
saying so. A block of a kind that no rule knows fails, and so does a command without a rule.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import runpy
import shlex
import subprocess
import tomllib
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import papermill.cli
import pytest
import yaml
from accelerate.commands.launch import launch_command_parser
from markdown_it import MarkdownIt
from pydantic import TypeAdapter
from test_notebooks import NOTEBOOKS, cells, code, defaults, papermill_command, pass_guard

from armada_lib import __main__ as cli
from armada_lib import experiment, extraction, films, profiles, run_data, runs, working
from armada_lib.profiles import ROOT
from armada_lib.teacher_settings import TeacherSpec

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "book").rglob("*.md"))]
VARIABLE = re.compile(r"[A-Z_]+=")
# The reader's own files in the commands, and what stands for them here.
THEIRS = {
    "/path/to/data": None,
    "/path/to/mmimdb": None,
    "/fast/disk/armada": None,
    "tickets.csv": "subject,urgency\n" + "".join(f"leak {i},{i % 2}\n" for i in range(40)),
    "my_sentences.csv": "text\nA red bird on a tree.\n",
}  # fmt: skip


class Block(NamedTuple):
    page: str
    kind: str
    text: str


def fences(text: str) -> Iterator[tuple[str, str]]:
    """(what is written behind the backticks, content) of code, also inside of directives."""
    for token in MarkdownIt().enable("table").parse(text):
        if token.type == "code_block":
            yield "indented", token.content
        elif token.type == "fence" and token.info.startswith("{"):
            if re.match(r"\{(code|source)", token.info):
                yield token.info, token.content
            else:
                yield from fences(token.content)
        elif token.type == "fence":
            yield token.info.strip(), token.content


@cache
def texts() -> dict[str, str]:
    """The prose of every page and chapter, by its name in the project."""
    found = {p.relative_to(ROOT).as_posix(): p.read_text(encoding="utf-8") for p in PAGES}
    for path in NOTEBOOKS:
        prose = [c["source"] for c in cells(path) if c["cell_type"] == "markdown"]
        found[path.relative_to(ROOT).as_posix()] = "\n\n".join(prose)
    return found


def heads() -> Iterator[Block]:
    """The commands in the comments of parameter files."""
    for folder in ("params", "examples"):
        for path in sorted((ROOT / folder).glob("*.yaml")):
            lines = re.findall(r"^#   (\w\S* .*)$", path.read_text(encoding="utf-8"), flags=re.M)
            yield Block(f"{folder}/{path.name}", "bash", "\n".join(lines))


BLOCKS = [Block(page, *found) for page, text in texts().items() for found in fences(text)]
BLOCKS += heads()
PYTHON = {b.page: [x.text for x in BLOCKS if x[:2] == (b.page, "python")]
          for b in BLOCKS if b.kind == "python"}  # fmt: skip


def commands(text: str) -> list[list[str]]:
    """The commands of a shell block, word by word, without comments."""
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        reader = shlex.shlex(line, posix=True, punctuation_chars=True)
        reader.whitespace_split = True
        command: list[str] = []
        for word in [*reader, ";"]:
            if word in {";", "&&"}:
                found += [command] if command else []
                command = []
            else:
                assert word[0] not in "|&<>()", f"no rule for {word!r} in {line!r}"
                command.append(word)
    return found


# ------------------------------------------------------------------------------ rules


def as_here(words: list[str], home: Path) -> list[str]:
    """The reader's own files replaced by those in `home`."""
    for theirs in THEIRS:
        words = [w.replace(theirs, str(home / theirs.lstrip("/"))) for w in words]
    foreign = [w for w in words if re.search(r"(^|=)/", w) and str(home) not in w]
    assert not foreign, f"files that are not here: {foreign}"
    return words


def environment(word: str, monkeypatch) -> None:
    name, _, value = word.partition("=")
    library = "".join(p.read_text(encoding="utf-8") for p in (ROOT / "armada_lib").rglob("*.py"))
    assert re.search(rf"\b{name}\b", library), f"{name}: the library never reads it"
    monkeypatch.setenv(name, value)


def export(words: list[str], monkeypatch) -> None:
    for word in words:
        environment(word, monkeypatch)


def source(words: list[str], _) -> None:
    (venv,) = re.findall(r"^VENV := (\S+)$", (ROOT / "Makefile").read_text(), flags=re.M)
    assert words == [f"{venv}/bin/activate"]


def make(words: list[str], _) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for word in filter(VARIABLE.match, words):
        assert re.search(rf"^{word.partition('=')[0]} \?=", makefile, flags=re.M), word
    dry(*words)


@cache
def dry(*words: str) -> str:
    done = subprocess.run(
        ["make", "--dry-run", *words], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def lacking(error: BaseException, profile: str) -> bool:
    """Whether a command was right and stopped only at what is not on this machine."""
    return "FileNotFoundError" in f"{type(error)} {error}" and profile in {"cpu", "paper"}


def papermill_line(words: list[str], monkeypatch) -> None:
    """As papermill reads the line; then the chapter's cells up to its guard, with those values."""
    given: dict = {}
    monkeypatch.setattr("papermill.cli.execute_notebook", lambda **k: given.update(k))
    papermill.cli.papermill.main(words, standalone_mode=False)
    assert fnmatch(given["output_path"], "out*.ipynb"), "not ignored by git"
    path, values = ROOT / given["input_path"], given["parameters"]
    assert path in NOTEBOOKS
    assert set(values) <= set(defaults(path))
    try:
        pass_guard(path, values)
    except OSError as e:
        if not lacking(e, values.get("profile", "auto")):
            raise


def library(words: list[str], monkeypatch) -> None:
    """`python -m armada_lib ...`: everything but the work."""
    assert words[:2] == ["-m", "armada_lib"]
    profile = dict(pairwise(words)).get("--profile", "auto")
    if words[2] == "study":
        profile = experiment.load(words[3]).profile
    monkeypatch.setattr(extraction, "fill", lambda *a, **k: 0)
    monkeypatch.setattr(working, "work", lambda *a: {})
    monkeypatch.setattr(experiment, "export", lambda study, store: (store.root, 0))
    monkeypatch.setattr(
        films, "convert", lambda archive, data: {"train": len([*archive.iterdir()])}
    )
    try:
        cli.main(words[2:])
    except SystemExit as e:
        if not lacking(e, profile):
            pytest.fail(f"{shlex.join(words)}: {e}")


def accelerate(words: list[str], monkeypatch) -> None:
    assert words[0] == "launch"
    got = launch_command_parser().parse_args(words[1:])
    assert got.module
    library(["-m", got.training_script, *got.training_script_args], monkeypatch)


def pip(words: list[str], _) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    valid = {"pre-commit", *(f".[{e}]" for e in extras)}
    assert words[0] == "install" and set(words[1:]) - {"-e"} <= valid


def pre_commit(words: list[str], _) -> None:
    assert words == ["install"]
    assert yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]


SHELL: dict[str, Callable[[list[str], pytest.MonkeyPatch], None]] = {
    "accelerate": accelerate,
    "export": export,
    "make": make,
    "papermill": papermill_line,
    "pip": pip,
    "pre-commit": pre_commit,
    "python": library,
    "source": source,
}


def shell(block: Block, home: Path, monkeypatch) -> None:
    for words in commands(block.text):
        program, *rest = as_here(words, home)
        with pytest.MonkeyPatch.context() as this_command:
            while VARIABLE.match(program):
                environment(program, this_command)
                program, *rest = rest
            name = program.removeprefix(".venv/bin/")
            assert name in SHELL, f"no rule for {name!r} in {block.page}: {shlex.join(words)}"
            SHELL[name](rest, monkeypatch if name == "export" else this_command)


def called(tree: ast.Module) -> Iterator[tuple[Callable, ast.Call]]:
    """The library's functions that a piece of Python calls by name, with the calls."""
    names: dict[str, object] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.module
            for alias in node.names:
                home = importlib.import_module(node.module)
                if not hasattr(home, alias.name):
                    importlib.import_module(f"{node.module}.{alias.name}")
                names[alias.asname or alias.name] = getattr(home, alias.name)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                importlib.import_module(alias.name)
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        at = node.func
        if isinstance(at, ast.Name) and at.id in names:
            yield names[at.id], node  # type: ignore[misc]
        if (
            isinstance(at, ast.Attribute)
            and isinstance(at.value, ast.Name)
            and at.value.id in names
        ):
            yield getattr(names[at.value.id], at.attr), node


def python(block: Block, home: Path, monkeypatch) -> None:
    """Names, arguments and teachers' settings; `test_the_python_of_a_page_runs` does the rest."""
    tree = ast.parse(block.text)
    for function, call in called(tree):
        if not any(isinstance(a, ast.Starred) for a in call.args):
            named = {k.arg: None for k in call.keywords if k.arg}
            inspect.signature(function).bind_partial(*call.args, **named)
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict) and any(
            isinstance(k, ast.Constant) and k.value == "kind" for k in node.keys
        ):
            given = {"name": "own", **ast.literal_eval(node)}
            TypeAdapter(TeacherSpec).validate_python({"width": 1, **given})


KINDS: dict[str, Callable[[Block, Path, pytest.MonkeyPatch], None]] = {
    "bash": shell,
    "python": python,
}


def check(block: Block, home: Path, monkeypatch) -> None:
    assert block.kind in KINDS, f"no rule for {block.kind!r} in {block.page}:\n{block.text}"
    KINDS[block.kind](block, home, monkeypatch)


# ------------------------------------------------------------------------------ tests


@pytest.fixture
def home(tmp_path, monkeypatch) -> Iterator[Path]:
    """The project's folder as the reader stands in it, with files of the reader's own."""
    folder = tmp_path / "project"
    folder.mkdir()
    for part in ("book", "examples", "params"):
        (folder / part).symlink_to(ROOT / part)
    for theirs, text in THEIRS.items():
        path = folder / theirs.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir() if text is None else path.write_text(text)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("ARMADA_PROFILE", "smoke")
    monkeypatch.setenv("ARMADA_NO_GPU", "1")
    monkeypatch.setenv("ARMADA_DATA", str(folder / "path/to/data"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    forget = (profiles.load, profiles.file_digest, run_data._examples, extraction.load)
    for known in forget:
        known.cache_clear()
    yield folder
    for known in forget:
        known.cache_clear()


@pytest.fixture
def idle(monkeypatch) -> None:
    monkeypatch.setattr(runs, "compute", lambda *a, **k: pytest.fail("work was started"))


def test_there_are_blocks_of_every_kind():
    assert {b.kind for b in BLOCKS} >= {"bash", "python"}
    for page in ("README.md", "CONTRIBUTING.md", "book/teachers.ipynb", "params/table02.yaml"):
        assert [b for b in BLOCKS if b.page == page], page


@pytest.mark.parametrize("block", BLOCKS, ids=[f"{b.page}-{i}" for i, b in enumerate(BLOCKS)])
def test_a_block_is_right(block, home, idle, monkeypatch):
    check(block, home, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("page", PYTHON)
def test_the_python_of_a_page_runs(page, home, tmp_path, monkeypatch):
    """All its blocks in their order, in one namespace, on a few rows."""
    # the reader's own store: what building the book has computed is not computed again
    monkeypatch.setenv("ARMADA_STORE", str(ROOT / ".armada"))
    path = tmp_path / "page.py"
    path.write_text("\n".join(PYTHON[page]).replace('"mini"', '"smoke"'))
    runpy.run_path(str(path))


@pytest.mark.parametrize(
    ("kind", "text", "said"),
    [
        ("bash", "make nlv", "No rule to make target 'nlv'"),
        ("bash", "make setup TORCH_INDX=x", "TORCH_INDX"),
        ("bash", "papermill book/02_nul.ipynb out.ipynb", "02_nul"),
        ("bash", "papermill book/02_nlu.ipynb book/02_nlu.ipynb", "not ignored"),
        ("bash", "papermill book/02_nlu.ipynb out.ipynb -p taecher sd14", "taecher"),
        ("bash", "papermill book/02_nlu.ipynb out.ipynb -p teacher sd15", "'sd15'"),
        ("bash", "papermill book/02_nlu.ipynb out.ipynb -p profile cpu -p tasks colla", "'colla'"),
        ("bash", "papermill book/02_nlu.ipynb out.ipynb -p profile paper -p manifold x", "'x'"),
        ("bash", "papermill book/02_nlu.ipynb out.ipynb -f params/table01.yaml", "table01"),
        ("bash", "papermill book/02_nlu.ipynb out.ipynb --parameter teacher sd14", "--parameter"),
        ("bash", "papermill book/10_your_own.ipynb out.ipynb -p table tickets.csv", "'label'"),
        ("bash", "python -m armada_lib extrakt --teacher sd14", "2"),
        ("bash", "python -m armada_lib extract --teacher sd15 --texts cola", "'sd15'"),
        ("bash", "python -m armada_lib extract --teacher sd14 --texts colla", "'colla'"),
        ("bash", "python -m armada_lib study params/stady.yaml", "stady"),
        ("bash", "python -m armada_lib study params/study.yaml --lst", "2"),
        ("bash", "python train.py", "train.py"),
        ("bash", "accelerate launch --multi -m armada_lib extract --teacher sd14", "2"),
        ("bash", "export ARMADA_DTAA=/path/to/data", "ARMADA_DTAA"),
        ("bash", "ARMADA_STRE=x make nlu", "ARMADA_STRE"),
        ("bash", "python -m armada_lib films /home/me/mmimdb", "not here"),
        ("bash", "source venv/bin/activate", "venv"),
        ("bash", "pip install armada-lib", "armada-lib"),
        ("bash", "make nlu && curl x", "'curl'"),
        ("bash", "make nlu | tee log", "'|'"),
        ("python", "from armada_lib import runz", "runz"),
        ("python", "from armada_lib import runs\nruns.studdy([])", "studdy"),
        ("python", "from armada_lib import runs\nruns.study([], store_=1)", "store_"),
        ("python", "x = {'kind': 'blackbox', 'source': 'apj'}", "source"),
        ("python", "x = = 1", "invalid syntax"),
        ("yaml", "a: 1", "no rule for 'yaml'"),
        ("", "make nlu", "no rule for ''"),
        ("{code-block} bash", "make nlu", "no rule"),
        ("indented", "make nlu", "no rule"),
    ],
)  # fmt: skip
def test_a_block_that_is_wrong_is_found(kind, text, said, home, idle, monkeypatch):
    with pytest.raises(BaseException) as caught:
        check(Block("page.md", kind, text), home, monkeypatch)
    assert said in str(caught.value), repr(caught.value)


def test_blocks_are_found_wherever_they_stand():
    text = "- a list\n\n  ```bash\n  one\n  ```\n\n````{note}\n```python\ntwo\n```\n````\n\n    three\n"
    assert [*fences(text)] == [("bash", "one\n"), ("python", "two\n"), ("indented", "three\n")]
    assert commands("A=1 one 'two  three' && four # five\nsix \\\n  seven") == [
        ["A=1", "one", "two  three"], ["four"], ["six", "seven"],
    ]  # fmt: skip


def test_every_make_command_exists():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^(\w+):.*##", makefile, flags=re.M))
    prose = [*texts().values(), (ROOT / ".ci" / "run").read_text(encoding="utf-8")]
    named = {t for text in prose for t in re.findall(r"^make (\w+)|`make (\w+)", text, flags=re.M)}
    named = {a or b for a, b in named}
    assert {"nlu", "test", "book", "lab", "check", "bench"} <= named
    assert named <= targets
    for target in sorted(targets):
        dry(target)


def readme_line() -> str:
    return next(
        shlex.join(c) for b in BLOCKS for c in commands(b.text)
        if b.page == "README.md" and c[0] == "papermill"
    )  # fmt: skip


def test_make_nlu_runs_the_line_of_the_readme():
    assert readme_line() == "papermill book/02_nlu.ipynb out.ipynb -p teacher sd14"
    assert f"/{readme_line()}\n" in dry("nlu")


@pytest.mark.slow
def test_the_readme_line_runs(tmp_path):
    _, notebook, _, *options = shlex.split(readme_line())
    out = tmp_path / "out.ipynb"
    done = papermill_command(notebook, str(out), *options, "-p", "profile", "smoke")
    assert done.returncode == 0, done.stderr[-3000:]
    shown = [o for c in code(out) for o in c["outputs"]]
    assert any("verdict" in "".join(o.get("data", {}).get("text/markdown", "")) for o in shown)
    assert not any(o["output_type"] == "error" for o in shown)
