"""Which files a source is read from, and why the others beside them are not; what the names of files say."""

from __future__ import annotations

import functools
import itertools
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

from alignx_jax.data import arrow_files
from alignx_jax.data.languages import normalize
from alignx_jax.exits import UserError

SAMPLE = pathlib.Path(__file__).parent.parent / "sample" / "data"

_PARALLEL = (".tsv", ".jsonl", *arrow_files.KINDS)
_INSTRUCTIONS = (".json", ".jsonl", *arrow_files.KINDS)
_SHOWN = 3  # names of files that one reason keeps from being read
_SUFFIXES = (".tsv", ".jsonl", ".json", ".parquet", ".arrow", ".txt")

_TRAIN = re.compile(r"train[a-z]*|trn")
_HELD_OUT = re.compile(
    r"(news|dev)?(test|tst)(s|set|data|ing)?|dev(s|set|data|el|elop|elopment)?|(cross)?val(id|idate|idation|set|data)?"
    r"|eval(s|set|data|uate|uation)?|heldout|holdout"
)


class Source(NamedTuple):
    """The files of a source, in the order in which they are read."""

    files: list[pathlib.Path]
    unread: str = ""
    """A sentence on what stands beside them and is not read; empty where nothing does."""


def parallel(source: str) -> Source:
    """The files of parallel text; a Moses pair is the two files of its prefix.

    Raises:
      UserError: nothing there, or nothing that can be read.
    """
    if source == "sample":
        return Source([SAMPLE / "parallel.train.jsonl.gz"])
    path = pathlib.Path(source).expanduser()
    if path.is_dir():
        return _of_folder(path, lambda file: kind(file) in _PARALLEL or moses_prefix(file) is not None)
    if path.is_file():
        if kind(path) not in _PARALLEL:
            raise UserError(
                f"{source}: parallel text is read from .tsv and .jsonl (.gz too), .parquet and .arrow files; name a "
                "Moses pair by its prefix"
            )
        return Source([path])
    if pair := pair_in(path.name):
        return Source([moses_side(path, side) for side in pair])
    why = why_no_pair(path.name)
    raise UserError(f"{source}: no such file or folder, and no Moses prefix such as corpus.de-en{why}")


def instructions(source: str) -> Source:
    """The files of instructions.

    Raises:
      UserError: nothing there, or nothing that can be read.
    """
    if source == "sample":
        return Source([SAMPLE / "instructions.jsonl.gz"])
    path = pathlib.Path(source).expanduser()
    if path.is_dir():
        return _of_folder(path, lambda file: kind(file) in _INSTRUCTIONS)
    if not path.is_file():
        raise UserError(f"{source}: no such file or folder")
    if kind(path) not in _INSTRUCTIONS:
        raise UserError(
            f"{source}: instructions are read from .json and .jsonl (.gz too), .parquet and .arrow files; rename or "
            "convert it"
        )
    return Source([path])


def kind(file: pathlib.Path) -> str:
    """The ending that says how a file is read, whether it is compressed or not."""
    return pathlib.Path(file.name.removesuffix(".gz")).suffix


def split_in(name: str) -> Literal["train", "held out"] | None:
    """What the name of a file says about its part of a data set: `opus.de-en-train.de`, `test_de-en.jsonl`.

    Raises:
      UserError: it says both.
    """
    words = _words(name)
    train, held = (any(pattern.fullmatch(word) for word in words) for pattern in (_TRAIN, _HELD_OUT))
    if train and held:
        raise UserError(f"{name}: is it for training or for tests? its name says both; rename it")
    return "train" if train else "held out" if held else None


def _words(name: str) -> list[str]:
    parted = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name)  # deEnTrain
    return re.findall("[a-z]+", re.sub(r"(?i)(held|hold)[-_. ]?out", "heldout", parted).lower())


def _of_folder(folder: pathlib.Path, readable: Callable[[pathlib.Path], bool]) -> Source:
    """The readable files of a folder, sorted: those for training by their names, or all but those for tests."""
    if files := arrow_files.of_dataset(folder):
        others = {} if files[0].parent == folder else {"other splits": _names(folder, files[0].parent)}
        return Source(files, unread(folder, others))
    entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    there = [entry for entry in entries if entry.is_file()]
    files = [file for file in there if readable(file)]
    splits = {file: split_in(file.name) for file in files}
    named = "train" in splits.values()
    chosen = [file for file in files if (splits[file] == "train" if named else splits[file] is None)]
    others = {
        "for tests by their names": [file.name for file in files if splits[file] == "held out"],
        "no 'train' in their names, which others have": [f.name for f in files if named and splits[f] is None],
        "no format that is read": [file.name for file in there if file not in splits],
        "folders in a folder": [entry.name for entry in entries if entry.is_dir()],
    }
    left = unread(folder, others)
    if files and not chosen:
        raise UserError(f"{left}; name the files themselves to train on them")
    if not files:
        raise UserError(f"{folder}: no file here that can be read; see docs/data.md for the formats. {left}".rstrip())
    return Source(chosen, left)


def _names(folder: pathlib.Path, read: pathlib.Path) -> list[str]:
    return [entry.name for entry in sorted(folder.iterdir()) if entry.is_dir() and entry != read]


def unread(folder: pathlib.Path, others: Mapping[str, list[str]]) -> str:
    """The sentence of `Source.unread`; `others` are the names that are not read, by the reason."""
    parts = []
    for reason, names in others.items():
        if names:
            more = f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else ""
            parts.append(f"{', '.join(names[:_SHOWN])}{more} ({reason})")
    return f"{folder}: not read: {'; '.join(parts)}" if parts else ""


def pair_in(name: str) -> tuple[str, str] | None:
    """The two language codes in a file's name as it writes them: `de-en.train.tsv`, `train_de_en.tsv`.

    They stand next to each other between dots, joined by `-` or `_`. None if no two do, or if two readings fit.
    """
    readings = next(filter(None, map(_pairs, name.split("."))), [])
    return readings[0] if len(readings) == 1 else None


def _pairs(part: str) -> list[tuple[str, str]]:
    """The longest readings of a part of a name as two codes of different languages."""
    words = [(match.start(), match.end()) for match in re.finditer(r"[^-_]+", part)]
    readings: dict[int, list[tuple[str, str]]] = {}
    for first, left_words, right_words in itertools.product(range(len(words)), (1, 2, 3), (1, 2, 3)):
        middle, end = first + left_words, first + left_words + right_words
        if end <= len(words):
            left, right = part[words[first][0] : words[middle - 1][1]], part[words[middle][0] : words[end - 1][1]]
            codes = language(left), language(right)
            if None not in codes and codes[0] != codes[1]:
                readings.setdefault(end - first, []).append((left, right))
    return readings[max(readings)] if readings else []


def why_no_pair(name: str) -> str:
    """What keeps `pair_in` from seeing two languages in a name, in brackets; empty where there is nothing like them."""
    stem = name.removesuffix(".gz")
    for suffix in _SUFFIXES:
        stem = stem.removesuffix(suffix)
    for part in stem.split("."):
        if readings := _pairs(part):
            return f" ({' or '.join(' and '.join(pair) for pair in readings)}?)" if len(readings) > 1 else ""
        words = [word for word in re.split("[-_]", part) if not (_TRAIN.fullmatch(word) or _HELD_OUT.fullmatch(word))]
        if len(words) == 2:
            try:
                normalize(words[0]), normalize(words[1])
            except UserError as error:
                return f" ({error})"
    return ""


def moses_prefix(file: pathlib.Path) -> pathlib.Path | None:
    """`corpus.de-en` of `corpus.de-en.de`."""
    stem, _, side = file.name.removesuffix(".gz").rpartition(".")
    pair = pair_in(stem)
    return file.with_name(stem) if pair and side in pair else None


def moses_side(prefix: pathlib.Path, side: str) -> pathlib.Path:
    """The file of one language of a Moses pair, which may be compressed.

    Raises:
      UserError: there is none.
    """
    plain = prefix.with_name(f"{prefix.name}.{side}")
    for file in (plain, plain.with_name(f"{plain.name}.gz")):
        if file.is_file():
            return file
    raise UserError(f"{plain}: no such file; the Moses pair {prefix} needs one file for each language")


@functools.lru_cache(maxsize=1 << 12)  # an error is made with its remedy, which takes time
def language(text: str) -> str | None:
    """The language whose code `text` is; None if it is none."""
    try:
        return normalize(text)
    except UserError:
        return None
