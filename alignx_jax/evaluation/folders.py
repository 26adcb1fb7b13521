"""Where the results of evaluations are: `RUN/evaluation/NAME/`, a folder for each, which appears whole."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import re
import shutil
from collections.abc import Callable
from typing import Any

from alignx_jax import config_files, storage
from alignx_jax.config import EvaluationConfig, Role
from alignx_jax.evaluation import rows
from alignx_jax.evaluation.rows import Results
from alignx_jax.exits import UserError

FILE = "evaluation.json"
"""Is written last in object storage: a folder without it is no evaluation."""
_MEASURED = (Role.RESULT, Role.SHAPE, Role.MEASURE)
"""Settings that are a part of what was measured, with the template; the models are compared by themselves."""


def place(run: storage.Path, options: EvaluationConfig) -> storage.Path:
    """The folder of an evaluation: `--evaluation.name`, or after its sentences."""
    return run / "evaluation" / (options.name or _name(options.sentences))


def _name(sentences: str) -> str:
    """`flores200-devtest` of `flores200:devtest`, `dev` of `/data/dev.jsonl.gz` and of `/data/dev/`."""
    last = os.path.basename(os.path.abspath(os.path.expanduser(sentences)))
    for suffix in (".gz", ".jsonl", ".lock"):
        last = last.removesuffix(suffix)
    return re.sub(r"[^\w.-]+", "-", last).strip(".-")[:60].rstrip(".-") or "sentences"


def read(folder: storage.Path) -> Results:
    """The results of an evaluation.

    Raises:
      UserError: they are damaged, or of an earlier version.
    """
    file = folder / FILE
    try:
        return rows.from_json(file.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{file} is missing; evaluate again, or delete the folder") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is damaged ({error}); evaluate again, or delete the folder") from None


def of_run(run: storage.Path) -> dict[str, Results]:
    """The results of every evaluation in a run's folder by its name, the oldest first.

    Raises:
      UserError: one of them is damaged.
    """
    folder = run / "evaluation"
    names = sorted(child.name for child in folder.iterdir()) if folder.is_dir() else []
    found = {
        name: read(folder / name) for name in names if not name.startswith(".") and (folder / name / FILE).is_file()
    }
    return dict(sorted(found.items(), key=lambda item: item[1].date))


def write(results: Results, folder: storage.Path, fill: Callable[[pathlib.Path], None]) -> storage.Path | None:
    """Makes `folder` that of these results: killed at any moment, there are the former files or all of the new ones.

    An earlier evaluation of the same models on the same sentences with the same settings is replaced; another one of
    the same name is kept as `NAME.1`, `NAME.2`, ...

    Args:
      fill: writes what belongs beside `evaluation.json` into a folder of this machine.

    Returns:
      Where an earlier evaluation is kept, if one is.
    """
    partial = storage.beside(folder)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    fill(partial)
    storage.write(partial / FILE, results.to_json())
    for file in partial.rglob("*"):
        storage.sync(file)
    aside, again = None, False
    if storage.is_remote(folder) and not (folder / FILE).is_file():
        storage.remove(folder)  # half of one
    if folder.exists():
        again, aside = _is_again(folder, results), storage.free(folder)
        storage.move(folder, aside, FILE)
    storage.end(partial, folder, last=FILE)
    if not storage.is_remote(folder):
        storage.sync(folder.parent)
    if again:
        storage.discard(aside, FILE)
    return None if again else aside


def _is_again(folder: storage.Path, results: Results) -> bool:
    """Whether a folder holds an earlier evaluation of the same."""
    try:
        return _what(read(folder)) == _what(rows.from_json(results.to_json().encode()))
    except UserError:  # whatever it was, it is kept
        return False


def _what(results: Results) -> list[Any]:
    """What tells two evaluations apart, such as those of one model before and after more training."""
    models = [dataclasses.replace(model, projection=[]) for model in results.models]
    named = {name for name, role in config_files.roles().items() if role in _MEASURED} | {"data.template"}
    settings = {name: value for name, value in config_files.flattened(results.config) if name in named}
    return [results.sentences, settings, models]
