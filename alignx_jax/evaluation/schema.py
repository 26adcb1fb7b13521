"""What evaluation.json has of what is read of it again; docs/evaluation.md says what it means."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import pydantic

from alignx_jax.data import languages
from alignx_jax.evaluation import tables
from alignx_jax.evaluation.chance import SCORED
from alignx_jax.exits import UserError


def _code(text: str) -> str:
    try:
        languages.language_name(text)
    except UserError as error:
        raise ValueError(error) from None
    return text


def _direction(text: str) -> str:
    try:
        tables.direction_name(text)
    except (AttributeError, UserError):
        raise ValueError("no two language codes with - between them") from None
    return text


Direction = Annotated[str, pydantic.AfterValidator(_direction)]
Code = Annotated[str, pydantic.AfterValidator(_code)]
Triple = Annotated[list[float], pydantic.Field(min_length=3, max_length=3)]
"""Value, low and high."""
Curve = list[float]
"""A value for each layer, from the embeddings to the final norm."""
ByLanguage = Annotated[dict[Code, Curve], pydantic.Field(min_length=1)]
BothWays = Annotated[
    dict[Code, Annotated[dict[str, Curve], pydantic.Field(min_length=1)]], pydantic.Field(min_length=1)
]
Intervals = dict[str, dict[str, Triple | None] | None]


@dataclass
class Sentences:
    file: str
    count: Annotated[int, pydantic.Field(gt=0)]
    languages: list[Code]
    pivot: Code
    sha256: str


@dataclass
class Alignment:
    retrieval: BothWays
    retrieval_matrix: list[list[float]]
    xsim: BothWays
    mexa: dict[str, ByLanguage]
    mexa_sentences: int
    positive_cosine: ByLanguage
    negative_cosine: ByLanguage
    cka: ByLanguage
    cka_debiased: ByLanguage
    total_variance: Curve
    random_cosine: Curve
    uniformity: Curve
    language_probe: Curve
    language_variance: Curve
    meaning_variance: Curve
    dali: ByLanguage | None
    dali_strict: ByLanguage | None
    matching_head: dict[str, float] | None
    in_prompt: BothWays | None


@dataclass
class Perplexity:
    value: float
    bits_per_byte: Triple | None


def _kinds(scores: dict[str, Any]) -> dict[str, Any]:
    for name, value in scores.items():
        if name.endswith(("_interval", "_change", "_above_floor")):
            right = value is None or (isinstance(value, list) and len(value) == 3)
        else:
            right = (
                isinstance(value, list) and len(value) == 2 if name == "repeating" else isinstance(value, float | int)
            )
        if not right:
            raise ValueError(f"{name} is {value}")
    return scores


def _complete(scores: dict[str, Any]) -> dict[str, Any]:
    floor = {f"{SCORED}_floor", f"{SCORED}_above_floor"}
    for name in ({SCORED, "distinct", "repeating"} | (floor if floor & scores.keys() else set())) - scores.keys():
        raise ValueError(f"{name} is missing")
    return scores


ChangesOfScores = Annotated[dict[str, float | list[float] | None], pydantic.AfterValidator(_kinds)]
Scores = Annotated[ChangesOfScores, pydantic.AfterValidator(_complete)]


@dataclass
class Translation:
    directions: dict[Direction, Scores]
    averages: dict[Direction, Scores]
    signatures: dict[str, str]
    notes: list[str]
    samples: list[dict[str, str]]


@dataclass
class Changes:
    """Of the scores of translation from a control."""

    directions: dict[Direction, ChangesOfScores]
    averages: dict[Direction, ChangesOfScores]


@dataclass
class Losses:
    """Of a step; null is not finite."""

    step: int
    loss: float | None = None
    next_token: float | None = None
    contrastive: float | None = None
    language_matching: float | None = None


@dataclass
class Training:
    train: list[Losses]
    validation: list[Losses]
    balance: list[dict[str, int | float | str | None]]


@dataclass
class Projection:
    x: dict[str, list[list[float]]]
    explained: list[float]


@dataclass
class Model:
    name: str
    path: str
    family: str
    parameters: int
    layers: int
    align_layer: int
    baseline_layer: int
    unknown_rate: dict[Code, float]
    tokens_per_sentence: dict[Code, float]
    alignment: Alignment
    intervals: Intervals
    perplexity: dict[Code, Perplexity]
    continuation_choice: dict[str, Triple | None]
    choices: dict[str, Triple | None] | None
    translation: Translation | None
    tasks: dict[str, dict[str, tuple[float, float | None, bool | None]]] | None
    task_groups: dict[str, list[str]] | None
    projection: dict[str, Projection] | None
    training: Training | None
    step: int | None
    weights: str


@dataclass
class Control:
    model: str
    control: str
    baseline_layer: int
    intervals: Intervals
    translation: Changes | None


@dataclass
class Results:
    command: str
    date: str
    machine: str
    versions: dict[str, str]
    config: dict[str, Any]
    sentences: Sentences
    notes: list[str]
    baseline: str
    models: Annotated[list[Model], pydantic.Field(min_length=1)]
    against_control: list[Control]
