"""Attention against dense NumPy in float64; the fused kernels interpreted, lowered, and on an accelerator, if any."""

import collections
import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax._src.cudnn import fused_attention_stablehlo as cudnn
from jax.sharding import AxisType

from alignx_jax import sharding
from alignx_jax.exits import UserError
from alignx_jax.models import attention
from alignx_jax.models.architecture import DecoderConfig
from alignx_jax.models.decoder import Decoder
from alignx_jax.models.rope import Rope

AXES = {"axis_names": ("data", "model"), "axis_types": (AxisType.Auto,) * 2}
KERNELS = {  # as they are called in lowered programs: forward, backward
    "splash": ("splash_mha_fwd_segmented_residuals", "splash_mha_dkv_segmented_no_residuals"),
    "cudnn": ("__cudnn$fmhaScaleBiasSoftmax", "__cudnn$fmhaScaleBiasSoftmaxBackward"),
}


def packed(rows, length, seed=0):
    """Segments of random length, numbered from 1; 0, padding, ends every row but the first."""
    rng = np.random.default_rng(seed)
    segments = np.zeros((rows, length), np.int32)
    for row in range(rows):
        ends = np.sort(rng.choice(np.arange(1, length), 4, replace=False))
        segments[row, : ends[-1]] = 1 + np.searchsorted(ends[:-1], np.arange(ends[-1]), side="right")
    segments[0, segments[0] == 0] = 5
    return segments


def arrays(rows, length, heads, kv_heads, size, seed=1):
    """q, k, v and the gradient by the output, float32."""
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(rows, length, n, size)).astype(np.float32) for n in (heads, kv_heads, kv_heads, heads)]


def dense(q, k, v, of_output, segments, scale=None, cap=None, window=None):
    """Output and gradients by q, k and v, from all logits, in float64."""
    scale = q.shape[3] ** -0.5 if scale is None else scale
    group = q.shape[2] // k.shape[2]
    q, of_output = (x.astype(np.float64) for x in (q, of_output))
    k, v = (np.repeat(x.astype(np.float64), group, axis=2) for x in (k, v))
    seen = (segments[:, :, None] == segments[:, None, :]) & np.tri(q.shape[1], dtype=bool)
    if window:
        seen &= ~np.tri(q.shape[1], k=-window, dtype=bool)
    logits, slope = np.einsum("rthd,rshd->rhts", q, k) * scale, 1.0
    if cap:
        logits, slope = cap * np.tanh(logits / cap), np.cosh(logits / cap) ** -2.0
    logits = np.where(seen[:, None], logits, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    of_weights = np.einsum("rthd,rshd->rhts", of_output, v)
    of_logits = weights * (of_weights - (weights * of_weights).sum(-1, keepdims=True)) * slope * scale
    of_kv = np.einsum("rhts,rthd->rshd", of_logits, q), np.einsum("rhts,rthd->rshd", weights, of_output)
    of_kv = (x.reshape(*x.shape[:2], -1, group, x.shape[3]).sum(3) for x in of_kv)
    return [np.einsum("rhts,rshd->rthd", weights, v), np.einsum("rhts,rshd->rthd", of_logits, k), *of_kv]


@functools.partial(jax.jit, static_argnames=("kernel", "scores", "windows"))
def ours(q, k, v, of_output, segments, kind, kernel, scores, windows):
    """The same of ours."""
    scores = scores or attention.Scores(q.shape[3] ** -0.5)
    mix = attention.over(segments, kernel, scores, windows)
    output, pull = jax.vjp(lambda q, k, v: mix(q, k, v, kind), q, k, v)
    return output, *pull(of_output)


def computed(kernel, *inputs, mesh, kind=None, scores=None, windows=(None,)):
    with jax.set_mesh(mesh):
        arrays = (sharding.place_rows(x, mesh) for x in inputs)
        return ours(*arrays, kind, kernel=kernel, scores=scores, windows=windows)


def error(found, expected):
    return max(
        np.linalg.norm(np.asarray(f, np.float64) - e) / np.linalg.norm(e) for f, e in zip(found, expected, strict=True)
    )


@pytest.mark.parametrize("kernel", ["xla", "splash"])
@pytest.mark.parametrize(
    ("length", "heads", "kv_heads", "size", "mesh"),
    [
        (128, 2, 2, 64, "1x1"),  # one block
        (130, 6, 2, 16, "4x2"),  # one block and padding; 3 heads a group
        (700, 4, 1, 16, "1x1"),  # two blocks and padding
        (200, 4, 2, 128, "2x2x2"),
    ],
)
def test_output_and_gradients(kernel, length, heads, kv_heads, size, mesh):
    inputs, segments = arrays(4, length, heads, kv_heads, size), packed(4, length)
    found = computed(kernel, *inputs, segments, mesh=sharding.make_mesh(mesh))
    assert error(found, dense(*inputs, segments)) < 2e-6


@pytest.mark.parametrize(
    ("kernel", "length", "window"), [("xla", 300, 40), ("splash", 130, 7), ("splash", 600, 140), ("cudnn", 130, 7)]
)
def test_scale_cap_and_window_of_the_layers_kind(monkeypatch, kernel, length, window):
    """Two kinds of layers; windows within a block and over blocks. cuDNN caps nothing, and here is JAX's form of it."""
    call = jax.nn.dot_product_attention
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda *a, implementation, **k: call(*a, **k))
    inputs, segments = arrays(2, length, 4, 2, 16), packed(2, length)
    scale, cap = 0.6, None if kernel == "cudnn" else 1.5  # the logits are about 2.4
    settings = {"scores": attention.Scores(scale, cap), "mesh": sharding.make_mesh("2x2")}
    for kind, reach in enumerate((None, window)):
        found = computed(kernel, *inputs, segments, kind=np.int32(kind), windows=(None, window), **settings)
        assert error(found, dense(*inputs, segments, scale, cap, reach)) < 2e-6


def test_a_window_as_long_as_the_row_is_none():
    """Layers of two kinds then are of one, and nothing chooses between them."""
    inputs, segments = arrays(1, 40, 2, 2, 8), packed(1, 40)

    def text(*windows):
        lowered = ours.lower(*inputs, segments, np.int32(1), kernel="xla", scores=None, windows=windows)
        return re.sub(r"loc\(.*", "", lowered.as_text())

    assert text(None, 40) == text(41, None) == text(None)
    assert "stablehlo.case" in text(None, 39)


def test_the_xla_path_in_float64():
    """300 queries are 3 blocks, the last one shorter."""
    inputs, segments = [x.astype(np.float64) for x in arrays(2, 300, 4, 2, 8)], packed(2, 300)
    with jax.enable_x64(True):
        found = computed("xla", *inputs, segments, mesh=sharding.make_mesh("1x1"))
    assert error(found, dense(*inputs, segments)) < 1e-13


def test_splash_is_as_exact_in_bfloat16_as_xla():
    inputs = [np.asarray(x, jnp.bfloat16) for x in arrays(2, 300, 4, 2, 64)]
    segments, mesh = packed(2, 300), sharding.make_mesh("2x1")
    expected = dense(*(x.astype(np.float32) for x in inputs), segments)
    splash, xla = (error(computed(kernel, *inputs, segments, mesh=mesh), expected) for kernel in ("splash", "xla"))
    assert 1e-4 < splash < 1.25 * xla


def assert_no_leak(kernel, mesh, dtype):
    """What a segment's queries, keys and values are changes no bit of another one's output or gradients."""
    inputs, segments = [np.asarray(x, dtype) for x in arrays(2, 140, 4, 2, 64)], packed(2, 140)
    others = [np.asarray(x, dtype) for x in arrays(2, 140, 4, 2, 64, seed=2)]
    for changed in (0, 2):
        here = segments == changed
        mixed = [np.where(here[:, :, None, None], new, old) for old, new in zip(inputs, others, strict=True)]
        before, after = (computed(kernel, *x, segments, mesh=mesh) for x in (inputs, mixed))
        for old, new in zip(map(np.asarray, before), map(np.asarray, after), strict=True):
            np.testing.assert_array_equal(old[~here], new[~here])
            assert (old[here] != new[here]).any(axis=-1).mean() > 0.9


@pytest.mark.parametrize("kernel", ["xla", "splash"])
def test_no_segment_reaches_another(kernel):
    assert_no_leak(kernel, sharding.make_mesh("1x1"), jnp.float32)


def test_the_call_of_cudnn_means_our_attention(monkeypatch):
    """The same call with JAX's own implementation of it."""
    call = jax.nn.dot_product_attention
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda *a, implementation, **k: call(*a, **k))
    inputs, segments = arrays(4, 130, 6, 2, 16), packed(4, 130)
    found = computed("cudnn", *inputs, segments, mesh=sharding.make_mesh("4x2"))
    assert error(found, dense(*inputs, segments)) < 2e-6


@pytest.mark.parametrize(("platform", "kernel"), [("tpu", "splash"), ("gpu", "cudnn")])
def test_on_the_accelerator(platform, kernel):
    """Forward, backward and the leak, compiled and run there."""
    try:
        device = jax.devices(platform)[0]
    except RuntimeError:
        pytest.skip(f"no {platform} here, or ALIGNX_TEST_PLATFORMS does not name it (tests/conftest.py)")
    mesh = jax.make_mesh((1, 1), devices=[device], **AXES)
    inputs = [np.asarray(x, jnp.bfloat16) for x in arrays(2, 700, 8, 2, 128)]
    segments = packed(2, 700)
    expected = dense(*(x.astype(np.float32) for x in inputs), segments)
    xla = error(computed("xla", *inputs, segments, mesh=mesh), expected)
    assert 1e-4 < error(computed(kernel, *inputs, segments, mesh=mesh), expected) < 2 * xla
    assert_no_leak(kernel, mesh, jnp.bfloat16)


def lowered(monkeypatch, kernel, remat, length=500, **changes):
    """The gradient of a Llama of two layers, lowered for 4 x 2 accelerators that are not there."""
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91300)
    monkeypatch.setattr(cudnn, "check_is_flash_attention", lambda *args, **settings: None)
    platform = {"splash": "tpu", "cudnn": "gpu"}[kernel]
    device = jax.sharding.AbstractDevice(device_kind="", num_cores=1, platform=platform)
    mesh = jax.sharding.AbstractMesh((4, 2), abstract_device=device, **AXES)
    config = DecoderConfig("llama", 128, 64, 64, 2, 4, 2, 128, 1e-5, Rope(), False, False, False, "silu", 0.02, 512)
    config = dataclasses.replace(config, **changes)
    graph, variables = nnx.split(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))

    def loss(params, row):
        decoder = nnx.merge(graph, params)
        out = decoder(row, row, row, compute_dtype=jnp.bfloat16, remat=remat, kernel=kernel)
        return jnp.sum(out.hidden_RxTxD.astype(jnp.float32))

    with jax.sharding.use_abstract_mesh(mesh):
        row = jax.ShapeDtypeStruct((8, length), jnp.int32)
        traced = jax.jit(jax.grad(loss)).trace(nnx.to_pure_dict(variables), row)
        return traced.lower(lowering_platforms=({"tpu": "tpu", "gpu": "cuda"}[platform],)).as_text()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("remat", "times"), [("none", 1), ("attention", 1), ("block", 2), ("offload", 2)])
def test_how_often_a_kernel_runs(monkeypatch, kernel, remat, times):
    """Once a layer forward and once backward, and again forward only where its output is not kept."""
    assert_calls(lowered(monkeypatch, kernel, remat), kernel, times, 1)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("remat", "times"), [("attention", 1), ("block", 2)])
def test_layers_of_two_kinds_have_a_kernel_each(monkeypatch, kernel, remat, times):
    """Of which one runs: the layer's kind chooses."""
    text = lowered(monkeypatch, kernel, remat, window=100, local_layers=(True, False))
    assert_calls(text, kernel, 2 * times, 2)
    assert "stablehlo.case" in text


def assert_calls(text, kernel, forwards, backwards):
    calls = collections.Counter(re.findall(r'kernel_name = "(\w+)"|@(__cudnn[$\w]+)', text))
    forward, backward = KERNELS[kernel]
    assert {a or b: n for (a, b), n in calls.items()} == {forward: forwards, backward: backwards}


def test_what_cudnn_is_given(monkeypatch):
    """Each device its own rows and heads, padded to 512 tokens: 2 queries' heads, 1 of keys; one mask for all heads."""
    text = lowered(monkeypatch, "cudnn", "attention")
    forward = next(line for line in text.splitlines() if "@__cudnn$fmhaScaleBiasSoftmax(" in line)
    shapes = re.findall(r"tensor<([\dx]+)xbf16>", forward.rsplit(" : ", 1)[1])
    assert shapes == ["2x512x2x128", "2x512x1x128", "2x512x1x128", "2x1x512x512", "2x2x512x128"]
    assert "\\22mask_type\\22: \\22CAUSAL\\22" in forward


def test_offloading_moves_block_inputs_to_the_host(monkeypatch):
    text = lowered(monkeypatch, "splash", "offload")
    moved = re.findall(r'annotate_device_placement\(.*"(\w+)".*tensor<([\dx]+)xbf16>', text)
    assert sorted(moved) == [("device", "8x500x64"), ("pinned_host", "8x500x64")]


@pytest.mark.parametrize(
    ("asked", "platform", "head_dim", "dtype", "kernel", "reason"),
    [
        ("auto", "tpu", 128, "bfloat16", "splash", "the fused kernel for a TPU"),
        ("auto", "tpu", 12, "float32", "splash", "the fused kernel for a TPU"),
        ("splash", "tpu", 128, "bfloat16", "splash", "the fused kernel for a TPU"),
        ("auto", "gpu", 128, "bfloat16", "cudnn", "the fused kernel for a GPU"),
        ("auto", "gpu", 128, "float32", "xla", "not cudnn: .* bfloat16, and --training.compute-dtype is float32"),
        ("auto", "gpu", 256, "bfloat16", "xla", "not cudnn: .* the model's is 256"),
        ("auto", "gpu", 12, "bfloat16", "xla", "not cudnn: .* the model's is 12"),
        ("auto", "cpu", 128, "bfloat16", "xla", "no fused kernel for a CPU"),
        ("xla", "tpu", 128, "bfloat16", "xla", "asked for"),
        ("splash", "cpu", 16, "float32", "splash", "interpreted on a CPU, which is slow"),
    ],
)
def test_the_choice_and_its_reason(asked, platform, head_dim, dtype, kernel, reason):
    choice = attention.choose(asked, platform, head_dim, jnp.dtype(dtype))
    assert choice.kernel == kernel
    assert re.search(reason, choice.reason)


def test_a_soft_cap_is_not_for_cudnn():
    choice = attention.choose("auto", "gpu", 64, jnp.dtype("bfloat16"), 50.0)
    assert (choice.kernel, choice.reason) == ("xla", "not cudnn: it does not cap logits, and the model caps them at 50")
    assert attention.choose("auto", "tpu", 64, jnp.dtype("bfloat16"), 50.0).kernel == "splash"
    with pytest.raises(UserError, match=r"^--training\.attention=cudnn: it does not cap logits"):
        attention.choose("cudnn", "gpu", 64, jnp.dtype("bfloat16"), 50.0)


@pytest.mark.parametrize(
    ("asked", "platform", "dtype"),
    [("splash", "gpu", "bfloat16"), ("cudnn", "cpu", "bfloat16"), ("cudnn", "gpu", "float32")],
)
def test_a_kernel_that_cannot_be_had_is_refused(asked, platform, dtype):
    with pytest.raises(UserError, match=f"^--training.attention={asked}: it .*; give auto or xla$"):
        attention.choose(asked, platform, 64, jnp.dtype(dtype))
