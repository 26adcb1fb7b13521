"""Translation of the evaluation sentences by the model, with the template it was trained with.

A prompt is what training put before a response (`data/examples.py`): prompt and response were encoded as one text. The
tokens of a prompt alone are the first tokens of that where no token holds the end of one and the beginning of the
other. After a line break, as in the packaged templates, none does; a space at the end of a prompt would be one with the
first word of the response, and is left to the model. A prompt that ends in a quotation mark or a letter can still be
split in a way that training never saw.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
from jax.sharding import Mesh

from alignx_jax.config import TranslationConfig
from alignx_jax.data.languages import normalize
from alignx_jax.data.prompts import Template
from alignx_jax.data.tokenizer import Tokenizer
from alignx_jax.exits import UserError
from alignx_jax.models import generation
from alignx_jax.models.decoder import Decoder

Direction = tuple[str, str]
"""Codes of the source language and of the target language."""

COMET = "comet-score"
"""The program of `unbabel-comet`, which cannot be imported here: it needs NumPy 1 and transformers 4."""


class Outputs(NamedTuple):
    """What a model writes for every sentence, by direction."""

    lines: dict[Direction, list[str]]
    cut: dict[Direction, list[bool]]
    """Whether the line had not ended after `max_tokens`: neither an end token came nor a line break."""


_FLAG = "--evaluation.translation"


def parse_directions(specs: Sequence[str], languages: Sequence[str], pivot: str) -> list[Direction]:
    """The directions that `--evaluation.translation.directions` asks for, each once, in the order given.

    Args:
      specs: pairs such as `de-en` or `zh-Hant-en`, `pivot` (from the pivot to every language, and back), `all`, `none`.
      languages: codes of the evaluation sentences, the pivot among them.

    Raises:
      UserError: a pair that is not two of the languages.
    """
    others = [code for code in languages if code != pivot]
    found: dict[Direction, None] = {}
    for spec in specs:
        match spec:
            case "none":
                directions = []
            case "pivot":
                directions = [(pivot, code) for code in others] + [(code, pivot) for code in others]
            case "all":
                directions = list(itertools.permutations(languages, 2))
            case _:
                directions = [_direction(spec, languages)]
        found.update(dict.fromkeys(directions))
    return list(found)


def _direction(spec: str, languages: Sequence[str]) -> Direction:
    """A code may hold dashes itself: there is to be one way to split `spec` into two languages of the sentences."""
    parts = spec.split("-")
    splits = ((_code("-".join(parts[:n])), _code("-".join(parts[n:]))) for n in range(1, len(parts)))
    pairs = {pair for pair in splits if len({*pair}) == 2 and {*pair} <= {*languages}}
    if len(pairs) != 1:
        raise UserError(
            f"{_FLAG}.directions: {spec!r} does not name two languages of the sentences ({', '.join(languages)}); "
            f"write a pair of them such as {languages[0]}-{languages[-1]}, or pivot, all, none"
        )
    return pairs.pop()


def _code(text: str) -> str | None:
    try:
        return normalize(text)
    except UserError:
        return None


def check(config: TranslationConfig, template: Template, examples: Mapping[str, Sequence[str]]) -> None:
    """Refuses what could not be translated or scored, before a model is loaded.

    Raises:
      UserError: a template without an instruction to translate, fewer examples than shots, or COMET that is not there.
    """
    if not template.translation.strip():
        raise UserError(
            "--data.template: its 'translation' is empty, so the model cannot be asked to translate; write the "
            f"instruction that it was trained with, or set {_FLAG}.directions=none"
        )
    lines = min(map(len, examples.values()))
    if lines < config.shots:
        raise UserError(
            f"{_FLAG}.shots={config.shots}: only {lines} sentences are left when {config.limit} are translated; "
            f"lower it or {_FLAG}.limit"
        )
    if config.comet is None:
        return
    if not shutil.which(COMET):
        raise UserError(
            f"{_FLAG}.comet needs the program {COMET}; install unbabel-comet in an environment of its own and put its "
            "programs on the PATH, or leave the flag out"
        )
    checkpoint = Path(config.comet).expanduser()
    if checkpoint.suffix != ".ckpt" or not checkpoint.is_file():
        raise UserError(
            f"{_FLAG}.comet={config.comet}: no such checkpoint; give the .ckpt file of a COMET model, in the folder "
            "that it is distributed with"
        )


def translate(
    decoder: Decoder,
    tokenizer: Tokenizer,
    template: Template,
    sentences: Mapping[str, Sequence[str]],
    examples: Mapping[str, Sequence[str]],
    directions: Sequence[Direction],
    config: TranslationConfig,
    mesh: Mesh,
    *,
    eos_ids: Sequence[int],
    dtype: jnp.dtype,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
) -> Outputs:
    """What the model writes for every sentence in every direction; all of them are generated together.

    Of what is generated the first line with any text counts: sentences in training are one line and an end token, and
    a model that has not learned the end token goes on with another prompt.

    Args:
      sentences: of each language; number n says the same in all.
      examples: sentences likewise, none of those to be translated; the first `config.shots` of them are shown,
        translated in the same direction, before each sentence.
      eos_ids: any of these ends a translation; see `huggingface.stop_ids`.
      progress: called with the numbers of translations done and wanted.

    Raises:
      UserError: a prompt that does not leave room for the translation in the model's context.
    """
    template = template.with_controls(tokenizer.controls.mark)
    texts = [
        text for source, target in directions for text in prompts(template, sentences, examples, source, target, config)
    ]
    requests = encode(tokenizer, texts)
    count = len(texts) // len(directions)
    _check_room(requests, count, directions, config, decoder.config.max_positions)
    outputs = generation.generate(
        decoder,
        requests,
        mesh,
        max_tokens=config.max_tokens,
        eos_ids=eos_ids,
        rows=config.rows,
        dtype=dtype,
        decoding=generation.Decoding(
            config.method, config.beams, config.length_penalty, config.temperature, config.top_k, config.top_p
        ),
        seed=seed,
        progress=progress,
    )
    texts = [tokenizer.decode(ids) for ids in outputs]
    cut = [
        len(ids) == config.max_tokens and "\n" not in text.lstrip() for ids, text in zip(outputs, texts, strict=True)
    ]
    places = {pair: slice(n * count, (n + 1) * count) for n, pair in enumerate(directions)}
    return Outputs(
        {pair: [first_line(text) for text in texts[place]] for pair, place in places.items()},
        {pair: cut[place] for pair, place in places.items()},
    )


def _check_room(
    requests: list[list[int]], count: int, directions: Sequence[Direction], config: TranslationConfig, context: int
) -> None:
    """Whether the longest prompt leaves room for its translation; there are `count` in each direction."""
    longest = max(range(len(requests)), key=lambda n: len(requests[n]))
    if len(requests[longest]) + config.max_tokens > context:
        place, number = divmod(longest, count)
        raise UserError(
            f"the prompt of sentence {number + 1} ({'-'.join(directions[place])}) has {len(requests[longest])} tokens, "
            f"and with {_FLAG}.max-tokens={config.max_tokens} more it is longer than the model's context of {context}; "
            f"lower that, {_FLAG}.shots or {_FLAG}.limit"
        )


def prompts(
    template: Template,
    sentences: Mapping[str, Sequence[str]],
    examples: Mapping[str, Sequence[str]],
    source: str,
    target: str,
    config: TranslationConfig,
) -> list[str]:
    """The prompt of every sentence: its shots, each a prompt with its response, and its own, a blank line between."""
    shots = [
        template.render_translation(examples[source][n], examples[target][n], source, target).text
        for n in range(config.shots)
    ]
    own = (template.render_translation(sentence, "", source, target).text for sentence in sentences[source])
    return ["\n\n".join([*shots, text]) for text in own]


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """The tokens of prompts as in training; spaces at the end are left to the model."""
    return [tokenizer.begin(ids.tolist()) for ids, _ in tokenizer.encode_batch([text.rstrip(" ") for text in texts])]


def first_line(text: str) -> str:
    """The first line that is not empty, without white space at its ends."""
    return text.lstrip().partition("\n")[0].rstrip()
