"""The study's base model: a small Llama pre-trained on real monolingual text of 12 languages, 60 % of it English.

python -m benchmarks.study.base --to FOLDER [--data FOLDER] [--steps 4500]

Everything comes from the training files of `DATA/train_parallel/pairs` and the English answers of `DATA/instruct`:

1. Sentences of one language each. No pair has both of its sides in the text: blocks of records (a chapter of the
   Bible, a premise of XNLI, lines in a row) are split in two by a hash, and one half gives its English sentences, the
   other its foreign ones. So the model knows the languages, but never saw that two sentences say the same.
2. A byte-fallback BPE tokenizer, and documents: sentences that follow each other in their source, joined up to a
   length that is drawn for each document.
3. A random Llama, trained by the program's own loop on the next-token loss alone, and exported to `FOLDER/model`, a
   Hugging Face folder. `FOLDER/heldout.json` has perplexity and bits per byte of each language on documents never seen.

Started again, it goes on where it was stopped. `FOLDER/run/metrics.jsonl` has a line for every step. Learning rate and
batch are the best of three runs of 246,000 tokens, by the loss over the last tenth: 7.73 (16 rows, 2e-3), 7.68 (16
rows, 4e-3), 7.55 (8 rows, 3e-3).
"""

from __future__ import annotations

import dataclasses
import functools
import gzip
import hashlib
import json
import math
import os
import pathlib
import re
from collections import defaultdict
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax.sharding import Mesh
from rich.table import Table

from alignx_jax import sharding
from alignx_jax.config import Config, DataConfig, OptimizerConfig, TrainingConfig
from alignx_jax.console import Screen
from alignx_jax.data import pipeline, tokenizer
from alignx_jax.exits import UserError
from alignx_jax.models import huggingface
from alignx_jax.runs import companions, loading
from alignx_jax.sample import make
from alignx_jax.training import begin, build, state, stopping
from alignx_jax.training import step as steps
from benchmarks import random_llama

DATA = pathlib.Path(os.environ.get("ALIGNX_SHARED", pathlib.Path(__file__).resolve().parents[3] / "shared")) / "data"
TEMPLATE = str(pathlib.Path(__file__).with_name("text.json"))
ENGLISH = 0.6  # share of the tokens
HELD_OUT = 0.02  # share of the blocks
LENGTH, SLOTS = 256, 16  # tokens of a row, most documents in it
SHORTEST = 16  # tokens a document may be limited to


@dataclasses.dataclass(frozen=True)
class Options:
    to: pathlib.Path
    """Folder to write."""
    data: pathlib.Path = DATA
    """Folder with `train_parallel` and `instruct`; default: `data` in $ALIGNX_SHARED, or in `shared` beside the
    repository."""
    steps: int = 4500
    """Optimizer steps of `rows` rows x 256 tokens."""
    rows: int = 8
    learning_rate: float = 3e-3
    vocabulary: int = 16384
    hidden_size: int = 256
    layers: int = 8
    heads: int = 4


@dataclasses.dataclass(frozen=True)
class Sentence:
    """A sentence of one language."""

    text: str
    place: tuple
    """Sorts the sentences of a source as they stand in it."""
    held_out: bool


def _share(block: str, salt: str) -> float:
    """A number in [0, 1) that only the name of a block decides."""
    return int.from_bytes(hashlib.blake2b(f"{salt} {block}".encode(), digest_size=8).digest()) / 2**64


def block(record: dict) -> str:
    """The records that go to the same half together: what follows each other, or says nearly the same."""
    name, _, number = record["id"].rpartition(".")
    match record["source"]:
        case "bible":
            return name  # the chapter
        case "xnli":
            return re.match(r"xnli\.p\d+", record["id"])[0]  # a premise and its hypotheses
        case "tatoeba":
            return record["tgt"]  # the same sentence has another number in each pair
        case _:
            return f"{name}.{int(number) // 8}"


def _records(file: pathlib.Path) -> Iterator[dict]:
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def sentences(data: pathlib.Path) -> dict[str, list[Sentence]]:
    """The monolingual text by language, every text once, in the order of its sources."""
    records = [r for file in sorted(data.glob("train_parallel/pairs/*-en.train.jsonl.gz")) for r in _records(file)]
    if not records:
        raise UserError(f"--data={data}: no train_parallel/pairs/*-en.train.jsonl.gz here; name the folder that has it")
    english = {r["tgt"] for r in records if _share(block(r), "side") < 0.5}
    told = {(r["src_lang"], r["src"]) for r in records if r["tgt"] in english}  # their English side is in
    found: dict[str, dict[str, Sentence]] = defaultdict(dict)

    def add(language: str, text: str, name: str, block: str) -> None:
        place = tuple(int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name))
        found[language].setdefault(text, Sentence(text, place, _share(block, "held out") < HELD_OUT))

    for r in records:
        if r["tgt"] in english:
            add("en", r["tgt"], r["id"], block(r))
        elif (r["src_lang"], r["src"]) not in told:
            add(r["src_lang"], r["src"], r["id"], block(r))
    foreign = {r["tgt"] for r in records} - english
    for number, r in enumerate(_records(data / "instruct/en.train.jsonl.gz")):
        for line, text in enumerate(r["output"].splitlines() if r["kind"] == "general" else ()):
            if text.strip() and text.strip() not in foreign:
                add("en", text.strip(), f"instruct.{number}.{line}", f"instruct.{number}")
    return {language: sorted(of.values(), key=lambda s: s.place) for language, of in sorted(found.items())}


def train_tokenizer(text: dict[str, list[Sentence]], vocabulary: int, folder: pathlib.Path) -> None:
    """SentencePiece BPE, as Llama's. Of n bytes of a language it sees a part in proportion to sqrt(n)."""
    training = {code: [s.text for s in of if not s.held_out] for code, of in text.items()}
    size = {code: sum(len(t.encode()) for t in texts) for code, texts in training.items()}
    rng, seen = np.random.default_rng(0), []
    for code, texts in training.items():
        part = math.sqrt(min(size.values()) / size[code])
        seen += [t for t, u in zip(texts, rng.random(len(texts)), strict=True) if u < part]
    make.write_tokenizer(seen, vocabulary, folder, coverage=0.9995)


def documents(text: list[str], lengths: list[int], joint: str, rng: np.random.Generator) -> Iterator[tuple[str, int]]:
    """Sentences in a row joined to documents of a random limit each, and their tokens, about."""
    parts, used, limit = [], 0, int(rng.integers(SHORTEST, LENGTH - 2))
    for sentence, length in zip(text, lengths, strict=True):
        if parts and used + length > limit:
            yield joint.join(parts), used
            parts, used, limit = [], 0, int(rng.integers(SHORTEST, LENGTH - 2))
        parts.append(sentence)
        used += length
    if parts:
        yield joint.join(parts), used


def record(document: str) -> dict[str, str]:
    """A document as an instruction that `text.json` makes the same text of again."""
    cut = re.search(r"\S(?=\S)", document).end()  # no white space at an end, where the reader would cut it off
    return {"instruction": document[:cut], "input": "", "output": document[cut:]}


def write_corpus(text: dict[str, list[Sentence]], encoder: tokenizer.Tokenizer, folder: pathlib.Path) -> None:
    """`{train,heldout}.LANGUAGE.jsonl` and, when they are there, `facts.json`: counts by part and language."""
    folder.mkdir(parents=True, exist_ok=True)
    rng, facts = np.random.default_rng(0), {"train": {}, "heldout": {}}
    for part, counts in facts.items():
        for code, of in text.items():
            chosen = [s.text for s in of if s.held_out == (part == "heldout")]
            lengths = [len(ids) for ids, _ in encoder.encode_batch(chosen)]
            made = [(d, n) for d, n in documents(chosen, lengths, "" if code == "zh" else " ", rng) if len(d) > 8]
            lines = [json.dumps(record(document), ensure_ascii=False) + "\n" for document, _ in made]
            (folder / f"{part}.{code}.jsonl").write_text("".join(lines), encoding="utf-8")
            counts[code] = {
                "sentences": len(chosen),
                "documents": len(made),
                "tokens": sum(n for _, n in made),
                "bytes": sum(len(document.encode()) for document, _ in made),
            }
    (folder / "facts.json").write_text(json.dumps(facts, indent=1) + "\n")


def config(options: Options, corpus: pathlib.Path, tokens: dict[str, int]) -> Config:
    """The pre-training: foreign text as often as it is, English so often that it has its share of the tokens."""
    others = sum(tokens.values()) - tokens["en"]
    english = ENGLISH / (1 - ENGLISH) * others / tokens["en"]
    return Config(
        stage="2",
        run=str(options.to / "run"),
        model=str(options.to / "random"),
        data=DataConfig(
            instructions=tuple(str(corpus / f"train.{code}.jsonl") for code in tokens),
            instruction_weights=tuple(english if code == "en" else 1.0 for code in tokens),
            translation_share=0.0,
            template=TEMPLATE,
            cutoff=LENGTH,
            overlong="truncate",
            row_length=LENGTH,
            examples_per_row=SLOTS,
            validation=0,
            cache=str(options.to / "cache"),
        ),
        optimizer=OptimizerConfig(
            learning_rate=options.learning_rate, warmup_steps=options.steps // 20, beta2=0.98, weight_decay=0.01
        ),
        training=TrainingConfig(
            rows=options.rows, steps=options.steps, compute_dtype="float32", remat="none", save_every=100, keep=1
        ),
    )


def held_out_losses(source: loading.Source, training: Config, facts: dict, mesh: Mesh) -> dict[str, dict[str, float]]:
    """Perplexity and bits per byte (end of text included in both) of the held-out documents of each language."""
    encoder, found = tokenizer.load(source.huggingface), {}
    graph, params, _ = state.split(state.build(source.load(mesh), None, seed=0))
    for code, counts in facts.items():
        file = str(pathlib.Path(training.data.instructions[0]).with_name(f"heldout.{code}.jsonl"))
        data = dataclasses.replace(training.data, instructions=(file,), instruction_weights=())
        once = dataclasses.replace(training.training, steps=None, epochs=1.0)
        part = pipeline.build(dataclasses.replace(training, data=data, training=once), "2", encoder)
        recipe = build.recipe(training, source.decoder_config(), part, mesh)
        sums = jax.jit(functools.partial(steps.validation_sums, graph=graph, recipe=recipe))
        loss = tokens = 0.0
        for batch in part.train.batches():
            of, weight = sums(params, jax.tree.map(lambda x: sharding.place_rows(x, mesh), batch))
            loss, tokens = loss + float(of["next_token"]), tokens + float(weight["next_token"])
        found[code] = {"tokens": tokens, "perplexity": math.exp(loss / tokens)}
        found[code]["bits_per_byte"] = loss / math.log(2) / counts["bytes"]
    return found


def show(console: Screen, title: str, rows: dict[str, dict[str, float]]) -> None:
    table = Table(title=title)
    for name in ("", *next(iter(rows.values()))):
        table.add_column(name, justify="right" if name else "left")
    for code, values in rows.items():
        table.add_row(code, *(f"{v:,.3g}" if v < 100 else f"{v:,.0f}" for v in values.values()))
    console.print(table)


def main(options: Options) -> None:
    console, corpus, random = Screen(), options.to / "corpus", options.to / "random"
    if not (corpus / "facts.json").is_file():
        text = sentences(options.data)
        train_tokenizer(text, options.vocabulary, options.to / "tokenizer")
        write_corpus(text, tokenizer.load(options.to / "tokenizer"), corpus)
    facts = json.loads((corpus / "facts.json").read_text())
    for part, counts in facts.items():
        show(console, f"{part}: monolingual text", counts)
    if not (random / "config.json").is_file():
        size = options.hidden_size, options.layers, options.heads
        random_llama.make(random_llama.Options(options.to / "tokenizer", random, *size))
    training = config(options, corpus, {code: of["tokens"] for code, of in facts["train"].items()})
    mesh, source = sharding.make_mesh(training.mesh), loading.find(str(random))
    with jax.set_mesh(mesh):
        data = pipeline.build(training, "2", tokenizer.load(random))
        console.print(f"{data.train.steps} steps of {options.rows} x {LENGTH} tokens, {data.train.fill:.1%} full")
        weights = build.Weights(source, training, mesh)
        result = begin.train(
            training, options.to / "run", weights, data, mesh, console, "pre-training", stopping.Stop()
        )
        trained = loading.find(str(result.folder))
        losses = held_out_losses(trained, training, facts["heldout"], mesh)
        show(console, "held-out documents", losses)
        (options.to / "heldout.json").write_text(json.dumps(losses, indent=1) + "\n")
        if not (options.to / "model").exists():
            settings = huggingface.read_config(trained.huggingface)
            huggingface.export(trained.load(mesh), settings, options.to / "model", jnp.float32, 5e9)
            companions.copy(trained.huggingface, options.to / "model")


if __name__ == "__main__":
    main(tyro.cli(Options))
