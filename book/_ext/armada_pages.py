"""Pages that know when they are stale, and that fetch nothing from a network."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

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


def order(app: Any, env: Any, docnames: list[str]) -> None:
    """Read the introduction last: it shows figures that other pages draw."""
    docnames.sort(key=lambda d: (d == app.config.root_doc, d))


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
    app.connect("config-inited", buttons)
    app.connect("env-get-outdated", outdated)
    app.connect("env-before-read-docs", order)
    app.connect("html-page-context", no_thebe, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
