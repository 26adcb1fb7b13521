"""Sentence vectors against transformers' hidden states; the layer chosen from a curve that is known."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignx_jax import sharding
from alignx_jax.data import prompts
from alignx_jax.evaluation.measure import alignment
from alignx_jax.exits import UserError

ENGLISH = ["The dog sleeps.", "The teacher bought a red book this morning.", "He is at school.", "Yes"]
GERMAN = ["Der Hund schläft.", "Der Lehrer hat heute Morgen ein rotes Buch gekauft.", "Er ist in der Schule.", "Ja"]
CHINESE = ["狗在睡觉。", "老师今天早上买了一本红色的书。", "他在学校。", "是"]
SENTENCES = {"de": GERMAN, "en": ENGLISH, "zh": CHINESE}


def test_a_text_longer_than_the_models_context_is_refused(sample):
    """Before anything is compiled, with the count."""
    short = types.SimpleNamespace(config=types.SimpleNamespace(max_positions=4))
    lengths = [len(ids) + 1 for ids, _ in sample[1].encode_batch(ENGLISH)]
    long = [n for n in lengths if n > 4]
    says = f"{len(long)} of 4 evaluation texts are longer than the model's context of 4 tokens, the longest has "
    with pytest.raises(UserError, match=f"{says}{max(long)}; leave them out"):
        alignment.text_vectors(
            short, sample[1], ENGLISH, sharding.make_mesh("1x1"), rows=4, row_length=64, dtype=jnp.float32
        )


@pytest.mark.parametrize("spec", ["1x1", "4x2"])
def test_every_pool_of_every_sentence_alone(sample, states, monkeypatch, spec):
    monkeypatch.setattr(alignment, "MEXA_SENTENCES", 3)
    source, encoder = sample
    mesh, heard = sharding.make_mesh(spec), []
    with jax.set_mesh(mesh):
        got = alignment.sentence_vectors(
            source.load(mesh),
            encoder,
            SENTENCES,
            mesh,
            rows=4,
            row_length=48,
            dtype=jnp.float32,
            progress=heard.append,
        )
    assert sum(heard) == 12
    assert got.mean.shape == (9, 3, 4, 128)
    assert got.last.shape == got.weighted.shape == got.predicting.shape == (9, 3, 3, 128)
    for k, language in enumerate(SENTENCES.values()):
        for n, (ids, _) in enumerate(encoder.encode_batch(language)):
            h_LxTxD = states([encoder.bos_id, *ids])
            np.testing.assert_allclose(got.mean[:, k, n], h_LxTxD[:, 1:].mean(axis=1), atol=1e-4)
            if n < 3:
                weight = np.arange(1, h_LxTxD.shape[1] + 1)
                weighted = np.einsum("t,ltd->ld", weight, h_LxTxD) / weight.sum()
                np.testing.assert_allclose(got.weighted[:, k, n], weighted, atol=1e-4)
                np.testing.assert_allclose(got.last[:, k, n], h_LxTxD[:, -1], atol=1e-4)
                np.testing.assert_allclose(got.predicting[:, k, n], h_LxTxD[:, :-1].mean(axis=1), atol=1e-4)


def test_in_prompt_the_pivot_has_seen_its_source(sample, states):
    source, encoder = sample
    mesh, template = sharding.make_mesh("2x1"), prompts.load("sample")
    with jax.set_mesh(mesh):
        got = alignment.in_prompt_vectors(
            source.load(mesh), encoder, template, SENTENCES, "en", mesh, rows=2, row_length=96, dtype=jnp.float32
        )
    assert list(got) == ["de", "zh"]
    for code, (of_source, of_target) in got.items():
        for n in range(4):
            prompt = template.render_translation(SENTENCES[code][n], ENGLISH[n], code, "en")
            ((ids, offsets),) = encoder.encode_batch([prompt.text])
            h_LxTxD = states([encoder.bos_id, *ids])[:, 1:]
            for vectors, (start, end) in ((of_source, prompt.source), (of_target, prompt.target)):
                inside = (offsets[:, 0] < end) & (offsets[:, 1] > start) & (offsets[:, 0] < offsets[:, 1])
                np.testing.assert_allclose(vectors[:, n], h_LxTxD[:, inside].mean(axis=1), atol=1e-4)


def test_the_chosen_layer_is_inside_and_finds_most_pairs(sample, monkeypatch):
    """Vectors are made so that retrieval is perfect at the ends, which are not to be chosen, and at layers 2 and 6.

    Perfect among pairs of the same languages, that is: the vectors of German with English are those of French with it.
    """
    source, encoder = sample
    rng = np.random.default_rng(0)
    german, french = ([(f"{code}{n}", f"en-{code}{n}") for n in range(20)] for code in ("de", "fr"))
    x, noise = rng.normal(size=(20, 16)), rng.normal(size=(20, 16))

    def vectors(decoder, encoder, texts, mesh):
        assert texts == [text for pair in german + french for text in pair]
        made = rng.normal(size=(9, 80, 16))
        for layer in (0, 2, 6, 8):
            for begin in (0, 40):
                made[layer, begin : begin + 40 : 2], made[layer, begin + 1 : begin + 40 : 2] = x, x + 0.01 * noise
        return made.astype(np.float32)

    monkeypatch.setattr(alignment, "text_vectors", vectors)
    decoder = source.load(sharding.make_mesh("1x1"))
    again = [*german, ("de3", "c"), ("c", "en-de4")]  # share a sentence with an earlier pair
    pairs = {("de", "en"): again, ("en", "zh"): [("alone", "i")], ("en", "fr"): french}
    choice = alignment.choose_layer(decoder, encoder, pairs, None)
    assert (choice.layer, choice.pairs) == (2, 40)
    assert [choice.retrieval[n] for n in (0, 2, 6, 8)] == [1] * 4
    assert max(choice.retrieval[n] for n in (1, 3, 4, 5, 7)) < 0.5
    with pytest.raises(UserError, match=r"layer=auto: there are 8 layers and at most 1 held-out pairs of two lang"):
        alignment.choose_layer(decoder, encoder, {("de", "en"): german[:1]}, None)


def test_a_sentence_longer_than_a_row_is_refused(sample):
    source, encoder = sample
    mesh = sharding.make_mesh("1x1")
    options = {"rows": 1, "row_length": 16, "dtype": jnp.float32}
    with jax.set_mesh(mesh):
        decoder = source.load(mesh)
        with pytest.raises(UserError, match=r"'No\. No\. .* has \d+ tokens, a row 16"):
            alignment.text_vectors(decoder, encoder, ["Yes.", "No. " * 20], mesh, **options)
        with pytest.raises(UserError, match=r"sentence 2 \(de\) cannot be pooled in its prompt \(overlong\)"):
            alignment.in_prompt_vectors(
                decoder,
                encoder,
                prompts.load("sample"),
                {"de": ["Ja", "Nein. " * 20], "en": ["Yes", "No"]},
                "en",
                mesh,
                **(options | {"row_length": 48}),
            )
