"""Reference pages made from the library's source: nothing of it is imported, nothing is run.

    ```{armada-api} armada_lib.losses
    :only: cosine euclid      public functions and classes to show; all, in their order, unless given
    :show: MANIFOLD           definitions to show as they stand, before everything else
    :more:                    the module was introduced elsewhere
    ```

Docstrings are prose with `code` in backticks, lists, and indented blocks. They are put on the page as
they are, so that a formula in plain text is never taken for markup; a name in backticks becomes a
link where the pages have it. Fields of a class are shown as its source has them, with their comments.
"""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from docutils import nodes
from docutils.parsers.rst import directives
from docutils.statemachine import StringList
from sphinx import addnodes
from sphinx.util.docutils import SphinxDirective
from sphinx.util.nodes import make_refnode

Definition = ast.FunctionDef | ast.ClassDef
TOP = "armada_lib"
OURS = "armada_name"  # marks a link that may stay plain text
MARKED = re.compile(r"(`[^`]+`|\*\*\w[^*]*\w\*\*|(?<!\w)\*[A-Za-z][\w' -]*\*(?!\w))")
LIST = re.compile(r"(?:[*-]|\d+\.) +")


# ------------------------------------------------------------------------------ the source


class Room(NamedTuple):
    """A module as it is written."""

    name: str
    path: Path
    source: str
    tree: ast.Module

    def public(self) -> dict[str, Definition]:
        """Functions and classes that are defined here and have no underscore before their name."""
        found = [n for n in self.tree.body if isinstance(n, Definition)]
        return {n.name: n for n in found if not n.name.startswith("_")}

    def chosen(self, only: str | None) -> dict[str, Definition]:
        """Those named in `only`, in that order; ValueError for a name that is not here."""
        have = self.public()
        names = only.split() if only else list(have)
        if absent := [n for n in names if n not in have]:
            raise ValueError(f"{self.name} has no public {', '.join(absent)}")
        return {n: have[n] for n in names}

    def full(self, name: str) -> str | None:
        """The full name of what `name` means in this module; None if it is not the library's."""
        first, _, rest = name.partition(".")
        if not re.fullmatch(r"[A-Za-z_][\w.]*", name):
            return None
        for node in self.tree.body:
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(TOP):
                for n in node.names:
                    if first == (n.asname or n.name):
                        return f"{node.module}.{n.name}" + (f".{rest}" if rest else "")
        if first in self.public():
            return f"{self.name}.{name}"
        return f"{TOP}.{name}" if rest and first in self.neighbours() else None

    def neighbours(self) -> set[str]:
        """Names of the modules at the top of the library."""
        top = next(p for p in self.path.parents if p.name == TOP)
        return {p.stem for p in top.iterdir()}

    def lines(self, node: ast.stmt) -> str:
        """A statement as it stands, with the comments above it and at its end, not indented."""
        lines, first = self.source.splitlines(), node.lineno - 1
        while lines[first - 1].lstrip().startswith("# ") and "---" not in lines[first - 1]:
            first -= 1
        found = textwrap.dedent("\n".join(lines[first : node.end_lineno]))
        return re.sub(r" *# fmt: skip\b.*", "", found)

    def value(self, name: str) -> str:
        """The assignment to `name` as it stands; ValueError if there is none."""
        for node in self.tree.body:
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", 0)]
            if any(isinstance(t, ast.Name) and t.id == name for t in targets):
                return self.lines(node)
        raise ValueError(f"{self.name} defines no {name}")


def room(root: Path, name: str) -> Room:
    """The module of that dotted name below `root`; ValueError if there is none."""
    stem = root.joinpath(*name.split("."))
    for path in (stem.with_suffix(".py"), stem / "__init__.py"):
        if path.is_file():
            source = path.read_text(encoding="utf-8")
            return Room(name, path, source, ast.parse(source))
    raise ValueError(f"there is no module {name}")


def fields(of: Room, node: ast.ClassDef) -> str:
    """The public fields of a class as they stand, with their comments."""
    body = [n for n in node.body if isinstance(n, ast.AnnAssign) and _public(n.target)]
    return "\n".join(of.lines(n) for n in body)


def methods(node: ast.ClassDef) -> Iterator[ast.FunctionDef]:
    """Public methods that say what they do; the others fill a place that a base class describes."""
    for n in node.body:
        if isinstance(n, ast.FunctionDef) and n.name[0] != "_" and ast.get_docstring(n):
            yield n


def signature(node: ast.FunctionDef, bound: bool = False) -> str:
    """Arguments and result as Python writes them; `bound` leaves out the first argument."""
    args = node.args
    if bound:
        first = args.posonlyargs or args.args
        args = ast.arguments(**{k: getattr(args, k) for k in ast.arguments._fields})
        setattr(args, "posonlyargs" if args.posonlyargs else "args", first[1:])
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"({ast.unparse(args)}){returns}"


def _public(target: ast.expr) -> bool:
    return isinstance(target, ast.Name) and not target.id.startswith("_")


# ------------------------------------------------------------------------------- the page


def prose(text: str, of: Room) -> Iterator[nodes.Node]:
    """A line of a docstring: `code`, a link if the name is known, *stress*, and text as it is."""
    for part in MARKED.split(text):
        plain = part.strip("`*")
        if part.startswith("`") and plain:
            code, target = nodes.literal(plain, plain), of.full(plain.removesuffix("()"))
            at = {"refdomain": "py", "reftype": "obj", "reftarget": target, OURS: True}
            yield addnodes.pending_xref("", code, **at) if target else code
        elif MARKED.fullmatch(part):
            yield (nodes.strong if part.startswith("**") else nodes.emphasis)(plain, plain)
        else:
            yield nodes.Text(part)


def body(text: str, of: Room) -> list[nodes.Node]:
    """A docstring as paragraphs, lists and blocks."""
    out: list[nodes.Node] = []
    for block in re.split(r"\n\s*\n", text):
        lines = block.splitlines()
        if LIST.match(lines[0]):
            kind = nodes.enumerated_list() if lines[0][0].isdigit() else nodes.bullet_list()
            for item in re.split(rf"\n(?={LIST.pattern})", block):
                words = " ".join(LIST.sub("", item, count=1).split())
                kind += nodes.list_item("", nodes.paragraph("", "", *prose(words, of)))
            out.append(kind)
        elif all(line.startswith("  ") for line in lines):
            out.append(_code(textwrap.dedent(block), "text"))
        else:
            out.append(nodes.paragraph("", "", *prose(" ".join(block.split()), of)))
    return out


class Api(SphinxDirective):
    """`{armada-api} module`: what the module offers, from its source."""

    required_arguments = 1
    option_spec = {  # noqa: RUF012
        "only": directives.unchanged, "show": directives.unchanged, "more": directives.flag,
    }  # fmt: skip

    def run(self) -> list[nodes.Node]:
        try:
            of = room(Path(self.env.srcdir), self.arguments[0])
            self.env.note_dependency(str(of.path))
            chosen = of.chosen(self.options.get("only"))
            shown = [of.value(n) for n in self.options.get("show", "").split()]
        except ValueError as e:
            raise self.error(str(e)) from None
        more = "more" in self.options
        out = self.described(of, "currentmodule" if more else "module", of.name, None)
        if not more:
            out += body(ast.get_docstring(of.tree) or "", of)
        out += [_code(text) for text in shown]
        for name, node in chosen.items():
            if not ast.get_docstring(node):
                raise self.error(f"{of.name}.{name} has no docstring")
            if isinstance(node, ast.ClassDef):
                out += self.class_(of, node)
            else:
                out += self.described(of, "function", name + signature(node), node)
        return out

    def class_(self, of: Room, node: ast.ClassDef) -> list[nodes.Node]:
        made = next((n for n in node.body if getattr(n, "name", "") == "__init__"), None)
        given = signature(made, bound=True) if isinstance(made, ast.FunctionDef) else ""
        out = self.described(of, "class", node.name + given.removesuffix(" -> None"), node)
        content = next(iter(out[-1].findall(addnodes.desc_content)))
        if have := fields(of, node):
            content += _code(have)
        for n in methods(node):
            called, marks = f"{node.name}.{n.name}", {ast.unparse(d) for d in n.decorator_list}
            if marks & {"property", "cached_property", "functools.cached_property"}:
                content += self.described(of, "property", called, n)
            else:
                content += self.described(of, "method", called + signature(n, bound=True), n)
        return out

    def described(
        self, of: Room, kind: str, called: str, node: Definition | None
    ) -> list[nodes.Node]:
        """The entry that Sphinx's Python domain makes, with the docstring put into it."""
        holder = nodes.Element()
        lines = [f"````{{py:{kind}}} {called}", "````"]
        self.state.nested_parse(StringList(lines, self.get_source_info()[0]), 0, holder)
        for link in list(holder.findall(addnodes.pending_xref)):  # the names of its annotations
            if target := of.full(link["reftarget"]):
                link.attributes.pop("refspecific", None)
                link.attributes |= {"reftarget": target, OURS: True}
            else:
                link.replace_self(link.children)
        if node is not None:
            content = next(iter(holder.findall(addnodes.desc_content)))
            content += body(ast.get_docstring(node) or "", of)
        return holder.children


def _code(text: str, language: str = "python") -> nodes.Node:
    return nodes.literal_block(text, text, language=language, classes=["api-code"])


def resolve(app: Any, env: Any, node: Any, contnode: nodes.Node) -> nodes.Node | None:
    """Link a name of the library to where the pages have it; what they leave out stays plain text.

    A module may pass a name on (`profiles.Training` is that of `settings`): it is found by its last part.
    """
    if OURS not in node:
        return None
    known, target = env.get_domain("py").objects, node["reftarget"]
    last = "." + target.rpartition(".")[2]
    found = [target] if target in known else [n for n in known if n.endswith(last)]
    if len(found) != 1 or (target not in known and not last[1].isupper()):
        return contnode
    at = known[found[0]]
    here = node.get("refdoc", env.docname)
    return make_refnode(app.builder, here, at.docname, at.node_id, contnode, found[0])


def setup(app: Any) -> dict[str, bool]:
    """Register with Sphinx."""
    app.add_directive("armada-api", Api)
    app.connect("missing-reference", resolve)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
