"""One evaluation as a whole: what it compares with what, and that its record is what the report reads."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from alignx_jax import sharding
from alignx_jax.config import Config, ContrastiveConfig, DataConfig, EvaluationConfig, ObjectiveConfig, TrainingConfig
from alignx_jax.config import TranslationConfig as Translation
from alignx_jax.config_files import to_json
from alignx_jax.data import pipeline, tokenizer
from alignx_jax.evaluation import alignment, evaluate, metrics, report, statistics
from alignx_jax.exits import UserError
from alignx_jax.training import runs
from tests.evaluation import results_example

CODES = ("en", "de", "zh")


@pytest.fixture(scope="module")
def choices(tmp_path_factory):
    """Items of two languages; the third is not the same in both."""
    file = tmp_path_factory.mktemp("choices") / "items.jsonl"
    texts = {
        "en": ("The dog sleeps.", "It is tired.", "It is red."),
        "de": ("Der Hund schläft.", "Er ist müde.", "Er ist rot."),
    }
    with file.open("w", encoding="utf-8") as lines:
        for lang, (premise, *options) in texts.items():
            for idx in range(3):
                item = {"premise": premise, "choice1": options[idx % 2], "choice2": options[1 - idx % 2]}
                item |= {
                    "question": "cause",
                    "label": idx % 2,
                    "lang": lang,
                    "idx": idx if idx < 2 or lang == "en" else 9,
                }
                lines.write(json.dumps(item, ensure_ascii=False) + "\n")
    return str(file)


@pytest.fixture(scope="module")
def config(choices) -> Config:
    return Config(
        data=DataConfig(template="sample", row_length=64),
        training=TrainingConfig(compute_dtype="float32"),
        evaluation=EvaluationConfig(
            languages=CODES,
            limit=12,
            rows=4,
            in_prompt=True,
            choices=(choices,),
            resamples=100,
            translation=Translation(directions=("de-en", "en-zh"), limit=3, max_tokens=6, rows=4),
        ),
    )


def _source(path: str) -> runs.Source:
    return runs.find(path)


@pytest.fixture(scope="module")
def twin(tmp_path_factory):
    """A copy of the sample model whose last norm is scaled: other probabilities, the same states below it."""
    import safetensors.numpy

    folder = tmp_path_factory.mktemp("twin") / "model"
    shutil.copytree(runs.SAMPLE_MODEL, folder)
    file = folder / "model.safetensors"
    weights = safetensors.numpy.load_file(file)
    weights["model.norm.weight"] = (weights["model.norm.weight"] * 0.5).astype(weights["model.norm.weight"].dtype)
    safetensors.numpy.save_file(weights, file, metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def results(config, twin):
    mesh, heard = sharding.make_mesh("2x1"), []
    with jax.set_mesh(mesh):
        models = evaluate.subjects(config, [_source("sample"), _source(str(twin))])
        found = evaluate.evaluate(config, evaluate.check(config), models, mesh, lambda *told: heard.append(told))
    assert all(0 <= done <= total for _, done, total in heard)
    assert {name.rpartition(": ")[2] for name, *_ in heard} >= {"perplexity", "sentence vectors", "translation"}
    return json.loads(json.dumps(found)) | {"command": "python run.py"}


def test_the_record_has_all_that_the_report_reads(results, tmp_path):
    example = results_example.build(models=2)
    assert results.keys() == example.keys()
    for ours, theirs in zip(results["models"], example["models"], strict=True):
        assert ours.keys() >= theirs.keys() - {"layers_measured"}
        assert ours["alignment"].keys() >= theirs["alignment"].keys()
        assert ours["intervals"].keys() >= {k for k, v in theirs["intervals"].items() if v}
        assert ours["translation"].keys() == theirs["translation"].keys()
    page = report.write(results, tmp_path).read_text(encoding="utf-8")
    assert "Retrieval" in page and "chrF++" in page
    report.to_tensorboard(results, tmp_path / "board")
    assert report.terminal_table(results).row_count > 10


def test_numbers_are_those_of_the_measures(config, results):
    sentences = {code: lines[:12] for code, lines in pipeline.multiway("sample", CODES).items()}
    mesh = sharding.make_mesh("1x1")
    source = _source("sample")
    with jax.set_mesh(mesh):
        vectors = alignment.sentence_vectors(
            source.load(mesh),
            tokenizer.load(source.huggingface),
            sentences,
            mesh,
            rows=2,
            row_length=64,
            dtype="float32",
        )
    hits = np.asarray(metrics.retrieval_hits(vectors.mean[4]))
    one = results["models"][0]
    assert one["align_layer"] == 4
    assert results["sentences"]["languages"] == list(CODES) == list(sentences)
    both = (hits[1:, 0].astype(float) + hits[0, 1:]) / 2
    counts = statistics.bootstrap_counts(12, 100, 0)
    for code, values in (("de", both[0]), ("zh", both[1]), ("mean", both.mean(axis=0))):
        expected = statistics.mean(values, counts).triple()
        np.testing.assert_allclose(one["intervals"]["retrieval"][code], expected, atol=1e-6)
    assert one["unknown_rate"] == {"de": 0, "en": 0, "zh": 0}
    assert 2.0e6 < one["parameters"] < 2.2e6
    for name in ("dali", "dali_strict"):
        assert set(one["alignment"][name]) == {"de"} and len(one["alignment"][name]["de"]) == 9
        assert one["intervals"][name]["mean"][0] == one["alignment"][name]["de"][4]
    assert set(one["alignment"]["in_prompt"]) == {"de", "zh"}
    assert set(one["choices"]) == {"de", "en"}
    assert one["alignment"]["matching_head"] is None and one["training"] is None and one["tasks"] is None


def test_changes_are_against_the_first_model_and_paired(results):
    base, twin = results["models"]
    assert results["baseline"] == base["name"] != twin["name"]
    assert not any(name.endswith("_change") for name in base["intervals"])
    # Below the last norm the two are one model: no difference, whatever is resampled.
    assert twin["alignment"]["retrieval"] == base["alignment"]["retrieval"]
    assert set(map(tuple, twin["intervals"]["retrieval_change"].values())) == {(0, 0, 0)}
    for code in CODES:
        value, low, high = twin["intervals"]["bits_per_byte_change"][code]
        change = twin["perplexity"][code]["bits_per_byte"][0] - base["perplexity"][code]["bits_per_byte"][0]
        assert value == pytest.approx(change) and low <= value <= high
    # The scale of the logits moves no maximum: the translations are the same.
    assert [s["output"] for s in twin["translation"]["samples"]] == [
        s["output"] for s in base["translation"]["samples"]
    ]
    assert twin["translation"]["averages"]["en-x"]["chrF++_change"] == [0, 0, 0]


def test_a_run_is_looked_at_where_it_was_aligned(config, tmp_path):
    def stage(name: str, layer: int | None) -> runs.Source:
        folder = tmp_path / name / "stage1"
        (folder / "huggingface").mkdir(parents=True)
        shutil.copy(runs.SAMPLE_MODEL / "config.json", folder / "huggingface")
        objective = ObjectiveConfig(contrastive=ContrastiveConfig(layer=layer))
        (folder / "config.json").write_text(to_json(dataclasses.replace(config, stage="1", objective=objective)))
        return runs.Source("stage 1", folder / "huggingface", folder)

    base, early, late = _source("sample"), stage("a", 2), stage("b", 6)
    found = evaluate.subjects(config, [base, early, late])
    assert [model.align_layer for model in found] == [2, 2, 6]
    assert [model.source.name for model in found] == ["sample", str(early.run), str(late.run)]
    asked = dataclasses.replace(config, objective=ObjectiveConfig(contrastive=ContrastiveConfig(layer=3)))
    assert [model.align_layer for model in evaluate.subjects(asked, [base, early])] == [3, 2]
    assert [model.align_layer for model in evaluate.subjects(config, [base])] == [4]
    beyond = dataclasses.replace(config, objective=ObjectiveConfig(contrastive=ContrastiveConfig(layer=9)))
    with pytest.raises(UserError, match="layer=9: the model has 8 layers"):
        evaluate.subjects(beyond, [base])


def test_items_are_those_in_the_languages_of_the_sentences(config, choices):
    assert set(evaluate.check(config).choices) == {"en", "de"}
    others = dataclasses.replace(config.evaluation, languages=("fr", "zh"), pivot="zh", translation=Translation())
    with pytest.raises(UserError, match=r"choices: items in de, en, but sentences in zh, fr"):
        evaluate.check(dataclasses.replace(config, evaluation=others))
