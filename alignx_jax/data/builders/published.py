"""What the builders of published data sets share: the archive from a folder or the network, checked records, counts.

Everything runs without TensorFlow, which TFDS needs to unpack archives; so the builders unpack the files that they read
by themselves.
"""

from __future__ import annotations

import contextlib
import functools
import gzip
import hashlib
import json
import pathlib
import posixpath
import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import IO, ClassVar

import tensorflow_datasets as tfds
from tensorflow_datasets.core.download import checksums, downloader
from tensorflow_datasets.core.download.download_manager import NonMatchingChecksumError

from alignx_jax.data.fields import Bad, BadLine, Record, sentence, text
from alignx_jax.data.shards import InOrder
from alignx_jax.data.text_files import LARGEST, lines
from alignx_jax.exits import UserError

CHECKSUMS = pathlib.Path(__file__).with_name("checksums.tsv")
"""Size and SHA-256 of every archive that was registered; TFDS compares what it downloads."""

downloader.MAX_RETRIES = 4  # of TFDS's ten the last alone takes 100 seconds, without a network too

CODES: dict[str, list[str]] = json.loads(pathlib.Path(__file__).with_name("codes.json").read_text())
"""Configurations or languages of each data set, as it writes them."""


class Published(InOrder, skip_registration=True):
    """Records of an archive in the order of its lines, with `FIELDS` of text.

    A line that gives no record is left out, counted in the metadata (`skipped`) and listed in `skipped.txt`: a
    published file is not for its reader to mend. The metadata's `content` changes with any of the records.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: ClassVar = {"1.0.0": "First version."}
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "Where there is no network, put the archive, under the name that it is published by, "
    )
    MANUAL_DOWNLOAD_INSTRUCTIONS += "into the manual directory; its address is that of the builder's `url`."
    url_infos: ClassVar = checksums.load_url_infos(CHECKSUMS)
    FIELDS: tuple[str, ...]
    ABOUT: ClassVar[dict[str, str]]
    """description, homepage, citation and license of the `DatasetInfo`."""

    @property
    def url(self) -> str:
        """The address of the archive of this configuration."""
        raise NotImplementedError

    def splits(self, archive: pathlib.Path) -> dict[str, Callable[[], Iterable[Record | BadLine]]]:
        """What reads each split that the archive has."""
        raise NotImplementedError

    def features(self) -> tfds.features.FeaturesDict:
        """The features of a record."""
        return tfds.features.FeaturesDict({field: tfds.features.Text() for field in self.FIELDS})

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            features=self.features(),
            disable_shuffling=True,
            metadata=tfds.core.MetadataDict(skipped=0, content=""),
            **self.ABOUT,
        )

    def _split_generators(self, dl_manager):
        splits = self.splits(self._archive(dl_manager))
        if not splits:
            raise UserError(f"{self.url}: the archive has no file of {self.builder_config.name}; fetch it again")
        return {name: self._generate_examples(name, read) for name, read in splits.items()}

    def _generate_examples(self, split: str, read: Callable[[], Iterable[Record | BadLine]]):
        content, count = hashlib.blake2b(digest_size=10), 0
        with open(self.data_path / "skipped.txt", "a", encoding="utf-8") as skipped:
            for record in read():
                if isinstance(record, BadLine):
                    skipped.write(f"{record.origin}: {record.reason}\n")
                    self.info.metadata["skipped"] += 1
                    continue
                content.update(repr(sorted(record.items())).encode())
                yield count, record
                count += 1
        self.info.metadata["content"] += f"{split} {content.hexdigest()} "

    def _archive(self, dl_manager) -> pathlib.Path:
        """The archive in the manual directory, else downloaded.

        Raises:
          UserError: it is in neither place, or not what its checksum says.
        """
        name = posixpath.basename(self.url)
        with contextlib.suppress(AssertionError):  # no manual directory
            if (dl_manager.manual_dir / name).is_file():
                return pathlib.Path(dl_manager.manual_dir / name)
        try:
            return pathlib.Path(dl_manager.download(self.url))
        except NonMatchingChecksumError as error:
            raise UserError(
                f"{self.url}: not the file that was registered ({error}); delete it and try again"
            ) from None
        except Exception as error:  # of requests, urllib3 or TFDS
            raise UserError(
                f"{self.url}: cannot be downloaded ({type(error).__name__}: {error}); fetch it where there is a "
                f"network, and put {name} into the folder downloads/manual of --data.cache"
            ) from None

    def relative(self, record: Record | BadLine, folder: pathlib.Path) -> Record | BadLine:
        """`record` with an origin that names the archive's member, not a temporary file in `folder`."""
        if isinstance(record, BadLine):
            return record._replace(origin=record.origin.removeprefix(f"{folder}/"))
        return record | {"origin": record["origin"].removeprefix(f"{folder}/")}


def names(archive: pathlib.Path) -> list[str]:
    """The files in a tar archive.

    Raises:
      UserError: as `unpacked`.
    """
    with _tar(archive) as members:
        return [name for name, _ in members]


@contextlib.contextmanager
def unpacked(archive: pathlib.Path, members: Sequence[str], parent: pathlib.Path) -> Iterator[list[pathlib.Path]]:
    """Those members of a tar archive as files of a temporary folder in `parent`, under their whole names.

    Raises:
      UserError: the archive is damaged, has none of a name, inflates to more than `LARGEST`, or has a member, wanted or
        not, that would leave the folder.
    """
    with tempfile.TemporaryDirectory(dir=parent) as folder:
        missing, files = set(members), [pathlib.Path(folder, member) for member in members]
        with _tar(archive) as found:
            for name, content in found:
                if name in missing:
                    file = pathlib.Path(folder, name)
                    file.parent.mkdir(parents=True, exist_ok=True)
                    with open(file, "wb") as to:
                        shutil.copyfileobj(content(), to)
                    missing.remove(name)
        if missing:
            raise UserError(f"{archive}: no {sorted(missing)[0]} in it; fetch the archive again")
        yield files


class _Inflated(gzip.GzipFile):
    """What a gzip file inflates to, and no more than `LARGEST` of it."""

    def read(self, size: int | None = -1) -> bytes:
        content = super().read(size)
        if self.tell() > LARGEST:
            raise UserError(f"{self.name}: inflates to more than {LARGEST:,} bytes; is this the right file?")
        return content


@contextlib.contextmanager
def _tar(archive: pathlib.Path) -> Iterator[Iterator[tuple[str, Callable[[], IO[bytes]]]]]:
    """The files in a tar archive that gzip compressed, in their order: names, and what opens each before the next.

    What was read of them is as it was packed once the context is left: gzip's checksum comes at the very end.
    """
    try:
        # As a stream: never backwards, where a size below zero would lead.
        with _Inflated(archive) as stream, tarfile.open(fileobj=stream, mode="r|") as tar:
            yield _files(archive, tar)
            while stream.read(1 << 16):  # tarfile stops where the tar ends, or is damaged
                pass
    except UserError:
        raise
    except (tarfile.TarError, zlib.error, EOFError, OSError, ValueError, IndexError, RecursionError) as error:
        # The last three are what tarfile makes of headers that gzip did not damage.
        if isinstance(error, OSError) and error.errno:
            raise
        raise UserError(f"{archive}: a damaged archive ({error}); delete it, and fetch it again") from None


def _files(archive: pathlib.Path, tar: tarfile.TarFile) -> Iterator[tuple[str, Callable[[], IO[bytes]]]]:
    for info in iter(tar.next, None):
        tar.members.clear()  # kept for going back, and a million headers inflate from a megabyte
        if _leaves(info):
            link = f", a link to {info.linkname!r}," * (info.issym() or info.islnk())
            raise UserError(
                f"{archive}: its member {info.name!r}{link} would leave the folder that it is unpacked into; delete "
                "the archive, and fetch it from who published it"
            )
        if info.isfile() and not info.issparse():  # holes take nothing of what an archive may inflate to
            yield posixpath.normpath(info.name), functools.partial(tar.extractfile, info)


def _leaves(info: tarfile.TarInfo) -> bool:
    """Whether the name of a member, or the target of a link, is outside of the folder of its archive."""
    paths = [info.name]
    if info.issym():
        paths.append(posixpath.normpath(posixpath.join(posixpath.dirname(info.name), info.linkname)))
    elif info.islnk():
        paths.append(info.linkname)  # from the top of the archive
    return any(posixpath.isabs(path) or ".." in path.split("/") for path in paths)


class Multiway(Published, skip_registration=True):
    """Sentences in every language of `LANGUAGES` that the archive has, translations of each other, for evaluation."""

    LANGUAGES: tuple[str, ...]
    """Codes as the data set writes them."""
    SPLITS: tuple[str, ...]

    def features(self) -> tfds.features.FeaturesDict:
        translations = tfds.features.TranslationVariableLanguages(languages=self.LANGUAGES)
        return tfds.features.FeaturesDict({"id": tfds.features.Text(), "translations": translations})

    def aligned(self, archive: pathlib.Path, split: str, members: dict[str, str], ids: str | None = None):
        """A record for each line, from the members by language; `ids` is a member with an identifier a line."""
        with unpacked(archive, [*members.values(), *filter(None, [ids])], self.data_path) as files:
            columns = [[(number, raw) for number, raw in lines(file)] for file in files]
        counts = {file: len(column) for file, column in zip([*members.values(), ids], columns, strict=False)}
        if len(set(counts.values())) > 1:
            raise UserError(f"{archive}: its files do not match line by line ({counts}); fetch the archive again")
        for number, row in enumerate(zip(*columns, strict=True), 1):
            try:
                found = {
                    code: sentence(text(raw), member)
                    for (code, member), (_, raw) in zip(members.items(), row, strict=False)
                }
                yield {"id": text(row[-1][1]).strip() if ids else f"{split}:{number}", "translations": found}
            except Bad as bad:
                yield bad.at(f"{split}:{number}")
