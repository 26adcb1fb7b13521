"""Panels: labels that do not overlap, SVG that can share a page, names that the fonts can write."""

import functools
import itertools
import re
import xml.etree.ElementTree as ET

import matplotlib
import numpy as np
import pytest

from alignx_jax.evaluation.rows import Row
from alignx_jax.evaluation.show import panels
from alignx_jax.evaluation.show.cells import INDEX, SHARE
from alignx_jax.evaluation.show.panels import Group, Key, Line, Panel


def test_labels_are_spread_as_little_as_it_takes():
    """Against the least squares of all grids of moves; unconstrained, and at the upper end."""
    for places in ([0.5, 0.5, 0.1], [0.2, 0.3, 0.25]):
        grid = np.linspace(0, 1, 41)
        allowed = [p for p in itertools.product(grid, repeat=3) if np.diff(np.sort(p)).min() >= 0.2 - 1e-9]
        best = min(np.square(np.subtract(p, places)).sum() for p in allowed)
        moved = panels.spread(places, 0.2)
        assert np.diff(np.sort(moved)).min() > 0.2 - 1e-9
        assert np.square(moved - places).sum() == pytest.approx(best, abs=0.03) and moved.max() <= 1
    np.testing.assert_allclose(panels.spread([1.0, 1.0], 0.1), [0.9, 1.0])
    np.testing.assert_allclose(panels.spread([0.9, 0.1], 0.1), [0.9, 0.1])


@pytest.mark.parametrize(
    "name, written",
    [("stage 1", "stage 1"), ("模型 a", "?? a"), ("Llama-3.1-8B-stage2", "Llama-..B-stage2"), ("a" * 16, "a" * 16)],
)
def test_names_are_ascii_and_short(name, written):
    assert panels.ascii_name(name) == written


def _panel(key="one", name="stage 1"):
    line = Line(Key(name, "#0072b2"), np.arange(3), np.array([0.1, 0.4, 0.2]))
    alt = f'{name} & "others"'
    return Panel(key, "", alt, lambda axes: panels.draw_curves(axes, [line], SHARE, "x", aligned=[1], named=True))


def test_an_svg_is_an_image_with_its_words_and_ids_of_its_own():
    svg = _panel(name="a$b$ <x>").svg()
    root = ET.fromstring(svg.replace("xlink:href", "href"))
    assert root.get("role") == "img" and root.get("aria-label") == 'a$b$ <x> & "others"'
    ids = [element.get("id") for element in root.iter() if element.get("id")]
    assert ids and all(i.startswith("one-") for i in ids)
    used = re.findall(r'(?:url\(#|href="#)([^")]+)', svg)
    assert used and set(used) <= set(ids)
    assert "a$b$ <x>" in [element.text for element in root.iter() if element.tag.endswith("text")]
    assert "<style" not in svg and "<metadata" not in svg


def test_the_same_panel_has_the_same_bytes_whatever_the_settings():
    first = _panel().svg()
    with matplotlib.rc_context({"font.size": 30, "svg.hashsalt": "else"}):
        assert _panel().svg() == first
        assert matplotlib.rcParams["font.size"] == 30
    assert _panel("two").svg() != first


def test_no_axis_of_shares_goes_beyond_100_percent():
    line = Line(Key("a", "#0072b2"), np.arange(3), np.ones(3))
    svg = Panel("p", "", "", lambda axes: panels.draw_curves(axes, [line], SHARE, "x")).svg()
    ticks = [float(tick) for tick in re.findall(r">(-?[\d.]+)%<", svg)]
    assert ticks and max(ticks) == 100


def test_a_group_is_a_picture():
    key = Key("模型", "#0072b2", "^")
    pixels = Group("g", "title", (_panel("a"), _panel("b"), _panel("c"), _panel("d")), (key,)).pixels()
    assert pixels.dtype == np.uint8 and pixels.shape[2] == 3 and pixels.shape[1] > pixels.shape[0]
    assert (pixels == np.array([0, 0x72, 0xB2])).all(axis=2).any()


@pytest.mark.parametrize("languages, numbered", [(3, True), (27, False)])
def test_a_matrix_has_numbers_where_there_is_room(languages, numbered):
    shares = np.full((languages, languages), 0.42)
    names = [f"l{n}" for n in range(languages)]
    svg = Panel("m", "m", "m", lambda axes: panels.draw_matrix(axes, shares, names, 0.5)).svg()
    assert svg.count(">42<") == (languages**2 if numbered else 0)


def test_dots_show_values_intervals_and_what_is_not_there():
    key = Key("a", "#0072b2")
    rows = {
        name: Row("a", "retrieval", 1, None, name, *numbers, 9, "b")
        for name, numbers in (("x", (0.5, None, None)), ("y", (0.0, -0.2, 0.3)))
    }
    draw = functools.partial(panels.draw_dots, names=["x", "y", "z"], rows={key: rows}, style=INDEX, changes=True)
    svg = Panel("d", "d", "d", draw).svg()
    drawn = re.findall(r'<path d="([^"]*)"[^>]*stroke: #0072b2', svg)
    assert len(drawn) == 1  # one interval
    assert all(f">{name}<" in svg for name in "xyz") and ">-0.2<" in svg and ">+0.4<" in svg
