"""One evaluation: models side by side, everything that is measured of each, as one dictionary that is JSON.

Alignment is measured on sentences encoded separately. Intervals are bootstrapped over sentence numbers, the same
resamples for every language and model, so that what is compared is paired. Rates are shares of 1.
"""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import os
import platform
from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any

from jax.sharding import Mesh

from alignx_jax.config import Config
from alignx_jax.data import pipeline, prompts
from alignx_jax.evaluation import comparison, harness, scoring, translation
from alignx_jax.evaluation.measured import Advance, Material, Subject, measure
from alignx_jax.exits import UserError
from alignx_jax.training import loop, runs

FORMAT = 1
_FEWEST = 5  # sentences: retrieval among fewer says nothing, and some measures are not defined
_LIBRARIES = ("jax", "flax", "transformers", "sacrebleu", "numpy")


def check(config: Config) -> Material:
    """What the models are measured on, or the first thing that is wrong with it, before any model is loaded.

    Raises:
      UserError: sentences, languages, directions, items, tasks or an optional library that are not there.
    """
    options = config.evaluation
    languages = options.languages and tuple(dict.fromkeys([options.pivot, *options.languages]))
    everything = pipeline.multiway(options.sentences, languages, config.data.cache)
    if options.pivot not in everything or len(everything) < 2:
        raise UserError(
            f"{options.sentences}: languages are compared with the pivot {options.pivot} (--evaluation.pivot); "
            f"there are {', '.join(everything)}"
        )
    count = len(everything[options.pivot])
    if count < _FEWEST:
        raise UserError(f"{options.sentences}: {count} sentences in all of the languages; retrieval needs {_FEWEST}")
    directions = translation.parse_directions(options.translation.directions, tuple(everything), options.pivot)
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


def subjects(config: Config, sources: Sequence[runs.Source]) -> list[Subject]:
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
        elif asked.contrastive.layer in (None, "auto") and trained:
            objective = trained[0]
        else:
            objective = asked
        both = dataclasses.replace(config, objective=objective)
        places = loop.align_layer(both, source.decoder_config()), loop.matching_layer(both, source.decoder_config())
        found.append(Subject(source, *places))
    return found


def evaluate(
    config: Config, material: Material, models: Sequence[Subject], mesh: Mesh, advance: Advance
) -> dict[str, Any]:
    """Measures every model; the first is what the others are compared with.

    Args:
      advance: called with what is under way, how much of it is done, and how much it is in all.

    Returns:
      The contents of evaluation.json (docs/evaluation.md describes them), but for the command.

    Raises:
      UserError: a tokenizer that does not fit its model, a sentence longer than a row, or a prompt than the context.
    """
    options = config.evaluation
    measured = [measure(config, material, model, mesh, advance) for model in models]
    return {
        "format": FORMAT,
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {mesh.size} x {mesh.devices.flat[0].device_kind}",
        "versions": {"python": platform.python_version()} | {n: importlib.metadata.version(n) for n in _LIBRARIES},
        "config": dataclasses.asdict(config),
        "sentences": {
            "file": options.sentences,
            "count": len(material.sentences[options.pivot]),
            "languages": list(material.sentences),
            "pivot": options.pivot,
        },
        "baseline": models[0].source.name,
        "models": [comparison.record(one, measured[0], options, config.seed) for one in measured],
    }
