"""The results of an evaluation: rows, one for each number, below what was measured and how (evaluation.json).

Rates are shares of 1; BLEU and chrF++ are in %.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import pydantic

from alignx_jax.data import languages
from alignx_jax.exits import UserError

FORMAT = 2
OTHERS = "others"
"""As a language: the mean of all but the first language (`languages.home`)."""
SCORED = "chrF++"
"""The metric of translation that a verdict is about."""
FLOOR, ABOVE_FLOOR = f"{SCORED}_floor", f"{SCORED}_above_floor"
"""What chance has of it, and how much more there is."""
_DIRECTION = re.compile(r"([a-z]+(?:-[A-Z][a-z]+)?)-([a-z]+(?:-[A-Z][a-z]+)?)")
_DIGITS = 6  # of a number that is written


def direction_codes(direction: str) -> tuple[str, str]:
    """`de` and `en` of `de-en`, `zh-Hant` and `x` of `zh-Hant-x`.

    Raises:
      ValueError: it is none.
    """
    found = _DIRECTION.fullmatch(direction)
    if not found:
        raise ValueError(f"{direction!r}: no two language codes with - between them")
    return found.groups()


def direction_name(direction: str) -> str:
    """`German to English` of `de-en`, `English to others` of an average's `en-x`.

    Raises:
      ValueError: it is none.
    """
    if direction == "x-y":
        return "between others"
    return " to ".join(OTHERS if code == "x" else _language_name(code) for code in direction_codes(direction))


def averages(pairs: Collection[tuple[str, str]], pivot: str) -> dict[str, list[tuple[str, str]]]:
    """The directions of each mean, by its name."""
    found = {
        f"{pivot}-x": [pair for pair in pairs if pair[0] == pivot],
        f"x-{pivot}": [pair for pair in pairs if pair[1] == pivot],
        "x-y": [pair for pair in pairs if pivot not in pair],
    }
    return {name: of for name, of in found.items() if of}


def _language_name(code: str) -> str:
    try:
        return languages.language_name(code)
    except UserError as error:
        raise ValueError(error) from None


def _code(text: str) -> str:
    if text != OTHERS:
        _language_name(text)
    return text


def _direction(text: str) -> str:
    direction_name(text)
    return text


Code = Annotated[str, pydantic.AfterValidator(_code)]
Direction = Annotated[str, pydantic.AfterValidator(_direction)]


class Row(NamedTuple):
    """A number that was measured, or its change from another model. What it is not of is None."""

    model: str
    measure: str
    """`retrieval`, `chrF++`, `tasks/NAME/METRIC,FILTER`, ...; docs/evaluation.md says what they are."""
    layer: int | None
    """Number of layers that the states have been through."""
    direction: Direction | None
    """`de-en`; `en-x`, `x-en` and `x-y` are means over the directions out of the pivot, into it, and beside it."""
    language: Code | None
    """Of what is between languages, both directions between this and the pivot. None: all, a mean over languages
    where each has a value; `others`: the mean over all but the first language, mostly English."""
    value: float | None
    """None: not finite."""
    low: float | None
    high: float | None
    """Ends of the 95 % interval, where there is one."""
    n: int | None
    """Sentences or items of each language or direction."""
    against: str | None
    """The model that `value` is a change from; None: it is no change."""

    @property
    def interval(self) -> tuple[float, float] | None:
        return None if self.low is None or self.high is None else (self.low, self.high)


@dataclass(frozen=True)
class Sentences:
    file: str
    count: Annotated[int, pydantic.Field(gt=0)]
    languages: list[Code]
    pivot: Code
    sha256: str


@dataclass(frozen=True)
class Losses:
    """Of a step; None: not finite, or not computed."""

    step: int
    loss: float | None = None
    next_token: float | None = None
    contrastive: float | None = None
    language_matching: float | None = None


@dataclass(frozen=True)
class Training:
    train: list[Losses]
    validation: list[Losses]
    balance: list[dict[str, int | float | str | None]]
    """How the losses stood to each other (training/balance.py)."""


@dataclass(frozen=True)
class Projection:
    """Sentences in the plane, after a number of layers."""

    layer: int
    x: dict[Code, list[tuple[float, float]]]
    explained: tuple[float, float]
    """Shares of the variance of the two axes."""


@dataclass(frozen=True)
class Model:
    name: str
    path: str
    step: int | None
    """None: not trained by a run."""
    weights: str
    """Their digest."""
    family: str
    parameters: int
    layers: int
    align_layer: int
    projection: list[Projection]
    training: Training | None

    def layer_of(self, other: Model) -> int:
        """The layer of another model that this one's aligned layer is compared with: the same, or, as layers of models
        of different depth are not the same, the other's own aligned layer."""
        return self.align_layer if self.layers == other.layers else other.align_layer


@dataclass(frozen=True)
class Sample:
    """A translation by every model."""

    direction: Direction
    source: str
    reference: str
    outputs: dict[str, str]
    """By model."""


@dataclass(frozen=True)
class Translation:
    signatures: dict[str, str]
    """Of each metric, what it takes to get the same value again."""
    notes: list[str]
    samples: list[Sample]


@dataclass(frozen=True)
class Results:
    """One evaluation. A change is against `baseline`, or of a run of stage 1 against its control."""

    command: str
    date: str
    machine: str
    versions: dict[str, str]
    config: dict[str, Any]
    sentences: Sentences
    notes: list[str]
    baseline: str
    controls: list[tuple[str, str]]
    """Names of every run of stage 1 and of its control, which is trained alike without the pair losses."""
    models: Annotated[list[Model], pydantic.Field(min_length=1)]
    translation: Translation | None
    tasks: dict[str, bool | None]
    """Whether more is better, by measure; None where the harness does not know."""
    rows: list[Row]

    @functools.cached_property
    def base(self) -> Model | None:
        """The model that others are compared with; None where there is nothing to compare."""
        found = [model for model in self.models if model.name == self.baseline]
        return found[0] if found and len(self.models) > 1 else None

    def compared(self) -> list[Model]:
        """The models that are compared with the baseline."""
        return [model for model in self.models if model is not self.base] if self.base else []

    def against_control(self, pair: tuple[str, str]) -> Results:
        """The same of a run and its control alone, which is the baseline then."""
        name, control = pair
        by_name = {model.name: model for model in self.models}
        return dataclasses.replace(self, baseline=control, controls=[], models=[by_name[control], by_name[name]])

    @functools.cached_property
    def _by_place(self) -> dict[tuple, Row]:
        return {(row.model, row.measure, row.layer, row.direction, row.language, row.against): row for row in self.rows}

    def find(
        self,
        model: Model,
        measure: str,
        layer: int | Literal["aligned", "last"] | None = None,
        *,
        direction: str | None = None,
        language: str | None = None,
        against: Model | None = None,
    ) -> Row | None:
        """The row of a number, or of its change against another model; None where there is none that is finite."""
        layer = {"aligned": model.align_layer, "last": model.layers}.get(layer, layer)
        row = self._by_place.get((model.name, measure, layer, direction, language, against and against.name))
        return None if row is None or row.value is None else row

    def curve(self, model: Model, measure: str) -> np.ndarray | None:
        """[L+1] a measure of all languages over the layers; None where one of them has none that is finite."""
        found = [self.find(model, measure, layer) for layer in range(model.layers + 1)]
        return None if None in found else np.array([row.value for row in found])

    def values(self, field: str, measure: str) -> list[Any]:
        """What the rows of a measure have in a field, each once, in order."""
        return [value for value in dict.fromkeys(self._fields[field].get(measure, ())) if value is not None]

    @functools.cached_property
    def _fields(self) -> dict[str, dict[str, list]]:
        found: dict[str, dict[str, list]] = {field: {} for field in Row._fields}
        for row in self.rows:
            for field, value in zip(Row._fields, row, strict=True):
                found[field].setdefault(row.measure, []).append(value)
        return found

    def to_json(self) -> str:
        """The contents of evaluation.json: a row a line."""
        head = dataclasses.asdict(dataclasses.replace(self, rows=[]))
        del head["rows"]
        head = json.dumps({"format": FORMAT, **head, "columns": Row._fields}, indent=1, ensure_ascii=False)
        rows = ",\n  ".join(
            json.dumps([_short(x) for x in row], ensure_ascii=False, allow_nan=False) for row in self.rows
        )
        return f'{head[:-2]},\n "rows": [\n  {rows}\n ]\n}}\n'


def _short(value: Any) -> Any:
    return float(f"{value:.{_DIGITS}g}") if isinstance(value, float) else value


def from_json(content: bytes) -> Results:
    """Raises:
    ValueError: it is not JSON, has another format, lacks a key, or a value is of another kind; names the key.
    """
    found = json.loads(content)
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise ValueError(f"format: has to be {FORMAT}, of this version of alignx_jax")
    if found.get("columns") != list(Row._fields):
        raise ValueError(f"columns: have to be {', '.join(Row._fields)}")
    try:
        results = _adapter().validate_json(content, strict=True)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    _check(results)
    return results


@functools.cache
def _adapter() -> pydantic.TypeAdapter[Results]:
    return pydantic.TypeAdapter(Results)


def _check(results: Results) -> None:
    """Whether names and layers fit each other.

    Raises:
      ValueError: the first that does not.
    """
    depths = {model.name: model.layers for model in results.models}
    samples = results.translation.samples if results.translation else []
    names: Iterable[tuple[str, str | None]] = [
        ("baseline", results.baseline),
        *((f"controls.{n}", name) for n, pair in enumerate(results.controls) for name in pair),
        *((f"translation.samples.{n}.outputs", name) for n, of in enumerate(samples) for name in of.outputs),
        *((f"rows.{n}.model", row.model) for n, row in enumerate(results.rows)),
        *((f"rows.{n}.against", row.against) for n, row in enumerate(results.rows)),
    ]
    for key, name in names:
        if name is not None and name not in depths:
            raise ValueError(f"{key}: no model is called {name}")
    layers = [
        *((f"models.{n}.align_layer", model.name, model.align_layer) for n, model in enumerate(results.models)),
        *((f"rows.{n}.layer", row.model, row.layer) for n, row in enumerate(results.rows) if row.layer is not None),
    ]
    for key, name, layer in layers:
        if not 0 <= layer <= depths[name]:
            raise ValueError(f"{key}: {layer}, and {name} has {depths[name]} layers")
