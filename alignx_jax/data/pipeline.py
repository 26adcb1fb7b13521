"""From a configuration to batches: which examples a run sees, in which order, in which row of which step.

Everything is planned before the first step from the configuration and its seed alone. So the number of steps is known,
a position in the data is one integer, and any number of processes see the same global batches.
"""

from __future__ import annotations

import bisect
import dataclasses
import hashlib
import math
import pathlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, Literal

import grain
import numpy as np

from alignx_jax.batch import Batch
from alignx_jax.config import Config, DataConfig
from alignx_jax.data import cache, corpora, multiway_files, packing, prompts
from alignx_jax.data.examples import Examples, Progress, encode, hold_out
from alignx_jax.data.languages import normalize
from alignx_jax.data.mixture import Part, balanced, mixed
from alignx_jax.data.sources import SAMPLE
from alignx_jax.data.tokenizer import Tokenizer
from alignx_jax.exits import UserError


class Split:
    """The training or the validation rows of a run, epoch after epoch.

    Attributes:
      num_examples: examples it draws from.
      rows: packed rows in all; the last batch is filled up with empty ones.
      steps: batches of `rows_per_step` rows.
      fill: share of the first epoch's row space that holds tokens; 0 without rows.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        config: Config,
        *,
        spans: bool,
        seed: int,
        epochs: float,
        steps: int | None,
    ):
        self._parts, self._config, self._spans, self._seed = parts, config.data, spans, seed
        self._first = np.cumsum([0, *map(len, parts)])
        self._lengths = np.concatenate([part.examples.index["length"][part.chosen] for part in parts])
        self._plans: dict[int, packing.Rows] = {}
        self._lock = threading.Lock()
        self._ends: list[int] = []  # rows up to the end of each epoch
        self._examples_of_row: list[np.ndarray] = []  # of each epoch, [rows]
        self._busy, self._made = 0.0, 0  # seconds of a core, and tokens of the rows made in them
        self.rows_per_step = config.training.rows
        self.num_examples = len(self._lengths)
        if not sum(round(len(part) * part.weight) for part in parts):
            self.rows, self.fill = 0, 0.0
        else:
            first = self._plan(0)
            self.fill = float(self._lengths[first.examples].sum() / (len(first) * config.data.row_length))
            self.rows = self._count_rows(epochs, None if steps is None else steps * self.rows_per_step)
        self.steps = math.ceil(self.rows / self.rows_per_step)

    def batches(self, start_step: int = 0, own: np.ndarray | None = None) -> Iterator[Batch]:
        """The batches from `start_step` on: NumPy, of each the rows `own`, or all."""
        if start_step >= self.steps:
            return iter(())
        own = np.arange(self.rows_per_step) if own is None else own
        batches = grain.MapDataset.source(_ProcessRows(self, own)).batch(len(own))[start_step:]
        return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=16)))

    @property
    def fingerprint(self) -> str:
        """Changes with the sizes of the examples and of the rows that they are packed into."""
        sizes = [np.ascontiguousarray(x, np.int64) for x in (self._lengths, *self._examples_of_row)]
        return cache.fingerprint(self.rows, [hashlib.blake2b(x, digest_size=10).hexdigest() for x in sizes])

    def most_examples(self, rows: int) -> int:
        """Most examples in any `rows` rows that stand together, counted from each step's first; at least 1.

        Args:
          rows: a divisor of `rows_per_step`, such as the rows that one device gets.
        """
        counts = np.zeros(self.steps * self.rows_per_step, np.int64)
        if self.rows:
            counts[: self.rows] = np.concatenate(self._examples_of_row)[: self.rows]
        return int(counts.reshape(-1, rows).sum(axis=1).max(initial=1))

    def example_ids(self, step: int) -> list[str]:
        """Where the examples of a global batch come from: `file:line`, in the order of rows and slots."""
        return [record["origin"] for record in self.records(step)]

    def records(self, step: int) -> list[dict]:
        """What the examples of a global batch were made of, in the order of rows and slots."""
        found = []
        for row in range(step * self.rows_per_step, (step + 1) * self.rows_per_step):
            for part, entry in map(self._entry, self._examples(row)):
                found.append(part.examples.corpus.records([entry["record"]])[0])
        return found

    def pairs(self, limit: int) -> dict[tuple[str, str], list[tuple[str, str]]]:
        """At most `limit` of its records, each once, spread evenly over them: by two languages, the texts in these."""
        records = [
            (part.examples.corpus, record)
            for part in self._parts
            for record in np.unique(part.examples.index["record"][part.chosen])
        ]
        count = min(limit, len(records))
        found: dict[tuple[str, str], list[tuple[str, str]]] = {}
        for corpus, n in (records[i * len(records) // count] for i in range(count)):
            (record,) = corpus.records([n])
            sides = sorted((record[f"{side}_language"], record[side]) for side in ("source", "target"))
            languages, texts = zip(*sides, strict=True)
            found.setdefault(languages, []).append(texts)
        return found

    def row(self, row: int) -> Batch:
        """Row `row` of all, without a leading axis; empty beyond the last."""
        start = time.thread_time()
        examples = [self._packed(example) for example in self._examples(row)]
        made = packing.assemble(examples, self._config.row_length, self._config.examples_per_row)
        with self._lock:
            self._busy += time.thread_time() - start
            self._made += sum(len(example.tokens) for example in examples)
        return made

    @property
    def tokens_per_second(self) -> float:
        """Tokens that one core of this host puts into rows a second, by the rows made so far; 0 before the first."""
        return self._made / self._busy if self._busy else 0.0

    def _count_rows(self, epochs: float, wanted: int | None) -> int:
        """Plans as many epochs as are needed; keeps only the sizes of their rows."""
        while wanted is not None and (self._ends[-1] if self._ends else 0) < wanted:
            self._add_epoch()
        if wanted is not None:
            return wanted
        for _ in range(math.ceil(epochs)):
            self._add_epoch()
        before = self._ends[-2] if len(self._ends) > 1 else 0
        return before + math.ceil((self._ends[-1] - before) * (epochs - math.ceil(epochs) + 1))

    def _add_epoch(self) -> None:
        plan = self._plan(len(self._ends))
        self._ends.append(len(plan) + (self._ends[-1] if self._ends else 0))
        self._examples_of_row.append(np.diff(plan.starts))

    def _plan(self, epoch: int) -> packing.Rows:
        """The rows of an epoch; batches straddle epochs, so the last two are kept."""
        with self._lock:
            if epoch not in self._plans:
                sizes, weights = zip(*((len(part), part.weight) for part in self._parts), strict=True)
                order = packing.order(epoch, self._seed, sizes, weights)
                while len(self._plans) > 1:
                    del self._plans[min(self._plans)]
                self._plans[epoch] = packing.plan(
                    self._lengths, self._config.row_length, self._config.examples_per_row, order, [self._seed, epoch, 1]
                )
            return self._plans[epoch]

    def _examples(self, row: int) -> list[int]:
        if row >= self.rows:
            return []
        epoch = bisect.bisect_right(self._ends, row)
        return self._plan(epoch)[row - (self._ends[epoch - 1] if epoch else 0)].tolist()

    def _entry(self, example: int) -> tuple[Part, np.void]:
        number = bisect.bisect_right(self._first, example) - 1
        part = self._parts[number]
        return part, part.examples.index[part.chosen[example - self._first[number]]]

    def _packed(self, example: int) -> packing.PackedExample:
        part, entry = self._entry(example)
        place = slice(entry["start"], entry["start"] + entry["length"])
        tokens, labels = part.examples.tokens[place], part.examples.labels[place]
        if not self._spans:
            return packing.PackedExample(tokens, labels, (0, 0), (0, 0), (0, 0), (0, 0, 0))
        return packing.PackedExample(
            tokens,
            labels,
            source=(entry["source_start"], entry["source_end"]),
            target=(entry["target_start"], entry["target_end"]),
            languages=(part.languages[entry["source_language"]], part.languages[entry["target_language"]]),
            hashes=(entry["source_hash"], entry["target_hash"], entry["line_hash"]),
            alone=(entry["source_alone"], entry["target_alone"]) if entry["source_alone"] else None,
        )


class _ProcessRows:
    """The rows of one process, for Grain: those of its first step, then of its second, and so on."""

    def __init__(self, split: Split, own: np.ndarray):
        self._split, self._own = split, own

    def __len__(self) -> int:
        return self._split.steps * len(self._own)

    def __getitem__(self, place: int) -> Batch:
        step, number = divmod(int(place), len(self._own))
        return self._split.row(step * self._split.rows_per_step + int(self._own[number]))


@dataclasses.dataclass(frozen=True)
class Data:
    """What a stage trains and validates on."""

    train: Split
    validation: Split
    """0 steps where nothing is held out."""
    pairs: bool
    """Whether its batches mark pairs of sentences (stage 1)."""
    languages: tuple[str, ...]
    """Codes of the parallel text's languages; `Batch` holds places in it."""
    dropped: dict[str, int]
    """Examples left out, by reason."""
    sources: tuple[Examples, ...]
    """The encoded sources."""

    @property
    def corpora(self) -> tuple[corpora.Corpus, ...]:
        """The prepared sources, with the bad lines that each skipped."""
        return tuple(one.corpus for one in self.sources)

    @property
    def notes(self) -> list[str]:
        """Sentences on what the sources have that is not used, or that may not be what it should."""
        return [note for one in self.sources for note in one.notes]

    def facts(self) -> dict[str, Any]:
        """What a reader of the trained model wants to know of its data, as JSON: languages and numbers."""
        return {
            "languages": list(self.languages),
            "examples": self.train.num_examples,
            "held_out": self.validation.num_examples,
            "sources": [{"kind": c.kind, "source": c.source, "records": len(c)} for c in self.corpora],
        }


Corpora = dict[corpora.Kind, list[corpora.Corpus]]


def read(config: Config, stage: Literal["1", "2"]) -> Corpora:
    """Every source of a stage, read and found good, or found in the cache.

    Raises:
      UserError: a setting that cannot work, or a source that is not there or has a bad line.
    """
    data = config.data
    _check(config)
    prompts.load(data.template)
    kinds: dict[corpora.Kind, tuple[str, ...]] = {}
    if stage == "2" and data.translation_share < 1:
        kinds["instructions"] = data.instructions
    if stage == "1" or data.translation_share > 0:
        kinds["parallel"] = data.parallel
    for kind, sources in kinds.items():
        if not sources:
            raise UserError(f"--data.{kind}: no source; name a file or a folder, or 'sample'")
    settings = pathlib.Path(data.cache), data.on_error, data.pairs, data.beam
    return {kind: [corpora.prepare(kind, source, *settings) for source in sources] for kind, sources in kinds.items()}


def build(
    config: Config,
    stage: Literal["1", "2"],
    tokenizer: Tokenizer,
    progress: Progress = lambda source, done, total: None,
    sources: Corpora | None = None,
) -> Data:
    """Encodes and plans the data of a stage; what an earlier run encoded is reused.

    Args:
      sources: of `read`, which is called where there are none.

    Raises:
      UserError: as `read`; every example dropped, or (stage 1 with language matching) only one language.
    """
    data = config.data
    sources = read(config, stage) if sources is None else sources
    share = 0.0 if stage == "1" else data.translation_share
    template = prompts.load(data.template)

    train, validation, dropped, languages, encoded = {}, {}, Counter(), (), []
    stand = data.spans if stage == "1" else "in-prompt"  # no loss of stage 2 pools
    for kind, found in sources.items():
        weights = data.instruction_weights if kind == "instructions" else data.parallel_weights
        examples = [encode(corpus, tokenizer, template, data, progress, stand) for corpus in found]
        for one in examples:
            dropped.update(one.dropped)
        codes = sorted({code for one in examples for code in one.languages})
        training, held, duplicates = hold_out([one.index for one in examples], data.validation)
        if duplicates:
            dropped["duplicate of a validation record"] += duplicates
        for parts, chosen in ((train, training), (validation, held)):
            parts[kind] = [
                Part(one, where, weight, np.array([codes.index(code) for code in one.languages], np.int32))
                for one, where, weight in zip(examples, chosen, weights or [1.0] * len(examples), strict=True)
            ]
        languages = languages or tuple(codes)
        encoded += examples
    if stage == "1":
        check_languages(languages, config.objective.language_matching.weight != 0)

    if "parallel" in train:
        train["parallel"] = balanced(train["parallel"], data.temperature)
    spans = stage == "1"
    held_parts = {kind: [dataclasses.replace(part, weight=1.0) for part in parts] for kind, parts in validation.items()}
    return Data(
        train=Split(
            mixed(train, share),
            config,
            spans=spans,
            seed=config.seed,
            epochs=config.training.epochs,
            steps=config.training.steps,
        ),
        validation=Split(mixed(held_parts, share), config, spans=spans, seed=0, epochs=1, steps=None),
        pairs=spans,
        languages=languages,
        dropped=dict(dropped),
        sources=tuple(encoded),
    )


def check_languages(languages: Collection[str], language_matching: bool) -> None:
    """Refuses to match languages where there is only one.

    Raises:
      UserError: naming the language.
    """
    if language_matching and len(languages) < 2:
        raise UserError(
            f"--data.parallel: every sentence is in one language ({', '.join(languages)}), so there is nothing for "
            "language matching to tell apart; add another language or set --objective.language-matching.weight=0"
        )


def multiway(
    path: str,
    languages: Sequence[str] = (),
    cache_folder: str = DataConfig.cache,
    besides: Sequence[str] = (),
    tell: Callable[[str], None] = lambda sentence: None,
) -> dict[str, list[str]]:
    """Sentences that say the same in every language: `result[code][i]` for all codes are translations of each other.

    Args:
      path: JSONL (.gz too) with `{"text": {"en": ..., "de": ...}}` a line, a folder with a file for each language, a
        published data set such as `flores200:devtest`, or `sample`, the held-out sentences.
      languages: codes to read; empty: all in the file. Lines without all of them are left out.
      cache_folder: where published data sets are built, `--data.cache`.
      besides: codes to read too if no line is left out for it.
      tell: called with a sentence on the files, and one on the lines, that are left out, if there are any.

    Raises:
      UserError: no such file, a bad line, or no line with all languages.
    """
    lines = corpora.sentences(path, pathlib.Path(cache_folder))
    if lines is None:
        file = SAMPLE / "parallel.heldout.jsonl.gz" if path == "sample" else pathlib.Path(path).expanduser()
        if not file.exists():
            raise UserError(f"{path}: no such file or folder")
        lines = multiway_files.read(file, tell)
    if not lines:
        raise UserError(f"{path}: empty; it needs multi-way sentences, see docs/data.md")
    there = Counter(code for sentences in lines for code in sentences)
    codes = [normalize(code) for code in languages] or sorted(there)
    found = [sentences for sentences in lines if all(code in sentences for code in codes)]
    if not found:
        counts = ", ".join(f"{code} {there[code]}" for code in codes) or "no sentences"
        raise UserError(f"{path}: no line has all of the languages ({counts}); name fewer languages")
    codes += [code for code in besides if code not in codes and all(code in sentences for sentences in found)]
    if lost := len(lines) - len(found):
        scarce = min(codes, key=lambda code: there[code])
        tell(
            f"{lost:,} of the {len(lines):,} lines of {path} lack a language and are left out (most often {scarce}, in "
            f"{len(lines) - there[scarce]:,}); --evaluation.languages with the others alone keeps more."
        )
    return {code: [sentences[code] for sentences in found] for code in codes}


def _check(config: Config) -> None:
    """Refuses settings that do not fit each other, before anything is read; each one's range is in config.py."""
    data = config.data
    for name, sources, weights in (
        ("parallel", data.parallel, data.parallel_weights),
        ("instruction", data.instructions, data.instruction_weights),
    ):
        if weights and len(weights) != len(sources):
            raise UserError(
                f"--data.{name}-weights: {len(weights)} weights for {len(sources)} sources; give one for each"
            )
    if data.row_length < data.cutoff:
        raise UserError(
            f"--data.row-length={data.row_length}: a row has to hold an example of --data.cutoff={data.cutoff} tokens"
        )
