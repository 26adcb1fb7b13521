"""Whose a stage's folder is: one run at a time, of one configuration unless changes are accepted."""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys

import pytest

from alignx_jax.config import Config, ObjectiveConfig, TrainingConfig, UserError, from_json
from alignx_jax.config import LanguageMatchingConfig as Matching
from alignx_jax.training import runs

CONFIG = Config(model="sample")


def test_a_second_run_is_refused_and_told_who_holds_the_folder(tmp_path):
    folder = tmp_path / "run" / "stage1"
    with runs.hold(folder):
        with (
            pytest.raises(
                UserError, match=rf"{folder} is in use by another run \(process {os.getpid()} on .* since 20"
            ),
            runs.hold(folder),
        ):
            pass
        with runs.hold(tmp_path / "run" / "stage2"):
            pass
    with runs.hold(folder):
        folder.mkdir()
    assert list((tmp_path / "run").iterdir()) == [folder]


def test_a_refused_run_leaves_nothing(tmp_path):
    with pytest.raises(UserError, match="no such file"), runs.hold(tmp_path / "runs" / "mine" / "stage1"):
        raise UserError("no such file")
    assert not list(tmp_path.iterdir())


def test_the_lock_ends_with_its_process(tmp_path):
    folder = tmp_path / "run" / "stage1"
    program = f"""
import pathlib, time
from alignx_jax.training import runs
with runs.hold(pathlib.Path({str(folder)!r})):
    print("held", flush=True)
    time.sleep(100)
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=f"process {process.pid} on"), runs.hold(folder):
            pass
        process.send_signal(signal.SIGKILL)
    with runs.hold(folder):
        pass


def begun(folder: pathlib.Path) -> pathlib.Path:
    runs.claim(folder, CONFIG, runs.find("sample"), {"sample": "abc"})
    return folder


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
