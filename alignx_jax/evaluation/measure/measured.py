"""Everything that is measured of one model."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from alignx_jax import hosts
from alignx_jax.config import Config
from alignx_jax.data import chats, languages, prompts, tokenizer
from alignx_jax.data.tokenizer import Tokenizer
from alignx_jax.evaluation import rows
from alignx_jax.evaluation.measure import alignment, harness, layers, metrics, scoring, translation, translation_scores
from alignx_jax.evaluation.measure.scores import Place, Score, mean, mean_of, of_sums
from alignx_jax.models import huggingface
from alignx_jax.models.decoder import Decoder
from alignx_jax.objectives.language_matching import Classifier
from alignx_jax.runs import loading
from alignx_jax.training import metrics as training_metrics
from alignx_jax.training.step import LOSSES

Advance = Callable[[str, int, int], None]
"""Called with what is under way, how much of it is done, and how much it is in all."""

_CHOSEN = 200  # sentences whose endings are to be chosen; each costs four of its length


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model to measure."""

    source: loading.Source
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
    notes: tuple[str, ...]
    """What to know of the sentences."""


@dataclasses.dataclass(frozen=True)
class Measured:
    """What is measured of a model."""

    model: rows.Model
    scores: dict[Place, Score]
    translation: translation_scores.Result | None
    tasks: harness.Tasks | None


@dataclasses.dataclass(frozen=True)
class _Loaded:
    """A model in memory, and how it is run."""

    subject: Subject
    decoder: Decoder
    classifier: Classifier | None
    encoder: Tokenizer
    mesh: Mesh
    shape: dict[str, Any]
    """`rows`, `row_length` and `dtype`, as of `alignment.encode`."""
    advance: Advance

    def told(self, what: str) -> Callable[[int, int], None]:
        return functools.partial(self.advance, f"{self.subject.source.name}: {what}")


def measure(config: Config, material: Material, subject: Subject, mesh: Mesh, advance: Advance) -> Measured:
    """Loads a model and measures all that `config.evaluation` asks for.

    Raises:
      UserError: a tokenizer that does not fit its model, a sentence longer than a row, or a prompt than the context.
    """
    source = subject.source
    encoder = tokenizer.load(source.huggingface, source.decoder_config().vocab_size)
    advance(f"{source.name}: loading the weights", 0, 1)
    decoder, classifier = source.load(mesh), source.load_classifier(mesh)  # at once: a run may be training
    advance(f"{source.name}: loading the weights", 1, 1)
    dtype = jnp.dtype(config.training.compute_dtype)
    shape = {"rows": config.evaluation.rows, "row_length": config.data.row_length, "dtype": dtype}
    loaded = _Loaded(subject, decoder, classifier, encoder, mesh, shape, advance)
    scores = _of_text(loaded, config, material)
    aligned, projection = _alignment(loaded, config, material)
    translated, tasks = _translated(loaded, config, material), _tasks(loaded, config)
    model = rows.Model(
        name=source.name,
        path=str(source.run or source.huggingface),
        step=source.step if source.run else None,
        weights=source.weights,
        family=source.decoder_config().family,
        parameters=sum(x.size for x in jax.tree.leaves(nnx.state(decoder, nnx.Param))),
        layers=source.decoder_config().num_layers,
        align_layer=subject.align_layer,
        projection=projection,
        training=_history(source),
    )
    scores |= aligned | (translation_scores.scores(translated) if translated else {})
    return Measured(model, scores | (of_tasks(tasks) if tasks else {}), translated, tasks)


def _of_text(of: _Loaded, config: Config, material: Material) -> dict[Place, Score]:
    """What is measured of the text of each language, and the mean of those but the first language."""
    sentences, model = material.sentences, (of.decoder, of.encoder)
    text = scoring.perplexity(*model, sentences, of.mesh, **of.shape, progress=of.told("perplexity"))
    few = {code: lines[:_CHOSEN] for code, lines in sentences.items()}
    endings = scoring.continuation_choice(
        *model, few, of.mesh, seed=config.seed, **of.shape, progress=of.told("choice of endings")
    )
    choices = {}
    if material.choices:
        choices = scoring.two_option_accuracy(
            *model, material.choices, of.mesh, **of.shape, progress=of.told("choice of two options")
        )
    return of_text(text, endings, choices, config.evaluation.pivot) | _writing(of.encoder, sentences)


def of_text(
    text: Mapping[str, scoring.Perplexity],
    endings: Mapping[str, np.ndarray],
    choices: Mapping[str, np.ndarray],
    pivot: str,
) -> dict[Place, Score]:
    """The scores of languages, and of all but the first language their mean, but of perplexities."""
    by_measure = {
        "bits_per_byte": {code: of_sums(p.bits_per_byte_sums()) for code, p in text.items()},
        "continuation_choice": {code: of_sums(mean_of(hits)) for code, hits in endings.items() if len(hits)},
        "choices": {code: of_sums(mean_of(hits)) for code, hits in choices.items() if len(hits)},
    }
    found, home = {}, languages.home(text, pivot)
    for measure, of in by_measure.items():
        found |= {Place(measure, language=code): score for code, score in of.items()}
        if others := [score for code, score in of.items() if code != home]:
            found[Place(measure, language=rows.OTHERS)] = mean(others)
    perplexities = {code: of_sums(p.sums(), unit=p.tokens.tobytes()) for code, p in text.items()}
    return found | {Place("perplexity", language=code): score for code, score in perplexities.items()}


def of_tasks(tasks: harness.Tasks) -> dict[Place, Score]:
    """Every metric of every task, `tasks/NAME/METRIC,FILTER`, with its interval of 1.96 standard errors; and the mean
    accuracy, `tasks`."""
    found = {}
    for name, of in tasks.scores.items():
        for metric, (value, error, _) in of.items():
            ends = None if error is None else (value - 1.96 * error, value + 1.96 * error)
            found[Place(f"tasks/{name}/{metric}")] = Score(value, ends=ends)
    accuracies = _accuracies(tasks)
    return found | ({Place("tasks"): Score(float(np.mean(accuracies)))} if accuracies else {})


def _accuracies(tasks: harness.Tasks) -> list[float]:
    """Of every task that is in no group, and of every group; of its members where it has none, each set once."""
    members = {name for of in tasks.groups.values() for name in of}

    def of_task(task: str) -> list[float]:
        own = [of.value for name, of in tasks.scores.get(task, {}).items() if name.split(",")[0] == "acc"]
        return own or [value for member in tasks.groups.get(task, ()) for value in of_task(member)]

    return [x for task in dict.fromkeys([*tasks.scores, *tasks.groups]) if task not in members for x in of_task(task)]


def _translated(of: _Loaded, config: Config, material: Material) -> translation_scores.Result | None:
    """The translations with their scores; the latter of the first process alone."""
    if not material.directions:
        return None
    stops = {*huggingface.stop_ids(of.subject.source.huggingface, of.encoder.eos_id), *chats.turn_ends(of.encoder)}
    outputs = translation.translate(
        of.decoder,
        of.encoder,
        material.template,
        material.translated,
        material.shown,
        material.directions,
        config.evaluation.translation,
        of.mesh,
        eos_ids=sorted(stops),
        dtype=of.shape["dtype"],
        seed=config.seed,
        progress=of.told("translation"),
    )
    return _scored(*outputs, material.translated, config)


def _scored(outputs, cut, sentences: dict[str, list[str]], config: Config) -> translation_scores.Result | None:
    """Of the first process, which writes the results: the others need none of COMET and its like.

    They wait here: it may take minutes, which a collective that they came to first might not.
    """
    options = config.evaluation
    return hosts.first(
        "scores", lambda: translation_scores.score(outputs, sentences, options.pivot, options.translation, cut)
    )


def _tasks(of: _Loaded, config: Config) -> harness.Tasks | None:
    options = config.evaluation
    if not options.tasks:
        return None
    return harness.evaluate_tasks(
        of.decoder,
        of.encoder,
        of.subject.source.huggingface,
        of.mesh,
        options.tasks,
        data=options.tasks_data,
        limit=options.tasks_limit,
        rows=options.rows,
        dtype=of.shape["dtype"],
        progress=of.told("tasks"),
    )


def _alignment(of: _Loaded, config: Config, material: Material) -> tuple[dict[Place, Score], list[rows.Projection]]:
    """The scores of alignment, and sentences in the plane."""
    sentences, pivot, layer = material.sentences, config.evaluation.pivot, of.subject.align_layer
    codes, done = list(sentences), 0
    every = sum(map(len, sentences.values()))

    def progress(more: int) -> None:
        nonlocal done
        done += more
        of.told("sentence vectors")(done, every)

    model = of.decoder, of.encoder
    vectors = alignment.sentence_vectors(*model, sentences, of.mesh, **of.shape, progress=progress)
    curves = layers.measure(vectors, codes, pivot, config.seed, of.mesh)
    scores = layers.between_all(vectors.mean[layer], codes, layer)
    if of.classifier:
        states_KxNxD = vectors.predicting[of.subject.matching_layer]
        accuracy = metrics.matching_accuracy(
            states_KxNxD.reshape(-1, states_KxNxD.shape[-1]),
            np.repeat(np.arange(len(codes)), states_KxNxD.shape[1]),
            of.classifier,
            of.decoder.config.activation_function,
        )
        scores |= {Place(f"matching_head_{name}"): Score(float(x)) for name, x in accuracy._asdict().items()}
    projection = layers.projection(vectors.mean, codes, (0, layer, len(vectors.mean) - 1))
    del vectors

    if config.evaluation.in_prompt:
        of.told("vectors in the prompt")(0, 1)
        inside = alignment.in_prompt_vectors(*model, material.template, sentences, pivot, of.mesh, **of.shape)
        curves |= layers.both_directions("in_prompt", inside, pivot)
    if pivot in material.choices and len(material.choices) > 1:
        of.told("vectors of two options")(0, 1)
        curves |= dali(*model, material.choices, pivot, of.mesh, **of.shape)
    return scores | layers.scores(curves), projection


def dali(
    decoder: Decoder,
    encoder: Tokenizer,
    choices: Mapping[str, Sequence[scoring.Item]],
    pivot: str,
    mesh: Mesh,
    **options,
) -> layers.Curves:
    """`metrics.dali` of the items that a language shares with the pivot.

    A text is the premise and an option with a space between; its vector is the position-weighted mean over its tokens,
    BOS counted, one of the two of the authors' code (Kartik21/DALI_MATS, src/embed_extractor.py), as for MEXA.
    `options` are those of `alignment.encode`.

    Raises:
      UserError: a text longer than a row.
    """
    numbers = {code: {item.idx: item for item in items} for code, items in choices.items()}
    vectors = {}
    for code, items in numbers.items():
        texts = [f"{item.premise} {choice}" for item in items.values() for choice in (item.choice1, item.choice2)]
        flat_LxMxD = alignment.text_vectors(decoder, encoder, texts, mesh, pool="weighted", **options)
        vectors[code] = flat_LxMxD.reshape(len(flat_LxMxD), len(items), 2, -1)
    places = {code: {idx: n for n, idx in enumerate(items)} for code, items in numbers.items()}
    aligned, strict = {}, {}
    for code in numbers:
        shared = [idx for idx in numbers[code] if idx in numbers[pivot]]
        if code == pivot or not shared:
            continue
        here, there = ([places[c][idx] for idx in shared] for c in (pivot, code))
        pairs = zip(vectors[pivot], vectors[code], strict=True)
        hits = [metrics.dali(x_Mx2xD[here], y_Mx2xD[there]) for x_Mx2xD, y_Mx2xD in pairs]
        aligned[Place("dali", language=code)] = layers.of_means(np.stack([hit.aligned for hit in hits]))
        strict[Place("dali_strict", language=code)] = layers.of_means(np.stack([hit.strict for hit in hits]))
    return layers.with_mean(aligned) | layers.with_mean(strict)


def _writing(encoder: Tokenizer, sentences: Mapping[str, Sequence[str]]) -> dict[Place, Score]:
    """The share of tokens that stand for what the tokenizer cannot write, and tokens a sentence, by language."""
    found = {}
    for code, lines in sentences.items():
        ids = np.concatenate([ids for ids, _ in encoder.encode_batch(lines)])
        unknown = float(np.mean(ids == encoder.unk_id)) if encoder.unk_id is not None else 0.0
        found[Place("unknown_rate", language=code)] = Score(unknown, len(lines))
        found[Place("tokens_per_sentence", language=code)] = Score(len(ids) / len(lines), len(lines))
    return found


def _history(source: loading.Source) -> rows.Training | None:
    """The losses of a run, for its curves, and how they stood to each other (training/balance.py)."""
    if source.run is None:
        return None
    train, validation = (
        [rows.Losses(r["step"], **{k: r[k] for k in ("loss", *LOSSES) if k in r}) for r in records]
        for records in (training_metrics.read(source.run, kind) for kind in ("train", "validation"))
    )
    return rows.Training(train, validation, training_metrics.read(source.run, "balance"))
