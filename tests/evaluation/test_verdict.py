"""The verdict: up, down, cannot tell, not tested; each in words that the interval allows."""

import pytest

from alignx_jax.evaluation import verdict
from alignx_jax.evaluation.cells import SHARE
from tests.evaluation import results_example


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
        (0.010, 0.003, "Retrieval went from 0.7% to 1.0% (+0.3 points; no interval was computed)."),
    ],
)
def test_a_change_in_words(after, change, sentence):
    assert verdict.change_sentence("Retrieval", SHARE, 0.007, after, change, "points") == sentence


@pytest.fixture
def results():
    return results_example.build(models=3, languages=4, layers=4)


def test_every_model_is_compared_with_the_baseline(results):
    first, second, _ = verdict.verdicts(results)
    assert [first.model, second.model] == ["stage 1", "next-token only"]
    questions = [answer.question for answer in first.answers]
    assert questions == ["Languages closer?", "English kept?", "Translates better?", "Translates better?"]
    assert [answer.mark for answer in first.answers] == ["better", "worse", "better", "better"]
    assert first.text.startswith("Retrieval between English and 3 other languages at the aligned layer (2 of 4) rose")
    perplexity = [results["models"][m]["perplexity"]["en"]["value"] for m in (0, 1)]
    assert f"less is better; perplexity {perplexity[0]:.1f} to {perplexity[1]:.1f}" in first.text


def test_what_cannot_be_told_is_not_called_a_difference(results):
    results["models"][1]["intervals"]["bits_per_byte_change"]["en"] = [0.001, -0.002, 0.004]
    first, *_ = verdict.verdicts(results)
    answer = first.answers[1]
    assert (answer.number, answer.interval, answer.mark) == ("+0.001", "[-0.002, 0.004]", "same")
    assert verdict.UNDECIDED in first.text


def test_a_change_without_interval_is_no_verdict(results):
    results["models"][1]["intervals"]["retrieval_change"] = None
    first, *_ = verdict.verdicts(results)
    assert (first.answers[0].interval, first.answers[0].mark) == ("", "")
    assert "no interval was computed" in first.text


def test_a_single_model_is_measured_and_not_compared():
    (only,) = verdict.verdicts(results_example.build(models=1, languages=4, layers=4))
    assert "so there is no before and after" in only.text and "Chance for retrieval is 0.2%." in only.text
    assert {answer.mark for answer in only.answers} == {""}


def test_what_was_not_measured_is_not_mentioned(results):
    for model in results["models"]:
        model.update(translation=None, perplexity={})
    first, *_ = verdict.verdicts(results)
    assert [answer.measure for answer in first.answers] == ["retrieval, points"]
    assert "chrF" not in first.text and "bits" not in first.text


def test_a_language_that_the_tokenizer_cannot_write_is_warned_of_once(results):
    for model in results["models"]:
        model["unknown_rate"] = {"en": 0.0, "de": 0.0099, "es": 0.25}
    (warning,) = verdict.warnings(results)
    assert warning.startswith(
        "25.0% of the tokens of Spanish are unknown to the tokenizer of base model, stage 1, next"
    )


def test_layers_that_differ_are_said(results):
    for model in results["models"]:
        model["unknown_rate"] = {}
    assert verdict.warnings(results) == []
    results["models"][1] |= {"align_layer": 3, "baseline_layer": 3}
    results["models"][2] |= {"align_layer": 4, "layers": 8}
    same, deeper = verdict.warnings(results)
    assert same == (
        "stage 1 is measured at its aligned layer 3, base model at layer 2; the changes of stage 1 are from layer 3 of "
        "base model."
    )
    assert deeper.startswith("next-token only has 8 layers and base model 4") and "of layer 4 in the one and" in deeper
    of = results["models"][0]["alignment"]["retrieval"].values()
    before = [(both["to_pivot"][3] + both["from_pivot"][3]) / 2 for both in of]
    assert f"from {100 * sum(before) / len(before):.1f}% to" in verdict.verdicts(results)[0].text.split("A linear")[0]


def test_vectors_that_become_one_are_warned_of(results):
    """The aligned layer is 2; what other layers have is no matter."""
    for model in results["models"]:
        model["unknown_rate"] = {}
    base, first, second = (model["alignment"] for model in results["models"])
    base["random_cosine"], base["total_variance"] = [1.0, 1.0, 0.5, 1.0, 1.0], [8.0] * 5
    first["random_cosine"], first["total_variance"] = [0.5, 0.5, 0.9899, 0.5, 0.5], [0.1, 0.1, 0.81, 0.1, 0.1]
    second["random_cosine"], second["total_variance"] = [0.5, 0.5, 0.993, 0.5, 0.5], [8.0, 8.0, 0.79, 8.0, 0.1]
    assert verdict.warnings(results) == [
        "next-token only may have collapsed at its aligned layer 2: the mean cosine of different sentences is 0.993 "
        "(base model: 0.500), and the total variance is 9.9% of that of base model. Retrieval can rise all the same."
    ]
    results["models"][2] |= {
        "align_layer": 4,
        "baseline_layer": 4,
        "layers": 8,
    }  # of another depth: nothing to divide by
    assert not any("collapsed" in warning for warning in verdict.warnings(results))
    base["random_cosine"][2] = 0.995
    assert (
        "base model may have collapsed at its aligned layer 2: the mean cosine of different sentences is 0.995."
        in (verdict.warnings(results)[0])
    )


def test_a_probe_at_its_ceiling_is_said_to_tell_nothing(results):
    base, first, second = (model["alignment"] for model in results["models"])
    for of, probe, variance in ((base, 0.995, 0.3), (first, 1.0, 0.25), (second, 0.9949, 0.2)):
        of["language_probe"][-1], of["language_variance"][-1] = probe, variance
    saturated, told, _ = verdict.verdicts(results)
    assert (
        "for 100.0% of sentences (base model: 99.5%): it is saturated and tells nothing of their difference; of the "
        "variance of all vectors there, 25.0% lies between languages (base model: 30.0%)."
    ) in saturated.text
    assert "for 99.5% of sentences (base model: 99.5%)." in told.text and "saturated" not in told.text


def test_what_the_losses_did_is_a_comparison_of_its_own(results):
    """Changes, marks and sentences are those from the control, with the values of both models."""
    changes = results["against_control"][0]["intervals"]
    changes["retrieval_change"]["mean"] = [0.02, 0.01, 0.03]
    changes["bits_per_byte_change"]["en"] = [0.01, -0.01, 0.03]
    *_, one = verdict.verdicts(results)
    assert (one.model, one.against, one.title) == ("stage 1", "next-token only", "stage 1 against next-token only")
    assert [(answer.number, answer.mark) for answer in one.answers[:2]] == [("+2.0", "better"), ("+0.010", "same")]
    of = [100 * results["models"][m]["intervals"]["retrieval"]["mean"][0] for m in (2, 1)]
    assert one.text.startswith("What the pair losses did, apart from what training on the data did (next-token only): ")
    before = results["models"][2]["alignment"]["retrieval"].values()
    before = 100 * sum((both["to_pivot"][2] + both["from_pivot"][2]) / 2 for both in before) / len(before)
    assert f"rose from {before:.1f}% to {of[1]:.1f}% (+2.0 points, 95% interval 1.0 to 3.0)" in one.text
    value = results["against_control"][0]["translation"]["averages"]["en-x"]["chrF++_change"][0]
    assert one.answers[2].number == f"{value:+.1f}"
    assert len(verdict.verdicts(results)) == 3
    results["against_control"] = []
    assert len(verdict.verdicts(results)) == 2
