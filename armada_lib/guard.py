"""A chapter's parameters, checked right after the cell that sets them and before any work."""

from __future__ import annotations

import ast
import types
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from armada_lib.settings import check

_GUARDED = "_armada_guarded"  # in the notebook: how many cells had run at the first guard


def params(
    ns: dict[str, Any], allowed: Iterable[str] | Mapping[str, Collection[Any] | None]
) -> dict[str, Any]:
    """Check a chapter's parameters, right after its parameters cell: `params(globals(), ...)`.

    Papermill accepts any name and then runs with the default, so a misspelt `-p taecher sd14`
    would go unnoticed. `allowed` holds the valid names; as a mapping it may give the valid values
    of a name as well (None = any; each item of a list or tuple is checked, a None value passes).
    Returns the parameters by name.

    In a notebook the cells that assign nothing but plain values are read, so that the guard may be
    run again when the notebook is full of results; elsewhere every variable must be a parameter.

    Raises `profiles.Unknown` (a ValueError) for an unknown name or value, ValueError for a
    parameter that the notebook does not define.
    """
    ns.setdefault(_GUARDED, len(ns.get("In", [])))
    for name in sorted(_typed(ns, set(allowed)) - set(allowed)):
        check(name, allowed, "parameter")
    if missing := sorted(set(allowed) - set(ns)):
        raise ValueError(f"the parameters cell does not define {', '.join(missing)}")
    choices = allowed if isinstance(allowed, Mapping) else {}
    for name, valid in choices.items():
        for value in ns[name] if isinstance(ns[name], list | tuple) else [ns[name]]:
            if valid is not None and value is not None:
                check(value, valid, name)
    return {name: ns[name] for name in allowed}


def _typed(ns: Mapping[str, Any], allowed: set[str]) -> set[str]:
    """Names that were given as parameters."""
    if "In" not in ns:
        no_value = types.ModuleType | types.FunctionType | types.BuiltinFunctionType | type
        return {k for k, v in ns.items() if k[0] != "_" and not isinstance(v, no_value)}
    cells: list[set[str]] = []
    for i, source in enumerate(ns["In"]):
        names = _assigned(source)
        papermills = source.startswith("# Parameters")
        if names and (names & allowed or papermills or i < ns[_GUARDED]):
            # a cell that was mended and run again replaces its older self
            cells = [c for c in cells if not c & allowed <= names & allowed] + [names]
    return set().union(*cells)


def _assigned(source: str) -> set[str]:
    """Names a cell assigns, if it does nothing but assign plain values; else nothing."""
    names: set[str] = set()
    try:
        for node in ast.parse(source).body:
            if not isinstance(node, ast.Assign | ast.AnnAssign) or node.value is None:
                return set()
            ast.literal_eval(node.value)
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {t.id for t in targets if isinstance(t, ast.Name)}
    except (SyntaxError, ValueError):
        return set()
    return names
