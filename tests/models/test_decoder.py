import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from transformers.models.gemma2 import modeling_gemma2

from alignx_jax import sharding
from alignx_jax.models import huggingface
from alignx_jax.models.architecture import DecoderConfig
from alignx_jax.models.decoder import Decoder
from alignx_jax.models.rope import Rope
from tests.models import llamas

REMATS = ("none", "attention", "block", "offload")
LENGTH = 48  # beyond the 32 of the original context of llama3_rope


def assert_close(found, expected, where=True, atol=1e-4):
    """Both are (states [L+1,R,T,D], logits [R,T,V]); `where` [R,T]."""
    for f, e in zip(found, expected, strict=True):
        f, e = np.asarray(f), np.asarray(e)
        assert f.shape == e.shape
        assert np.abs(e).max() > 1  # else the tolerance would say nothing
        np.testing.assert_array_less(np.abs(f - e).max(axis=-1) * where, atol)


@pytest.mark.parametrize("variant", llamas.VARIANTS)
def test_every_layers_states_and_logits_are_those_of_transformers(pair, variant):
    model, decoder = pair(variant)
    tokens = llamas.random_tokens(2, LENGTH)
    positions, segments = llamas.whole_rows(2, LENGTH)
    assert_close(llamas.our_states(decoder, tokens, positions, segments), llamas.states(model, tokens))


@pytest.mark.parametrize("variant", ["gqa", "llama3_rope", "gemma2"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(pair, variant, side):
    model, decoder = pair(variant)
    tokens = llamas.random_tokens(3, LENGTH)
    lengths = np.array([LENGTH, 41, 7])[:, None]
    order = np.arange(LENGTH)[None, :]
    mask = (order >= LENGTH - lengths if side == "left" else order < lengths).astype(np.int32)
    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0).astype(np.int32)
    expected = llamas.states(model, tokens, attention_mask=mask, position_ids=positions)
    assert_close(llamas.our_states(decoder, tokens, positions, mask), expected, where=mask)


@pytest.mark.parametrize("variant", ["gqa", "llama3_rope"])
def test_each_sequence_of_a_packed_row_is_as_alone_in_transformers(pair, variant):
    model, decoder = pair(variant)
    lengths = [[36, 5, 1, 4], [3, 45]]  # the first row ends with 2 of padding
    tokens = llamas.random_tokens(2, LENGTH)
    positions, segments = np.zeros_like(tokens), np.zeros_like(tokens)
    places = []
    for row, own in enumerate(lengths):
        ends = np.cumsum(own)
        for slot, (length, end) in enumerate(zip(own, ends, strict=True), start=1):
            positions[row, end - length : end], segments[row, end - length : end] = np.arange(length), slot
            places.append((row, end - length, end))
    states, logits = map(np.asarray, llamas.our_states(decoder, tokens, positions, segments))
    for row, start, end in places:
        found = states[:, row : row + 1, start:end], logits[row : row + 1, start:end]
        assert_close(found, llamas.states(model, tokens[row : row + 1, start:end]))


@pytest.mark.parametrize(("changed", "kept"), [(1, 2), (2, 1), (0, 1), (0, 2)])
def test_no_token_sees_another_segment(pair, changed, kept):
    _, decoder = pair("gqa")
    segments = np.array([[0, 1, 1, 1, 1, 2, 2, 2, 2, 2, 0, 0]], np.int32)
    positions = np.array([[0, 0, 1, 2, 3, 0, 1, 2, 3, 4, 0, 0]], np.int32)
    tokens = llamas.random_tokens(1, 12)
    others = np.where(segments == changed, (tokens + 1) % llamas.VOCABULARY, tokens)
    before, after = (np.asarray(llamas.our_states(decoder, t, positions, segments)[0]) for t in (tokens, others))
    np.testing.assert_array_equal(before[:, segments == kept], after[:, segments == kept])
    assert (before[-1, segments == changed] != after[-1, segments == changed]).any(axis=-1).all()


def test_no_token_sees_a_later_one(pair):
    _, decoder = pair("gqa")
    tokens = llamas.random_tokens(1, 12)
    later = tokens.copy()
    later[:, 7:] = (later[:, 7:] + 1) % llamas.VOCABULARY
    before, after = (np.asarray(llamas.our_states(decoder, t, *llamas.whole_rows(1, 12))[0]) for t in (tokens, later))
    np.testing.assert_array_equal(before[:, :, :7], after[:, :, :7])
    assert (before[-1, :, 7:] != after[-1, :, 7:]).any(axis=-1).all()


@pytest.mark.parametrize("case", ["gqa_three_languages", "tied_llama3_rope"])
def test_float64_reference(shared, case):
    inputs = np.load(shared / "reference" / case / "inputs.npz")
    expected = np.load(shared / "reference" / case / "forward_f64.npz")
    mask = inputs["attention_mask"]
    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0).astype(np.int32)
    with jax.enable_x64(True):
        decoder = huggingface.load(shared / "reference" / case / "model", sharding.make_mesh("1x1"), jnp.float64)
        found = llamas.our_states(decoder, inputs["input_ids"], positions, mask, jnp.float64)
        assert all(x.dtype == jnp.float64 for x in found)
        assert_close(found, (expected["hidden_states"], expected["logits"]), where=mask, atol=1e-10)


def loss(params, graph, tokens, pool, remat="none", dtype=jnp.float32, layers=(1, 3)):
    """Depends on the final states and on the taps."""
    out = nnx.merge(graph, params)(
        tokens,
        *llamas.whole_rows(*tokens.shape),
        compute_dtype=dtype,
        remat=remat,
        pool_RxKxT=pool,
        pooled_layers=layers,
    )
    pooled = 0.0 if out.pooled_PxRxKxD is None else jnp.sum(jnp.sin(out.pooled_PxRxKxD))
    return jnp.mean(jnp.square(out.hidden_RxTxD)) + pooled


def problem_of(decoder):
    graph, variables = nnx.split(decoder)
    tokens = llamas.random_tokens(8, LENGTH)
    pool = np.random.default_rng(1).random((8, 5, LENGTH), np.float32) / LENGTH
    return nnx.to_pure_dict(variables), graph, tokens, pool


@pytest.fixture
def problem(pair):
    return problem_of(pair("gqa")[1])


@pytest.mark.parametrize("variant", ["gqa", pytest.param("gemma2", marks=pytest.mark.slow)])
def test_remat_does_not_change_gradients(pair, variant):
    params, graph, tokens, pool = problem_of(pair(variant)[1])
    gradient = jax.jit(jax.grad(loss), static_argnames=("graph", "remat"))
    expected, *others = (gradient(params, graph, tokens, pool, remat=remat) for remat in REMATS)
    for found in others:
        jax.tree.map(lambda f, e: np.testing.assert_allclose(f, e, rtol=1e-5, atol=1e-6), found, expected)


@pytest.mark.parametrize(("remat", "numbers"), [("attention", 2 * 32), ("block", 32)])
def test_what_remat_keeps_of_a_layer_and_token(pair, remat, numbers):
    assert temporaries(pair, 24, remat) - temporaries(pair, 8, remat) == 16 * 8 * LENGTH * numbers * 4


def temporaries(pair, depth, remat, pools=1, layers=()):
    """Bytes that the gradient of `loss` needs besides its arguments and results, with a Llama of `depth` layers."""
    config = dataclasses.replace(pair("gqa")[1].config, num_layers=depth)
    graph, variables = nnx.split(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))
    tokens = jax.ShapeDtypeStruct((8, LENGTH), jnp.int32)
    pool = jax.ShapeDtypeStruct((8, pools, LENGTH), jnp.float32)
    gradient = jax.jit(lambda p, t, pool: jax.grad(loss)(p, graph, t, pool, remat=remat, layers=layers))
    compiled = gradient.lower(nnx.to_pure_dict(variables), tokens, pool).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_the_memory_of_a_tap_does_not_grow_with_the_depth(pair):
    with_taps, without = (temporaries(pair, 16, "block", 4 * LENGTH, layers) for layers in ((3, 9), ()))
    pooled_bytes = 8 * 4 * LENGTH * 32 * 4
    assert with_taps - without < 2 * 2 * pooled_bytes


def test_a_tap_reaches_the_layers_below_it_and_no_others(problem):
    params, graph, tokens, pool = problem

    def tap(params):
        out = nnx.merge(graph, params)(
            tokens,
            *llamas.whole_rows(*tokens.shape),
            compute_dtype=jnp.float32,
            remat="block",
            pool_RxKxT=pool,
            pooled_layers=(2,),
        )
        return jnp.sum(jnp.square(out.pooled_PxRxKxD))

    gradient = jax.jit(jax.grad(tap))(params)
    for layer_by_layer in jax.tree.leaves(gradient["layers"]):
        reached = [bool(jnp.any(g != 0)) for g in layer_by_layer]
        assert reached == [True, True, False]
    assert jnp.any(gradient["embedding"] != 0)
    assert not jnp.any(gradient["norm"] != 0)
    assert not jnp.any(gradient["output"] != 0)


def test_some_layers_pooled_in_any_order_are_those_of_all(pair):
    _, decoder = pair("gqa")
    tokens = llamas.random_tokens(2, 9)
    every, _ = llamas.our_states(decoder, tokens, *llamas.whole_rows(2, 9))
    pool = np.random.default_rng(1).random((2, 4, 9), np.float32)
    some = decoder(
        tokens,
        *llamas.whole_rows(2, 9),
        compute_dtype=jnp.float32,
        remat="none",
        pool_RxKxT=pool,
        pooled_layers=(3, 0, 2),
    )
    expected = np.einsum("rkt,prtd->prkd", pool.astype(np.float64), np.asarray(every, np.float64)[[3, 0, 2]])
    np.testing.assert_allclose(some.pooled_PxRxKxD, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layers", [(4,), (-1,), (1, 1)])
def test_impossible_taps_are_refused(pair, layers):
    with pytest.raises(ValueError, match="distinct and between 0 and 3"):
        pair("gqa")[1](
            llamas.random_tokens(1, 4),
            *llamas.whole_rows(1, 4),
            compute_dtype=jnp.float32,
            remat="none",
            pool_RxKxT=np.ones((1, 1, 4), np.float32),
            pooled_layers=layers,
        )


def test_bfloat16_compute(pair):
    model, decoder = pair("gqa")
    tokens = llamas.random_tokens(2, LENGTH)
    states, logits = llamas.our_states(decoder, tokens, *llamas.whole_rows(2, LENGTH), jnp.bfloat16)
    assert (states.dtype, logits.dtype) == (jnp.float32, jnp.bfloat16)
    expected, _ = llamas.states(model, tokens)
    error = np.linalg.norm(states - expected, axis=-1) / np.linalg.norm(expected, axis=-1)
    assert 1e-4 < error[1:].max() < 0.1  # about 2^-8 a product; and not float32 by mistake
    assert error[1:].mean() < 0.02


@pytest.mark.parametrize(("variant", "spec"), [("gqa", "8x1"), ("gqa", "4x2"), ("gqa", "2x2x2"), ("gemma3", "4x2")])
def test_meshes_agree_with_one_device(pair, variant, spec):
    config, (params, graph, tokens, pool) = pair(variant)[1].config, problem_of(pair(variant)[1])

    def gradient(params, tokens, pool):
        value, grads = jax.value_and_grad(loss)(params, graph, tokens, pool, remat="block", dtype=jnp.float64)
        return value, sharding.constrain_parameters(grads)

    with jax.enable_x64(True):  # so that an error in a sharding cannot pass for rounding
        params, tokens, pool = jax.tree.map(
            lambda x: np.asarray(x, np.float64) if x.dtype == jnp.float32 else x, (params, tokens, pool)
        )
        expected = jax.jit(gradient)(params, tokens, pool)
        mesh = sharding.make_mesh(spec)
        with jax.set_mesh(mesh):
            placed = jax.device_put(params, sharding.parameter_shardings(params, mesh))
            inputs = placed, sharding.place_rows(tokens, mesh), sharding.place_rows(pool, mesh)
            compiled = jax.jit(gradient).lower(*inputs).compile()
            found = compiled(*inputs)
    jax.tree.map(lambda f, e: np.testing.assert_allclose(f, e, rtol=1e-10, atol=1e-12), found, expected)
    for grad, param in zip(jax.tree.leaves(found[1]), jax.tree.leaves(placed), strict=True):
        assert grad.sharding.is_equivalent_to(param.sharding, grad.ndim)
    gathered = set(re.findall(r"= f64\[([\d,]+)\]\S* all-gather", compiled.as_text()))
    d = config.hidden_size
    assert f"{d},48" in gathered or f"{d},24" in gathered  # the MLP's kernels, as FSDP has it
    assert not gathered & {f"128,{d}", f"8,48,{d}"}  # nor the embedding table nor the activations of all rows


def test_the_scale_of_embeddings_is_rounded_as_they_are():
    """sqrt(24) is not a bfloat16."""
    config = DecoderConfig("gemma2", 99, 24, 8, 1, 1, 1, 4, 1e-6, Rope(), True, False, False, "silu", 1.0, 9)
    decoder = Decoder(dataclasses.replace(config, scale_embeddings=True), rngs=nnx.Rngs(0))
    theirs = modeling_gemma2.Gemma2TextScaledWordEmbedding(99, 24, 0, 24**0.5)
    theirs.weight.data = torch.from_numpy(np.array(decoder.embedding[:99]))
    tokens = llamas.random_tokens(2, 9)
    for dtype in ("float32", "bfloat16"):
        expected = theirs.to(getattr(torch, dtype))(torch.from_numpy(tokens)).detach().float().numpy()
        np.testing.assert_array_equal(decoder.embed(tokens, jnp.dtype(dtype)).astype(jnp.float32), expected)


def test_initial_weights(pair):
    config = pair("biases")[1].config
    decoder = Decoder(config, rngs=nnx.Rngs(0))
    for table in (decoder.embedding[...], decoder.output[...]):
        assert not table[config.vocab_size :].any()
        np.testing.assert_allclose(table[: config.vocab_size].std(), config.initializer_range, rtol=0.1)
    np.testing.assert_array_equal(decoder.layers.mlp_norm[...], 1)
    np.testing.assert_array_equal(decoder.layers.gate_bias[...], 0)
    per_layer = decoder.layers.query[...].reshape(config.num_layers, -1)
    assert len(np.unique(np.asarray(per_layer[:, 0]))) == config.num_layers
