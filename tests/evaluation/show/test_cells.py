"""Numbers as text, and their marks."""

import pytest

from alignx_jax.evaluation.rows import Row
from alignx_jax.evaluation.show import cells
from alignx_jax.evaluation.show.cells import BITS, PERPLEXITY, SHARE, SHARE_OF_ERRORS, SHARE_OF_NEITHER


def row(value, low=None, high=None) -> Row:
    return Row("model", "measure", None, None, None, value, low, high, 9, None)


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
    assert cells.cell(row(0.5, 0.4, 0.6), SHARE, row(0.1, 0.02, 0.2)) == cells.Cell(
        "50.0%", "[40.0, 60.0]", "+10.0", "[2.0, 20.0]", "better"
    )
    assert cells.cell(row(0.5), SHARE) == cells.Cell("50.0%")
    assert cells.cell(row(3.0), PERPLEXITY, row(2.0)) == cells.Cell("3.0", "", "+2.0")
    assert cells.cell(None, SHARE, row(0.1)) == cells.Cell()


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
        ((-0.2,), SHARE, ""),
    ],
)
def test_a_mark_is_no_stronger_than_the_interval(change, style, mark):
    assert cells.mark(row(*change), style) == mark and cells.mark(None, style) == ""
