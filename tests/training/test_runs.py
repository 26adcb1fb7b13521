"""Whose a stage's folder is, one run's of one configuration."""

import dataclasses
import json
import pathlib

import pytest

from alignx_jax.config import Config, LoraConfig, ObjectiveConfig, TrainingConfig
from alignx_jax.config import LanguageMatchingConfig as Matching
from alignx_jax.config_files import from_json
from alignx_jax.exits import UserError
from alignx_jax.training import checkpoints, runs

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


@pytest.mark.parametrize(
    ("negatives", "stage", "mesh", "refused"),
    [
        ("micro-batch", "1", "2x1", True),
        ("micro-batch", "1", "2x4x1", False),
        ("micro-batch", "1", "8x2", False),
        ("micro-batch", "2", "2x1", False),
        ("global", "1", "2x1", False),
        ("step", "1", "2x1", False),
    ],
)
def test_a_mesh_on_which_other_pairs_meet_is_another_setting(tmp_path, negatives, stage, mesh, refused):
    """With negatives of a micro-batch a pair meets those of its own device alone."""
    objective = ObjectiveConfig(negatives=negatives)
    config = dataclasses.replace(CONFIG, stage=stage, mesh="8x1", objective=objective)
    runs.claim(tmp_path / "stage", config, runs.find("sample"), {})
    other = dataclasses.replace(config, mesh=mesh)
    if refused:
        with pytest.raises(UserError, match=r"mesh: 8x1 there, 2x1 here.*--accept-changes"):
            runs.can_continue(tmp_path / "stage", other, {})
    else:
        assert runs.can_continue(tmp_path / "stage", other, {})
    assert runs.can_continue(tmp_path / "stage", dataclasses.replace(other, accept_changes=True), {})


class Training:
    """Checkpoints of a run that deletes each before it is read, `times` times."""

    def __init__(self, times: int):
        self.left, self.best = times, 0

    def __call__(self, folder):
        return self

    def sound(self, which, parts):
        self.best += 1
        return self.best

    def restore_part(self, step, like):
        self.left -= 1
        if self.left >= 0:
            raise checkpoints.Deleted(f"{step}")
        return {name: step for name in like}


@pytest.fixture
def training(monkeypatch):
    def training(times: int) -> runs.Source:
        monkeypatch.setattr(runs, "Checkpoints", Training(times))
        monkeypatch.setattr(runs.sharding, "parameter_shardings", lambda tree, mesh: tree)
        return runs.Source("x", pathlib.Path("x"), pathlib.Path("x"))

    return training


def test_a_checkpoint_that_is_deleted_while_it_is_read_gives_way_to_the_next(training):
    source = training(2)
    assert source._restore("decoder", {}, None, None) == source._restore("classifier", {}, None, None) == 3


def test_a_run_that_deletes_faster_than_it_is_read_is_told(training):
    with pytest.raises(UserError, match=r"was deleted while it was read: x is still being trained; give the same"):
        training(9)._restore("decoder", {}, None, None)


def test_parts_of_different_checkpoints_are_never_read(training, monkeypatch):
    source = training(0)
    assert source._restore("decoder", {}, None, None) == 1
    runs.Checkpoints.left = 1
    with pytest.raises(UserError, match="was deleted while it was read"):
        source._restore("classifier", {}, None, None)


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
