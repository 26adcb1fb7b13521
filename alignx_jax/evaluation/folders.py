"""Where the results of evaluations are: `RUN/evaluation/NAME/`, a folder for each, which appears whole."""

from __future__ import annotations

import json
import os
import pathlib
import re
import shutil
from collections.abc import Callable, Iterator
from typing import Any

from alignx_jax import config_files, storage
from alignx_jax.config import EvaluationConfig, Role
from alignx_jax.evaluation.schema import Results
from alignx_jax.exits import UserError
from alignx_jax.runs import saved

FILE = "evaluation.json"
"""Is written last in object storage: a folder without it is no evaluation."""
_MODEL = ("name", "path", "parameters", "align_layer", "baseline_layer", "step", "weights", "training")
"""What tells two models, or one before and after more training, apart."""
_MEASURED = (Role.RESULT, Role.SHAPE, Role.MEASURE)
"""Settings that are a part of what was measured, with the template; the models are in `_MODEL`."""


def place(run: storage.Path, options: EvaluationConfig) -> storage.Path:
    """The folder of an evaluation: `--evaluation.name`, or after its sentences."""
    return run / "evaluation" / (options.name or _name(options.sentences))


def _name(sentences: str) -> str:
    """`flores200-devtest` of `flores200:devtest`, `dev` of `/data/dev.jsonl.gz` and of `/data/dev/`."""
    last = os.path.basename(os.path.abspath(os.path.expanduser(sentences)))
    for suffix in (".gz", ".jsonl", ".lock"):
        last = last.removesuffix(suffix)
    return re.sub(r"[^\w.-]+", "-", last).strip(".-")[:60].rstrip(".-") or "sentences"


def read(folder: storage.Path) -> dict[str, Any]:
    """The results of an evaluation.

    Raises:
      UserError: they are damaged.
    """
    hint = "evaluate again, or delete the folder"
    results = saved.read(folder / FILE, Results, hint)
    if wrong := _inconsistent(results):
        raise UserError(f"{folder / FILE} is damaged ({wrong}); {hint}")
    return results


def _inconsistent(results: dict[str, Any]) -> str | None:
    """The first of the numbers of layers and names of models that do not fit each other."""
    names = [model["name"] for model in results["models"]]
    depths = {model["name"]: model["layers"] for model in results["models"]}
    pairs = [
        (f"against_control.{n}.{key}", pair[key])
        for n, pair in enumerate(results["against_control"])
        for key in ("model", "control")
    ]
    for key, name in [("baseline", results["baseline"]), *pairs]:
        if name not in names:
            return f"{key}: no model is called {name}"
    for n, model in enumerate(results["models"]):
        depth = model["layers"]
        against = [(pair["baseline_layer"], pair["control"]) for pair in results["against_control"]]
        places = [(model["align_layer"], model["name"]), (model["baseline_layer"], results["baseline"]), *against]
        for layer, of in places:
            if not 0 <= layer <= depths[of]:
                return f"models.{n}: layer {layer} of the {depths[of]} of {of}"
        for name, curve in _curves(model["alignment"], f"models.{n}.alignment"):
            if len(curve) != depth + 1:
                return f"{name}: {len(curve)} values of {depth + 1}"
    return None


def _curves(found: Any, name: str) -> Iterator[tuple[str, list]]:
    """Every list of a model's measures with its name, but for what is no curve over the layers."""
    if isinstance(found, list):
        yield name, found
    elif isinstance(found, dict):
        for key, of in found.items():
            if key != "retrieval_matrix":
                yield from _curves(of, f"{name}.{key}")


def of_run(run: storage.Path) -> dict[str, dict[str, Any]]:
    """The results of every evaluation in a run's folder by its name, the oldest first.

    Raises:
      UserError: one of them is damaged.
    """
    folder = run / "evaluation"
    names = sorted(child.name for child in folder.iterdir()) if folder.is_dir() else []
    found = {
        name: read(folder / name) for name in names if not name.startswith(".") and (folder / name / FILE).is_file()
    }
    return dict(sorted(found.items(), key=lambda item: item[1]["date"]))


def write(results: dict[str, Any], folder: storage.Path, fill: Callable[[pathlib.Path], None]) -> storage.Path | None:
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
    storage.write(partial / FILE, json.dumps(results, indent=1, ensure_ascii=False) + "\n")
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


def _is_again(folder: storage.Path, results: dict[str, Any]) -> bool:
    """Whether a folder holds an earlier evaluation of the same."""
    try:
        return _what(read(folder)) == _what(json.loads(json.dumps(results)))
    except UserError:  # whatever it was, it is kept
        return False


def _what(results: dict[str, Any]) -> list[Any]:
    models = [[model.get(key) for key in _MODEL] for model in results["models"]]
    named = {name for name, role in config_files.roles().items() if role in _MEASURED} | {"data.template"}
    settings = {name: value for name, value in config_files.flattened(results["config"]) if name in named}
    return [results["sentences"], settings, models]
