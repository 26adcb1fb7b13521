"""A short trial on a real pre-trained LLM: what stage 1 does to it in 30 steps, arm beside arm.

python -m benchmarks.real.models --to MODELS
python -m benchmarks.real.trial --model MODELS/gemma3-270m --to FOLDER [--arms ours published next-token]

Stage 1 on 150 pairs each of six languages with English, both directions; every arm has the same base model, the same
pairs, rows, steps, learning rate and seed, and differs in what its line of `ARMS` says. Then, of each arm and of the
base model:

- retrieval with English, percent by layer, each sentence encoded by itself: 100 sentences of FLORES-200 devtest in
  twelve languages, and the dev pairs of the languages trained on, by which arms are compared and settings chosen;
- greedy translation of FLORES-200 devtest with the training prompt, English to and from `--translated`: chrF++ and
  share of outputs in another language, with paired 95 % intervals of the change against `next-token`;
- bits a byte of the test pairs, and the validation losses of the run.

An arm that is finished is skipped when the program is started again. Nothing is chosen by FLORES-200.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import pathlib
import time
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax.sharding import Mesh
from rich.table import Table

from alignx_jax import config_files as configs
from alignx_jax import sharding
from alignx_jax.config import Config, DataConfig, OptimizerConfig, TrainingConfig, TranslationConfig
from alignx_jax.console import Screen
from alignx_jax.data import pipeline, prompts, tokenizer
from alignx_jax.evaluation.measure import alignment, layers, scoring, statistics, translation, translation_scores
from alignx_jax.evaluation.measure.scores import Place
from alignx_jax.runs import loading
from alignx_jax.training import begin, build, metrics, stopping
from benchmarks import record
from benchmarks.study.arms import OFF, changed, write_whole
from benchmarks.study.base import DATA

TRAINED = ("sw", "fi", "th", "hi", "tr", "ar")
CODES = ("en", *TRAINED, "de", "fr", "ru", "zh", "vi")
TRIAL = Config(
    data=DataConfig(limit=150, validation=60),
    optimizer=OptimizerConfig(learning_rate=2e-5, warmup_steps=3),
    training=TrainingConfig(rows=8, steps=30, validate_every=1000, save_every=1000, keep=1),
)
PUBLISHED: dict[str, Any] = {"objective.standardize": "none", "data.spans": "in-prompt"}
SEPARATE: dict[str, Any] = {"data.spans": "separate", "data.cutoff": 384}
IN_PROMPT: dict[str, Any] = {"data.spans": "in-prompt"}
ARMS: dict[str, dict[str, Any]] = {
    "next-token": IN_PROMPT | OFF[0] | OFF[1],
    "published": PUBLISHED,
    "ours": SEPARATE,
    "in-prompt": IN_PROMPT,
    "contrastive": SEPARATE | OFF[1],
}
"""At the layer of `Options.layer`; `next-token` first, for the others are compared with it."""
LENGTHS = {"rows": 8, "row_length": 512, "dtype": jnp.dtype("bfloat16")}


@dataclasses.dataclass(frozen=True)
class Options:
    model: pathlib.Path
    """The base model, a Hugging Face folder."""
    to: pathlib.Path
    """Folder of the runs."""
    layer: int
    """The layer that is aligned, and measured at."""
    data: pathlib.Path = DATA
    """Folder with `train_parallel` and `eval`; default: `data` in $ALIGNX_SHARED, or in `shared` beside the
    repository."""
    arms: tuple[Literal[tuple(ARMS)], ...] = tuple(ARMS)
    seed: int = 0
    sentences: int = 100
    """Of FLORES-200, for retrieval."""
    translated: tuple[str, ...] = ("sw", "fi")
    """Languages translated to and from English; none: ()."""
    outputs: int = 48
    """Sentences translated a direction."""
    tokens: int = 96
    """Most tokens of a translation."""
    results: str | None = None
    """File for the results, JSON."""


def train(arm: str, options: Options, mesh: Mesh, folder: pathlib.Path) -> dict[str, Any]:
    """Stage 1 of an arm in `folder`; what it took and its losses."""
    pairs = options.data / "train_parallel/pairs"
    common = {
        "seed": options.seed,
        "stage": "1",
        "model": str(options.model),
        "data.parallel": tuple(str(pairs / f"{code}-en.train.jsonl.gz") for code in TRAINED),
        "data.cache": str(options.to / "cache"),
        "objective.contrastive.layer": options.layer,
    }
    config = configs.check(changed(TRIAL, common | ARMS[arm]))
    source, began = loading.find(config.model), time.monotonic()
    data = pipeline.build(config, "1", tokenizer.load(source.huggingface))
    with open(folder / "log.txt", "a", encoding="utf-8") as log:
        console, weights = Screen(file=log, width=140), build.Weights(source, config, mesh)
        result = begin.train(config, folder / "stage1", weights, data, mesh, console, arm, stopping.Stop())
    steps = metrics.read(folder / "stage1", "train")
    return {
        "config": {name: value for name, value in configs.flat(config).items() if "/" not in str(value)},
        "before": result.before,
        "after": result.after,
        "steps": steps,
        "seconds": time.monotonic() - began,
    }


def measure(path: pathlib.Path, options: Options, mesh: Mesh) -> dict[str, Any]:
    """Retrieval by layer, translations, bits a byte."""
    source, began = loading.find(str(path)), time.monotonic()
    decoder, encoder = source.load(mesh, jnp.bfloat16), tokenizer.load(source.huggingface)
    flores = pipeline.multiway(str(options.data / "eval/flores200/devtest.jsonl.gz"), CODES)
    some = {code: lines[: options.sentences] for code, lines in flores.items()}
    vectors = alignment.sentence_vectors(decoder, encoder, some, mesh, **LENGTHS)
    curves = layers.measure(vectors, list(some), "en", seed=0, mesh=mesh)
    found = {
        "retrieval": percent(curves),
        "dev retrieval": dev_retrieval(decoder, encoder, options, mesh),
        "meaning": curves[Place("meaning_variance")].value_L.tolist(),
        "language": curves[Place("language_variance")].value_L.tolist(),
        "probe": curves[Place("language_probe")].value_L.tolist(),
    }
    if options.translated:
        directions = [pair for code in options.translated for pair in (("en", code), (code, "en"))]
        settings = TranslationConfig(rows=options.outputs, max_tokens=options.tokens)
        outputs, cut = translation.translate(
            decoder,
            encoder,
            prompts.load("alpaca"),
            {code: lines[: options.outputs] for code, lines in flores.items()},
            {},
            directions,
            settings,
            mesh,
            eos_ids=[encoder.eos_id],
            dtype=LENGTHS["dtype"],
            seed=0,
        )
        found["outputs"] = {f"{a}-{b}": {"lines": outputs[a, b], "cut": list(cut[a, b])} for a, b in directions}
    text = scoring.perplexity(decoder, encoder, test_sentences(options), mesh, **LENGTHS)
    found["bits per byte"] = {code: of.bits_per_byte for code, of in text.items()}
    return found | {"seconds": time.monotonic() - began}


def percent(curves: layers.Curves) -> dict[str, list[float]]:
    """Retrieval by language and layer, mean of to and from English."""
    found = layers.by_language(curves, "retrieval")
    return {code: np.multiply(100, curve).round(2).tolist() for code, curve in found.items()}


def dev_retrieval(decoder, encoder, options: Options, mesh: Mesh) -> dict[str, list[float]]:
    """Retrieval among the first 100 dev pairs of each language trained on."""
    sides = {}
    for code in TRAINED:
        pairs = [(r["src"], r["tgt"]) for r in records(options, f"{code}-en.dev")][:100]
        vectors = alignment.text_vectors(decoder, encoder, [text for pair in pairs for text in pair], mesh, **LENGTHS)
        sides[code] = vectors[:, ::2], vectors[:, 1::2]
    return percent(layers.both_directions("retrieval", sides, "en"))


def test_sentences(options: Options) -> dict[str, list[str]]:
    """40 sentences of the test pairs of each language trained on, and as many of English."""
    tests = {code: records(options, f"{code}-en.test")[:40] for code in TRAINED}
    return {"en": [of[n]["tgt"] for of in tests.values() for n in range(7)]} | {
        code: [r["src"] for r in of] for code, of in tests.items()
    }


def records(options: Options, name: str) -> list[dict[str, str]]:
    with gzip.open(options.data / f"train_parallel/pairs/{name}.jsonl.gz", "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def scores(of: Mapping[str, Any], flores: Mapping[str, list[str]]) -> dict[str, dict[str, statistics.Resampled]]:
    """chrF++ and off-target, in percent, into English, from English and by direction, on resampled sentences."""
    outputs = {tuple(pair.split("-")): x["lines"] for pair, x in of["outputs"].items()}
    count = len(next(iter(outputs.values())))
    some = {code: lines[:count] for code, lines in flores.items()}
    cut = {tuple(pair.split("-")): x["cut"] for pair, x in of["outputs"].items()}
    result = translation_scores.score(outputs, some, "en", TranslationConfig(), cut)
    counts_BxN = statistics.bootstrap_counts(count, 1000, seed=0)

    def resampled(pair, name: str, factor: float) -> statistics.Resampled:
        one = result.measures[pair][name]
        return statistics.Resampled(np.asarray(factor * one.value), factor * one.resampled(counts_BxN))

    found = {}
    for name, factor in (("chrF++", 1), ("off_target", 100)):
        of_pair = {pair: resampled(pair, name, factor) for pair in outputs}
        found[name] = {
            "into en": statistics.average(x for (_, target), x in of_pair.items() if target == "en"),
            "from en": statistics.average(x for (source, _), x in of_pair.items() if source == "en"),
        } | {"-".join(pair): x for pair, x in of_pair.items()}
    return found


def summary(arms: Mapping[str, Mapping[str, Any]], options: Options) -> dict[str, Any]:
    """Of each arm what the table shows, by name; changes against `next-token` are paired."""
    flores = pipeline.multiway(str(options.data / "eval/flores200/devtest.jsonl.gz"), CODES)
    translated = {arm: scores(of["measured"], flores) for arm, of in arms.items() if "outputs" in of["measured"]}
    found: dict[str, Any] = {}
    for arm, of in arms.items():
        at = {code: curve[options.layer] for code, curve in of["measured"]["retrieval"].items()}
        dev = [curve[options.layer] for curve in of["measured"]["dev retrieval"].values()]
        bits = of["measured"]["bits per byte"]
        line = {
            "retrieval": float(np.mean(list(at.values()))),
            **{f"retrieval {code}": at[code] for code in ("sw", "fi")},
            "dev retrieval": float(np.mean(dev)),
            "meaning": of["measured"]["meaning"][options.layer],
            "next-token": of.get("train", {}).get("after", {}).get("next_token"),
            "bits a byte, en": bits["en"],
            "bits a byte, others": float(np.mean([bits[code] for code in TRAINED])),
        }
        for name, sides in translated.get(arm, {}).items():
            for side in ("into en", "from en"):
                line[f"{name} {side}"] = float(sides[side].value)
                if arm != "next-token" and "next-token" in translated:
                    line[f"{name} {side}, change"] = (sides[side] - translated["next-token"][name][side]).triple()
        found[arm] = line
    return found


def show(found: Mapping[str, Mapping[str, Any]], console: Screen) -> None:
    table = Table(title="after 30 steps", show_lines=False)
    names = list(dict.fromkeys(name for line in found.values() for name in line))
    table.add_column("")
    for arm in found:
        table.add_column(arm, justify="right")

    def cell(value: Any) -> str:
        if isinstance(value, list):
            return f"{value[0]:+.1f} [{value[1]:+.1f}, {value[2]:+.1f}]"
        return "" if value is None else f"{value:.3f}" if value < 10 else f"{value:.1f}"

    for name in names:
        table.add_row(name, *(cell(line.get(name)) for line in found.values()))
    console.print(table)


def main(options: Options) -> None:
    console, mesh = Screen(width=160), None
    sharding.prepare_devices("1x1")
    options.to.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(options.to / "cache/compiled"))
    mesh = sharding.make_mesh("1x1")
    with jax.set_mesh(mesh):
        for arm in ("base", *options.arms):
            folder = options.to / arm
            done = folder / "done.json"
            if done.is_file():
                continue
            folder.mkdir(parents=True, exist_ok=True)
            facts = {} if arm == "base" else {"train": train(arm, options, mesh, folder)}
            write_whole(folder / "trained.json", facts)
            path = options.model if arm == "base" else folder / "stage1"
            write_whole(done, facts | {"measured": measure(path, options, mesh)})
            took = json.loads(done.read_text(encoding="utf-8"))
            console.print(
                f"{arm}: {took.get('train', {}).get('seconds', 0):.0f} s, measured in "
                f"{took['measured']['seconds']:.0f} s"
            )
    finished = {
        arm: json.loads(file.read_text(encoding="utf-8"))
        for arm in ("base", *ARMS)
        if (file := options.to / arm / "done.json").is_file()
    }
    found = summary(finished, options)
    show(found, console)
    record.save(options.results, "real.trial", options, {"arms": finished, "summary": found}, console)


if __name__ == "__main__":
    main(tyro.cli(Options))
