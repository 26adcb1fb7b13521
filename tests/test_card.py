"""The model card: what a run's folders hold, and nothing that they do not."""

import dataclasses
import json
import pathlib
import shutil

import pytest
from huggingface_hub import ModelCard

from alignx_jax import card
from alignx_jax.config import Config, DataConfig, TrainingConfig
from alignx_jax.exits import UserError
from alignx_jax.training import checkpoints, folders, lineage, runs
from tests.evaluation import results_example

LICENSED = "---\nlicense: other\nlicense_name: community\nlicense_link: LICENSE.txt\n---\n# Base\n"


@pytest.fixture
def run(tmp_path) -> pathlib.Path:
    """Two finished stages; the base model has a name, a README and its own folder."""
    base = pathlib.Path(shutil.copytree(runs.SAMPLE_MODEL, tmp_path / "models" / "base"))
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
        source = dataclasses.replace(runs.find(str(base)))
        sources = [{"kind": "parallel", "source": config.data.parallel[0], "records": 89}]
        facts = {"languages": ["de", "en"], "examples": 12345, "held_out": 67, "sources": sources}
        begun = lineage.Lineage(runs.find(str(previous)).origin(folder), ())
        folders.claim(folder, dataclasses.replace(config, stage=stage, model=str(previous)), source, begun)
        (folder / "data.json").write_text(json.dumps(facts), encoding="utf-8")
        records = [{"kind": "validation", "step": s, "loss": loss} for s, loss in ((0, 1.0), (1, 2.25), (2, 3.5))]
        records += [{"kind": "train", "step": s, "loss": 2.0} for s in (1, 2)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
        for step, loss in ((1, 2.25), (2, 3.5)):
            (folder / "checkpoints" / f"{step}" / "decoder").mkdir(parents=True)
            (folder / "checkpoints" / f"{step}" / "decoder" / "array").write_bytes(b"weights")
            checkpoints.Checkpoints(folder / "checkpoints")._mark(step, loss, {})
        previous = folder
    return tmp_path / "run"


def written(run: pathlib.Path) -> ModelCard:
    return ModelCard(card.text(runs.find(str(run / "stage2")), "python run.py --stage=export"))


def evaluation(run: pathlib.Path, steps: list[int]) -> dict:
    results = results_example.build(models=2)
    validations = [{"step": 0, "loss": 1.0}, {"step": 1, "loss": 2.25}, {"step": 2, "loss": 3.5}]
    history = {"train": [{"step": step, "loss": 2.0} for step in steps], "validation": validations}
    results["models"][1] |= {"path": str(run / "stage2"), "training": history}
    (run / "evaluation.json").write_text(json.dumps(results), encoding="utf-8")
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
    results = evaluation(run, [1, 2])
    text = written(run).text
    before, after = results["models"]
    value, low, high = after["intervals"]["retrieval_change"]["mean"]
    shares = [f"{100 * m['intervals']['retrieval']['mean'][0]:.1f}%" for m in (before, after)]
    change = f"({100 * value:+.1f} [{100 * low:.1f}, {100 * high:.1f}])"
    assert f"| Retrieval, mean | {shares[0]} | {shares[1]} {change} |" in text
    assert f"`{results['command']}`, {results['date']}" in text and "not evaluated" not in text
    cells = {line.count("|") for line in text.split("## Measured")[1].splitlines() if line.startswith("|")}
    assert cells == {4}  # of the heading, the rule below it and every row


def test_an_evaluation_of_earlier_weights_is_not_told(run, tmp_path):
    evaluation(run, [1])
    assert "not evaluated" in written(run).text


def test_what_is_exported_is_what_the_card_is_of(run):
    """Of a damaged best checkpoint, the one before it is exported; what was measured was the damaged one."""
    evaluation(run, [1, 2])
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
    evaluation(run, [1, 2])
    before = written(run).text
    assert "### Stage 1" in before and "not evaluated" not in before
    assert written(run.rename(tmp_path / "moved")).text == before


def test_a_base_model_that_is_gone_and_says_nothing(tmp_path):
    run = finished(tmp_path, pathlib.Path(shutil.copytree(runs.SAMPLE_MODEL, tmp_path / "models" / "base")))
    shutil.rmtree(tmp_path / "models")
    found = written(run)
    assert found.data.base_model == "base" and found.data.license is None
    assert "without a README that names one" in found.text


@pytest.mark.parametrize("name", ["stage1/data.json", "evaluation.json"])
@pytest.mark.parametrize("content", [b'{"langu', b"[3]", b"{}", b"\xff"])
def test_damaged_facts_are_one_sentence(run, tmp_path, name, content):
    (run / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"^{run / name} is damaged \(.*\); "):
        written(run)
