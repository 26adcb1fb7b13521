"""The pictures of the results: which there are, and that their words say the numbers they show."""

import dataclasses

import numpy as np
import pytest

from alignx_jax.evaluation import rows
from alignx_jax.evaluation.show import figures
from tests.evaluation import examples


@pytest.fixture(scope="module")
def results():
    return examples.results(models=3, languages=5, layers=4)


def test_depth_says_its_numbers(results):
    found = figures.depth(results).panels
    names = ("retrieval", "language_probe", "meaning_variance", "language_variance")
    for panel, measure in zip(found, names, strict=True):
        y = 100 * np.array([results.find(results.models[1], measure, layer).value for layer in range(5)])
        expected = f"stage 1 {y[0]:.1f}% at the embeddings, {y[2]:.1f}% at the aligned layer 2, {y[4]:.1f}% at the"
        assert expected in panel.alt and f"highest {y.max():.1f}% at {y.argmax()}" in panel.alt
    assert [panel.note for panel in found] == ["chance: 0.2%", "chance: 20.0%", "", ""]


def test_models_of_different_depths_share_a_scale_of_percent(results):
    other = examples.results(models=1, languages=5, layers=8)
    deeper = [row._replace(model="deeper") for row in other.rows]
    mixed = dataclasses.replace(
        results,
        models=[*results.models, dataclasses.replace(other.models[0], name="deeper")],
        rows=results.rows + deeper,
    )
    assert ">depth in %<" in figures.depth(mixed).panels[0].svg()
    assert ">layer (0: embeddings, 4: last)<" in figures.depth(results).panels[0].svg()


def test_measures_that_nobody_made_have_no_panel(results):
    keys = [panel.key for group in figures.measures(results) for panel in group.panels]
    assert {"dali", "in-prompt", "cosine-difference", "uniformity"} < set(keys) and len(keys) == len(set(keys))
    bare = examples.without(results, "dali", "dali_strict", "in_prompt")
    fewer = [panel.key for group in figures.measures(bare) for panel in group.panels]
    assert set(keys) - set(fewer) == {"dali", "dali-strict", "in-prompt"}


def test_a_curve_with_a_gap_is_not_drawn(results):
    gap = examples.put(results, 0, "cka", None, layer=3)
    assert "cka" in figures.curves(results, results.models[0]) and "cka" not in figures.curves(gap, gap.models[0])
    (panel,) = [panel for group in figures.measures(gap) for panel in group.panels if panel.key == "cka"]
    assert "base model" not in panel.alt and "stage 1" in panel.alt


def test_languages_are_sorted_by_the_first_model_and_only_others_change(results):
    results = examples.put(results, 0, "retrieval", 0.9, 0.8, 0.95, layer=2, language="fr")
    values, changes = figures.by_language(results).panels
    first = {
        code: results.find(results.models[0], "retrieval", 2, language=code) for code in results.sentences.languages
    }
    order = sorted((code for code in first if first[code]), key=lambda code: -first[code].value)
    said = values.alt.split("base model ")[1].split(";")[0]
    assert order[0] == "fr" and said == ", ".join(f"{code} {100 * first[code].value:.1f}%" for code in order)
    change = results.find(results.models[1], "retrieval", 2, language="fr", against=results.base).value
    assert "base model" not in changes.alt and f"stage 1 fr {100 * change:+.1f}" in changes.alt
    single = examples.results(models=1)
    assert [panel.key for panel in figures.by_language(single).panels] == ["by-language"]


def test_a_matrix_says_its_extremes(results):
    results = examples.put(results, 0, "retrieval", 0.75, layer=2, direction="de-ar")
    results = examples.put(results, 0, "retrieval", 0.05, layer=2, direction="en-fr")
    panel = figures.matrices(results).panels[0]
    of = [row for row in results.rows if row.direction and row.layer == 2 and row.against is None]
    mean = np.mean([row.value for row in of if row.model == "base model"])
    assert f"mean {100 * mean:.1f}%" in panel.alt
    assert "highest 75.0% from German to Arabic, lowest 5.0% from English to French" in panel.alt


def test_projections_say_how_close_translations_lie(results):
    groups = figures.projections(results)
    assert [group.title for group in groups] == [model.name for model in results.models]
    assert [panel.title for panel in groups[0].panels] == ["0, embeddings", "2, aligned layer", "4, last layer"]
    points = results.models[0].projection[1].x
    same, other = [], []
    for code in points:
        if code == "en":
            continue
        distances = [[np.hypot(a[0] - b[0], a[1] - b[1]) for b in points[code]] for a in points["en"]]
        same.append(np.mean([distances[n][n] for n in range(6)]))
        other.append(np.mean([distances[n][m] for n in range(6) for m in range(6) if n != m]))
    assert f"Translations lie {np.mean(same) / np.mean(other):.2f} times as far apart" in groups[0].panels[1].alt


def test_an_aligned_layer_that_is_the_last_has_one_panel():
    results = examples.results(models=1, languages=3, layers=2)
    planes = [plane for plane in results.models[0].projection if plane.layer != 1]
    results = examples.with_model(results, 0, align_layer=2, projection=planes)
    assert [panel.title for panel in figures.projections(results)[0].panels] == ["0, embeddings", "2, last layer"]


def test_losses_are_of_models_that_were_trained(results):
    group = figures.losses(results)
    assert [panel.title for panel in group.panels] == ["Next token", "Contrastive", "Language matching"]
    assert [key.text for key in group.legend] == ["stage 1", "next-token only"]
    first, *_, last = results.models[1].training.validation
    expected = f"stage 1 from {first.contrastive:.3f} to {last.contrastive:.3f} at step {last.step}"
    assert expected in group.panels[1].alt and "next-token only" not in group.panels[1].alt
    assert figures.losses(examples.results(models=1)) is None


def test_losses_that_are_not_finite_leave_a_gap_in_their_curve(results):
    """As they are in metrics.jsonl: null."""
    training = results.models[1].training
    train, validation = list(training.train), list(training.validation)
    train[3], validation[-1] = (dataclasses.replace(of, contrastive=None) for of in (train[3], validation[-1]))
    of = examples.with_model(results, 1, training=rows.Training(train, validation, []))
    contrastive = figures.losses(of).panels[1]
    assert "to not finite at step 8" in contrastive.alt and contrastive.svg().startswith("<svg")


def test_no_two_models_or_languages_look_the_same():
    results = examples.results(models=6, languages=27, layers=2)
    assert len({key.colour for key in figures.model_keys(results)}) == 6
    assert len({(key.colour, key.shape) for key in figures.language_keys(results).values()}) == 27


def test_figures_are_deterministic_and_survive_json(results):
    def drawn(of):
        groups = [figures.depth(of), figures.by_language(of), figures.matrices(of), figures.projections(of)[0]]
        return [panel.svg() for group in groups for panel in group.panels]

    assert drawn(results) == drawn(rows.from_json(results.to_json().encode()))
