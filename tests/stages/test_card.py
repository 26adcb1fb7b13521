"""The model card: what a run's folders hold, and nothing that they do not."""

import dataclasses
import json
import pathlib
import shutil

import pytest
from huggingface_hub import ModelCard

from alignx_jax.config import Config, DataConfig, TrainingConfig
from alignx_jax.evaluation import folders
from alignx_jax.evaluation.rows import Results
from alignx_jax.evaluation.show import tables, verdict
from alignx_jax.exits import UserError
from alignx_jax.runs import lineage, loading, stage_folder
from alignx_jax.stages import card
from alignx_jax.training import checkpoints
from tests.evaluation import examples

LICENSED = "---\nlicense: other\nlicense_name: community\nlicense_link: LICENSE.txt\n---\n# Base\n"


@pytest.fixture
def run(tmp_path) -> pathlib.Path:
    """Two finished stages; the base model has a name, a README and its own folder."""
    base = pathlib.Path(shutil.copytree(loading.SAMPLE_MODEL, tmp_path / "models" / "base"))
    (base / "README.md").write_text(LICENSED, encoding="utf-8")
    settings = json.loads((base / "config.json").read_text(encoding="utf-8"))
    (base / "config.json").write_text(json.dumps(settings | {"_name_or_path": "house/Base-7b"}), encoding="utf-8")
    return finished(tmp_path, base)


def finished(tmp_path: pathlib.Path, base: pathlib.Path) -> pathlib.Path:
    """Both stages, from `base` on."""
    data = DataConfig(parallel=(str(tmp_path / "data" / "opus"),), cutoff=99)
    config = Config(run=str(tmp_path / "run"), data=data, training=TrainingConfig(steps=2))
    previous = base
    for stage in ("1", "2"):
        folder = tmp_path / "run" / f"stage{stage}"
        source = dataclasses.replace(loading.find(str(base)))
        sources = [{"kind": "parallel", "source": config.data.parallel[0], "records": 89}]
        facts = {"languages": ["de", "en"], "examples": 12345, "held_out": 67, "sources": sources}
        begun = lineage.Lineage(loading.find(str(previous)).origin(folder), ())
        stage_folder.claim(folder, dataclasses.replace(config, stage=stage, model=str(previous)), source, begun)
        (folder / "data.json").write_text(json.dumps(facts), encoding="utf-8")
        records = [{"kind": "validation", "step": s, "loss": loss} for s, loss in ((0, 1.0), (1, 2.25), (2, 3.5))]
        records += [{"kind": "train", "step": s, "loss": 2.0} for s in (1, 2)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
        for step, loss in ((1, 2.25), (2, 3.5)):
            (folder / "checkpoints" / f"{step}" / "decoder").mkdir(parents=True)
            (folder / "checkpoints" / f"{step}" / "decoder" / "array").write_text(f"{stage} {step}")
            checkpoints.Checkpoints(folder / "checkpoints")._mark(step, loss, {})
        previous = folder
    return tmp_path / "run"


def written(run: pathlib.Path) -> ModelCard:
    return ModelCard(card.text(loading.find(str(run / "stage2")), "python run.py --stage=export"))


def evaluation(run: pathlib.Path, step: int, name: str = "sample", **changes) -> Results:
    """Results of an evaluation of stage 2 at a step."""
    weights = checkpoints.Checkpoints(run / "stage2" / "checkpoints").digest(step, "decoder")
    results = dataclasses.replace(examples.results(models=2), **changes)
    results = examples.with_model(results, 1, path=str(run / "stage2"), step=step, weights=weights)
    (run / "evaluation" / name).mkdir(parents=True)
    (run / "evaluation" / name / "evaluation.json").write_text(results.to_json(), encoding="utf-8")
    return results


def test_metadata_stages_and_licence(run, tmp_path):
    found = written(run)
    assert found.data.to_dict() == {
        "language": ["de", "en"],
        "base_model": "house/Base-7b",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["alignx", "multilingual"],
        "license": "other",
        "license_name": "community",
        "license_link": "LICENSE.txt",
    }
    for text in (
        "`other`, `community`",
        "German (de), English (en)",
        "12,345 examples, 67 more",
        "| opus | parallel | 89 |",
    ):
        assert text in found.text
    for text in (
        "### Stage 1",
        "### Stage 2",
        "--data.cutoff 99",
        "--training.steps 2",
        "those of step 1, where",
        "total 2.250",
    ):
        assert text in found.text
    assert "not evaluated" in found.text and str(tmp_path) not in found.text and "--run" not in found.text


def test_measured_before_and_after(run, tmp_path):
    results = evaluation(run, 1)
    text = written(run).text
    before, after = results.models
    change = results.find(after, "retrieval", "aligned", against=before)
    shares = [f"{100 * results.find(model, 'retrieval', 'aligned').value:.1f}%" for model in results.models]
    shown = f"({100 * change.value:+.1f} [{100 * change.low:.1f}, {100 * change.high:.1f}])"
    assert f"| Retrieval, mean | {shares[0]} | {shares[1]} {shown} |" in text
    assert f"`{results.command}`, {results.date}" in text and "not evaluated" not in text
    cells = {line.count("|") for line in text.split("## Measured")[1].splitlines() if line.startswith("|")}
    assert cells == {4}  # of the heading, the rule below it and every row


def test_an_evaluation_of_other_weights_is_not_told(run):
    """Of the same stage at another step."""
    evaluation(run, 2)
    assert "not evaluated" in written(run).text


def test_every_evaluation_of_the_checkpoint_is_told(run):
    """By name, the oldest first; what is not whole is none."""
    evaluation(run, 1, "ntrex128-test", date="2026-11-25")
    evaluation(run, 1, "flores200-devtest", date="2026-11-24")
    evaluation(run, 1, ".half.partial")
    (run / "evaluation" / "half").mkdir()
    headings = [line for line in written(run).text.split("## Measured")[1].splitlines() if line.startswith("### ")]
    assert headings == ["### flores200-devtest", "### ntrex128-test"]


def test_a_validation_loss_that_is_not_finite_is_called_so(run):
    """As it is in metrics.jsonl: null."""
    file = run / "stage2" / "metrics.jsonl"
    file.write_text(file.read_text().replace('"loss": 2.25', '"loss": null, "next_token": 1.5'))
    assert "those of step 1, where the validation losses are total not finite, next token 1.500." in written(run).text


def test_what_is_exported_is_what_the_card_is_of(run):
    """Of a damaged best checkpoint, the one before it is exported; what was measured was the damaged one."""
    evaluation(run, 1)
    for stage in ("stage1", "stage2"):
        (run / stage / "checkpoints" / "1" / "decoder" / "array").write_bytes(b"Weights")
    text = written(run).text
    assert "the weights are those of step 2, where the validation losses are total 3.500." in text
    assert text.count("the weights are those of") == 1 and "step 1 has the best validation losses: total 2.250" in text
    assert "not evaluated" in text


def test_a_step_without_validation_is_named_alone(run):
    file = run / "stage2" / "metrics.jsonl"
    file.write_text("".join(line for line in file.read_text().splitlines(True) if '"validation"' not in line))
    assert "2 steps; the weights are those of step 1. The weights that it began with have" in written(run).text


def test_a_run_that_was_moved_has_the_same_card(run, tmp_path):
    evaluation(run, 1)
    before = written(run).text
    assert "### Stage 1" in before and "not evaluated" not in before
    assert written(run.rename(tmp_path / "moved")).text == before


def test_a_base_model_that_is_gone_and_says_nothing(tmp_path):
    run = finished(tmp_path, pathlib.Path(shutil.copytree(loading.SAMPLE_MODEL, tmp_path / "models" / "base")))
    shutil.rmtree(tmp_path / "models")
    found = written(run)
    assert found.data.base_model == "base" and found.data.license is None
    assert "without a README that names one" in found.text


@pytest.mark.parametrize("name", ["stage1/data.json", "evaluation/sample/evaluation.json"])
@pytest.mark.parametrize("content", [b'{"langu', b"[3]", b"{}", b"\xff", b"[" * 100_000])
def test_damaged_facts_are_one_sentence(run, tmp_path, name, content):
    evaluation(run, 1)
    (run / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"^{run / name} is damaged \(.*\); "):
        written(run)


def test_one_flipped_bit_in_a_key_of_the_facts_is_named(run):
    file = run / "stage1" / "data.json"
    for key, named in (("examples", "examples"), ("records", "sources.0.records")):
        flipped = file.read_text().replace(f'"{key}"', f'"{chr(ord(key[0]) ^ 1)}{key[1:]}"')
        original, _ = file.read_text(), file.write_text(flipped)
        with pytest.raises(
            UserError, match=rf"data.json is damaged \({named}: Field required\); start the stage again"
        ):
            written(run)
        file.write_text(original)


def places(found, path=()):
    """Every place in JSON, but for the entries of lists of numbers and texts."""
    for key, value in found.items() if isinstance(found, dict) else enumerate(found):
        yield (*path, key)
        if isinstance(value, dict) or (isinstance(value, list) and value and isinstance(value[0], dict)):
            yield from places(value, (*path, key))


def test_whatever_is_wrong_with_an_evaluation_is_one_sentence(tmp_path):
    """Each key taken away, and each value replaced: it can be shown all the same, or one sentence names the file."""
    results = json.loads(examples.results(models=3, languages=2, layers=2).to_json())
    shown = ("retrieval", "language_probe", "perplexity", "unknown_rate", "chrF++", "chrF++_above_floor", "distinct")
    kept = {(row[1], row[-1]): row for row in results["rows"] if row[0] == "stage 1" and row[1] in shown}
    results["rows"] = list(kept.values())
    for model in results["models"]:
        model["training"] = model["training"] and {kind: of[:1] for kind, of in model["training"].items()}
        model["projection"] = model["projection"][:1]
    text, refused = json.dumps(results), 0
    for path in [*places(results), *(("rows", n, column) for n in range(len(results["rows"])) for column in range(10))]:
        if path[:2] in (("models", 0), ("models", 2)):
            continue  # as models.1
        for wrong in (KeyError, None, "text"):
            damaged = json.loads(text)
            of = damaged
            for key in path[:-1]:
                of = of[key]
            if wrong is KeyError:
                del of[path[-1]]
            else:
                of[path[-1]] = wrong
            (tmp_path / "evaluation.json").write_text(json.dumps(damaged), encoding="utf-8")
            try:
                found = folders.read(tmp_path)
            except UserError as error:
                assert f"{error}".startswith(f"{tmp_path / 'evaluation.json'} is damaged (")
                refused += 1
                continue
            try:
                tables.overview(found), verdict.verdicts(found), verdict.warnings(found)
            except Exception as error:
                raise AssertionError(f"{path} = {wrong}") from error
    assert refused > 300
