"""A corpus as token ids: every example encoded once, kept in memory-mapped arrays."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import pathlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO, Literal

import numpy as np

from alignx_jax.config import DataConfig
from alignx_jax.data import cache, chats, doubts
from alignx_jax.data.corpora import Corpus, Kind
from alignx_jax.data.fields import Bad, BadLine, text_hash
from alignx_jax.data.prompts import Prompt, Template
from alignx_jax.data.spans import Drop, Example, mark, mark_chat, set_apart
from alignx_jax.data.tokenizer import Tokenizer
from alignx_jax.exits import UserError

FORMAT = 5
"""Raise it when what is written changes, and everything is encoded again."""

Progress = Callable[[str, int, int], None]
"""Called with the source, the records done and all of its records."""

Spans = Literal["in-prompt", "separate"]

INDEX = np.dtype(
    [
        ("record", np.int64),  # in the corpus
        ("record_hash", np.uint64),  # of the record's text: equal for equal records, in whatever direction
        ("start", np.int64),  # first of its tokens in the file of tokens
        ("length", np.int32),
        ("source_start", np.int32),  # from here on: token positions in the example
        ("source_end", np.int32),
        ("target_start", np.int32),
        ("target_end", np.int32),
        ("source_language", np.int32),  # in `Examples.languages`
        ("target_language", np.int32),
        ("source_hash", np.int32),
        ("target_hash", np.int32),
        ("line_hash", np.int32),  # of the meaning of the record's line
        ("source_alone", np.int32),  # first token of the source by itself, behind the prompt; 0: it is only in there
        ("target_alone", np.int32),
    ]
)
"""What is kept of an example; instructions have 0 for spans, languages and hashes."""

_BATCH = 2048
_COPIED = 1 << 16  # rows of the index at a time
_ONE_IN = 10  # records at most are held out for validation


@dataclasses.dataclass(frozen=True)
class Examples:
    """An encoded corpus."""

    corpus: Corpus
    languages: tuple[str, ...]
    """Codes of the languages on either side, sorted; () for instructions."""
    dropped: dict[str, int]
    """Examples left out, by reason."""
    skipped: int
    """Chats left out that the tokenizer's chat template could do nothing with, listed in `skipped.txt` in `folder`."""
    folder: pathlib.Path
    index: np.ndarray
    """[N] of INDEX, memory-mapped."""
    tokens: np.ndarray
    """[all tokens] int32, memory-mapped."""
    labels: np.ndarray
    """[all tokens] bool, memory-mapped: which of them have weight in the next-token loss."""
    used: int
    """Records of the corpus, of which `--data.limit` may leave some out."""
    doubts: list[dict[str, Any]]
    """Of parallel text, what `doubts.look` saw."""

    @property
    def notes(self) -> list[str]:
        """Sentences on what of the source is not used, and on what of it is in doubt."""
        name, count = self.corpus.source, len(self.corpus)
        limited = f"{name}: {self.used:,} of its {count:,} records are used (--data.limit)."
        return [
            *([f"{self.corpus.unread}."] if self.corpus.unread else []),
            *([limited] if self.used < count else []),
            *doubts.warnings(self.corpus.source, self.doubts),
        ]


@dataclasses.dataclass(frozen=True)
class _Item:
    """An example before it is encoded: a prompt, or a chat."""

    record: int
    record_hash: int
    origin: str
    prompt: Prompt | None = None
    messages: chats.Messages = ()
    source: str = ""
    target: str = ""
    source_language: str = ""
    target_language: str = ""
    line_hash: int = 0


def encode(
    corpus: Corpus,
    tokenizer: Tokenizer,
    template: Template,
    config: DataConfig,
    progress: Progress = lambda source, done, total: None,
    spans: Spans | None = None,
) -> Examples:
    """Encodes a corpus, or finds it encoded by an earlier run with the same corpus, tokenizer and settings.

    Args:
      spans: where the sentences of the examples are to stand; None: as `config.spans`. What is encoded as `separate`
        has the examples as `in-prompt` too.

    Raises:
      UserError: every example was dropped; a chat that the tokenizer has no chat template for, or (with
        `on_error="stop"`) one that the template can do nothing with, with its place.
    """
    settings = {"cutoff": config.cutoff, "overlong": config.overlong, "limit": config.limit, "loss_on": config.loss_on}
    if corpus.kind == "parallel":
        settings |= {"min_target_tokens": config.min_target_tokens, "directions": config.directions}
        settings |= {"spans": config.spans}
    key = cache.fingerprint(
        FORMAT, corpus.fingerprint, tokenizer.fingerprint, dataclasses.asdict(template), sorted(settings.items())
    )
    folder = pathlib.Path(config.cache).expanduser() / "encoded" / key
    cache.make_once(folder, functools.partial(_write, corpus, tokenizer, template, config, progress))
    facts = json.loads((folder / "facts.json").read_text())
    spans = (spans or config.spans) if corpus.kind == "parallel" else "in-prompt"
    dropped, skipped = facts["dropped"][spans], facts["skipped"]
    index = np.load(folder / f"{spans}.npy", mmap_mode="r")
    if not len(index):
        reasons = ", ".join(f"{reason}: {n}" for reason, n in (dropped | {"bad chat": skipped}).items() if n)
        raise UserError(f"{corpus.source}: every example was dropped ({reasons}); is --data.cutoff too small?")
    return Examples(
        corpus=corpus,
        languages=tuple(facts["languages"][spans]),
        dropped=dropped,
        skipped=skipped,
        folder=folder,
        index=index,
        tokens=np.memmap(folder / "tokens.int32", np.int32, mode="r"),
        labels=np.memmap(folder / "labels.bool", bool, mode="r"),
        doubts=facts["doubts"],
        used=min(len(corpus), config.limit or len(corpus)),
    )


def hold_out(indexes: Sequence[np.ndarray], count: int) -> tuple[list[np.ndarray], list[np.ndarray], int]:
    """Splits sources into training and validation by record, both directions of a pair on the same side.

    Held out are the records with the smallest hashes of their text: a random choice that does not depend on the order
    or the number of the sources' other records. No text that is held out stays in the training part of any source.

    Args:
      indexes: of each source, [n] INDEX.
      count: records to hold out of all sources, in proportion; at most a tenth of them.

    Returns:
      The training and the validation places of each source, and how many examples are in neither, because their
      record's text occurs in validation already.
    """
    distinct, seen = [], np.zeros(0, np.uint64)
    for index in indexes:
        distinct.append(np.setdiff1d(index["record_hash"], seen))  # sorted; a text belongs to the first source with it
        seen = np.union1d(seen, distinct[-1])
    count = min(count, len(seen) // _ONE_IN)
    sizes = np.cumsum([0, *map(len, distinct)])
    shares = np.diff(sizes * count // max(len(seen), 1))
    held = [hashes[:share] for hashes, share in zip(distinct, shares, strict=True)]
    training, validation, duplicates = [], [], 0
    for index, hashes in zip(indexes, held, strict=True):
        training.append(np.flatnonzero(~np.isin(index["record_hash"], np.concatenate(held))))
        places = np.flatnonzero(np.isin(index["record_hash"], hashes))
        _, first, group = np.unique(index["record_hash"][places], return_index=True, return_inverse=True)
        records = index["record"][places]
        validation.append(places[records == records[first][group]])
        duplicates += len(index) - len(training[-1]) - len(validation[-1])
    return training, validation, duplicates


class _Table:
    """The index of the examples whose sentences stand in one way, as it is written."""

    def __init__(self, file: BinaryIO):
        self.dropped: Counter[Drop] = Counter()
        self._file, self._codes, self._rows, self._added = file, {}, 0, []

    def add(self, item: _Item, example: Example, position: int) -> None:
        self._added.append(_row(item, example, position, self._codes))

    def write(self) -> None:
        """What was added since the last time."""
        self._file.write(np.array(self._added, INDEX).tobytes())
        self._rows += len(self._added)
        self._added = []

    def finish(self, file: pathlib.Path) -> list[str]:
        """Makes `file` of it, with the codes of its languages in order, which come back."""
        self._file.close()
        languages = sorted(self._codes)
        place = np.array([languages.index(code) for code in self._codes] or [0], np.int32)  # numbered as they came
        index = np.lib.format.open_memmap(file, "w+", INDEX, (self._rows,))
        part = np.memmap(self._file.name, INDEX, "r") if self._rows else index
        for first in range(0, self._rows, _COPIED):
            some = part[first : first + _COPIED].copy()
            for side in ("source_language", "target_language"):
                some[side] = place[some[side]]
            index[first : first + _COPIED] = some
        index.flush()
        pathlib.Path(self._file.name).unlink()
        return languages


def _write(corpus, tokenizer, template, config, progress, folder: pathlib.Path) -> None:
    """Tokens and labels of the examples, sentences by themselves behind each, and an index for each of `Spans`."""
    position, skipped = 0, 0
    count = min(len(corpus), config.limit or len(corpus))
    used = np.arange(count) * len(corpus) // count
    template = template.with_controls(tokenizer.controls.mark)
    ways = ("in-prompt", "separate") if corpus.kind == "parallel" and config.spans == "separate" else ("in-prompt",)
    with contextlib.ExitStack() as stack:
        tokens, labels, *parts = (
            stack.enter_context(open(folder / name, "wb"))
            for name in ("tokens.int32", "labels.bool", *(f"{way}.part" for way in ways))
        )
        left_out = stack.enter_context(open(folder / "skipped.txt", "w", encoding="utf-8"))
        tables = [_Table(part) for part in parts]
        for first in range(0, count, _BATCH):
            items = list(_items(corpus, template, tokenizer.eos, config.directions, used[first : first + _BATCH]))
            encoded = list(_encoded(items, corpus.kind, tokenizer, config))
            for item, made in zip(items, encoded, strict=True):
                if isinstance(made, BadLine):
                    if config.on_error == "stop":
                        others = any(isinstance(e, tuple) and isinstance(e[0], Example) for e in encoded)
                        raise made.error(skip_helps=bool(position) or others)
                    left_out.write(f"{made}\n")
                    skipped += 1
                    continue
                longest = None
                for table, example in zip(tables, made, strict=True):
                    if isinstance(example, Example):
                        table.add(item, example, position)
                        longest = example
                    else:
                        table.dropped[example] += 1
                if longest is not None:
                    tokens.write(longest.tokens.tobytes())
                    labels.write(longest.labels.tobytes())
                    position += len(longest.tokens)
            for table in tables:
                table.write()
            progress(corpus.source, min(first + _BATCH, count), count)
        languages = [table.finish(folder / f"{way}.npy") for way, table in zip(ways, tables, strict=True)]
    facts = {
        "languages": dict(zip(ways, languages, strict=True)),
        "dropped": dict(zip(ways, (table.dropped for table in tables), strict=True)),
        "skipped": skipped,
        "doubts": [],
    }
    if languages[0]:
        index = np.load(folder / f"{ways[0]}.npy", mmap_mode="r")
        facts["doubts"] = doubts.look(corpus, index, languages[0])
    (folder / "facts.json").write_text(json.dumps(facts))


def _encoded(
    items: Sequence[_Item], kind: Kind, tokenizer: Tokenizer, config: DataConfig
) -> Iterator[tuple[Example | Drop, ...] | BadLine]:
    """The example of each item, in-prompt and then, if they are wanted, separate, or why there is none."""
    lengths = {"cutoff": config.cutoff, "overlong": config.overlong}
    marking = {"loss_on": config.loss_on, "min_target_tokens": config.min_target_tokens if kind == "parallel" else None}
    encodings = iter(tokenizer.encode_batch([item.prompt.text for item in items if item.prompt]))
    alone = {}
    if kind == "parallel" and config.spans == "separate":  # once for both directions
        sentences = list(dict.fromkeys(text for item in items for text in (item.source, item.target)))
        alone = dict(zip(sentences, tokenizer.ids_of_batch(sentences), strict=True))
    for item in items:
        if item.messages:
            if tokenizer.chats is None:
                raise UserError(
                    f"{item.origin}: a chat, and the model's tokenizer has no chat template; give a --model that has "
                    "one beside its tokenizer (chat_template.jinja, or in tokenizer_config.json), or data with "
                    "instruction and output"
                )
            try:
                yield (mark_chat(*chats.encode(item.messages, tokenizer), **lengths),)
            except Bad as bad:
                yield bad.at(item.origin)
            continue
        example = mark(next(encodings), item.prompt, tokenizer, **lengths, **marking)
        if not alone:
            yield (example,)
        elif isinstance(example, Example):
            yield example, set_apart(example, alone[item.source], alone[item.target], tokenizer, config.cutoff)
        else:
            yield example, example


def _row(item: _Item, example: Example, position: int, codes: dict[str, int]) -> tuple:
    start = (item.record, item.record_hash, position, len(example.tokens))
    if not item.source_language:
        return (*start, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)
    languages = (codes.setdefault(code, len(codes)) for code in (item.source_language, item.target_language))
    hashes = text_hash(item.source), text_hash(item.target), item.line_hash
    return (*start, *example.source, *example.target, *languages, *hashes, *(example.alone or (0, 0)))


def _items(corpus: Corpus, template: Template, eos: str, directions: str, indices: np.ndarray) -> Iterator[_Item]:
    for number, record in zip(indices.tolist(), corpus.records(indices), strict=True):
        origin = record["origin"]
        if messages := record.get("messages"):
            yield _Item(number, _record_hash([messages]), origin, messages=json.loads(messages))
            continue
        if corpus.kind == "instructions":
            texts = (record["instruction"], record["input"], record["output"])
            prompt = template.render(*texts[:2], _without_end(texts[2], eos))
            yield _Item(number, _record_hash(texts), origin, prompt)
            continue
        sides = [(record["source"], record["source_language"]), (record["target"], record["target_language"])]
        record_hash = _record_hash(sorted(text for text, _ in sides))
        line_hash = int(record.get("line") or text_hash(record["source"]))
        for name, ((source, source_language), (target, target_language)) in (
            ("forward", sides),
            ("backward", sides[::-1]),
        ):
            if directions in (name, "both"):
                response = _without_end(target, eos)
                prompt = template.render_translation(source, response, source_language, target_language)
                languages = {"source_language": source_language, "target_language": target_language}
                yield _Item(number, record_hash, origin, prompt, (), source, target, **languages, line_hash=line_hash)


def _without_end(response: str, eos: str) -> str:
    """A response without the end token that some data spell behind it, as it is put there anyway."""
    while eos and response.endswith(eos):
        response = response.removesuffix(eos).rstrip()
    return response


def _record_hash(texts) -> int:
    digest = hashlib.blake2b(json.dumps(list(texts)).encode(), digest_size=8)
    return int.from_bytes(digest.digest(), "little")
