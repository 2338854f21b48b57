"""Docstrings of the reference pages: errors, shapes and sources, looked for in the source alone.

Whether there is a docstring at all is a test of `test_book`. A docstring may be wrong and pass; it
cannot leave out what it should speak of.
"""

from __future__ import annotations

import ast
import builtins
import re
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, NamedTuple

import armada_api
import pytest
from test_book import PAGES, rooms

from armada_lib.profiles import ROOT

Function = ast.FunctionDef
Class = ast.ClassDef

# Functions of the library that raise for their caller what is wrong with a name.
LOOK_UPS = {
    "armada_lib.settings.check": "Unknown",
    "armada_lib.profiles.check": "Unknown",
    "armada_lib.losses.choose": "ValueError",
}
ARRAYS = {"Tensor", "ndarray", "ArrayLike", "Array"}
# (n, k), (n,), (seeds, examples, ...), (n, m / r), (...), and 0-d of a single number
SIZES = "columns draws examples layers nullity rows samples seeds steps texts vocabulary width"
ONE = rf"(?:\.\.\.|\d+|[A-Za-z]|{'|'.join(SIZES.split())})"
SIZE = rf"{ONE}(?: [-+*/] {ONE})*"
SHAPE = re.compile(rf"\({SIZE},(?: {SIZE}(?:, {SIZE})*)?\)|\(\.\.\.\)|\b0-d\b")
# a place in the paper, an entry of the register, or a name and a year
SOURCE = re.compile(
    r"\bEqs?\. \d|\b[Ss]ections? \d|\b[Aa]ppendix [A-Z]|\b(?:Table|Figure|Proposition) \d"
    r"|\bA\d+\b|\b(?!In\b)[A-Z]\w+(?: et al\.)?,? \(?(?:[A-Z]+ )?(?:19|20)\d\d\b"
)
SOURCED = ("losses", "aligner", "methods", "stats", "geometry", "transfer", "propositions")
# What follows no text: a look-up, a number of rows, a setting of the machine.
PLAIN = {"losses.choose", "methods.base.texts", "geometry.one_thread"}


class Shown(NamedTuple):
    """A function, class or method of a page; `owner` is a method's class."""

    name: str
    of: Any
    node: Function | Class
    owner: Class | None = None

    @property
    def own(self) -> str:
        return ast.get_docstring(self.node) or ""

    @property
    def near(self) -> str:
        """Its docstring and that of its class."""
        return self.own + "\n" + (self.owner and ast.get_docstring(self.owner) or "")

    @property
    def all(self) -> str:
        return self.near + "\n" + (ast.get_docstring(self.of.tree) or "")

    @property
    def bodies(self) -> list[Function]:
        """What runs when it is called: of a class, what makes and checks an object of it."""
        if isinstance(self.node, Function):
            return [self.node]
        makes = lambda n: (
            n.name in ("__init__", "__post_init__") or "validator" in ast.unparse(n.decorator_list)
        )
        return [n for n in self.node.body if isinstance(n, Function) and makes(n)]

    @property
    def helpers(self) -> dict[str, Function]:
        """Private functions of its module and private methods of its class, as they are called."""
        around = self.owner or self.node
        private = lambda body: [n for n in body if isinstance(n, Function) and n.name[0] == "_"]
        found = {n.name: n for n in private(self.of.tree.body)}
        return found | {f"self.{n.name}": n for n in private(around.body)}


def shown_in(of: Any, only: str | None = None) -> Iterator[Shown]:
    for called, node in of.chosen(only).items():
        name = f"{of.name}.{called}".removeprefix("armada_lib.")
        yield Shown(name, of, node)
        if isinstance(node, Class):
            for n in armada_api.methods(node):
                yield Shown(f"{name}.{n.name}", of, n, node)


@cache
def shown(page: Any) -> list[Shown]:
    module = cache(armada_api.room)
    return [s for name, o in rooms(page) for s in shown_in(module(ROOT, name), o.get("only"))]


# ---------------------------------------------------------------------------------- errors


@cache
def errors() -> dict[str, set[str]]:
    """Every error of Python and of the library: its name and those of all that it is."""
    found: dict[str, set[str]] = {}
    for name, e in vars(builtins).items():
        if isinstance(e, type) and issubclass(e, BaseException):
            general = {"object", "BaseException", "Exception"} - {name}
            found[name] = {c.__name__ for c in e.__mro__} - general
    for path in sorted(ROOT.glob("armada_lib/**/*.py")):
        text = path.read_text(encoding="utf-8")
        for name, base in re.findall(r"^class ([A-Z]\w*)\((\w+)\):", text, flags=re.M):
            if base in found:
                found[name] = {name} | found[base]
    return found


def caught(node: ast.Try) -> set[str]:
    """Names of what its handlers keep; one that ends in a plain `raise` keeps nothing."""
    kept = set()
    for h in node.handlers:
        if not any(isinstance(n, ast.Raise) and n.exc is None for n in ast.walk(h)):
            named = re.findall(r"\w+", ast.unparse(h.type)) if h.type else ["Exception"]
            kept |= set(named)
    return kept


def raised(of: Any, body: Function, helpers: Mapping[str, Function]) -> set[str]:
    """Names of the errors that leave `body`, and with it those of the helpers that it calls."""
    found: set[str] = set()

    def add(name: str, kept: set[str]) -> None:
        if name in errors() and not kept & ({"Exception"} | errors()[name]):
            found.add(name)

    def visit(node: ast.AST, kept: set[str], seen: frozenset[str]) -> None:
        if isinstance(node, ast.Try):
            for n in node.body:
                visit(n, kept | caught(node), seen)
            for n in (*node.handlers, *node.orelse, *node.finalbody):
                visit(n, kept, seen)
            return
        if isinstance(node, ast.Raise) and node.exc is not None:
            made = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
            add(ast.unparse(made).rpartition(".")[2], kept)
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called.endswith(("check", "choose")):
                add(LOOK_UPS.get(of.full(called) or "", ""), kept)
            if called in helpers and called not in seen:
                visit(helpers[called], kept, seen | {called})
        for n in ast.iter_child_nodes(node):
            visit(n, kept, seen)

    visit(body, set(), frozenset())
    return found


def unsaid(s: Shown) -> list[str]:
    """Errors without a word: its own are said in its docstring, a helper's there or around it."""
    own = {e for b in s.bodies for e in raised(s.of, b, {})}
    every = {e for b in s.bodies for e in raised(s.of, b, s.helpers)}
    said = lambda e, text: any(re.search(rf"\b{name}\b", text) for name in errors()[e])
    return sorted(e for e in own | every if not said(e, s.own if e in own else s.all))


# ---------------------------------------------------------------------------------- shapes


def array(note: ast.AST | None) -> bool:
    """Does an annotation speak of an array?"""
    return note is not None and not ARRAYS.isdisjoint(re.findall(r"\w+", ast.unparse(note)))


def shapeless(s: Shown) -> list[str]:
    """Its arrays, if no shape is given, or the one of several that no docstring names."""
    taken = [a for b in s.bodies for a in (*b.args.posonlyargs, *b.args.args, *b.args.kwonlyargs)]
    names, text = [a.arg for a in taken if array(a.annotation)], s.near
    found = names + ["the result" for b in s.bodies if array(b.returns)]
    if isinstance(s.node, Class):
        held = [n for n in s.node.body if isinstance(n, ast.AnnAssign) and array(n.annotation)]
        found += [t for n in held if (t := ast.unparse(n.target))[0] != "_"]
        text += "\n" + armada_api.fields(s.of, s.node)
    if found and not SHAPE.search(text):
        return found
    return [n for n in names if len(names) > 1 and not re.search(rf"\b{n}\b", s.all)]


# --------------------------------------------------------------------------------- sources


def record(node: Function | Class) -> bool:
    """A class of fields, or of what others must have: it does nothing by itself."""
    if isinstance(node, Function):
        return False
    marks = " ".join(map(ast.unparse, (*node.bases, *node.decorator_list)))
    return bool(re.search(r"NamedTuple|Protocol|dataclass", marks))


def sourceless(s: Shown) -> bool:
    """It names no source, nor a function of its module, in backticks, that names one."""
    if s.owner or record(s.node) or s.name in PLAIN or s.name.split(".")[0] not in SOURCED:
        return False
    public = s.of.public()
    others = [public[n] for n in re.findall(r"`(\w+)`", s.own) if n in public]
    return not any(SOURCE.search(text) for text in (s.own, *map(ast.get_docstring, others)))


# ----------------------------------------------------------------------------------- tests


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_docstrings_name_the_errors(page):
    assert not [f"{s.name}: {', '.join(e)}" for s in shown(page) if (e := unsaid(s))]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_docstrings_give_the_shapes_of_arrays(page):
    assert not [f"{s.name}: {', '.join(a)}" for s in shown(page) if (a := shapeless(s))]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_docstrings_name_the_sources(page):
    assert not [s.name for s in shown(page) if sourceless(s)]


def test_no_exception_is_idle():
    every = {s.name: s for page in PAGES for s in shown(page)}
    assert every.keys() >= PLAIN
    assert not [n for n in PLAIN if SOURCE.search(every[n].own)]


@pytest.fixture
def one(tmp_path):
    """What a library of one module, `losses`, would show."""
    (tmp_path / "armada_lib").mkdir()
    (tmp_path / "armada_lib" / "losses.py").write_text(
        '"""TypeError for the deaf."""\n'
        "from armada_lib.settings import check\n"
        "def mute(name: str, x: Tensor):\n"
        '    """Eq of nothing (by name)."""\n'
        "    _deep(check(name, TABLE, 'what'))\n"
        "def said(name: str, x: Tensor):\n"
        '    """`x` (n, d / 2); ValueError, LookupError else (Eqs. 1-2)."""\n'
        "    mute(name)\n"
        "    raise KeyError(check(name, TABLE, 'what'))\n"
        "def kept(a: ArrayLike, b: ArrayLike):\n"
        '    """`a` (n,) as `said`."""\n'
        "    try:\n        _deep(a)\n        raise OSError\n"
        "    except (OSError, RuntimeError): pass\n"
        "def passed(a: int) -> int:\n"
        '    """As in 2020."""\n'
        "    try:\n        raise OSError\n"
        "    except OSError:\n        raise\n"
        "def _deep(x):\n    if x: raise TypeError('deaf')\n    raise RecursionError\n"
        "class Box(NamedTuple):\n"
        '    """A box."""\n'
        "    held: np.ndarray  # (rows, columns)\n"
        "    bare: int\n"
        "    def turn(self, x: Tensor) -> Tensor:\n"
        '        """Turn it by half of Eq. 3."""\n'
        "        return self._half(x)\n"
        "    def _half(self, x):\n        raise self.Unknown\n"
    )
    return list(shown_in(armada_api.room(tmp_path, "armada_lib.losses")))


def test_what_is_left_out_is_found(one):
    found = {s.name.removeprefix("losses."): (unsaid(s), shapeless(s), sourceless(s)) for s in one}
    assert found == {
        "mute": (["RecursionError", "Unknown"], ["x"], True),
        "said": ([], [], False),
        "kept": ([], ["b"], False),
        "passed": (["OSError"], [], True),
        "Box": ([], [], False),
        "Box.turn": (["Unknown"], ["x", "the result"], False),
    }


@pytest.mark.parametrize("text", ["(n, k)", "(b,)", "(...)", "(seeds, 2 * n, ...)", "a 0-d one"])
def test_shapes_are_seen(text):
    assert SHAPE.search(f"Of x {text} it is made.")


@pytest.mark.parametrize("text", ["(n)", "(first, of all)", "(Hinton, 2015)", "(a or b)", "()"])
def test_what_is_no_shape_is_not(text):
    assert not SHAPE.search(f"Of x {text} it is made.")


@pytest.mark.parametrize(
    "text",
    ["(Eq. 2)", "[A6, A7]", "Table 8", "section 3.2", "Tan and Bansal (2020)", "(Holm, 1979)"],
)
def test_sources_are_seen(text):
    assert SOURCE.search(f"of it {text}.") and not SOURCE.search("In 2020 of Tables, all A (2).")


BASELINES = {
    *("KD", "PKD", "RCO", "ContinuationKD", "DML", "ProKT", "Rail", "TinyBERT", "MetaDistil", "SFTNTeacher"),
    *("ViLBERT", "VLBERT", "VisualBERT", "Vokenization", "VidLanKD", "VisualGuidance", "XAdapter"),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(BASELINES))
def test_a_baseline_says_its_source_and_what_is_unsure(name):
    trees = [ast.parse(p.read_text(encoding="utf-8")) for p in ROOT.glob("armada_lib/methods/*.py")]
    (found,) = [n for t in trees for n in t.body if isinstance(n, Class) and n.name == name]
    said = ast.get_docstring(found) or ""
    assert re.search(r"\b(19|20)\d\d\b", said) and "Unsure: " in said
