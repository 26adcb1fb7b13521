"""One evaluation as a whole: what it compares with what, and that its rows are what the report reads."""

import dataclasses
import hashlib
import importlib.metadata
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

from alignx_jax import sharding
from alignx_jax.config import (
    Config,
    ContrastiveConfig,
    DataConfig,
    EvaluationConfig,
    LanguageMatchingConfig,
    ObjectiveConfig,
    TrainingConfig,
)
from alignx_jax.config import TranslationConfig as Translation
from alignx_jax.config_files import to_json
from alignx_jax.data import pipeline, tokenizer
from alignx_jax.evaluation import folders, rows
from alignx_jax.evaluation.measure import alignment, evaluate, harness, metrics, statistics
from alignx_jax.evaluation.measure.measured import Measured
from alignx_jax.evaluation.show import report
from alignx_jax.exits import UserError
from alignx_jax.runs import loading
from tests.evaluation import examples

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
            sentences="sample",
            languages=CODES,
            limit=12,
            rows=4,
            in_prompt=True,
            choices=(choices,),
            resamples=100,
            translation=Translation(directions=("de-en", "en-zh"), limit=3, max_tokens=6, rows=4),
        ),
    )


def _source(path: str) -> loading.Source:
    return loading.find(path)


@pytest.fixture(scope="module")
def twin(tmp_path_factory):
    """A copy of the sample model whose last norm is scaled: other probabilities, the same states below it."""
    import safetensors.numpy

    folder = tmp_path_factory.mktemp("twin") / "model"
    shutil.copytree(loading.SAMPLE_MODEL, folder)
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
        found = evaluate.evaluate(
            config, evaluate.check(config), models, mesh, lambda *told: heard.append(told), "python run.py"
        )
    assert all(0 <= done <= total for _, done, total in heard)
    assert {name.rpartition(": ")[2] for name, *_ in heard} >= {"perplexity", "sentence vectors", "translation"}
    return rows.from_json(found.to_json().encode())


def test_all_that_is_measured_is_shown(results, tmp_path):
    """The examples that the tests of the page have are of the same measures."""
    example = {row.measure for row in examples.results(models=2).rows if not row.measure.startswith("tasks")}
    measures = {row.measure for row in results.rows if not row.measure.startswith("spBLEU")}
    assert measures == example - {"matching_head_balanced", "spBLEU (flores200)"}
    (tmp_path / "evaluation.json").write_text(results.to_json(), encoding="utf-8")
    assert folders.read(tmp_path) == results
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
    one = results.models[0]
    assert one.align_layer == 4
    assert results.sentences.languages == list(CODES) == list(sentences)
    both = (hits[1:, 0].astype(float) + hits[0, 1:]) / 2
    counts = statistics.bootstrap_counts(12, 100, 0)
    for code, values in (("de", both[0]), ("zh", both[1]), (None, both.mean(axis=0))):
        row = results.find(one, "retrieval", "aligned", language=code)
        np.testing.assert_allclose(row[5:8], statistics.mean(values, counts).triple(), atol=1e-6)
        assert row.n == 12
    assert [results.find(one, "unknown_rate", language=code).value for code in CODES] == [0, 0, 0]
    assert 2.0e6 < one.parameters < 2.2e6
    for name in ("dali", "dali_strict"):
        assert results.values("language", name) == ["de"] and results.curve(one, name).shape == (9,)
        assert results.find(one, name, 4).value == results.find(one, name, 4, language="de").value
    assert results.values("language", "in_prompt") == ["de", "zh"]
    assert set(results.values("language", "choices")) == {"de", "en", rows.OTHERS}
    assert (
        one.training is None
        and results.tasks == {}
        and "matching_head_balanced" not in {r.measure for r in results.rows}
    )


def test_changes_are_against_the_first_model_and_paired(results):
    base, twin = results.models
    assert results.baseline == base.name != twin.name and results.base is base
    assert {row.model for row in results.rows if row.against} == {twin.name}
    # Below the last norm the two are one model: no difference, whatever is resampled.
    for code in (None, "de", "zh"):
        assert results.find(twin, "retrieval", "aligned", language=code, against=base)[5:8] == (0, 0, 0)
    np.testing.assert_array_equal(results.curve(twin, "retrieval"), results.curve(base, "retrieval"))
    for code in CODES:
        change = results.find(twin, "bits_per_byte", language=code, against=base)
        after, before = (results.find(model, "bits_per_byte", language=code).value for model in (twin, base))
        assert change.value == pytest.approx(after - before, abs=1e-5) and change.low <= change.value <= change.high
    # Six tokens are too few for these sentences: what was cut off is counted, and told.
    assert results.find(base, "cut", direction="en-zh").value == 1
    expected = "more than 5% of the outputs were cut off at --evaluation.translation.max-tokens=6"
    assert sum(expected in note for note in results.notes) == 2
    # The scale of the logits moves no maximum: the translations are the same.
    assert results.translation.samples and all(len(set(s.outputs.values())) == 1 for s in results.translation.samples)
    assert results.find(twin, "chrF++", direction="en-x", against=base)[5:8] == (0, 0, 0)


def test_a_run_is_looked_at_where_it_was_aligned(config, tmp_path):
    def stage(name: str, layer: int | None) -> loading.Source:
        folder = tmp_path / name / "stage1"
        (folder / "huggingface").mkdir(parents=True)
        shutil.copy(loading.SAMPLE_MODEL / "config.json", folder / "huggingface")
        objective = ObjectiveConfig(contrastive=ContrastiveConfig(layer=layer))
        (folder / "config.json").write_text(to_json(dataclasses.replace(config, stage="1", objective=objective)))
        return loading.Source("stage 1", folder / "huggingface", folder)

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
    unknown = dataclasses.replace(config, objective=ObjectiveConfig(contrastive=ContrastiveConfig(layer="auto")))
    assert [model.align_layer for model in evaluate.subjects(unknown, [base, late])] == [6, 6]
    alone = evaluate.subjects(unknown, [base])
    assert [model.align_layer for model in alone] == [4]
    material = evaluate.Material({}, {}, {}, [], {}, None, ())
    (note,) = evaluate.notes(unknown, material, alone)
    assert "measured at half of the depth; --objective.contrastive.layer=N" in note
    assert evaluate.notes(unknown, material, found) == [] == evaluate.notes(asked, material, alone)


def test_a_template_that_a_run_was_not_trained_with_is_told(config, tmp_path):
    (tmp_path / "huggingface").mkdir()
    shutil.copy(loading.SAMPLE_MODEL / "config.json", tmp_path / "huggingface")
    other = dataclasses.replace(config, data=dataclasses.replace(config.data, template="alpaca"))
    (tmp_path / "config.json").write_text(to_json(other))
    material = evaluate.check(config)
    models = evaluate.subjects(
        config, [_source("sample"), loading.Source("stage 1", tmp_path / "huggingface", tmp_path)]
    )
    (note,) = evaluate.notes(config, material, models)
    assert note.startswith("stage 1 was trained with the template alpaca and is asked with sample (--data.template)")
    assert evaluate.notes(other, material, models) == []
    silent = dataclasses.replace(config, evaluation=dataclasses.replace(config.evaluation, in_prompt=False))
    assert evaluate.notes(silent, dataclasses.replace(material, directions=[]), models) == []


def test_tasks_whose_prompts_were_cut_are_told(results):
    def told(tasks: harness.Tasks | None) -> list[str]:
        return evaluate._notes_on_tasks(Measured(results.models[0], {}, None, tasks))

    (note,) = told(harness.Tasks({}, {}, 2048, {"a": [0, 9], "b": [3, 1200]}))
    assert note.startswith(f"{results.models[0].name}: ") and note.endswith("longer than 2,048 tokens: b 3 of 1,200.")
    assert told(None) == []


def test_versions_and_sentences_are_written_down(config, results, monkeypatch):
    assert results.versions == evaluate.versions()
    assert list(results.versions) == [
        *("alignx_jax", "python", "jax", "flax", "transformers", "sacrebleu", "py3langid", "lm_eval", "numpy")
    ]
    text = (pathlib.Path(__file__).parents[3] / "pyproject.toml").read_text(encoding="utf-8")
    assert f'\nversion = "{results.versions["alignx_jax"]}"\n' in text

    def of(limit, translated):
        options = dataclasses.replace(config.evaluation, limit=limit, translation=Translation(limit=translated))
        return evaluate._digest(evaluate.check(dataclasses.replace(config, evaluation=options)))

    sentences = {code: lines[:12] for code, lines in pipeline.multiway("sample", CODES).items()}
    ordered = {code: sentences[code] for code in sorted(sentences)}
    expected = hashlib.sha256(json.dumps(ordered, ensure_ascii=False).encode()).hexdigest()
    assert results.sentences.sha256 == expected == of(12, 3) == of(6, 12) != of(13, 3)

    def version(name):
        if name == "lm_eval":
            raise importlib.metadata.PackageNotFoundError(name)
        return "1"

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert "lm_eval" not in evaluate.versions() and evaluate.versions()["numpy"] == "1"
    monkeypatch.setattr(pathlib.Path, "is_file", lambda _: False)  # a wheel has no pyproject.toml
    assert evaluate.versions()["alignx_jax"] == "1"


def test_items_are_those_in_the_languages_of_the_sentences(config, choices, tmp_path):
    assert set(evaluate.check(config).choices) == {"en", "de"}
    others = dataclasses.replace(config.evaluation, languages=("fr", "zh"), pivot="zh", translation=Translation())
    assert set(evaluate.check(dataclasses.replace(config, evaluation=others)).choices) == {"en"}
    lines = pathlib.Path(choices).read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "de.jsonl").write_text("".join(line for line in lines if '"de"' in line), encoding="utf-8")
    others = dataclasses.replace(others, choices=(str(tmp_path / "de.jsonl"),))
    with pytest.raises(UserError, match=r"choices: items in de, but sentences in zh, fr, en"):
        evaluate.check(dataclasses.replace(config, evaluation=others))


def test_english_is_always_measured_and_translated_where_it_is_asked_for(config, tmp_path):
    def check(pivot, languages, sentences="sample"):
        options = dataclasses.replace(config.evaluation, pivot=pivot, languages=languages, choices=())
        options = dataclasses.replace(options, sentences=str(sentences), translation=Translation())
        return evaluate.check(dataclasses.replace(config, evaluation=options))

    found = check("de", ("fra",))
    assert list(found.sentences) == ["de", "fr", "en"] and not found.notes
    assert found.directions == [("de", "fr"), ("fr", "de")]
    assert ("de", "en") in check("de", ("fr", "en")).directions
    lines = [{"de": f"{n} eins", "fr": f"{n} un", **({"en": "one"} if n else {})} for n in range(6)]
    (tmp_path / "ways.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    found = check("de", ("fr",), tmp_path / "ways.jsonl")
    assert list(found.sentences) == ["de", "fr"] and len(found.sentences["de"]) == 6
    (note,) = found.notes
    assert note.startswith(f"{tmp_path / 'ways.jsonl'} has no English for these lines: ")
    found = check("de", (), tmp_path / "ways.jsonl")
    assert list(found.sentences) == ["de", "en", "fr"] and "1 of the 6 lines" in found.notes[0]


def test_the_control_of_a_run_is_what_is_trained_alike_without_the_pair_losses(config, tmp_path):
    def stage(name: str, weight: float, **changes) -> evaluate.Subject:
        folder = tmp_path / name
        (folder / "huggingface").mkdir(parents=True)
        losses = {"contrastive": ContrastiveConfig(weight=weight, layer=4)}
        losses["language_matching"] = LanguageMatchingConfig(weight=weight)
        trained = dataclasses.replace(config, stage="1", run=name, objective=ObjectiveConfig(**losses))
        (folder / "config.json").write_text(to_json(dataclasses.replace(trained, **changes)))
        return evaluate.Subject(loading.Source(name, folder / "huggingface", folder), 4, 8)

    base = evaluate.Subject(_source("sample"), 4, 8)
    ours, control, longer, other, second = (
        stage("ours", 0.3),
        stage("control", 0.0),
        stage("longer", 0.0, training=TrainingConfig(steps=9)),
        stage("other", 0.0, seed=1),
        stage("stage2", 0.0, stage="2"),
    )
    assert evaluate.controls([base, ours, second, longer, other, control]) == [(1, 5)]
    assert evaluate.controls([control, ours]) == [], "the baseline is compared with anyway"
    assert evaluate.controls([base, control, longer]) == []
