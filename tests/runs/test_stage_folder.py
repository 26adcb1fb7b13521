"""Whose a stage's folder is: of one configuration, one model and one set of data, wherever these lie."""

import dataclasses
import pathlib
import shutil

import pytest

from alignx_jax.config import Config, DataConfig, LoraConfig, ObjectiveConfig, TrainingConfig
from alignx_jax.config import LanguageMatchingConfig as Matching
from alignx_jax.config_files import from_json
from alignx_jax.exits import UserError
from alignx_jax.runs import lineage, loading, stage_folder

CONFIG = Config(model="sample")
ABC = lineage.Content("parallel", "pairs.jsonl", "abc")
ABD = dataclasses.replace(ABC, digest="abd")


def of(folder: pathlib.Path, *data: lineage.Content, start: str = "sample") -> lineage.Lineage:
    return lineage.Lineage(loading.find(start).origin(folder), data or (ABC,))


def begun(folder: pathlib.Path, config: Config = CONFIG) -> pathlib.Path:
    stage_folder.claim(folder, config, loading.find("sample"), of(folder))
    return folder


@pytest.mark.parametrize("content", [b'{"sam', b"[3]", b"\xff", b"{}", b'{"start": {"model": 3}}', None])
def test_a_damaged_record_is_one_sentence(tmp_path, content):
    file = begun(tmp_path / "stage1") / lineage.FILE
    file.unlink() if content is None else file.write_bytes(content)
    with pytest.raises(
        UserError, match=r"^.*stage1/lineage.json is (damaged \(.*\)|missing); restore it, or give another --run$"
    ):
        stage_folder.state(tmp_path / "stage1", CONFIG, of(tmp_path / "stage1"))


def test_other_settings_are_refused_unless_accepted(tmp_path):
    folder = begun(tmp_path / "stage1")
    longer = dataclasses.replace(CONFIG, training=TrainingConfig(epochs=3.0))
    accepted = dataclasses.replace(longer, accept_changes=True)
    with pytest.raises(UserError, match=r"training.epochs: 2.0 there, 3.0 here.*--accept-changes"):
        stage_folder.state(folder, longer, of(folder))
    with pytest.raises(UserError, match=r"other content of pairs.jsonl; .*--accept-changes"):
        stage_folder.state(folder, CONFIG, of(folder, ABD))
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    assert stage_folder.state(folder, accepted, of(folder, ABD)) == "changed"
    assert before == {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}, "a question alone"
    stage_folder.accept(folder, accepted, of(folder, ABD))
    assert (folder / "config.1.json").read_bytes() == before[folder / "config.json"]
    assert (folder / "lineage.1.json").read_bytes() == before[folder / lineage.FILE]
    assert lineage.read(folder) == of(folder, ABD)
    saved = from_json((folder / "config.json").read_text(), "")
    assert saved.training.epochs == 3.0 and not saved.accept_changes, "the permission is not a setting"
    assert stage_folder.state(folder, longer, of(folder, ABD)) == "same"
    assert stage_folder.state(folder, accepted, of(folder, ABD)) == "same"


def test_what_a_stage_began_with_is_never_changed(tmp_path):
    """Not even by --accept-changes: its checkpoints still stand on it."""
    folder = begun(tmp_path / "stage1")
    model = other_weights(pathlib.Path(shutil.copytree(loading.SAMPLE_MODEL, tmp_path / "model")))
    for accept in (False, True):
        config = dataclasses.replace(CONFIG, accept_changes=accept)
        with pytest.raises(UserError, match=rf"^{folder} was begun with another model than {model} is now \(digest"):
            stage_folder.state(folder, config, of(folder, start=str(model)))


def other_weights(model: pathlib.Path) -> pathlib.Path:
    """One bit of one number."""
    (file,) = model.glob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    return model


def test_the_same_elsewhere_is_the_same(tmp_path, monkeypatch):
    """Absolute or relative, another working directory, another place, another name of the run."""
    template = tmp_path / "template.json"
    shutil.copy(pathlib.Path(stage_folder.prompts.__file__).with_name("alpaca.json"), template)
    model = pathlib.Path(shutil.copytree(loading.SAMPLE_MODEL, tmp_path / "model"))
    monkeypatch.chdir(tmp_path)
    data = DataConfig(parallel=("pairs.jsonl",), instructions=("chats",), template="template.json")
    config = dataclasses.replace(CONFIG, run="runs/a", model="model", data=data)
    folder = tmp_path / "runs/a/stage1"
    stage_folder.claim(folder, config, loading.find("model"), of(folder, start="model"))
    saved = from_json((folder / "config.json").read_text(), "")
    assert saved.model == str(model) and saved.data.template == str(template)
    assert saved.data.parallel == (f"{tmp_path}/pairs.jsonl",)

    moved = pathlib.Path(shutil.move(tmp_path / "runs/a", tmp_path / "b")) / "stage1"
    shutil.move(model, tmp_path / "elsewhere")
    monkeypatch.chdir("/")
    data = DataConfig(parallel=(f"{tmp_path}/pairs.jsonl",), instructions=("/x/chats",), template=str(template))
    asked = dataclasses.replace(CONFIG, run=str(moved.parent), model=f"{tmp_path}/elsewhere", data=data)
    now = of(moved, dataclasses.replace(ABC, source="/y/p.jsonl"), start=asked.model)
    assert stage_folder.state(moved, asked, now) == "same"


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
    folder = begun(tmp_path / "stage", config)
    other = dataclasses.replace(config, mesh=mesh)
    if refused:
        with pytest.raises(UserError, match=r"mesh: 8x1 there, 2x1 here.*--accept-changes"):
            stage_folder.state(folder, other, of(folder))
    else:
        assert stage_folder.state(folder, other, of(folder)) == "same"
    accepted = dataclasses.replace(other, accept_changes=True)
    assert stage_folder.state(folder, accepted, of(folder)) == ("changed" if refused else "same")


def matching(**settings) -> Config:
    objective = ObjectiveConfig(language_matching=Matching(**settings))
    return dataclasses.replace(CONFIG, objective=objective, accept_changes=True)


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (
            dataclasses.replace(
                CONFIG, accept_changes=True, optimizer=dataclasses.replace(CONFIG.optimizer, kind="adafactor")
            ),
            "optimizer.kind",
        ),
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
        stage_folder.state(folder, config, of(folder))
    assert not list(folder.glob("*.1.json"))


def test_a_factor_can_be_changed(tmp_path):
    folder = begun(tmp_path / "stage1")
    assert stage_folder.state(folder, matching(weight=0.1), of(folder)) == "changed"


@pytest.mark.parametrize("before", ["runs/x", "/elsewhere/runs/x"])
def test_a_stage_of_a_run_that_was_moved_begins_with_the_stage_beside_it(tmp_path, before):
    folder, now = pathlib.Path(before) / "stage2", tmp_path / "y" / "stage2"
    assert lineage.resolve(lineage.place(f"{before}/stage1", folder), now) == f"{tmp_path}/y/stage1"
    absolute = str(pathlib.Path("another/stage1").absolute())
    assert lineage.resolve(lineage.place("another/stage1", folder), now) == absolute
    assert lineage.resolve(lineage.place("sample", folder), now) == "sample"


def test_what_is_set_aside_is_kept(tmp_path):
    for content in ("first", "second"):
        (tmp_path / "stage2").mkdir()
        (tmp_path / "stage2" / "file").write_text(content)
        stage_folder.set_aside(tmp_path / "stage2", "why")
    assert [(tmp_path / f"stage2.{n}" / "file").read_text() for n in (1, 2)] == ["first", "second"]
    assert not (tmp_path / "stage2").exists()
