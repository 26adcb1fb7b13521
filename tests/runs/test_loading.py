"""Models on disk: what is found, what is refused, and what is read while it is trained."""

import json
import pathlib
import shutil

import huggingface_hub
import pytest

from alignx_jax.config import Config
from alignx_jax.exits import UserError
from alignx_jax.runs import lineage, loading, stage_folder
from alignx_jax.training import checkpoints

CONFIG = Config(model="sample")


def begun(folder: pathlib.Path) -> pathlib.Path:
    source = loading.find("sample")
    stage_folder.claim(folder, CONFIG, source, lineage.Lineage(source.origin(folder), ()))
    return folder


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
    def training(times: int) -> loading.Source:
        monkeypatch.setattr(loading, "Checkpoints", Training(times))
        monkeypatch.setattr(loading.sharding, "parameter_shardings", lambda tree, mesh: tree)
        return loading.Source("x", pathlib.Path("x"), pathlib.Path("x"))

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
    loading.Checkpoints.left = 1
    with pytest.raises(UserError, match="was deleted while it was read"):
        source._restore("classifier", {}, None, None)


def model(folder: pathlib.Path, **fields) -> pathlib.Path:
    shutil.copytree(loading.SAMPLE_MODEL, folder)
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
        loading.find(str(make(tmp_path)))
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
            loading.find(name)
    snapshot = cached(tmp_path) / "snapshots" / "4567"
    with pytest.raises(UserError, match=rf"^a/b: no such folder; if it is the model on the Hub, .*cache, {snapshot}$"):
        loading.find("a/b")


def test_weights_are_looked_at_by_their_headers_alone(tmp_path):
    source = loading.find(str(model(tmp_path / "m")))
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
        loading.find(str(tmp_path / "stage1" / "huggingface")).check()
