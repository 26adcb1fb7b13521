"""A score of translation that chance has, too: what is said of it, and which mark a higher one gets."""

from __future__ import annotations

from alignx_jax.evaluation.rows import ABOVE_FLOOR, FLOOR, Model, Results, averages, direction_codes
from alignx_jax.evaluation.show.cells import SCORE

_FEW = 0.5  # share of distinct outputs below which a direction repeats itself


def mark(results: Results, model: Model, direction: str, change: str) -> str:
    """`change`, the mark of a higher score of a direction or an average, unless chance has such a score: then
    `chance`."""
    if change != "better":
        return change
    above = results.find(model, ABOVE_FLOOR, direction=direction)
    if above is None or above.interval is None:
        return "same"
    return "better" if above.low > 0 and not _mostly_repeating(results, model, direction) else "chance"


def sentence(results: Results, model: Model, direction: str) -> str:
    """What to know of chrF++ besides its change; empty where there is no floor."""
    above = results.find(model, ABOVE_FLOOR, direction=direction)
    floor = results.find(model, FLOOR, direction=direction)
    if above is None or above.interval is None or floor is None:
        return ""
    test = f"{SCORE.signed(above.value)}, 95% interval {above.low:.1f} to {above.high:.1f}"
    shuffled = f"with references shuffled among the sentences it is {SCORE.text(floor.value)} ({test})"
    many, of = _repeating(results, model, direction)
    repeats = f"{many} of {of} directions give most sentences a text that another one gets, too"
    if above.low <= 0:
        return f"No better than chance: {shuffled}{f'; {repeats}' if many else ''}."
    if _mostly_repeating(results, model, direction):
        return f"No better translation all the same: {repeats}; {shuffled}."
    return f"{shuffled[0].upper()}{shuffled[1:]}."


def directions(results: Results) -> list[str]:
    """The directions that were translated, without their means."""
    return [name for name in results.values("direction", "distinct") if not {"x", "y"} & {*direction_codes(name)}]


def repeating(results: Results, model: Model) -> dict[str, float]:
    """The directions that give most sentences a text that another one gets, with their shares of distinct outputs."""
    rows = {name: results.find(model, "distinct", direction=name) for name in directions(results)}
    return {name: row.value for name, row in rows.items() if row and row.value < _FEW}


def _repeating(results: Results, model: Model, direction: str) -> tuple[int, int]:
    """How many of the directions of an average, or of one alone, repeat themselves, and of how many."""
    pairs = {direction_codes(name): name for name in directions(results)}
    names = [pairs[pair] for pair in averages(pairs, results.sentences.pivot).get(direction, [])] or [direction]
    return len(set(names) & repeating(results, model).keys()), len(names)


def _mostly_repeating(results: Results, model: Model, direction: str) -> bool:
    many, of = _repeating(results, model, direction)
    return 2 * many > of
