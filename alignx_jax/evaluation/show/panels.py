"""Small pictures that a page sets side by side or below each other; curves, dots, matrices and points.

matplotlib draws them without any global state, the same bytes for the same data. Text in a picture is ASCII, codes for
languages, since matplotlib's fonts lack most scripts; `alt` says in words and numbers what a panel shows.
"""

from __future__ import annotations

import dataclasses
import html
import io
import re
from collections.abc import Callable, Iterable, Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from alignx_jax.evaluation.rows import Row
from alignx_jax.evaluation.show.cells import Style

INK, FAINT, GRID = "#33373d", "#6f757e", "#e6e8eb"
SHAPES = {"o": "●", "s": "■", "^": "▲"}
"""matplotlib's markers, and the same for text."""
_HEAT = LinearSegmentedColormap.from_list("heat", ["#f7f9fc", "#a6cde8", "#2f7fbc", "#08306b"])
_STYLE = {
    "axes.axisbelow": True,
    "axes.edgecolor": "#b4b8be",
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.labelcolor": FAINT,
    "axes.labelsize": 11,
    "axes.linewidth": 0.8,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 12,
    "axes.unicode_minus": False,
    "font.family": "DejaVu Sans",
    "font.size": 11,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "lines.solid_capstyle": "round",
    "svg.fonttype": "none",
    "svg.hashsalt": "alignx_jax",
    "text.color": INK,
    "text.parse_math": False,  # a dollar in a model's name is a dollar
    "xtick.color": FAINT,
    "xtick.major.size": 0,
    "ytick.color": FAINT,
    "ytick.major.size": 0,
}
_NUMBERED = 12  # most languages of a matrix with a number in every cell


@dataclasses.dataclass(frozen=True)
class Key:
    """An entry of a legend."""

    text: str
    colour: str
    shape: str = "o"

    @property
    def symbol(self) -> str:
        return SHAPES[self.shape]


@dataclasses.dataclass(frozen=True)
class Panel:
    key: str
    """Unique on a page; part of the ids of its SVG."""
    title: str
    alt: str
    draw: Callable[[Axes], None]
    note: str = ""
    size: tuple[int, int] = (330, 230)
    """In points; about the pixels that a telephone gives it, so that text of 11 points stays legible."""

    def svg(self) -> str:
        """An `<svg>` element to put into a page: its ids are its own, and it styles nothing else."""
        with matplotlib.rc_context(_STYLE):
            figure = Figure(figsize=tuple(side / 72 for side in self.size), layout="constrained")
            self.draw(figure.add_subplot())
            file = io.StringIO()
            nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
            figure.savefig(file, format="svg", transparent=True, metadata=nothing)
        drawn = re.sub(r"<style.*?</style>", "", file.getvalue(), count=1, flags=re.DOTALL)
        drawn = re.sub(r' (?:d|x|y)="[^"]*"', lambda found: re.sub(r"(\.\d\d)\d+", r"\1", found.group()), drawn)
        drawn = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{self.key}-", drawn)
        view = re.search(r'viewBox="[^"]*"', drawn).group()
        body = drawn[drawn.index(">", drawn.index("<svg")) + 1 :]
        return f'<svg {view} role="img" aria-label="{html.escape(self.alt)}">{body}'


@dataclasses.dataclass(frozen=True)
class Group:
    """Panels that share a legend."""

    key: str
    title: str
    panels: tuple[Panel, ...]
    legend: tuple[Key, ...] = ()

    def pixels(self) -> np.ndarray:
        """All panels in one picture [H,W,3] uint8, at most three in a row."""
        columns = min(3, len(self.panels))
        rows = -(-len(self.panels) // columns)
        width, height = (max(panel.size[side] for panel in self.panels) / 72 for side in (0, 1))
        with matplotlib.rc_context(_STYLE):
            figure = Figure(figsize=(columns * width, rows * (height + 0.4) + 0.9), dpi=110, layout="constrained")
            canvas = FigureCanvasAgg(figure)
            for place, panel in enumerate(self.panels, 1):
                axes = figure.add_subplot(rows, columns, place)
                panel.draw(axes)
                axes.set_title(ascii_name(panel.title, 48), pad=18)
            figure.suptitle(ascii_name(self.title, 80), x=0.01, ha="left", size=14)
            marks = [Line2D([], [], color=key.colour, marker=key.shape, ls="") for key in self.legend]
            names = [ascii_name(key.text, 40) for key in self.legend]
            figure.legend(marks, names, loc="outside lower center", ncols=min(len(names), 4 * columns), frameon=False)
            canvas.draw()
            return np.asarray(canvas.buffer_rgba())[..., :3].copy()


@dataclasses.dataclass(frozen=True)
class Line:
    """A curve; `faint` ones lie in the background."""

    key: Key
    x: np.ndarray
    y: np.ndarray
    faint: bool = False


def ascii_name(name: str, most: int = 16) -> str:
    """A name that matplotlib's fonts can write, shortened in its middle to `most` characters."""
    name = name.encode("ascii", "replace").decode()
    return name if len(name) <= most else f"{name[: most // 2 - 2]}..{name[-(most - most // 2) :]}"


def spread(places: Sequence[float], gap: float) -> np.ndarray:
    """Places from 0 to 1, moved as little as it takes to lie `gap` apart in their order: labels that do not overlap.

    Less the gaps, the moved places have to ascend; isotonic regression by pooling adjacent violators.
    """
    order = np.argsort(places, kind="stable")
    steps = gap * np.arange(len(order))
    level = np.asarray(places, float)[order] - steps
    blocks: list[list[float]] = []
    for value in level:
        blocks.append([value])
        while len(blocks) > 1 and np.mean(blocks[-2]) > np.mean(blocks[-1]):
            blocks[-2:] = [blocks[-2] + blocks[-1]]
    level = np.concatenate([np.full(len(block), np.mean(block)) for block in blocks])
    moved = np.empty(len(order))
    moved[order] = np.clip(level, 0, max(0, 1 - steps[-1])) + steps
    return moved


def draw_curves(
    axes: Axes,
    lines: Sequence[Line],
    style: Style,
    x_label: str,
    *,
    aligned: Iterable[float] = (),
    named: bool = False,
    floor: float | None = None,
) -> None:
    """Lines over x; `aligned` places are marked, `named` lines carry their key's text at their end."""
    for place in aligned:
        axes.axvline(place, color=FAINT, lw=0.9, ls=(0, (3, 3)), zorder=1)
        _label(axes, "aligned", (place, 1), ("data", "axes fraction"), (0, 2), FAINT, 9.5, ha="center", va="bottom")
    for line in lines:
        weight = {"lw": 0.9, "alpha": 0.45, "zorder": 2} if line.faint else {"lw": 2.0, "zorder": 3}
        dots = {"marker": "o", "ms": 3.5} if len(line.x) < 20 and not line.faint else {}
        axes.plot(line.x, line.y, color=line.key.colour, **weight, **dots)
    axes.margins(x=0.02)
    low, high = axes.get_ylim()
    if style.unit == "%":  # no share lies beyond 0 or 100 %
        margin = 0.04 * (high - low)
        low, high = max(low, -margin), min(high, 1 + margin)
        axes.yaxis.set_major_formatter(_percent)
    low = low if floor is None else floor
    axes.set_ylim(low, high)
    if named:
        ends = [(line.y[-1] - low) / (high - low) for line in lines]
        for line, place in zip(lines, spread(ends, 0.08), strict=True):
            _label(axes, ascii_name(line.key.text), (1, place), "axes fraction", (6, 0), line.key.colour, 10.5)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.set_xlabel(x_label)


def draw_dots(
    axes: Axes, names: Sequence[str], rows: Mapping[Key, Mapping[str, Row]], style: Style, changes: bool
) -> None:
    """A row for each name, a dot with its interval for each key; of `changes`, a line shows where there is none."""
    if changes:
        axes.axvline(0, color=FAINT, lw=1, zorder=1)
    offsets = np.linspace(-0.32, 0.32, len(rows) + 2)[1:-1]
    for (key, by_name), offset in zip(rows.items(), offsets, strict=True):
        there = [(n + offset, by_name[name]) for n, name in enumerate(names) if name in by_name]
        axes.plot([row.value for _, row in there], [y for y, _ in there], "o", color=key.colour, ms=4.5, zorder=3)
        ranges = [[(row.low, y), (row.high, y)] for y, row in there if row.interval]
        axes.add_collection(LineCollection(ranges, colors=key.colour, linewidths=1.4, alpha=0.6, zorder=2))
    axes.set_yticks(range(len(names)), names, color=INK)
    axes.set_ylim(len(names) - 0.5, -0.5)
    for n in range(1, len(names)):
        axes.axhline(n - 0.5, color=GRID, lw=0.8, zorder=0)
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", visible=True)
    axes.spines.left.set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    if changes:
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{style.scale * value:+.4g}" if value else "0"))
    elif style.unit == "%":
        axes.xaxis.set_major_formatter(_percent)


def draw_matrix(axes: Axes, shares_KxK: np.ndarray, names: Sequence[str], top: float) -> None:
    """Shares from 0 to `top` as colours, with their percentages where there is room; NaN stays empty."""
    axes.imshow(shares_KxK, cmap=_HEAT, vmin=0, vmax=top, interpolation="none")
    places = range(len(names))
    many = len(names) > _NUMBERED
    axes.set_xticks(places, names, size=8 if many else 10.5, rotation=90 if many else 0)
    axes.set_yticks(places, names, size=8 if many else 10.5)
    axes.grid(visible=False)
    for edge in np.arange(1, len(names)) - 0.5:
        axes.axhline(edge, color="white", lw=0.8)
        axes.axvline(edge, color="white", lw=0.8)
    axes.spines[:].set_visible(False)
    axes.set_ylabel("from")
    axes.set_xlabel("to")
    if many:
        return
    digits = 0 if top > 0.1 else 1
    for row, column in zip(*np.nonzero(~np.isnan(shares_KxK)), strict=True):
        share = shares_KxK[row, column]
        colour = "white" if share > 0.55 * top else INK
        _label(axes, f"{100 * share:.{digits}f}", (column, row), "data", (0, 0), colour, 9, ha="center")


def draw_plane(axes: Axes, points: Mapping[Key, np.ndarray], pivot: Key, shares: Sequence[str]) -> None:
    """Sentences as points, and a thin line from each to its translation in `pivot`; three are drawn darker."""
    home_Nx2 = points[pivot]
    bold = np.linspace(0, len(home_Nx2) - 1, 3).astype(int)
    others = {key: x_Nx2 for key, x_Nx2 in points.items() if key != pivot}
    for key, x_Nx2 in others.items():
        axes.plot(*_links(home_Nx2, x_Nx2), color=key.colour, lw=0.4, alpha=0.22, zorder=2)
        axes.plot(*x_Nx2.T, key.shape, color=key.colour, ms=3.4, alpha=0.8, mew=0, zorder=3)
        axes.plot(*_links(home_Nx2[bold], x_Nx2[bold]), color=INK, lw=0.9, alpha=0.6, zorder=4)
    axes.plot(*home_Nx2.T, pivot.shape, color=pivot.colour, ms=4, mew=0, zorder=5)
    axes.set_aspect("equal", adjustable="datalim")
    axes.grid(visible=False)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_xlabel(f"component 1 ({shares[0]})")
    axes.set_ylabel(f"component 2 ({shares[1]})")


def _links(start_Nx2: np.ndarray, end_Nx2: np.ndarray) -> np.ndarray:
    """Separate lines as one, [2,3N]: a path breaks at NaN."""
    return np.stack([start_Nx2, end_Nx2, np.full_like(end_Nx2, np.nan)], axis=1).reshape(-1, 2).T


def _label(axes: Axes, text: str, place, coordinates, offset, colour: str, size: float, ha="left", va="center") -> None:
    axes.annotate(text, place, offset, coordinates, "offset points", color=colour, size=size, ha=ha, va=va)


@FuncFormatter
def _percent(value: float, _) -> str:
    return f"{100 * value:.4g}%"
