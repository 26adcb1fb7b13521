"""The verdict: up, down, cannot tell, not tested; each in words that the interval allows."""

import dataclasses

import pytest

from alignx_jax.evaluation.rows import Row
from alignx_jax.evaluation.show import verdict
from alignx_jax.evaluation.show.cells import SHARE
from tests.evaluation import examples


def row(value, low=None, high=None) -> Row:
    return Row("model", "retrieval", 2, None, None, value, low, high, 9, None)


@pytest.mark.parametrize(
    "after, change, sentence",
    [
        (0.037, (0.030, 0.024, 0.036), "Retrieval rose from 0.7% to 3.7% (+3.0 points, 95% interval 2.4 to 3.6)."),
        (0.002, (-0.005, -0.008, -0.002), "Retrieval fell from 0.7% to 0.2% (-0.5 points, 95% interval -0.8 to -0.2)."),
        (
            0.010,
            (0.003, -0.001, 0.008),
            "Retrieval went from 0.7% to 1.0% (+0.3 points, 95% interval -0.1 to 0.8): "
            "no difference that this test can tell.",
        ),
        (0.010, (0.003,), "Retrieval went from 0.7% to 1.0% (+0.3 points; no interval was computed)."),
    ],
)
def test_a_change_in_words(after, change, sentence):
    assert verdict.change_sentence("Retrieval", SHARE, row(0.007), row(after), row(*change), "points") == sentence


@pytest.fixture
def results():
    return examples.results(models=3, languages=4, layers=4)


def test_every_model_is_compared_with_the_baseline(results):
    first, second, _ = verdict.verdicts(results)
    assert [first.model, second.model] == ["stage 1", "next-token only"]
    questions = [answer.question for answer in first.answers]
    assert questions == ["Languages closer?", "English kept?", "Translates better?", "Translates better?"]
    assert [answer.mark for answer in first.answers] == ["better"] * 4
    assert first.text.startswith("Retrieval between English and 3 other languages at the aligned layer (2 of 4) rose")
    before, after = (results.find(m, "perplexity", language="en").value for m in results.models[:2])
    assert f"less is better; perplexity {before:.1f} to {after:.1f}" in first.text


def test_what_cannot_be_told_is_not_called_a_difference(results):
    of = examples.put(results, 1, "bits_per_byte", 0.001, -0.002, 0.004, language="en", against="base model")
    first, *_ = verdict.verdicts(of)
    answer = first.answers[1]
    assert (answer.number, answer.interval, answer.mark) == ("+0.001", "[-0.002, 0.004]", "same")
    assert verdict.UNDECIDED in first.text and verdict.UNDECIDED not in verdict.verdicts(results)[0].text


def test_a_change_without_interval_is_no_verdict(results):
    first, *_ = verdict.verdicts(examples.put(results, 1, "retrieval", 0.1, layer=2, against="base model"))
    assert (first.answers[0].interval, first.answers[0].mark) == ("", "")
    assert "no interval was computed" in first.text


def test_a_single_model_is_measured_and_not_compared():
    (only,) = verdict.verdicts(examples.results(models=1))
    assert "so there is no before and after" in only.text and "Chance for retrieval is 0.2%." in only.text
    assert {answer.mark for answer in only.answers} == {""}


def test_what_was_not_measured_is_not_mentioned(results):
    metrics = {row.measure for row in results.rows if row.direction and row.layer is None}
    first, *_ = verdict.verdicts(examples.without(results, *metrics, "perplexity", "bits_per_byte"))
    assert [answer.measure for answer in first.answers] == ["retrieval, points"]
    assert "chrF" not in first.text and "bits" not in first.text


def test_a_language_that_the_tokenizer_cannot_write_is_warned_of_once(results):
    for n in range(3):
        results = examples.put(results, n, "unknown_rate", 0.0099, language="de")
        results = examples.put(results, n, "unknown_rate", 0.25, language="es")
    (warning,) = verdict.warnings(results)
    assert warning.startswith(
        "25.0% of the tokens of Spanish are unknown to the tokenizer of base model, stage 1, next"
    )


def test_layers_that_differ_are_said(results):
    assert verdict.warnings(results) == []
    of = examples.with_model(examples.with_model(results, 1, align_layer=3), 2, align_layer=4, layers=8)
    of = examples.put(of, 1, "retrieval", 0.2, 0.1, 0.3, layer=3, against="base model")
    same, deeper = verdict.warnings(of)
    assert same == (
        "stage 1 is measured at its aligned layer 3, base model at layer 2; the changes of stage 1 are from layer 3 of "
        "base model."
    )
    assert deeper.startswith("next-token only has 8 layers and base model 4") and "of layer 4 in the one and" in deeper
    before = of.find(of.base, "retrieval", 3).value
    assert f"from {100 * before:.1f}% to" in verdict.verdicts(of)[0].text.split("A linear")[0]


def test_vectors_that_become_one_are_warned_of(results):
    """The aligned layer is 2; what other layers have is no matter."""
    for n, (cosine, variance) in enumerate([(0.5, 8.0), (0.9899, 0.81), (0.993, 0.79)]):
        results = examples.put(results, n, "random_cosine", cosine, layer=2)
        results = examples.put(results, n, "total_variance", variance, layer=2)
    results = examples.put(results, 0, "random_cosine", 1.0, layer=1)
    results = examples.put(results, 1, "total_variance", 0.1, layer=3)
    assert verdict.warnings(results) == [
        "next-token only may have collapsed at its aligned layer 2: the mean cosine of different sentences is 0.993 "
        "(base model: 0.500), and the total variance is 9.9% of that of base model. Retrieval can rise all the same."
    ]
    deeper = examples.with_model(results, 2, align_layer=4, layers=8)  # of another depth: nothing to divide by
    assert not any("collapsed" in warning for warning in verdict.warnings(deeper))
    first, *_ = verdict.warnings(examples.put(results, 0, "random_cosine", 0.995, layer=2))
    assert (
        "base model may have collapsed at its aligned layer 2: the mean cosine of different sentences is 0.995."
        in first
    )


def test_a_probe_at_its_ceiling_is_said_to_tell_nothing(results):
    for n, (probe, variance) in enumerate([(0.995, 0.3), (1.0, 0.25), (0.9949, 0.2)]):
        results = examples.put(results, n, "language_probe", probe, layer=4)
        results = examples.put(results, n, "language_variance", variance, layer=4)
    saturated, told, _ = verdict.verdicts(results)
    assert (
        "for 100.0% of sentences (base model: 99.5%): it is saturated and tells nothing of their difference; of the "
        "variance of all vectors there, 25.0% lies between languages (base model: 30.0%)."
    ) in saturated.text
    assert "for 99.5% of sentences (base model: 99.5%)." in told.text and "saturated" not in told.text


def test_what_the_losses_did_is_a_comparison_of_its_own(results):
    """Changes, marks and sentences are those from the control, with the values of both models."""
    control = "next-token only"
    results = examples.put(results, 1, "retrieval", 0.02, 0.01, 0.03, layer=2, against=control)
    results = examples.put(results, 1, "bits_per_byte", 0.01, -0.01, 0.03, language="en", against=control)
    *_, one = verdict.verdicts(results)
    assert (one.model, one.against, one.title) == ("stage 1", control, "stage 1 against next-token only")
    assert [(answer.number, answer.mark) for answer in one.answers[:2]] == [("+2.0", "better"), ("+0.010", "same")]
    assert one.text.startswith("What the pair losses did, apart from what training on the data did (next-token only): ")
    before, after = (100 * results.find(results.models[m], "retrieval", 2).value for m in (2, 1))
    assert f"rose from {before:.1f}% to {after:.1f}% (+2.0 points, 95% interval 1.0 to 3.0)" in one.text
    change = results.find(results.models[1], "chrF++", direction="en-x", against=results.models[2])
    assert one.answers[2].number == f"{change.value:+.1f}"
    assert len(verdict.verdicts(results)) == 3
    assert len(verdict.verdicts(dataclasses.replace(results, controls=[]))) == 2
