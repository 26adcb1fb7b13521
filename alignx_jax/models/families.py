"""What each family of decoders changes: how its config.json is read, and what its weights are called.

A new family is a row of `FAMILIES`.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from typing import Any, Literal

import jax

from alignx_jax.config import UserError

_VOCABULARY_MULTIPLE = 128
_ACTIVATIONS = {"silu": jax.nn.silu}


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary position embedding (arXiv 2104.09864) and how its frequencies are scaled for long contexts."""

    kind: Literal["default", "linear", "llama3"] = "default"
    theta: float = 10000.0
    factor: float = 1.0
    """Frequencies are divided by it: all of them (linear), or the low ones (llama3)."""
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    original_max_positions: int = 0
    """Tokens of the context before scaling (llama3)."""


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """The architecture of a decoder; hashable, so that it can be static in a compiled function."""

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_epsilon: float
    rope: Rope
    tie_embeddings: bool
    attention_bias: bool
    """On query, key, value and output."""
    mlp_bias: bool
    activation: str
    """Name of the gate's function; `activation_function` is the function."""
    initializer_range: float
    """Standard deviation of random initial weights."""
    max_positions: int
    """Tokens of the context the model was made for."""

    @property
    def padded_vocab_size(self) -> int:
        """The next multiple of 128: a model axis divides it whatever the tokenizer. The padding is zeros."""
        return -(-self.vocab_size // _VOCABULARY_MULTIPLE) * _VOCABULARY_MULTIPLE

    @property
    def activation_function(self) -> Callable[[jax.Array], jax.Array]:
        return _ACTIVATIONS[self.activation]


@dataclasses.dataclass(frozen=True)
class Weight:
    """One row of the table of weights: a tensor of the checkpoint, and the parameter that it is.

    Sizes are names of fields of `DecoderConfig`. A key with `{layer}` names one tensor a layer of a stacked parameter.
    """

    key: str
    path: tuple[str, ...]
    dims: tuple[str, ...]
    """The tensor's dimensions; "num_heads head_dim" is one dimension of that product, heads outermost."""
    axes: tuple[int, ...]
    """The order, in the parameter, of the sizes in `dims` (each of them an axis of its own)."""
    when: str | None = None
    """Field of `DecoderConfig` that says whether the model has this weight; None: it always does."""
    unless: str | None = None

    @property
    def stacked(self) -> bool:
        return "{layer}" in self.key

    def keys(self, config: DecoderConfig) -> list[str]:
        """The checkpoint's keys, in the order of the layers."""
        return [self.key.format(layer=n) for n in range(config.num_layers)] if self.stacked else [self.key]

    def split(self, config: DecoderConfig) -> list[tuple[int, ...]]:
        """The sizes that each dimension of the tensor is a product of."""
        return [tuple(getattr(config, name) for name in dim.split()) for dim in self.dims]

    def tensor_shape(self, config: DecoderConfig) -> tuple[int, ...]:
        return tuple(math.prod(sizes) for sizes in self.split(config))


@dataclasses.dataclass(frozen=True)
class Family:
    """What is particular to the checkpoints of one `model_type`."""

    read: Callable[[dict[str, Any], str], DecoderConfig]
    """From a parsed config.json and its name."""
    weights: tuple[Weight, ...]
    """The first is the embedding table."""
    architecture: str
    """The transformers class that loads an export."""
    tied_copy: str
    """Key that a checkpoint with tied embeddings may store a second copy of them under."""
    passed_over: tuple[str, ...] = ()
    """Keys (patterns of fnmatch) that may be in a checkpoint and are no part of the decoder."""
    auxiliary_fields: tuple[str, ...] = ()
    """Fields (patterns of fnmatch) of config.json that belong to such parts; left out of an export."""

    def table(self, config: DecoderConfig) -> list[Weight]:
        """The weights that a model of this configuration has."""
        return [
            w
            for w in self.weights
            if (w.when is None or getattr(config, w.when)) and (w.unless is None or not getattr(config, w.unless))
        ]


def decoder_config(config: dict[str, Any], where: str) -> DecoderConfig:
    """The architecture that a parsed config.json describes; `where` names the file in errors.

    Raises:
      UserError: another architecture, a feature that is not supported, or a missing or impossible field.
    """
    name = config.get("model_type")
    if name not in FAMILIES:
        raise UserError(f"{where}: model_type {name!r} is not supported; supported: {', '.join(FAMILIES)}")
    return FAMILIES[name].read(config, where)


def _field(config: dict[str, Any], where: str, name: str, kind: type, default: Any = None) -> Any:
    """`config[name]`, or the default where it is absent or null; of `kind`, and above 0 if a number."""
    value = config.get(name)
    value = default if value is None else value
    if value is None:
        raise UserError(f"{where}: the field {name} is missing")
    number = kind is not bool and isinstance(value, int | float) and not isinstance(value, bool)
    if not (isinstance(value, kind) or (kind is float and number)) or (kind is int and isinstance(value, bool)):
        raise UserError(f"{where}: {name} is {value!r}; expected {_KINDS[kind]}")
    if number and not 0 < value < math.inf:
        raise UserError(f"{where}: {name} is {value!r}; expected a number above 0")
    return float(value) if kind is float else value


_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a string", dict: "an object"}


def _read_rope(config: dict[str, Any], where: str) -> Rope:
    """From `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling` (transformers 4)."""
    name = "rope_parameters" if config.get("rope_parameters") else "rope_scaling"
    fields = {"rope_theta": config.get("rope_theta")} | _field(config, where, name, dict, {})
    where = f"{where}: {name}"
    kind = fields.get("rope_type", fields.get("type", "default"))
    theta = _field(fields, where, "rope_theta", float, 10000.0)
    if fields.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise UserError(f"{where}: partial_rotary_factor is not supported; rotary embeddings of whole heads are")
    match kind:
        case "default":
            return Rope(theta=theta)
        case "linear":
            return Rope("linear", theta, _field(fields, where, "factor", float))
        case "llama3":
            low, high = (_field(fields, where, f"{n}_freq_factor", float) for n in ("low", "high"))
            if low >= high:
                raise UserError(f"{where}: low_freq_factor {low} is not below high_freq_factor {high}")
            return Rope(
                "llama3",
                theta,
                _field(fields, where, "factor", float),
                low,
                high,
                _field(fields, where, "original_max_position_embeddings", int),
            )
    raise UserError(f"{where}: rope type {kind!r} is not supported; supported: default, linear, llama3")


def _read_llama(config: dict[str, Any], where: str) -> DecoderConfig:
    def field(name: str, kind: type, default: Any = None) -> Any:
        return _field(config, where, name, kind, default)

    for name, plain in (("pretraining_tp", 1), ("quantization_config", None), ("attention_dropout", 0)):
        if config.get(name) not in (plain, None):
            raise UserError(f"{where}: {name} = {config[name]!r} is not supported; supported: {json.dumps(plain)}")
    activation = field("hidden_act", str, "silu")
    if activation not in _ACTIVATIONS:
        raise UserError(f"{where}: hidden_act {activation!r} is not supported; supported: {', '.join(_ACTIVATIONS)}")
    hidden, heads = field("hidden_size", int), field("num_attention_heads", int)
    kv_heads = field("num_key_value_heads", int, heads)
    if heads % kv_heads:
        raise UserError(f"{where}: {kv_heads} num_key_value_heads do not divide {heads} num_attention_heads")
    if config.get("head_dim") is None and hidden % heads:
        raise UserError(
            f"{where}: {heads} num_attention_heads do not divide hidden_size {hidden}, and no head_dim is set"
        )
    head_dim = field("head_dim", int, hidden // heads)
    if head_dim % 2:
        raise UserError(f"{where}: head_dim {head_dim} is odd; rotary embeddings turn pairs of dimensions")
    return DecoderConfig(
        family="llama",
        vocab_size=field("vocab_size", int),
        hidden_size=hidden,
        intermediate_size=field("intermediate_size", int),
        num_layers=field("num_hidden_layers", int),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        norm_epsilon=field("rms_norm_eps", float, 1e-6),
        rope=_read_rope(config, where),
        tie_embeddings=field("tie_word_embeddings", bool, False),
        attention_bias=field("attention_bias", bool, False),
        mlp_bias=field("mlp_bias", bool, False),
        activation=activation,
        initializer_range=field("initializer_range", float, 0.02),
        max_positions=field("max_position_embeddings", int, 2048),
    )


def _llama_weights() -> tuple[Weight, ...]:
    def layer(key: str, name: str, dims: tuple[str, ...], axes: tuple[int, ...], when: str | None = None) -> Weight:
        return Weight(f"model.layers.{{layer}}.{key}", ("layers", name), dims, axes, when)

    d, f, q, kv = "hidden_size", "intermediate_size", "num_heads head_dim", "num_kv_heads head_dim"
    return (
        Weight("model.embed_tokens.weight", ("embedding",), ("vocab_size", d), (0, 1)),
        layer("input_layernorm.weight", "attention_norm", (d,), (0,)),
        layer("self_attn.q_proj.weight", "query", (q, d), (2, 0, 1)),
        layer("self_attn.k_proj.weight", "key", (kv, d), (2, 0, 1)),
        layer("self_attn.v_proj.weight", "value", (kv, d), (2, 0, 1)),
        layer("self_attn.o_proj.weight", "attention_output", (d, q), (1, 2, 0)),
        layer("self_attn.q_proj.bias", "query_bias", (q,), (0, 1), "attention_bias"),
        layer("self_attn.k_proj.bias", "key_bias", (kv,), (0, 1), "attention_bias"),
        layer("self_attn.v_proj.bias", "value_bias", (kv,), (0, 1), "attention_bias"),
        layer("self_attn.o_proj.bias", "attention_output_bias", (d,), (0,), "attention_bias"),
        layer("post_attention_layernorm.weight", "mlp_norm", (d,), (0,)),
        layer("mlp.gate_proj.weight", "gate", (f, d), (1, 0)),
        layer("mlp.up_proj.weight", "up", (f, d), (1, 0)),
        layer("mlp.down_proj.weight", "down", (d, f), (1, 0)),
        layer("mlp.gate_proj.bias", "gate_bias", (f,), (0,), "mlp_bias"),
        layer("mlp.up_proj.bias", "up_bias", (f,), (0,), "mlp_bias"),
        layer("mlp.down_proj.bias", "down_bias", (d,), (0,), "mlp_bias"),
        Weight("model.norm.weight", ("norm",), (d,), (0,)),
        Weight("lm_head.weight", ("output",), ("vocab_size", d), (0, 1), unless="tie_embeddings"),
    )


FAMILIES = {
    "llama": Family(
        read=_read_llama,
        weights=_llama_weights(),
        architecture="LlamaForCausalLM",
        tied_copy="lm_head.weight",
        # Buffers of old Llama checkpoints, and the pair classifier of the published AlignX ones.
        passed_over=("*.rotary_emb.inv_freq", "language_matching_classifier.*"),
        auxiliary_fields=("align_layer", "contrastive_*", "lang_dict", "language_*", "num_languages"),
    ),
}
