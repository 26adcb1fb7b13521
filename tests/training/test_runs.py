"""Whose a stage's folder is, one run's of one configuration; and what of a model's folder is handed on."""

import dataclasses
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import pytest

from alignx_jax.config import Config, LoraConfig, ObjectiveConfig, TrainingConfig
from alignx_jax.config import LanguageMatchingConfig as Matching
from alignx_jax.config_files import from_json
from alignx_jax.exits import UserError
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


def test_another_tokenizer_than_the_stage_was_begun_with_is_refused(tmp_path):
    model = pathlib.Path(shutil.copytree(runs.SAMPLE_MODEL, tmp_path / "model"))
    source, folder = runs.find(str(model)), tmp_path / "stage1"
    runs.claim(folder, CONFIG, source, {"sample": "abc"})
    runs.check_model(folder, source)
    (model / "tokenizer.model").write_bytes(b"another")
    with pytest.raises(UserError, match=r"model/tokenizer.model is not what .*stage1 was begun with"):
        runs.check_model(folder, source)


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


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "models--a" / "snapshots" / "0123"
    folder.mkdir(parents=True)
    for name in (
        "tokenizer.json",
        "LICENSE",
        "model.safetensors",
        "pytorch_model.bin",
        "modeling_own.py",
        "tf_model.h5",
    ):
        (folder / name).write_text(name)
    (tmp_path / "to").mkdir()
    return folder


def test_neither_weights_nor_code_are_handed_on(model, tmp_path):
    (tmp_path / "to" / "LICENSE").write_text("as it was")
    runs.copy_companions(model, tmp_path / "to")
    copied = {file.name: file.read_text() for file in (tmp_path / "to").iterdir()}
    assert copied == {"tokenizer.json": "tokenizer.json", "LICENSE": "as it was"}


def test_links_into_the_cache_are_followed_and_links_out_of_the_folder_refused(model, tmp_path):
    (tmp_path / "models--a" / "blobs").mkdir()
    (tmp_path / "models--a" / "blobs" / "4567").write_text("merges")
    (model / "merges.txt").symlink_to("../../blobs/4567")
    (model / "README.md").symlink_to("LICENSE")
    runs.copy_companions(model, tmp_path / "to")
    assert (tmp_path / "to" / "merges.txt").read_text() == "merges" and (tmp_path / "to" / "README.md").exists()
    (tmp_path / "id_rsa").write_text("secret")
    (model / "vocab.json").symlink_to(tmp_path / "id_rsa")
    with pytest.raises(UserError, match=r"vocab\.json is a link to .*id_rsa, out of the model's folder"):
        runs.copy_companions(model, tmp_path / "to")
    assert not (tmp_path / "to" / "vocab.json").exists()
