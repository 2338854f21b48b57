"""Diagrams of the method: Figures 1 and 2 of the paper, drawn anew in the book's style."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from armada_lib import figures

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ALIGNER, STUDENT, LOSS, GREY = "#0173b2", "#de8f05", "#b03a2e", "0.35"
PALE = {ALIGNER: "#dceaf5", STUDENT: "#fcebd0"}


def _canvas(height: float, size: tuple[float, float]) -> tuple[Figure, Axes]:
    """A figure of the book's width with one bare axes in units of its own."""
    figures.style()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(figures.WIDTH, height))
    ax = figure.add_axes((0, 0, 1, 1))
    ax.set(xlim=(0, size[0]), ylim=(0, size[1]))
    ax.set_axis_off()
    return figure, ax


def _box(ax: Axes, x: float, y: float, text: str, width: float = 2.1, **look: Any) -> None:
    """A rounded box around (x, y)."""
    from matplotlib.patches import FancyBboxPatch

    high = 1.15
    usual: dict[str, Any] = {"facecolor": "white", "edgecolor": GREY, "linewidth": 1.2}
    usual["boxstyle"] = "round,pad=0,rounding_size=0.15"
    patch = FancyBboxPatch((x - width / 2, y - high / 2), width, high, **usual | look)
    ax.add_patch(patch)
    ax.text(x, y, text, ha="center", va="center", fontsize=9, linespacing=1.35)


def _arrow(
    ax: Axes, start: tuple[float, float], end: tuple[float, float], text: str = "",
    at: tuple[float, float] = (0, 0.28), bend: float = 0.0, size: float = 9, **look: Any,
) -> None:  # fmt: skip
    """An arrow with its name beside the middle."""
    from matplotlib.patches import FancyArrowPatch

    usual: dict[str, Any] = {"arrowstyle": "-|>", "mutation_scale": 11, "linewidth": 1.2}
    usual |= {"color": GREY, "connectionstyle": f"arc3,rad={bend}", "shrinkA": 0, "shrinkB": 0}
    ax.add_patch(FancyArrowPatch(start, end, **usual | look))
    if text:
        x, y = (start[0] + end[0]) / 2 + at[0], (start[1] + end[1]) / 2 + at[1]
        colour = look.get("color", "black")
        ax.text(x, y, text, ha="center", va="center", fontsize=size, color=colour)


def framework(teacher: int = 1024, hidden: int = 768, shared: int = 768) -> Figure:
    """Figure 1: who is frozen, who trains, who is kept, with the width of every vector."""
    figure, ax = _canvas(4.6, (16.4, 9.4))
    up, down = 6.4, 3.2  # teacher and student
    high, low = 8.1, 1.5  # projections and auxiliary heads
    frozen = {"facecolor": "0.93", "edgecolor": "0.55", "hatch": "////", "linewidth": 1.0}
    learns = {"facecolor": PALE[ALIGNER], "edgecolor": ALIGNER}
    dropped = {"facecolor": "white", "edgecolor": STUDENT, "linestyle": (0, (4, 2))}
    kept = {"facecolor": PALE[STUDENT], "edgecolor": STUDENT, "linewidth": 2.2}
    _box(ax, 1.0, 4.8, "text $x_i$\nlabel $y_i$", 1.6)
    _arrow(ax, (1.0, 5.4), (2.2, up), bend=-0.25)
    _arrow(ax, (1.0, 4.2), (2.2, down), bend=0.25)
    _box(ax, 3.2, up, "", 2.0, **frozen)
    plain = {"boxstyle": "round,pad=0.2", "facecolor": "white", "edgecolor": "none"}
    ax.text(3.2, up, "teacher $F_t$\nfrozen", ha="center", va="center", fontsize=9, bbox=plain)
    _box(ax, 3.2, down, "student $F_s$\nencoder", 2.0, **kept)
    sides = (
        ("ts", up, high, learns, learns, f"${teacher}$", f"${hidden}$", "$h_t$"),
        ("s", down, low, kept, dropped, "$d$", "$d$", "$h_s$"),
    )
    for side, y, far, main, branch, wide, inner, vector in sides:
        _arrow(ax, (4.2, y), (5.55, y), vector + "\n" + rf"$b\times${wide}", at=(0, 0.55), size=8)
        _box(ax, 6.6, y, rf"map $\tilde{{F}}_{{{side}}}$" + f"\n{wide}" + r"$\to$" + inner, **main)
        _arrow(ax, (7.65, y), (8.75, y), rf"$h'_{{{side}}}$", size=9)
        out = rf"$o_{{{side}}} = O_{{{side}}}\,h'_{{{side}}}$" + "\n" + inner + r"$\to c$"
        _box(ax, 9.8, y, out, **main)
        above = np.sign(far - y)
        _arrow(ax, (6.6, y + 0.575 * above), (9.95, far), bend=-0.28 * above)
        project = rf"$p_{{{side}}} = P_{{{side}}}\,h'_{{{side}}}$" + "\n" + inner
        _box(ax, 11.5, far, project + rf"$\to {shared}$, orthogonal", 3.1, **branch)
        _arrow(ax, (13.05, far), (13.75, far))
        aux = rf"$a_{{{side}}} = A_{{{side}}}\,p_{{{side}}}$" + "\n" + rf"${shared}\to c$"
        _box(ax, 14.8, far, aux, **branch)
        for x, at, name in ((11.1, y, "o"), (16.1, far, "a")):
            ax.text(x, at, rf"$T(y,{name}_{{{side}}})$", fontsize=8, color=GREY, ha="center",
                    va="center", rotation=90)  # fmt: skip
    pull: dict[str, Any] = {"color": LOSS, "linestyle": (0, (4, 2)), "linewidth": 1.6}
    for x, top, bottom, text in (
        (9.8, up, down, r"$\alpha$ matching $D$"),
        (12.3, high, low, "$\\beta$ manifold\nloss $M$"),
        (14.8, high, low, "$\\gamma\\alpha$ matching\n$D$"),
    ):
        _arrow(ax, (x, top - 0.62), (x, bottom + 0.62), **pull)
        ax.text(x - 0.2, 4.8, text, ha="right", va="center", color=LOSS, fontsize=9)
    _legend(ax, [("frozen, run once a text", frozen), ("aligner: learns, then dropped", learns),
                 ("student: learns, kept", kept), ("learns, then dropped", dropped)])  # fmt: skip
    return figure


def _legend(ax: Axes, entries: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
    from matplotlib.patches import Patch

    patches = [Patch(**look, label=name) for name, look in entries]
    ax.legend(handles=patches, loc="lower center", ncols=4, frameon=False, fontsize=8.5,
              handlelength=1.6, columnspacing=1.4, borderaxespad=0.1)  # fmt: skip


def diagram() -> Figure:
    """Figure 2: the maps of Proposition 2, with the places where its proof does not hold."""
    figure, ax = _canvas(3.1, (16.4, 6.4))
    place = {"o": 1.6, "h'": 5.8, "p": 10.4, "a": 14.2}
    top, bottom = 5.2, 1.2
    for side, y, colour in (("ts", top, ALIGNER), ("s", bottom, STUDENT)):
        up = 1 if y == top else -1
        ring = {"boxstyle": "circle,pad=0.25", "facecolor": PALE[colour], "edgecolor": colour}
        for name, x in place.items():
            ax.text(x, y, rf"${name}_{{{side}}}$", ha="center", va="center", fontsize=14, bbox=ring)
        for name, start, end in (("O", 5.1, 2.3), ("P", 6.5, 9.7), ("A", 11.1, 13.5)):
            _arrow(ax, (start, y), (end, y), rf"${name}_{{{side}}}$", (0, 0.42 * up), size=11,
                   color="black")  # fmt: skip
        for x in (4.4, 13.0):
            _mark(ax, x, y + 0.42 * up, "1")
        _arrow(ax, (9.8, y - 0.62 * up), (6.4, y - 0.62 * up), rf"$P_{{{side}}}^{{-1}}$",
               (-0.2, -0.95 * up), -0.3 * up, 11, color=LOSS, linestyle=(0, (4, 2)))  # fmt: skip
    _mark(ax, 8.9, 2.25, "2")
    solid = {"linewidth": 1.4, "color": "black"}
    dashed = solid | {"linestyle": (0, (5, 3))}
    for name, look, right, left, gap in (
        ("p", solid, "$f$", "$f^{-1}$", 0.5),
        ("o", dashed, "$g^{(1)}$", "$g^{(2)}$", 0.6),
        ("a", dashed, r"$g^{(1)}_{aux}$", r"$g^{(2)}_{aux}$", 0.7),
    ):
        x, high, low = place[name], top - 0.75, bottom + 0.75
        _arrow(ax, (x + 0.2, high), (x + 0.2, low), right, (gap, 0), 0, 11, **look)
        _arrow(ax, (x - 0.2, low), (x - 0.2, high), left, (-gap, 0), 0, 11, **look)
    _mark(ax, 3.0, 3.2, "3")
    _mark(ax, 15.9, 3.2, "3")
    return figure


def _mark(ax: Axes, x: float, y: float, text: str) -> None:
    """A number in a ring: a gap that the text explains."""
    ax.text(x, y, text, fontsize=8, color="white", ha="center", va="center", weight="bold",
            bbox={"boxstyle": "circle,pad=0.2", "facecolor": LOSS, "edgecolor": "none"})  # fmt: skip
