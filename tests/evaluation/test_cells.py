"""Numbers as text, their marks, and the interval of a change against published values."""

import math

import numpy as np
import pytest

from alignx_jax.evaluation import cells
from alignx_jax.evaluation.cells import BITS, PERPLEXITY, SHARE, SHARE_OF_ERRORS, SHARE_OF_NEITHER


@pytest.mark.parametrize(
    "style, value, text, signed",
    [
        (SHARE, 0.1234, "12.3%", "+12.3"),
        (SHARE, -0.0004, "-0.0%", "±0.0"),
        (PERPLEXITY, 12345.67, "12,345.7", "+12,345.7"),
        (BITS, -1.0185, "-1.018", "-1.018"),
    ],
)
def test_numbers_are_written_by_their_style(style, value, text, signed):
    assert style.text(value) == text and style.signed(value) == signed


def test_a_cell_has_the_value_the_change_and_their_intervals():
    assert cells.cell((0.5, 0.4, 0.6), SHARE, (0.1, 0.02, 0.2)) == cells.Cell(
        "50.0%", "[40.0, 60.0]", "+10.0", "[2.0, 20.0]", "better"
    )
    assert cells.cell(0.5, SHARE) == cells.Cell("50.0%")
    assert cells.cell(None, SHARE, 0.1) == cells.Cell()


@pytest.mark.parametrize(
    "change, style, mark",
    [
        ((0.1, 0.01, 0.2), SHARE, "better"),
        ((0.1, 0.01, 0.2), SHARE_OF_ERRORS, "worse"),
        ((-0.1, -0.2, -0.01), SHARE_OF_ERRORS, "better"),
        ((0.1, 0.01, 0.2), SHARE_OF_NEITHER, ""),
        ((0.1, -0.01, 0.2), SHARE, "same"),
        ((0.1, 0.0, 0.2), SHARE, "same"),
        ((0.0002, 0.0001, 0.0003), SHARE, "better"),
        (-0.2, SHARE, ""),
    ],
)
def test_a_mark_is_no_stronger_than_the_interval(change, style, mark):
    assert cells.mark(change, style) == mark


def _wilson(hits, n, z=1.959963984540054):
    p = hits / n
    half = z * math.sqrt(z * z + 4 * n * p * (1 - p))
    return p, (2 * n * p + z * z - half) / (2 * (n + z * z)), (2 * n * p + z * z + half) / (2 * (n + z * z))


@pytest.mark.parametrize(
    "after, before, published", [((56, 70), (48, 80), (0.0524, 0.3339)), ((9, 10), (3, 10), (0.1705, 0.8090))]
)
def test_the_interval_of_a_difference_is_newcombes_method_10(after, before, published):
    """The values of his Table II, cases a and b."""
    change, low, high = cells.difference(_wilson(*after), _wilson(*before))
    assert change == after[0] / after[1] - before[0] / before[1]
    assert (round(low, 4), round(high, 4)) == published


def test_a_difference_of_plain_numbers_has_no_interval():
    assert cells.difference(3.0, (2.0, 1.0, 4.0)) == 1.0


def test_a_row_takes_the_paired_change_where_there_is_one():
    results = {"baseline": "a", "models": [{"name": "a", "x": 1.0}, {"name": "b", "x": 3.0}, {"name": "c"}]}
    (plain,) = cells.row(results, "x", PERPLEXITY, lambda m: m.get("x"))
    assert plain.cells == (cells.Cell("1.0"), cells.Cell("3.0", "", "+2.0"), cells.Cell())
    (paired,) = cells.row(results, "x", PERPLEXITY, lambda m: m.get("x"), lambda m: (2.0, -1.0, 5.0))
    assert paired.cells[1] == cells.Cell("3.0", "", "+2.0", "[-1.0, 5.0]", "same")
    (withheld,) = cells.row(results, "x", PERPLEXITY, lambda m: (m["x"],) * 3 if "x" in m else None, lambda m: None)
    assert withheld.cells[1] == cells.Cell("3.0", "[3.0, 3.0]")
    assert cells.row(results, "y", PERPLEXITY, lambda m: m.get("y")) == []


def test_nothing_is_compared_with_a_single_model():
    assert cells.baseline({"baseline": "a", "models": [{"name": "a"}]}) is None


def test_a_mean_curve_averages_languages_and_directions():
    curve = cells.mean_curve(
        {"de": {"to": [0.0, 1.0], "from": [1.0, 2.0]}, "fr": {"to": [2.0, 3.0], "from": [3.0, 6.0]}}
    )
    np.testing.assert_allclose(curve, [1.5, 3.0])
    assert cells.mean_curve({}) is None and cells.mean_curve(None) is None
    assert cells.at_layer({"alignment": {"a": {"b": {"de": [1.0, 7.0, 3.0]}}}}, 1, "a", "b") == 7.0
