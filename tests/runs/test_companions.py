"""What of a model's folder is handed on, and whether it is still what a stage was begun with."""

import json
import pathlib
import shutil

import jax.numpy as jnp
import ml_dtypes
import pytest
import safetensors.numpy
import transformers

from alignx_jax import sharding
from alignx_jax.config import Config
from alignx_jax.exits import UserError
from alignx_jax.runs import companions, loading, stage_folder
from alignx_jax.runs.lineage import Lineage


def claim(folder: pathlib.Path, source: loading.Source) -> None:
    stage_folder.claim(folder, Config(), source, Lineage(source.origin(folder), ()))


def test_another_tokenizer_than_the_stage_was_begun_with_is_refused(tmp_path):
    model = pathlib.Path(shutil.copytree(loading.SAMPLE_MODEL, tmp_path / "model"))
    (model / "README.md").write_text("Trained.")
    source, folder = loading.find(str(model)), tmp_path / "stage1"
    claim(folder, source)
    (model / "README.md").write_text("Trained for long.")  # says more, and is the same model
    companions.check(folder, model)
    (model / "tokenizer.model").write_bytes(b"another")
    with pytest.raises(UserError, match=r"model/tokenizer.model is not what .*stage1 was begun with"):
        companions.check(folder, model)


HANDED_ON = {"config.json", "tokenizer.json", "tokenizer.model.v3", "chat_template.jinja", "LICENSE", "Use_Policy.md"}
KEPT = {"model.safetensors", "pytorch_model.bin", "modeling_own.py", "tf_model.h5"}
KEPT |= {"credentials.json", "notes.zip", ".env", "tokenizer.py", "license_keys.json"}


def _flipped(folder: pathlib.Path) -> None:
    content = bytearray((folder / "tokenizer.model").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "tokenizer.model").write_bytes(content)


DAMAGE = {
    "tokenizer.model": _flipped,
    "config.json": lambda folder: (folder / "config.json").write_text(
        (folder / "config.json").read_text().replace("10000.0", "10001.0")
    ),
    "tokenizer_config.json": lambda folder: (folder / "tokenizer_config.json").unlink(),
    "merges.txt": lambda folder: (folder / "merges.txt").write_text("a b"),
    "SHA256SUMS": lambda folder: (folder / "SHA256SUMS").write_bytes(b"\xff"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_copy_that_has_changed_is_refused_wherever_it_is_read(tmp_path, monkeypatch, name):
    """And the model, which has not, is not blamed."""
    folder, copies = tmp_path / "stage1", tmp_path / "stage1" / "huggingface"
    claim(folder, loading.find("sample"))
    monkeypatch.setattr(loading, "_check_finished", lambda folder: None)
    before = loading.find(str(folder))
    companions.check(folder, loading.SAMPLE_MODEL)
    DAMAGE[name](copies)
    for read in (lambda: loading.find(str(folder)), lambda: companions.check(folder, loading.SAMPLE_MODEL)):
        with pytest.raises(UserError, match=rf"^{copies / name} is (not what was copied there|damaged).*; "):
            read()
    (copies / "SHA256SUMS").unlink()  # as a stage has it that was begun before there were checksums
    assert loading.find(str(folder)) == before


@pytest.mark.parametrize(("name", "says"), [("merges.txt", "was not there when"), ("tokenizer.model", "is not what")])
def test_a_model_with_a_file_more_or_less_is_another(tmp_path, name, says):
    model = pathlib.Path(shutil.copytree(loading.SAMPLE_MODEL, tmp_path / "model"))
    claim(tmp_path / "stage1", loading.find(str(model)))
    (model / name).unlink() if (model / name).exists() else (model / name).write_text("a b")
    with pytest.raises(UserError, match=rf"^{model / name} {says} {tmp_path}/stage1 was begun"):
        companions.check(tmp_path / "stage1", model)


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "models--a" / "snapshots" / "0123"
    folder.mkdir(parents=True)
    for name in HANDED_ON | KEPT:
        (folder / name).write_text(name)
    (tmp_path / "to").mkdir()
    return folder


def test_nothing_is_handed_on_but_what_a_model_needs_besides_its_weights(model, tmp_path):
    (tmp_path / "to" / "LICENSE").write_text("as it was")
    companions.copy(model, tmp_path / "to")
    copied = {file.name: file.read_text() for file in (tmp_path / "to").iterdir()}
    assert copied == {name: name for name in HANDED_ON} | {"LICENSE": "as it was"}


def test_links_into_the_cache_are_followed_and_links_out_of_the_folder_refused(model, tmp_path):
    (tmp_path / "models--a" / "blobs").mkdir()
    (tmp_path / "models--a" / "blobs" / "4567").write_text("merges")
    (model / "merges.txt").symlink_to("../../blobs/4567")
    (model / "README.md").symlink_to("LICENSE")
    companions.copy(model, tmp_path / "to")
    assert (tmp_path / "to" / "merges.txt").read_text() == "merges" and (tmp_path / "to" / "README.md").exists()
    (tmp_path / "id_rsa").write_text("secret")
    (model / "vocab.json").symlink_to(tmp_path / "id_rsa")
    with pytest.raises(UserError, match=r"vocab\.json is a link to .*id_rsa, out of the model's folder"):
        companions.copy(model, tmp_path / "to")
    assert not (tmp_path / "to" / "vocab.json").exists()


def test_named_chat_templates_are_handed_on(tmp_path):
    """As transformers finds them: in a folder of their own."""
    model = pathlib.Path(shutil.copytree(loading.SAMPLE_MODEL, tmp_path / "model"))
    (model / "chat_template.jinja").write_text("{{ messages }}")
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "rag.jinja").write_text("rag {{ messages }}")
    (model / "additional_chat_templates" / "secret.txt").write_text("not a template")
    source, folder = loading.find(str(model)), tmp_path / "stage1"
    claim(folder, source)
    copies = folder / "huggingface"
    companions.check(folder, model)
    companions.check_copies(copies, copies)
    mesh = sharding.make_mesh("1x1")
    source.export(source.load(mesh), tmp_path / "exported", "bfloat16")
    for to in (copies, tmp_path / "exported"):
        found = transformers.AutoTokenizer.from_pretrained(to).chat_template
        assert found == {"default": "{{ messages }}", "rag": "rag {{ messages }}"}
        assert [f.name for f in (to / "additional_chat_templates").iterdir()] == ["rag.jinja"]
    (copies / "additional_chat_templates" / "rag.jinja").write_text("another")
    with pytest.raises(UserError, match=r"additional_chat_templates/rag\.jinja is not what was copied there"):
        companions.check_copies(copies, copies)


def test_a_copy_names_the_type_of_the_weights_that_stay_behind(tmp_path):
    model, folder = pathlib.Path(shutil.copytree(loading.SAMPLE_MODEL, tmp_path / "model")), tmp_path / "stage1"
    weights = safetensors.numpy.load_file(model / "model.safetensors")
    half = {key: tensor.astype(ml_dtypes.bfloat16) for key, tensor in weights.items()}
    safetensors.numpy.save_file(half, model / "model.safetensors")
    settings = json.loads((model / "config.json").read_text())
    settings = {k: v for k, v in settings.items() if k not in ("dtype", "torch_dtype")}
    (model / "config.json").write_text(json.dumps(settings))
    assert loading.find(str(model)).dtype() == jnp.bfloat16
    claim(folder, loading.find(str(model)))
    assert json.loads((folder / "huggingface" / "config.json").read_text()) == settings | {"dtype": "bfloat16"}
    companions.check_copies(folder / "huggingface", folder / "huggingface")
    companions.check(folder, model)
    (model / "model.safetensors").unlink()
    companions.check(folder, model)  # continues from its checkpoints
    (model / "config.json").write_text(json.dumps(settings | {"rms_norm_eps": 0.5}))
    with pytest.raises(UserError, match=r"model/config\.json is not what"):
        companions.check(folder, model)
