"""The pictures of the results: which there are, and that their words say the numbers they show."""

import json

import numpy as np
import pytest

from alignx_jax.evaluation import figures
from tests.evaluation import results_example


@pytest.fixture(scope="module")
def results():
    return results_example.build(models=3, languages=5, layers=4)


def test_depth_says_its_numbers(results):
    retrieval, probe, meaning, language = figures.depth(results).panels
    model = results["models"][1]
    curves = [both[way] for both in model["alignment"]["retrieval"].values() for way in both]
    mean = 100 * np.mean(curves, axis=0)
    expected = f"stage 1 {mean[0]:.1f}% at the embeddings, {mean[2]:.1f}% at the aligned layer 2, {mean[4]:.1f}% at the"
    assert expected in retrieval.alt and f"highest {mean.max():.1f}% at {mean.argmax()}" in retrieval.alt
    assert f"{100 * model['alignment']['language_probe'][4]:.1f}% at the last layer 4" in probe.alt
    for panel, key in ((meaning, "meaning_variance"), (language, "language_variance")):
        assert f"{100 * model['alignment'][key][4]:.1f}% at the last layer 4" in panel.alt
    assert (retrieval.note, probe.note) == ("chance: 0.2%", "chance: 20.0%")


def test_models_of_different_depths_share_a_scale_of_percent(results):
    other = results_example.build(models=1, languages=5, layers=8)["models"][0]
    mixed = {**results, "models": [*results["models"], {**other, "name": "deeper"}]}
    assert ">depth in %<" in figures.depth(mixed).panels[0].svg()
    assert ">layer (0: embeddings, 4: last)<" in figures.depth(results).panels[0].svg()


def test_measures_that_nobody_made_have_no_panel(results):
    keys = [panel.key for group in figures.measures(results) for panel in group.panels]
    assert {"dali", "in-prompt", "cosine-difference", "uniformity"} < set(keys) and len(keys) == len(set(keys))
    bare = results_example.build(models=1, languages=3, layers=2)
    bare["models"][0]["alignment"].update(dali=None, dali_strict=None, in_prompt=None)
    fewer = [panel.key for group in figures.measures(bare) for panel in group.panels]
    assert set(keys) - set(fewer) == {"dali", "dali-strict", "in-prompt"}


def test_curves_are_means_over_languages(results):
    model = results["models"][0]
    positive, negative = (list(model["alignment"][f"{kind}_cosine"].values()) for kind in ("positive", "negative"))
    curves = figures.curves(model)
    np.testing.assert_allclose(curves["cosine-difference"], np.mean(positive, axis=0) - np.mean(negative, axis=0))
    assert curves["total-variance"].tolist() == model["alignment"]["total_variance"]


def test_languages_are_sorted_by_the_first_model_and_only_others_change(results):
    values, changes = figures.by_language(results).panels
    first = results["models"][0]["intervals"]["retrieval"]
    order = sorted((code for code in first if code != "mean"), key=lambda code: -first[code][0])
    said = values.alt.split("base model ")[1].split(";")[0]
    assert said == ", ".join(f"{code} {100 * first[code][0]:.1f}%" for code in order)
    change = results["models"][1]["intervals"]["retrieval_change"][order[0]][0]
    assert "base model" not in changes.alt and f"stage 1 {order[0]} {100 * change:+.1f}" in changes.alt
    single = results_example.build(models=1, languages=3, layers=2)
    assert [panel.key for panel in figures.by_language(single).panels] == ["by-language"]


def test_a_matrix_says_its_extremes_without_its_diagonal(results):
    panel = figures.matrices(results).panels[0]
    codes, matrix = results["sentences"]["languages"], np.array(results["models"][0]["alignment"]["retrieval_matrix"])
    off = {(a, b): matrix[i, j] for i, a in enumerate(codes) for j, b in enumerate(codes) if a != b}
    assert f"mean {100 * np.mean(list(off.values())):.1f}%" in panel.alt
    assert f"lowest {100 * min(off.values()):.1f}%" in panel.alt and "100.0%" not in panel.alt


def test_projections_say_how_close_translations_lie(results):
    results = json.loads(json.dumps(results))
    for code, points in results["models"][0]["projection"]["2"]["x"].items():
        results["models"][0]["projection"]["2"]["x"][code] = points[:3]
    groups = figures.projections(results)
    assert [group.title for group in groups] == [model["name"] for model in results["models"]]
    assert [panel.title for panel in groups[0].panels] == ["0, embeddings", "2, aligned layer", "4, last layer"]
    points = results["models"][0]["projection"]["2"]["x"]
    same, other = [], []
    for code in points:
        if code == "en":
            continue
        distances = [[np.hypot(a[0] - b[0], a[1] - b[1]) for b in points[code]] for a in points["en"]]
        same.append(np.mean([distances[n][n] for n in range(3)]))
        other.append(np.mean([distances[n][m] for n in range(3) for m in range(3) if n != m]))
    assert f"Translations lie {np.mean(same) / np.mean(other):.2f} times as far apart" in groups[0].panels[1].alt


def test_an_aligned_layer_that_is_the_last_has_one_panel():
    results = results_example.build(models=1, languages=3, layers=2)
    model = results["models"][0]
    model["align_layer"] = 2
    del model["projection"]["1"]
    assert [panel.title for panel in figures.projections(results)[0].panels] == ["0, embeddings", "2, last layer"]


def test_losses_are_of_models_that_were_trained(results):
    group = figures.losses(results)
    assert [panel.title for panel in group.panels] == ["Next token", "Contrastive", "Language matching"]
    assert [key.text for key in group.legend] == ["stage 1", "next-token only"]
    record = results["models"][1]["training"]["validation"]
    expected = f"stage 1 from {record[0]['contrastive']:.3f} to {record[-1]['contrastive']:.3f} at step 400"
    assert expected in group.panels[1].alt and "next-token only" not in group.panels[1].alt
    assert figures.losses(results_example.build(models=1, languages=3, layers=2)) is None


def test_no_two_models_or_languages_look_the_same():
    results = results_example.build(models=6, languages=27, layers=2)
    assert len({key.colour for key in figures.model_keys(results)}) == 6
    assert len({(key.colour, key.shape) for key in figures.language_keys(results).values()}) == 27


def test_figures_are_deterministic_and_survive_json(results):
    def drawn(of):
        groups = [figures.depth(of), figures.by_language(of), figures.matrices(of), figures.projections(of)[0]]
        return [panel.svg() for group in groups for panel in group.panels]

    assert drawn(results) == drawn(json.loads(json.dumps(results)))


def test_losses_that_are_not_finite_leave_a_gap_in_their_curve():
    """As they are in metrics.jsonl: null."""
    results = results_example.build(models=2, languages=2, layers=2)
    training = results["models"][1]["training"]
    training["train"][7]["contrastive"] = training["validation"][-1]["contrastive"] = None
    for record in training["validation"]:
        record["language_matching"] = None
    _, contrastive, matching = figures.losses(results).panels
    assert "to not finite at step 400" in contrastive.alt and "from not finite to not finite" in matching.alt
    assert all(panel.svg().startswith("<svg") for panel in (contrastive, matching))
