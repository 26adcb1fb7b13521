"""What the study's runs are judged by, on sentences that neither the base model nor any run was trained on.

python -m benchmarks.study.measure --model BASE/model --runs FOLDER [--data FOLDER]

Of the base model and of every finished run of `benchmarks.study.arms`, into `measured.json` beside it:

- after both stages, alignment of separately encoded sentences at every layer: FLORES-200 devtest, NTREX-128, and
  retrieval of Tatoeba's pairs;
- after stage 2, what the model is good for: perplexity of the test pairs by language, translation of XNLI's test
  premises and hypotheses in every direction (and of Finnish test pairs, which XNLI has not), XCOPA.

XNLI's test split, as the study's data has it, is split by premise; no sentence of it is in a training file. Nothing was
chosen by any of this. Finished measurements are skipped when the program is started again.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import pathlib
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax.sharding import Mesh
from rich.console import Console

from alignx_jax import sharding
from alignx_jax.config import TranslationConfig
from alignx_jax.data import pipeline, prompts, tokenizer
from alignx_jax.evaluation.measure import alignment, layers, scoring, translation, translation_scores
from alignx_jax.evaluation.measure.scores import Place
from alignx_jax.runs import loading
from benchmarks.study import arms
from benchmarks.study.base import DATA

CODES = ("en", *arms.LANGUAGES)
SENTENCES = 200
"""Of each language of FLORES and NTREX, and pairs of each language of Tatoeba: the first."""
TATOEBA = dict(
    zip(arms.LANGUAGES, ("ara", "deu", "fin", "fra", "hin", "rus", "swh", "tha", "tur", "vie", "cmn"), strict=True)
)
"""What it calls the languages."""
TEXT = 200  # test pairs of a language for perplexity
TRANSLATED = {"pivot": 60, "x-y": 10}  # sentences a direction, to or from English and between others
ENCODED = {"rows": 8, "row_length": 512, "dtype": jnp.dtype("float32")}
TRANSLATION = TranslationConfig(rows=64, max_tokens=64)
METRICS = "chrF++", "off_target", "copy", "empty"


@dataclasses.dataclass(frozen=True)
class Options:
    model: pathlib.Path
    """The base model, a Hugging Face folder."""
    runs: pathlib.Path
    """Folder of the runs."""
    data: pathlib.Path = DATA
    """Folder with `train_parallel`, `instruct` and `eval`; default: `data` in $ALIGNX_SHARED, or in `shared` beside the
    repository."""
    arms: tuple[str, ...] = tuple(arms.ARMS)


@dataclasses.dataclass(frozen=True)
class Tests:
    """Everything that is measured on."""

    multiway: dict[str, dict[str, list[str]]]
    """By name, sentences that say the same by language."""
    tatoeba: dict[str, list[tuple[str, str]]]
    """By language, pairs with English."""
    text: dict[str, list[str]]
    """By language, sentences of test pairs."""
    premises: dict[str, list[str]]
    """XNLI's, by language."""
    apart: dict[str, dict[str, list[str]]]
    """By language that XNLI has not, test pairs with English."""
    choices: dict[str, list[scoring.Item]]


def read(data: pathlib.Path) -> Tests:
    def records(file: str) -> list[dict]:
        with gzip.open(data / file, "rt", encoding="utf-8") as lines:
            return [json.loads(line) for line in lines]

    multiway = {
        "FLORES-200": data / "eval/flores200/devtest.jsonl.gz",
        "NTREX-128": data / "eval/ntrex128/newstest2019.jsonl.gz",
    }
    pairs = {code: records(f"train_parallel/pairs/{code}-en.test.jsonl.gz") for code in arms.LANGUAGES}
    asked = {r["input"] for r in records("instruct/en.train.jsonl.gz")}  # two of Tatoeba's sentences are among them
    tatoeba = [r for r in records("eval/tatoeba/tatoeba_v1_test.jsonl.gz") if r["eng"] not in asked]
    xnli = [r["text"] for r in records("train_parallel/multiway/xnli.jsonl.gz") if r["split"] == "test"]
    there = [code for code in CODES if all(code in texts for texts in xnli)]
    choices = scoring.read_choices([str(data / "eval/xcopa")])
    spread = {code: [of[n * len(of) // TEXT] for n in range(min(TEXT, len(of)))] for code, of in pairs.items()}
    return Tests(
        multiway={
            name: {code: lines[:SENTENCES] for code, lines in pipeline.multiway(str(file), CODES).items()}
            for name, file in multiway.items()
        },
        tatoeba={
            code: [(r["src"], r["eng"]) for r in tatoeba if r["lang"] == theirs][:SENTENCES]
            for code, theirs in TATOEBA.items()
            if code in CODES
        },
        text={"en": [r["tgt"] for of in spread.values() for r in of[:: len(spread)]]}
        | {code: [r["src"] for r in of] for code, of in spread.items()},
        premises={code: [texts[code] for texts in xnli] for code in there},
        apart={
            code: {"en": [r["tgt"] for r in of], code: [r["src"] for r in of]}
            for code, of in spread.items()
            if code not in there
        },
        choices={code: of for code, of in choices.items() if code in CODES},
    )


def alignment_of(decoder, encoder, tests: Tests, mesh: Mesh) -> dict[str, Any]:
    """By test set: curves over layers; of retrieval, MEXA and CKA one for each language."""
    found: dict[str, Any] = {}
    for name, sentences in tests.multiway.items():
        vectors = alignment.sentence_vectors(decoder, encoder, sentences, mesh, **ENCODED)
        curves = layers.measure(vectors, list(sentences), "en", seed=0, mesh=mesh)
        found[name] = {of: layers.by_language(curves, of) for of in ("retrieval", "mexa", "cka_debiased")} | {
            of: curves[Place(of)].value_L.tolist()
            for of in ("language_probe", "language_variance", "meaning_variance", "total_variance", "random_cosine")
        }
    texts = [text for pairs in tests.tatoeba.values() for pair in pairs for text in pair]
    every_LxMxD = alignment.text_vectors(decoder, encoder, texts, mesh, **ENCODED)
    ends = np.cumsum([2 * len(pairs) for pairs in tests.tatoeba.values()])[:-1]
    sides = {
        code: (x_LxMxD[:, ::2], x_LxMxD[:, 1::2])
        for code, x_LxMxD in zip(tests.tatoeba, np.split(every_LxMxD, ends, axis=1), strict=True)
    }
    curves = layers.both_directions("retrieval", sides, "en")
    found["Tatoeba"] = {"retrieval": layers.by_language(curves, "retrieval")}
    return found


def use_of(decoder, encoder, tests: Tests, mesh: Mesh) -> dict[str, Any]:
    """Perplexity, translation and two-option items, by language or direction."""
    text = scoring.perplexity(decoder, encoder, tests.text, mesh, **ENCODED)
    right = scoring.two_option_accuracy(decoder, encoder, tests.choices, mesh, **ENCODED)
    every = translation.parse_directions(["all"], list(tests.premises), "en")
    with_english = [pair for pair in every if "en" in pair]
    template, translated = prompts.load(arms.STUDY.data.template), {}
    for sentences, directions, count in (
        (tests.premises, with_english, TRANSLATED["pivot"]),
        (tests.premises, [pair for pair in every if "en" not in pair], TRANSLATED["x-y"]),
        *((of, [("en", code), (code, "en")], TRANSLATED["pivot"]) for code, of in tests.apart.items()),
    ):
        some = {code: lines[:count] for code, lines in sentences.items()}
        outputs, cut = translation.translate(
            decoder,
            encoder,
            template,
            some,
            {},
            directions,
            TRANSLATION,
            mesh,
            eos_ids=[encoder.eos_id],
            dtype=ENCODED["dtype"],
            seed=0,
        )
        scores = translation_scores.score(outputs, some, "en", TRANSLATION, cut)
        for (source, target), measures in scores.measures.items():
            values = {name: measures[name].value for name in METRICS if name in measures}
            translated[f"{source}-{target}"] = values | {"sample": outputs[source, target][0]}
    return {
        "perplexity": {code: {"value": p.value, "bits_per_byte": p.bits_per_byte} for code, p in text.items()},
        "choices": {code: float(hits.mean()) for code, hits in right.items()},
        "translation": translated,
    }


def measure(
    folder: pathlib.Path, stages: Mapping[str, pathlib.Path], tests: Tests, mesh: Mesh, console: Console
) -> None:
    """Writes `folder/measured.json`: of each stage its alignment, of the last also what the model is good for."""
    file, found = folder / "measured.json", {}
    if file.is_file():
        return
    began = time.monotonic()
    for stage, path in stages.items():
        source = loading.find(str(path))
        decoder, encoder = source.load(mesh), tokenizer.load(source.huggingface)
        found[stage] = {"alignment": alignment_of(decoder, encoder, tests, mesh)}
        if stage == list(stages)[-1]:
            found[stage] |= use_of(decoder, encoder, tests, mesh)
    arms.write_whole(file, found)
    console.print(f"{folder}: {time.monotonic() - began:.0f} s", highlight=False, soft_wrap=True)


def main(options: Options) -> None:
    console, tests = Console(), read(options.data)
    sharding.prepare_devices("1x1")
    jax.config.update("jax_compilation_cache_dir", str(options.runs / "cache/compiled"))
    mesh = sharding.make_mesh("1x1")
    with jax.set_mesh(mesh):
        measure(options.model.parent, {"base": options.model}, tests, mesh, console)
        for arm, seed in arms.finished(options.runs):
            if arm in options.arms:
                folder = options.runs / arm / str(seed)
                measure(folder, {stage: folder / stage for stage in ("stage1", "stage2")}, tests, mesh, console)


if __name__ == "__main__":
    main(tyro.cli(Options))
