"""Configurations: files of configs/, JSON, what a run saved, the published defaults, and the help text."""

import dataclasses
import json
import pathlib
import re

import pytest

from alignx_jax import config_files as configs
from alignx_jax.config import (
    Config,
    ContrastiveConfig,
    DataConfig,
    ExportConfig,
    LanguageMatchingConfig,
    ObjectiveConfig,
    Role,
)
from alignx_jax.exits import UserError

ROOT = pathlib.Path(__file__).resolve().parent.parent
SAMPLE = configs.load(str(ROOT / "configs" / "sample.py"))
FILES = sorted((ROOT / "configs").glob("*.py"))

# SEMANTICS of the published code, and the settings that the paper states.
PUBLISHED = {
    "data.cutoff": 512,
    "data.min_target_tokens": 3,
    "data.loss_on": "sequence",
    "data.template": "alpaca",
    "data.validation": 2000,
    "objective.contrastive.weight": 0.3,
    "objective.contrastive.temperature": 0.1,
    "objective.contrastive.form": "published",
    "objective.language_matching.weight": 0.4,
    "objective.language_matching.width": 128,
    "objective.language_matching.layer": None,  # the last hidden state, after the final norm
    "optimizer.learning_rate": 2e-6,
    "optimizer.warmup_steps": 100,
    "optimizer.beta1": 0.9,
    "optimizer.beta2": 0.999,
    "optimizer.epsilon": 1e-8,
    "optimizer.weight_decay": 0.0,
    "optimizer.clip_norm": 1.0,
    "training.epochs": 2.0,
    "training.steps": None,
    "training.validate_every": 200,
}


def flat(tree: dict, prefix: str = "") -> dict[str, object]:
    """Every field by its dotted name."""
    found = {}
    for key, value in tree.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


FIELDS = flat(dataclasses.asdict(Config()))


@pytest.fixture
def changed() -> Config:
    """Every kind of value away from its default: text, None, tuples, choices, numbers, nested."""
    return Config(
        stage="2",
        mesh="2x4x1",
        model="somewhere",
        seed=7,
        data=DataConfig(parallel=("a.tsv", "b"), parallel_weights=(0.5, 2.0), overlong="truncate"),
        objective=ObjectiveConfig(
            contrastive=ContrastiveConfig(weight=0.0, layer=3, form="symmetric"),
            language_matching=LanguageMatchingConfig(width=8),
            negatives="micro-batch",
        ),
        export=ExportConfig(to="out", shard_gb=0.1),
    )


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_file_of_configs_loads_is_valid_and_says_how_to_run_it(file):
    config = configs.load(str(file))
    # Dataclasses check no types: what the file gives has to pass the checks that a saved configuration passes.
    assert configs.from_json(configs.to_json(config), file.name) == config
    text = file.read_text(encoding="utf-8")
    assert "    python run.py " in text
    for name in {"sample", "llama2_7b_opus100", "llama3_8b_opus100"} - {file.stem}:
        assert config.run != configs.load(str(ROOT / "configs" / f"{name}.py")).run, "a run's folder belongs to one"


def test_the_large_configurations_keep_the_published_settings():
    for name in ("llama2_7b_opus100", "llama3_8b_opus100"):
        found = flat(dataclasses.asdict(configs.load(str(ROOT / "configs" / f"{name}.py"))))
        assert {key: found[key] for key in PUBLISHED} == PUBLISHED
        assert found["training.compute_dtype"] == "bfloat16"


def test_most_defaults_are_the_published_settings():
    assert {key: FIELDS[key] for key in PUBLISHED} == PUBLISHED


def test_one_config_asks_for_all_that_is_published():
    """The flags of the table in docs/method.md, and no other setting away from its default but place and size."""
    page = (ROOT / "docs/method.md").read_text(encoding="utf-8")
    table = page.split("## Published and ours")[1].split("## What is logged")[0]
    last = [line.rstrip("|").rsplit("|", 1)[1] for line in table.splitlines() if line.startswith("| ")]
    flags = dict(re.findall(r"`--([a-z.-]+)=([\w-]+)`", "".join(x for x in last if not x.strip().startswith("none"))))
    asked = {name.replace("-", "_"): value for name, value in flags.items()}
    found = flat(dataclasses.asdict(configs.load(str(ROOT / "configs/published.py"))))
    assert len(asked) > 6 and {name: str(found[name]) for name in asked} == asked
    assert {name: found[name] for name in PUBLISHED} == PUBLISHED
    places = {"run", "data.parallel", "data.instructions", "plan.shapes", "training.accumulation"}
    assert {name for name, value in found.items() if value != FIELDS[name]} <= {*asked, *places}


def test_json_round_trip(changed):
    assert configs.from_json(configs.to_json(changed), "here") == changed
    assert configs.from_json(configs.to_json(Config()), "here") == Config()


@pytest.mark.parametrize(
    ("path", "value", "field"),
    [
        (("training", "rowz"), 8, "training.rowz"),
        (("training", "rows"), "many", "training.rows"),
        (("training", "rows"), 1.5, "training.rows"),
        (("objective", "contrastive", "form"), "other", "objective.contrastive.form"),
        (("data", "parallel"), "sample", "data.parallel"),
        (("model",), 3, "model"),
        (("stage",), "3", "stage"),
        (("colour",), "red", "colour"),
    ],
)
def test_a_bad_field_of_a_saved_configuration_is_named(tmp_path, path, value, field):
    tree = json.loads(configs.to_json(Config()))
    inner = tree
    for name in path[:-1]:
        inner = inner[name]
    inner[path[-1]] = value
    file = tmp_path / "config.json"
    file.write_text(json.dumps(tree))
    with pytest.raises(UserError) as error:
        configs.load(str(file))
    assert str(error.value).startswith(f"{file}: {field}") and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("half.json", '{"stage": "1", ', "half.json"),
        ("none.py", "x = 1\n", "has to set `config = Config(...)`"),
        ("other.txt", "", "a .py or .json file"),
        ("bytes.json", b"\xff\xfe", "bytes.json: the file: Invalid JSON"),
        ("zeros.json", bytes(100), "zeros.json: the file: Invalid JSON"),
        ("deep.json", "[" * 100_000, "deep.json: the file: Invalid JSON"),
        ("long.json", json.dumps({"k" * 100_000: 1}), "long.json: kkk"),
        ("lines.json", '{"a\\n\\u2028": 1}', r"lines.json: a\n\u2028: Unexpected"),
        ("syntax.py", "\nconfig = (\n", "syntax.py: line 2: SyntaxError: '(' was never closed"),
        ("zeros.py", bytes(100), "zeros.py: SyntaxError: source code string cannot contain null bytes"),
        (
            "field.py",
            "from alignx_jax.config import Config\nconfig = Config(\n    modle='x')\n",
            "field.py: line 2: TypeError",
        ),
    ],
)
def test_a_file_that_is_no_configuration(tmp_path, name, text, says):
    (tmp_path / name).write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(UserError, match=r"^[^\n]+$") as error:
        configs.load(str(tmp_path / name))
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (Config(data=DataConfig(parallel=("a", "https://me:secret@host/a.tsv"))), "--data.parallel: holds a password"),
        (Config(model="s3://me:secret@host/a"), "--model: holds a password"),
        (Config(run="~nobody-of-this-name/run"), "--run=~nobody-of-this-name/run: there is no user of this name"),
        (Config(run="a\0"), r"--run=a\x00: holds a NUL character"),
        (Config(run="\udcff"), r"--run=\udcff: input should be a valid string"),
        (Config(seed=2**31), "--seed=2147483648: input should be less than 2147483648"),
    ],
)
def test_texts_that_no_folder_should_keep(config, says):
    with pytest.raises(UserError, match=r"^[^\n]+$") as error:
        configs.check(config)
    assert says in str(error.value) and "secret" not in str(error.value)
    assert configs.check(Config(model="gs://bucket/a@b:c")) == Config(model="gs://bucket/a@b:c")


def test_of_a_folder_only_its_json_is_read(tmp_path):
    (tmp_path / "config.py").write_text(f"open({str(tmp_path / 'it ran')!r}, 'w')")
    for name in ("sitecustomize.py", "__init__.py"):
        (tmp_path / name).write_text((tmp_path / "config.py").read_text())
    with pytest.raises(UserError, match="no such file"):
        configs.load(str(tmp_path))
    (tmp_path / "config.json").write_text(configs.to_json(Config()))
    assert configs.load(str(tmp_path)) == Config()
    assert not (tmp_path / "it ran").exists()


def test_a_folder_without_a_configuration(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        configs.load(str(tmp_path))


def test_every_setting_has_a_role():
    """One, and no other setting than those of the configuration has."""
    marks = {name: [mark for mark in marks if isinstance(mark, Role)] for name, marks in configs._marks(Config)}
    assert {name: len(roles) for name, roles in marks.items()} == dict.fromkeys(configs.flat(Config()), 1)
