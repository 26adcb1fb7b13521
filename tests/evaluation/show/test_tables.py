"""The tables hold the numbers of the rows, and only lines that somebody measured."""

import dataclasses

import pytest

from alignx_jax.evaluation import rows
from alignx_jax.evaluation.show import tables
from tests.evaluation import examples


@pytest.fixture(scope="module")
def results():
    return examples.results(models=3, languages=5, layers=4)


def _line(table, label, after=None):
    """The line of a label, the first below the heading `after`."""
    labels = [line.label for line in table.lines]
    return table.lines[labels.index(label, labels.index(after) if after else 0)]


def test_the_overview_has_the_numbers_of_the_rows(results):
    table = tables.overview(results)
    assert table.head == ("", "base model", "stage 1", "next-token only")
    assert [line.label for line in table.lines].count("Perplexity of a token") == 1
    shown = (
        ("Retrieval, mean", None, tables.SHARE, "retrieval", {"layer": 2}),
        ("Retrieval, lowest language", None, tables.SHARE, "retrieval_lowest", {"layer": 2}),
        ("MEXA, 546 sentences", None, tables.SHARE, "mexa", {"layer": 2}),
        ("xSIM error", None, tables.SHARE, "xsim", {"layer": 2}),
        ("DALI", None, tables.SHARE, "dali", {"layer": 2}),
        ("CKA, debiased", None, tables.INDEX, "cka_debiased", {"layer": 2}),
        ("Language probe, aligned layer", None, tables.SHARE, "language_probe", {"layer": 2}),
        ("Language probe, last layer", None, tables.SHARE, "language_probe", {"layer": 4}),
        ("Perplexity of a token", "English", tables.PERPLEXITY, "perplexity", {"language": "en"}),
        ("Bits per byte", "English", tables.BITS, "bits_per_byte", {"language": "en"}),
        ("Bits per byte", "Other languages, mean", tables.BITS, "bits_per_byte", {"language": rows.OTHERS}),
        ("Two-option items", "Other languages, mean", tables.SHARE, "choices", {"language": rows.OTHERS}),
        ("chrF++, English to others", None, tables.SCORE, "chrF++", {"direction": "en-x"}),
        ("off-target, others to English", None, tables.SHARE, "off_target", {"direction": "x-en"}),
        ("Accuracy, mean", None, tables.SHARE, "tasks", {}),
    )
    for label, after, style, measure, place in shown:
        for model, cell in zip(results.models, _line(table, label, after).cells, strict=True):
            found = results.find(model, measure, **place)
            assert (cell.text, cell.interval) == (style.text(found.value), style.interval(found)), label
            change = results.find(model, measure, **place, against=results.base)
            assert cell.change == (style.signed(change.value) if change else ""), label
            assert cell.change_interval == style.interval(change), label
    assert [cell.text for cell in _line(table, "Matching head, balanced").cells] == ["–", "30.0%", "–"]


def test_a_model_is_shown_at_its_own_layer(results):
    """Aligned at layer 3, beside a baseline that is shown at layer 2."""
    of = examples.with_model(results, 1, align_layer=3)
    of = examples.put(of, 1, "retrieval", 0.25, 0.24, 0.26, layer=3, against="base model")
    shown, cell, _ = _line(tables.overview(of), "Retrieval, mean").cells
    base, model, _ = of.models
    assert shown.text == tables.SHARE.text(of.find(base, "retrieval", 2).value)
    assert cell.text == tables.SHARE.text(of.find(model, "retrieval", 3).value)
    assert (cell.change, cell.change_interval, cell.mark) == ("+25.0", "[24.0, 26.0]", "better")


def test_what_has_no_interval_is_neither_better_nor_worse(results):
    for label in ("CKA, debiased", "Retrieval, lowest language"):
        cell = _line(tables.overview(results), label).cells[1]
        assert cell.change and (cell.change_interval, cell.mark) == ("", "")


def test_the_change_of_every_language_and_direction_is_its_own(results):
    of = examples.put(results, 1, "bits_per_byte", -0.125, -0.25, -0.0625, language="de", against="base model")
    of = examples.put(of, 1, "chrF++", -3.0, -4.0, -2.0, direction="en-ar", against="base model")
    found = tables.by_language(of)[0]
    assert found.title == "Bits per byte" and len(found.lines) == 5
    cell = _line(found, "German").cells[1]
    assert (cell.change, cell.change_interval, cell.mark) == ("-0.125", "[-0.250, -0.062]", "better")
    cell = _line(tables.translation_directions(of, "chrF++"), "English to Arabic").cells[1]
    assert (cell.change, cell.mark) == ("-3.0", "worse")


def test_a_change_that_was_withheld_is_not_shown(results):
    """Averages over different directions, and perplexities of different tokens, whatever intervals values have."""
    label = "off-target, English to others"
    given = _line(tables.overview(results), label).cells[1]
    assert given.interval and given.change_interval and given.mark == "better"
    withheld = examples.without(results, "off_target", "perplexity", change=True)
    cell = _line(tables.overview(withheld), label).cells[1]
    assert (cell.text, cell.interval, cell.change, cell.mark) == (given.text, given.interval, "", "")
    perplexity = tables.home(withheld).lines[1]
    assert perplexity.label == "Perplexity of a token" and {cell.change for cell in perplexity.cells} == {""}


def test_what_nobody_measured_has_no_line_or_table(results):
    metrics = {row.measure for row in results.rows if row.direction and row.layer is None}
    of = examples.without(
        results, *metrics, "choices", "continuation_choice", "matching_head_balanced", *examples.TASKS
    )
    of = examples.without(of, "tasks")
    labels = {line.label for line in tables.overview(of).lines}
    assert not {"Translation", "Tasks", "Two-option items", "Choice of continuation"} & labels
    assert "Matching head, balanced" not in labels
    assert tables.translation_averages(of) is None and tables.tasks(of) is None
    assert [table.title for table in tables.by_language(of)] == ["Bits per byte", "Perplexity of a token"]


def test_forgetting_is_about_the_pivot_without_english(results):
    of = dataclasses.replace(results, sentences=dataclasses.replace(results.sentences, pivot="de"))
    assert tables.home_language(of) == "en"
    of = dataclasses.replace(of, rows=[row for row in of.rows if row.language != "en"])
    assert tables.home_language(of) == "de" and tables.home(of).title == "German"


def test_tasks_have_intervals_and_know_losses(results):
    table = tables.tasks(results)
    found = results.find(results.models[0], "tasks/arc_easy/acc,none")
    assert _line(table, "arc_easy, acc").cells[0].interval == tables.SHARE.interval(found)
    perplexity = _line(table, "wikitext, word_perplexity").cells
    assert perplexity[0].text == "25.0" and perplexity[1].change == "-5.0" and perplexity[1].mark == "better"


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
    measure = f"tasks/a/b/{metric}"
    of = dataclasses.replace(results, tasks={measure: higher})
    for n, value in enumerate(values):
        of = examples.put(of, n, measure, value, value - 0.01, value + 0.01)
    change = values[1] - values[0]
    of = examples.put(of, 1, measure, change, change - 0.02, change + 0.02, against="base model")
    (line,) = tables.tasks(of).lines
    assert line.label.endswith(metric.split(",")[0]) and (line.cells[1].text, line.cells[1].mark) == (text, mark)


def test_the_metric_of_translation_comes_first_and_what_is_above_its_floor_is_no_metric(results):
    assert tables.metrics(results) == [
        *("chrF++", "chrF++_floor", "BLEU", "spBLEU (flores200)", "off_target", "copy", "empty", "cut", "distinct")
    ]


def test_a_tokenizer_has_no_changes(results):
    unknown, tokens = tables.tokenization(results)
    assert (unknown.title, tokens.title) == ("Unknown tokens", "Tokens a sentence")
    assert {cell.change for table in (unknown, tokens) for line in table.lines for cell in line.cells} == {""}


def test_how_the_losses_stood_to_each_other(results):
    """Before the first step; of shares also after the last. Runs without pair losses have nothing to weigh."""
    table = tables.balance(results)
    assert _line(table, "Value of chance", "Contrastive").cells[1].text == "2.000"
    assert _line(table, "Gradient norm", "Contrastive").cells[1].text == "9.000"
    assert _line(table, "Share of the gradient", "Contrastive").cells[1].text == "25.0%"
    assert _line(table, "Share, last step", "Contrastive").cells[1].text == "12.5%"
    assert _line(table, "Translations").cells[1].text == "0.310"
    assert {line.cells[0].text for line in table.lines if line.cells} == {"–"}, "the base model was not trained"
    assert "Language matching" not in [line.label for line in table.lines]
