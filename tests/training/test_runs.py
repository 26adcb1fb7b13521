"""Whose a stage's folder is, one run's of one configuration."""

import dataclasses
import json
import pathlib
import shutil

import huggingface_hub
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


def model(folder: pathlib.Path, **fields) -> pathlib.Path:
    shutil.copytree(runs.SAMPLE_MODEL, folder)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | fields))
    return folder


def gguf(folder):
    (folder / "model.gguf").write_bytes(b"GGUF\3\0\0\0")
    return folder / "model.gguf"


def gguf_folder(folder):
    return gguf(folder).parent


def adapters(folder):
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (folder / "adapter_model.safetensors").write_bytes(b"")
    return folder


def file_of_adapters(folder):
    return adapters(folder) / "adapter_model.safetensors"


def merged(folder):
    model(folder / "m")
    return adapters(folder / "m")


def file_of_a_model(folder):
    return model(folder / "m") / "model.safetensors"


def file_of_weights(folder):
    (folder / "model.safetensors").write_bytes(b"")
    return folder / "model.safetensors"


def cached(folder):
    for name in ("0123", "4567", "89ab"):
        model(folder / "models--a--b" / "snapshots" / name)
    (folder / "models--a--b" / "refs").mkdir()
    (folder / "models--a--b" / "refs" / "main").write_text("4567")
    return folder / "models--a--b"


def cache(folder):
    return cached(folder).parent


def empty_cache(folder):
    (folder / "models--a--b" / "snapshots").mkdir(parents=True)
    return folder / "models--a--b"


def folder_of_models(folder):
    model(folder / "m")
    return folder


def of_its_maker(folder):
    (folder / "params.json").write_text("{}")
    return folder


def archive(folder):
    (folder / "model.tar.gz").write_bytes(b"")
    return folder / "model.tar.gz"


def part_of_a_stage(folder):
    (begun(folder / "stage1") / "checkpoints" / "40").mkdir(parents=True)
    return folder / "stage1" / "checkpoints" / "40"


def lfs(folder):
    (model(folder / "m") / "tokenizer.model").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    return folder / "m"


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (gguf, "/model.gguf: a file of GGUF weights, .*; give the Hugging Face folder that they were made from$"),
        (gguf_folder, ": a folder of GGUF weights, .*; give the Hugging Face folder that they were made from$"),
        (adapters, ": adapters of PEFT .* without their model; export the run without --export.adapter, or merge"),
        (file_of_adapters, "safetensors: part of adapters of PEFT .*; export the run without --export.adapter"),
        (
            merged,
            "/m: adapters of PEFT .*; if its model.safetensors has them merged already, delete adapter_config.json",
        ),
        (file_of_a_model, "/m/model.safetensors: a file; give its folder, /.*/m$"),
        (file_of_weights, "/model.safetensors: a file of weights alone; download the whole model"),
        (cached, "/models--a--b: a folder of Hugging Face's cache; give the snapshot in it, .*/snapshots/4567$"),
        (cache, ": a cache of Hugging Face; give a folder of weights in it, such as .*/models--a--b/snapshots/4567$"),
        (empty_cache, "--a--b: a folder of Hugging Face's cache without a whole model; .* .hf download a/b.$"),
        (folder_of_models, ": a folder of folders; did you mean /.*/m[?]$"),
        (of_its_maker, r": a model in its maker's own layout \(params.json\); give its Hugging Face folder"),
        (archive, "/model.tar.gz: an archive; unpack it, and give the folder$"),
        (part_of_a_stage, "/40: neither a Hugging Face folder nor a stage of a run; did you mean /.*/stage1[?]$"),
        (lfs, "tokenizer.model is a pointer of Git LFS in the place of the file; run git lfs pull in /.*/m$"),
        (lambda f: model(f / "m", dtype="int8"), "/m/config.json: dtype is 'int8', which .*; set it to one of float32"),
    ],
)
def test_what_is_no_model_is_named_for_what_it_is(tmp_path, make, says):
    with pytest.raises(UserError, match=rf"^{tmp_path}.*{says}") as error:
        runs.find(str(make(tmp_path)))
    assert "\n" not in str(error.value)


def test_names_of_the_hub_are_named_as_such(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for name, says in {
        "house/Base-7b": r"no such folder; .*; a model on the Hub is downloaded before \(hf download house/Base-7b ",
        "nowhere": "no such folder; give a Hugging Face folder, a stage's folder of a run, or `sample`$",
        "../no/where": "no such folder; give a Hugging Face folder, a stage's folder of a run, or `sample`$",
        "https://huggingface.co/house/Base-7b": "an address; download the model",
        "s3://bucket/model": "an address; download the model",
    }.items():
        with pytest.raises(UserError, match=f"^{name}: {says}"):
            runs.find(name)
    snapshot = cached(tmp_path) / "snapshots" / "4567"
    with pytest.raises(UserError, match=rf"^a/b: no such folder; if it is the model on the Hub, .*cache, {snapshot}$"):
        runs.find("a/b")


def test_weights_are_looked_at_by_their_headers_alone(tmp_path):
    source = runs.find(str(model(tmp_path / "m")))
    source.check()
    data = (tmp_path / "m" / "model.safetensors").read_bytes()
    for content, says in {
        data[:-1]: "model.safetensors: truncated or damaged",
        b"version https://git-lfs.github.com/spec/v1\n": "model.safetensors is a pointer of Git LFS",
        None: "no weights; it needs model.safetensors",
    }.items():
        file = tmp_path / "m" / "model.safetensors"
        file.unlink() if content is None else file.write_bytes(content)
        with pytest.raises(UserError, match=says):
            source.check()
    (tmp_path / "m" / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match=r"pickled \.bin files, which can run code when read; convert them"):
        source.check()


def test_copies_in_a_stage_are_named_as_such(tmp_path):
    (begun(tmp_path / "stage1") / "checkpoints").mkdir()
    with pytest.raises(UserError, match=rf"the configuration and tokenizer of a stage; give .*, {tmp_path}/stage1$"):
        runs.find(str(tmp_path / "stage1" / "huggingface")).check()


@pytest.mark.parametrize("before", ["runs/x", "/elsewhere/runs/x"])
def test_a_stage_of_a_run_that_was_moved_begins_with_the_stage_beside_it(tmp_path, before):
    def start(model: str | None) -> str:
        config = dataclasses.replace(CONFIG, run=before, model=model)
        shutil.rmtree(tmp_path / "y" / "stage2", ignore_errors=True)
        runs.claim(tmp_path / "y" / "stage2", config, runs.find("sample"), {})
        return runs.Source("stage 2", runs.SAMPLE_MODEL, tmp_path / "y" / "stage2").start()

    assert start(f"{before}/stage1") == f"{before}/stage1", "none is there"
    begun(tmp_path / "y" / "stage1")
    assert start(f"{before}/stage1") == str(tmp_path / "y" / "stage1")
    assert start("/another/stage1") == "/another/stage1"
    assert start("sample") == "sample"
    with pytest.raises(UserError, match=r"stage2/config\.json: model: names none, and a stage began with one; mend it"):
        start(None)
