"""Configurations as files and as text: read, checked, written. Of a run's folder nothing is executed."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib.util
import json
import pathlib
import re
import traceback
import typing
from collections.abc import Iterator, Mapping, Sequence

import pydantic

from alignx_jax import storage
from alignx_jax.config import REMOTE, Config, Role
from alignx_jax.exits import UserError

STAGES = {"stage1": "stage 1", "control": "next-token only", "stage2": "stage 2"}
"""A run's folders, and what tables call their models."""
_PASSWORD = re.compile(r"\w://[^/\s@]*:[^/\s@]+@")  # of an address such as https://user:password@host/


def flat(config: Config) -> dict[str, object]:
    """Every setting by its name, such as `training.rows`, with its value as JSON has it."""
    return dict(flattened(json.loads(to_json(config))))


def flattened(tree: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, object]]:
    """The settings of a configuration's JSON by their names."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from flattened(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


@functools.cache
def roles() -> dict[str, Role]:
    """What a change of each setting means, by its name."""
    return {name: mark for name, marks in _marks(Config) for mark in marks if isinstance(mark, Role)}


@functools.cache
def _remote() -> set[str]:
    """Settings that may be gs://."""
    return {name for name, marks in _marks(Config) if REMOTE in marks}


def _marks(settings: type, prefix: str = "") -> Iterator[tuple[str, tuple]]:
    """Each setting by its name, and what its type is annotated with."""
    for name, kind in typing.get_type_hints(settings, include_extras=True).items():
        if dataclasses.is_dataclass(kind):
            yield from _marks(kind, f"{prefix}{name}.")
        elif not name.startswith("__"):
            yield prefix + name, typing.get_args(kind)[1:] if typing.get_origin(kind) is typing.Annotated else ()


def unknown(arguments: Sequence[str]) -> str | None:
    """What is wrong with the first argument that has the form of a flag and is none; names those that are like it."""
    names = [name.replace("_", "-") for name in flat(Config())]
    for argument in arguments:
        if not argument.startswith("--") or argument == "--":
            continue
        flag, known = argument.partition("=")[0], {*names, *(_negated(name) for name in names), "help"}
        asked = flag.removeprefix("--").replace("_", "-")
        if asked in known or any(name.startswith(f"{asked}.") for name in names):
            continue
        last = {name.rpartition(".")[2]: name for name in reversed(names)}
        like = (
            [name for name in names if name.endswith(f".{asked}")]
            or difflib.get_close_matches(asked, names)
            or [last[name] for name in difflib.get_close_matches(asked.rpartition(".")[2], last)]
        )
        hint = f"did you mean {' or '.join(f'--{name}' for name in like[:3])}?" if like else "--help shows all"
        return f"{flag}: there is no such flag; {hint}"
    return None


def typed(arguments: Sequence[str]) -> set[str]:
    """The settings, by name, that are among the flags."""
    given = {one.partition("=")[0].removeprefix("--").replace("-", "_") for one in arguments if one.startswith("--")}
    return {name for name in flat(Config()) if {name, _negated(name).replace("-", "_")} & given}


def _negated(name: str) -> str:
    """As tyro has it: `--no-accept-changes`."""
    group, dot, last = name.rpartition(".")
    return f"{group}{dot}no-{last}"


@functools.cache
def _adapter() -> pydantic.TypeAdapter[Config]:
    return pydantic.TypeAdapter(Config)


def to_json(config: Config) -> str:
    """The whole configuration as indented JSON; `from_json` reads it back equal."""
    return json.dumps(dataclasses.asdict(config), indent=2)


def from_json(text: str | bytes, where: str) -> Config:
    """Reads what `to_json` wrote; executes nothing.

    Raises:
      UserError: not JSON in UTF-8, an unknown field, or a value of the wrong type; names the field and `where`.
    """
    try:
        return _adapter().validate_json(text)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "the file"
        raise UserError(f"{where}: {field}: {first['msg']}; mend it, or give another") from None


def with_values(config: Config, values: Mapping[str, object]) -> Config:
    """`config` with other values of some settings, by name and as `flat` has them."""
    tree = json.loads(to_json(config))
    for name, value in values.items():
        *groups, last = name.split(".")
        functools.reduce(dict.__getitem__, groups, tree)[last] = value
    return from_json(json.dumps(tree), "the configuration")


def check_text(flag: str, text: str) -> None:
    """Refuses the text of a flag where it is empty, as that of a shell variable is that is not set."""
    if not text.strip():
        raise UserError(
            f"--{flag} is empty; give a value, or leave the flag out (a shell variable that is not set is empty)"
        )


def check(config: Config) -> Config:
    """`config`, if every value is in its field's range; neither flags nor files of `configs/` are checked before.

    Raises:
      UserError: names the flag, its value and what it has to be; not the value of one that holds a password, for
        settings are written into the run's folder.
    """
    values = dataclasses.asdict(config)
    for flag, text in _texts(values):
        check_text(flag, text)
        if _PASSWORD.search(text):
            raise UserError(f"--{flag}: holds a password, which the run's folder would keep; leave it out")
        if re.match(r"\w+://", text) and not (flag in _remote() and re.match("gs://[^/]", text)):
            raise UserError(
                f"--{flag}={text}: has to be a path of this machine; --run, --model, --compare, --config and "
                "--export.to may be gs://BUCKET/... besides, for what a run writes or has written"
            )
        try:
            pathlib.Path(text).expanduser()
        except RuntimeError:  # ~name
            raise UserError(f"--{flag}={text}: there is no user of this name; give the whole path") from None
        if "\0" in text:
            raise UserError(f"--{flag}={text}: holds a NUL character; leave it out")
    if re.fullmatch(r"\w+(, ?\w+)+", config.lora.targets):
        pattern = config.lora.targets.replace(" ", "").replace(",", "|")
        raise UserError(f"--lora.targets={config.lora.targets}: has to be a pattern; give --lora.targets='{pattern}'")
    if config.stage in ("1", "2", "all") and config.run:
        storage.check_place(storage.path(config.run))
    try:
        _adapter().validate_python(values)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        flag = ".".join(map(str, first["loc"])).replace("_", "-")
        raise UserError(f"--{flag}={first['input']}: {first['msg'][0].lower()}{first['msg'][1:]}") from None
    return config


def _texts(values: dict, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Every text of the configuration with its flag."""
    for name, value in values.items():
        flag = f"{prefix}{name.replace('_', '-')}"
        if isinstance(value, dict):
            yield from _texts(value, f"{flag}.")
        for text in value if isinstance(value, tuple | list) else [value]:
            if isinstance(text, str):
                yield flag, text


def load(path: str, stage: str = "1") -> Config:
    """A configuration: a Python file with `config = Config(...)`, a saved `config.json`, a stage's folder or a run's.

    Only the Python file that `path` itself names is run; of a folder its config.json is read.

    Args:
      stage: where `path` is a run, what the settings are for: 2 takes those of its newest stage, others of its first.

    Raises:
      UserError: no such file, one that cannot be run, no `config` in it, or a bad field.
    """
    file = storage.path(path)
    if file.is_dir() and not (file / "config.json").is_file():
        names = ("stage2", "stage1") if stage == "2" else STAGES
        if within := [name for name in names if (file / name / "config.json").is_file()]:
            return dataclasses.replace(load(str(file / within[0])), run=path)
    if file.is_dir():
        file = file / "config.json"
    if not file.is_file():
        raise UserError(f"--config={path}: no such file; give a file of configs/, or the folder of a run")
    if file.suffix == ".json":
        return from_json(file.read_bytes(), str(file))
    if storage.is_remote(file):
        raise UserError(f"--config={path}: of gs:// only a run's folder or config.json is read; copy the file here")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if spec is None or spec.loader is None:
        raise UserError(f"--config={path}: a configuration is a .py or .json file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        line = getattr(error, "lineno", None) or max((f.lineno for f in frames if f.filename == str(file)), default=0)
        place = f"line {line}: " if line else ""  # of a file that is no text there is none
        raise UserError(f"--config={path}: {place}{type(error).__name__}: {error}; mend the file") from error
    config = getattr(module, "config", None)
    if not isinstance(config, Config):
        raise UserError(f"--config={path}: the file has to set `config = Config(...)`")
    return config
