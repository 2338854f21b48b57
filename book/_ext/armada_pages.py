"""Pages that know when they are stale and fetch nothing; roles for a chapter's verdicts and minutes."""

from __future__ import annotations

import csv
import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.util import logging
from sphinx.util.docutils import SphinxRole

# What a notebook's outputs depend on besides its own cells.
WATCH = (
    "armada_lib", "params", "examples", "book/data", "book/published", "book/results",
    "book/ledger.yaml",
)  # fmt: skip


def digest(root: Path) -> str:
    """One hash over names and bytes of all watched files."""
    h = hashlib.sha256()
    for top in WATCH:
        for path in sorted([root / top, *(root / top).rglob("*")]):
            if path.is_file() and "__pycache__" not in path.parts:
                h.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return h.hexdigest()


def outdated(app: Any, env: Any, added: set, changed: set, removed: set) -> list[str]:
    """Have every notebook read again when data, parameters or library changed since last time."""
    now = digest(Path(app.srcdir))
    before, env.armada_digest = getattr(env, "armada_digest", None), now
    if before in (None, now):
        return []
    return [d for d in env.found_docs if str(env.doc2path(d)).endswith(".ipynb")]


def nothing(role: SphinxRole, message: str, *about: object) -> tuple[list, list]:
    """What a role gives that can say nothing; the build is warned, with the place on the page."""
    where = (role.env.docname, role.lineno)
    logging.getLogger(__name__).warning(message, *about, location=where)
    return [], []


class Status(SphinxRole):
    """What became of the claims that a chapter judges: `` {status}`02_nlu` `` gives "3 ✘ 2 ?".

    Counted in `book/ledger.csv`, which the page of the ledger writes when it is built.
    """

    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        table = Path(self.env.srcdir) / "book" / "ledger.csv"
        if not table.exists():
            return nothing(self, "no ledger to count in: %s", table)
        self.env.note_dependency(str(table))
        with table.open(encoding="utf-8", newline="") as lines:
            rows = [r for r in csv.DictReader(lines) if r["chapter"] == self.text]
        found = Counter((r["sign"], r["status"]) for r in rows)
        parts: list[nodes.Node] = []
        for (sign, status), n in found.most_common():
            said = nodes.abbreviation("", f"{n}\N{NO-BREAK SPACE}{sign}", explanation=status)
            parts += [said, nodes.Text(" ")]
        return parts[:-1] or [nodes.Text("–")], []


def minutes(about: dict[str, Any], name: str) -> str:
    """What `book/results/minutes.json` says of a chapter, of "all", of all when "stored", or of the "machine".

    Minutes to the half, at least a half. Raises KeyError for a name that is none of these.
    """
    if name == "machine":
        return f"{about['cores']} cores with{'' if about['bf16'] else 'out'} bf16 instructions"
    seconds = about[name] if name in ("all", "stored") else about["chapters"][name]
    whole, half = divmod(max(1, round(seconds / 30)), 2)
    return f"{whole or ''}{'½' if half else ''}"


class Minutes(SphinxRole):
    """`` {minutes}`02_nlu` ``: what the chapter took where `python -m benchmarks.book` was run last."""

    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        table = Path(self.env.srcdir) / "book" / "results" / "minutes.json"
        self.env.note_dependency(str(table))
        about = json.loads(table.read_text(encoding="utf-8"))
        try:
            return [nodes.Text(minutes(about, self.text))], []
        except KeyError:
            known = ", ".join(["all", "stored", "machine", *about["chapters"]])
            return nothing(self, "no minutes of %r; there are: %s", self.text, known)


def time_notebooks(app: Any, exception: Exception | None) -> None:
    """Leave in `_build/.doctrees/seconds.json` what running each notebook took."""
    kept = getattr(app.env, "nb_metadata", {})
    seconds = {Path(d).name: m["exec_data"]["runtime"] for d, m in kept.items() if "exec_data" in m}
    (Path(app.doctreedir) / "seconds.json").write_text(json.dumps(seconds), encoding="utf-8")


def no_thebe(app: Any, pagename: str, templatename: str, context: dict, doctree: Any) -> None:
    """Leave out the scripts of an unused live-code button, which name a network address."""
    context["script_files"] = [
        s
        for s in context.get("script_files", [])
        if "thebe" not in (getattr(s, "filename", None) or "")
        and "THEBE_JS_URL" not in getattr(s, "attributes", {}).get("body", "")
    ]


def buttons(app: Any, config: Any) -> None:
    """With `repository_url` set: buttons that open chapters on Binder and Colab. Without: none."""
    options = config.html_theme_options
    services = {
        "binderhub_url": "https://mybinder.org",
        "colab_url": "https://colab.research.google.com",
    }
    on = bool(options.get("repository_url"))
    options["launch_buttons"] = services | {"notebook_interface": "jupyterlab"} if on else {}
    options["use_repository_button"] = on


def setup(app: Any) -> dict[str, bool]:
    """Register with Sphinx."""
    app.add_role("status", Status())
    app.add_role("minutes", Minutes())
    app.connect("config-inited", buttons)
    app.connect("env-get-outdated", outdated)
    app.connect("html-page-context", no_thebe, priority=900)
    app.connect("build-finished", time_notebooks)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
