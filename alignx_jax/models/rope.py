"""Rotary position embedding (arXiv 2104.09864): its frequencies, and how a config.json describes them."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal, get_args

import numpy as np

from alignx_jax.models.fields import Fields

Kind = Literal["default", "linear", "llama3", "yarn"]
_FIELDS = {"rope_type", "type", "rope_theta", "factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow"}
_FIELDS |= {"original_max_position_embeddings", "attention_factor", "mscale", "mscale_all_dim", "truncate"}
_TWICE = "has both rope_parameters and rope_scaling; leave out one"


@dataclasses.dataclass(frozen=True)
class Rope:
    """The base of the frequencies, and how they are scaled for long contexts."""

    kind: Kind = "default"
    theta: float = 10000.0
    factor: float = 1.0
    """Frequencies are divided by it: all of them (linear), or the low ones (llama3, yarn)."""
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    original_max_positions: int = 0
    """Tokens of the context before scaling (llama3, yarn)."""
    beta_fast: float = 32.0
    """Turns in the original context from which on yarn keeps a frequency."""
    beta_slow: float = 1.0
    """Turns up to which yarn divides it."""
    truncate: bool = True
    """Whether yarn rounds the dimensions of these bounds outwards."""
    attention_factor: float = 1.0
    """Of cosine and sine, so that yarn multiplies attention's logits by its square."""


def frequencies(rope: Rope, head_dim: int) -> np.ndarray:
    """Radians per position of each pair of dimensions, [head_dim / 2] float64.

    `linear` is position interpolation (arXiv 2306.15595). `llama3` keeps wavelengths shorter than
    original_max_positions / high_freq_factor, divides those longer than original_max_positions / low_freq_factor
    by the factor, and interpolates between (the Llama 3.1 release). `yarn` interpolates over dimensions (arXiv
    2309.00071, section 3.2, as in transformers' modeling_rope_utils.py).
    """
    plain = rope.theta ** -(np.arange(0, head_dim, 2) / head_dim)
    if rope.kind == "linear":
        return plain / rope.factor
    if rope.kind == "default":
        return plain
    if rope.kind == "llama3":
        turns = rope.original_max_positions * plain / (2 * math.pi)
        kept = np.clip((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor), 0.0, 1.0)
    else:
        first, last = (_dimension(rope, head_dim, turns) for turns in (rope.beta_fast, rope.beta_slow))
        if rope.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, head_dim - 1)
        last += 0.001 * (first == last)
        kept = 1 - np.clip((np.arange(head_dim // 2) - first) / (last - first), 0.0, 1.0)
    return plain * (kept + (1 - kept) / rope.factor)


def _dimension(rope: Rope, head_dim: int, turns: float) -> float:
    """The pair of dimensions that turns so often in the original context; between two, or beyond the last."""
    wavelength = rope.original_max_positions / turns
    return head_dim * math.log(wavelength / (2 * math.pi)) / (2 * math.log(rope.theta))


def read(config: Fields, max_positions: int, theta: float = 10000.0) -> Rope:
    """From `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling` (transformers 4).

    Args:
      max_positions: of the model, which transformers takes for the original context where that is not given.
      theta: where the configuration has none.

    Raises:
      UserError: a kind or field that is not supported, or an impossible value.
    """
    theta = config.get("rope_theta", float, theta)
    original = config.optional("original_max_position_embeddings", int)
    ropes = {of_fields(config.within(name), max_positions, theta, original) for name in _spellings(config)}
    if len(ropes) > 1:
        raise config.error(_TWICE)
    return ropes.pop()


def read_by_kind(config: Fields, max_positions: int) -> tuple[Rope, Rope]:
    """Of global and of local layers: Gemma 3's `rope_parameters` by type of layer (transformers 5), or `rope_theta`,
    `rope_scaling` (of global layers alone) and `rope_local_base_freq` (transformers 4).

    Raises:
      UserError: as `read`.
    """
    theta, local_theta = config.get("rope_theta", float, 1e6), config.get("rope_local_base_freq", float, 1e4)
    name, *others = _spellings(config)
    if others:
        raise config.error(_TWICE)
    parameters = config.within(name)
    if name == "rope_scaling":
        if parameters.optional("rope_type", str) is None:  # transformers 5.24 does not look at `type` here
            return Rope(theta=parameters.get("rope_theta", float, theta)), Rope(theta=local_theta)
        everywhere, local = parameters, config.within("rope_parameters")
    else:
        if unknown := parameters.names() - {"full_attention", "sliding_attention"}:
            raise config.error(
                f"rope_parameters has {', '.join(sorted(unknown))}; expected an object for each layer type"
            )
        everywhere, local = (parameters.within(f"{kind}_attention") for kind in ("full", "sliding"))
    for fields in (everywhere, local):
        fields.only("truncate", True)  # transformers 5.24 does not find it here, and rounds
    return of_fields(everywhere, max_positions, theta), of_fields(local, max_positions, local_theta)


def _spellings(config: Fields) -> list[str]:
    """Names of the objects that describe the embedding; one at least."""
    config.only("partial_rotary_factor", 1)
    return [name for name in ("rope_parameters", "rope_scaling") if config.within(name).names()] or ["rope_parameters"]


def of_fields(fields: Fields, max_positions: int, theta: float, original: int | None = None) -> Rope:
    """The embedding that one object of parameters describes; `max_positions` and `theta` where it does not say.

    Args:
      original: tokens of the context before scaling, whatever the object says.
    """
    fields.only("partial_rotary_factor", 1)
    if unknown := fields.names() - _FIELDS - {"partial_rotary_factor"}:
        raise fields.error(f"{', '.join(sorted(unknown))} is not supported; supported: {', '.join(sorted(_FIELDS))}")
    kind = fields.get("rope_type", str, fields.get("type", str, "default"))
    if kind not in get_args(Kind):
        raise fields.error(f"rope type {kind!r} is not supported; supported: {', '.join(get_args(Kind))}")
    theta = fields.get("rope_theta", float, theta)
    if kind == "default":
        return Rope(theta=theta)
    factor = fields.get("factor", float)
    if kind == "linear":
        return Rope(kind, theta, factor)
    original = original or fields.get("original_max_position_embeddings", int, max_positions)
    if kind == "llama3":
        low, high = (fields.get(f"{n}_freq_factor", float) for n in ("low", "high"))
        if low >= high:
            raise fields.error(f"low_freq_factor {low} is not below high_freq_factor {high}")
        return Rope(kind, theta, factor, low, high, original)
    return Rope(
        kind,
        theta,
        factor,
        original_max_positions=original,
        beta_fast=fields.get("beta_fast", float, zero=True, default=0.0) or 32.0,
        beta_slow=fields.get("beta_slow", float, zero=True, default=0.0) or 1.0,
        truncate=fields.get("truncate", bool, True),
        attention_factor=_attention_factor(fields, factor),
    )


def _attention_factor(fields: Fields, factor: float) -> float:
    """As given, else 0.1 ln(factor) + 1 (arXiv 2309.00071, section 3.4), or the ratio of two such with `mscale`s."""
    given = fields.optional("attention_factor", float)
    over, under = (fields.optional(name, float, zero=True) for name in ("mscale", "mscale_all_dim"))

    def scale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    if given is not None:
        return given
    return scale(over) / scale(under) if over and under else scale(1.0)
