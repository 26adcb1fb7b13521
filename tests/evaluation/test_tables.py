"""The tables hold the numbers of the results, and only rows that somebody measured."""

import copy

import numpy as np
import pytest

from alignx_jax.evaluation import tables
from tests.evaluation import results_example


@pytest.fixture(scope="module")
def results():
    return results_example.build(models=3, languages=5, layers=4)


def _row(table, label, after=None):
    """The row of a label, the first below the heading `after`."""
    labels = [row.label for row in table.rows]
    return table.rows[labels.index(label, labels.index(after) if after else 0)]


def test_the_overview_has_the_numbers_of_the_results(results):
    table = tables.overview(results)
    assert table.head == ("", "base model", "stage 1", "next-token only")
    assert [row.label for row in table.rows].count("Perplexity of a token") == 1  # a mean over languages says nothing
    for place, model in enumerate(results["models"]):
        alignment, layer = model["alignment"], model["align_layer"]
        value, low, high = model["intervals"]["retrieval"]["mean"]
        cell = _row(table, "Retrieval, mean").cells[place]
        assert cell.text == f"{100 * value:.1f}%" and cell.interval == f"[{100 * low:.1f}, {100 * high:.1f}]"
        both = [(d["to_pivot"][layer] + d["from_pivot"][layer]) / 2 for d in alignment["retrieval"].values()]
        assert _row(table, "Retrieval, lowest language").cells[place].text == f"{100 * min(both):.1f}%"
        mexa = np.mean([curve[layer] for curve in alignment["mexa"]["weighted"].values()])
        assert _row(table, "MEXA, 100 sentences").cells[place].text == f"{100 * mexa:.1f}%"
        probe = _row(table, "Language probe, last layer").cells[place]
        assert probe.text == f"{100 * alignment['language_probe'][-1]:.1f}%"
        head = alignment["matching_head"]
        balanced = f"{50 * (head['same'] + head['different']):.1f}%" if head else "–"
        assert _row(table, "Matching head, balanced").cells[place].text == balanced
        english = model["perplexity"]["en"]
        assert _row(table, "Perplexity of a token", "English").cells[place].text == f"{english['value']:,.1f}"
        others = [p["bits_per_byte"][0] for code, p in model["perplexity"].items() if code != "en"]
        assert _row(table, "Bits per byte", "Other languages, mean").cells[place].text == f"{np.mean(others):.3f}"
        out = model["translation"]["averages"]["en-x"]
        assert _row(table, "chrF++, English to others").cells[place].text == f"{out['chrF++']:.1f}"
        assert _row(table, "off-target, English to others").cells[place].text == f"{100 * out['off_target']:.1f}%"
        accuracies = [model["tasks"][task]["acc,none"][0] for task in ("arc_easy", "xcopa")]
        assert _row(table, "Accuracy, mean").cells[place].text == f"{100 * np.mean(accuracies):.1f}%"


def test_changes_are_those_of_paired_resamples(results):
    change, low, high = results["models"][1]["intervals"]["retrieval_change"]["mean"]
    baseline, cell, _ = _row(tables.overview(results), "Retrieval, mean").cells
    assert baseline.change == ""
    assert cell.change == f"{100 * change:+.1f}" and cell.change_interval == f"[{100 * low:.1f}, {100 * high:.1f}]"
    bits = [f"{v:.3f}" for v in results["models"][1]["intervals"]["bits_per_byte_change"]["en"]]
    assert tables.home(results).rows[0].cells[1].change_interval == f"[{bits[1]}, {bits[2]}]"
    assert tables.by_language(results)[0].rows[2].cells[1].change == f"+{bits[0]}"
    score = results["models"][1]["translation"]["directions"]["en-ar"]
    cell = _row(tables.translation_directions(results, "chrF++"), "English to Arabic").cells[1]
    assert cell.change == f"{score['chrF++_change'][0]:+.1f}" and cell.mark == "better"


def test_what_has_no_interval_is_neither_better_nor_worse_and_compares_equal_layers(results):
    """A model aligned at layer 3, beside a baseline that is shown at layer 2."""
    other = copy.deepcopy(results)
    base, model = other["models"][:2]
    model |= {"align_layer": 3, "baseline_layer": 3}
    for label, of in (
        ("CKA, debiased", lambda m, n: np.mean([curve[n] for curve in m["alignment"]["cka_debiased"].values()])),
        (
            "Retrieval, lowest language",
            lambda m, n: min((d["to_pivot"][n] + d["from_pivot"][n]) / 2 for d in m["alignment"]["retrieval"].values()),
        ),
    ):
        shown, cell, _ = _row(tables.overview(other), label).cells
        style = tables.INDEX if label.startswith("CKA") else tables.SHARE
        assert shown.text == style.text(of(base, 2)) and cell.text == style.text(of(model, 3))
        assert (cell.change, cell.mark) == (style.signed(of(model, 3) - of(base, 3)), "")
    retrieval = _row(tables.overview(other), "Retrieval, mean").cells[1]
    assert retrieval.change_interval and retrieval.mark == "better"
    for label in ("MEXA, 100 sentences", "xSIM error", "DALI", "DALI, strict", "Language probe, last layer"):
        cell = _row(tables.overview(results), label).cells[2]
        assert cell.interval and cell.change_interval, label
    for label in ("Bits per byte", "Choice of continuation", "Two-option items"):
        cell = _row(tables.overview(results), label, "Other languages, mean").cells[1]
        assert cell.interval and cell.change_interval, label


def test_a_change_that_was_withheld_is_not_shown(results):
    """Averages over different directions, and perplexities of different tokens, whatever intervals values have."""
    other = copy.deepcopy(results)
    model = other["models"][1]
    for of in (other["models"][0], model):
        of["translation"]["averages"]["en-x"]["off_target_interval"] = [0.3, 0.2, 0.4]
    scores = model["translation"]["averages"]["en-x"]
    label, shown = "off-target, English to others", []
    for scores["off_target_change"] in ([0.1, 0.05, 0.2], None):
        shown.append(_row(tables.overview(other), label).cells[1])
    given, withheld = shown
    assert (given.change, given.change_interval, given.mark) == ("+10.0", "[5.0, 20.0]", "worse")
    assert withheld.text == given.text == "30.0%" and (withheld.change, withheld.mark) == ("", "")
    perplexity = tables.home(results).rows[1]
    assert perplexity.label == "Perplexity of a token" and perplexity.cells[1].change_interval
    del model["intervals"]["perplexity_change"]
    assert tables.home(other).rows[1].cells[1].change == ""


def test_what_nobody_measured_has_no_row_or_table():
    results = results_example.build(models=2, languages=3, layers=2)
    for model in results["models"]:
        model.update(translation=None, tasks=None, choices=None, continuation_choice={})
        model["alignment"]["matching_head"] = None
        for name in ("continuation_choice", "choices"):
            del model["intervals"][name]
    labels = [row.label for row in tables.overview(results).rows]
    assert not {"Translation", "Tasks", "Two-option items", "Choice of continuation", "Matching head, balanced"} & set(
        labels
    )
    assert tables.translation_averages(results) is None and tables.tasks(results) is None
    assert [table.title for table in tables.by_language(results)] == ["Bits per byte", "Perplexity of a token"]


def test_forgetting_is_about_the_pivot_without_english(results):
    pivot = results_example.build(models=1, languages=3, layers=2)
    pivot["sentences"]["pivot"] = "de"
    assert tables.home_language(pivot) == "en"
    del pivot["models"][0]["perplexity"]["en"]
    assert tables.home_language(pivot) == "de" and tables.home(pivot).title == "German"


def test_tasks_have_intervals_of_standard_errors_and_know_losses(results):
    table = tables.tasks(results)
    value, error, _ = results["models"][0]["tasks"]["arc_easy"]["acc,none"]
    low, high = 100 * (value - 1.96 * error), 100 * (value + 1.96 * error)
    assert _row(table, "arc_easy, acc").cells[0].interval == f"[{low:.1f}, {high:.1f}]"
    perplexity = _row(table, "wikitext, word_perplexity").cells
    assert perplexity[0].text == "31.2" and perplexity[2].mark == "same" and perplexity[2].change == "+0.8"


@pytest.mark.parametrize(
    "metric, values, higher, text, mark",
    [
        ("brier_score,none", (0.4, 0.6), False, "0.600", "worse"),
        ("ter,none", (80.0, 60.0), False, "60.0", "better"),
        ("bits_per_byte,none", (0.9, 0.8), False, "0.800", "better"),
        ("f1,none", (0.4, 0.6), True, "60.0%", "better"),
        ("rare,none", (0.4, 0.6), None, "60.0%", ""),
    ],
)
def test_the_harness_says_which_way_a_metric_is_better(results, metric, values, higher, text, mark):
    other = copy.deepcopy(results)
    for model, value in zip(other["models"], values, strict=False):
        model["tasks"] = {"task": {metric: [value, 0.001, higher]}}
    cell = _row(tables.tasks(other), f"task, {metric.split(',')[0]}").cells[1]
    assert (cell.text, cell.mark) == (text, mark)


def test_a_set_counts_once_in_the_mean_of_tasks(results):
    """Of groups in groups the outermost that has an accuracy counts, and of a group without one its members."""
    other = copy.deepcopy(results)
    model = other["models"][0]
    model["tasks"] = {
        name: {"acc,none": [value, 0.1, True]}
        for name, value in {"outer": 0.5, "inner": 0.1, "a": 0.1, "b": 0.3, "c": 0.7, "alone": 0.9}.items()
    }
    model["tasks"]["bare"] = {}
    model["task_groups"] = {"outer": ["inner"], "inner": ["a"], "bare": ["b", "c"]}
    mean = (0.5 + (0.3 + 0.7) + 0.9) / 4
    assert _row(tables.overview(other), "Accuracy, mean").cells[0].text == f"{100 * mean:.1f}%"


def test_the_metric_of_translation_comes_first_and_intervals_are_no_metrics(results):
    assert tables.metrics(results) == [
        *("chrF++", "chrF++_floor", "BLEU", "spBLEU (flores200)", "off_target", "copy", "empty", "cut", "distinct")
    ]


@pytest.mark.parametrize(
    "direction, codes, name",
    [
        ("de-en", ("de", "en"), "German to English"),
        ("zh-Hant-en", ("zh-Hant", "en"), "Traditional Chinese to English"),
        ("en-zh-Hant", ("en", "zh-Hant"), "English to Traditional Chinese"),
        ("zh-Hant-x", ("zh-Hant", "x"), "Traditional Chinese to others"),
        ("x-en", ("x", "en"), "others to English"),
        ("x-y", ("x", "y"), "between others"),
    ],
)
def test_directions_by_name(direction, codes, name):
    assert tables.direction_codes(direction) == codes and tables.direction_name(direction) == name


def test_how_the_losses_stood_to_each_other(results):
    """Before the first step; of shares also after the last. Runs without pair losses have nothing to weigh."""
    table = tables.balance(results)
    first, last = results["models"][1]["training"]["balance"]
    assert _row(table, "Value of chance", "Contrastive").cells[1].text == f"{first['chance/contrastive']:.3f}"
    assert _row(table, "Gradient norm", "Language matching").cells[1].text == "9.000"
    assert (
        _row(table, "Share of the gradient", "Contrastive").cells[1].text == f"{100 * first['share/contrastive']:.1f}%"
    )
    assert _row(table, "Share, last step", "Contrastive").cells[1].text == f"{100 * last['share/contrastive']:.1f}%"
    assert _row(table, "Translations").cells[1].text == "0.310"
    assert {row.cells[0].text for row in table.rows if row.cells} == {"–"}, "the base model was not trained"
