"""A corpus as token ids: every example encoded once, kept in memory-mapped arrays."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import pathlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from alignx_jax.config import DataConfig
from alignx_jax.data import cache
from alignx_jax.data.corpora import Corpus
from alignx_jax.data.prompts import Prompt, Template
from alignx_jax.data.spans import Example, mark, set_apart, text_hash
from alignx_jax.data.tokenizer import Tokenizer
from alignx_jax.exits import UserError

FORMAT = 2
"""Raise it when what is written changes, and everything is encoded again."""

Progress = Callable[[str, int, int], None]
"""Called with the source, the records done and all of its records."""

INDEX = np.dtype(
    [
        ("record", np.int64),  # in the corpus
        ("record_hash", np.uint64),  # of the record's text: equal for equal records, in whatever direction
        ("start", np.int64),  # first of its tokens in the file of tokens
        ("length", np.int32),
        ("response", np.int32),  # from here on: token positions in the example
        ("source_start", np.int32),
        ("source_end", np.int32),
        ("target_start", np.int32),
        ("target_end", np.int32),
        ("source_language", np.int32),  # in `Examples.languages`
        ("target_language", np.int32),
        ("source_hash", np.int32),
        ("target_hash", np.int32),
        ("source_alone", np.int32),  # first token of the source by itself, behind the prompt; 0: it is only in there
        ("target_alone", np.int32),
    ]
)
"""What is kept of an example; instructions have 0 for spans, languages and hashes."""

_BATCH = 2048
_ONE_IN = 10  # records at most are held out for validation


@dataclasses.dataclass(frozen=True)
class Examples:
    """An encoded corpus."""

    corpus: Corpus
    languages: tuple[str, ...]
    """Codes of the languages on either side, sorted; () for instructions."""
    dropped: dict[str, int]
    """Examples left out, by reason."""
    index: np.ndarray
    """[N] of INDEX, memory-mapped."""
    tokens: np.ndarray
    """[all tokens] int32, memory-mapped."""


@dataclasses.dataclass(frozen=True)
class _Item:
    """An example before it is encoded."""

    record: int
    record_hash: int
    prompt: Prompt
    source: str = ""
    target: str = ""
    source_language: str = ""
    target_language: str = ""


def encode(
    corpus: Corpus,
    tokenizer: Tokenizer,
    template: Template,
    config: DataConfig,
    progress: Progress = lambda source, done, total: None,
) -> Examples:
    """Encodes a corpus, or finds it encoded by an earlier run with the same corpus, tokenizer and settings.

    Raises:
      UserError: every example was dropped.
    """
    settings = {"cutoff": config.cutoff, "overlong": config.overlong, "limit": config.limit}
    if corpus.kind == "parallel":
        settings |= {"min_target_tokens": config.min_target_tokens, "directions": config.directions}
        settings |= {"spans": config.spans}
    key = cache.fingerprint(
        FORMAT, corpus.fingerprint, tokenizer.fingerprint, dataclasses.asdict(template), sorted(settings.items())
    )
    folder = pathlib.Path(config.cache).expanduser() / "encoded" / key
    cache.make_once(folder, functools.partial(_write, corpus, tokenizer, template, config, progress))
    facts = json.loads((folder / "facts.json").read_text())
    return Examples(
        corpus=corpus,
        languages=tuple(facts["languages"]),
        dropped=facts["dropped"],
        index=np.load(folder / "index.npy", mmap_mode="r"),
        tokens=np.memmap(folder / "tokens.int32", np.int32, mode="r"),
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


def _write(corpus, tokenizer, template, config, progress, folder: pathlib.Path) -> None:
    marking = {"cutoff": config.cutoff, "overlong": config.overlong}
    marking["min_target_tokens"] = config.min_target_tokens if corpus.kind == "parallel" else None
    dropped, codes, index, position = Counter(), {}, [], 0
    count = min(len(corpus), config.limit or len(corpus))
    used = np.arange(count) * len(corpus) // count
    with open(folder / "tokens.int32", "wb") as file:
        for first in range(0, count, _BATCH):
            items = list(_items(corpus, template, config.directions, used[first : first + _BATCH]))
            encodings = tokenizer.encode_batch([item.prompt.text for item in items])
            alone = [None] * len(items)
            if corpus.kind == "parallel" and config.spans == "separate":
                sides = [item.source for item in items], [item.target for item in items]
                alone = list(zip(*map(tokenizer.encode_batch, sides), strict=True))
            rows = []
            for item, encoding, sentences in zip(items, encodings, alone, strict=True):
                example = mark(encoding, item.prompt, tokenizer, **marking)
                if isinstance(example, Example) and sentences:
                    example = set_apart(example, *(ids for ids, _ in sentences), tokenizer, config.cutoff)
                if not isinstance(example, Example):
                    dropped[example] += 1
                    continue
                file.write(example.tokens.tobytes())
                rows.append(_row(item, example, position, codes))
                position += len(example.tokens)
            index.append(np.array(rows, INDEX))
            progress(corpus.source, min(first + _BATCH, count), count)
    index = np.concatenate(index)
    if not len(index):
        reasons = ", ".join(f"{reason}: {count}" for reason, count in dropped.items())
        raise UserError(f"{corpus.source}: every example was dropped ({reasons}); is --data.cutoff too small?")
    languages = sorted(codes)
    if languages:
        place = np.array([languages.index(code) for code in codes], np.int32)  # codes are numbered as they came
        for side in ("source_language", "target_language"):
            index[side] = place[index[side]]
    np.save(folder / "index.npy", index)
    (folder / "facts.json").write_text(json.dumps({"languages": languages, "dropped": dropped}))


def _row(item: _Item, example: Example, position: int, codes: dict[str, int]) -> tuple:
    start = (item.record, item.record_hash, position, len(example.tokens), example.response)
    if not item.source_language:
        return (*start, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)
    languages = (codes.setdefault(code, len(codes)) for code in (item.source_language, item.target_language))
    hashes = text_hash(item.source), text_hash(item.target)
    return (*start, *example.source, *example.target, *languages, *hashes, *(example.alone or (0, 0)))


def _items(corpus: Corpus, template: Template, directions: str, indices: np.ndarray) -> Iterator[_Item]:
    for number, record in zip(indices.tolist(), corpus.records(indices), strict=True):
        if corpus.kind == "instructions":
            texts = (record["instruction"], record["input"], record["output"])
            yield _Item(number, _record_hash(texts), template.render(*texts))
            continue
        sides = [(record["source"], record["source_language"]), (record["target"], record["target_language"])]
        record_hash = _record_hash(sorted(text for text, _ in sides))
        for name, ((source, source_language), (target, target_language)) in (
            ("forward", sides),
            ("backward", sides[::-1]),
        ):
            if directions in (name, "both"):
                prompt = template.render_translation(source, target, source_language, target_language)
                yield _Item(number, record_hash, prompt, source, target, source_language, target_language)


def _record_hash(texts) -> int:
    digest = hashlib.blake2b(json.dumps(list(texts)).encode(), digest_size=8)
    return int.from_bytes(digest.digest(), "little")
