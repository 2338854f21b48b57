"""Diagrams and pictures of the method: what they show is what was computed, byte for byte."""

from __future__ import annotations

import importlib.util
import sys
import types

import numpy as np
import pytest

from armada_lib import drawings, figures, plots_method, propositions
from armada_lib.transfer import Bound


def said(figure) -> str:
    from matplotlib.text import Text

    return "\n".join(t.get_text() for t in figure.findobj(Text))


MADE = {
    "framework": drawings.framework,
    "diagram": drawings.diagram,
    "planes": plots_method.explorer,
    "ordering": lambda: plots_method.ordering(propositions.random_batches(60, 0)),
    "gradients": lambda: plots_method.gradients(
        propositions.gradient_norms(["euclid", "cosine"], [0.1, 1.0], width=8),
        propositions.matching_gradients(["norm", "kl"], [0.1, 1.0]),
    ),
    "bounds": lambda: plots_method.bounds({"one": Bound(0.5, 1, 2, 0.1)}),
}


@pytest.mark.parametrize("name", MADE)
def test_two_drawings_are_the_same_bytes(name, tmp_path):
    first, second = (figures.save(MADE[name](), tmp_path / f"{i}.svg") for i in range(2))
    assert first.read_bytes() == second.read_bytes() and len(first.read_bytes()) > 2000


def test_the_framework_names_its_widths_and_parts():
    text = said(drawings.framework(teacher=640, hidden=320, shared=96))
    for word in ("640", "320", "96", "frozen", "student $F_s$", "manifold", "matching"):
        assert word in text
    assert "1024" not in text and "768" not in text


def test_the_diagram_has_all_maps():
    text = said(drawings.diagram())
    for name in (
        "O_{ts}",
        "O_{s}",
        "P_{ts}",
        "P_{s}",
        "A_{ts}",
        "A_{s}",
        "$f$",
        "g^{(1)}",
        "g^{(2)}",
    ):
        assert name in text


def test_the_scatter_marks_what_is_violated():
    found = propositions.random_batches(200, 0)
    ax = plots_method.ordering(found, shown=150).axes[0]
    some = found.iloc[:150]
    marked = {line.get_label(): len(line.get_xdata()) for line in ax.lines}
    bad = int((some["U"] < some["printed"]).sum())
    assert marked["printed inequality is violated"] == bad > 0
    assert marked["holds as printed"] == 150 - bad


def test_bars_of_a_bound_add_up():
    rows = {"a": Bound(0.5, 1, 2, 0.25), "b": Bound(1.5, 3, 0.5, 0.0)}
    ax = plots_method.bounds(rows).axes[0]
    for i, bound in enumerate(rows.values()):
        ends = [p.get_x() + p.get_width() for p in ax.patches if abs(p.get_y() + 0.275 - i) < 0.01]
        assert max(ends) == pytest.approx(bound.right)
    marks = ax.lines[0]
    assert list(marks.get_xdata()) == [0.5, 1.5]


def test_planes_print_the_three_losses():
    batch = propositions.plane_batch((1, 0.2), (0.3, 1.1), swapped=True)
    d = propositions.distances(*batch)
    text = said(plots_method.planes({"x": batch}))
    for value in (d.E, d.U, d.C):
        assert f"{value:.2f}" in text
    nothing = plots_method.planes({"x": propositions.plane_batch((0, 0), (1, 0))}, reach=2)
    assert "undefined" in said(nothing)
    assert nothing.axes[0].get_xlim() == (-2, 2)


class Widgets(types.ModuleType):
    """A stand-in for ipywidgets: remembers what was asked for."""

    def __init__(self) -> None:
        super().__init__("ipywidgets")
        self.__spec__ = importlib.util.spec_from_loader("ipywidgets", None)
        self.drawn: list = []
        self.FloatSlider = lambda value, **k: types.SimpleNamespace(value=value, **k)
        self.Checkbox = lambda value, **k: types.SimpleNamespace(value=value, **k)
        self.VBox = self.HBox = list

    def interactive_output(self, draw, moved):
        draw(**{k: v.value for k, v in moved.items()})
        return "output"


@pytest.fixture
def widgets(monkeypatch):
    import IPython.display

    made = Widgets()
    monkeypatch.setitem(sys.modules, "ipywidgets", made)
    monkeypatch.setattr(IPython.display, "display", made.drawn.append)
    monkeypatch.delenv("JPY_SESSION_NAME", raising=False)
    return made


def test_sliders_only_where_something_moves_them(widgets, monkeypatch):
    from matplotlib.figure import Figure

    assert not plots_method.live() and isinstance(plots_method.explorer(), Figure)
    monkeypatch.setenv("JPY_SESSION_NAME", "x.ipynb")
    controls, output = plots_method.explorer()
    assert output == "output" and len(controls) == 6
    (shown,) = widgets.drawn
    d = propositions.distances(*propositions.plane_batch((1.6, 0.3), (0.3, 1.6)))
    assert f"{d.U:.2f}" in said(shown)


def test_without_ipywidgets_a_front_end_gets_the_stills(widgets, monkeypatch):
    monkeypatch.setenv("JPY_SESSION_NAME", "x.ipynb")
    monkeypatch.delitem(sys.modules, "ipywidgets")
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n, *a: None if n == "ipywidgets" else found(n, *a)
    )
    assert not plots_method.live()


def test_the_stills_show_what_their_titles_say():
    d = {t: propositions.distances(*propositions.plane_batch(**how))
         for t, how in plots_method.STILL.items()}  # fmt: skip
    apart, swapped, length, short = d.values()
    assert min(apart[:3]) > 0.5
    assert swapped.U < 1e-12 and swapped.C < 1e-12 and swapped.E > 0.5
    assert length.C < 1e-12 and length.U > 1
    assert short.C > short.U and np.isclose(short.U, short.E)
