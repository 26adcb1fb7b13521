"""Numbers of an evaluation, made ready to be shown: written, compared with the baseline, set into rows.

`results` is the dictionary that `evaluation.json` holds, `model` one of its models.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

Number = float | Sequence[float] | None
"""A value, or (value, low, high) with the ends of its 95 % interval; None where it was not measured."""


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

    def interval(self, number: Number) -> str:
        """`[low, high]`, or nothing where there is none."""
        if number is None or isinstance(number, float | int):
            return ""
        return f"[{', '.join(f'{self.scale * end:,.{self.digits}f}' for end in number[1:])}]"


SHARE, SHARE_OF_ERRORS, SHARE_OF_NEITHER = (Style(100, 1, "%", better) for better in (1, -1, 0))
SCORE, PERPLEXITY, LENGTH = (Style(1, 1, "", better) for better in (1, -1, 0))
INDEX, BITS = (Style(1, 3, "", better) for better in (1, -1))


@dataclasses.dataclass(frozen=True)
class Cell:
    """A number ready to be shown. `mark`: better, worse, same (the interval of the change contains 0), chance (a higher
    score of translation that chance has, too; see `chance.mark`), or empty where neither is better or the change has
    no interval."""

    text: str = "–"
    interval: str = ""
    change: str = ""
    change_interval: str = ""
    mark: str = ""


@dataclasses.dataclass(frozen=True)
class Row:
    label: str
    cells: tuple[Cell, ...] = ()
    """Empty: the label is a heading over the rows that follow."""


def get(found: dict | None, *path: str):
    """The value at a path of keys; None where any of them is missing or None."""
    for key in path:
        found = None if found is None else found.get(key)
    return found


def value_of(number: Number) -> float | None:
    return number if number is None or isinstance(number, float | int) else number[0]


def mark(change: Number, style: Style) -> str:
    """better, worse, same, or nothing where neither is better or no interval says how sure that is."""
    value = value_of(change)
    if change is value:
        return ""
    if change[1] <= 0 <= change[2]:
        return "same"
    return {1: "better", -1: "worse", 0: ""}[int(np.sign(value)) * style.better]


def cell(number: Number, style: Style, change: Number = None) -> Cell:
    """A number, and its change where it has one."""
    value, difference = value_of(number), value_of(change)
    if value is None:
        return Cell()
    if difference is None:
        return Cell(style.text(value), style.interval(number))
    return Cell(
        style.text(value), style.interval(number), style.signed(difference), style.interval(change), mark(change, style)
    )


def baseline(results: dict) -> dict | None:
    """The model that others are compared with; None where there is nothing to compare."""
    named = [model for model in results["models"] if model["name"] == results["baseline"]]
    return named[0] if named and len(results["models"]) > 1 else None


def against_controls(results: dict) -> list[dict]:
    """The results once more for each run with a control: the two models, changes being from the control."""
    models, found = {model["name"]: model for model in results["models"]}, []
    for pair in results["against_control"]:
        model = models[pair["model"]]
        own = {name: of for name, of in model["intervals"].items() if not name.endswith("_change")}
        changed = {"intervals": own | pair["intervals"], "baseline_layer": pair["baseline_layer"]}
        if model["translation"] and (changes := pair["translation"]):
            changed["translation"] = model["translation"] | {
                part: {key: scores | changes[part].get(key, {}) for key, scores in model["translation"][part].items()}
                for part in changes
            }
        found.append(results | {"baseline": pair["control"], "models": [models[pair["control"]], model | changed]})
    return found


def row(
    results: dict,
    label: str,
    style: Style,
    number: Callable[[dict], Number],
    change: Callable[[dict], Number] | None = None,
) -> list[Row]:
    """The row of one measure, none where no model has it.

    Args:
      change: of a model against the baseline; None where the two do not compare. Left out: `difference`.
    """
    base = baseline(results)
    before = None if base is None else number(base)
    cells = []
    for model in results["models"]:
        now = number(model)
        compared = model is not base and before is not None and now is not None
        changed = None if not compared else change(model) if change else difference(now, before)
        cells.append(cell(now, style, changed))
    return [Row(label, tuple(cells))] if any(c != Cell() for c in cells) else []


def difference(now: Number, before: Number) -> Number:
    """now - before; of two intervals, with the interval of independent samples (too wide for the same items).

    The square-and-add rule of Newcombe (1998, Statistics in Medicine 17, 873-890, method 10).
    """
    change = value_of(now) - value_of(before)
    if value_of(now) is now or value_of(before) is before:
        return change
    (value, low, high), (value_0, low_0, high_0) = now, before
    return change, change - np.hypot(value - low, high_0 - value_0), change + np.hypot(high - value, value_0 - low_0)


def mean_curve(values: dict | list | None) -> np.ndarray | None:
    """Per-layer values [L+1], averaged over languages and directions where there are several."""
    if values is None:
        return None
    if not isinstance(values, dict):
        return np.asarray(values, float)
    return np.mean([mean_curve(value) for value in values.values()], axis=0) if values else None


def at_layer(model: dict, layer: int, *path: str) -> float | None:
    """A measure of `alignment` at a layer, averaged over languages and directions."""
    curve = mean_curve(get(model["alignment"], *path))
    return None if curve is None else float(curve[layer])
