"""The three losses against the published arrays (float64) and against dense NumPy versions of the formulas."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from alignx_jax import sharding
from alignx_jax.objectives import next_token as next_token_objective
from alignx_jax.objectives import pooling
from alignx_jax.objectives.contrastive import contrastive
from alignx_jax.objectives.language_matching import Classifier, language_matching
from alignx_jax.objectives.language_matching import weight as matching_weight
from alignx_jax.objectives.next_token import next_token
from alignx_jax.planning import hlo, hlo_cost

CASES = {"gqa_three_languages": 2, "tied_llama3_rope": 3}


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def published(shared, case):
    """The published forward pass of one case: inputs, states, losses and the classifier's weights."""
    from safetensors.numpy import load_file

    folder = shared / "reference" / case
    weights = load_file(folder / "model" / "model.safetensors")
    classifier = Classifier(
        *(weights[f"language_matching_classifier.{k}_proj.weight"].T.astype(np.float64) for k in ("gate", "up", "down"))
    )
    return np.load(folder / "inputs.npz"), np.load(folder / "forward_f64.npz"), classifier


def spans(index_BxT):
    """One example a row: slot 1 where the published index is 1 (source) or 2 (target)."""
    return jnp.asarray(index_BxT == 1, jnp.int32), jnp.asarray(index_BxT == 2, jnp.int32)


def pool(span_BxT, hidden_BxTxD):
    return jnp.einsum("bst,btd->bsd", pooling.span_means(span_BxT, 1, jnp.float64), hidden_BxTxD)[:, 0]


@pytest.mark.parametrize("case", CASES)
def test_published_losses_in_float64(shared, x64, case):
    inputs, expected, classifier = published(shared, case)
    n = len(inputs["input_ids"])
    source, target = spans(inputs["src_tgt_index"])
    aligned, last = (jnp.asarray(expected["hidden_states"][layer]) for layer in (CASES[case], -1))
    everyone = jnp.ones((1, n), bool)

    a, c = pool(source, aligned), pool(target, aligned)
    np.testing.assert_allclose(a, expected["anchor"], rtol=1e-12)
    np.testing.assert_allclose(c, expected["contrast"], rtol=1e-12)
    ids = jnp.arange(2 * n).reshape(2, 1, n)
    ctr = contrastive(
        a[None], c[None], everyone, ids[0], ids[1], temperature=0.1, form="published", scope="global", duplicates="keep"
    )
    np.testing.assert_allclose(ctr / n, expected["contrastive_loss"], rtol=1e-10)

    e = jnp.concatenate([pool(pooling.predicting(s, jnp.ones_like(s)), last) for s in (source, target)])
    np.testing.assert_allclose(e, expected["lam_embeddings"], rtol=1e-12)
    languages = jnp.concatenate([inputs["src_lang"], inputs["tgt_lang"]])[None]
    lam = language_matching(
        e[None], languages, jnp.ones((1, 2 * n), bool), classifier, activation=jax.nn.silu, scope="global"
    )
    np.testing.assert_allclose(lam / (2 * n) ** 2, expected["language_matching_loss"], rtol=1e-10)

    labels = inputs["labels"]  # left padding: the label mask alone says what counts
    weights = jnp.asarray(labels != -100, jnp.float64)
    kernel = np.linalg.lstsq(expected["hidden_states"][-1].reshape(-1, 64), expected["logits"].reshape(-1, 320))[0]
    for chunk in (7, 32):
        lm = next_token(
            last, jnp.asarray(kernel.T), jnp.asarray(inputs["input_ids"]), weights, vocab_size=320, chunk=chunk
        )
        np.testing.assert_allclose(lm / weights[:, 1:].sum(), expected["lm_loss"], rtol=1e-10)


def dense_contrastive(a, c, temperature, negative):
    """The formula of SEMANTICS, pair by pair; `negative[j, i]`: may target i act as a negative of source j?"""
    losses = []
    for j in range(len(a)):
        s = np.array([c[i] @ a[j] / np.linalg.norm(c[i]) / np.linalg.norm(a[j]) / temperature for i in range(len(c))])
        keep = negative[j] | (np.arange(len(c)) == j)
        losses.append(-np.log(np.exp(s[j]) / np.exp(s[keep]).sum()) / 2)
    return sum(losses)


def dense_matching(e, languages, classifier):
    gate, up, down = (np.asarray(w) for w in classifier)
    total = 0.0
    for i in range(len(e)):
        for j in range(len(e)):
            pair = np.concatenate([e[i], e[j]])
            g = pair @ gate
            z = (g / (1 + np.exp(-g)) * (pair @ up)) @ down
            total += np.log(np.exp(z).sum()) - z[int(languages[i] == languages[j])]
    return total


def central_difference(function, arrays, which, entry, step=1e-5):
    """The slope of `function` of all arrays by one entry of one."""
    values = []
    for sign in (1, -1):
        moved = [np.array(x) for x in arrays]
        moved[which][entry] += sign * step
        values.append(function(moved))
    return (values[0] - values[1]) / (2 * step)


@pytest.fixture
def groups():
    """3 groups of 4 slots of which 9 hold pairs; repeated sentences on both sides."""
    rng = np.random.default_rng(0)
    valid = np.array([[1, 1, 0, 1], [1, 1, 1, 1], [0, 1, 1, 0]], bool)
    source = np.array([[1, 2, 9, 3], [4, 2, 5, 6], [9, 7, 8, 9]])
    target = np.array([[11, 12, 9, 13], [14, 15, 11, 1], [9, 17, 18, 9]])
    vectors = np.where(valid[None, :, :, None], rng.normal(size=(2, 3, 4, 5)), 0.0)
    return vectors, valid, source, target


@pytest.mark.parametrize("scope", ["global", "micro-batch"])
@pytest.mark.parametrize("duplicates", ["mask", "keep"])
@pytest.mark.parametrize("form", ["published", "symmetric"])
@pytest.mark.parametrize("block", [256, 3])
@pytest.mark.parametrize("line", [None, [[20, 21, 9, 20], [22, 17, 24, 20], [9, 26, 22, 9]]])
def test_contrastive_is_the_dense_formula(x64, groups, monkeypatch, scope, duplicates, form, block, line):
    monkeypatch.setattr("alignx_jax.objectives.contrastive.BLOCK", block)
    (a, c), valid, source, target = groups
    ids = [source, target] + ([] if line is None else [np.array(line)])
    sentences = [set(of_pair) for of_pair in zip(*(x[valid].tolist() for x in ids), strict=True)]
    disjoint = np.array([[not (x & y) for y in sentences] for x in sentences])
    assert (~disjoint).sum() > 9, "the fixture holds repeated sentences"
    group = np.nonzero(valid)[0]
    negative = np.ones_like(disjoint) if duplicates == "keep" else disjoint
    if scope == "micro-batch":
        negative = negative & (group[:, None] == group[None, :])
    keep = dict(temperature=0.3, form=form, scope=scope, duplicates=duplicates)

    def loss(a, c):
        return contrastive(a, c, *map(jnp.asarray, (valid, *ids)), **keep)

    def dense(a, c):
        total = dense_contrastive(a, c, 0.3, negative)
        return total + dense_contrastive(c, a, 0.3, negative) if form == "symmetric" else total

    np.testing.assert_allclose(loss(*map(jnp.asarray, (a, c))), dense(a[valid], c[valid]), rtol=1e-12)
    gradients = jax.grad(loss, argnums=(0, 1))(*map(jnp.asarray, (a, c)))
    for side, gradient in enumerate(gradients):
        assert np.isfinite(gradient).all() and (gradient[~valid] == 0).all()
        for entry in ((1, 2, 3), (0, 3, 1), (2, 1, 0)):
            slope = central_difference(lambda x: dense(*(y[valid] for y in x)), [a, c], side, entry)
            np.testing.assert_allclose(gradient[entry], slope, rtol=1e-6, atol=1e-9)


def test_one_pair_alone_costs_nothing(x64, groups):
    (a, c), _, source, target = groups
    one = np.zeros((3, 4), bool)
    one[1, 2] = True
    total = contrastive(
        *map(jnp.asarray, (a, c, one, source, target)),
        temperature=0.1,
        form="published",
        scope="global",
        duplicates="keep",
    )
    assert total == 0


@pytest.mark.parametrize("scope", ["global", "micro-batch"])
@pytest.mark.parametrize("block", [64, 3, 1])
def test_language_matching_is_the_dense_formula(x64, groups, monkeypatch, scope, block):
    monkeypatch.setattr("alignx_jax.objectives.language_matching.BLOCK", block)
    (e, _), valid, languages, _ = groups
    languages = languages % 3
    rng = np.random.default_rng(1)
    classifier = Classifier(*(jnp.asarray(rng.normal(size=s)) for s in ((10, 6), (10, 6), (6, 2))))
    parts = [valid] if scope == "global" else [valid & (np.arange(3)[:, None] == g) for g in range(3)]
    expected = sum(dense_matching(e[part], languages[part], classifier) for part in parts)

    def loss(e, *classifier):
        classifier = Classifier(*classifier)
        return language_matching(
            e, *map(jnp.asarray, (languages, valid)), classifier, activation=jax.nn.silu, scope=scope
        )

    def dense(x):
        return sum(dense_matching(x[0][part], languages[part], x[1:]) for part in parts)

    arrays = [e, *classifier]
    np.testing.assert_allclose(loss(*map(jnp.asarray, arrays)), expected, rtol=1e-12)
    gradients = jax.grad(lambda *x: 3 * loss(*x), argnums=(0, 1, 2, 3))(*map(jnp.asarray, arrays))
    assert (gradients[0][~valid] == 0).all()
    for which, entries in enumerate([((1, 2, 3), (0, 3, 1)), ((1, 2), (8, 5)), ((0, 0), (9, 3)), ((4, 0), (4, 1))]):
        for entry in entries:
            slope = 3 * central_difference(dense, arrays, which, entry)
            np.testing.assert_allclose(gradients[which][entry], slope, rtol=1e-6, atol=1e-9)
    assert matching_weight(jnp.asarray(valid), scope) == sum(part.sum() ** 2 for part in parts)


def largest_array(compiled) -> int:
    """Elements of the largest array in a compiled program, on one device."""
    shapes = re.findall(r"\w\[([\d,]+)\]", compiled.as_text())
    return max(int(np.prod([int(n) for n in shape.split(",")])) for shape in shapes)


def compiled_pair_losses(spec: str, pairs: int, d: int, width: int) -> dict:
    """Both losses over all pairs, with their gradients, compiled for a mesh; nothing is run."""
    mesh = sharding.make_mesh(spec)
    groups = sharding.data_shards(mesh)
    rows, everywhere = NamedSharding(mesh, sharding.batch_spec(mesh)), NamedSharding(mesh, P())

    def array(*shape, dtype=jnp.float32, where=rows):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

    def facts(n):
        return array(groups, n, dtype=jnp.bool_), array(groups, n, dtype=jnp.int32)

    n, found = pairs // groups, {}
    with jax.set_mesh(mesh):
        valid, ids = facts(n)
        loss = functools.partial(contrastive, temperature=0.1, form="symmetric", scope="global", duplicates="mask")
        of_pooled = array(groups, n, d), array(groups, n, d)
        found["contrastive"] = (
            jax.jit(jax.value_and_grad(loss, (0, 1)), out_shardings=(None, (rows, rows)))
            .lower(*of_pooled, valid, ids, ids)
            .compile()
        )
        valid, ids = facts(2 * n)
        classifier = Classifier(*(array(*s, where=everywhere) for s in ((2 * d, width), (2 * d, width), (width, 2))))
        loss = functools.partial(language_matching, activation=jax.nn.silu, scope="global")
        found["language_matching"] = (
            jax.jit(jax.value_and_grad(loss, (0, 3)), out_shardings=(None, (rows, everywhere)))
            .lower(array(groups, 2 * n, d), ids, valid, classifier)
            .compile()
        )
    return found


@pytest.mark.parametrize("spec", ["1x1", "8x1"])
def test_4096_pairs_of_hidden_size_4096_take_less_than_a_gibibyte(spec):
    for name, compiled in compiled_pair_losses(spec, 4096, 4096, 128).items():
        assert compiled.memory_analysis().temp_size_in_bytes < 2**30, name


@pytest.mark.parametrize("spec", ["1x1", "2x1"])
def test_nothing_of_the_size_of_all_pairs_exists(spec):
    pairs, d, width = 600, 5, 7
    for name, compiled in compiled_pair_losses(spec, pairs, d, width).items():
        vectors, devices = pairs if name == "contrastive" else 2 * pairs, int(spec[0])
        largest = largest_array(compiled)
        assert vectors * d // devices <= largest < vectors * vectors // devices, name


@pytest.mark.parametrize("spec", ["8x1", "2x4x1"])
def test_nothing_travels_in_the_loops_over_blocks(spec):
    for name, compiled in compiled_pair_losses(spec, 512, 64, 16).items():
        collectives = hlo_cost.cost(hlo.Module(compiled.as_text())).collectives
        assert collectives and {one.times for one in collectives} == {1}, name


def test_next_token_weights_decide_and_padding_of_the_vocabulary_gets_nothing(x64):
    rng = np.random.default_rng(2)
    hidden, embedding = rng.normal(size=(2, 11, 6)), rng.normal(size=(16, 6))
    tokens, weights = rng.integers(0, 13, (2, 11)), rng.uniform(size=(2, 11))
    embedding[13:] = 50.0
    logits = hidden[:, :-1] @ embedding[:13].T
    picked = np.take_along_axis(logits, tokens[:, 1:, None], axis=2)[..., 0]
    expected = ((np.log(np.exp(logits).sum(axis=2)) - picked) * weights[:, 1:]).sum()

    def loss(embedding, chunk):
        return next_token(*map(jnp.asarray, (hidden, embedding, tokens, weights)), vocab_size=13, chunk=chunk)

    for chunk in (1, 4, 11, 100):
        np.testing.assert_allclose(loss(embedding, chunk), expected, rtol=1e-12)
        gradient = jax.grad(loss)(jnp.asarray(embedding), chunk)
        assert (gradient[13:] == 0).all() and np.isfinite(gradient).all()


def test_positions_that_do_not_count_have_no_logits(monkeypatch):
    """3 positions of one row and 5 of the other count: of four chunks of 4, two are passed over."""
    rng, formed = np.random.default_rng(3), []
    whole = next_token_objective._of_chunk

    def counting(states_NxD, *rest):
        jax.debug.callback(lambda: formed.append(1))
        return whole(states_NxD, *rest)

    monkeypatch.setattr(next_token_objective, "_of_chunk", counting)
    hidden, embedding = jnp.asarray(rng.normal(size=(2, 13, 6))), jnp.asarray(rng.normal(size=(16, 6)))
    weights = np.zeros((2, 13))
    weights[0, [2, 5, 12]] = weights[1, [1, 4, 8, 9, 11]] = 1

    def loss(hidden, embedding):
        return next_token(hidden, embedding, jnp.ones((2, 13), int), jnp.asarray(weights), vocab_size=13, chunk=4)

    for function in (loss, jax.grad(loss)):
        jax.block_until_ready(jax.jit(function)(hidden, embedding))
        jax.effects_barrier()
        assert len(formed) == 2
        formed.clear()


@pytest.mark.parametrize("counted", [11, 3])
def test_capped_logits(x64, counted):
    """Value and both gradients by NumPy, far enough beyond the cap that it bends them; where a few positions count,
    at places of their own in each row, too."""
    rng, cap = np.random.default_rng(2), 2.0
    hidden, embedding = rng.normal(size=(2, 11, 6)), rng.normal(size=(16, 6))
    tokens, weights = rng.integers(0, 13, (2, 11)), rng.uniform(size=(2, 11))
    weights *= rng.permuted(np.tile(np.arange(11) < counted, (2, 1)), axis=1)
    products = hidden[:, :-1] @ embedding[:13].T
    logits = cap * np.tanh(products / cap)
    p = np.exp(logits) / np.exp(logits).sum(axis=2, keepdims=True)
    label = np.eye(13)[tokens[:, 1:]]
    expected = -(np.log((p * label).sum(axis=2)) * weights[:, 1:]).sum()
    of_products = (p - label) * weights[:, 1:, None] * np.cosh(products / cap) ** -2

    def loss(hidden, embedding):
        rest = jnp.asarray(tokens), jnp.asarray(weights)
        return next_token(hidden, embedding, *rest, vocab_size=13, chunk=4, cap=cap)

    inputs = jnp.asarray(hidden), jnp.asarray(embedding)
    np.testing.assert_allclose(loss(*inputs), expected, rtol=1e-12)
    of_hidden, of_embedding = jax.grad(loss, argnums=(0, 1))(*inputs)
    np.testing.assert_allclose(of_hidden[:, :-1], of_products @ embedding[:13], rtol=1e-10, atol=1e-14)
    np.testing.assert_allclose(of_embedding[:13], np.einsum("rtv,rtd->vd", of_products, hidden[:, :-1]), rtol=1e-10)
    assert (of_hidden[:, -1] == 0).all() and (of_embedding[13:] == 0).all()


def test_no_array_of_all_logits_exists():
    hidden, embedding = jnp.ones((4, 64, 8), jnp.bfloat16), jnp.ones((512, 8))
    tokens, weights = jnp.ones((4, 64), jnp.int32), jnp.ones((4, 64))

    def loss(hidden, embedding):
        return next_token(hidden, embedding, tokens, weights, vocab_size=512, chunk=8)

    text = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(hidden, embedding).as_text()
    assert "tensor<512x32xf32>" in text, "one chunk of logits, in float32"
    assert "512x256x" not in text and "512x4x64x" not in text and "8x512x32x" not in text, (
        "all logits, also as a stack of chunks"
    )


@pytest.mark.parametrize("spec", ["8x1", "4x2", "2x2x2", "6x1"])
def test_no_device_holds_the_whole_table_or_its_gradient(x64, spec):
    """And every mesh computes the same; one whose devices do not divide the vocabulary gathers the table."""
    rng, mesh = np.random.default_rng(5), sharding.make_mesh(spec)
    hidden, embedding = rng.normal(size=(24, 16, 48)), rng.normal(size=(512, 48))
    tokens, weights = rng.integers(0, 500, (24, 16)), rng.uniform(size=(24, 16))
    loss = jax.value_and_grad(functools.partial(next_token, vocab_size=500, chunk=2), argnums=(0, 1))
    expected = loss(*map(jnp.asarray, (hidden, embedding, tokens, weights)))
    rows = NamedSharding(mesh, sharding.batch_spec(mesh))
    table = NamedSharding(mesh, sharding.parameter_spec(("embedding",)))
    placed = [jax.device_put(x, rows) for x in (hidden, tokens, weights)]
    placed.insert(1, jax.device_put(embedding, table))
    with jax.set_mesh(mesh):
        compiled = jax.jit(loss, out_shardings=(None, (rows, table))).lower(*placed).compile()
    chex.assert_trees_all_close(compiled(*placed), expected, rtol=1e-12, atol=1e-12)
    assert spec == "6x1" or largest_array(compiled) < embedding.size


def test_compaction_keeps_every_valid_slot_and_its_group():
    valid = jnp.asarray(np.random.default_rng(3).uniform(size=(4, 20)) < 0.3)
    fullest = int(valid.sum(axis=1).max())
    index = pooling.compact(valid, fullest)
    for g in range(4):
        kept = [int(i) for i in index[g] if valid[g, i]]
        assert kept == [int(i) for i in np.nonzero(valid[g])[0]]


def test_a_span_at_the_start_of_its_segment_takes_nothing_from_the_segment_before():
    span, segments = jnp.asarray([[0, 1, 1, 2, 2, 0]]), jnp.asarray([[1, 1, 1, 2, 2, 0]])
    assert pooling.predicting(span, segments).tolist() == [[1, 1, 0, 2, 0, 0]]
    apart = jnp.asarray([[1, 4, 4, 7, 7, 0]])  # slot 1's prompt, source and target, encoded one by one
    assert pooling.predicting(jnp.asarray([[0, 1, 1, 1, 1, 0]]), apart).tolist() == [[0, 1, 0, 1, 0, 0]]
