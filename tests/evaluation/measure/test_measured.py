"""DALI against transformers' states, and what processes measure apart; all measurements: test_evaluate.py."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignx_jax import hosts, sharding
from alignx_jax.config import Config, EvaluationConfig
from alignx_jax.data import tokenizer
from alignx_jax.evaluation.measure import evaluate, harness, measured, translation, translation_scores
from alignx_jax.evaluation.measure.scores import Place
from alignx_jax.evaluation.measure.scoring import Item
from alignx_jax.runs import loading

ENGLISH = {
    0: ("The dog sleeps.", "It is tired.", "It is red."),
    1: ("He is at school.", "He reads a book.", "He bought a dog."),
    2: ("The teacher is tired.", "She sleeps.", "She buys a book."),
    3: ("The book is red.", "The dog sleeps.", "I read it."),
}
OTHER = {
    3: ("The book is blue.", "The dog sleeps.", "The dog read it."),
    9: ("Yes.", "No.", "Good."),
    0: ("A dog sleeps here.", "So it is tired.", "So it is red."),
    1: ("She is at school.", "She reads a book.", "She reads a dog."),
    2: ("The teacher was tired.", "She sleeps.", "She buys a book."),
}
"""Of a second language, near enough that the model finds some of them."""


@pytest.mark.parametrize(("index", "does", "has"), [(0, ["scores", "meets"], "a result"), (1, ["meets"], None)])
def test_one_process_scores_translations_and_all_meet_after_it(monkeypatch, index, does, has):
    done = []
    monkeypatch.setattr(hosts, "index", lambda: index)
    monkeypatch.setattr(hosts, "gather", lambda what, value: done.append("meets"))
    monkeypatch.setattr(translation_scores, "score", lambda *_: done.append("scores") or "a result")
    assert measured._scored({}, {}, {}, Config()) == has
    assert done == does


def test_translations_end_where_the_model_ends_its_turns(monkeypatch, tmp_path):
    class Seen(Exception):
        """The tokens."""

    def translate(*_, eos_ids, **options):
        raise Seen(*eos_ids)

    folder = shutil.copytree(loading.SAMPLE_MODEL, tmp_path / "model")
    (folder / "generation_config.json").write_text('{"eos_token_id": [77, 5]}')
    config = Config(evaluation=EvaluationConfig(sentences="sample", languages=("de",)))
    material = evaluate.check(config)
    monkeypatch.setattr(translation, "translate", translate)
    monkeypatch.setattr(measured, "_of_text", lambda *_: {})
    monkeypatch.setattr(measured, "_alignment", lambda *_: ({}, []))
    source = loading.find(str(folder))
    with pytest.raises(Seen) as seen:
        measured.measure(config, material, measured.Subject(source, 4, 8), sharding.make_mesh("1x1"), lambda *_: None)
    assert set(seen.value.args) == {tokenizer.load(folder).eos_id, 5, 77}


def test_dali_is_of_weighted_means_of_the_items_that_two_languages_share(sample, states):
    """By transformers' states, in loops: BOS counts, and the second language's item 9 has no English one."""
    source, encoder = sample

    def items(texts, code):
        return [
            Item(premise=p, choice1=a, choice2=b, question="effect", label=0, lang=code, idx=idx)
            for idx, (p, a, b) in texts.items()
        ]

    mesh = sharding.make_mesh("2x1")
    with jax.set_mesh(mesh):
        choices = {"en": items(ENGLISH, "en"), "de": items(OTHER, "de")}
        options = {"rows": 4, "row_length": 64, "dtype": jnp.float32}
        found = measured.dali(source.load(mesh), encoder, choices, "en", mesh, **options)

    def vectors(premise, option, weighted):
        ((ids, _),) = encoder.encode_batch([f"{premise} {option}"])
        h_LxTxD = states([encoder.bos_id, *ids])
        weight = np.arange(1, h_LxTxD.shape[1] + 1) if weighted else np.arange(h_LxTxD.shape[1]) > 0
        x_LxD = np.einsum("t,ltd->ld", weight / weight.sum(), h_LxTxD)
        return x_LxD / np.linalg.norm(x_LxD, axis=1, keepdims=True)

    def expected(weighted):
        aligned, strict = [], []
        for idx in (3, 0, 1, 2):
            (e1, e2), (g1, g2) = ([vectors(of[idx][0], o, weighted) for o in of[idx][1:]] for of in (ENGLISH, OTHER))
            (m1, m2, w1, w2, e, g) = (
                (u * v).sum(axis=1) for u, v in ((e1, g1), (e2, g2), (e1, g2), (e2, g1), (e1, e2), (g1, g2))
            )
            least = np.minimum(m1, m2)
            aligned.append(least > np.maximum(w1, w2))
            strict.append(aligned[-1] & (least > np.maximum(e, g)))
        return np.transpose(aligned), np.transpose(strict)

    assert {place.language for place in found} == {"de", None}
    aligned, strict = expected(weighted=True)
    for code in ("de", None):
        np.testing.assert_array_equal(found[Place("dali", language=code)].parts_LxN[0], aligned)
        np.testing.assert_array_equal(found[Place("dali_strict", language=code)].parts_LxN[0], strict)
    assert (aligned != strict).any() and (aligned != expected(weighted=False)[0]).any()  # the items tell these apart


def of_tasks(groups: dict[str, list[str]], **accuracies: float) -> dict:
    scores = {name: {"acc,none": harness.Score(value, 0.1, True)} for name, value in accuracies.items()}
    return measured.of_tasks(harness.Tasks(scores | {"bare": {}}, groups, 2048, {}))


def test_tasks_have_intervals_of_standard_errors():
    found = of_tasks({}, arc=0.5)
    score = found[Place("tasks/arc/acc,none")]
    np.testing.assert_allclose([score.value, *score.ends], [0.5, 0.5 - 0.196, 0.5 + 0.196])
    none = measured.of_tasks(
        harness.Tasks({"wiki": {"word_perplexity,none": harness.Score(9.0, None, False)}}, {}, 9, {})
    )
    assert none[Place("tasks/wiki/word_perplexity,none")].ends is None and Place("tasks") not in none


def test_a_set_counts_once_in_the_mean_of_tasks():
    """Of groups in groups the outermost that has an accuracy counts, and of a group without one its members."""
    found = of_tasks(
        {"outer": ["inner"], "inner": ["a"], "bare": ["b", "c"]}, outer=0.5, inner=0.1, a=0.1, b=0.3, c=0.7, alone=0.9
    )
    assert found[Place("tasks")].value == pytest.approx((0.5 + (0.3 + 0.7) + 0.9) / 4)
