"""The model card of an exported model: README.md with Hugging Face's metadata, from what the run's folders hold."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import json
import pathlib
import platform
from collections.abc import Sequence
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

from alignx_jax import config_files
from alignx_jax.config import Config, Role
from alignx_jax.data.languages import language_name
from alignx_jax.evaluation import folders
from alignx_jax.evaluation.show import tables
from alignx_jax.exits import UserError
from alignx_jax.models import huggingface
from alignx_jax.runs import loading, saved
from alignx_jax.training import metrics

_TEMPLATE = pathlib.Path(__file__).with_name("card.md.jinja")
_LIBRARIES = ("jax", "flax", "transformers", "numpy")
_TITLES = {"1": "Stage 1: alignment on translation pairs", "2": "Stage 2: multilingual instructions"}
_SAID = (Role.RESULT, Role.SHAPE, Role.CONTENTS)
"""Settings that a card names, with the mesh: some losses depend on it. It has the model elsewhere."""


@dataclasses.dataclass
class _Corpus:
    """Of `data.json`."""

    source: str
    kind: str
    records: int


@dataclasses.dataclass
class _Facts:
    """What is read of `data.json`."""

    languages: list[str]
    examples: int
    held_out: int
    sources: list[_Corpus]


@dataclasses.dataclass(frozen=True)
class _Stage:
    title: str
    settings: list[str]
    """Flags of what is not the default."""
    data: dict[str, Any] | None
    """`data.json`; None in a folder of before there was one."""
    steps: int
    best: dict[str, float | None]
    """The step of the best validation losses, and these, None where not finite; where `exported`, those of the step
    that was."""
    exported: bool
    began_with: str
    """Digest of the weights that it began with."""


def text(source: loading.Source, command: str, *, adapter: bool = False) -> str:
    """The README.md of an export.

    Args:
      source: a stage of a run; the stages that it goes back to are described too.
      command: that exported it.
      adapter: whether the export is of adapters alone, for PEFT.

    Raises:
      UserError: what a run's folders hold is damaged.
    """
    *trained, base = _history(source)
    stages = [_stage(one, one.config(), one is source) for one in reversed(trained)]
    sample, identifier = base.name == "sample", _identifier(base)
    languages = sorted({code for stage in stages if stage.data for code in stage.data["languages"]})
    license_ = _license(source.huggingface / "README.md")
    data = ModelCardData(
        language=languages or None,
        base_model=None if sample else identifier,
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-generation",
        tags=["alignx", "multilingual"],
        **license_,
    )
    card = ModelCard.from_template(
        data,
        template_path=str(_TEMPLATE),
        name=identifier,
        sample=sample,
        adapter=adapter,
        license=license_,
        languages=[f"{language_name(code)} ({code})" for code in languages],
        stages=stages,
        measured=_measured(source),
        command=command,
        weights=source.weights,
        date=datetime.date.today().isoformat(),
        versions={"Python": platform.python_version()} | {n: importlib.metadata.version(n) for n in _LIBRARIES},
    )
    return card.content.rstrip() + "\n"


def base_name(source: loading.Source) -> str:
    """What a card calls the model that a run began with."""
    return _identifier(_history(source)[-1])


def _history(source: loading.Source) -> list[loading.Source]:
    """A model, the one that it was trained from, and so on to the one that no run of ours has trained."""
    if not source.run:
        return [source]
    try:
        return [source, *_history(loading.find(source.start))]
    except UserError:  # moved since; its name, tokenizer and README are in the stage's folder
        return [source, loading.Source(source.start, source.huggingface)]


def lineage_text(source: loading.Source) -> str:
    """The lineage.json of an export: what its weights are, and what every stage before stood on, the last one first."""
    *trained, _ = _history(source)
    stages = [{"stage": one.config().stage} | dataclasses.asdict(one.lineage) for one in trained]
    record = {"weights": source.weights, "step": source.step if source.run else None, "stages": stages}
    return json.dumps(record, indent=2) + "\n"


def _identifier(base: loading.Source) -> str:
    """The name on the Hub if the base model's config.json holds it, else its folder's."""
    named = str(huggingface.read_config(base.huggingface).get("_name_or_path") or "")
    path = pathlib.PurePath(named)
    return named if len(path.parts) == 2 and not path.is_absolute() else pathlib.PurePath(base.name).name


def _license(readme: pathlib.Path) -> dict[str, str]:
    """The fields of the licence in a README of the base model."""
    try:
        found = ModelCard(readme.read_text(encoding="utf-8"), ignore_metadata_errors=True).data.to_dict()
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return {key: str(found[key]) for key in ("license", "license_name", "license_link") if found.get(key)}


def _stage(source: loading.Source, config: Config, exported: bool) -> _Stage:
    file = source.run / "data.json"
    validations = metrics.read(source.run, "validation")
    best = {"step": source.step} if exported else {}
    best |= (
        next((record for record in validations if record["step"] == source.step), {})
        if exported
        else _best(validations)
    )
    return _Stage(
        title=_TITLES[config.stage],
        settings=_changed(config),
        data=saved.read(file, _Facts, "start the stage again, which writes it anew") if file.is_file() else None,
        steps=max((record["step"] for record in metrics.read(source.run, "train")), default=0),
        best={key: value for key, value in best.items() if key != "kind"},
        exported=exported,
        began_with=source.lineage.start.weights,
    )


def _best(validations: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The record with the lowest loss, of those after the first step; empty where there is none."""
    measured = [record for record in validations if record["step"] and record.get("loss") is not None]
    return min(measured, key=lambda record: record["loss"], default={})


def _changed(config: Config) -> list[str]:
    """The settings away from their defaults, as flags."""
    named = {name for name, role in config_files.roles().items() if role in _SAID} - {"model"} | {"mesh"}
    defaults, flags = dict(config_files.flattened(dataclasses.asdict(Config()))), []
    for name, value in config_files.flattened(dataclasses.asdict(config)):
        if name in named and value != defaults[name]:
            values = [pathlib.PurePath(str(v)).name for v in value] if isinstance(value, tuple) else [str(value)]
            flags.append(f"--{name.replace('_', '-')} {' '.join(values)}")
    return flags


def _measured(source: loading.Source) -> list[dict[str, Any]]:
    """The run's evaluations that measured this checkpoint of this stage, beside the model that they compare it with."""
    found = []
    for name, results in folders.of_run(source.run.parent).items():
        model = next((model for model in results.models if model.weights == source.weights), None)
        if model:
            before = [one for one in results.models if one.name == results.baseline and one is not model]
            shown = dataclasses.replace(results, models=[*before, model])
            found.append({"name": name, "table": tables.overview(shown), "model": model, "results": results})
    return found
