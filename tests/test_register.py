"""The register of readings: every number that is used is an entry, every name on the page is in the code."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import json
import re
from functools import cache
from typing import Any

import pytest
import yaml
from pydantic import BaseModel, TypeAdapter, ValidationError

from armada_lib import ablation, blocks, profiles, settings, teacher_settings
from armada_lib.methods import READINGS, Reading
from armada_lib.profiles import ROOT

PAGE = ROOT / "book" / "register.md"
NOTEBOOKS = sorted((ROOT / "book").glob("*.ipynb"))
SCALES = ("mini", "cpu", "paper")
PARTS = ("Here", "Instead", "Effect")
ENTRY = re.compile(r"^\(a(\d+)\)=\n### A(\d+): .+\n", re.M)
HEAD = re.compile(r"^(?:\(|## )", re.M)


@cache
def page() -> str:
    return PAGE.read_text(encoding="utf-8")


@cache
def referred() -> dict[int, list[str]]:
    """Numbers of the register, and the files that use them."""
    files = [*ROOT.glob("armada_lib/**/*.py"), *ROOT.glob("params/**/*.yaml"), *NOTEBOOKS,
             *ROOT.glob("book/**/*.md"), *ROOT.glob("training/**/*.py")]  # fmt: skip
    found: dict[int, list[str]] = {}
    for path in sorted(set(files) - {PAGE}):
        for number in set(re.findall(r"\bA(\d{1,2})\b", path.read_text(encoding="utf-8"))):
            found.setdefault(int(number), []).append(str(path.relative_to(ROOT)))
    return found


def entries(text: str) -> dict[int, str]:
    """The text below each entry's heading; the last of several with one number."""
    found = {}
    for m in ENTRY.finditer(text):
        end = HEAD.search(text, m.end())
        found[int(m[1])] = text[m.end() : end.start() if end else None]
    return found


# ----------------------------------------------------------------------------- numbers and form


def numbering(text: str) -> list[str]:
    """What is wrong with the entries: missing, twice, without one of their three lines."""
    anchors = [int(n) for n in re.findall(r"^\(a(\d+)\)=$", text, re.M)]
    headings = [int(n) for n in re.findall(r"^#+ A(\d+)\b", text, re.M)]
    known = entries(text)
    wrong = [f"A{n} is there {anchors.count(n)} times" for n in known if anchors.count(n) > 1]
    wrong += [f"A{m[1]} is headed A{m[2]}" for m in ENTRY.finditer(text) if m[1] != m[2]]
    wrong += [f"A{n} has an anchor or a heading alone" for n in {*anchors, *headings} - set(known)]
    wrong += [f"A{n} is missing: {', '.join(w)}" for n, w in referred().items() if n not in known]
    listed = text.partition("By number: ")[2].partition("\n\n")[0]
    wrong += [f"A{n} is not in the list by number" for n in known if f"[A{n}](a{n})" not in listed]
    wrong += [f"there is no A{n}" for n in range(1, max(known)) if n not in known]
    said = re.search(r"There are (\d+) such places", text)
    if not said or int(said[1]) != len(known):
        wrong.append(f"the page has {len(known)} entries and says {said and said[1]}")
    for n, entry in known.items():
        if tuple(re.findall(r"^\* \*\*(\w+)\*\*: \S", entry, re.M)) != PARTS:
            wrong.append(f"A{n} has other lines than {', '.join(PARTS)}")
    return wrong


def test_every_number_has_an_entry():
    assert len(referred()) > 25
    assert numbering(page()) == []


@pytest.mark.parametrize("number", sorted(entries(page())))
def test_an_entry_cannot_be_removed(number):
    left = re.sub(rf"^\(a{number}\)=\n.*?(?=^\(|^## )", "", page(), flags=re.M | re.S)
    assert len(entries(left)) == len(entries(page())) - 1
    assert numbering(left)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("(a12)=\n", "", "A12 has an anchor or a heading alone"),
        ("(a12)=", "(a13)=", "A13 is there 2 times"),
        ("### A12:", "### A31:", "A12 is headed A31"),
        ("There are 38", "There are 39", "and says 39"),
        (" [A12](a12) [", " [", "A12 is not in the list"),
        ("* **Instead**: nothing. A teacher", "A teacher", "A9 has other lines"),
    ],
)
def test_a_mistake_in_the_entries_is_found(old, new, message):
    assert page().count(old) == 1
    assert any(message in w for w in numbering(page().replace(old, new)))


def test_links_to_entries_go_where_they_say():
    texts = [p.read_text(encoding="utf-8") for p in [*NOTEBOOKS, *ROOT.glob("book/**/*.md")]]
    links = [link for t in texts for link in re.findall(r"\[A(\d+)\]\(a(\d+)\)", t)]
    assert len(links) > 10
    assert all(said == to for said, to in links)


# ----------------------------------------------------------------------------- names and values


@cache
def parameters() -> set[str]:
    """Names that the parameters cells of the chapters set."""
    found = set()
    for path in NOTEBOOKS:
        for c in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            if "parameters" in c["metadata"].get("tags", []):
                body = ast.parse("".join(c["source"])).body
                found |= {t.id for node in body for t in node.targets}  # type: ignore[attr-defined]
    return found


def field(name: str) -> Any:
    """The type of `Class.field` of the settings or a reading; None if there is no such field."""
    owner, _, own = name.partition(".")
    if owner == "Reading":
        return next((f.type for f in dataclasses.fields(Reading) if f.name == own), None)
    rooms = (settings, teacher_settings, blocks)
    block = next((getattr(r, owner) for r in rooms if hasattr(r, owner)), None)
    if not isinstance(block, type) or not issubclass(block, BaseModel):
        return None
    known = block.model_fields.get(own)
    return known and known.annotation


def takes(kind: Any, value: str) -> bool:
    try:
        TypeAdapter(kind).validate_python(yaml.safe_load(value), strict=True)
    except ValidationError:
        return False
    return True


def there(dotted: str) -> bool:
    """Whether `module.name` is in the library."""
    module, _, name = dotted.removeprefix("armada_lib.").rpartition(".")
    try:
        return hasattr(importlib.import_module(f"armada_lib.{module}"), name)
    except ModuleNotFoundError:
        return False


def given(name: str, value: str) -> bool:
    """Whether `-p name value` is a parameter of a chapter, with a value that it may have."""
    if name not in parameters():
        return False
    if name in ("reading", "teacher"):
        return value in (READINGS if name == "reading" else profiles.load("mini").teachers)
    kind = field(f"Training.{name}") or field(f"Weights.{name}")
    return takes(kind, value) if kind and name != "beta" else name == "seeds"


def unknown(text: str) -> list[str]:
    """Code on the page that is nothing in the library: names, and values that a field cannot have."""
    wrong = []
    for role in re.findall(r"\{py:\w+\}`~(armada_lib\.[\w.]+)`", text):
        wrong += [] if there(role) else [role]
    plain = re.sub(r"\{[\w:]+\}`[^`]*`", "", text)
    general = {*profiles.names(), *READINGS, *ablation.FACTORS, "training", "hidden"}
    for block in re.split(r"\n\s*\n|^\* |^\| |\. ", plain, flags=re.M):
        kind = None  # of the setting named last: what follows are its values
        for span in re.findall(r"`([^`]+)`", block):
            if m := re.fullmatch(r"-p (\w+) (\S+)", span):
                good = given(m[1], m[2])
            elif "." in span:
                kind = field(span)
                good = kind is not None or there(span)
            else:
                good = span in general or (kind is not None and takes(kind, span))
                good = good or (kind is None and span in values())
            if not good:
                wrong.append(span)
    return wrong


@cache
def values() -> set[str]:
    """Everything that a choice of a run's or a teacher's settings may be."""
    models = [settings.Training, teacher_settings.ImageSpec]
    kinds = [str(f.annotation) for b in models for f in b.model_fields.values()]
    return {v for kind in kinds for v in re.findall(r"'([\w-]+)'", kind)}


def test_every_name_and_value_is_in_the_code():
    assert unknown(page()) == []


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("`Training.detach` as", "`Training.detached` as"),
        ("as `direct` (Linear", "as `directly` (Linear"),
        ("`-p alpha 0`.", "`-p alfa 0`."),
        ("`-p alpha 0`.", "`-p alpha 2x`."),
        ("`-p teacher blackbox`", "`-p teacher whitebox`"),
        ("~armada_lib.losses.mean_row", "~armada_lib.losses.mean_line"),
        ("`analysis.joint_map`", "`analysis.joint_chart`"),
        ("`two-stage`. [A17]", "`three-stage`. [A17]"),
    ],
)
def test_a_wrong_name_or_value_is_found(old, new):
    assert old in page()
    assert len(unknown(page().replace(old, new))) > 0


# ----------------------------------------------------------------------------- chapter 06


def factors(name: str) -> set[str]:
    """The profiles that change this in the chapter on ablations."""
    blocks = {p: profiles.load(p).ablation for p in SCALES}
    return {p for p, block in blocks.items() if block and name in block.factors}


def rows(text: str) -> list[str]:
    """Rows of chapter 06 that an entry names with other profiles than those that have them."""
    wrong = []
    found = re.findall(r"row `(\w+)` of \{doc\}`06_ablation`, profiles?((?:[^.;`]*`\w+`)+)", text)
    for name, said in found:
        if set(re.findall(r"`(\w+)`", said)) != factors(name):
            wrong.append(f"{name}: {said}, and they are {', '.join(sorted(factors(name)))}")
    return wrong if len(found) > 8 else ["too few rows were found"]


def test_rows_of_the_ablations_are_in_the_profiles_that_are_named():
    assert rows(page()) == []
    assert rows(page().replace("profiles `paper`, `cpu`.", "profile `paper`."))


@pytest.mark.parametrize("name", [f for f, about in ablation.FACTORS.items() if about.register])
def test_what_the_ablations_change_is_named_in_its_entry(name):
    entry = entries(page())[int(ablation.FACTORS[name].register.removeprefix("A"))]
    assert f"`Training.{name}`" in entry or f"`-p {name} " in entry
    assert not factors(name) or f"row `{name}`" in entry


def test_what_a_reading_switches_is_what_the_code_switches():
    paper, released = READINGS["paper"], READINGS["released"]
    entry, last = entries(page()), page().split("(register-released)=")[1]
    changed = last.split("| what it changes |")[1].split("\n")[0]
    for value in (released.aligner, released.soft, released.projection):
        assert f"`{value}`" in changed
    assert released.alternate and not released.standardise and released.init == "normal"
    assert not paper.alternate and paper.standardise
    assert (paper.aligner, paper.soft, paper.projection) == ("bottleneck", "norm", "orthogonal")
    assert "soft_norm" in entry[6] and "Linear(m, 128), tanh, Linear(128, 768)" in entry[1]
