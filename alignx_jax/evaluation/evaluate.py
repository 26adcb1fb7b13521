"""One evaluation: models side by side, everything that is measured of each, as one dictionary that is JSON.

Alignment is measured on sentences encoded separately. Intervals are bootstrapped over sentence numbers, the same
resamples for every language and model, so that what is compared is paired. Rates are shares of 1.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import importlib.metadata
import math
import os
import platform
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from alignx_jax.config import Config, EvaluationConfig, UserError
from alignx_jax.data import pipeline, prompts, tokenizer
from alignx_jax.data.tokenizer import Tokenizer
from alignx_jax.evaluation import (
    alignment,
    harness,
    layers,
    metrics,
    scoring,
    statistics,
    translation,
    translation_scores,
)
from alignx_jax.training import loop, runs
from alignx_jax.training import metrics as training_metrics
from alignx_jax.training.step import LOSSES

Advance = Callable[[str, int, int], None]

FORMAT = 1
_FEWEST = 5  # sentences: retrieval among fewer says nothing, and some measures are not defined
_CHOSEN = 200  # sentences whose endings are to be chosen; each costs four of its length
_LIBRARIES = ("jax", "flax", "transformers", "sacrebleu", "numpy")


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model to measure."""

    source: runs.Source
    align_layer: int
    matching_layer: int


@dataclasses.dataclass(frozen=True)
class Material:
    """What every model is measured on, checked before the first is loaded."""

    sentences: dict[str, list[str]]
    """Of each language, the pivot among them; line n says the same in all."""
    translated: dict[str, list[str]]
    shown: dict[str, list[str]]
    """Lines that are not translated; the examples of few-shot prompts come from them."""
    directions: list[tuple[str, str]]
    choices: dict[str, list[scoring.Item]]
    template: prompts.Template


def check(config: Config) -> Material:
    """What the models are measured on, or the first thing that is wrong with it, before any model is loaded.

    Raises:
      UserError: sentences, languages, directions, items, tasks or an optional library that are not there.
    """
    options = config.evaluation
    languages = options.languages and tuple(dict.fromkeys([options.pivot, *options.languages]))
    everything = pipeline.multiway(options.sentences, languages)
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
        layers = loop.align_layer(both, source.decoder_config()), loop.matching_layer(both, source.decoder_config())
        found.append(Subject(source, *layers))
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
    measured = [_measure(config, material, model, mesh, advance) for model in models]
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
        "models": [_record(one, measured[0], options, config.seed) for one in measured],
    }


@dataclasses.dataclass(frozen=True)
class _Measured:
    """What is measured of a model, and the values of single sentences that intervals are made of."""

    name: str
    record: dict[str, Any]
    hits_KxN: np.ndarray
    """Retrieval at the aligned layer, mean of to and from the pivot; of the languages but the pivot."""
    text: dict[str, scoring.Perplexity]
    endings: dict[str, np.ndarray]
    choices: dict[str, np.ndarray]
    translation: translation_scores.Result | None


def _measure(config: Config, material: Material, subject: Subject, mesh: Mesh, advance: Advance) -> _Measured:
    options, source, sentences = config.evaluation, subject.source, material.sentences
    encoder = tokenizer.load(source.huggingface)
    tokenizer.check(encoder, source.decoder_config().vocab_size)
    decoder, dtype = source.load(mesh), jnp.dtype(config.training.compute_dtype)
    shape = {"rows": options.rows, "row_length": config.data.row_length, "dtype": dtype}

    def told(what: str) -> Callable[[int, int], None]:
        return functools.partial(advance, f"{source.name}: {what}")

    text = scoring.perplexity(decoder, encoder, sentences, mesh, **shape, progress=told("perplexity"))
    few = {code: lines[:_CHOSEN] for code, lines in sentences.items()}
    endings = scoring.continuation_choice(
        decoder, encoder, few, mesh, seed=config.seed, **shape, progress=told("choice of endings")
    )
    choices = {}
    if material.choices:
        choices = scoring.two_option_accuracy(
            decoder, encoder, material.choices, mesh, **shape, progress=told("choice of two options")
        )
    aligned, hits_KxN, projection = _alignment(config, material, subject, decoder, encoder, mesh, shape, told)
    translated = None
    if material.directions:
        outputs = translation.translate(
            decoder,
            encoder,
            material.template,
            material.translated,
            material.shown,
            material.directions,
            options.translation,
            mesh,
            dtype=dtype,
            seed=config.seed,
            progress=told("translation"),
        )
        translated = translation_scores.score(outputs, material.translated, options.pivot, options.translation)
    tasks = None
    if options.tasks:
        tasks = harness.evaluate_tasks(
            decoder,
            encoder,
            source.huggingface,
            mesh,
            options.tasks,
            data=options.tasks_data,
            limit=options.tasks_limit,
            **shape,
            progress=told("tasks"),
        )
    unknown, per_sentence = _writing(encoder, sentences)
    record = {
        "name": source.name,
        "path": str(source.run or source.huggingface),
        "family": source.decoder_config().family,
        "parameters": sum(x.size for x in jax.tree.leaves(nnx.state(decoder, nnx.Param))),
        "layers": source.decoder_config().num_layers,
        "align_layer": subject.align_layer,
        "unknown_rate": unknown,
        "tokens_per_sentence": per_sentence,
        "alignment": aligned,
        "tasks": tasks,
        "projection": projection,
        "training": _history(source),
    }
    return _Measured(source.name, record, hits_KxN, text, endings, choices, translated)


def _alignment(config, material, subject, decoder, encoder, mesh, shape, told):
    """The part `alignment` of a model's record, its hits [K-1,N] at the aligned layer, and the projection."""
    sentences, pivot = material.sentences, config.evaluation.pivot
    languages, done = list(sentences), 0
    every = sum(map(len, sentences.values()))

    def progress(more: int) -> None:
        nonlocal done
        done += more
        told("sentence vectors")(done, every)

    vectors = alignment.sentence_vectors(decoder, encoder, sentences, mesh, **shape, progress=progress)
    found = layers.measure(vectors, languages, pivot, subject.align_layer, config.seed, mesh)
    head = None
    if classifier := subject.source.load_classifier(mesh):
        states_KxNxD = vectors.predicting[subject.matching_layer]
        accuracy = metrics.matching_accuracy(
            states_KxNxD.reshape(-1, states_KxNxD.shape[-1]),
            np.repeat(np.arange(len(languages)), states_KxNxD.shape[1]),
            classifier,
            decoder.config.activation_function,
        )
        head = {name: float(value) for name, value in accuracy._asdict().items()}
    depth = len(vectors.mean) - 1
    projection = layers.projection(vectors.mean, languages, (0, subject.align_layer, depth))
    place = languages.index(pivot)
    to_and_from = found.hits_KxKxN[:, place].astype(float), found.hits_KxKxN[place].astype(float)
    hits_KxN = np.delete((to_and_from[0] + to_and_from[1]) / 2, place, axis=0)
    del vectors

    in_prompt = None
    if config.evaluation.in_prompt:
        told("vectors in the prompt")(0, 1)
        inside = alignment.in_prompt_vectors(decoder, encoder, material.template, sentences, pivot, mesh, **shape)
        in_prompt = layers.both_directions(inside)
    dali = None
    if pivot in material.choices and len(material.choices) > 1:
        told("vectors of two options")(0, 1)
        dali = _dali(decoder, encoder, material.choices, pivot, mesh, shape)
    return found.record | {"matching_head": head, "dali": dali, "in_prompt": in_prompt}, hits_KxN, projection


def _dali(decoder, encoder, choices, pivot, mesh, shape) -> dict[str, list[float]]:
    """`metrics.dali` at every layer, of the items that a language shares with the pivot; by language."""
    numbers = {code: {item.idx: item for item in items} for code, items in choices.items()}
    vectors = {}
    for code, items in numbers.items():
        texts = [f"{item.premise} {choice}" for item in items.values() for choice in (item.choice1, item.choice2)]
        flat_LxMxD = alignment.text_vectors(decoder, encoder, texts, mesh, **shape)
        vectors[code] = flat_LxMxD.reshape(len(flat_LxMxD), len(items), 2, -1)
    places = {code: {idx: n for n, idx in enumerate(items)} for code, items in numbers.items()}
    found = {}
    for code in numbers:
        shared = [idx for idx in numbers[code] if idx in numbers[pivot]]
        if code == pivot or not shared:
            continue
        english, other = ([places[c][idx] for idx in shared] for c in (pivot, code))
        found[code] = [
            float(np.mean(metrics.dali(x[english], y[other]).aligned))
            for x, y in zip(vectors[pivot], vectors[code], strict=True)
        ]
    return found


def _writing(encoder: Tokenizer, sentences: Mapping[str, Sequence[str]]) -> tuple[dict, dict]:
    """The share of tokens that stand for what the tokenizer cannot write, and tokens a sentence, by language."""
    unknown, per_sentence = {}, {}
    for code, lines in sentences.items():
        ids = np.concatenate([ids for ids, _ in encoder.encode_batch(lines)])
        unknown[code] = float(np.mean(ids == encoder.unk_id)) if encoder.unk_id is not None else 0.0
        per_sentence[code] = len(ids) / len(lines)
    return unknown, per_sentence


def _history(source: runs.Source) -> dict[str, list[dict[str, float]]] | None:
    """The losses of a run, for its curves."""
    if source.run is None:
        return None
    return {
        kind: [{k: r[k] for k in ("step", "loss", *LOSSES) if k in r} for r in training_metrics.read(source.run, kind)]
        for kind in ("train", "validation")
    }


def _record(one: _Measured, base: _Measured, options: EvaluationConfig, seed: int) -> dict[str, Any]:
    """A model's record with its intervals, and those of its differences from the first model."""
    counts = functools.partial(statistics.bootstrap_counts, resamples=options.resamples, seed=seed)
    others = [code for code in one.text if code != options.pivot]

    def by_language(interval: statistics.Interval) -> dict[str, list[float]]:
        rows = np.stack([interval.value, interval.low, interval.high], axis=1).tolist()
        return dict(zip([*others, "mean"], rows, strict=True))

    def with_mean(hits_KxN: np.ndarray) -> np.ndarray:
        return np.concatenate([hits_KxN, hits_KxN.mean(axis=0, keepdims=True)])

    own, count = with_mean(one.hits_KxN), counts(one.hits_KxN.shape[1])
    changes = {}
    if one is not base:
        retrieval = statistics.difference_interval(own, with_mean(base.hits_KxN), count)
        bits = {
            code: statistics.percentile_interval(
                p.bits_per_byte - base.text[code].bits_per_byte, _bits(p, count) - _bits(base.text[code], count)
            )
            for code, p in one.text.items()
        }
        changes = {
            "retrieval_change": by_language(retrieval),
            "bits_per_byte_change": {code: _triple(interval) for code, interval in bits.items()},
            "continuation_choice_change": _differences(one.endings, base.endings, counts),
            "choices_change": _differences(one.choices, base.choices, counts),
        }
    return one.record | {
        "intervals": {"retrieval": by_language(statistics.mean_interval(own, count)), **changes},
        "perplexity": {
            code: {
                "value": p.value,
                "bits_per_byte": _triple(statistics.percentile_interval(p.bits_per_byte, _bits(p, count))),
            }
            for code, p in one.text.items()
        },
        "continuation_choice": _means(one.endings, counts),
        "choices": _means(one.choices, counts) or None,
        "translation": one.translation and translation_scores.record(one.translation, base.translation, counts),
    }


def _bits(text: scoring.Perplexity, counts_BxN: np.ndarray) -> np.ndarray:
    """[B] bits a byte of each resample."""
    return (counts_BxN @ text.nll) / (counts_BxN @ text.bytes) / math.log(2)


def _means(hits: dict[str, np.ndarray], counts: Callable[[int], np.ndarray]) -> dict[str, list[float]]:
    return {code: _triple(statistics.mean_interval(h, counts(len(h)))) for code, h in hits.items() if len(h)}


def _differences(
    after: dict[str, np.ndarray], before: dict[str, np.ndarray], counts: Callable[[int], np.ndarray]
) -> dict[str, list[float]]:
    return {
        code: _triple(statistics.difference_interval(hits, before[code], counts(len(hits))))
        for code, hits in after.items()
        if len(hits)
    }


def _triple(interval: statistics.Interval) -> list[float]:
    return [float(interval.value), float(interval.low), float(interval.high)]
