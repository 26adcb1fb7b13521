"""Sentences for evaluation, the same in every language: a file of multi-way lines, or a folder with a file for each."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

from alignx_jax.data import arrow_files, fields, sources
from alignx_jax.data.fields import Bad
from alignx_jax.data.languages import is_variety
from alignx_jax.data.text_files import lines
from alignx_jax.exits import UserError

_ROWS = (".jsonl", *arrow_files.KINDS)
_OTHER_KINDS = (".tsv", ".csv", ".json", ".xml", ".sgm", ".sgml", ".tmx", ".html", ".yaml", ".yml", ".zip", ".xlsx")


class _Sentences(NamedTuple):
    texts: list[str]
    ids: list
    """What the rows call their sentences; () where they, or plain text, name none."""


def read(path: pathlib.Path, tell: Callable[[str], None] = lambda sentence: None) -> list[dict[str, str]]:
    """The sentences by language code of each line of a multi-way JSONL or Parquet file, or of a folder.

    Such a folder holds a file for each language, with its code in the file's name: plain text, a sentence a line
    (`eng_Latn.devtest` of FLORES, `newstest2019-ref.deu.txt` of NTREX, `de.txt`), or JSONL or Parquet with the sentence
    in the field `text` (`eng_Latn.jsonl` of FLORES+).

    Args:
      tell: called with a sentence on the files of the folder that are not read, if there are any.

    Raises:
      UserError: a bad line, with its place; two files of a language; files that do not match line by line, or of
        another kind.
    """
    if path.is_dir():
        return _folder(path, tell)
    return [_good(origin, fields.sentences, row) for origin, row in _rows(path)]


def _folder(folder: pathlib.Path, tell: Callable[[str], None]) -> list[dict[str, str]]:
    files, others = _by_language(folder)
    columns = {code: _column(file, code) for code, file in files.items()}
    counts = {code: len(column.texts) for code, column in columns.items()}
    if len(set(counts.values())) > 1:
        told = ", ".join(f"{files[code].name} {count}" for code, count in counts.items())
        raise UserError(f"{folder}: the files have to match line by line, but their lines are {told}")
    first = next(iter(columns), None)
    for code, column in columns.items():
        if column.ids and columns[first].ids and column.ids != columns[first].ids:
            place = next(n for n, (a, b) in enumerate(zip(column.ids, columns[first].ids, strict=True), 1) if a != b)
            raise UserError(
                f"{folder}: the files have to match line by line, but the field 'id' of line {place} differs in "
                f"{files[first].name} and {files[code].name}"
            )
    if said := sources.unread(folder, others):
        tell(f"{said}.")
    rows = zip(*(column.texts for column in columns.values()), strict=True)
    return [dict(zip(columns, row, strict=True)) for row in rows]


def _by_language(folder: pathlib.Path) -> tuple[dict[str, pathlib.Path], dict[str, list[str]]]:
    """The file of each language, and the names of the others by the reason why they are none."""
    taken: dict[str, tuple[pathlib.Path, str]] = {}
    others: dict[str, list[str]] = {"no language code in their names": [], "scripts": [], "varieties of others": []}
    for file in sorted(file for file in folder.iterdir() if file.is_file() and not file.name.startswith(".")):
        codes = {sources.language(part): part for part in file.name.split(".") if sources.language(part)}
        if not codes:
            others["no language code in their names"].append(file.name)
        elif file.suffix == ".sh" or _is_script(file):
            others["scripts"].append(file.name)
        elif len(codes) > 1:
            raise UserError(f"{file}: its name holds two language codes ({', '.join(codes.values())}); rename it")
        else:
            ((language, code),) = codes.items()
            other, of_other = taken.get(language, (file, code))
            if other is not file and not is_variety(code) and not is_variety(of_other):
                raise UserError(f"{other} and {file} are both {language}; keep one of them in the folder")
            keep = other if is_variety(code) else file
            taken[language] = (keep, of_other if keep is other else code)
            if other is not file:
                others["varieties of others"].append((file if keep is other else other).name)
    return {language: file for language, (file, _) in taken.items()}, others


def _is_script(file: pathlib.Path) -> bool:
    with open(file, "rb") as stream:
        return stream.read(2) == b"#!"


def _column(file: pathlib.Path, code: str) -> _Sentences:
    """The sentences of one language.

    Raises:
      UserError: a bad line, or a file that is no plain text of sentences.
    """
    if sources.kind(file) in _ROWS:
        rows = [_good(origin, _text_and_id, row) for origin, row in _rows(file)]
        ids = [id for _, id in rows]
        return _Sentences([text for text, _ in rows], ids if None not in ids else [])
    kinds = "a sentence a line in plain text, or .jsonl or .parquet with the field 'text'"
    if sources.kind(file) in _OTHER_KINDS:
        raise UserError(f"{file}: {sources.kind(file)} files are not read here; give {kinds}")
    texts = [_good(f"{file}:{number}", _plain, raw, code) for number, raw in lines(file)]
    for what, is_so in (("a table, apart by tabs", lambda text: "\t" in text), ("JSON", _is_json)):
        if texts and all(map(is_so, texts)):
            raise UserError(f"{file}: every line is {what}, no plain text; give {kinds}")
    return _Sentences(texts, [])


def _rows(file: pathlib.Path) -> Iterator[tuple[str, dict | Bad]]:
    if sources.kind(file) in arrow_files.KINDS:
        yield from ((f"{file}: row {number}", row) for number, row in arrow_files.rows(file))
    else:
        yield from ((f"{file}:{number}", _object(raw)) for number, raw in lines(file) if raw.strip())


def _object(raw: bytes) -> dict | Bad:
    try:
        return fields.json_object(fields.text(raw))
    except Bad as bad:
        return bad


def _good(origin: str, parse: Callable, row, *more):
    """`parse` of a row, and what is bad in it as an error."""
    try:
        if isinstance(row, Bad):
            raise row
        return parse(row, *more)
    except Bad as bad:
        raise UserError(f"{origin}: {bad}") from None


def _plain(raw: bytes, code: str) -> str:
    return fields.sentence(fields.text(raw), code)


def _text_and_id(row: dict) -> tuple[str, object]:
    return fields.sentence(fields.get(row, "text"), "text"), row.get("id")


def _is_json(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False
