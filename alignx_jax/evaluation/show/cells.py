"""Numbers of an evaluation as text: a row and its change make a cell."""

from __future__ import annotations

import dataclasses

import numpy as np

from alignx_jax.evaluation.rows import Row


@dataclasses.dataclass(frozen=True)
class Style:
    """How numbers of a kind are written, and whether more of it is better (1), worse (-1) or neither (0)."""

    scale: float = 1.0
    digits: int = 1
    unit: str = ""
    better: int = 1

    def text(self, value: float) -> str:
        return f"{self.scale * value:,.{self.digits}f}{self.unit}"

    def signed(self, change: float) -> str:
        """A difference: a share's in points."""
        written = f"{self.scale * change:+,.{self.digits}f}"
        return written if any(digit in written for digit in "123456789") else written.replace(written[0], "±", 1)

    def interval(self, row: Row | None) -> str:
        """`[low, high]`, or nothing where there is none."""
        if row is None or row.interval is None:
            return ""
        return f"[{', '.join(f'{self.scale * end:,.{self.digits}f}' for end in row.interval)}]"


SHARE, SHARE_OF_ERRORS, SHARE_OF_NEITHER = (Style(100, 1, "%", better) for better in (1, -1, 0))
SCORE, PERPLEXITY, LENGTH = (Style(1, 1, "", better) for better in (1, -1, 0))
INDEX, BITS = (Style(1, 3, "", better) for better in (1, -1))


@dataclasses.dataclass(frozen=True)
class Cell:
    """A number ready to be shown. `mark`: better, worse, same (the interval of the change contains 0), chance (a higher
    score of translation that chance has, too; see `doubts.mark`), or empty where neither is better or the change has
    no interval."""

    text: str = "–"
    interval: str = ""
    change: str = ""
    change_interval: str = ""
    mark: str = ""


def mark(change: Row | None, style: Style) -> str:
    """better, worse, same, or nothing where neither is better or no interval says how sure that is."""
    if change is None or change.interval is None:
        return ""
    low, high = change.interval
    if low <= 0 <= high:
        return "same"
    return {1: "better", -1: "worse", 0: ""}[int(np.sign(change.value)) * style.better]


def cell(row: Row | None, style: Style, change: Row | None = None) -> Cell:
    """A number, and its change where it has one."""
    if row is None:
        return Cell()
    if change is None:
        return Cell(style.text(row.value), style.interval(row))
    return Cell(
        style.text(row.value),
        style.interval(row),
        style.signed(change.value),
        style.interval(change),
        mark(change, style),
    )
