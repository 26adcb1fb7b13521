"""Text files as records: every line is a record, or a bad line with its place and reason."""

from __future__ import annotations

import itertools
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Literal

from alignx_jax.data import arrow_files, fields
from alignx_jax.data.fields import Bad, BadLine, Record
from alignx_jax.data.languages import normalize
from alignx_jax.data.text_files import lines, whole
from alignx_jax.exits import UserError

SAMPLE = pathlib.Path(__file__).parent.parent / "sample" / "data"


_PARALLEL = (".tsv", ".jsonl", *arrow_files.KINDS)
_INSTRUCTIONS = (".json", ".jsonl", *arrow_files.KINDS)


def parallel_files(source: str) -> list[pathlib.Path]:
    """The files of a parallel source; a Moses pair is the two files of its prefix.

    Raises:
      UserError: nothing there, or nothing that can be read.
    """
    if source == "sample":
        return [SAMPLE / "parallel.train.jsonl.gz"]
    path = pathlib.Path(source).expanduser()
    if path.is_dir():
        return arrow_files.of_dataset(path) or _of_folder(
            path, lambda file: _kind(file) in _PARALLEL or _moses_prefix(file) is not None
        )
    if path.is_file():
        if _kind(path) not in _PARALLEL:
            raise UserError(
                f"{source}: parallel text is read from .tsv and .jsonl (.gz too), .parquet and .arrow files; name a "
                "Moses pair by its prefix"
            )
        return [path]
    if pair := _pair_in(path.name.rpartition(".")[2]):
        return [_moses_side(path, side) for side in pair]
    raise UserError(f"{source}: no such file or folder, and no Moses prefix such as corpus.de-en")


def instruction_files(source: str) -> list[pathlib.Path]:
    """The files of an instruction source.

    Raises:
      UserError: nothing there, or nothing that can be read.
    """
    if source == "sample":
        return [SAMPLE / "instructions.jsonl.gz"]
    path = pathlib.Path(source).expanduser()
    if path.is_dir():
        return arrow_files.of_dataset(path) or _of_folder(path, lambda file: _kind(file) in _INSTRUCTIONS)
    if not path.is_file():
        raise UserError(f"{source}: no such file or folder")
    if _kind(path) not in _INSTRUCTIONS:
        raise UserError(
            f"{source}: instructions are read from .json and .jsonl (.gz too), .parquet and .arrow files; rename or "
            "convert it"
        )
    return [path]


def apart(files: Sequence[pathlib.Path]) -> list[list[pathlib.Path]]:
    """`files` in parts that give, read one after the other, what all give together: each file, and each Moses pair."""
    firsts = {_moses_prefix(file) or file: [file] for file in files}  # one side of a pair stands for both
    return [firsts[name] for name in sorted(firsts, key=lambda name: name not in files)]


def read_parallel(files: list[pathlib.Path], pairs: Literal["pivot", "all"] = "pivot") -> Iterator[Record | BadLine]:
    """The pairs of `parallel_files`, in order; `pairs` of a multi-way line, as `--data.pairs` has it."""
    for file in files:
        if _kind(file) == ".tsv":
            yield from _records(file, _tsv_pairs(file))
        elif _kind(file) == ".jsonl":
            yield from _records(file, lambda line: _pairs(fields.json_object(line), pairs))
        elif _kind(file) in arrow_files.KINDS:
            yield from _rows(file, lambda row: _pairs(row, pairs))
    for prefix in dict.fromkeys(filter(None, map(_moses_prefix, files))):
        pair = _pair_in(prefix.name.rpartition(".")[2])
        yield from read_moses(*(_moses_side(prefix, side) for side in pair), *pair)


def read_instructions(files: list[pathlib.Path]) -> Iterator[Record | BadLine]:
    """The instructions of `instruction_files`, in order."""
    for file in files:
        if _kind(file) == ".jsonl":
            yield from _records(file, lambda line: [fields.instruction(fields.json_object(line))])
            continue
        if _kind(file) in arrow_files.KINDS:
            yield from _rows(file, lambda row: [fields.instruction(row)])
            continue
        try:
            items = fields.decode(whole(file).decode())
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


def read_multiway(path: pathlib.Path) -> Iterator[dict[str, str]]:
    """The sentences by language code of each line of a multi-way JSONL file, or of a folder of plain text.

    Such a folder holds a file for each language, with its code in the file's name: `eng_Latn.devtest` (FLORES),
    `newstest2019-ref.deu.txt` (NTREX), `de.txt`. Other files in it are left alone.

    Raises:
      UserError: a bad line, with its place; two files of a language; files that do not match line by line.
    """
    if path.is_dir():
        yield from _multiway_folder(path)
        return
    for number, raw in lines(path):
        try:
            text = fields.text(raw)
            if text.strip():
                yield fields.sentences(fields.json_object(text))
        except Bad as bad:
            raise UserError(f"{path}:{number}: {bad}") from None


def _multiway_folder(folder: pathlib.Path) -> Iterator[dict[str, str]]:
    files: dict[str, pathlib.Path] = {}
    for file in sorted(file for file in folder.iterdir() if file.is_file()):
        for code in filter(None, map(_code, file.name.split("."))):
            if code in files:
                raise UserError(f"{files[code]} and {file} are both {code}; keep one of them in the folder")
            files[code] = file
            break
    sentences: dict[str, list[str]] = {code: [] for code in files}
    for code, file in files.items():
        for number, raw in lines(file):
            try:
                sentences[code].append(fields.sentence(fields.text(raw), code))
            except Bad as bad:
                raise UserError(f"{file}:{number}: {bad}") from None
    counts = {code: len(lines) for code, lines in sentences.items()}
    if len(set(counts.values())) > 1:
        told = ", ".join(f"{files[code].name} {count}" for code, count in counts.items())
        raise UserError(f"{folder}: the files have to match line by line, but their lines are {told}")
    for line in zip(*sentences.values(), strict=True):
        yield dict(zip(sentences, line, strict=True))


def _code(part: str) -> str | None:
    try:
        return normalize(part)
    except UserError:
        return None


def _of_folder(folder: pathlib.Path, readable) -> list[pathlib.Path]:
    """The readable files of a folder, sorted; only those for training where any file's name says `train`."""
    files = sorted(file for file in folder.iterdir() if file.is_file() and readable(file))
    train = [file for file in files if "train" in re.split(r"[.-]", file.name)]
    if not files:
        raise UserError(f"{folder}: no file here that can be read; see docs/data.md for the formats")
    return train or files


def _kind(file: pathlib.Path) -> str:
    return pathlib.Path(file.name.removesuffix(".gz")).suffix


def _pair_in(part: str) -> tuple[str, str] | None:
    """The two language codes of a part of a file name such as `de-en`, or `de-en-train` as OPUS-100 has it."""
    left, dash, right = part.removesuffix("-train").partition("-")
    try:
        return (left, right) if dash and normalize(left) and normalize(right) else None
    except UserError:
        return None


def _moses_prefix(file: pathlib.Path) -> pathlib.Path | None:
    """`corpus.de-en` of `corpus.de-en.de`."""
    stem, _, side = file.name.removesuffix(".gz").rpartition(".")
    pair = _pair_in(stem.rpartition(".")[2])
    return file.with_name(stem) if pair and side in pair else None


def _moses_side(prefix: pathlib.Path, side: str) -> pathlib.Path:
    plain = prefix.with_name(f"{prefix.name}.{side}")
    for file in (plain, plain.with_name(f"{plain.name}.gz")):
        if file.is_file():
            return file
    raise UserError(f"{plain}: no such file; the Moses pair {prefix} needs one file for each language")


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
    in_name = next(filter(None, map(_pair_in, file.name.split("."))), None)

    def parse(line: str) -> list[Record]:
        columns = line.split("\t")
        if len(columns) == 4:
            source_language, target_language, source, target = columns
        elif len(columns) == 2 and in_name:
            (source, target), (source_language, target_language) = columns, in_name
        elif len(columns) == 2:
            raise Bad("2 columns, and no language pair in the file's name; name the file like de-en.train.tsv")
        else:
            raise Bad(f"{len(columns)} columns; a line is src_lang, tgt_lang, src, tgt, or src, tgt, apart by tabs")
        return [fields.pair(source, target, source_language, target_language)]

    return parse


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
    return [
        {"source": sentences[one], "target": sentences[other], "source_language": one, "target_language": other}
        for one, other in (itertools.combinations(sentences, 2) if pairs == "all" else ways)
    ]
