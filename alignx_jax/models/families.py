"""What each family of decoders changes: how its config.json is read, and what its weights are called.

A new family is a row of `FAMILIES`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from alignx_jax.exits import UserError
from alignx_jax.models import rope
from alignx_jax.models.architecture import ACTIVATIONS, DecoderConfig
from alignx_jax.models.fields import Fields

_GLOBAL, _LOCAL = "full_attention", "sliding_attention"


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


def _weights() -> tuple[Weight, ...]:
    """Of all families: a norm before the MLP is called otherwise where there is one after attention too."""

    def layer(key: str, name: str, dims: tuple[str, ...], axes: tuple[int, ...], when=None, unless=None) -> Weight:
        return Weight(f"model.layers.{{layer}}.{key}", ("layers", name), dims, axes, when, unless)

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
        layer("self_attn.o_proj.bias", "attention_output_bias", (d,), (0,), "output_bias"),
        layer("self_attn.q_norm.weight", "query_norm", ("head_dim",), (0,), "qk_norms"),
        layer("self_attn.k_norm.weight", "key_norm", ("head_dim",), (0,), "qk_norms"),
        layer("post_attention_layernorm.weight", "mlp_norm", (d,), (0,), unless="post_norms"),
        layer("post_attention_layernorm.weight", "attention_post_norm", (d,), (0,), "post_norms"),
        layer("pre_feedforward_layernorm.weight", "mlp_norm", (d,), (0,), "post_norms"),
        layer("post_feedforward_layernorm.weight", "mlp_post_norm", (d,), (0,), "post_norms"),
        layer("mlp.gate_proj.weight", "gate", (f, d), (1, 0)),
        layer("mlp.up_proj.weight", "up", (f, d), (1, 0)),
        layer("mlp.down_proj.weight", "down", (d, f), (1, 0)),
        layer("mlp.gate_proj.bias", "gate_bias", (f,), (0,), "mlp_bias"),
        layer("mlp.up_proj.bias", "up_bias", (f,), (0,), "mlp_bias"),
        layer("mlp.down_proj.bias", "down_bias", (d,), (0,), "mlp_bias"),
        Weight("model.norm.weight", ("norm",), (d,), (0,)),
        Weight("lm_head.weight", ("output",), ("vocab_size", d), (0, 1), unless="tie_embeddings"),
    )


@dataclasses.dataclass(frozen=True)
class Family:
    """What is particular to the checkpoints of one `model_type`."""

    architecture: str
    """The transformers class that loads an export."""
    read: Callable[[Fields], dict[str, Any]]
    """The fields of `DecoderConfig` that are not read the same way for all, from a config.json."""
    defaults: dict[str, Any]
    """What transformers takes where a config.json lacks a field."""
    activation: str = "hidden_act"
    """The field that names the gate's function."""
    refused: tuple[tuple[str, Any], ...] = ()
    """Fields that may only have this value, besides those of all."""
    tied_copy: str = "lm_head.weight"
    """Key that a checkpoint with tied embeddings may store a second copy of them under."""
    passed_over: tuple[str, ...] = ("*.rotary_emb.inv_freq", "language_matching_classifier.*")
    """Keys (patterns of fnmatch) that may be in a checkpoint and are no part of the decoder: buffers of old
    checkpoints, and the pair classifier of the published AlignX ones."""
    auxiliary_fields: tuple[str, ...] = ("align_layer", "contrastive_*", "lang_dict", "language_*", "num_languages")
    """Fields (patterns of fnmatch) of config.json that belong to such parts; left out of an export."""

    weights: tuple[Weight, ...] = _weights()
    """The first is the embedding table."""

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
        hint = f" ({_HINTS[name]})" if name in _HINTS else ""
        raise UserError(f"{where}: model_type {name!r} is not supported{hint}; supported: {', '.join(FAMILIES)}")
    family = FAMILIES[name]
    fields = Fields(config, where, family.defaults)
    for field, plain in (("quantization_config", None), ("attention_dropout", 0), *family.refused):
        fields.only(field, plain)
    hidden, heads = fields.get("hidden_size", int), fields.get("num_attention_heads", int)
    kv_heads = fields.get("num_key_value_heads", int, heads)
    if heads % kv_heads:
        raise fields.error(f"{kv_heads} num_key_value_heads do not divide {heads} num_attention_heads")
    head_dim = fields.optional("head_dim", int)
    if head_dim is None and hidden % heads:
        raise fields.error(f"{heads} num_attention_heads do not divide hidden_size {hidden}, and no head_dim is set")
    head_dim = head_dim or hidden // heads
    if head_dim % 2:
        raise fields.error(f"head_dim {head_dim} is odd; rotary embeddings turn pairs of dimensions")
    read = {
        "vocab_size": fields.get("vocab_size", int),
        "intermediate_size": fields.get("intermediate_size", int),
        "num_layers": fields.get("num_hidden_layers", int),
        "norm_epsilon": fields.get("rms_norm_eps", float, 1e-6),
        "tie_embeddings": fields.get("tie_word_embeddings", bool, False),
        "attention_bias": False,
        "mlp_bias": False,
        "activation": fields.get(family.activation, str, "silu"),
        "initializer_range": fields.get("initializer_range", float, 0.02, zero=True),
        "max_positions": fields.get("max_position_embeddings", int, 2048),
    } | family.read(fields)
    if read["activation"] not in ACTIVATIONS:
        raise fields.error(
            f"{family.activation} {read['activation']!r} is not supported; supported: {', '.join(ACTIVATIONS)}"
        )
    if "rope" not in read:
        read["rope"] = rope.read(fields, read["max_positions"])
    return DecoderConfig(
        family=name, hidden_size=hidden, num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim, **read
    )


def _read_llama(fields: Fields) -> dict[str, Any]:
    attention_bias = fields.get("attention_bias", bool, False)
    return {
        "attention_bias": attention_bias,
        "output_bias": attention_bias,
        "mlp_bias": fields.get("mlp_bias", bool, False),
    }


def _read_mistral(fields: Fields) -> dict[str, Any]:
    windowed = fields.optional("sliding_window", int) is not None
    # transformers 5.24 goes by the window alone: other types of layers it reads and passes over.
    fields.only("layer_types", [_LOCAL if windowed else _GLOBAL] * fields.get("num_hidden_layers", int))
    return _locality(fields, lambda layer: windowed)


def _read_qwen2(fields: Fields) -> dict[str, Any]:
    if not fields.get("use_sliding_window", bool, False) or fields.optional("sliding_window", int) is None:
        fields.only("layer_types", [_GLOBAL] * fields.get("num_hidden_layers", int))
        return {"attention_bias": True}
    first = fields.get("max_window_layers", int, zero=True)
    return {"attention_bias": True} | _locality(fields, lambda layer: layer >= first)


def _read_qwen3(fields: Fields) -> dict[str, Any]:
    attention_bias = fields.get("attention_bias", bool, False)
    return _read_qwen2(fields) | {"qk_norms": True, "attention_bias": attention_bias, "output_bias": attention_bias}


def _read_gemma(fields: Fields) -> dict[str, Any]:
    attention_bias = fields.get("attention_bias", bool, False)
    return {
        "norm_offset": 1.0,
        "scale_embeddings": True,
        "attention_bias": attention_bias,
        "output_bias": attention_bias,
    }


def _read_gemma1(fields: Fields) -> dict[str, Any]:
    fields.only("hidden_activation", "gelu_pytorch_tanh")  # which code that knows this field takes
    named = fields.get("hidden_act", str)
    # The first releases say gelu, and mean its approximation; transformers knows (GemmaConfig).
    return _read_gemma(fields) | {"activation": "gelu_pytorch_tanh" if named == "gelu" else named}


def _read_gemma2(fields: Fields) -> dict[str, Any]:
    return {
        **_read_gemma(fields),
        "post_norms": True,
        "query_scalar": fields.get("query_pre_attn_scalar", float),
        "attention_cap": fields.optional("attn_logit_softcapping", float),
        "logit_cap": fields.optional("final_logit_softcapping", float),
        **_locality(fields, lambda layer: layer % 2 == 0),
    }


def _read_gemma3(fields: Fields) -> dict[str, Any]:
    # transformers 5.24 reads this field and caps nothing: its attention is never given it.
    fields.only("attn_logit_softcapping", None)
    every = fields.get("sliding_window_pattern", int)
    everywhere, local = rope.read_by_kind(fields, fields.get("max_position_embeddings", int))
    return {
        **_read_gemma2(fields),
        "qk_norms": True,
        "rope": everywhere,
        "local_rope": local,
        **_locality(fields, lambda layer: (layer + 1) % every != 0),
    }


def _locality(fields: Fields, by_default: Callable[[int], bool]) -> dict[str, Any]:
    """Which layers are local, by `layer_types` if there are any, and their window."""
    depth = fields.get("num_hidden_layers", int)
    types = fields.get("layer_types", list, [_LOCAL if by_default(layer) else _GLOBAL for layer in range(depth)])
    if len(types) != depth or not all(name in (_GLOBAL, _LOCAL) for name in types):
        raise fields.error(f"layer_types has to name each of {depth} layers {_GLOBAL} or {_LOCAL}")
    if _LOCAL not in types:
        return {}
    return {"window": fields.get("sliding_window", int), "local_layers": tuple(name == _LOCAL for name in types)}


_QWEN = {
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
_GEMMA = {
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
_GEMMA2 = _GEMMA | {"num_attention_heads": 8, "num_key_value_heads": 4}
_GEMMA2 |= {"query_pre_attn_scalar": 256, "sliding_window": 4096}
_ONE_WAY = (("use_bidirectional_attention", False),)

FAMILIES = {
    "llama": Family("LlamaForCausalLM", _read_llama, {}),
    "mistral": Family(
        "MistralForCausalLM",
        _read_mistral,
        {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
    ),
    "qwen2": Family("Qwen2ForCausalLM", _read_qwen2, _QWEN),
    "qwen3": Family("Qwen3ForCausalLM", _read_qwen3, _QWEN | {"head_dim": 128}),
    "gemma": Family(
        "GemmaForCausalLM",
        _read_gemma1,
        _GEMMA | {"num_attention_heads": 16, "num_key_value_heads": 16},
        refused=_ONE_WAY,
    ),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        _read_gemma2,
        _GEMMA2 | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        activation="hidden_activation",
        refused=_ONE_WAY,
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        _read_gemma3,
        _GEMMA2 | {"max_position_embeddings": 131072, "sliding_window_pattern": 6},
        activation="hidden_activation",
        refused=_ONE_WAY,
    ),
}
_HINTS = {"gemma3": "it has an image encoder; docs/families.md says how to save its text part, gemma3_text"}
