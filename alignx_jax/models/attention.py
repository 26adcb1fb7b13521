"""Causal attention inside the segments of packed rows: written out for XLA, and by fused kernels on TPU and GPU.

A token attends to itself and to the earlier tokens of its row that have its segment's number; padding, number 0, is a
segment of its own. A fused kernel forms logits block after block on the chip, in the backward pass again.

Shapes: R rows, T tokens (S as keys), H heads, K key/value heads, G = H/K, h head size.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from alignx_jax import sharding
from alignx_jax.exits import UserError

Kernel = Literal["xla", "splash", "cudnn"]
Mix = Callable[[jax.Array, jax.Array, jax.Array, jax.Array | None], jax.Array]
"""Attention of rotated q [R,T,H,h] over k and v [R,T,K,h], in a layer of the kind of that number: [R,T,H,h]."""

_MIN_QUERY_BLOCK, _MAX_QUERY_BLOCKS = 128, 16  # of the XLA path, which is unrolled over them
_KEPT = "attention"  # the name of what `kept` keeps
_SPLASH_BLOCK, _LANES = 512, 128  # most tokens of a block, which is a multiple of the lanes of a TPU's registers
_CUDNN_MULTIPLE = 64  # rows are padded to it; with a mask cuDNN wants an even length


@dataclasses.dataclass(frozen=True)
class Scores:
    """What becomes of the products of queries and keys: `cap tanh(scale q.k / cap)`."""

    scale: float
    cap: float | None = None


@dataclasses.dataclass(frozen=True)
class Choice:
    """The kernel of a run."""

    kernel: Kernel
    reason: str


def choose(
    asked: Literal["auto", "xla", "splash", "cudnn"],
    platform: str,
    head_dim: int,
    dtype: jnp.dtype,
    cap: float | None = None,
) -> Choice:
    """The kernel for `training.attention`, and why it is this one.

    A CPU interprets splash attention, for tests; `auto` never asks it to. The limits of cuDNN are those that
    `jax.nn.dot_product_attention` has on all cards.

    Args:
      platform: of the mesh's devices: "tpu", "gpu" or "cpu".
      dtype: of q, k and v.
      cap: of the model's attention logits.

    Raises:
      UserError: a kernel is asked for that cannot run there, or not this model.
    """
    if asked == "xla":
        return Choice("xla", "asked for")
    device = platform.upper()
    fused = {"tpu": "splash", "gpu": "cudnn"}.get(platform) if asked == "auto" else asked
    if fused is None:
        return Choice("xla", f"there is no fused kernel for a {device}")
    obstacle = None
    if platform not in {"splash": ("tpu", "cpu"), "cudnn": ("gpu",)}[fused]:
        obstacle = f"it does not run on a {device}"
    elif fused == "cudnn" and dtype != jnp.bfloat16:
        obstacle = f"it computes in bfloat16, and --training.compute-dtype is {jnp.dtype(dtype).name}"
    elif fused == "cudnn" and (head_dim > 128 or head_dim % 8):
        obstacle = f"its head sizes are multiples of 8 up to 128, and the model's is {head_dim}"
    elif fused == "cudnn" and cap is not None:
        obstacle = f"it does not cap logits, and the model caps them at {cap:g}"
    if obstacle and asked != "auto":
        raise UserError(f"--training.attention={asked}: {obstacle}; give auto or xla")
    if obstacle:
        return Choice("xla", f"not {fused}: {obstacle}")
    if platform == "cpu":
        return Choice(fused, "asked for, and interpreted on a CPU, which is slow")
    return Choice(fused, f"the fused kernel for a {device}")


def over(segments_RxT: jax.Array, kernel: Kernel, scores: Scores, windows: Sequence[int | None] = (None,)) -> Mix:
    """Attention over packed rows.

    Trace the fused kernels inside `jax.set_mesh`: each device runs them on its own rows and heads.

    Args:
      segments_RxT: int32; equal numbers see each other.
      windows: of each kind of layer, how many tokens a token attends to, itself among them; None: all before it.
    """
    if kernel == "xla":
        order_T = jnp.arange(segments_RxT.shape[1])
        mask_RxTxS = segments_RxT[:, :, None] == segments_RxT[:, None, :]
        mask_RxTxS &= (order_T[:, None] >= order_T[None, :])[None]
        return masked(mask_RxTxS, scores, windows)
    run = _splash if kernel == "splash" else _cudnn

    def within(window: int | None) -> Callable[..., jax.Array]:
        mapped = sharding.map_heads(functools.partial(run, scores=scores, window=window))
        return lambda q, k, v: mapped(q, k, v, segments_RxT)

    return _by_kind(within, windows, segments_RxT.shape[1])


def masked(mask_RxTxS: jax.Array, scores: Scores, windows: Sequence[int | None]) -> Mix:
    """Attention written out for XLA to what a causal mask shows, and of that to each kind's window."""

    def within(window: int | None) -> Callable[..., jax.Array]:
        return lambda q, k, v: attention(q, k, v, mask_RxTxS, scores, window)

    mix = _by_kind(within, windows, mask_RxTxS.shape[1])
    return lambda *qkv_and_kind: checkpoint_name(mix(*qkv_and_kind), _KEPT)


def _by_kind(
    within: Callable[[int | None], Callable[..., jax.Array]], windows: Sequence[int | None], length: int
) -> Mix:
    """`within(window)` of the layer's kind; the same for all where no window is shorter than a row."""
    shorter = [window if window and window < length else None for window in windows]
    if len(set(shorter)) == 1:
        mix = within(shorter[0])
        return lambda q, k, v, kind: mix(q, k, v)
    mixes = [within(window) for window in shorter]
    return lambda q, k, v, kind: jax.lax.switch(kind, mixes, q, k, v)


def kept(kernel: Kernel) -> Callable[..., Any]:
    """The policy of `jax.checkpoint` under which the backward pass does not run attention's forward pass again.

    For the fused kernels that is the output with the logarithm of each query's softmax denominator.
    """
    if kernel == "cudnn":  # JAX gives its results no name
        return lambda primitive, *_, **__: primitive.name == "dot_product_attention_fwd_wrapper"
    return jax.checkpoint_policies.save_only_these_names(_KEPT)


def attention(
    q_RxTxHxh: jax.Array,
    k_RxSxKxh: jax.Array,
    v_RxSxKxh: jax.Array,
    mask_RxTxS: jax.Array,
    scores: Scores,
    window: int | None = None,
) -> jax.Array:
    """Causal, [R,T,H,h]: no query sees a later key, nor one `window` before it, whatever the mask says.

    Block after block of queries, each against the keys from its first window's begin up to its end, so that of a long
    row nearly half of the products or more are never formed; the backward pass forms a block's again, so that [T,S] is
    never kept.
    """
    rows, length, heads, size = q_RxTxHxh.shape
    kv_heads = k_RxSxKxh.shape[2]
    q_RxKxGxTxh = jnp.moveaxis(q_RxTxHxh.reshape(rows, length, kv_heads, heads // kv_heads, size), 1, 3)
    k_RxKxSxh, v_RxKxSxh = jnp.moveaxis(k_RxSxKxh, 1, 2), jnp.moveaxis(v_RxSxKxh, 1, 2)
    block = max(_MIN_QUERY_BLOCK, -(-length // _MAX_QUERY_BLOCKS))
    outputs = []
    for start in range(0, length, block):
        end, first = min(start + block, length), max(0, start - window + 1) if window else 0
        seen_RxTxS = mask_RxTxS[:, start:end, first:end]
        if window:
            seen_RxTxS &= (jnp.arange(start, end)[:, None] - jnp.arange(first, end)[None, :] < window)[None]
        q, k, v = q_RxKxGxTxh[:, :, :, start:end], k_RxKxSxh[:, :, first:end], v_RxKxSxh[:, :, first:end]
        outputs.append(attend(q, k, v, seen_RxTxS, scores))
    output_RxKxGxTxh = jnp.concatenate(outputs, axis=3)
    return jnp.moveaxis(output_RxKxGxTxh, 3, 1).reshape(rows, length, heads, size)


@functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=4)
def attend(
    q_RxKxGxTxh: jax.Array, k_RxKxSxh: jax.Array, v_RxKxSxh: jax.Array, mask_RxTxS: jax.Array, scores: Scores
) -> jax.Array:
    """What each query makes of the values whose keys its mask shows it, [R,K,G,T,h]; a key serves the G heads of its
    group. Not `jax.nn.dot_product_attention`: that takes its softmax in float32 even of float64 logits.
    """
    high = jnp.promote_types(q_RxKxGxTxh.dtype, jnp.float32)
    logits_RxKxGxTxS = jnp.einsum("rkgth,rksh->rkgts", q_RxKxGxTxh, k_RxKxSxh, preferred_element_type=high)
    logits_RxKxGxTxS = soft_cap(logits_RxKxGxTxS * scores.scale, scores.cap)
    logits_RxKxGxTxS = jnp.where(mask_RxTxS[:, None, None], logits_RxKxGxTxS, jnp.finfo(high).min)
    probabilities = jax.nn.softmax(logits_RxKxGxTxS, axis=-1).astype(v_RxKxSxh.dtype)
    return jnp.einsum("rkgts,rksh->rkgth", probabilities, v_RxKxSxh)


def soft_cap(logits: jax.Array, cap: float | None) -> jax.Array:
    """cap tanh(logits / cap), which stays below the cap; the logits without one."""
    return logits if cap is None else cap * jnp.tanh(logits / cap)


def _splash(
    q_RxTxHxh: jax.Array,
    k_RxTxKxh: jax.Array,
    v_RxTxKxh: jax.Array,
    segments_RxT: jax.Array,
    *,
    scores: Scores,
    window: int | None,
) -> jax.Array:
    """JAX's splash attention for TPU. A key/value head is read for each head of its group, and never copied.

    Blocks of queries and keys have up to 512 tokens, the default of MaxText on all TPUs (its settings `sa_block_*`);
    longer rows have equal blocks, so that less than 128 tokens a block are padding. Blocks above the diagonal or before
    the window are skipped. Rows of one block have one backward kernel of 5 products instead of two of 7 together; with
    more blocks it would round each one's share of the queries' gradient to their dtype, and hold all of them.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as splash  # only where it is needed: it is large

    _, length, heads, _ = q_RxTxHxh.shape
    blocks = -(-length // _SPLASH_BLOCK)
    block = -(-length // (blocks * _LANES)) * _LANES
    names = ["block_q", "block_kv", "block_kv_compute", "block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute"]
    names += ["block_q_dq", "block_kv_dq"] if blocks > 1 else []
    square = blocks * block, blocks * block
    mask = splash.LocalMask(square, (window - 1, 0), 0) if window else splash.CausalMask(square)
    kernel = splash.make_splash_mha(
        splash.MultiHeadMask([mask] * heads),
        head_shards=1,
        q_seq_shards=1,
        block_sizes=splash.BlockSizes(**dict.fromkeys(names, block), use_fused_bwd_kernel=blocks == 1),
        residual_checkpoint_name=_KEPT,
        attn_logits_soft_cap=scores.cap,
        # Of the devices that are compiled for, which need not be those of this machine.
        interpret=jax.sharding.get_abstract_mesh().abstract_device.platform == "cpu",
    )
    q, k, v, segments = _pad(blocks * block, q_RxTxHxh * scores.scale, k_RxTxKxh, v_RxTxKxh, segments_RxT)
    q, k, v = (jnp.moveaxis(x, 1, 2) for x in (q, k, v))
    output_RxHxTxh = jax.vmap(kernel)(q, k, v, splash.SegmentIds(segments, segments))
    return jnp.moveaxis(output_RxHxTxh, 1, 2)[:, :length]


def _cudnn(
    q_RxTxHxh: jax.Array,
    k_RxTxKxh: jax.Array,
    v_RxTxKxh: jax.Array,
    segments_RxT: jax.Array,
    *,
    scores: Scores,
    window: int | None,
) -> jax.Array:
    """NVIDIA's, by its public call in JAX, which knows masks and no segments. Causal blocks are skipped; the mask adds
    -2^41 to the logits of other segments and before the window, whose probabilities then are 0 and not only small.
    """
    length = q_RxTxHxh.shape[1]
    q, k, v, segments = _pad(
        -(-length // _CUDNN_MULTIPLE) * _CUDNN_MULTIPLE, q_RxTxHxh, k_RxTxKxh, v_RxTxKxh, segments_RxT
    )
    mask_Rx1xTxS = (segments[:, :, None] == segments[:, None, :])[:, None]
    if window:
        order_T = jnp.arange(segments.shape[1])
        mask_Rx1xTxS &= (order_T[:, None] - order_T[None, :] < window)[None, None]
    output_RxTxHxh = jax.nn.dot_product_attention(
        q, k, v, mask=mask_Rx1xTxS, is_causal=True, scale=scores.scale, implementation="cudnn"
    )
    return output_RxTxHxh[:, :length]


def _pad(to: int, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Arrays [R,T,...] with `to` tokens a row: zeros behind the last, which nothing before them sees."""
    return tuple(jnp.pad(x, [(0, 0), (0, to - x.shape[1])] + [(0, 0)] * (x.ndim - 2)) for x in arrays)
