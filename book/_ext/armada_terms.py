"""Links to a term of the glossary say what it means when the pointer rests on them.

The meaning is the link's `title`, which every browser shows: no script, nothing fetched.
"""

from __future__ import annotations

from typing import Any

from docutils import nodes
from sphinx import addnodes


def collect(app: Any, doctree: nodes.document) -> None:
    """Keep the first sentence of each definition of the page that holds the glossary."""
    known = app.env.__dict__.setdefault("armada_terms", {})
    for item in doctree.findall(nodes.definition_list_item):
        if isinstance(item.parent.parent, addnodes.glossary):
            text = next(iter(item.findall(nodes.definition))).astext()
            for term in item.findall(nodes.term):
                known |= dict.fromkeys(term["ids"], " ".join(text.split()))


def explain(app: Any, doctree: nodes.document, docname: str) -> None:
    """Give links to terms their meaning."""
    known = getattr(app.env, "armada_terms", {})
    for link in doctree.findall(nodes.reference):
        name = link.get("refid") or link.get("refuri", "").partition("#")[2]
        if name in known:
            link["reftitle"] = known[name]


def setup(app: Any) -> dict[str, bool]:
    """Register with Sphinx. Terms are collected in one process: not safe to read in parallel."""
    app.connect("doctree-read", collect)
    app.connect("doctree-resolved", explain)
    return {"parallel_read_safe": False, "parallel_write_safe": True}
