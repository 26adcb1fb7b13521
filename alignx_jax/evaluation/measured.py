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
from alignx_jax.data import chats, prompts, tokenizer
from alignx_jax.data.tokenizer import Tokenizer
from alignx_jax.evaluation import alignment, harness, layers, metrics, scoring, translation, translation_scores
from alignx_jax.models import huggingface
from alignx_jax.models.decoder import Decoder
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
    """What is measured of a model, and the values of single sentences that intervals are made of."""

    name: str
    record: dict[str, Any]
    alignment: dict[str, dict[str, np.ndarray]]
    """`layers.Layers.sentences` and what `dali` finds, by measure and language, [L+1,N]."""
    text: dict[str, scoring.Perplexity]
    endings: dict[str, np.ndarray]
    choices: dict[str, np.ndarray]
    translation: translation_scores.Result | None


def measure(config: Config, material: Material, subject: Subject, mesh: Mesh, advance: Advance) -> Measured:
    """Loads a model and measures all that `config.evaluation` asks for.

    Raises:
      UserError: a tokenizer that does not fit its model, a sentence longer than a row, or a prompt than the context.
    """
    options, source, sentences = config.evaluation, subject.source, material.sentences
    encoder = tokenizer.load(source.huggingface, source.decoder_config().vocab_size)
    eos_ids = sorted({*huggingface.stop_ids(source.huggingface, encoder.eos_id), *chats.turn_ends(encoder)})
    advance(f"{source.name}: loading the weights", 0, 1)
    decoder, classifier = source.load(mesh), source.load_classifier(mesh)  # at once: a run may be training
    advance(f"{source.name}: loading the weights", 1, 1)
    dtype = jnp.dtype(config.training.compute_dtype)
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
    aligned, by_sentence, projection = _alignment(
        config, material, subject, decoder, encoder, classifier, mesh, shape, told
    )
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
            eos_ids=eos_ids,
            dtype=dtype,
            seed=config.seed,
            progress=told("translation"),
        )
        translated = _scores(*outputs, material.translated, config)
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
            rows=options.rows,
            dtype=dtype,
            progress=told("tasks"),
        )
    unknown, per_sentence = _writing(encoder, sentences)
    record = {
        "name": source.name,
        "path": str(source.run or source.huggingface),
        "step": source.step if source.run else None,
        "family": source.decoder_config().family,
        "parameters": sum(x.size for x in jax.tree.leaves(nnx.state(decoder, nnx.Param))),
        "layers": source.decoder_config().num_layers,
        "align_layer": subject.align_layer,
        "unknown_rate": unknown,
        "tokens_per_sentence": per_sentence,
        "alignment": aligned,
        "tasks": tasks and tasks.scores,
        "task_requests": tasks and {"max_length": tasks.max_length, "cut": tasks.cut},
        "task_groups": tasks and tasks.groups,
        "projection": projection,
        "training": _history(source),
    }
    return Measured(source.name, record, by_sentence, text, endings, choices, translated)


def _scores(outputs, cut, sentences: dict[str, list[str]], config: Config) -> translation_scores.Result | None:
    """Of the first process, which writes the results: the others need none of COMET and its like.

    They wait here: it may take minutes, which a collective that they came to first might not.
    """
    options = config.evaluation
    return hosts.first(
        "scores", lambda: translation_scores.score(outputs, sentences, options.pivot, options.translation, cut)
    )


def _alignment(config, material, subject, decoder, encoder, classifier, mesh, shape, told):
    """The part `alignment` of a model's record, the single sentences behind it, and the projection."""
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
    if classifier:
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
    del vectors

    in_prompt = None
    if config.evaluation.in_prompt:
        told("vectors in the prompt")(0, 1)
        inside = alignment.in_prompt_vectors(decoder, encoder, material.template, sentences, pivot, mesh, **shape)
        in_prompt = layers.both_directions(inside)
    by_item: dict[str, dict[str, np.ndarray]] = {}
    if pivot in material.choices and len(material.choices) > 1:
        told("vectors of two options")(0, 1)
        by_item = dali(decoder, encoder, material.choices, pivot, mesh, **shape)
    shares = {
        name: {code: x_LxN.mean(axis=1, dtype=float).tolist() for code, x_LxN in of.items()} or None
        for name, of in ({"dali": {}, "dali_strict": {}} | by_item).items()
    }
    record = found.record | shares | {"matching_head": head, "in_prompt": in_prompt}
    return record, found.sentences | {name: of for name, of in by_item.items() if of}, projection


def dali(
    decoder: Decoder,
    encoder: Tokenizer,
    choices: Mapping[str, Sequence[scoring.Item]],
    pivot: str,
    mesh: Mesh,
    **options,
) -> dict[str, dict[str, np.ndarray]]:
    """`metrics.dali` of the items that a language shares with the pivot: `dali` and `dali_strict` by language, [L+1,N].

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
    found: dict[str, dict[str, np.ndarray]] = {"dali": {}, "dali_strict": {}}
    for code in numbers:
        shared = [idx for idx in numbers[code] if idx in numbers[pivot]]
        if code == pivot or not shared:
            continue
        here, there = ([places[c][idx] for idx in shared] for c in (pivot, code))
        pairs = zip(vectors[pivot], vectors[code], strict=True)
        hits = [metrics.dali(x_Mx2xD[here], y_Mx2xD[there]) for x_Mx2xD, y_Mx2xD in pairs]
        found["dali"][code] = np.stack([hit.aligned for hit in hits]).astype(np.float32)
        found["dali_strict"][code] = np.stack([hit.strict for hit in hits]).astype(np.float32)
    return found


def _writing(encoder: Tokenizer, sentences: Mapping[str, Sequence[str]]) -> tuple[dict, dict]:
    """The share of tokens that stand for what the tokenizer cannot write, and tokens a sentence, by language."""
    unknown, per_sentence = {}, {}
    for code, lines in sentences.items():
        ids = np.concatenate([ids for ids, _ in encoder.encode_batch(lines)])
        unknown[code] = float(np.mean(ids == encoder.unk_id)) if encoder.unk_id is not None else 0.0
        per_sentence[code] = len(ids) / len(lines)
    return unknown, per_sentence


def _history(source: loading.Source) -> dict[str, list[dict[str, float]]] | None:
    """The losses of a run, for its curves, and how they stood to each other (training/balance.py)."""
    if source.run is None:
        return None
    curves = {
        kind: [{k: r[k] for k in ("step", "loss", *LOSSES) if k in r} for r in training_metrics.read(source.run, kind)]
        for kind in ("train", "validation")
    }
    return curves | {"balance": training_metrics.read(source.run, "balance")}
