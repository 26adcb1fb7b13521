"""The architecture of a decoder."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax

from alignx_jax.models.rope import Rope

_VOCABULARY_MULTIPLE = 128
ACTIVATIONS = {"silu": jax.nn.silu, "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True)}


class Kind(NamedTuple):
    """What layers of one kind have in common."""

    window: int | None
    """Tokens that a token attends to, itself among them; None: all that came before it."""
    rope: Rope


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
    """On query, key and value."""
    mlp_bias: bool
    activation: str
    """Name of the gate's function; `activation_function` is the function."""
    initializer_range: float
    """Standard deviation of random initial weights."""
    max_positions: int
    """Tokens of the context the model was made for."""
    output_bias: bool = False
    """On attention's output."""
    qk_norms: bool = False
    """Whether queries and keys are normalised, each head by itself, before they are rotated."""
    post_norms: bool = False
    """Whether what attention and MLP add to the residual stream is normalised too."""
    norm_offset: float = 0.0
    """Added to the weights of norms: 1 where the checkpoint has them less 1."""
    scale_embeddings: bool = False
    """Whether embeddings are multiplied by sqrt(hidden_size), rounded to the compute dtype, as they go in."""
    query_scalar: float | None = None
    """Attention's logits are divided by its root; None: by that of head_dim."""
    attention_cap: float | None = None
    """c of c tanh(logits / c), attention's."""
    logit_cap: float | None = None
    """The same of the vocabulary's."""
    window: int | None = None
    """Tokens that a token of a local layer attends to, itself among them."""
    local_layers: tuple[bool, ...] = ()
    """Of each layer, whether it is local; empty: none is."""
    local_rope: Rope | None = None
    """Of local layers; None: that of the others."""

    @property
    def padded_vocab_size(self) -> int:
        """The next multiple of 128: a model axis divides it whatever the tokenizer. The padding is zeros."""
        return -(-self.vocab_size // _VOCABULARY_MULTIPLE) * _VOCABULARY_MULTIPLE

    @property
    def activation_function(self) -> Callable[[jax.Array], jax.Array]:
        return ACTIVATIONS[self.activation]

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The kinds of layers that the model has: global ones, then local ones."""
        every = Kind(None, self.rope), Kind(self.window, self.local_rope or self.rope)
        return tuple(every[local] for local in sorted(set(self.local_layers) or {False}))
