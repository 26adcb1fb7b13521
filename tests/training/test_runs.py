"""Whose a stage's folder is, one run's of one configuration."""

import dataclasses
import json
import pathlib

import pytest

from alignx_jax.config import Config, LoraConfig, ObjectiveConfig, TrainingConfig
from alignx_jax.config import LanguageMatchingConfig as Matching
from alignx_jax.config_files import from_json
from alignx_jax.exits import UserError
from alignx_jax.training import runs

CONFIG = Config(model="sample")


def begun(folder: pathlib.Path) -> pathlib.Path:
    runs.claim(folder, CONFIG, runs.find("sample"), {"sample": "abc"})
    return folder


@pytest.mark.parametrize("content", [b'{"sam', b"[3]", b"\xff", None])
def test_damaged_fingerprints_are_one_sentence(tmp_path, content):
    file = begun(tmp_path / "stage1") / "corpora.json"
    file.unlink() if content is None else file.write_bytes(content)
    with pytest.raises(UserError, match=r"corpora.json is damaged"):
        runs.can_continue(tmp_path / "stage1", CONFIG, {"sample": "abc"})


def test_other_settings_are_refused_unless_accepted(tmp_path):
    folder, corpora = begun(tmp_path / "stage1"), {"sample": "abc"}
    longer = dataclasses.replace(CONFIG, training=TrainingConfig(epochs=3.0))
    with pytest.raises(UserError, match=r"training.epochs: 2.0 there, 3.0 here.*--accept-changes"):
        runs.can_continue(folder, longer, corpora)
    with pytest.raises(UserError, match=r"other content of sample; .*--accept-changes"):
        runs.can_continue(folder, CONFIG, {"sample": "abd"})
    assert not list(folder.glob("*.1.json"))
    assert runs.can_continue(folder, dataclasses.replace(longer, accept_changes=True), {"sample": "abd"})
    assert from_json((folder / "config.1.json").read_text(), "") == CONFIG
    assert json.loads((folder / "corpora.1.json").read_text()) == corpora
    assert from_json((folder / "config.json").read_text(), "") == longer, "the permission is not a setting"
    assert runs.can_continue(folder, longer, {"sample": "abd"})
    assert runs.can_continue(folder, dataclasses.replace(longer, accept_changes=True), {"sample": "abd"})
    assert len(list(folder.glob("config.*.json"))) == 1, "nothing changed, nothing kept"


def matching(**settings) -> Config:
    objective = ObjectiveConfig(language_matching=Matching(**settings))
    return dataclasses.replace(CONFIG, objective=objective, accept_changes=True)


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (dataclasses.replace(CONFIG, model="other", accept_changes=True), "model"),
        (matching(width=64), "objective.language_matching.width"),
        (matching(weight=0.0), "objective.language_matching.weight"),
        (
            dataclasses.replace(
                CONFIG, accept_changes=True, optimizer=dataclasses.replace(CONFIG.optimizer, moment_dtype="bfloat16")
            ),
            "optimizer.moment_dtype",
        ),
        (dataclasses.replace(CONFIG, accept_changes=True, lora=LoraConfig(rank=8)), "lora.rank"),
        (dataclasses.replace(CONFIG, accept_changes=True, lora=LoraConfig(targets="q_proj")), "lora.targets"),
    ],
)
def test_what_the_arrays_depend_on_cannot_be_changed(tmp_path, config, name):
    folder = begun(tmp_path / "stage1")
    with pytest.raises(UserError, match=rf"--accept-changes cannot change {name} \("):
        runs.can_continue(folder, config, {"sample": "abc"})
    assert not list(folder.glob("*.1.json"))


def test_a_factor_can_be_changed(tmp_path):
    folder = begun(tmp_path / "stage1")
    assert runs.can_continue(folder, matching(weight=0.1), {"sample": "abc"})
