"""Retrieval against a dense loop; sentence vectors against transformers' hidden states."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignx_jax import sharding
from alignx_jax.config import UserError
from alignx_jax.data import tokenizer
from alignx_jax.evaluation import alignment
from alignx_jax.training import runs


def test_accuracy_at_1_is_the_dense_loop():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 40, 6))
    y = y[:, :1] * 0.5 + y + x  # neighbours are not mutual

    def hits(a, b):
        cos = [[u @ v / np.linalg.norm(u) / np.linalg.norm(v) for v in b] for u in a]
        return np.mean([all(row[i] > row[j] for j in range(len(b)) if j != i) for i, row in enumerate(cos)])

    expected = hits(x, y), hits(y, x)
    assert 0.2 < expected[0] < 1 and expected[0] != expected[1]
    np.testing.assert_allclose(alignment.accuracy_at_1(x, y), expected)


def test_equal_vectors_are_no_retrieval():
    assert alignment.accuracy_at_1(np.ones((5, 3)), np.ones((5, 3))) == (0.0, 0.0)


def test_retrieval_compares_with_the_pivot_layer_by_layer():
    rng = np.random.default_rng(1)
    english = rng.normal(size=(2, 30, 8))
    vectors = {"en": english, "de": english.copy()}
    vectors["de"][0] = rng.permutation(vectors["de"][0])
    (found,) = alignment.retrieval(vectors, "en")
    assert found.language == "de" and found.mean[0] < 0.2 and found.mean[1] == 1


@pytest.fixture(scope="module")
def sample():
    source = runs.find("sample")
    return source, tokenizer.load(source.huggingface)


@pytest.mark.parametrize("spec", ["1x1", "4x2"])
def test_sentence_vectors_are_the_means_of_each_sentence_alone(sample, spec):
    import torch
    import transformers

    source, encoder = sample
    sentences = ["The dog sleeps.", "Der Lehrer hat heute Morgen ein rotes Buch gekauft.", "老师在学校。", "نعم"]
    mesh = sharding.make_mesh(spec)
    with jax.set_mesh(mesh):
        decoder = source.load(mesh)
        got = alignment.all_vectors(
            decoder, encoder, {"x": sentences[:1], "y": sentences[1:]}, mesh, rows=4, row_length=48, dtype=jnp.float32
        )
    got = np.concatenate([got["x"], got["y"]], axis=1)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(source.huggingface, dtype=torch.float32)
    for n, (ids, _) in enumerate(encoder.encode_batch(sentences)):
        with torch.no_grad():
            states = theirs(torch.tensor([[encoder.bos_id, *ids]]), output_hidden_states=True).hidden_states
        expected = np.stack([s[0, 1:].mean(dim=0).numpy() for s in states])
        np.testing.assert_allclose(got[:, n], expected, atol=1e-4)


def test_a_sentence_longer_than_a_row_is_refused(sample):
    source, encoder = sample
    mesh = sharding.make_mesh("1x1")
    with jax.set_mesh(mesh), pytest.raises(UserError, match=r"sentence 2 has \d+ tokens, a row 16"):
        alignment.sentence_vectors(
            source.load(mesh), encoder, ["Yes.", "No. " * 20], mesh, rows=1, row_length=16, dtype=jnp.float32
        )
