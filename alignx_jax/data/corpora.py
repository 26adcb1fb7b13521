"""TFDS builders: text files, read once, checked, and kept as ArrayRecord for random access. Needs no TensorFlow."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import itertools
import json
import logging
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import ClassVar, Literal

import tensorflow_datasets as tfds

from alignx_jax.data import builders, cache, on_beam, readers, shards, sources
from alignx_jax.data.languages import normalize
from alignx_jax.exits import UserError

Kind = Literal["parallel", "instructions"]

FORMAT = 4
"""Raise it when what is written changes, and every cached corpus is prepared again."""


@dataclasses.dataclass
class SourceConfig(tfds.core.BuilderConfig):
    """The files that a builder reads."""

    files: tuple[pathlib.Path, ...] = ()
    on_error: Literal["stop", "skip"] = "stop"
    pairs: Literal["pivot", "all"] = "pivot"
    beam: str | None = None
    """Options of an Apache Beam pipeline that reads them; None: this process reads them."""


class _TextBuilder(shards.InOrder, skip_registration=True):
    """Writes the records of its files in their order; lists what it skipped in `skipped.txt`."""

    VERSION = tfds.core.Version(f"{FORMAT}.0.0")
    url_infos: ClassVar = {}  # no downloads; TFDS 4.9.10 looks for them through a package that it does not require
    FIELDS: tuple[str, ...]
    READ: Callable[..., Iterator[readers.Record | readers.BadLine]]

    @property
    def _read(self) -> on_beam.Read:
        return type(self).READ

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict({field: tfds.features.Text() for field in self.FIELDS}),
            disable_shuffling=True,
            metadata=tfds.core.MetadataDict(skipped=0),
        )

    def _split_generators(self, dl_manager):
        del dl_manager  # nothing is downloaded
        return {"train": self._with_beam() if self.builder_config.beam else self._generate_examples()}

    def _generate_examples(self):
        count = 0
        with open(self.data_path / "skipped.txt", "w", encoding="utf-8") as skipped:
            records = self._read(list(self.builder_config.files))
            for record in records:
                if isinstance(record, dict):
                    yield count, record
                    count += 1
                    continue
                if self.builder_config.on_error == "stop":
                    raise record.error(skip_helps=bool(count) or _has_good(records))
                skipped.write(f"{record}\n")
                self.info.metadata["skipped"] += 1
        if not count:
            raise UserError(f"{self.builder_config.files[0]}: not one record that can be used")

    def _with_beam(self):
        config = self.builder_config
        stop = config.on_error == "stop"
        starts, bad = on_beam.survey(config.files, self._read, stop, config.beam, pathlib.Path(self.data_path))
        (self.data_path / "skipped.txt").write_text("".join(f"{line}\n" for line in bad), encoding="utf-8")
        self.info.metadata["skipped"] = len(bad)
        return on_beam.records(config.files, self._read, starts)


def _has_good(records: Iterator[readers.Record | readers.BadLine]) -> bool:
    """Whether one of the next lines is good."""
    with contextlib.suppress(UserError):
        return any(isinstance(record, dict) for record in itertools.islice(records, 1000))
    return False


class ParallelText(_TextBuilder):
    """Sentence pairs with their languages."""

    FIELDS = ("source", "target", "source_language", "target_language", "line", "origin")
    READ = staticmethod(readers.read_parallel)

    @property
    def _read(self) -> on_beam.Read:
        return functools.partial(
            _filled, functools.partial(type(self).READ, pairs=self.builder_config.pairs), self.FIELDS
        )


def _filled(read: on_beam.Read, names: Sequence[str], files: list[pathlib.Path]):
    """What is read of the files, every record with all fields, as TFDS wants them."""
    for record in read(files):
        yield dict.fromkeys(names, "") | record if isinstance(record, dict) else record


class Instructions(_TextBuilder):
    """Instructions with an optional input and the answer, or chats; `language` and what a record lacks are empty."""

    FIELDS = ("instruction", "input", "output", "messages", "language", "origin")
    READ = staticmethod(readers.read_instructions)

    @property
    def _read(self) -> on_beam.Read:
        return functools.partial(_filled, type(self).READ, self.FIELDS)


_BUILDERS: dict[Kind, type[_TextBuilder]] = {"parallel": ParallelText, "instructions": Instructions}
_FILES = {"parallel": sources.parallel, "instructions": sources.instructions}
_PUBLISHED = {"parallel": builders.PARALLEL, "instructions": builders.INSTRUCTIONS}


@dataclasses.dataclass(frozen=True)
class Corpus:
    """A prepared source."""

    source: str
    """As the configuration names it."""
    kind: Kind
    fingerprint: str
    """Changes with the content or the place of any of its files."""
    content: str
    """Changes with the content or the name of any of its files, not with where they lie."""
    folder: pathlib.Path
    skipped: int
    """Bad lines left out, listed in `skipped.txt` in `folder`."""
    unread: str
    """A sentence on files beside its own that are not read; empty where there are none."""
    data: Sequence[bytes] = dataclasses.field(repr=False)

    def __len__(self) -> int:
        return len(self.data)

    def records(self, indices: Sequence[int]) -> list[readers.Record]:
        """The records at `indices`."""
        return [shards.parse(record) for record in self.data.__getitems__([int(i) for i in indices])]


def prepare(
    kind: Kind,
    source: str,
    cache_folder: pathlib.Path,
    on_error: Literal["stop", "skip"],
    pairs: Literal["pivot", "all"] = "pivot",
    beam: str | None = None,
) -> Corpus:
    """Reads a source into `cache_folder`, or finds it there from an earlier run over the same content.

    Args:
      pairs: of a multi-way line of parallel text.
      beam: options of an Apache Beam pipeline that reads the files, with the same result; None: this process does.

    Raises:
      UserError: no such source, or (with `on_error="stop"`) its first bad line, with file, line, field and the remedy.
    """
    if found := _published(source, _PUBLISHED[kind]):
        builder, name = found
        identity = f"{builder.name}/{name}"
        return _corpus(kind, source, identity, identity, _build(builder, name, kind, cache_folder))
    files, unread = _FILES[kind](source)
    contents = [(str(file), _digest(file)) for file in files]
    how = FORMAT, kind, on_error, *([pairs] if kind == "parallel" else [])
    fingerprint = cache.fingerprint(*how, contents)
    root = pathlib.Path(source).expanduser()
    content = cache.fingerprint(*how, [(_name(pathlib.Path(file), root), digest) for file, digest in contents])
    config = SourceConfig(name=kind, files=tuple(files), on_error=on_error, pairs=pairs, beam=beam)
    options = {"download_config": tfds.download.DownloadConfig(beam_options=on_beam.options(beam))} if beam else {}
    build = functools.partial(_BUILDERS[kind], config=config, file_format="array_record")

    with _quiet():
        write = functools.partial(_write, build, cache_folder, options)
        builder = build(data_dir=cache.make_once(cache_folder.expanduser() / kind / fingerprint, write))
        return _corpus(kind, source, fingerprint, content, builder, unread)


def _name(file: pathlib.Path, root: pathlib.Path) -> str:
    """Of a file in a source, wherever that lies."""
    return str(file.relative_to(root)) if file != root and file.is_relative_to(root) else file.name


def place(kind: Kind, source: str) -> str:
    """A source as any working directory has it: the absolute path, unless it is a published data set or the sample."""
    if source == "sample" or _published(source, _PUBLISHED[kind]):
        return source
    return str(pathlib.Path(source).expanduser().absolute())


def sentences(source: str, cache_folder: pathlib.Path) -> list[dict[str, str]] | None:
    """The sentences by language code of a published multi-way data set, `flores200:devtest`; None if it is none.

    Of several varieties with the same code, such as `eng` and `eng-GB`, the shortest name is taken, then the first in
    the alphabet.

    Raises:
      UserError: no such split, or an archive that is not there or damaged.
    """
    name, _, split = source.partition(":")
    if name not in builders.MULTIWAY or pathlib.Path(source).expanduser().exists():
        return None
    cls = builders.MULTIWAY[name]
    if split not in cls.SPLITS:
        raise UserError(f"{source}: name a split, {' or '.join(f'{name}:{split}' for split in cls.SPLITS)}")
    codes: dict[str, str] = {}
    for code in sorted(cls.LANGUAGES, key=lambda code: (len(code), code)):
        codes.setdefault(normalize(code), code)
    taken = {code: normal for normal, code in codes.items()}
    found = []
    for record in _build(cls, None, "multiway", cache_folder).as_data_source(split):
        lines = zip(record["translations"]["language"], record["translations"]["translation"], strict=True)
        texts = {code.decode(): line.decode() for code, line in lines}
        found.append({taken[code]: line for code, line in texts.items() if code in taken})
    return found


def _published(source: str, kinds: dict[str, type[builders.Published]]):
    """The builder and the configuration that `opus100/de-en` names, unless there is such a file or folder."""
    name, _, config = source.partition("/")
    if name not in kinds or pathlib.Path(source).expanduser().exists():
        return None
    if config not in kinds[name].builder_configs:
        turned = "-".join(config.split("-")[::-1])
        near = [turned] * (turned in kinds[name].builder_configs) or list(kinds[name].builder_configs)
        raise UserError(
            f"{source}: no such file or folder, and {name} has {', '.join(f'{name}/{one}' for one in near)}"
        )
    return kinds[name], config


def _build(cls: type[builders.Published], config: str | None, kind: str, cache_folder: pathlib.Path):
    """A published data set, built into the cache or found there. Its archives are in `downloads` of the cache."""
    cache_folder = cache_folder.expanduser()
    downloads = cache_folder / "downloads"
    build = functools.partial(cls, config=config, file_format="array_record")
    options = {
        "download_dir": downloads,
        "download_config": tfds.download.DownloadConfig(manual_dir=downloads / "manual"),
    }
    with _quiet():
        folder = cache_folder / kind / "-".join(filter(None, [cls.name, config, str(cls.VERSION)]))
        return build(data_dir=cache.make_once(folder, functools.partial(_write, build, cache_folder, options)))


def _write(build: Callable[..., tfds.core.DatasetBuilder], cache_folder: pathlib.Path, options: dict, folder) -> None:
    try:
        build(data_dir=folder).download_and_prepare(**options)
    except RuntimeError as error:  # what ArrayRecord makes of any failure to write, and Beam of any in a worker
        raise cache.unwritable(cache_folder, error) from error


def _corpus(
    kind: Kind, source: str, fingerprint: str, content: str, builder: tfds.core.DatasetBuilder, unread: str = ""
) -> Corpus:
    folder = pathlib.Path(builder.data_path)
    if "train" not in builder.info.splits:
        raise UserError(f"{source}: has no sentences for training, only {', '.join(builder.info.splits)}")
    metadata = json.loads((folder / "metadata.json").read_text())
    if "content" in metadata:
        fingerprint, content = (cache.fingerprint(x, metadata["content"]) for x in (fingerprint, content))
    data = builder.as_data_source("train").data_source
    return Corpus(source, kind, fingerprint, content, folder, metadata["skipped"], unread, data)


def _digest(file: pathlib.Path) -> str:
    if not file.is_file():
        raise UserError(f"{file}: no such file")
    try:
        str(file).encode()  # it goes into the records
        if not file.stat().st_size:
            raise UserError(f"{file}: empty, as a copy is that was cut short; fetch it again, or take it away")
        return cache.digest(file)
    except UnicodeEncodeError:
        raise UserError(f"{file}: its name is not UTF-8; rename it") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from None


@contextlib.contextmanager
def _quiet():
    """TFDS prints and warns about every custom configuration; what matters is in the errors."""
    tfds.disable_progress_bar()
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
