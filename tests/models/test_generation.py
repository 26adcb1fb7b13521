"""Generation against `generate` of transformers, each prompt alone there; the cache against forward passes without."""

import collections
import dataclasses
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import torch
import transformers
from flax import nnx

from alignx_jax import sharding
from alignx_jax.data import tokenizer
from alignx_jax.models import generation
from alignx_jax.models.generation import Decoding, generate
from alignx_jax.runs import loading
from tests.models import llamas

VARIANT = "llama3_rope"  # with grouped queries
PROMPTS = [llamas.random_tokens(1, n, seed=n)[0].tolist() for n in (5, 1, 30, 17, 3, 8)]
TOKENS = 12  # beyond the 32 of the original context of llama3_rope, from the longest prompt


def theirs(model, prompts, eos_ids, max_tokens=TOKENS, **options):
    """What transformers generates from each prompt alone, up to the end token."""
    results = []
    for prompt in prompts:
        tokens = torch.tensor([prompt])
        with torch.no_grad():
            (out,) = model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=max_tokens,
                eos_token_id=list(eos_ids),
                pad_token_id=0,
                do_sample=False,
                **options,
            )
        results.append(list(itertools.takewhile(lambda t: t not in eos_ids, out[len(prompt) :].tolist())))
    return results


def ours(decoder, prompts=PROMPTS, spec="1x1", **options):
    options = {"max_tokens": TOKENS, "eos_ids": [98], "rows": 4, "dtype": jnp.float32} | options
    return generate(decoder, prompts, sharding.make_mesh(spec), **options)


def on_mesh(decoder, spec):
    """The decoder in float64, so that another order of sums cannot change a token; inside `jax.enable_x64`."""
    graph, params = nnx.split(decoder)
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), nnx.to_pure_dict(params))
    return nnx.merge(graph, jax.device_put(params, sharding.parameter_shardings(params, sharding.make_mesh(spec))))


@pytest.fixture(scope="module")
def frequent(pair):
    """Tokens that this model generates: the first of one prompt, then the most frequent others."""
    results = theirs(pair(VARIANT)[0], PROMPTS, [98])
    counts = collections.Counter(t for tokens in results for t in tokens)
    return list(dict.fromkeys([results[1][0], *(t for t, _ in counts.most_common())]))


@pytest.mark.parametrize("count", [1, 3])
def test_greedy_search(pair, frequent, count):
    model, decoder = pair(VARIANT)
    expected = theirs(model, PROMPTS, frequent[:count])
    lengths = {len(tokens) for tokens in expected}
    assert {0, TOKENS} < lengths  # ended at once, never, and in between
    assert ours(decoder, eos_ids=frequent[:count]) == expected


@pytest.mark.parametrize(("beams", "penalty", "every"), [(2, 2.0, 3), (4, 1.0, 3), (3, -1.5, 5), (4, 0.0, 20)])
def test_beam_search(pair, beams, penalty, every):
    """Where many tokens end, rows are done while others go on, and more than 2 B candidates are needed."""
    model, decoder = pair(VARIANT)
    eos_ids = range(0, llamas.VOCABULARY, every)
    expected = theirs(model, PROMPTS, eos_ids, num_beams=beams, length_penalty=penalty, early_stopping=False)
    assert len({len(tokens) for tokens in expected}) > 2
    assert ours(decoder, eos_ids=eos_ids, decoding=Decoding("beam", beams, penalty)) == expected


def test_beams_within_windows(pair):
    """Layers of two kinds; the prompts and what is generated are longer than the window."""
    model, decoder = pair("gemma2")
    eos_ids = range(0, llamas.VOCABULARY, 3)
    expected = theirs(model, PROMPTS, eos_ids, num_beams=3, early_stopping=False)
    assert len({len(tokens) for tokens in expected}) > 2
    assert ours(decoder, eos_ids=eos_ids, decoding=Decoding("beam", 3)) == expected


@pytest.mark.parametrize("decoding", [Decoding(), pytest.param(Decoding("beam", 4), marks=pytest.mark.slow)])
def test_the_embedded_sample_model(decoding):
    source = loading.find("sample")
    encoder = tokenizer.load(source.huggingface)
    texts = ["The dog", "Der Lehrer hat heute Morgen", "老师", "A", "Le chat est dans"]
    prompts = [[encoder.bos_id, *ids.tolist()] for ids, _ in encoder.encode_batch(texts)]
    model = transformers.AutoModelForCausalLM.from_pretrained(source.huggingface, dtype=torch.float32)
    options = {"num_beams": 4, "early_stopping": False} if decoding.method == "beam" else {}
    expected = theirs(model, prompts, [encoder.eos_id], 24, **options)
    decoder = source.load(sharding.make_mesh("1x1"))
    found = ours(decoder, prompts, eos_ids=[encoder.eos_id], max_tokens=24, decoding=decoding)
    assert found == expected
    assert any(expected)


def test_a_single_token(pair, frequent):
    model, decoder = pair(VARIANT)
    expected = theirs(model, PROMPTS, frequent[:1], 1, num_beams=2, early_stopping=False)
    assert ours(decoder, eos_ids=frequent[:1], max_tokens=1, decoding=Decoding("beam", 2)) == expected


@pytest.mark.parametrize(("spec", "beams"), [("4x2", 1), ("2x2x2", 3)])
def test_on_a_mesh(pair, frequent, spec, beams):
    model, decoder = pair(VARIANT)
    options = {"num_beams": beams, "early_stopping": False} if beams > 1 else {}
    expected = theirs(model, PROMPTS, frequent[:2], **options)
    decoding = Decoding("beam", beams) if beams > 1 else Decoding()
    with jax.enable_x64(True):
        decoder = on_mesh(decoder, spec)
        assert ours(decoder, spec=spec, eos_ids=frequent[:2], dtype=jnp.float64, decoding=decoding) == expected


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float64, 1e-10), (jnp.bfloat16, 0.04)])
def test_logits_with_the_cache_are_those_without(pair, dtype, tolerance):
    """Two beams a row, which both follow the second one in the middle, and then change places."""
    lengths, steps, prompt = np.array([1, 9, 16]), 6, 16
    tokens = llamas.random_tokens(3, prompt)
    continued = np.random.default_rng(1).integers(0, llamas.VOCABULARY, (steps, 3, 2))
    parents = [[0, 0], [0, 1], [1, 1], [0, 1], [1, 0], [0, 1]]
    with jax.enable_x64(dtype == jnp.float64):
        decoder = on_mesh(pair(VARIANT)[1], "1x1") if dtype == jnp.float64 else pair(VARIANT)[1]

        @jax.jit
        def without(tokens, last):
            whole = llamas.whole_rows(*tokens.shape)
            logits = llamas.our_states(decoder, tokens, *whole, dtype)[1]
            return jnp.take_along_axis(logits, last[:, None, None], axis=1)[:, 0]

        prefill = jax.jit(generation.prefill, static_argnames=("slots", "dtype"))
        step = jax.jit(generation.step, static_argnames="dtype")
        logits, cache = prefill(decoder, tokens, lengths, slots=prompt + 2 * steps, dtype=dtype)
        assert cache.keys_LxRxKxSxh.dtype == dtype
        sequences = [[tokens[row, prompt - n :].tolist()] * 2 for row, n in enumerate(lengths)]
        visible = np.zeros((3, 2, prompt + 2 * steps), bool)
        visible[:, :, :prompt] = (np.arange(prompt) >= prompt - lengths[:, None])[:, None]
        for number in range(steps + 1):
            found = np.broadcast_to(np.asarray(logits, np.float64).reshape(3, -1, 128), (3, 2, 128)).reshape(6, 128)
            alone = [sequence for row in sequences for sequence in row]
            padded = np.array([s + [0] * (prompt + steps - len(s)) for s in alone], np.int32)
            expected = np.asarray(without(padded, np.array([len(s) - 1 for s in alone])), np.float64)
            assert np.abs(expected).max() > 1
            np.testing.assert_allclose(found[:, : llamas.VOCABULARY], expected, rtol=0, atol=tolerance)
            assert np.isneginf(found[:, llamas.VOCABULARY :]).all()
            if number == steps:
                break
            sequences = [
                [s[parent] + [int(continued[number, row, beam])] for beam, parent in enumerate(parents[number])]
                for row, s in enumerate(sequences)
            ]
            visible = visible[:, parents[number]]
            slot = prompt + 2 * number
            visible[:, [0, 1], [slot, slot + 1]] = True
            logits, cache = step(decoder, continued[number], lengths + number, visible, cache, slot, dtype=dtype)


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(0.7, 0, 1.0), (1.0, 5, 1.0), (1.0, 0, 0.9), (1.0, 0, 1e-6), (1.0, 0, 0.9999), (1.7, 20, 0.6), (0.5, 500, 0.3)],
)
def test_what_sampling_leaves_out(temperature, top_k, top_p):
    logits = np.random.default_rng(0).normal(0, 3, (64, 200))
    logits[:, 150:] = -np.inf  # padding of the vocabulary
    warpers = [transformers.TemperatureLogitsWarper(temperature)]
    warpers += [transformers.TopKLogitsWarper(top_k)] if top_k else []
    warpers += [transformers.TopPLogitsWarper(top_p)] if top_p < 1 else []
    expected = transformers.LogitsProcessorList(warpers)(None, torch.tensor(logits)).numpy()
    with jax.enable_x64(True):
        found = generation.truncate(jnp.asarray(logits), Decoding("sample", 4, 1.0, temperature, top_k, top_p))
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    assert np.isfinite(expected).any(axis=1).all()


def test_samples_are_as_frequent_as_the_model_says(pair):
    """All pairs of two tokens, of three each; the 0.999 quantile of chi-square is exceeded once in 1000 seeds."""
    model, decoder = pair(VARIANT)
    prompt, count, temperature = PROMPTS[0], 2000, 3.0

    def probabilities(sequence):
        logits = llamas.states(model, np.array([sequence]))[1][0, -1].astype(np.float64) / temperature
        best = np.argsort(logits)[-3:]
        weights = np.exp(logits[best] - logits[best].max())
        return dict(zip(best.tolist(), weights / weights.sum(), strict=True))

    expected = {(a, b): p * q for a, p in probabilities(prompt).items() for b, q in probabilities([*prompt, a]).items()}
    decoding = Decoding("sample", temperature=temperature, top_k=3)
    samples = ours(decoder, [prompt] * count, rows=1000, max_tokens=2, decoding=decoding, seed=1)
    found = collections.Counter(map(tuple, samples))
    assert len(expected) == 9 and min(expected.values()) > 0.01 and found.keys() <= expected.keys()
    statistic = sum((found[two] - count * p) ** 2 / (count * p) for two, p in expected.items())
    assert statistic < scipy.stats.chi2(8).ppf(0.999)


def test_a_sample_depends_on_seed_and_place_alone(pair):
    options = {"decoding": Decoding("sample", temperature=2.0, top_p=0.99), "dtype": jnp.float64}
    with jax.enable_x64(True):
        decoder = on_mesh(pair(VARIANT)[1], "1x1")
        first = ours(decoder, **options)
        others = [PROMPTS[0][:2], *PROMPTS[1:3], PROMPTS[0], PROMPTS[4] * 9, PROMPTS[5]]
        found = ours(decoder, others, **options)
        assert [found[n] for n in (1, 2, 5)] == [first[n] for n in (1, 2, 5)]
        assert not any(a == b for a, b in zip(ours(decoder, seed=1, **options), first, strict=True))
        same = ours(decoder, [PROMPTS[0]] * 4, **options)
        assert len({tuple(tokens) for tokens in same}) == 4
        assert ours(on_mesh(decoder, "4x2"), spec="4x2", rows=8, **options) == first


def test_steps_end_when_every_row_is_done(pair, frequent, monkeypatch):
    """Rows without a prompt do not hold them up."""
    calls, step = [], generation.step

    def counted(*args, **options):
        jax.debug.callback(lambda: calls.append(None))
        return step(*args, **options)

    monkeypatch.setattr(generation, "step", counted)
    model, decoder = pair(VARIANT)
    results = theirs(model, PROMPTS, frequent[:3])
    prompts = [prompt for prompt, tokens in zip(PROMPTS, results, strict=True) if len(tokens) < TOKENS]
    found = ours(decoder, prompts, rows=8, max_tokens=50, eos_ids=frequent[:3])
    jax.effects_barrier()
    assert 1 < max(map(len, found)) == len(calls) < TOKENS


def test_one_program_for_each_length_of_prompts_and_any_model(pair, frequent):
    model, decoder = pair(VARIANT)
    ours(decoder, eos_ids=[98])
    before = generation._search._cache_size()
    other = nnx.merge(*nnx.split(decoder))
    ours(other, [p[::-1] for p in PROMPTS[:3]], eos_ids=frequent[:1], seed=3)
    with jax.set_mesh(sharding.make_mesh("1x1")):
        ours(decoder)
    assert generation._search._cache_size() == before
    long = [PROMPTS[2] * 2, PROMPTS[0]]
    assert ours(decoder, long, eos_ids=frequent[:1]) == theirs(model, long, frequent[:1])
    assert generation._search._cache_size() == before + 1


def compiled(config, spec, beams, max_tokens):
    """The program of a Llama sharded over the mesh."""
    mesh = sharding.make_mesh(spec)
    graph, params = loading.abstract_decoder(config)
    shardings = sharding.parameter_shardings(params, mesh)
    params = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), params, shardings)
    with jax.set_mesh(mesh):
        arrays = (sharding.place_rows(np.zeros(s, np.int32), mesh) for s in ((8, 32), 8, 8))
        decoding, eos = Decoding("beam", beams), np.zeros(1, np.int32)
        options = {"graph": graph, "dtype": jnp.float32, "max_tokens": max_tokens, "decoding": decoding}
        return generation._search.lower(params, *arrays, jax.random.key(0), eos, **options).compile()


def test_the_cache_is_written_in_place(pair):
    """A second one, in any of the loops, would double what a token costs."""
    config = dataclasses.replace(pair(VARIANT)[1].config, num_layers=32)
    cache = 2 * 32 * 8 * 2 * (32 + 256 * 4) * 16 * 4  # keys and values, layers, rows, heads, slots, size, bytes
    assert cache <= compiled(config, "1x1", 4, 256).memory_analysis().temp_size_in_bytes < 1.2 * cache


def test_no_device_gathers_rows_or_the_embedding_table(pair):
    text = compiled(pair(VARIANT)[1].config, "4x2", 4, 16).as_text()
    gathered = set(re.findall(r"= f32\[([\d,]+)\]\S* all-gather", text))
    assert "32,24" in gathered  # the MLP's kernels, as FSDP has it
    assert "2,4,128" in gathered  # logits: of the device's own rows
    assert not gathered & {"128,32", "64,32", "8,4,128", "8,512", "8,128"}


def test_progress_and_no_prompts(pair):
    calls = []
    ours(pair(VARIANT)[1], progress=lambda *numbers: calls.append(numbers))
    assert calls == [(4, 6), (6, 6)]
    assert ours(pair(VARIANT)[1], []) == []


def test_an_empty_prompt_is_refused(pair):
    with pytest.raises(ValueError, match="a prompt is empty"):
        ours(pair(VARIANT)[1], [[1], []])
