"""The decoder: embeddings, pre-norm blocks of rotary grouped-query attention and a gated MLP, a final norm.

Shapes: R rows, T tokens (S as keys), D hidden size, H heads, K key/value heads, G = H/K, h head size, f = h/2 angles,
F MLP width, L layers, V padded vocabulary. Of pooled states: P layers, K pools a row.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from alignx_jax import sharding
from alignx_jax.models import attention, rope
from alignx_jax.models.architecture import DecoderConfig

Remat = Literal["none", "attention", "block", "offload"]
_BLOCK_INPUT = "block_input"  # the name of what `remat="offload"` moves to the host


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecoderOutput:
    """What a forward pass returns."""

    hidden_RxTxD: jax.Array
    """States after the final norm, in the compute dtype."""
    pooled_PxRxKxD: jax.Array | None
    """Pooled states of each layer of `pooled_layers`, float32 (float64 under float64 compute); None without taps."""


def _high(dtype: jnp.dtype) -> jnp.dtype:
    """The type of norms, angles, softmax and pools: float32, or float64 under float64 compute."""
    return jnp.promote_types(dtype, jnp.float32)


def _rms_norm(x: jax.Array, weight: nnx.Param, config: DecoderConfig) -> jax.Array:
    """Over the last axis, which the weight has."""
    high = x.astype(_high(x.dtype))
    high = high * jax.lax.rsqrt(jnp.mean(jnp.square(high), axis=-1, keepdims=True) + config.norm_epsilon)
    scale = weight[...].astype(high.dtype)
    if config.norm_offset:
        scale += config.norm_offset
    return (high * jnp.expand_dims(scale, tuple(range(x.ndim - 1)))).astype(x.dtype)


def _rotate(x_RxTxHxh: jax.Array, cos_and_sin_2xRxTxf: jax.Array) -> jax.Array:
    """Turns dimension i with dimension i + h/2, in the angles' precision."""
    cos, sin = cos_and_sin_2xRxTxf[:, :, :, None, :]
    first, second = jnp.split(x_RxTxHxh.astype(cos.dtype), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x_RxTxHxh.dtype)


def of_kind(choices: Sequence[jax.Array], kind: jax.Array | None) -> jax.Array:
    """The one of a layer's kind; the only one."""
    return choices[0] if len(choices) == 1 else jax.lax.select_n(kind, *choices)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(equation: str, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """einsum, whose gradient by the kernel takes x first.

    JAX's own takes the gradient of y first. XLA then transposes that on a CPU, and with it computes again, element by
    element, whatever it comes from (dev/decisions.md).
    """
    return jnp.einsum(equation, x, kernel)


def _product_forward(equation: str, x: jax.Array, kernel: jax.Array):
    return _product(equation, x, kernel), (x, kernel)


def _product_backward(equation: str, inputs: tuple[jax.Array, jax.Array], of_y: jax.Array):
    x, kernel = inputs
    of_inputs, y_dims = equation.split("->")
    x_dims, kernel_dims = of_inputs.split(",")
    of_x = jnp.einsum(f"{y_dims},{kernel_dims}->{x_dims}", of_y, kernel)
    return of_x, jnp.einsum(f"{x_dims},{y_dims}->{kernel_dims}", x, of_y)


_product.defvjp(_product_forward, _product_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _rounded(weight: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """One layer's weights with the precision of `dtype` in their own type, as the cast that follows leaves them.

    A compiler for TPU that sees a stack used in bfloat16 alone casts all of it before the loop, and keeps the copy; it
    does not look through this (dev/decisions.md).
    """
    info = jnp.finfo(dtype)
    if info.bits >= jnp.finfo(weight.dtype).bits:
        return weight
    return jax.lax.reduce_precision(weight, exponent_bits=info.nexp, mantissa_bits=info.nmant)


_rounded.defvjp(lambda weight, dtype: (_rounded(weight, dtype), None), lambda dtype, _, of_weight: (of_weight,))


class Adapter(nnx.Module):
    """What is trained of a linear layer with frozen weights W: y = x W + scale (x A) B; W + A B is never formed."""

    def __init__(self, a: jax.Array, b: jax.Array, scale: float):
        """A [L,inputs,rank] and B [L,rank,outputs], whose inputs and outputs may be heads and their sizes."""
        self.a, self.b, self.scale = nnx.LoRAParam(a), nnx.LoRAParam(b), scale

    def __call__(self, equation: str, x: jax.Array) -> jax.Array:
        """What is added to the product `equation` of x and W, in the dtype of x."""
        of_inputs, y_dims = equation.split("->")
        x_dims, kernel_dims = of_inputs.split(",")
        inputs = "".join(d for d in kernel_dims if d in x_dims)
        low_dims = x_dims.removesuffix(inputs) + "z"
        low = _product(f"{x_dims},{inputs}z->{low_dims}", x, self.a[...].astype(x.dtype)) * self.scale
        outputs = kernel_dims.removeprefix(inputs)
        return _product(f"{low_dims},z{outputs}->{y_dims}", low, self.b[...].astype(x.dtype))


def _normal(config: DecoderConfig, rngs: nnx.Rngs, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    return config.initializer_range * jax.random.normal(rngs.params(), shape, dtype)


def _policy(remat: Remat, kernel: attention.Kernel) -> Callable[..., Any]:
    """What `jax.checkpoint` keeps of a layer besides its input."""
    if remat == "attention":
        return attention.kept(kernel)
    if remat == "offload":
        return jax.checkpoint_policies.save_and_offload_only_these_names(
            names_which_can_be_saved=(),
            names_which_can_be_offloaded=(_BLOCK_INPUT,),
            offload_src="device",
            offload_dst="pinned_host",
        )
    return jax.checkpoint_policies.nothing_saveable


class Blocks(nnx.Module):
    """The weights of all layers, each stacked on a leading axis [L,...]; `__call__` is one layer, without that axis."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype):
        self.config = config
        d, f, h = config.hidden_size, config.intermediate_size, config.head_dim
        q, kv = (config.num_heads, h), (config.num_kv_heads, h)

        def normal(*shape: int) -> nnx.Param:
            return nnx.Param(_normal(config, rngs, (config.num_layers, *shape), dtype))

        def bias(present: bool, *shape: int) -> nnx.Param | None:
            return nnx.Param(jnp.zeros((config.num_layers, *shape), dtype)) if present else None

        def norm(present: bool, size: int) -> nnx.Param | None:
            return nnx.Param(jnp.full((config.num_layers, size), 1 - config.norm_offset, dtype)) if present else None

        self.attention_norm, self.attention_post_norm = norm(True, d), norm(config.post_norms, d)
        self.query_norm, self.key_norm = norm(config.qk_norms, h), norm(config.qk_norms, h)
        self.query, self.query_bias = normal(d, *q), bias(config.attention_bias, *q)
        self.key, self.key_bias = normal(d, *kv), bias(config.attention_bias, *kv)
        self.value, self.value_bias = normal(d, *kv), bias(config.attention_bias, *kv)
        self.attention_output, self.attention_output_bias = normal(*q, d), bias(config.output_bias, d)
        self.mlp_norm, self.mlp_post_norm = norm(True, d), norm(config.post_norms, d)
        self.gate, self.gate_bias = normal(d, f), bias(config.mlp_bias, f)
        self.up, self.up_bias = normal(d, f), bias(config.mlp_bias, f)
        self.down, self.down_bias = normal(f, d), bias(config.mlp_bias, d)
        self.adapters = nnx.Dict()  # by the name of their weights; `lora.attach` adds them

    def _linear(self, equation: str, x: jax.Array, name: str) -> jax.Array:
        """A product in the dtype of x, which the weights are cast to."""
        y, bias = _product(equation, x, getattr(self, name)[...].astype(x.dtype)), getattr(self, f"{name}_bias")
        y = y if bias is None else y + jnp.expand_dims(bias[...].astype(x.dtype), (0, 1))
        return y + self.adapters[name](equation, x) if name in self.adapters else y

    def __call__(
        self,
        x_RxTxD: jax.Array,
        cos_and_sin_2xRxTxf: jax.Array,
        mix: Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]],
    ) -> tuple[jax.Array, Any]:
        """`mix` takes rotated q [R,T,H,h], k and v [R,T,K,h], and gives [R,T,H,h] and what else is to be returned."""
        with jax.named_scope("attention"):
            y_RxTxD = _rms_norm(x_RxTxD, self.attention_norm, self.config)
            q_RxTxHxh = self._linear("rtd,dnh->rtnh", y_RxTxD, "query")
            k_RxTxKxh = self._linear("rtd,dnh->rtnh", y_RxTxD, "key")
            v_RxTxKxh = self._linear("rtd,dnh->rtnh", y_RxTxD, "value")
            q, k, v = (sharding.constrain(a, "rows", None, "model", None) for a in (q_RxTxHxh, k_RxTxKxh, v_RxTxKxh))
            if self.config.qk_norms:
                q, k = _rms_norm(q, self.query_norm, self.config), _rms_norm(k, self.key_norm, self.config)
            q, k = _rotate(q, cos_and_sin_2xRxTxf), _rotate(k, cos_and_sin_2xRxTxf)
            mixed_RxTxHxh, kept = mix(q, k, v)
            mixed_RxTxHxh = sharding.constrain(mixed_RxTxHxh, "rows", None, "model", None)
            y_RxTxD = self._linear("rtnh,nhd->rtd", mixed_RxTxHxh, "attention_output")
            if self.config.post_norms:
                y_RxTxD = _rms_norm(y_RxTxD, self.attention_post_norm, self.config)
            x_RxTxD = sharding.constrain(x_RxTxD + y_RxTxD, "rows")
        with jax.named_scope("mlp"):
            y_RxTxD = _rms_norm(x_RxTxD, self.mlp_norm, self.config)
            gate_RxTxF = self._linear("rtd,df->rtf", y_RxTxD, "gate")
            up_RxTxF = self._linear("rtd,df->rtf", y_RxTxD, "up")
            y_RxTxF = sharding.constrain(self.config.activation_function(gate_RxTxF) * up_RxTxF, "rows", None, "model")
            y_RxTxD = self._linear("rtf,fd->rtd", y_RxTxF, "down")
            if self.config.post_norms:
                y_RxTxD = _rms_norm(y_RxTxD, self.mlp_post_norm, self.config)
            return sharding.constrain(x_RxTxD + y_RxTxD, "rows"), kept


class Decoder(nnx.Module):
    """A decoder-only language model. Parameters keep the dtype they are given; compute has its own."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype = jnp.float32):
        """Random weights: N(0, initializer_range), norms 1 with their offset, biases and the vocabulary's padding 0."""
        self.config = config
        vocabulary = (config.padded_vocab_size, config.hidden_size)
        real_Vx1 = (jnp.arange(config.padded_vocab_size) < config.vocab_size)[:, None]
        self.embedding = nnx.Param(jnp.where(real_Vx1, _normal(config, rngs, vocabulary, dtype), 0))
        self.layers = Blocks(config, rngs=rngs, dtype=dtype)
        self.norm = nnx.Param(jnp.full((config.hidden_size,), 1 - config.norm_offset, dtype))
        if config.tie_embeddings:
            self.output = None
        else:
            self.output = nnx.Param(jnp.where(real_Vx1, _normal(config, rngs, vocabulary, dtype), 0))

    @property
    def output_embedding(self) -> jax.Array:
        """[V,D] in the master dtype; rows from `vocab_size` on are padding and must get no probability."""
        return (self.embedding if self.output is None else self.output)[...]

    def embed(self, tokens_RxT: jax.Array, compute_dtype: jnp.dtype) -> jax.Array:
        """What the first layer gets, [R,T,D]."""
        # Looked up in the master dtype, so that the gradients of a token's occurrences are summed in it.
        x_RxTxD = sharding.constrain_lookup(self.embedding[...][tokens_RxT].astype(compute_dtype))
        return x_RxTxD * self.config.hidden_size**0.5 if self.config.scale_embeddings else x_RxTxD

    @property
    def scores(self) -> attention.Scores:
        return attention.Scores((self.config.query_scalar or self.config.head_dim) ** -0.5, self.config.attention_cap)

    @property
    def windows(self) -> list[int | None]:
        """Of each kind of layer."""
        return [kind.window for kind in self.config.kinds]

    @property
    def kind_of_layer(self) -> jax.Array | None:
        """The number of each layer's kind, int32 [L]; None where all are of one."""
        return jnp.array(self.config.local_layers, jnp.int32) if len(self.config.kinds) > 1 else None

    def rotations(self, positions_RxT: jax.Array, compute_dtype: jnp.dtype) -> list[jax.Array]:
        """Cosine and sine of the rotary angles, [2,R,T,f], float32 at least; of each kind of layer, or one for all."""
        high = _high(compute_dtype)

        def turned(r: rope.Rope) -> jax.Array:
            frequencies_f = jnp.asarray(rope.frequencies(r, self.config.head_dim), high)
            angles_RxTxf = positions_RxT.astype(high)[:, :, None] * frequencies_f[None, None, :]
            cos_and_sin_2xRxTxf = jnp.stack([jnp.cos(angles_RxTxf), jnp.sin(angles_RxTxf)])
            return cos_and_sin_2xRxTxf if r.attention_factor == 1 else cos_and_sin_2xRxTxf * r.attention_factor

        ropes = [kind.rope for kind in self.config.kinds]
        return [turned(r) for r in (ropes if len(set(ropes)) > 1 else ropes[:1])]

    def normalize(self, x_RxTxD: jax.Array) -> jax.Array:
        """The final norm, of what the last layer gives."""
        return _rms_norm(x_RxTxD, self.norm, self.config)

    def __call__(
        self,
        tokens_RxT: jax.Array,
        positions_RxT: jax.Array,
        segments_RxT: jax.Array,
        *,
        compute_dtype: jnp.dtype,
        remat: Remat,
        kernel: attention.Kernel = "xla",
        pool_RxKxT: jax.Array | None = None,
        pooled_layers: tuple[int, ...] = (),
    ) -> DecoderOutput:
        """Runs all layers. A token attends to itself and to the earlier tokens of its own segment.

        Layers are run by one scan, which writes each tapped layer's pooled states into its carry: no layer's [R,T,D]
        is kept for a tap, and no parameter is sliced. On a mesh, trace it inside `jax.set_mesh(mesh)`.

        Args:
          tokens_RxT: int32 token ids.
          positions_RxT: int32 position of each token in its own example.
          segments_RxT: int32; 0 is padding, a segment of its own.
          compute_dtype: of activations and products; norms, rotary angles, softmax and pools are float32 at least.
          remat: what the backward pass computes again of each layer: "block" everything from the layer's input,
            "attention" everything but attention's output, which is kept too, "none" nothing but attention's logits;
            "offload" is "block" with the inputs in the host's memory.
          kernel: of attention; `attention.choose` says which.
          pool_RxKxT: weights of the pools; pooled[k] = sum over t of pool[k,t] h[t].
          pooled_layers: distinct numbers of hidden states, 0 (embeddings) to L: l is the residual stream after l
            layers, L is after the final norm.

        Raises:
          ValueError: pooled_layers are out of range or repeated.
        """
        depth, high = self.config.num_layers, _high(compute_dtype)
        if len(set(pooled_layers)) < len(pooled_layers) or not set(pooled_layers) <= set(range(depth + 1)):
            raise ValueError(f"pooled_layers {pooled_layers} have to be distinct and between 0 and {depth}")
        place = {layer: place for place, layer in enumerate(pooled_layers)}

        def pool_into(pooled_PxRxKxD: jax.Array, index: jax.Array | int, x_RxTxD: jax.Array) -> jax.Array:
            # Exact products: at the default precision of a TPU or GPU, 1/n would be rounded to 8 or 11 bits.
            pooled_RxKxD = jnp.einsum(
                "rkt,rtd->rkd", pool_RxKxT.astype(high), x_RxTxD.astype(high), precision=jax.lax.Precision.HIGHEST
            )
            return pooled_PxRxKxD.at[index].set(sharding.constrain(pooled_RxKxD, "rows"))

        rotations = self.rotations(positions_RxT, compute_dtype)
        graph, stacked = nnx.split(self.layers)
        mix = attention.over(segments_RxT, kernel, self.scores, self.windows)

        def block(x_RxTxD: jax.Array, layer: nnx.State, kind: jax.Array | None) -> jax.Array:
            x_RxTxD = checkpoint_name(x_RxTxD, _BLOCK_INPUT)
            layer = jax.tree.map(lambda x: _rounded(x, compute_dtype) if x.ndim > 1 else x, layer)  # norms stay
            turns = of_kind(rotations, kind)
            return nnx.merge(graph, layer)(x_RxTxD, turns, lambda q, k, v: (mix(q, k, v, kind), None))[0]

        if remat != "none":  # a scan's body shares nothing with its backward
            block = jax.checkpoint(block, prevent_cse=False, policy=_policy(remat, kernel))

        # Checkpointed, or the backward pass would keep a copy of the pools for each layer.
        @functools.partial(jax.checkpoint, prevent_cse=False)
        def tap(pooled_PxRxKxD: jax.Array, index: jax.Array, x_RxTxD: jax.Array) -> jax.Array:
            return jax.lax.cond(index >= 0, pool_into, lambda pooled, index, x: pooled, pooled_PxRxKxD, index, x_RxTxD)

        def body(carry, of_layer):
            (x_RxTxD, pooled_PxRxKxD), (layer, index, kind) = carry, of_layer
            x_RxTxD = block(x_RxTxD, layer, kind)
            if pooled_PxRxKxD is not None:
                pooled_PxRxKxD = tap(pooled_PxRxKxD, index, x_RxTxD)
            return (x_RxTxD, pooled_PxRxKxD), None

        x_RxTxD = self.embed(tokens_RxT, compute_dtype)
        pooled_PxRxKxD = None
        if pooled_layers:
            pooled_PxRxKxD = jnp.zeros((len(pooled_layers), *pool_RxKxT.shape[:2], x_RxTxD.shape[-1]), high)
            pooled_PxRxKxD = sharding.constrain(pooled_PxRxKxD, None, "rows")
        if 0 in place:
            pooled_PxRxKxD = pool_into(pooled_PxRxKxD, place[0], x_RxTxD)
        inside_L = jnp.array([place.get(n, -1) if n < depth else -1 for n in range(1, depth + 1)])
        of_layers = stacked, inside_L, self.kind_of_layer
        (x_RxTxD, pooled_PxRxKxD), _ = jax.lax.scan(body, (x_RxTxD, pooled_PxRxKxD), of_layers)
        x_RxTxD = self.normalize(x_RxTxD)
        if depth in place:
            pooled_PxRxKxD = pool_into(pooled_PxRxKxD, place[depth], x_RxTxD)
        return DecoderOutput(x_RxTxD, pooled_PxRxKxD)
