"""What of a model's folder is handed on, and whether it is still what a stage was begun with."""

import pathlib
import shutil

import pytest

from alignx_jax.config import Config
from alignx_jax.exits import UserError
from alignx_jax.training import companions, runs


def test_another_tokenizer_than_the_stage_was_begun_with_is_refused(tmp_path):
    model = pathlib.Path(shutil.copytree(runs.SAMPLE_MODEL, tmp_path / "model"))
    (model / "README.md").write_text("Trained.")
    source, folder = runs.find(str(model)), tmp_path / "stage1"
    runs.claim(folder, Config(), source, {})
    (model / "README.md").write_text("Trained for long.")  # says more, and is the same model
    companions.check(folder, model)
    (model / "tokenizer.model").write_bytes(b"another")
    with pytest.raises(UserError, match=r"model/tokenizer.model is not what .*stage1 was begun with"):
        companions.check(folder, model)


HANDED_ON = {"config.json", "tokenizer.json", "tokenizer.model.v3", "chat_template.jinja", "LICENSE", "Use_Policy.md"}
KEPT = {"model.safetensors", "pytorch_model.bin", "modeling_own.py", "tf_model.h5"}
KEPT |= {"credentials.json", "notes.zip", ".env", "tokenizer.py", "license_keys.json"}


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
