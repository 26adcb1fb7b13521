"""One evaluation: models side by side, and everything that is measured of each.

Alignment is measured on sentences encoded separately. Intervals are bootstrapped over sentence numbers, the same
resamples for every language and model, so that what is compared is paired. Rates are shares of 1.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import hashlib
import importlib.metadata
import json
import os
import pathlib
import platform
import tomllib
from collections import Counter
from collections.abc import Collection, Sequence

from jax.sharding import Mesh

from alignx_jax.config import Config, EvaluationConfig
from alignx_jax.data import pipeline, prompts
from alignx_jax.data.languages import ENGLISH, normalize
from alignx_jax.evaluation.measure import comparison, harness, scoring, translation, translation_scores
from alignx_jax.evaluation.measure.measured import Advance, Material, Measured, Subject, measure
from alignx_jax.evaluation.rows import Results, Sentences, Translation
from alignx_jax.exits import UserError
from alignx_jax.runs import loading
from alignx_jax.training import build

_FEWEST = 5  # sentences: retrieval among fewer says nothing, and some measures are not defined
_CUT = 0.05  # share of a direction's outputs that may be cut off before it is told
_LIBRARIES = ("jax", "flax", "transformers", "sacrebleu", "py3langid", "lm_eval", "numpy")


def check(config: Config) -> Material:
    """What the models are measured on, or the first thing that is wrong with it, before any model is loaded.

    Raises:
      UserError: sentences, languages, directions, items, tasks or an optional library that are not there.
    """
    options = config.evaluation
    languages = options.languages and tuple(dict.fromkeys([options.pivot, *options.languages]))
    said: list[str] = []
    # English, for which users of such methods fear, is always measured; it is translated only where it is asked for.
    everything = pipeline.multiway(options.sentences, languages, config.data.cache, (ENGLISH,), said.append)
    if ENGLISH not in everything:
        said.append(f"{options.sentences} has no English for these lines: what is forgotten of it is not measured.")
    if options.pivot not in everything or len(everything) < 2:
        raise UserError(
            f"{options.sentences}: languages are compared with the pivot {options.pivot} (--evaluation.pivot); "
            f"there are {', '.join(everything)}"
        )
    count = len(everything[options.pivot])
    if count < _FEWEST:
        raise UserError(f"{options.sentences}: {count} sentences in all of the languages; retrieval needs {_FEWEST}")
    if options.limit < _FEWEST:
        raise UserError(f"--evaluation.limit={options.limit}: retrieval needs {_FEWEST} sentences; raise it")
    asked = {normalize(code) for code in languages or everything}
    translated = tuple(code for code in everything if code in asked)
    directions = translation.parse_directions(options.translation.directions, translated, options.pivot)
    template = prompts.load(config.data.template)
    shown = {code: lines[options.translation.limit :] for code, lines in everything.items()}
    if directions:
        translation.check(options.translation, template, shown)
    if options.tasks:
        harness.load_tasks(options.tasks, options.tasks_data)
    return Material(
        sentences={code: lines[: options.limit] for code, lines in everything.items()},
        translated={code: lines[: options.translation.limit] for code, lines in everything.items()},
        shown=shown,
        directions=directions,
        choices=_choices(options.choices, everything),
        template=template,
        notes=tuple(said),
    )


def _choices(paths: Sequence[str], languages: Collection[str]) -> dict[str, list[scoring.Item]]:
    """The items in the languages of the sentences."""
    items = scoring.read_choices(paths)
    found = {code: of for code, of in items.items() if code in languages}
    if paths and not found:
        raise UserError(
            f"--evaluation.choices: items in {', '.join(sorted(items))}, but sentences in {', '.join(languages)}; give "
            "items in one of these"
        )
    return found


def subjects(config: Config, sources: Sequence[loading.Source]) -> list[Subject]:
    """The models with the layers to look at: a run's own; for others the flag's, else those of the first run there is.

    Models of the same name are called by their folders instead.

    Raises:
      UserError: a layer that is not in the model.
    """
    names = Counter(source.name for source in sources)
    sources = [dataclasses.replace(s, name=str(s.run or s.huggingface)) if names[s.name] > 1 else s for s in sources]
    trained = [s.config().objective for s in sources if s.run]
    found = []
    for source in sources:
        asked = config.objective
        if source.run:
            objective = source.config().objective
        elif asked.contrastive.layer == "auto" and trained:
            objective = trained[0]
        else:
            objective = asked
        both = dataclasses.replace(config, objective=objective)
        places = build.align_layer(both, source.decoder_config()), build.matching_layer(both, source.decoder_config())
        found.append(Subject(source, *places))
    return found


def notes(config: Config, material: Material, models: Sequence[Subject]) -> list[str]:
    """What a reader of the results has to know besides, as far as it is known before anything is measured."""
    found = list(material.notes)
    if config.objective.contrastive.layer == "auto" and not any(model.source.run for model in models):
        found.append(
            "No run is among the models that would have chosen a layer to align: what is measured at one layer is "
            "measured at half of the depth; --objective.contrastive.layer=N gives another."
        )
    if material.directions or config.evaluation.in_prompt:
        for model in models:
            trained = model.source.config()
            if trained and trained.data.template != config.data.template:
                found.append(
                    f"{model.source.name} was trained with the template {trained.data.template} and is asked with "
                    f"{config.data.template} (--data.template), in a form that it has not learned."
                )
    return found


def _notes_on_translation(one: Measured, options: EvaluationConfig) -> list[str]:
    """Where many outputs were cut off, which lowers every score."""
    measures = one.translation.measures if one.translation else {}
    cut = {"-".join(pair): of["cut"].value for pair, of in measures.items() if of["cut"].value > _CUT}
    if not cut:
        return []
    most = max(cut, key=cut.get)
    return [
        f"{one.model.name}: in {len(cut)} of {len(measures)} directions more than {_CUT:.0%} of the outputs were cut "
        f"off at --evaluation.translation.max-tokens={options.translation.max_tokens} (most: {most}, {cut[most]:.0%}); "
        "scores of these are too low; raise it, unless the model never stops."
    ]


def _notes_on_tasks(one: Measured) -> list[str]:
    """Where prompts lost their beginning: instructions and examples, perhaps."""
    cut = {name: f"{n:,} of {of:,}" for name, (n, of) in (one.tasks.cut if one.tasks else {}).items() if n}
    if not cut:
        return []
    listed = ", ".join(f"{name} {count}" for name, count in cut.items())
    return [
        f"{one.model.name}: requests of tasks lost their beginning, as they are longer than "
        f"{one.tasks.max_length:,} tokens: {listed}."
    ]


def controls(models: Sequence[Subject]) -> list[tuple[int, int]]:
    """Places of every run of stage 1 and of its control: trained alike, but with none of the pair losses.

    None whose control is the baseline, which it is compared with anyway.
    """

    def losses(config: Config) -> bool:
        return bool(config.objective.contrastive.weight or config.objective.language_matching.weight)

    def alike(config: Config) -> Config:
        """What the weights depend on without these losses."""
        data = dataclasses.replace(config.data, cache="", beam=None)
        kept = {name: getattr(config, name) for name in ("stage", "model", "seed", "optimizer", "lora", "training")}
        return Config(**kept, data=data)

    trained = {n: model.source.config() for n, model in enumerate(models) if model.source.run}
    trained = {n: config for n, config in trained.items() if config.stage == "1"}
    return [
        (n, control)
        for n, config in trained.items()
        for control, other in trained.items()
        if losses(config) and control and not losses(other) and alike(config) == alike(other)
    ]


def evaluate(
    config: Config,
    material: Material,
    models: Sequence[Subject],
    mesh: Mesh,
    advance: Advance,
    command: str,
) -> Results:
    """Measures every model; the first is what the others are compared with.

    Args:
      advance: called with what is under way, how much of it is done, and how much it is in all.
      command: what was typed.

    Raises:
      UserError: a tokenizer that does not fit its model, a sentence longer than a row, or a prompt than the context.
    """
    options = config.evaluation
    measured = [measure(config, material, model, mesh, advance) for model in models]
    pairs = [(measured[n], measured[control]) for n, control in controls(models)]
    rows = []
    for one in measured:
        others = [*([] if one is measured[0] else measured[:1]), *(control for of, control in pairs if of is one)]
        rows += comparison.rows(one, others, options.resamples, config.seed)
    return Results(
        command=command,
        date=datetime.date.today().isoformat(),
        machine=f"{platform.machine()}, {os.cpu_count()} cores, {mesh.size} x {mesh.devices.flat[0].device_kind}",
        versions=versions(),
        config=dataclasses.asdict(config),
        sentences=Sentences(
            file=options.sentences,
            count=len(material.sentences[options.pivot]),
            languages=list(material.sentences),
            pivot=options.pivot,
            sha256=_digest(material),
        ),
        notes=[
            *notes(config, material, models),
            *(note for one in measured for note in _notes_on_translation(one, options)),
            *(note for one in measured for note in _notes_on_tasks(one)),
        ],
        baseline=models[0].source.name,
        controls=[(one.model.name, control.model.name) for one, control in pairs],
        models=[one.model for one in measured],
        translation=_translation(measured),
        tasks={
            f"tasks/{name}/{metric}": score.higher_is_better
            for one in measured
            if one.tasks
            for name, of in one.tasks.scores.items()
            for metric, score in of.items()
        },
        rows=rows,
    )


def _translation(measured: Sequence[Measured]) -> Translation | None:
    found = {one.model.name: one.translation for one in measured if one.translation}
    if not found:
        return None
    return Translation(
        signatures={name: text for of in found.values() for name, text in of.signatures.items()},
        notes=list(dict.fromkeys(note for of in found.values() for note in of.notes)),
        samples=translation_scores.samples(found),
    )


def versions() -> dict[str, str]:
    """Of all that numbers depend on and that is installed."""
    found = {"alignx_jax": _own_version(), "python": platform.python_version()}
    for name in _LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # lm_eval is optional
            found[name] = importlib.metadata.version(name)
    return found


def _own_version() -> str:
    """A clone is no installed package: its version is in the file beside it, whatever else is installed."""
    file = pathlib.Path(__file__).resolve().parents[3] / "pyproject.toml"
    if file.is_file():
        return tomllib.loads(file.read_text(encoding="utf-8"))["project"]["version"]
    return importlib.metadata.version("alignx_jax")


def _digest(material: Material) -> str:
    """SHA-256 of the sentences that were measured or translated, by language: of their JSON with sorted keys."""
    used = {code: max(lines, material.translated[code], key=len) for code, lines in material.sentences.items()}
    return hashlib.sha256(json.dumps(used, ensure_ascii=False, sort_keys=True).encode()).hexdigest()
