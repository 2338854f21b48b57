"""Links to a term, a table or a figure say what it means or shows when the pointer rests on them.

It is the link's `title`, which every browser shows: no script, nothing fetched.
"""

from __future__ import annotations

from typing import Any

from docutils import nodes
from sphinx import addnodes


def collect(app: Any, doctree: nodes.document) -> None:
    """Keep the definitions of the page that holds the glossary, and captions of tables and figures."""
    known = app.env.__dict__.setdefault("armada_terms", {})
    for kind, head in ((nodes.table, nodes.title), (nodes.figure, nodes.caption)):
        for thing in doctree.findall(kind):
            for caption in list(thing.findall(head))[:1]:
                known |= dict.fromkeys(thing["ids"], " ".join(caption.astext().split()))
    for item in doctree.findall(nodes.definition_list_item):
        if isinstance(item.parent.parent, addnodes.glossary):
            text = next(iter(item.findall(nodes.definition))).astext()
            for term in item.findall(nodes.term):
                known |= dict.fromkeys(term["ids"], " ".join(text.split()))


def explain(app: Any, doctree: nodes.document, docname: str) -> None:
    """Give links to terms their meaning, and links to tables and figures the caption."""
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
