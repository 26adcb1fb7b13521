"""Text files as records: every line is a record, or a bad line with its place and reason."""

from __future__ import annotations

import itertools
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Literal

from alignx_jax.data import arrow_files, fields
from alignx_jax.data.fields import Bad, BadLine, Record
from alignx_jax.data.languages import names_of
from alignx_jax.data.sources import kind, moses_prefix, moses_side, pair_in, why_no_pair
from alignx_jax.data.text_files import lines, whole
from alignx_jax.exits import UserError

_WORD = re.compile(r"[^\W\d_]+")
_HEADER = frozenset(
    _WORD.findall(
        "source sources src target targets tgt trg text texts sentence sentences segment segments translation original "
        "translations translated reference ref language languages lang input output line lines string code"
    )
)


def apart(files: Sequence[pathlib.Path]) -> list[list[pathlib.Path]]:
    """`files` in parts that give, read one after the other, what all give together: each file, and each Moses pair."""
    firsts = {moses_prefix(file) or file: [file] for file in files}  # one side of a pair stands for both
    return [firsts[name] for name in sorted(firsts, key=lambda name: name not in files)]


def read_parallel(files: list[pathlib.Path], pairs: Literal["pivot", "all"] = "pivot") -> Iterator[Record | BadLine]:
    """The pairs of `sources.parallel`, in order; `pairs` of a multi-way line, as `--data.pairs` has it."""
    for file in files:
        if kind(file) == ".tsv":
            yield from _records(file, _tsv_pairs(file))
        elif kind(file) == ".jsonl":
            yield from _records(file, lambda line: _pairs(fields.json_object(line), pairs))
        elif kind(file) in arrow_files.KINDS:
            yield from _rows(file, lambda row: _pairs(row, pairs))
    for prefix in dict.fromkeys(filter(None, map(moses_prefix, files))):
        pair = pair_in(prefix.name)
        yield from read_moses(*(moses_side(prefix, side) for side in pair), *pair)


def read_instructions(files: list[pathlib.Path]) -> Iterator[Record | BadLine]:
    """The instructions of `sources.instructions`, in order."""
    for file in files:
        if kind(file) == ".jsonl":
            yield from _records(file, lambda line: [fields.instruction(fields.json_object(line))])
            continue
        if kind(file) in arrow_files.KINDS:
            yield from _rows(file, lambda row: [fields.instruction(row)])
            continue
        try:
            items = fields.present(fields.decode(whole(file).decode()))
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{file}: not JSON in UTF-8 ({error}); mend it, or give .jsonl, one object a line"
            ) from None
        if not isinstance(items, list):
            raise UserError(f"{file}: has to be a JSON array of instructions, or .jsonl with one a line")
        for number, item in enumerate(items, 1):
            origin = f"{file}: element {number}"
            try:
                yield fields.instruction(item) | {"origin": origin}
            except Bad as bad:
                yield bad.at(origin)


def read_moses(
    left: pathlib.Path, right: pathlib.Path, source_language: str, target_language: str
) -> Iterator[Record | BadLine]:
    """The pairs of two files that match line by line.

    Raises:
      UserError: they have different numbers of lines.
    """
    number, others = 0, lines(right)
    for number, source in lines(left):
        _, target = next(others, (0, None))
        if target is None:
            raise UserError(f"{left} has more lines than {right} ({number - 1}); they have to match line by line")
        origin = f"{left}:{number}"
        try:
            pair = [_decoded(side, raw) for side, raw in (("src", source), ("tgt", target))]
            yield fields.pair(*pair, source_language, target_language) | {"origin": origin}
        except Bad as bad:
            yield bad.at(origin)
    if next(others, None) is not None:
        raise UserError(f"{right} has more lines than {left} ({number}); they have to match line by line")


def _decoded(field: str, raw: bytes) -> str:
    try:
        return fields.text(raw)
    except Bad as bad:
        raise Bad(f"{field}: {bad}") from None


def _records(file: pathlib.Path, parse) -> Iterator[Record | BadLine]:
    """`parse(text of a line) -> list of records` over a file; blank lines hold nothing."""
    for number, raw in lines(file):
        origin = f"{file}:{number}"
        try:
            text = fields.text(raw)
            records = parse(text) if text.strip() else []
        except Bad as bad:
            yield bad.at(origin)
        else:
            for record in records:
                yield record | {"origin": origin}


def _rows(file: pathlib.Path, parse) -> Iterator[Record | BadLine]:
    """`parse(row) -> list of records` over a Parquet or Arrow file."""
    for number, row in arrow_files.rows(file):
        origin = f"{file}: row {number}"
        try:
            if isinstance(row, Bad):
                raise row
            for record in parse(row):
                yield record | {"origin": origin}
        except Bad as bad:
            yield bad.at(origin)


def _tsv_pairs(file: pathlib.Path):
    in_name, is_first = pair_in(file.name), True

    def parse(line: str) -> list[Record]:
        nonlocal is_first
        first, is_first = is_first, False
        columns = line.split("\t")
        if len(columns) == 4:
            languages, texts = columns[:2], columns[2:]
        elif len(columns) == 2 and in_name:
            languages, texts = in_name, columns
        elif len(columns) == 2:
            reason = f"2 columns, and no language pair in the file's name{why_no_pair(file.name)}; "
            reason += "name the file like de-en.train.tsv"
            raise UserError(f"{file}: {reason}") if first else Bad(reason)
        else:
            raise Bad(f"{len(columns)} columns; a line is src_lang, tgt_lang, src, tgt, or src, tgt, apart by tabs")
        if first and _is_header(texts, languages):
            raise Bad(f"looks like a header ({', '.join(map(str.strip, texts))}), not like a pair; remove the line")
        return [fields.pair(*texts, *languages)]

    return parse


def _is_header(texts: Sequence[str], languages: Sequence[str]) -> bool:
    """Whether both cells hold nothing but names of languages and words such as `source`."""
    known = _HEADER.union(*map(names_of, languages))
    words = [_WORD.findall(text.casefold()) for text in texts]
    return all(words) and known.issuperset(word for cell in words for word in cell)


def _pairs(item: dict, pairs: str) -> list[Record]:
    if isinstance(texts := item.get("translation"), dict):  # as Hugging Face has pairs
        if len(texts) != 2:
            raise Bad(f"field 'translation' has to hold two languages, not {len(texts)} ({', '.join(texts)})")
        (source_language, source), (target_language, target) = texts.items()
        return [fields.pair(source, target, source_language, target_language)]
    if "text" not in item:
        return [fields.pair(*(fields.get(item, name) for name in ("src", "tgt", "src_lang", "tgt_lang")))]
    sentences = fields.sentences(item)
    if pairs == "pivot" and ("en" not in sentences or len(sentences) == 1):
        raise Bad("field 'text' has to hold 'en' and another language; every other language is paired with English")
    if len(sentences) == 1:
        raise Bad("field 'text' has to hold two languages or more; every two of them are a pair")
    ways = [(code, "en") for code in sentences if code != "en"]
    line = str(fields.text_hash(sentences.get("en") or sentences[min(sentences)]))  # what all its pairs say
    return [
        {"source": sentences[s], "target": sentences[t], "source_language": s, "target_language": t, "line": line}
        for s, t in (itertools.combinations(sentences, 2) if pairs == "all" else ways)
    ]
